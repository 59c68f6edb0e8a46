"""The sample corpus: every quirk is planned, nobody is in two splits, and what is in data/ is what its record says."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sage_nb.affwild2 import Corpus, read_annotation, video_info
from sage_nb.core import DataError, project_root, read_json
from sage_nb.pipeline import read_params
from sage_nb.sample import AUDIO_NUISANCES, PHASES, SUBJECTS, VERSION, VISUAL_NUISANCES, make_sample, plan_corpus, render_clip

DATA = project_root(Path(__file__).parent) / "data"


@pytest.fixture(scope="module")
def plan():
    return plan_corpus(0, SUBJECTS, nuisances=True)


def test_every_quirk_is_planned(plan):
    for split in ("train", "validation"):
        clips = [c for c in plan if c.split == split]
        assert {c.suffix for c in clips} == {".mp4", ".avi"}
        assert {round(float(c.rate), 2) for c in clips} == {30, 29.97, 25, 24}
        assert sum(c.sound_start > 0 for c in clips) == 1 and sum(c.variable for c in clips) == 1
        assert min(c.seconds for c in clips) < 5 and sorted(c.seconds for c in clips)[1] >= 10
        assert {-1, 1} <= {rows for c in clips for rows in c.rows} and any(c.unlabelled for c in clips)
        assert any(len(c.subjects) == 2 for c in clips)
    assert sum(c.silent for c in plan) == 1
    assert not any(c.nuisances for c in plan if c.split == "pretrain")


def test_nobody_is_in_two_splits(plan):
    of = {}
    for clip in plan:
        for subject in clip.subjects:
            assert of.setdefault(subject, clip.split) == clip.split
    assert {s: list(of.values()).count(s) for s in SUBJECTS} == SUBJECTS


def test_sizes_that_the_design_asks_for(plan):
    trials = sum(len(c.subjects) for c in plan if c.split == "validation")
    assert SUBJECTS["validation"] >= 48 and trials >= 72 and SUBJECTS["pretrain"] >= 24 and SUBJECTS["test"] == 8


def test_control_corpus_has_no_nuisance(tmp_path):
    make_sample(tmp_path / "c", seed=1, subjects=dict(pretrain=1, train=1, validation=1, test=1), nuisances=False, seconds=(3, 4), workers=1)
    for path in (tmp_path / "c" / "truth").glob("*.csv"):
        table = pd.read_csv(path, keep_default_na=False)
        assert (table.visual_nuisance == "").all() and (table.audio_nuisance == "").all() and set(table.phase) == {"speak"}


def test_data_is_what_its_record_says():
    record = read_json(DATA / "sample.json")
    assert record["version"] == VERSION and record["subjects"] == SUBJECTS and record["nuisances"]
    files = [p for p in DATA.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 40e6
    carved = read_params(DATA.parent)["prepare"]
    corpus = Corpus(DATA / "corpus", *(carved[name] for name in ("dev_groups", "calibration_groups", "split_seed")))
    trials = corpus.trials("all")
    assert len(trials) + len(Corpus(DATA / "pretrain").trials("all")) == record["trials"]
    assert {t.split for t in trials} == {"train", "dev", "calibration", "validation", "test"}
    people = {s: {t.subject for t in trials if t.split == s} for s in ("train", "dev", "calibration", "validation", "test")}
    assert sum(len(p) for p in people.values()) == len(set.union(*people.values()))  # nobody twice
    assert len(people["train"]) >= 46 and 12 <= len(people["dev"]) <= 16 and 16 <= len(people["calibration"]) <= 24


QUIRKS = {"late sound": lambda c: c.sound_start > 0, "no sound": lambda c: c.silent, "variable rate": lambda c: c.variable,
          "short": lambda c: c.seconds < 5, "avi": lambda c: c.suffix == ".avi", "two people": lambda c: len(c.subjects) == 2}


@pytest.mark.parametrize("quirk", QUIRKS)
def test_files_are_what_the_plan_says(plan, quirk):
    for clip in [c for c in plan if QUIRKS[quirk](c) and c.split != "pretrain"][:3]:
        info = video_info(DATA / "corpus/videos" / f"{clip.name}{clip.suffix}")
        assert (info.width, info.height) == (160 * len(clip.subjects), 160)
        assert info.variable == clip.variable and info.has_sound != clip.silent
        assert info.duration == pytest.approx(clip.seconds, abs=0.1)
        if not clip.variable:
            assert info.rate == pytest.approx(float(clip.rate), rel=1e-3)
        if not clip.silent:
            assert info.sound_start - info.start == pytest.approx(clip.sound_start, abs=0.07)  # AAC's run-in: 0.064 s


def test_the_plan_gives_the_frozen_labels_and_truth(plan, tmp_path):
    clip = min((c for c in plan if c.split == "validation"), key=lambda c: c.seconds)
    done = render_clip((clip, tmp_path))
    for path in (f"corpus/annotations/VA_Estimation_Challenge/Validation_Set/{clip.name}.txt", f"truth/{clip.name}.csv"):
        assert (tmp_path / path).read_bytes() == (DATA / path).read_bytes()
    assert done["frames"] == video_info(DATA / "corpus/videos" / f"{clip.name}{clip.suffix}").frames


@pytest.mark.parametrize("wrong, fault", [
    (dict(seed=-1), "seed: -1"), (dict(subjects=dict(train=0)), "subjects: 0 for train"), (dict(subjects=dict(dev=3)), "unknown split 'dev'"),
    (dict(seconds=(2.9, 4)), "seconds: from 2.9"), (dict(seconds=(5, 4)), "seconds: from 5 to 4"), (dict(seconds=(4, float("inf"))), "seconds"),
])
def test_what_cannot_be_made_is_refused(tmp_path, wrong, fault):
    with pytest.raises(DataError, match=fault):
        make_sample(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_truth_covers_every_frame_and_every_kind():
    seen = {"phase": set(), "visual_nuisance": set(), "audio_nuisance": set()}
    for trial in Corpus(DATA / "corpus").trials("validation"):
        table = pd.read_csv(DATA / "truth" / f"{trial.id}.csv", keep_default_na=False)
        va, _ = read_annotation(trial.annotation)
        assert len(table) == video_info(trial.video).frames and abs(len(va) - len(table)) <= 2
        for column, values in seen.items():
            values |= set(table[column])
    assert seen["phase"] == set(PHASES)
    assert seen["visual_nuisance"] == {"", *VISUAL_NUISANCES} and seen["audio_nuisance"] == {"", *AUDIO_NUISANCES}


def test_nuisances_know_nothing_of_the_mood():
    rows = []
    for trial in Corpus(DATA / "corpus").trials("all"):
        if trial.annotation is None:
            continue
        va, valid = read_annotation(trial.annotation)
        table = pd.read_csv(DATA / "truth" / f"{trial.id}.csv", keep_default_na=False)
        frames = min(len(va), len(table))
        keep = valid[:frames]
        rows.append(np.column_stack([va[:frames][keep], (table.visual_nuisance != "")[:frames][keep], (table.audio_nuisance != "")[:frames][keep]]).astype(float))
    correlation = np.corrcoef(np.concatenate(rows).T)[:2, 2:]
    assert np.abs(correlation).max() < 0.06
