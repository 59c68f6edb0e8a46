"""Damaged and hostile files: each is read, or said in one sentence to be wrong; nothing crashes, hangs, or is written elsewhere."""
import signal
import warnings

import numpy as np
import pytest
from clips import annotate, beeps, draw_face, wall, write_video
from corpora import archive, jpg

from sage_nb.affwild2 import Corpus
from sage_nb.core import DataError
from sage_nb.media import read_trial

COUNT, CASES = 8, 90  # pictures in the video; cases a kind of file
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


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def told(error: DataError) -> str:
    text = str(error)
    assert ";" in text and "\n" not in text and len(text) < 600
    return text


@pytest.mark.parametrize("kind", ["VA_Estimation_Challenge/Train_Set/t.txt", "test_set_example.txt", "subjects.csv", "cropped_aligned.zip",
                                  "cropped_aligned/t/00003.jpg", "t.mp4", "u.avi"])
def test_damage(good, kind, tmp_path):
    root = tmp_path / "here" / "corpus"
    for name, content in good.items():
        if name != "cropped_aligned/t/00003.jpg" or kind == name:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
    if kind[1:] in (".mp4", ".avi"):
        (root / "cropped_aligned.zip").unlink()  # then the pictures are decoded
    said = read = 0
    for case in range(CASES):
        rng = np.random.default_rng([case, len(kind)])
        (root / kind).write_bytes(damaged(good[kind], [content for name, content in good.items() if name != kind], rng))
        before = listing(tmp_path)
        signal.alarm(20)  # a hang ends the run
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                corpus = Corpus(root)
                report = corpus.check()
                for problem in report.problem[report.problem != ""]:
                    told(DataError(problem))
                for trial in corpus.trials():
                    data = read_trial(trial)
                    read += 1
                    if trial.crops is not None:
                        seen = {number: data["crops"][number - 1] for number in data["frame"][data["visual_ok"]].tolist()}
                        if kind == "cropped_aligned.zip":  # a checksum that holds: the pictures are the true ones
                            assert all(min(abs(crop.mean() - 20 * number) for number in FACES) < 2 for crop in seen.values())
                    assert np.isfinite(data["va"]).all() and np.isfinite(data["time"]).all() and np.isfinite(data["sound"]).all()
                    assert (np.abs(data["va"]) <= 1).all() and (np.diff(data["time"]) > 0).all()
            except DataError as error:
                told(error)
                said += 1
        signal.alarm(0)
        assert listing(tmp_path) == before
    assert said > CASES / 5 and read > CASES / 5
