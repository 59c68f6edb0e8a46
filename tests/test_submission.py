"""The submission file: from raw test videos through a trained run to the organisers' rows, and what a check says of files that are not as asked for."""
import io
import random
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from clips import annotate, beeps, wall, write_video
from conftest import environment
from corpora import archive, jpg

from sage_nb.affwild2 import Corpus, check_submission, read_test_list, write_submission
from sage_nb.backbones import save_encoder
from sage_nb.baselines import build_model
from sage_nb.cli import check_submitted, main
from sage_nb.core import DataError, read_json, write_json
from sage_nb.encoders import AudioEncoder, VisualEncoder
from sage_nb.features import CUES, encode_corpus, load_sequences, prepare_corpus
from sage_nb.training import fit, load_run, predict_sequences

HEADER = "image_location,valence,arousal"


def submit(*arguments, cwd=None, **more):
    "`sage-nb submit`, in this process: starting another takes seconds."
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd or Path.cwd())
        for name, value in more.items():
            patch.setenv(name, value)
        code = main(["submit", *map(str, arguments)])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def refused(done, *words):
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and ";" in done.stderr, done
    for word in words:
        assert str(word) in done.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A small corpus from raw video on, its feature store, and a run trained on it."
    folder = tmp_path_factory.mktemp("world")
    root, trials = folder / "corpus", {"1": "Train_Set", "2": "Train_Set", "3": "Train_Set", "4": "Validation_Set", "z": "", "a": ""}
    rng, entries = np.random.default_rng(0), []
    for number, (video, split) in enumerate(trials.items()):
        frames = 30 + number
        write_video(root / "videos" / f"{video}.mp4", [wall(size=32)] * frames, np.arange(frames) / 30, beeps([0.3], 1.2))
        for trial in ["a_left", "a_right"] if video == "a" else [video]:
            entries += [(f"cropped_aligned/{trial}/{frame:05d}.jpg".encode(), jpg(level=10 * frame % 255)) for frame in range(1, frames + 1, 2)]
            if split:
                annotate(root / "VA_Estimation_Challenge" / split / f"{trial}.txt", rng.uniform(-1, 1, (frames, 2)))
    archive(entries, root / "cropped_aligned.zip")
    asked = [("z", 34), ("a_right", 35), ("a_left", 37)]  # pictures: 34 and 35
    write_list(root / "list.txt", [f"{trial}/{frame:05d}.jpg" for trial, frames in asked for frame in range(1, frames + 1)])
    torch.manual_seed(0)
    for kind, net in dict(visual=VisualEncoder(), audio=AudioEncoder()).items():
        save_encoder(folder / "encoders" / f"{kind}.safetensors", net)
    prepare_corpus(Corpus(root), folder / "prepared", workers=1)
    encode_corpus(folder / "prepared", folder / "encoders", folder / "features", workers=1)
    train, val = (load_sequences(folder / "features", split) for split in ("train", "validation"))
    fit(build_model("concat", 64, 64, len(CUES), visual_width=8, audio_width=8), train, val, run_dir=folder / "runs/concat-0", epochs=2, batch=2,
        record=dict(selection="validation"))
    return folder


def write_list(path, locations):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([HEADER, *(f"{location},0,0" for location in locations), ""]))
    return path


def arguments(world, out, **other):
    given = dict(run=world / "runs/concat-0", corpus=world / "corpus", features=world / "features", out=out) | other
    return [given["run"], "--corpus", given["corpus"], "--features", given["features"], "--out", given["out"]]


def test_from_raw_video_to_the_rows_that_are_asked_for(world, tmp_path):
    out = tmp_path / "new/mine.txt"
    done = submit(*arguments(world, out))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout == f"{out}: 106 rows of 3 trials, as list.txt asks, by {world / 'runs/concat-0'}, selected on validation\n"
    header, *lines = out.read_text().splitlines()
    assert header == HEADER and [line.split(",")[0] for line in lines] == [
        f"{trial}/{frame:05d}.jpg" for trial, frames in (("z", 34), ("a_right", 35), ("a_left", 37)) for frame in range(1, frames + 1)]
    said = {p.id: p.va for p in predict_sequences(load_run(world / "runs/concat-0"), load_sequences(world / "features", "test"))}
    wanted = np.concatenate([said["z"], said["a_right"], said["a_left"], said["a_left"][[-1, -1]]])
    assert np.abs(np.array([line.split(",")[1:] for line in lines], float) - wanted).max() < 1e-4
    assert len({*map(tuple, wanted.round(4).tolist())}) > 20  # so that a row out of place would show
    for content, answer in ((out.read_text(), (0, f"{out}: 106 rows, as list.txt asks\n", "")), ("", (2, "", ANY))):
        out.write_text(content)
        again = subprocess.run([sys.executable, "-m", "sage_nb.cli", "submit", "--check", out, "--corpus", world / "corpus"], capture_output=True, text=True)
        assert (again.returncode, again.stdout, again.stderr) == answer
    assert [path.name for path in out.parent.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("other, words", [
    (dict(run="nowhere"), ["nowhere/run.json", "no such file"]),
    (dict(features="nowhere"), ["nowhere/index.json", "no such file"]),
    (dict(corpus="nowhere"), ["nowhere: no such folder"]),
])
def test_what_is_not_there(world, tmp_path, other, words):
    refused(submit(*arguments(world, tmp_path / "mine.txt", **{name: tmp_path / path for name, path in other.items()})), *words)
    assert not any(tmp_path.iterdir())


def test_runs_and_stores_that_do_not_fit(world, tmp_path):
    out = tmp_path / "mine.txt"
    out.write_text("an earlier one")
    for name, record in dict(empty={}, listed=[], other=dict(recipe=3)).items():
        shutil.copytree(world / "runs/concat-0", tmp_path / name)
        write_json(tmp_path / name / "run.json", record)
        refused(submit(*arguments(world, out, run=tmp_path / name)), tmp_path / name, "not the record of a trained run")
    (tmp_path / "other/run.json").write_bytes(b"\xff{")
    refused(submit(*arguments(world, out, run=tmp_path / "other")), "run.json: not valid JSON")
    shutil.copytree(world / "runs/concat-0", tmp_path / "narrow")
    fit(build_model("concat", 12, 64, len(CUES), visual_width=8, audio_width=8), *[cut(load_sequences(world / "features", split)) for split in ("train", "validation")],
        run_dir=tmp_path / "narrow", epochs=1)
    refused(submit(*arguments(world, out, run=tmp_path / "narrow")), world / "features", "built for 12 values a frame and got 64")
    shutil.copytree(world / "features", tmp_path / "store")
    index = read_json(world / "features/index.json")
    write_json(tmp_path / "store/index.json", {trial: about for trial, about in index.items() if trial != "a_left"})
    refused(submit(*arguments(world, out, features=tmp_path / "store")), tmp_path / "store", "trial a_left, which list.txt asks for")
    write_json(tmp_path / "store/index.json", {trial: about for trial, about in index.items() if about["split"] != "test"})
    refused(submit(*arguments(world, out, features=tmp_path / "store")), tmp_path / "store", "no trial of split 'test'")
    (tmp_path / "bare").mkdir()
    shutil.copytree(world / "corpus/VA_Estimation_Challenge", tmp_path / "bare/VA_Estimation_Challenge")
    for asking in (arguments(world, out, corpus=tmp_path / "bare"), ["--check", out, "--corpus", tmp_path / "bare"]):
        refused(submit(*asking), tmp_path / "bare", "no list of what to submit")
    assert out.read_text() == "an earlier one" and not [path for path in tmp_path.iterdir() if ".part" in path.name]


def cut(sequences):
    for sequence in sequences:
        sequence.visual = sequence.visual[:, :12]
    return sequences


# --- where it may lie

def git(folder, *arguments):
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True, env=environment(folder)).stdout


def test_a_submission_does_not_come_into_reach_of_git(world, tmp_path):
    home = tmp_path / "checkout"
    home.mkdir()
    git(home, "init", "-q")
    (home / ".gitignore").write_text("/private/\n")
    (home / "README.md").write_text("words")
    git(home, "add", "-A")
    (tmp_path / "link").symlink_to(home)
    for out in (home / "mine.txt", home / "new/folder/mine.txt", home / "README.md", tmp_path / "link/mine.txt", "mine.txt"):
        refused(submit(*arguments(world, out), cwd=home), out, "git would take this file", "results-local/")
    git(home, "add", "-f", "-A")
    refused(submit(*arguments(world, world / "corpus/mine.txt"), cwd=home), "would be taken for the corpus' own list")
    assert sorted(path.name for path in home.iterdir()) == [".git", ".gitignore", "README.md"] and (home / "README.md").read_text() == "words"
    for out in (home / "private/new/mine.txt", tmp_path / "mine.txt"):
        assert submit(*arguments(world, out), cwd=home).returncode == 0 and out.is_file()
    git(home, "add", "-A")
    assert sorted(git(home, "ls-files").split()) == [".gitignore", "README.md"]


def test_what_is_predicted_on_a_sample_may_lie_anywhere(world, tmp_path):
    git(tmp_path, "init", "-q")
    shutil.copytree(world / "corpus", tmp_path / "data/corpus")
    for name, new in dict(z="tes001.mp4", a="tes002.mp4").items():  # as `sage-nb sample` names them
        (tmp_path / "data/corpus/videos" / f"{name}.mp4").rename(tmp_path / "data/corpus/videos" / new)
    for number, path in enumerate(sorted(tmp_path.rglob("*_Set/*.txt"))):
        path.rename(path.with_name(f"tra{number:03d}.txt"))
    for number in "1234":
        (tmp_path / f"data/corpus/videos/{number}.mp4").unlink()
    (tmp_path / "data/corpus/cropped_aligned.zip").unlink()
    assert submit(*arguments(world, tmp_path / "mine.txt", corpus=tmp_path / "data/corpus"), cwd=tmp_path).returncode == 2
    (tmp_path / "data/sample.json").write_text("{}\n")
    assert submit(*arguments(world, tmp_path / "mine.txt", corpus=tmp_path / "data/corpus"), cwd=tmp_path).returncode == 0


def test_without_git_there_is_nobody_to_take_it(world, tmp_path):
    (tmp_path / "bin").mkdir()
    assert submit(*arguments(world, tmp_path / "mine.txt"), PATH=str(tmp_path / "bin")).returncode == 0


# --- what a check says

LOCATIONS = [f"{trial}/{frame:05d}.jpg" for trial in ("b", "a_left", "4-30-1920x1080") for frame in range(1, 8)]


@pytest.fixture
def asked(tmp_path) -> Path:
    return write_list(tmp_path / "list.txt", LOCATIONS)


def text(locations=LOCATIONS, values="0.1234,-0.5") -> str:
    return "\n".join([HEADER, *(f"{location},{values}" for location in locations), ""])


def faults(tmp_path, asked, content) -> str:
    path = tmp_path / "mine.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        check_submission(path, asked)
    said = str(error.value)
    assert said.startswith(str(path)) and "\n" not in said and said.count("; ") == 1 and len(said) < 900
    return said


@pytest.mark.parametrize("content", [text(), text().rstrip("\n"), text().replace("\n", "\r\n"), text(values="1,-1"), text(values="-1e-3,+.5"), text(values="0.,1.0000")])
def test_what_is_as_asked_for(tmp_path, asked, content):
    (tmp_path / "mine.txt").write_bytes(content.encode())
    assert check_submission(tmp_path / "mine.txt", asked) == 21


def changed(line, new):
    lines = text().splitlines()
    lines[line - 1] = new
    return "\n".join(lines)


@pytest.mark.parametrize("content, said", [
    (text(LOCATIONS[:3] + LOCATIONS[4:]), "by 1 row missing (first 'b/00004.jpg');"),
    (text(LOCATIONS[5:]), "by 5 rows missing (first 'b/00001.jpg');"),
    (text([]), "by 21 rows missing"),
    (text(LOCATIONS + ["b/00008.jpg", "c/00001.jpg"]), "by 2 rows that the list does not ask for (first in line 23, 'b/00008.jpg,0.1234,-0.5');"),
    (text(LOCATIONS + LOCATIONS[:1]), "by 1 row too often (first in line 23, 'b/00001.jpg,0.1234,-0.5');"),
    (text(LOCATIONS * 3), "by 42 rows too often"),
    (text(LOCATIONS[:1] + LOCATIONS[:1] + LOCATIONS[2:]), "by 1 row missing (first 'b/00002.jpg'), 1 row too often (first in line 3"),
    (text([LOCATIONS[0], *LOCATIONS[2:], LOCATIONS[1]]), "by rows in another order (first in line 3, 'b/00003.jpg' where 'b/00002.jpg' belongs);"),
    (text(sorted(LOCATIONS)), "by rows in another order (first in line 2, '4-30-1920x1080/00001.jpg' where 'b/00001.jpg' belongs);"),
    (text([location.replace("/0000", "/") for location in LOCATIONS]), "by 21 rows missing (first 'b/00001.jpg'), 21 rows that the list does not ask for"),
    (text([location.upper() for location in LOCATIONS]), "by 21 rows missing"),
    (text(values="nan,0"), "by 21 rows without two finite numbers (first in line 2, 'b/00001.jpg,nan,0');"),
    (text(values="0,inf"), "21 rows without two finite numbers"), (text(values="0,-Infinity"), "21 rows without two finite numbers"),
    (text(values="0_1,0"), "21 rows without two finite numbers"), (text(values="0, 0"), "21 rows without two finite numbers"),
    (text(values="٣,0"), "21 rows without two finite numbers"), (text(values="0x1,0"), "21 rows without two finite numbers"),
    (text(values="0,"), "21 rows without two finite numbers"), (text(values="0"), "21 rows"), (text(values="0,0,0"), "21 rows that the list does not ask for"),
    (text(values="1.0001,0"), "by 21 rows with a value outside of [-1, 1] (first in line 2"), (text(values="0,-5"), "21 rows with a value outside of [-1, 1]"),
    (text(values="1e999,0"), "21 rows with a value outside"), (text(values=f"0,{'9' * 5000}"), "21 rows with a value outside"),
    (changed(4, ""), "by 1 row missing (first 'b/00003.jpg'), 1 row that the list does not ask for (first in line 4, ''), 1 row without two finite numbers"),
    (changed(4, "b/00003.jpg,2,0") + "\nb/00003.jpg,0,x", "by 1 row with a value outside of [-1, 1] (first in line 4, 'b/00003.jpg,2,0'), 1 row too often "
     "(first in line 23, 'b/00003.jpg,0,x'), 1 row without two finite numbers (first in line 23, 'b/00003.jpg,0,x');"),
    (text().replace(HEADER + "\n", ""), ", line 1: 'b/00001.jpg,0.1234,-0.5' is not the header"),
    (text().replace(HEADER, "image_location,arousal,valence"), ", line 1: 'image_location,arousal,valence' is not the header"),
    (text().replace(HEADER, HEADER.title()), ", line 1:"), (text().replace(",", ";"), ", line 1:"), (text().replace(",", ", "), ", line 1:"),
    ("", ", line 1: '' is not the header"), ("\n" + text(), ", line 1: '' is not the header"),
    ("\ufeff" + text(), "line 1: '\\ufeffimage_location"), (text().encode("utf-16"), ", line 1: not UTF-8"), (text().encode() + b"\xff", ", line 23: not UTF-8"),
    (b"\0" * 5000, ", line 1: '\\x00"), (b"PK\3\4" + bytes(range(256)), "line 2: not UTF-8"), (HEADER + "\n" + "x" * 10**6, "21 rows missing"),
])
def test_what_differs_is_said_in_one_sentence(tmp_path, asked, content, said):
    assert said in faults(tmp_path, asked, content)


def test_a_file_that_is_not_there(tmp_path, asked):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(DataError, match="cannot be read .*; write it first"):
            check_submission(path, asked)
    with pytest.raises(DataError, match="list.txt: cannot be read"):
        check_submission(asked, tmp_path / "no/list.txt")


def test_counts_are_true_whatever_happened_to_the_rows(tmp_path, asked):
    rng = random.Random(0)
    for _ in range(200):
        rows = list(LOCATIONS)
        lost = rng.sample(rows, rng.randrange(4))
        new, twice = [f"new/{i}.jpg" for i in range(rng.randrange(4))], rng.choices([row for row in rows if row not in lost], k=rng.randrange(4))
        rows = [row for row in rows if row not in lost] + new + twice
        rng.shuffle(rows)
        said = faults(tmp_path, asked, text(rows))
        wanted = {"missing": lost, "that the list does not ask for": new, "too often": twice}
        for kind, about in wanted.items():
            assert (f"{len(about)} row{'s' * (len(about) != 1)} {kind} (" in said) == bool(about), said
        assert ("rows in another order" in said) == (not any(wanted.values()))


def test_the_command_ends_with_2(tmp_path, asked):
    corpus = tmp_path / "corpus"
    (corpus / "VA_Estimation_Challenge").mkdir(parents=True)
    shutil.move(asked, corpus / "list.txt")
    for name, content in {"bad\nname.txt": text(LOCATIONS[1:]), "binary.txt": "\x1b[31m" + text()}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError):
            check_submitted(tmp_path / name, corpus)
        done = submit("--check", tmp_path / name, "--corpus", corpus)
        refused(done, "differs from" if "bad" in name else "not the header")
        assert "\x1b" not in done.stderr


def test_rows_are_spelled_as_in_the_list(tmp_path):
    locations = ["b/1.jpg", "b/000002.jpg", "a, b/00001.jpg", "b/00003.jpg", "ä/00001.jpg"]
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["image_location, valence, arousal", *(f"{l},0,0" for l in locations[:3]), "",
                                                                        f"  {locations[3]}", locations[4] + ",,", ""]).encode())
    assert read_test_list(tmp_path / "list.txt") == [("b", 1), ("b", 2), ("a, b", 1), ("b", 3), ("ä", 1)]
    va = {"b": np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]), "a, b": np.array([[7, -7]]), "ä": np.zeros((1, 2))}
    write_submission(tmp_path / "mine.txt", tmp_path / "list.txt", va)
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8").splitlines() == [HEADER, "b/1.jpg,0.1000,0.2000", "b/000002.jpg,0.3000,0.4000",
                                                                               "a, b/00001.jpg,1.0000,-1.0000", "b/00003.jpg,0.5000,0.6000", "ä/00001.jpg,0.0000,0.0000"]
    assert check_submission(tmp_path / "mine.txt", tmp_path / "list.txt") == 5


def test_a_list_that_asks_twice_gets_it_twice(tmp_path):
    asked = write_list(tmp_path / "list.txt", LOCATIONS + LOCATIONS[:1])
    write_submission(tmp_path / "mine.txt", asked, {trial: np.zeros((7, 2)) for trial in ("b", "a_left", "4-30-1920x1080")})
    assert check_submission(tmp_path / "mine.txt", asked) == 22
    assert "by 1 row missing (first 'b/00001.jpg')" in faults(tmp_path, asked, text())
