"""Trees in the shape of the real corpus, with oddities planted in them, and zip archives written byte by byte.

`python tests/corpora.py NEW_FOLDER` makes such a tree at full size (594 videos of up to 47,000 pictures, about 1 GB), checks it on two cores
and ends with one line: the seconds, and whether every planted oddity was found, nothing else was, and it took less than two minutes. Exit code
1 if not."""
import json
import os
import signal
import struct
import sys
import time
import zlib
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from clips import annotate, beeps, wall, write_video

UTF8 = 0x800


@contextmanager
def limited(seconds):
    "What hangs fails, and nothing after it is stopped in its place."
    def stop(*_):
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def jpg(level=120, size=32) -> bytes:
    "A grey picture as a jpg file."
    return cv2.imencode(".jpg", np.full((size, size, 3), level, np.uint8))[1].tobytes()


def archive(entries, path, before=b"", wide=False, **lie) -> Path:
    """Write a zip archive. `entries`: (name in bytes, content) or (name, content, flags, method).
    `before`: bytes in front of it; `wide`: as for more than 65,535 entries; `lie`: sizes, offsets or counts other than the true ones."""
    body, directory = bytearray(before), bytearray()
    for name, content, *rest in entries:
        flags, method = rest or (0, 8)
        packer = zlib.compressobj(wbits=-15)
        packed = packer.compress(content) + packer.flush() if method == 8 else content
        offset, length = lie.get("offset", len(body) - len(before)), lie.get("length", len(content))
        sums = zlib.crc32(content), lie.get("packed", len(packed)), length
        body += struct.pack("<4s5H3L2H", b"PK\3\4", 20, flags, method, 0, 0, zlib.crc32(content), len(packed), min(length, 2**32 - 1), len(name), 0)
        body += name + packed
        extra = struct.pack("<2H3Q", 1, 24, length, sums[1], offset) if wide else b""
        short = (0xFFFFFFFF,) * 3 if wide else (sums[1], length, offset)
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, flags, method, 0, 0, sums[0], *short[:2], len(name), len(extra), 0, 0, 0, 0, short[2])
        directory += name + extra
    start, size, count = len(body) - len(before), lie.get("size", len(directory)), lie.get("count", len(list(entries)))
    body += directory
    if wide:
        end = len(body)
        body += struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start) + struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
        body += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    else:
        body += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, start, 7) + b"comment"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    return path


COUNT = 12  # pictures of the clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", [wall(size=32)] * COUNT, np.arange(COUNT) / 25, beeps([0.1], 0.48))


@pytest.fixture
def root(tmp_path, clip):
    return small_tree(tmp_path / "corpus", clip, COUNT)


def small_tree(root, clip, count) -> Path:
    "A clean corpus: two trials of one video, and one called Köln."
    (root / "videos").mkdir(parents=True)
    for name in ("two", "Köln"):
        (root / "videos" / f"{name}.mp4").hardlink_to(clip)
    for trial in ("two_left", "two_right", "Köln"):
        annotate(root / "VA_Estimation_Challenge" / "Train_Set" / f"{trial}.txt", [[0.1, 0.2]] * count)
    return root


def faces(trial, numbers=(1, 2, 5)):
    return [(f"cropped_aligned/{trial}/{number:05d}.jpg".encode(), jpg(10 * number)) for number in numbers]


def trim(path, seconds):
    "Copy a file so that its first part is there but not shown, as editors do that do not encode anew."
    short = path.with_name(f"trimmed_{path.name}")
    with av.open(str(path)) as source, av.open(str(short), "w", options={"avoid_negative_ts": "disabled"}) as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.size:
                shift = round(Fraction(seconds) / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, streams[packet.stream_index]
                target.mux(packet)
    return short


def official_tree(root, videos=594, longest=47000, seed=0) -> tuple[dict[str, set[str]], dict[str, str], dict[str, str]]:
    """A corpus of the shape of Aff-Wild2: its splits (356, 76 and 162 of 594), rates, lengths and names, .mp4 and .avi, as many rows as
    pictures in few trials, rows of -5, face pictures in two archives and a folder, two people in every seventh video. The pictures are tiny,
    the clips few and linked to. Returns what was planted: oddities by trial, part of the sentence on a broken trial, oddities elsewhere."""
    root, rng = Path(root), np.random.default_rng(seed)
    labels = root / "annotations" / "VA_Estimation_Challenge"
    for folder in (labels / "Train_Set", labels / "Validation_Set", root / "videos" / "batch1", root / "videos" / "batch2", root / "cropped_aligned_new", root / ".clips"):
        folder.mkdir(parents=True)

    def clip(name, frames, rate=30, **changes):
        times = changes.get("times", np.arange(frames) / rate)
        about = dict(images=[wall(size=16)] * frames, times=times, sound=np.zeros(round(8000 * (times[-1] + 1 / rate))), rate=8000) | changes
        return write_video(root / ".clips" / name, **about), frames

    shares = ((30, 0.03, ".mp4"), (30, 0.083, ".mp4"), (30, 0.19, ".mp4"), (25, 0.05, ".avi"), (24000 / 1001, 0.08, ".mp4"), (30000 / 1001, 0.09, ".avi"), (30, 1.0, ".mp4"))
    clips = [clip(f"{number}{suffix}", max(int(longest * share), 30), rate) for number, (rate, share, suffix) in enumerate(shares)]
    long = clip("long.avi", 400)[0]
    with av.open(str(long)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    (root / ".clips" / "cut.avi").write_bytes(long.read_bytes()[: places[398] - 8])
    (root / ".clips" / "half.avi").write_bytes(long.read_bytes()[: places[200] - 8])
    (root / ".clips" / "words.mp4").write_bytes(b"These are words, and no video.")
    odd = {
        "unusual frame rate": clip("slow.mp4", 60, 20), "variable frame rate": clip("variable.mp4", 60, times=np.cumsum(np.tile([1, 1, 2], 20)) / 30 - 1 / 30),
        "sound starts late": clip("late.mp4", 60, sound_start=0.6, sound=np.zeros(8000 * 2)), "several sound tracks": clip("tracks.avi", 60, more=[np.zeros(16000)]),
        "turned pictures": clip("turned.mp4", 60, turned=90), "no sound": clip("mute.avi", 60, sound=None),
        "sound ends early": clip("short.mp4", 60, sound=np.zeros(4000)), "sound starts early": clip("early.mp4", 60, times=1 + np.arange(60) / 30),
        "pictures missing": (root / ".clips" / "cut.avi", 398), "the video breaks off": (root / ".clips" / "half.avi", 400),
        "not a readable video": (root / ".clips" / "words.mp4", 60)}
    broken = ["the video breaks off", "not a readable video", "no video for this trial", "is neither in [-1, 1] nor -5"]
    kinds = [*odd, "rows and pictures differ by far", "no face pictures", "face pictures beyond the end", "no row is labelled", "other files among face pictures",
             "face pictures in several places", "face pictures that cannot be used", "face pictures that come twice", "uneven rows in the test list", *broken[2:]]
    planted, faults, test_rows, members = {}, {}, [], {"Train_Set": [], "Validation_Set": [], "test": []}
    entries: list[list] = [[], []]  # trial, names of its files, how many of them need a header of their own
    for number in range(videos):
        kind = kinds[number % 50] if number % 50 < len(kinds) else None
        path, frames = odd.get(kind) or clips[rng.choice(len(clips), p=[0.3, 0.3, 0.15, 0.1, 0.1, 0.04, 0.01])]
        name = rng.choice([f"video{number}", f"{number}-30-1920x1080", f"{number}"])
        split = number * 594 // videos
        split = "Train_Set" if split < 356 else "Validation_Set" if split < 432 else "test"
        if kind != "no video for this trial":
            (root / "videos" / f"batch{1 + number % 2}" / f"{name}{path.suffix}").hardlink_to(path)
        for trial in [f"{name}_left", f"{name}_right"] if number % 7 == 3 else [name]:
            rows = frames + int(rng.choice([0, 1, 2, -1, -3], p=[0.15, 0.45, 0.05, 0.25, 0.1]))
            rows += (31 + frames // 20) * (kind == "rows and pictures differ by far")
            here, asked = {kind} if kind else set(), list(range(1, rows + 1))
            if split == "test":
                here -= {"no row is labelled", "is neither in [-1, 1] nor -5"}
                if kind == "uneven rows in the test list":
                    asked[1] = 1
                test_rows += [f"{trial}/{frame:05d}.jpg,0,0\n" for frame in asked]
            else:
                here -= {"uneven rows in the test list"}
                block = "".join("-5,-5\n" if i % 31 == 7 else "0.25,-5\n" if i == 50 else f"{v:.3f},{a:.3f}\n" for i, (v, a) in enumerate(rng.uniform(-1, 1, (97, 2))))
                block = "-5,-5\n" * 97 if kind == "no row is labelled" else block
                text = "valence,arousal\n" + block * (rows // 97) + "".join(block.splitlines(True)[: rows % 97])
                (labels / split / f"{trial}.txt").write_text(text + "1.5,0\n" * (kind == "is neither in [-1, 1] nor -5"))
                members[split].append(trial)
            for fault in here & {*broken}:
                faults[trial] = fault
            if rows != frames and kind not in ("rows and pictures differ by far", *broken[: 4 if split != "test" else 3]):
                here.add("rows and pictures differ")
            files = [b"%05d.jpg" % frame for frame in range(1, frames + 1) if frame % 13] + [b"%05d.jpg" % (max(rows, frames) + 7)] * (kind == "face pictures beyond the end")
            match kind:
                case "no face pictures":
                    files = []
                case "face pictures that cannot be used":
                    files = [b"0001.jpg"]
                case "other files among face pictures":
                    files = [b"notes.txt", *files]
                case "face pictures that come twice":
                    files = [b"00005.jpg", *files]
                case "face pictures in several places":
                    (root / "cropped_aligned_new" / trial).mkdir()
                    (root / "cropped_aligned_new" / trial / "00001.jpg").write_bytes(jpg())
            entries[number % 2].append((trial, files))
            planted[trial] = here - {*broken}
    (root / "test_set_example.txt").write_text("image_location,valence,arousal\n" + "".join(test_rows))
    pair = members["Train_Set"][0], members["Validation_Set"][-1]  # of videos with one person each
    (root / "subjects.csv").write_text("trial,subject\n" + "".join(f"{trial},somebody\n" for trial in pair) + "stranger,somebody\n")
    for trial in pair:
        planted[trial].add("in several splits")
    (root / "videos" / "spare.avi").hardlink_to(clips[3][0])
    entries[1].append(("stranger", [b"00001.jpg"]))
    for number, part in enumerate(entries):
        _long_archive(part, root / f"cropped_aligned_batch{number + 1}.zip")
    return planted, faults, {"videos/spare.avi": "no trial belongs to this video", "subjects.csv": "no such trial",
                             "cropped_aligned_batch2.zip (stranger)": "no trial belongs to these face pictures"}


def _long_archive(entries, path) -> None:
    "An archive of many face pictures, quickly written: what its directory says is true of the first two files of a folder, whose place the others share."
    content = jpg(size=16)
    crc, size = zlib.crc32(content), len(content)
    directory, count = bytearray(), 0
    with open(path, "wb") as file:
        for trial, files in entries:
            names = [b"cropped_aligned/%b/%b" % (trial.encode(), name) for name in files]
            for index, name in enumerate(names):
                if index < 2:
                    place = struct.pack("<L", file.tell())
                    file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, crc, size, size, len(name), 0) + name + content)
                    head = {}
                if len(name) not in head:
                    head[len(name)] = struct.pack("<4s6H3L5HL", b"PK\1\2", 20, 20, 0, 0, 0, 0, crc, size, size, len(name), 0, 0, 0, 0, 0) + place
                directory += head[len(name)] + name
            count += len(names)
        start = file.tell()
        file.write(directory)
        end = file.tell()
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, end - start, start))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1) + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))


def differences(report: Path, planted, faults, elsewhere) -> dict:
    "Where the report of `sage-nb check --json` says anything but what was planted."
    rows, out = json.loads(Path(report).read_text())["trials"], {}
    for row in rows:
        kinds = {odd["kind"] for odd in row["oddities"]}
        expected = planted.get(row["trial"], set()) if row["trial"] else {elsewhere.get(row["video"])}
        fault = faults.get(row["trial"], "")
        if kinds != expected or bool(fault) != bool(row["problem"]) or fault not in row["problem"]:
            out[row["trial"] or row["video"]] = kinds ^ expected, row["problem"], fault
    return out | {name: "not in the report" for name in {*planted, *elsewhere} - {row["trial"] or row["video"] for row in rows}}


def main(folder, videos=594, longest=47000, limit=120.0) -> int:
    "Make a tree, check it, and say in one line how long that took and whether the report is right."
    from sage_nb.cli import main as sage_nb

    planted = official_tree(Path(folder) / "corpus", videos, longest)
    start = time.monotonic()
    code = sage_nb(["check", str(Path(folder) / "corpus"), "--json", str(Path(folder) / "report.json")])
    seconds, wrong = time.monotonic() - start, differences(Path(folder) / "report.json", *planted)
    for name, about in wrong.items():
        print(name, about)
    faults = [f"exit code {code} instead of 2"] * (code != 2) + [f"{len(wrong)} differences from what was planted"] * bool(wrong) + [f"more than {limit:.0f} s"] * (seconds > limit)
    print(f"{videos} videos of up to {longest} pictures, {len(os.sched_getaffinity(0))} cores: checked in {seconds:.1f} s, {'NOT as promised: ' + ', '.join(faults) if faults else 'all that was planted was found, and nothing else'}")
    return int(bool(faults))


if __name__ == "__main__":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    sys.exit(main(sys.argv[1]))
