"""Trees in the shape of the real corpus, with oddities planted in them, and zip archives written byte by byte."""
import signal
import struct
import zlib
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from clips import beeps, wall, write_video

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


def official_tree(root, videos=594, longest=47000, seed=0) -> dict[str, set[str]]:
    """A corpus of the shape of Aff-Wild2: its splits (356, 76 and 162 of 594), rates, lengths and names, face pictures in two archives and
    a folder, two people in some pictures. The pictures are tiny, the clips few and linked to. Returns the planted oddities: trial -> kinds."""
    root, rng = Path(root), np.random.default_rng(seed)
    clips = []  # path, frames
    for number, (rate, share) in enumerate(((30, 0.03), (30, 0.083), (30, 0.19), (25, 0.05), (24000 / 1001, 0.08), (30000 / 1001, 0.09), (30, 1.0))):
        frames = max(int(longest * share), 30)
        path = write_video(root / ".clips" / f"{number}.mp4", [wall(size=16)] * frames, np.arange(frames) / rate, beeps([], frames / rate, rate=8000), rate=8000)
        clips.append((path, frames))
    odd_clips = {
        "unusual frame rate": dict(times=np.arange(60) / 20), "variable frame rate": dict(times=np.cumsum(np.tile([1, 1, 2], 20)) / 30),
        "sound starts late": dict(sound_start=0.6), "several sound tracks": dict(more=[np.zeros(16000)]), "turned pictures": dict(turned=90),
        "no sound": dict(sound=None), "sound ends early": dict(sound=np.zeros(4000)), "sound starts early": dict(times=1 + np.arange(60) / 30)}
    odd, planted, labels = {}, {}, root / "annotations" / "VA_Estimation_Challenge"
    for kind, changes in odd_clips.items():
        about = dict(images=[wall(size=16)] * 60, times=np.arange(60) / 30, sound=np.zeros(8000 * 3), rate=8000) | changes
        if "times" in changes:
            about["sound"] = np.zeros(round(8000 * (about["times"][-1] + 0.03)))
        odd[kind] = write_video(root / ".clips" / f"odd{len(odd)}.mp4", **about), 60
    kinds = [*odd, "rows and pictures differ", "no face pictures", "face pictures beyond the end", "no row is labelled",
             "other files among face pictures", "face pictures in several places"]
    entries: list[list] = [[], []]
    test_rows = []
    for folder in (labels / "Train_Set", labels / "Validation_Set", root / "videos" / "batch1", root / "videos" / "batch2", root / "cropped_aligned_new"):
        folder.mkdir(parents=True)
    for number in range(videos):
        kind = kinds[number % 50] if number % 50 < len(kinds) else None
        path, frames = odd.get(kind) or clips[rng.choice(len(clips), p=[0.3, 0.3, 0.15, 0.1, 0.1, 0.04, 0.01])]
        name = rng.choice([f"video{number}", f"{number}-30-1920x1080", f"{number}"])
        split = number * 594 // videos % 594
        split = "Train_Set" if split < 356 else "Validation_Set" if split < 432 else "test"
        (root / "videos" / f"batch{1 + number % 2}" / f"{name}.mp4").hardlink_to(path)
        for trial in [f"{name}_left", f"{name}_right"] if number % 25 == 24 else [name]:
            kinds_here = {kind} if kind else set()
            rows = frames + (3 if kind == "rows and pictures differ" else 0)
            if split == "test":
                test_rows += [f"{trial}/{frame:05d}.jpg,0,0\n" for frame in range(1, rows + 1)]
                kinds_here -= {"no row is labelled"}
            else:
                values = rng.uniform(-1, 1, (97, 2))
                block = "".join(f"{v:.3f},{a:.3f}\n" for v, a in values) if kind != "no row is labelled" else "-5,-5\n" * 97
                whole, rest = divmod(rows - 1, 97)
                text = "valence,arousal\n-5,-5\n" + block * whole + "".join(block.splitlines(True)[:rest])
                (labels / split / f"{trial}.txt").write_text(text)
            found = [frame for frame in range(1, frames + 1) if frame % 13] + ([rows + 7] if kind == "face pictures beyond the end" else [])
            if kind == "no face pictures":
                found = []
            for frame in found:
                entries[number % 2].append((trial, frame))
            if kind == "other files among face pictures":
                entries[number % 2].append((trial, "notes.txt"))
            if kind == "face pictures in several places":
                (root / "cropped_aligned_new" / trial).mkdir()
                (root / "cropped_aligned_new" / trial / "00001.jpg").write_bytes(jpg())
            planted[trial] = kinds_here
    (root / "test_set_example.txt").write_text("image_location,valence,arousal\n" + "".join(test_rows))
    for number, part in enumerate(entries):
        _long_archive(part, root / f"cropped_aligned_batch{number + 1}.zip")
    return planted


def _long_archive(entries, path) -> None:
    "An archive of many face pictures that are all one: what its directory says is true, and it is quickly written."
    content = jpg(size=16)
    crc, size = zlib.crc32(content), len(content)
    with open(path, "wb") as file:
        file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, crc, size, size, 1, 0) + b"x" + content)
        start = file.tell()
        for trial, frame in entries:
            name = f"cropped_aligned/{trial}/{frame}".encode() if isinstance(frame, str) else b"cropped_aligned/%b/%05d.jpg" % (trial.encode(), frame)
            file.write(struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, crc, size, size, len(name), 0, 0, 0, 0, 0, 0) + name)
        end = file.tell()
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, len(entries), len(entries), end - start, start))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1) + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
