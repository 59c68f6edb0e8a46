"""Damaged and hostile files: each is read, or said in one sentence to be wrong; nothing crashes, hangs, or is written elsewhere."""
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from clips import annotate, beeps, draw_face, wall, write_video
from corpora import archive, jpg, limited

from sage_nb.affwild2 import Corpus
from sage_nb.cli import main
from sage_nb.core import DataError, read_arrays, read_json
from sage_nb.features import prepare_corpus
from sage_nb.media import read_trial

COUNT, CASES = 8, 60  # pictures in the video; cases a kind of file
FACES = {number: jpg(20 * number, 24) for number in range(1, COUNT + 1)}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "The bytes of every file of a small corpus."
    folder = tmp_path_factory.mktemp("good")
    images = [draw_face(wall(size=64), 32, 32, radius=18)] * COUNT
    annotate(folder / "t.txt", [[0.1, -0.25]] * COUNT)
    lines = ["image_location,valence,arousal", *(f"u/{number:05d}.jpg,0,0" for number in range(1, COUNT + 1))]
    return {
        "VA_Estimation_Challenge/Train_Set/t.txt": (folder / "t.txt").read_bytes(),
        "test_set_example.txt": "\n".join(lines).encode(),
        "subjects.csv": b"trial,subject\nt,somebody\nu,somebody else\n",
        "cropped_aligned.zip": archive([(f"c/{trial}/{number:05d}.jpg".encode(), content, 0, 8 * (number % 2))
                                        for trial in "tu" for number, content in FACES.items()], folder / "c.zip").read_bytes(),
        "cropped_aligned/t/00003.jpg": FACES[3],
        "t.mp4": write_video(folder / "t.mp4", images, np.arange(COUNT) / 25, beeps([0.1], 0.3, rate=8000), rate=8000).read_bytes(),
        "u.avi": write_video(folder / "u.avi", images, np.arange(COUNT) / 25, beeps([0.1], 0.3, rate=8000), rate=8000).read_bytes(),
    }


def damaged(content: bytes, others: list[bytes], rng) -> bytes:
    "The content with something wrong."
    data, at = bytearray(content), int(rng.integers(len(content)))
    end = min(at + int(rng.integers(1, 64)), len(data))
    match rng.integers(12):
        case 0:
            return bytes(data[:at])
        case 1:
            return b""
        case 2:
            return others[rng.integers(len(others))]
        case 3:
            return b"\xef\xbb\xbf" + content
        case 4:
            return content.replace(b"\n", b"\r\n")
        case 5:
            return content + bytes(rng.integers(0, 256, 64, np.uint8))
        case 6:
            data[at:end] = b"\xff" * (end - at)
        case 7:
            data[at:end] = b"\0" * (end - at)
        case 8:
            del data[at:end]
        case 9:
            data[at:at] = data[at:end]
        case _:
            for place in rng.integers(0, len(data), rng.integers(1, 6)):
                data[place] ^= 1 << rng.integers(8)
    return bytes(data)


def hostile(entries: list[tuple], rng) -> tuple[list[tuple], dict]:
    "The entries of an archive with something wrong that a program would have to write."
    entries, at = list(entries), int(rng.integers(len(entries)))
    name, content, *rest = entries[at]
    lie = {}
    match rng.integers(9):
        case 0:
            entries[at] = (rng.choice([b"../", b"/", b"C:/", b"c/../../", b"..\\"]) + name, content, *rest)
        case 1:
            entries[at] = (name, content, 1, 8)  # encrypted
        case 2:
            entries[at] = (name, content, 0, int(rng.integers(1, 100)))
        case 3:
            lie = {rng.choice(["length", "packed", "offset"]): int(rng.choice([0, 3, 10**6, 2**31, 2**32 - 2]))}
        case 4:
            lie = {rng.choice(["length", "packed", "offset", "size", "count"]): int(rng.choice([0, 2**33, 2**62, 2**63])), "wide": True}
        case 5:
            lie = {rng.choice(["count", "size"]): int(rng.integers(0, 60000))}
        case 6:
            entries[at] = (name.replace(b"c/", rng.choice([b"c\n/", b"\xff/", b"\0/", b"x" * 300 + b"/"])), content, *rest)
        case 7:
            entries[at] = (name, b"\0" * (1 << 25), 0, 8)
        case _:
            entries += [entries[at], (name[:-9] + b"/..", b"", 0, 0)]
    return entries, lie


def listing(folder):
    "All that there is below a folder, or below where the tests run."
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def told(error: DataError) -> str:
    text = str(error)
    assert ";" in text and "\n" not in text and len(text) < 800
    return text


def looked_at(root, out, capfd) -> tuple[dict, dict, set]:
    "Prepare a corpus and check it: the trials that were read, the report's rows, the trials that are said to be broken. Only `out` may change."
    before, around = listing(root.parent), {*Path.cwd().iterdir()}
    broken = {}
    with limited(20), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            index = prepare_corpus(Corpus(root), out / "prepared", workers=1, skip_broken=True)
        except DataError as error:  # of all of it, or of every trial
            told(error)
            index = {}
        if (out / "prepared" / "broken.json").exists():
            broken = read_json(out / "prepared" / "broken.json")
        code = main(["check", str(root), "--json", str(out / "report.json")])
    said = capfd.readouterr()
    report = read_json(out / "report.json")
    rows = {row["trial"]: row for row in report["trials"] if row["trial"]}
    assert code == report["exit_code"] and "Traceback" not in said.err
    assert bool(code == 2) == any(line.startswith("sage-nb: ") for line in said.err.splitlines())
    assert listing(root.parent) == before and {*Path.cwd().iterdir()} == around
    assert not [path for path in out.rglob("*") if ".part" in path.name]
    for problem in [*broken.values(), *(row["problem"] for row in report["trials"] if row["problem"])]:
        told(DataError(problem))
    assert {trial for trial, row in rows.items() if row["problem"]} <= {*broken} and {*rows} == {*broken, *index}, "what is unusable is left out"
    read = {trial: read_arrays(out / "prepared" / f"{trial}.safetensors")[0] for trial in index}
    shutil.rmtree(out)
    return read, rows, code


def believable(data) -> None:
    assert np.isfinite(data["va"]).all() and np.isfinite(data["time"]).all() and np.isfinite(data["sound"]).all()
    assert (np.abs(data["va"]) <= 1).all() and (np.diff(data["time"]) > 0).all()


def faces_of(data) -> dict[int, float]:
    return {number: data["crops"][number - 1].mean() for number in data["frame"][data["visual_ok"]].tolist()}


def assemble(good, root, kind) -> None:
    for name, content in good.items():
        if name != "cropped_aligned/t/00003.jpg" or kind == name:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
    if kind[1:] in (".mp4", ".avi"):
        (root / "cropped_aligned.zip").unlink()  # then the pictures are decoded


@pytest.mark.parametrize("kind", ["VA_Estimation_Challenge/Train_Set/t.txt", "test_set_example.txt", "subjects.csv", "cropped_aligned.zip",
                                  "cropped_aligned/t/00003.jpg", "t.mp4", "u.avi", "hostile"])
def test_damage(good, kind, tmp_path, capfd):
    root, path, said, unchanged = tmp_path / "here" / "corpus", kind, 0, 0
    assemble(good, root, kind)
    if kind == "hostile":
        path = "cropped_aligned.zip"
        pictures = [(f"c/{trial}/{number:05d}.jpg".encode(), content, 0, 8 * (number % 2)) for trial in "tu" for number, content in FACES.items()]
    true = read_trial(Corpus(root).trials()[kind == "u.avi"]) if kind[1:] in (".mp4", ".avi") else None
    for case in range(CASES):
        rng = np.random.default_rng([case, len(kind)])
        if kind == "hostile":
            entries, lie = hostile(pictures, rng)
            archive(entries, root / path, **lie)
            if rng.random() < 0.3:
                (root / path).write_bytes(damaged((root / path).read_bytes(), [good["t.mp4"]], rng))
        else:
            (root / path).write_bytes(damaged(good[kind], [content for name, content in good.items() if name != kind], rng))
        read, rows, code = looked_at(root, tmp_path / "out", capfd)
        said += code > 0
        unchanged += code == 0
        for trial, data in read.items():
            believable(data)
            if path == "cropped_aligned.zip":  # each face is that of its number, and all are there, or it is said
                seen = faces_of(data)
                assert all(abs(level - 20 * number) < 2 for number, level in seen.items()) or "face" in str(rows[trial]["oddities"])
                assert len(seen) == COUNT or rows[trial]["oddities"]
            if true is not None and trial == kind[0]:
                same = len(data["time"]) == len(true["time"]) and np.abs(data["time"] - true["time"]).max() < 0.02 and rows[trial]["frames"] == COUNT
                assert same or rows[trial]["oddities"], "other pictures or times than the true ones, and nothing said"
    assert said > CASES / 5


SPECIAL = {"pipe": os.mkfifo, "folder": Path.mkdir, "dangling": lambda path: path.symlink_to("nowhere"), "looping": lambda path: path.symlink_to(path.name),
           "device": lambda path: path.symlink_to("/dev/zero")}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("place", ["VA_Estimation_Challenge/Train_Set/t.txt", "VA_Estimation_Challenge/Train_Set/q.txt", "test_set_example.txt", "other.txt", "subjects.csv",
                                   "cropped_aligned.zip", "cropped_aligned_2.zip", "cropped_aligned/t/00003.jpg", "t.mp4", "q.avi"])
def test_what_is_no_file(good, kind, place, tmp_path, capfd):
    root = tmp_path / "here" / "corpus"
    assemble(good, root, place)
    (root / place).unlink(missing_ok=True)
    SPECIAL[kind](root / place)
    read, rows, code = looked_at(root, tmp_path / "out", capfd)
    for data in read.values():
        believable(data)
    assert code or kind == "folder" or place in ("other.txt", "subjects.csv", "test_set_example.txt", "cropped_aligned_2.zip")
