"""Bad input: one sentence that names the file and a remedy, exit code 2, no traceback."""
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from clips import annotate, beeps, talking, write_video

from sage_nb.affwild2 import Corpus
from sage_nb.core import DataError
from sage_nb.media import read_sound, read_trial

COUNT = 90


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "sage_nb.cli", *map(str, arguments)], capture_output=True, text=True, timeout=60)


def one_sentence(text, *names):
    assert "\n" not in text.strip() and "Traceback" not in text
    assert ";" in text, f"no remedy in {text!r}"
    for name in names:
        assert str(name) in text


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "A sound mp4 file with a face in it."
    path = tmp_path_factory.mktemp("good") / "good.mp4"
    return write_video(path, talking(COUNT), np.arange(COUNT) / 30, beeps([1.0], 3.0))


@pytest.fixture
def corpus(tmp_path, good):
    "A clean corpus of one trial."
    root = tmp_path / "corpus"
    (root / "videos").mkdir(parents=True)
    (root / "videos" / "good.mp4").symlink_to(good)
    annotate(root / "annotations" / "VA_Estimation_Challenge" / "Train_Set" / "good.txt", [[0.1, -0.1]] * COUNT)
    return root


def add(root, name, video=None, text=None):
    "Another trial: the bytes of its video and of its annotation; by default a good one."
    (root / "videos" / name).write_bytes((root / "videos" / "good.mp4").read_bytes() if video is None else video)
    rows = "valence,arousal\n" + "0.1,-0.1\n" * COUNT
    path = root / "annotations" / "VA_Estimation_Challenge" / "Train_Set" / f"{Path(name).stem}.txt"
    path.write_text(rows if text is None else text)
    return path


def test_a_clean_corpus_is_clean(corpus):
    result = command("check", corpus)
    assert result.returncode == 0 and result.stderr == "" and "1 clean, 0 with oddities, 0 unusable" in result.stdout


def test_no_data(tmp_path):
    result = command("check", tmp_path / "nowhere")
    assert result.returncode == 2 and result.stdout == ""
    one_sentence(result.stderr, tmp_path / "nowhere", "no such folder", "sage-nb sample")


def test_wrong_layout(tmp_path, good):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "good.mp4").symlink_to(good)
    result = command("check", tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    one_sentence(result.stderr, tmp_path, "VA_Estimation_Challenge", "put the official annotations there")


def test_layouts_that_cannot_be_understood(corpus, good):
    labels = corpus / "annotations" / "VA_Estimation_Challenge"

    def refused(*names):
        with pytest.raises(DataError) as error:
            Corpus(corpus)
        one_sentence(str(error.value), *names)

    def faulted(*names):
        "What concerns one trial is said by the report, and by whoever reads the trial."
        [trial] = Corpus(corpus).trials("train")
        with pytest.raises(DataError) as error:
            read_trial(trial)
        one_sentence(str(error.value), *names)
        assert str(error.value) in [*Corpus(corpus).check().problem]

    def reported(*names):
        table = Corpus(corpus).check()
        [problem] = table.problem[table.problem != ""]
        one_sentence(problem, *names)

    annotate(labels / "Validation_Set" / "good.txt", [[0, 0]])
    faulted(labels, "trial good is in two of")
    (labels / "Validation_Set" / "good.txt").unlink()
    (corpus / "copy").mkdir()
    (corpus / "copy" / "good.avi").symlink_to(good)
    read_trial(Corpus(corpus).trials()[0])  # another link to the same file
    (corpus / "copy" / "good.avi").unlink()
    (corpus / "copy" / "good.avi").write_bytes(good.read_bytes())
    faulted("copy", "good.avi", "same name")
    (corpus / "copy" / "good.avi").unlink()
    (corpus / "copy" / "VA_Estimation_Challenge").mkdir()
    refused(corpus, "holds 2")
    (corpus / "copy" / "VA_Estimation_Challenge").rmdir()
    (corpus / "list.txt").write_text("image_location,valence,arousal\n../../escape/00001.jpg,0,0\n")
    reported("list.txt, line 2", "organisers' list")
    (corpus / "list.txt").write_text("image_location,valence,arousal\na/00001.jpg,0,0\n")
    (corpus / "other.txt").write_text("image_location,valence,arousal\n")
    reported("other.txt", "list.txt")
    (corpus / "list.txt").unlink()
    (corpus / "other.txt").unlink()
    (labels / "Train_Set" / "good.txt").unlink()
    refused(labels, "no annotation")


def broken_videos(good, folder):
    "Name -> bytes and what must be said."
    content = good.read_bytes()
    index_first = write_video(folder / "index_first.mp4", talking(COUNT), np.arange(COUNT) / 30, options={"movflags": "faststart"}).read_bytes()
    avi = write_video(folder / "complete.avi", talking(COUNT), np.arange(COUNT) / 30, beeps([1.0], 3.0)).read_bytes()
    return {
        "text.mp4": (b"These are words, and no video.\n" * 40, "not a readable video"),
        "words.avi": (b"These are words, and no video.\n" * 40, "not a readable video"),
        "nothing.mp4": (b"", "not a readable video"),
        "cut.mp4": (content[: len(content) // 2], "not a readable video"),
        "early.mp4": (index_first[: len(index_first) * 2 // 3], "breaks off after picture"),
        "short.avi": (avi[: len(avi) // 2], "breaks off after picture"),
    }


def test_videos_that_cannot_be_believed(corpus, good, tmp_path):
    expected = broken_videos(good, tmp_path / "made")
    with av.open(str(tmp_path / "voice.mp4"), "w") as container:
        track = container.add_stream("aac", rate=16000, layout="mono")
        chunk = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        chunk.sample_rate = 16000
        container.mux(track.encode(chunk))
        container.mux(track.encode())
    expected["voice.mp4"] = ((tmp_path / "voice.mp4").read_bytes(), "no picture track")
    for name, (content, _) in expected.items():
        add(corpus, name, content)
    result = command("check", corpus)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"1 clean, 0 with oddities, {len(expected)} unusable" in result.stdout
    sentences = result.stderr.strip().split("\n")
    assert len(sentences) == len(expected)
    trials = {trial.id: trial for trial in Corpus(corpus).trials()}
    for name, (_, fault) in expected.items():
        [sentence] = [line for line in sentences if name in line]
        one_sentence(sentence, corpus / "videos" / name, fault)
        with pytest.raises(DataError) as error:  # decoding may trip over the last, incomplete picture first
            read_trial(trials[Path(name).stem])
        one_sentence(str(error.value), corpus / "videos" / name, fault.removeprefix("breaks off "))


def test_a_video_damaged_in_the_middle(corpus, good):
    content = bytearray(good.read_bytes())
    with av.open(str(good)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        hit = packets[COUNT // 2]
        content[hit.pos : hit.pos + hit.size] = b"\xff" * hit.size
    add(corpus, "damaged.mp4", bytes(content))
    trial = next(trial for trial in Corpus(corpus).trials() if trial.id == "damaged")
    with pytest.raises(DataError) as error:
        read_trial(trial)
    one_sentence(str(error.value), "damaged.mp4", "decoding stops after picture", "copy the file again")


def test_annotations_that_cannot_be_believed(corpus):
    header = "valence,arousal\n"
    expected = {
        "word": (header + "0,0\nhappy,0\n", ", line 3: 'happy,0' is not two numbers"),
        "large": (header + "0,1.5\n", ", line 2: 1.5 is neither in [-1, 1] nor -5"),
        "column": (header + "0.1\n", ", line 2: '0.1' is not two numbers"),
        "empty": ("", ": the annotation is empty"),
        "header": ("0,0\n" * COUNT, ", line 1: '0,0' is not the header"),
    }
    paths = {name: add(corpus, f"{name}.mp4", text=text) for name, (text, _) in expected.items()}
    result = command("check", corpus)
    assert result.returncode == 2 and f"{len(expected)} unusable" in result.stdout
    trials = {trial.id: trial for trial in Corpus(corpus).trials()}
    for name, (_, fault) in expected.items():
        [sentence] = [line for line in result.stderr.strip().split("\n") if str(paths[name]) in line]
        one_sentence(sentence, f"{paths[name]}{fault}")
        with pytest.raises(DataError) as error:
            read_trial(trials[name])
        one_sentence(str(error.value), f"{paths[name]}{fault}")


def test_a_trial_without_a_video(corpus):
    path = add(corpus, "lonely_left.mp4")
    (corpus / "videos" / "lonely_left.mp4").unlink()
    result = command("check", corpus)
    assert result.returncode == 2
    one_sentence(result.stderr, path, "no video for this trial", "lonely.mp4 or lonely.avi")
    with pytest.raises(DataError, match="no video for this trial"):
        read_trial(next(trial for trial in Corpus(corpus).trials() if trial.id == "lonely_left"))


def test_a_video_without_a_trial_is_an_oddity(corpus):
    add(corpus, "spare.mp4").unlink()
    result = command("check", corpus)
    assert result.returncode == 1 and result.stderr == ""
    assert "spare.mp4" in result.stdout and "1 videos without a trial" in result.stdout


def test_a_video_without_sound_is_an_oddity(corpus, tmp_path):
    mute = write_video(tmp_path / "mute.mp4", talking(COUNT), np.arange(COUNT) / 30)
    add(corpus, "mute.mp4", mute.read_bytes())
    assert read_sound(mute) is None
    result = command("check", corpus)
    assert result.returncode == 1 and result.stderr == "" and "no sound" in result.stdout


def test_a_sample_is_not_written_over_something(tmp_path):
    (tmp_path / "mine").write_text("precious")
    result = command("sample", tmp_path / "mine")
    assert result.returncode == 2 and (tmp_path / "mine").read_text() == "precious"
    one_sentence(result.stderr, tmp_path / "mine", "exists already")


@pytest.mark.parametrize("option, fault", [(["--seed", "-1"], "seed"), (["--subjects", "train=0"], "subjects"),
                                           (["--seconds", "2", "9"], "seconds"), (["--seconds", "9", "4"], "seconds")])
def test_a_sample_that_cannot_be_made(tmp_path, option, fault):
    result = command("sample", tmp_path / "new", *option)
    assert result.returncode == 2 and not (tmp_path / "new").exists()
    one_sentence(result.stderr, fault)


@pytest.mark.parametrize("arguments", [[], ["fly"], ["check"], ["sample", "out", "--seed", "x"], ["sample", "out", "--subjects", "8"]])
def test_a_wrong_call_is_told_so(arguments):
    result = command(*arguments)
    assert result.returncode == 2 and "Traceback" not in result.stderr and "usage: sage-nb" in result.stderr
