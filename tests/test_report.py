"""The report on a corpus: what is planted is found, nothing else is, and what it calls unusable cannot be read."""
import json
import re
import subprocess
import sys
import warnings
from fractions import Fraction

import av
import corpora
import numpy as np
import pytest
from clips import annotate, beeps, talking, wall, write_video
from corpora import COUNT, archive, clip, differences, faces, official_tree, root, small_tree, trim  # noqa: F401 (fixtures)

from sage_nb.affwild2 import Corpus, summarise
from sage_nb.cli import main
from sage_nb.core import DataError
from sage_nb.features import prepare_corpus
from sage_nb.media import look_closely, read_trial


# --- the report

@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    return folder / "corpus", official_tree(folder / "corpus", longest=1000)


def test_every_planted_oddity_is_found_and_nothing_else(tree, tmp_path, capsys):
    "All 594 videos, shorter than the true ones; `python tests/corpora.py` does the same at full length."
    root, (planted, faults, elsewhere) = tree
    assert main(["check", str(root), "--json", str(tmp_path / "report.json")]) == 2
    told, report = capsys.readouterr(), json.loads((tmp_path / "report.json").read_text())
    assert differences(tmp_path / "report.json", planted, faults, elsewhere) == {}
    assert len({kind for kinds in planted.values() for kind in kinds}) == 20 and len({*faults.values()}) == 4
    assert report["exit_code"] == 2 and len({*told.err.splitlines()}) == len({trial["problem"] for trial in report["trials"]} - {""})
    assert {split["split"]: split["videos"] for split in report["splits"]}["train"] > 340
    assert f"{len(planted)} trials, {sum(not kinds and trial not in faults for trial, kinds in planted.items())} clean" in told.out and f"{len(faults)} unusable" in told.out
    for kind in {kind for kinds in planted.values() for kind in kinds}:
        line = next(line for line in told.out.splitlines() if line.strip().startswith(f"{kind}  "))
        counts = [sum(kind in planted[trial["trial"]] for trial in report["trials"] if trial["split"] == split) for split in ("train", "validation", "test")]
        assert line.split(kind)[1].split()[:4] == [*map(str, counts), "0"]


def test_the_verdict_on_a_tree_of_full_size_can_be_read_and_can_fail(tmp_path, capsys, monkeypatch):
    "What `python tests/corpora.py` prints last, at a small size."
    def verdict(name, **limit):
        code = corpora.main(tmp_path / name, videos=60, longest=300, **limit)
        line = capsys.readouterr().out.splitlines()[-1]
        assert re.match(r"60 videos of up to 300 pictures, \d+ cores: checked in \d+\.\d s, ", line)
        return code, line.partition(" s, ")[2]

    assert verdict("right") == (0, "all that was planted was found, and nothing else")
    assert verdict("slow", limit=0.0) == (1, "NOT as promised: more than 0 s")
    plant = official_tree
    monkeypatch.setattr(corpora, "official_tree", lambda *size: ((made := plant(*size))[0] | {"1": {"no such oddity"}}, *made[1:]))
    assert verdict("missed") == (1, "NOT as promised: 1 differences from what was planted")
    monkeypatch.setattr(corpora, "official_tree", lambda *size: (*plant(*size)[:2], {}))
    assert verdict("more") == (1, "NOT as promised: 3 differences from what was planted")


def test_the_report_is_the_same_on_one_core_and_on_two(tmp_path):
    official_tree(tmp_path / "corpus", videos=60, longest=300)
    one, two = (Corpus(tmp_path / "corpus").check(workers=workers) for workers in (1, 2))
    assert one.equals(two)


def test_the_summary_adds_up(tree):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = Corpus(tree[0], dev_groups=5, calibration_groups=5)
        table = corpus.check()
        there, odd = summarise(table)
    assert there.split.tolist() == ["train", "dev", "calibration", "validation", "test"]
    assert (there.clean + there.odd + there.broken).tolist() == there.trials.tolist() and there.pictures.sum() == table.frames.sum()
    assert odd.drop(columns=["odd", "example"]).to_numpy().sum() == table.odd.map(len).sum()
    assert there.faces.between(0.85, 0.95).all() and there.labelled[:4].between(0.9, 1).all() and np.isnan(there.labelled[4])


def test_broken_and_idle_things_are_in_the_report(root, tmp_path):
    archive(faces("two_left") + faces("stranger"), root / "cropped_aligned.zip")
    (root / "cropped_aligned_2.zip").write_bytes(b"words")
    (root / "videos" / "spare.mp4").hardlink_to(root / "videos" / "two.mp4")
    annotate(root / "VA_Estimation_Challenge" / "Train_Set" / "gone.txt", [[0, 0]])
    assert main(["check", str(root), "--json", str(tmp_path / "r.json")]) == 2
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["exit_code"] == 2 and report["splits"][0]["broken"] == 3
    named = {row["trial"] or row["video"]: row for row in report["trials"]}
    assert named["gone"]["frames"] is None
    idle = {row["video"]: [odd["text"] for odd in row["oddities"]] for row in report["trials"] if not row["trial"] and not row["problem"]}
    assert idle == {"videos/spare.mp4": ["no trial belongs to this video"], "cropped_aligned.zip (stranger)": ["no trial belongs to these face pictures"]}
    [fault] = [row["problem"] for row in report["trials"] if row["problem"] and not row["trial"]]
    assert "cropped_aligned_2.zip" in fault and named["two_left"]["problem"] == "", "its faces are elsewhere"
    assert fault == named["two_right"]["problem"] == named["Köln"]["problem"] == named["gone"]["problem"], "theirs may have been in it"


@pytest.mark.parametrize("place, name", [("VA_Estimation_Challenge/Train_Set", b"\xff\xfe.txt"), ("VA_Estimation_Challenge/Train_Set", b"line\nend.txt"),
                                         ("videos", b"\x1b[2J.mp4"), ("videos", "a\xa0b.mp4".encode()), ("cropped_aligned/K\xf6ln\x07", b"00001.jpg")])
def test_names_that_are_no_text(root, place, name, tmp_path, capfd):
    "The table goes on, and so does whatever has a name."
    (root / place).mkdir(parents=True, exist_ok=True)
    open(str(root / place).encode() + b"/" + name, "w").close()
    (tmp_path / "r.json").write_text('{"exit_code": 0}')
    assert main(["check", str(root), "--json", str(tmp_path / "r.json")]) == json.loads((tmp_path / "r.json").read_text())["exit_code"] == 2
    told = capfd.readouterr()
    assert "cannot be printed; rename it" in told.err and len(told.err.splitlines()) == 1 and told.err.strip().isprintable()
    annotated = place.startswith("VA")
    assert f"{3 + annotated} trials, " in told.out and f" {int(annotated)} unusable" in told.out
    trials = Corpus(root).trials()
    assert sum(bool(trial.fault) for trial in trials) == annotated and all(trial.id.isprintable() and trial.group.isprintable() for trial in trials)
    prepare_corpus(Corpus(root), tmp_path / "out", workers=1, skip_broken=True)
    assert len([*(tmp_path / "out").glob("*.safetensors")]) == 3


def test_a_name_too_long_for_a_file(root, tmp_path):
    for count in (200, 201, 251):
        (root / "videos" / f"{'x' * count}.mp4").hardlink_to(root / "videos" / "two.mp4")
        annotate(root / "VA_Estimation_Challenge" / "Train_Set" / f"{'x' * count}.txt", [[0, 0]] * COUNT)
    table = Corpus(root).check()
    assert table.problem.str.contains("name of more than 200 bytes; shorten it").sum() == 2 == (table.problem != "").sum()
    prepare_corpus(Corpus(root), tmp_path / "out", workers=1, skip_broken=True)
    assert {path.stem for path in (tmp_path / "out").glob("*.safetensors")} == {"two_left", "two_right", "Köln", "x" * 200}
    with pytest.raises(DataError, match="more than 200 bytes"):
        prepare_corpus(Corpus(root), tmp_path / "other", workers=1)


def test_what_only_decoding_shows(root, tmp_path):
    damaged = bytearray(write_video(tmp_path / "d.mp4", talking(30), np.arange(30) / 25).read_bytes())
    with av.open(str(tmp_path / "d.mp4")) as container:
        hit = [packet for packet in container.demux(video=0) if packet.size][15]
        damaged[hit.pos : hit.pos + hit.size] = b"\xff" * hit.size
    (root / "videos" / "Köln.mp4").unlink()
    (root / "videos" / "Köln.mp4").write_bytes(damaged)
    annotate(root / "VA_Estimation_Challenge" / "Train_Set" / "Köln.txt", [[0, 0]] * 30)
    corpus = Corpus(root)
    assert (corpus.check().problem == "").all()
    problems = corpus.check(look_closely).set_index("trial").problem
    assert "decoding stops after picture" in problems["Köln"] and problems["two_left"] == problems["two_right"] == ""


def test_a_closed_pipe_changes_no_exit_code(root):
    for code in (0, 1, 2):
        if code:
            write_video(root / "videos" / "spare.mp4", [wall(size=32)] * 3, np.arange(3) / 25)
        if code == 2:
            (root / "VA_Estimation_Challenge" / "Train_Set" / "gone.txt").touch()
        process = subprocess.Popen([sys.executable, "-m", "sage_nb.cli", "check", str(root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read() and process.wait() == code
        process.stderr.close()


def test_the_json_is_written_even_for_what_is_no_corpus(tmp_path):
    (tmp_path / "r.json").write_text('{"exit_code": 0}')
    assert main(["check", str(tmp_path / "nowhere"), "--json", str(tmp_path / "r.json")]) == 2
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["exit_code"] == 2 and "no such folder" in report["trials"][0]["problem"]


def test_the_json_of_a_closed_corpus_is_not_written_where_git_takes_it(root, tmp_path, capsys, monkeypatch):
    (home := tmp_path / "home").mkdir()
    subprocess.run(["git", "init", "-q"], cwd=home, check=True)
    (home / ".gitignore").write_text("/results-local/\n")
    monkeypatch.chdir(home)
    for corpus in (root, tmp_path / "nowhere"):
        for out in ("results/report.json", "report.json", str(home / "results-local/../new/report.json")):
            assert main(["check", str(corpus), "--json", out]) == 2
            told = capsys.readouterr()
            assert told.err.startswith(f"sage-nb: {out}: git would take this file") and told.err.count("\n") == 1 and not told.out
    assert {path.name for path in home.iterdir()} == {".git", ".gitignore"}
    for out in (home / "results-local/report.json", tmp_path / "report.json"):
        assert main(["check", str(root), "--json", str(out)]) < 2 and out.is_file()


@pytest.mark.parametrize("part", ["corpus", "pretrain"])
def test_the_json_of_a_sample_may_lie_anywhere(tmp_path, clip, monkeypatch, part):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    (videos := tmp_path / "made" / part / "videos").mkdir(parents=True)
    (videos / "tra001.mp4").hardlink_to(clip)
    annotate(tmp_path / "made" / part / "VA_Estimation_Challenge/Train_Set/tra001.txt", [[0.1, 0.2]] * COUNT)
    assert main(["check", f"made/{part}", "--json", "report.json"]) == 2 and not (tmp_path / "report.json").exists()
    (tmp_path / "made/sample.json").write_text("{}\n")
    assert main(["check", f"made/{part}", "--json", "report.json"]) < 2 and (tmp_path / "report.json").is_file()
    (videos / "4-30-1920x1080.mp4").hardlink_to(clip)
    assert main(["check", f"made/{part}", "--json", "again.json"]) == 2 and not (tmp_path / "again.json").exists()


def test_subjects_and_lists_that_contradict(root):
    for name in ("u", "w"):
        (root / "videos" / f"{name}.mp4").hardlink_to(root / "videos" / "two.mp4")
    rows = [f"u/{number:05d}.jpg" for number in (1, 1, 9, 0)] + [f"w/{number:05d}.jpg" for number in range(1, COUNT + 1)]
    (root / "list.txt").write_text("image_location,valence,arousal\n" + "".join(f"{row},0,0\n" for row in rows))
    (root / "subjects.csv").write_text("trial,subject\nKöln,1\nKöln,2\nzz,1\nu,3\nu,3\n")
    table = Corpus(root).check()
    named = table.set_index("trial")
    assert "Köln is said to be '1' and '2'; keep one of them" in named.loc["Köln", "problem"] and (table.problem != "").sum() == 1
    assert "1 asked for twice, 7 left out, 1 called 0" in named.loc["u", "oddities"] and named.loc["w", "oddities"] == named.loc["two_left", "oddities"] == ""
    assert named.loc["", "oddities"] == "subjects.csv names a trial zz that is not there"
    with pytest.raises(DataError, match="keep one of them"):
        read_trial(Corpus(root).trials()[0])


# --- both sides of each threshold

def oddities(root, video=None, rows=COUNT):
    "Kinds of oddities of the trial Köln, with another video or another number of rows."
    if video is not None:
        (root / "videos" / "Köln.mp4").unlink()
        (root / "videos" / "Köln.mp4").hardlink_to(video)
    annotate(root / "VA_Estimation_Challenge" / "Train_Set" / "Köln.txt", [[0, 0]] * rows)
    table = Corpus(root).check().set_index("trial")
    return {kind for kind, _ in table.loc["Köln", "odd"]}, table.loc["Köln"]


@pytest.mark.parametrize("seconds, early", [(1.7, False), (1.4, True)])
def test_where_sound_ends_early(root, tmp_path, seconds, early):
    clip = write_video(tmp_path / "a.mp4", [wall(size=32)] * 50, np.arange(50) / 25, np.zeros(round(8000 * seconds)), rate=8000)
    assert oddities(root, clip, 50)[0] == ({"sound ends early"} if early else set())


@pytest.mark.parametrize("start, kind", [(0.03, None), (0.14, "sound starts late"), (0.25, "sound starts late"), (-0.03, None), (-0.14, "sound starts early")])
def test_where_sound_is_late_or_early(root, tmp_path, start, kind):
    times = max(-start, 0) + np.arange(50) / 25
    clip = write_video(tmp_path / "a.mp4", [wall(size=32)] * 50, times, np.zeros(round(48000 * (times[-1] + 0.04 - max(start, 0)))),
                       max(start, 0), rate=48000)
    found, _ = oddities(root, clip, 50)
    assert found == ({kind} if kind else set())


@pytest.mark.parametrize("rows, kind", [(49, "rows and pictures differ"), (50 + 30, "rows and pictures differ"), (50 + 31, "rows and pictures differ by far"),
                                        (50 - 31, "rows and pictures differ by far"), (50, None)])
def test_where_rows_and_pictures_differ_by_far(root, tmp_path, rows, kind):
    clip = write_video(tmp_path / "a.mp4", [wall(size=32)] * 50, np.arange(50) / 25, np.zeros(16000), rate=8000)
    assert oddities(root, clip, rows)[0] == ({kind} if kind else set())


def test_rows_and_pictures_of_a_long_video(root, tmp_path):
    clip = write_video(tmp_path / "a.mp4", [wall(size=16)] * 4000, np.arange(4000) / 25, np.zeros(8000 * 160), rate=8000)
    assert oddities(root, clip, 3960)[0] == {"rows and pictures differ"} and oddities(root, clip, 3959)[0] == {"rows and pictures differ by far"}


@pytest.mark.parametrize("rate, kind", [(30, None), (30.05, None), (30.1, "unusual frame rate"), (24000 / 1001, None), (15, "unusual frame rate")])
def test_which_rates_are_unusual(root, tmp_path, rate, kind):
    clip = write_video(tmp_path / "a.mp4", [wall(size=32)] * 50, np.arange(50) / rate, np.zeros(round(8000 * 50 / rate)), rate=8000)
    assert oddities(root, clip, 50)[0] == ({kind} if kind else set())


@pytest.mark.parametrize("step, kind", [(1.08, None), (1.2, "variable frame rate")])
def test_which_rates_vary(root, tmp_path, step, kind):
    times = np.cumsum(np.r_[0, [1] * 30, step, [1] * 18]) / 25
    clip = write_video(tmp_path / "a.mp4", [wall(size=32)] * 50, times, np.zeros(round(8000 * times[-1])), rate=8000)
    assert oddities(root, clip, 50)[0] == ({kind} if kind else set())


@pytest.mark.parametrize("numbers, share, kind", [(range(1, 7), 0.5, None), ([*range(1, 7), 13], 0.5, None), ([*range(1, 7), 13, 14, 15], 0.5, "face pictures beyond the end")])
def test_the_share_of_faces_is_of_the_pictures(root, numbers, share, kind):
    archive(faces("Köln", numbers), root / "cropped_aligned.zip")
    found, row = oddities(root, rows=COUNT + 1)
    assert row.faces == share and found - {"rows and pictures differ"} == ({kind} if kind else set())


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
@pytest.mark.parametrize("missing", [0, 1, 9])
def test_a_little_that_is_cut_off_is_told(root, tmp_path, missing, suffix):
    "Up to one picture in a hundred: too few to refuse the file."
    count = 1000
    whole = write_video(tmp_path / f"a{suffix}", [wall(size=16)] * count, np.arange(count) / 25, options={"movflags": "faststart"} if suffix == ".mp4" else {})
    with av.open(str(whole)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(whole.read_bytes()[: places[count - missing] - (8 if suffix == ".avi" else 0) if missing else None])
    (root / "videos" / "Köln.mp4").unlink()
    (root / "videos" / f"Köln{suffix}").hardlink_to(cut)
    found, row = oddities(root, rows=count)
    assert found == {"no sound"} | ({"pictures missing", "rows and pictures differ"} if missing else set())
    assert not missing or f"{missing} pictures that belong to the video are missing" in row.oddities


def test_what_is_hidden_or_left_out_is_not_missing(root, tmp_path):
    clip = write_video(tmp_path / "a.mp4", [wall(size=32)] * 50, np.arange(50) / 25)
    assert oddities(root, trim(clip, Fraction(20, 25)), 30)[0] == {"no sound"}
    uneven = write_video(tmp_path / "b.avi", [wall(size=32)] * 50, np.r_[np.arange(25), 26 + np.arange(25)] / 25)
    (root / "videos" / "Köln.mp4").unlink()
    (root / "videos" / "Köln.avi").hardlink_to(uneven)
    found, row = oddities(root, rows=50)
    assert "pictures missing" not in found and row.frames == 50
