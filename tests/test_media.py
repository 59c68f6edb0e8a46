"""Pictures, sound and faces: everything at its own number and time."""
import numpy as np
import pytest
from clips import SOUND_RATE, annotate, beeps, draw_face, talking, wall, write_video

from sage_nb.affwild2 import Trial
from sage_nb.core import DataError
from sage_nb.encoders import AudioEncoder, VisualEncoder
from sage_nb.features import CUES, encode_trial
from sage_nb.media import FaceFinder, Sound, crop_face, read_frames, read_sound, read_trial

EVEN = np.arange(60) / 25
UNEVEN = np.cumsum(np.r_[0, np.tile([1, 1, 2, 1, 3], 12)[:59]]) / 50
GAPS = np.cumsum(np.r_[0, np.tile([1, 1, 1, 4, 1], 12)[:59]]) / 25  # AVI leaves places empty for it
FLASH = 31  # number of the picture that is bright


def flashing(count=60, size=64):
    return [np.full((size, size, 3), 230 if number == FLASH else 20, np.uint8) for number in range(1, count + 1)]


@pytest.mark.parametrize("name, times, start, codec", [
    ("even.mp4", EVEN, 0.0, None),
    ("late.mp4", EVEN, 0.55, None),
    ("uneven.mp4", UNEVEN, 0.0, None),
    ("uneven_late.mp4", UNEVEN, 0.55, None),
    ("even.avi", EVEN, 0.0, None),
    ("gaps.avi", GAPS, 0.0, None),
    ("reordered.avi", EVEN, 0.0, "libx264"),  # AVI keeps no presentation times, H.264 reorders pictures
])
def test_flash_and_beep_are_found_together(tmp_path, name, times, start, codec):
    sound = beeps([times[FLASH - 1]], times[-1], start)
    path = write_video(tmp_path / name, flashing(), times, sound, sound_start=start, codec=codec)
    frames = list(read_frames(path))
    assert [frame.number for frame in frames] == list(range(1, 61))
    bright = max(frames, key=lambda frame: frame.image.mean())
    assert bright.number == FLASH
    assert [frame.time - frames[0].time for frame in frames] == pytest.approx(times, abs=1e-3)
    heard = read_sound(path)
    onset = heard.start + np.flatnonzero(np.abs(heard.samples) > 0.15)[0] / heard.rate
    frame_length = 1 / 25
    assert abs(onset - bright.time) < frame_length and abs(onset - times[FLASH - 1]) < frame_length
    assert bright.time == pytest.approx(times[FLASH - 1], abs=1e-3)


@pytest.mark.parametrize("name, times", [("late.mp4", EVEN), ("uneven_late.mp4", UNEVEN)])
def test_a_beep_is_where_it_belongs_in_the_features(tmp_path, name, times):
    middle = times[FLASH - 1] - 0.03  # of a beep of 0.06 s
    path = write_video(tmp_path / name, flashing(), times, beeps([middle], times[-1], 0.55), sound_start=0.55)
    annotation = annotate(tmp_path / "t.txt", [[0, 0]] * 60)
    data = encode_trial(read_trial(Trial("t", "train", path, annotation, None, "s", "t")), VisualEncoder(), AudioEncoder())
    level, heard = data["cues"][:, CUES.index("level")], data["audio_ok"]
    assert not heard[times < 0.5].any() and heard[(times > 0.6) & (times < times[-1] - 0.1)].all()
    assert np.isnan(level[times < 0.5]).all()
    assert abs(int(data["frame"][np.nanargmax(level)]) - FLASH) <= 1
    assert level[np.abs(times - times[FLASH - 1]) > 0.2].size and np.nanmax(level[np.abs(times - times[FLASH - 1]) > 0.2]) < np.nanmax(level) - 30


def test_detection_in_no_picture_is_refused():
    with pytest.raises(DataError, match="detect_every is 0"):
        FaceFinder(detect_every=0)


@pytest.mark.parametrize("rate", [8000, 16000, 48000])
def test_sound_is_resampled_and_keeps_its_length(tmp_path, rate):
    seconds = np.arange(2 * SOUND_RATE) / SOUND_RATE
    path = write_video(tmp_path / "tone.avi", flashing(50), np.arange(50) / 25, 0.4 * np.sin(2 * np.pi * 440 * seconds))
    sound = read_sound(path, rate)
    assert sound.rate == rate and sound.samples.dtype == np.float32 and abs(len(sound.samples) - 2 * rate) <= 2
    assert sound.spans.tolist() == [[0, len(sound.samples)]] and sound.missing() == 0
    middle = sound.samples[rate // 2 : 3 * rate // 2]
    assert np.abs(np.fft.rfft(middle)).argmax() == 440 and np.abs(middle).max() == pytest.approx(0.4, abs=0.02)
    expected = 0.4 * np.sin(2 * np.pi * 440 * np.arange(len(middle)) / rate + 2 * np.pi * 440 * 0.5)
    assert np.abs(middle - expected).max() < 0.03  # not shifted by a sample's worth of resampler delay


def test_a_hole_in_the_sound_is_not_silence(tmp_path):
    seconds = np.arange(2 * SOUND_RATE) / SOUND_RATE
    tone = 0.4 * np.sin(2 * np.pi * 440 * seconds)
    hole = (SOUND_RATE // 1024 * 1024, 0.7)  # from about 1 s on, everything comes 0.7 s later
    path = write_video(tmp_path / "hole.mp4", flashing(), np.arange(60) / 20, tone, pauses=[hole])
    sound = read_sound(path)
    inside = sound.covers(np.array([0.5, 1.3, 1.6, 1.8, 2.5, -1.0, 9.0]))
    assert inside.tolist() == [True, False, False, True, True, False, False]
    (_, begin), (end, _) = sound.spans
    assert (sound.samples[begin:end] == 0).all() and end - begin == pytest.approx(0.7 * 16000, abs=16000 * 0.03)
    assert sound.missing() == pytest.approx((end - begin) / len(sound.samples))
    assert len(sound.samples) == pytest.approx(2.7 * 16000, abs=16000 * 0.05)


def test_covers_is_about_samples():
    sound = Sound(np.zeros(4, np.float32), np.array([[0, 1], [2, 4]]), 10, 0.5)
    assert sound.covers([0.4, 0.5, 0.6, 0.7, 0.8, 0.9]).tolist() == [False, True, False, True, True, False]
    overlapping = Sound(np.zeros(9, np.float32), np.array([[0, 6], [2, 3], [8, 9]]), 10, 0.0)
    assert overlapping.covers(np.arange(9) / 10).tolist() == [True] * 6 + [False] * 2 + [True] and overlapping.missing() == 2 / 9


def test_no_sound_track(tmp_path):
    path = write_video(tmp_path / "mute.mp4", talking(30), np.arange(30) / 30)
    assert read_sound(path) is None
    annotation = annotate(tmp_path / "mute.txt", [[0, 0]] * 30)
    data = read_trial(Trial("mute", "train", path, annotation, None, "s", "mute"))
    assert not data["has_sound"] and not data["audio_ok"].any() and len(data["sound"]) == 0 and data["visual_ok"].all()


def centres(faces):
    return np.array([face.box[0] + face.box[2] / 2 for face in faces])


def test_a_moving_face_is_followed():
    x = 80 + 25 * np.sin(np.arange(120) / 12)
    finder = FaceFinder()
    faces = [finder(draw_face(wall(), x=at, mouth=0.5 + 0.5 * np.sin(number))) for number, at in enumerate(x)]
    assert np.mean([face.found for face in faces]) > 0.98
    assert np.abs(centres(faces) - x)[[face.found for face in faces]].max() < 5
    assert np.abs(np.diff(centres(faces) - x)).max() < 4  # no jumps when the detector steps in


@pytest.mark.parametrize("hidden", ["darkness", "noise in the dark", "gone", "covered"])
def test_no_face_is_claimed_where_none_is(hidden):
    rng = np.random.default_rng(0)
    finder, faces = FaceFinder(), []
    for number in range(60):
        image = draw_face(wall((100, 120, 130, 110)), mouth=0.5 + 0.5 * np.sin(number))
        if 20 <= number < 45:
            if hidden == "darkness":
                image = image // 50
            elif hidden == "noise in the dark":
                image = (image // 50 + rng.integers(0, 12, image.shape)).astype(np.uint8)
            elif hidden == "gone":
                image = wall((100, 120, 130, 110))
            else:
                image[20:150, 20:140] = 90
        faces.append(finder(image))
    found = np.array([face.found for face in faces])
    assert found[:20].all() and not found[20:45].any() and found[46:].all()
    lost = faces[30]
    assert lost.box == (0, 0, 0, 0) and lost.score == 0


def test_a_face_that_leaves_is_let_go():
    finder = FaceFinder()
    faces = [finder(draw_face(wall(), x=at)) for at in np.r_[np.full(10, 80), np.arange(80, 260, 6), np.full(20, 300)]]
    found = np.array([face.found for face in faces])
    assert found[:12].all() and not found[-30:].any()


def test_the_score_tells_detection_from_tracking():
    finder = FaceFinder(detect_every=5)
    scores = [finder(image).score for image in talking(21)]
    assert scores[0] == 1 and 0.6 < min(scores) < 1 and scores.count(1) >= 4


def test_each_of_two_people_keeps_their_side():
    rows = []
    finders = {side: FaceFinder(side=side) for side in ("left", "right")}
    for number in range(30):
        image = np.concatenate([wall(), wall()], 1)
        draw_face(image, x=80 + number / 3, mouth=0.2)
        if not 10 <= number < 20:  # the person on the right bows out for a while
            draw_face(image, x=240 - number / 3, mouth=0.8)
        rows.append([finders[side](image) for side in ("left", "right")])
    left, right = zip(*rows)
    assert all(face.found for face in left) and np.abs(centres(left) - 80 - np.arange(30) / 3).max() < 6
    away = [face.found for face in right[10:20]]
    assert not any(away) and np.abs(centres(right[21:]) - 240 + np.arange(21, 30) / 3).max() < 6


def test_nobody_takes_over_while_the_face_is_followed():
    finder, faces = FaceFinder(), []
    for number in range(40):
        image = draw_face(np.concatenate([wall(), wall()], 1), x=80)
        if number >= 10:
            draw_face(image, x=400 - 6 * number, radius=55)  # a larger face comes in, 240 at the least
        faces.append(finder(image))
    assert np.abs(centres(faces) - 80).max() < 6


def two_faces(number, covered=None, colour=(214, 176, 150)):
    image = draw_face(draw_face(np.concatenate([wall(), wall()], 1), x=240), x=80, radius=47)
    if number >= 10 and covered:
        image[covered] = colour
    return image


def test_nobody_takes_over_while_only_the_tracker_holds_on():
    "A band over the eyes hides the face from the detector, which goes on seeing the other person."
    finder = FaceFinder()
    faces = [finder(two_faces(number, np.s_[60:80, 45:115])) for number in range(60)]
    assert all(face.found for face in faces) and np.abs(centres(faces) - 80).max() < 6
    assert max(face.score for face in faces[10:]) < 1


def test_nobody_takes_over_at_once_when_the_face_is_lost():
    finder = FaceFinder()
    faces = [finder(two_faces(number, np.s_[20:140, 30:130], (90, 90, 90))) for number in range(60)]
    assert all(face.found for face in faces[:10]) and not any(face.found for face in faces[10:39])
    assert all(face.found for face in faces[50:]) and np.abs(centres(faces[50:]) - 240).max() < 6


def test_crop_is_square_and_repeats_the_border():
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, :] = np.arange(60)[None, :, None] * 4
    crop = crop_face(image, (20, 10, 20, 20), size=10, margin=0)
    assert crop.shape == (10, 10, 3) and crop[0, :, 0].tolist() == [82 + 8 * i for i in range(10)]
    outside = crop_face(image, (-10, 10, 20, 20), size=10, margin=0)
    assert (outside[:, :5] == 0).all() and outside[0, 5:, 0].tolist() == [2 + 8 * i for i in range(5)]
    assert crop_face(image, (50, 30, 30, 20), size=48).shape == (48, 48, 3)


@pytest.mark.parametrize("rows", [20, 30, 33])
def test_a_trial_is_as_long_as_the_longer_of_rows_and_pictures(tmp_path, rows):
    path = write_video(tmp_path / "t.mp4", talking(30), np.arange(30) / 25, beeps([0.5], 1.2))
    annotation = annotate(tmp_path / "t.txt", [[number / 100, 0] for number in range(rows)])
    data = read_trial(Trial("t", "train", path, annotation, None, "s", "t"), size=32)
    length = max(rows, 30)
    for name in ("frame", "time", "crops", "box", "score", "visual_ok", "audio_ok", "va", "valid"):
        assert len(data[name]) == length, name
    assert data["crops"].shape[1:] == (32, 32, 3) and data["crops"].dtype == np.uint8
    assert data["valid"].sum() == rows and data["visual_ok"][:30].all() and not data["visual_ok"][30:].any()
    assert data["time"] == pytest.approx(np.arange(length) / 25)
    assert {name: array.dtype.name for name, array in data.items()} == dict(
        frame="int32", time="float64", crops="uint8", box="float32", score="float32", visual_ok="bool", audio_ok="bool",
        va="float32", valid="bool", sound="float32", sound_start="float64", has_sound="bool")
