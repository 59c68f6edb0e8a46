"""Labels, faces and sound of frame k agree within half a frame: clips that carry their numbers in pictures, sound and labels."""
import struct
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from clips import annotate, beeps, wall, write_video

from sage_nb import media
from sage_nb.affwild2 import Crops, Trial, video_info
from sage_nb.core import DataError
from sage_nb.media import look_closely, read_frames, read_sound, read_trial

BEEPS = [25, 36, 52]  # numbers of the pictures with which a beep begins
LONG = [25, 36, 333, 700, 1111, 1439]  # over a minute; no shift but the right one fits
UNEVEN = np.cumsum(np.r_[0, np.tile([1, 1, 2, 1, 3], 12)[:59]]) / 50
GROUP = 12  # pictures from one key picture to the next, where that matters


def coded(number, size=64) -> np.ndarray:
    "A picture of 4 x 4 fields: red, green and blue in three corners, and twelve bits that count."
    fields = np.zeros((16, 3), np.uint8)
    fields[1:3], fields[4:] = 128, 255 * (number >> np.arange(12)[:, None] & 1)
    fields[[0, 1, 2, 3]] = [255, 0, 0], [0, 128, 0], [128] * 3, [0, 0, 255]
    return fields.reshape(4, 4, 3).repeat(size // 4, 0).repeat(size // 4, 1)


def numbers_of(pictures, margin=0.0) -> np.ndarray:
    "What `coded` pictures [T, S, S, 3] say, of which a margin around them was kept; they must be upright and have their colours."
    size = pictures.shape[1]
    border = size * margin / (1 + 2 * margin)
    at = (border + (np.arange(4) + 0.5) * (size - 2 * border) / 4).astype(int)
    fields = sum(pictures[:, y + at[:, None], x + at].astype(float) for y in (-1, 0, 1) for x in (-1, 0, 1)).reshape(-1, 16, 3) / 9
    assert (fields[:, 0, 0] > 150).all() and (fields[:, 0, 1:] < 100).all(), "red is not where it belongs"
    assert (fields[:, 3, 2] > 150).all() and (fields[:, 3, :2] < 100).all(), "blue is not where it belongs"
    return (fields[:, 4:].mean(2) > 127) @ (1 << np.arange(12))


class Everything:
    "A detector to which the whole picture is a face."

    def __init__(self, side):
        pass

    def __call__(self, image, *sizes):
        return np.array([[0.0, 0.0, image.shape[1], image.shape[0]]]), np.ones(1)


def onsets(sound) -> np.ndarray:
    loud = np.flatnonzero(np.abs(sound["sound"]) > 0.15)
    return sound["sound_start"] + loud[np.r_[True, np.diff(loud) > 1000]] / 16000


def check(folder, video, period, begun, shift=0, monkeypatch=None, unseen=""):
    """Read a video whose k-th picture says k + shift, once with a face that is found in it and once with given faces, and compare.
    `period`: of pictures, seconds; `begun`: numbers in the pictures with which beeps began; `unseen`: what only decoding tells."""
    monkeypatch.setattr(media, "Cascade", Everything)
    count = video_info(video).frames
    annotation = annotate(folder / "t.txt", [((row % 64) / 64, row // 64 / 64) for row in range(1, count + 1)])
    given = folder / "cropped_aligned" / "t"
    given.mkdir(parents=True)
    for number in range(1, count + 1):
        cv2.imwrite(str(given / f"{number:05d}.jpg"), coded(number + shift, 32)[..., ::-1])
    times = []
    for crops, margin in ((None, 0.1), (Crops(given, np.arange(1, count + 1)), 0.0)):
        trial = Trial("t", "train", video, annotation, None, "s", "t", crops)
        data = read_trial(trial, detect_every=1)
        assert data["visual_ok"].all() and data["valid"].all() and np.isnan(data["box"]).all() == (crops is not None)
        rows = np.rint(data["va"] * 64) @ [1, 64]
        assert rows.tolist() == data["frame"].tolist() == list(range(1, count + 1))
        assert numbers_of(data["crops"], margin).tolist() == (data["frame"] + shift).tolist()
        heard, seen = onsets(data), data["time"][np.array(begun) - shift - 1]
        assert len(heard) == len(begun) and np.abs(heard - seen).max() < period / 2
        assert data["audio_ok"][np.array(begun) - shift - 1].all() and (np.diff(data["time"]) > 0).all()
        times.append(data["time"])
    assert look_closely(trial) == unseen
    assert times[0].tolist() == times[1].tolist(), "given and detected faces have one clock"
    return data


def render(folder, suffix, times, begun=BEEPS, late=0.0, sound_rate=44100, layout="mono", hole=None, more=False, stored=lambda image: image, **about):
    images = [stored(coded(number)) for number in range(1, len(times) + 1)]
    moments = times[np.array(begun) - 1]
    if hole:
        moments = moments - hole[1] * (moments > hole[0] / sound_rate)
    sound = beeps(moments, times[-1], late, rate=sound_rate)
    channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    sound = np.stack([sound if channels < 6 or index == 2 else 0 * sound for index in range(channels)])  # of 5.1, the voice is in the centre
    return write_video(folder / f"clip{suffix}", images, times, sound, late, rate=sound_rate, layout=layout, pauses=[hole] if hole else (),
                       more=[0 * sound] if more else (), **about)


RATES = {"12.5": 12.5, "17.3": 17.3, "20": 20, "23.976": 24000 / 1001, "24": 24, "25": 25, "29.97": 30000 / 1001, "30": 30, "50": 50, "59.94": 60000 / 1001}


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
@pytest.mark.parametrize("name", RATES)
def test_every_rate(tmp_path, monkeypatch, name, suffix):
    long = name in ("23.976", "29.97")
    times, begun = np.arange(1480 + 340 * (name == "29.97") if long else 60) / RATES[name], LONG if long else BEEPS
    assert not long or times[-1] > 60
    video = render(tmp_path, suffix, times, begun)
    data = check(tmp_path, video, 1 / RATES[name], begun, monkeypatch=monkeypatch)
    assert data["time"] == pytest.approx(times, abs=2e-3)


QUIRKS = {
    "uneven": (".mp4", UNEVEN, {}), "late sound": (".mp4", None, dict(late=0.6)), "uneven, late sound": (".mp4", UNEVEN, dict(late=0.6)),
    "early sound": (".mp4", 0.7 + np.arange(60) / 25, {}), "8 kHz": (".mp4", None, dict(sound_rate=8000)),
    "late at 8 kHz": (".mp4", None, dict(sound_rate=8000, late=0.6)), "48 kHz": (".avi", None, dict(sound_rate=48000)),
    "stereo": (".mp4", None, dict(layout="stereo")), "stereo in avi": (".avi", None, dict(layout="stereo")),
    "5.1": (".mp4", None, dict(layout="5.1", sound_rate=48000)), "5.1 in avi": (".avi", None, dict(layout="5.1")),
    "two tracks": (".mp4", None, dict(more=True)), "reordered in avi": (".avi", None, dict(codec="libx264")),
    "a hole in the sound": (".mp4", None, dict(hole=(45 * 1024, 0.3))),
}


@pytest.mark.parametrize("quirk", QUIRKS)
def test_every_quirk(tmp_path, monkeypatch, quirk):
    suffix, times, about = QUIRKS[quirk]
    times = np.arange(60) / 25 if times is None else times
    video = render(tmp_path, suffix, times, **about)
    unseen = "11.2 % of the sound is missing" if "hole" in about else ""
    data = check(tmp_path, video, np.diff(times).min(), BEEPS, monkeypatch=monkeypatch, unseen=unseen)
    info, channels = video_info(video), {"stereo": 2, "5.1": 6}.get(about.get("layout"), 1)
    assert data["time"] == pytest.approx(times, abs=2e-3) and info.times.tolist() == [frame.time for frame in read_frames(video)]
    assert (info.sound_rate, info.channels, info.sound_tracks) == (about.get("sound_rate", 44100), channels, 1 + about.get("more", False))
    assert np.abs(data["sound"]).max() == pytest.approx(0.35 if channels == 6 else 0.5, abs=0.07)
    if "hole" in about:
        assert data["audio_ok"][(times > 1.1) & (times < 1.3)].sum() == 0 and data["audio_ok"].mean() > 0.7


@pytest.mark.parametrize("turned", [90, 180, 270])
def test_turned_pictures(tmp_path, monkeypatch, turned):
    video = render(tmp_path, ".mp4", np.arange(60) / 25, stored=lambda image: np.ascontiguousarray(np.rot90(image, -turned // 90)), turned=turned)
    check(tmp_path, video, 1 / 25, BEEPS, monkeypatch=monkeypatch)
    assert video_info(video).turned == turned and not video_info(video).mirrored
    wide = write_video(tmp_path / "wide.mp4", [np.zeros((32, 48, 3), np.uint8)] * 3, np.arange(3) / 25, turned=turned)
    assert next(read_frames(wide)).image.shape == (video_info(wide).height, video_info(wide).width, 3) == ((32, 48, 3) if turned == 180 else (48, 32, 3))


MIRRORS = {  # what the file's matrix does to a stored picture, and what undoes it
    "left to right": ((-1, 0, 0, 1), lambda image: image[:, ::-1], 0), "upside down": ((1, 0, 0, -1), lambda image: image[::-1], 180),
    "transposed": ((0, 1, 1, 0), lambda image: image.transpose(1, 0, 2), 90),
    "across": ((0, -1, -1, 0), lambda image: image[::-1, ::-1].transpose(1, 0, 2), 270),
}


@pytest.mark.parametrize("name", MIRRORS)
def test_mirrored_pictures(tmp_path, monkeypatch, name):
    (a, b, c, d), undone, turned = MIRRORS[name]
    video = render(tmp_path, ".mp4", np.arange(60) / 25, stored=lambda image: np.ascontiguousarray(undone(image)))
    content = bytearray(video.read_bytes())
    place = content.index(b"tkhd") + 44  # of the first track, which is the pictures'
    content[place : place + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    video.write_bytes(content)
    check(tmp_path, video, 1 / 25, BEEPS, monkeypatch=monkeypatch)
    assert video_info(video).mirrored and video_info(video).turned == turned


def remux(path, wanted=lambda number: True, seconds=0.0):
    "Copy a file without some of its pictures, everything `seconds` earlier; what then begins before 0 is there but not shown."
    copy = path.with_name(f"copy_{path.name}")
    with av.open(str(path)) as source, av.open(str(copy), "w", options={"avoid_negative_ts": "disabled"}) as target:
        streams, number = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}, 0
        for packet in source.demux():
            if not packet.size:
                continue
            number += packet.stream.type == "video"
            if packet.stream.type == "video" and not wanted(number):
                continue
            shift = round(Fraction(seconds) / packet.time_base)
            packet.dts, packet.pts = packet.dts - shift, None if packet.pts is None else packet.pts - shift
            if path.suffix == ".avi" and packet.dts < 0:
                continue
            packet.stream = streams[packet.stream_index]
            target.mux(packet)
    return copy


def test_a_trimmed_video(tmp_path, monkeypatch):
    "Its first 20 pictures are there, and not to be shown."
    video = remux(render(tmp_path, ".mp4", np.arange(60) / 25), seconds=Fraction(20, 25))
    check(tmp_path, video, 1 / 25, BEEPS, 20, monkeypatch)
    assert video_info(video).missing == 0 and video_info(video).frames == 40


@pytest.mark.parametrize("bframes", [0, 2])
@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_a_video_that_begins_between_two_key_pictures(tmp_path, monkeypatch, suffix, bframes):
    "Cut after 5 pictures; picture 13 is the first that can be decoded, and was picture 8 of the cut."
    video = render(tmp_path, suffix, np.arange(60) / 25, codec="libx264", x264=f"bframes={bframes}:keyint={GROUP}:min-keyint={GROUP}:scenecut=0")
    cut = 5 if suffix == ".avi" else 0
    video = remux(video, lambda number: number > 5, Fraction(cut, 25))
    info, frames = video_info(video), list(read_frames(video))
    assert info.frames == len(frames) == 60 - GROUP and info.missing == 55 - info.frames
    assert info.times.tolist() == [frame.time for frame in frames]
    check(tmp_path, video, 1 / 25, BEEPS, GROUP, monkeypatch)


def test_a_picture_that_is_missed_within_is_told(tmp_path):
    "The container has it and the decoder passes over it: with given faces nobody knows when those after it were shown."
    video = render(tmp_path, ".mp4", np.arange(60) / 25)
    content = bytearray(video.read_bytes())
    with av.open(str(video)) as container:
        hit = [packet for packet in container.demux(video=0) if packet.size][20]
    content[hit.pos + 4] = content[hit.pos + 4] & 0xE0 | 10  # an end of sequence, says its header now
    video.write_bytes(content)
    trial = Trial("t", "train", video, None, None, "s", "t")
    assert look_closely(trial) == "59 pictures decode of 60 in the container"
    (tmp_path / "faces").mkdir()
    cv2.imwrite(str(tmp_path / "faces" / "00001.jpg"), coded(1))
    with pytest.raises(DataError, match="clip.mp4: 59 pictures decode of 60 in the container, so nobody knows when"):
        look_closely(Trial("t", "train", video, None, None, "s", "t", Crops(tmp_path / "faces", np.array([1]))))


def test_the_main_picture_track_is_seen(tmp_path):
    path = tmp_path / "tracks.mp4"
    with av.open(str(path), "w") as container:
        tracks = [container.add_stream("mpeg4", rate=25, width=32, height=32, pix_fmt="yuv420p") for _ in range(2)]
        for track, mark in zip(tracks, (0, av.stream.Disposition.default)):
            track.disposition = av.stream.Disposition(mark)
        for track, level, count in zip(tracks, (30, 200), (3, 50)):
            for _ in range(count):
                container.mux(track.encode(av.VideoFrame.from_ndarray(wall([level] * 4, 32))))
            container.mux(track.encode())
    assert video_info(path).frames == len(frames := list(read_frames(path))) == 50 and frames[0].image.mean() > 190


def write_sounds(path, codec, rate, levels, moments=None, layout="mono"):
    "A video of two seconds with a sound track for each level: a tone, or beeps at the moments."
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25, width=32, height=32, pix_fmt="yuv420p")
        tracks = [container.add_stream(codec, rate=rate, layout=layout) for _ in levels]
        tracks[-1].disposition = av.stream.Disposition.default
        for _ in range(50):
            container.mux(video.encode(av.VideoFrame.from_ndarray(wall(size=32))))
        container.mux(video.encode())
        for track, level in zip(tracks, levels):
            sound = beeps(moments, 2, rate=rate) / 0.5 if moments else np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)
            step = track.codec_context.frame_size or 1024
            for position in range(0, len(sound), step):
                chunk = av.AudioFrame.from_ndarray(level * sound[None, position : position + step].astype(np.float32), format="fltp", layout=layout)
                chunk.sample_rate, chunk.pts, chunk.time_base = rate, position, Fraction(1, rate)
                container.mux(track.encode(chunk))
            container.mux(track.encode())
    return path


def test_the_default_track_is_heard(tmp_path):
    path = write_sounds(tmp_path / "tracks.mp4", "aac", 16000, (0.1, 0.6))
    assert np.abs(read_sound(path).samples[4000:12000]).max() == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("suffix, codec, rate", [
    *((".avi", "libmp3lame", rate) for rate in (8000, 16000, 44100)), (".avi", "ac3", 48000), (".mp4", "libmp3lame", 44100), (".mp4", "ac3", 48000)])
def test_a_run_in_does_not_make_sound_late(tmp_path, suffix, codec, rate):
    sound = read_sound(write_sounds(tmp_path / f"t{suffix}", codec, rate, [0.5], [0.5, 1.5]))
    heard = onsets(dict(sound=sound.samples, sound_start=sound.start))
    assert np.abs(heard - [0.5, 1.5]).max() < 3e-3
