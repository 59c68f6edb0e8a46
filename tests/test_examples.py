"""Names that no notebook calls by itself, each in a line or two that says what it is for; the reference shows them as examples."""
import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from clips import beeps, talking, write_video
from conftest import ROOT
from sage_nb import tables
from sage_nb.affwild2 import Clock, check_complete, open_video, orientation, picture_track, printable, shown_at, sound_track, stores_no_times
from sage_nb.backbones import ENCODERS, IR50, Published
from sage_nb.baselines import (CAN, COLD, GMU, GRJCA, JCA, LFAN, RJCA, TAGF, Crossmodal, JointNetwork, LineageFrontEnd, LineageHead, LinearHead, SideBySide, Visual,
                               build_model, front_end, masked_softmax, no_causal_form)
from sage_nb.conditions import frame_truth
from sage_nb.core import DataError, Sequence, die_with_parent, pin_arithmetic, read_json, write_arrays
from sage_nb.corruption import FAMILIES, Family
from sage_nb.evaluation import ablation, calibration, cell, comparison, detection, reliability_frames, write_provenance
from sage_nb.features import each_trial, load_sequence
from sage_nb.figures import new_figure
from sage_nb.interaction import TCN, Standardise
from sage_nb.losses import mean_square
from sage_nb.media import whole_box
from sage_nb.metrics import average, bootstrap_moments, ccc_from_moments, group_moments, resample
from sage_nb.pipeline import PeakMemory, fetch_sample, provenance
from sage_nb.reliability import Judge, label_variance, soft_clamp
from sage_nb.robustness import loss_differences, missing_differences
from sage_nb.sample import PHASES, RATE, STEP, draw_look, draw_person, draw_phases, draw_sound, expression, plan_corpus, soft, speech_rhythm
from sage_nb.windows import made_up_sequences, place_windows


# --- videos

def test_a_video_packet_by_packet(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, talking(6), np.arange(6) / 25, sound=beeps([0.1], 0.3))
    with open_video(path) as container:
        pictures, shown = picture_track(container), []
        clock, frames, last = Clock(pictures), 0, None
        for packet in container.demux(pictures):
            stamp, last = shown_at(packet), packet.dts if packet.dts is not None else last
            for picture in packet.decode():
                frames += 1
                shown.append(clock(picture.pts))
                assert orientation(picture) == orientation(picture)
        assert not stores_no_times(container) and sound_track(container).codec_context.sample_rate > 0
        assert shown == pytest.approx(np.arange(6) / 25, abs=1e-3)
        assert check_complete(path, pictures, frames, last) == 0
        with pytest.raises(DataError, match="breaks off after picture 3"):
            check_complete(path, pictures, 3, last)


def test_a_clock_goes_on_where_a_stamp_is_missing(tmp_path):
    write_video(tmp_path / "clip.mp4", talking(4), np.arange(4) / 25)
    with open_video(tmp_path / "clip.mp4") as container:
        clock = Clock(picture_track(container))
        assert np.diff([clock(0), clock(None), clock(0)]) == pytest.approx([1 / 25, 1 / 25], abs=1e-3)


def test_names_from_elsewhere_are_printed_on_one_line():
    assert printable("a\nb\x1b[31m") == "a\\nb\\x1b[31m" and printable("Zoë") == "Zoë"


def test_a_picture_that_is_all_face():
    assert whole_box(np.zeros((40, 60, 3), np.uint8)) == (0, 0, 60, 40)


# --- models

def test_models_by_name_are_of_these_classes():
    classes = dict(visual=Visual, gmu=GMU, can=CAN, lfan=LFAN, jca=JCA, rjca=RJCA, grjca=GRJCA, tagf=TAGF, crossmodal=Crossmodal, cold=COLD)
    for name, kind in classes.items():
        model = build_model(name, 8, 6, 2, cue_owners="va").eval()
        assert type(model) is kind
        assert model(torch.randn(1, 12, 8), torch.randn(1, 12, 6), cues=torch.randn(1, 12, 2)).va.shape == (1, 12, 2)


def test_the_lineages_own_parts_stand_behind_one_switch():
    assert isinstance(front_end(True, 8, 6, 0), LineageFrontEnd) and not isinstance(front_end(False, 8, 6, 0), LineageFrontEnd)
    assert any(isinstance(part, JointNetwork) for part in build_model("rjca", 8, 6).modules())
    with pytest.raises(DataError, match="'jca' looks at its whole window and has no causal form"):
        no_causal_form("jca", {"causal": True})


def test_networks_side_by_side():
    both = SideBySide([TCN(4), TCN(4)])
    assert both(torch.randn(1, 9, 4), torch.ones(1, 9, dtype=torch.bool)).shape == (1, 9, 8)


def test_a_network_of_image_recognition():
    assert IR50(40).eval()(torch.zeros(1, 3, 40, 40)).shape == (1, 512)


def test_registries_hold_records():
    assert all(isinstance(encoder, Published) for named in ENCODERS.values() for encoder in named.values()) and all(isinstance(family, Family) for family in FAMILIES.values())


def test_heads_bound_their_estimate():
    z, mask = 100 * torch.randn(2, 5, 7), torch.ones(2, 5, dtype=torch.bool)
    assert LinearHead(7)(z).abs().max() <= 1 and LineageHead(7).eval()(z, mask).abs().max() <= 1


def test_a_softmax_over_what_is_there():
    logits, ok = torch.tensor([[1.0, 1.0, 5.0], [1.0, 2.0, 3.0]]), torch.tensor([[True, True, False], [False, False, False]])
    assert masked_softmax(logits, ok, -1)[0].tolist() == [0.5, 0.5, 0]


def test_features_are_standardised_by_the_training_set():
    standard = Standardise(2)
    standard.fit([np.array([[0.0, 5.0], [2.0, 5.0]]), np.array([[4.0, 5.0]])])
    assert torch.allclose(standard(torch.tensor([[2.0, 5.0], [torch.nan, 6.0]])), torch.tensor([[0.0, 0.0], [0.0, 1.0]]))


def test_labels_and_judges_of_reliability():
    va = np.array([[0.0, 1.0], [1.0, 1.0], [9.0, 9.0]], np.float32)
    there = np.ones(3, bool)
    sequence = Sequence("a", np.zeros((3, 1), np.float32), np.zeros((3, 1), np.float32), va, there, there, valid=np.array([True, True, False]))
    assert label_variance([sequence]).tolist() == [0.25, 0]  # over labelled frames
    judge = Judge(observed=3, stages=2, hidden=4, kernel=5, dropout=0.0, causal=False)
    assert judge(torch.randn(1, 9, 3), torch.ones(1, 9, dtype=torch.bool)).shape == (1, 9, 2, 2)
    x = torch.tensor([-100.0, 0.0, 100.0], requires_grad=True)
    y = soft_clamp(x, -7.0, 2.0)
    assert y.tolist() == pytest.approx([-7, 0, 2], abs=0.2) and torch.autograd.grad(y.sum(), x)[0][1] > 0.8


def test_only_what_counts_is_squared():
    error = torch.tensor([1.0, 3.0, torch.nan], requires_grad=True)
    loss = mean_square(error, torch.tensor([True, True, False]))
    loss.backward()
    assert loss == 5 and error.grad.tolist() == [1, 3, 0]


def test_windows_of_an_epoch_cover_every_sequence():
    sequences, _ = made_up_sequences(3, frames=(50, 50))
    placed = place_windows(sequences, 20, 2, np.random.default_rng(0))
    assert {which for batch in placed for which, _ in batch} == {0, 1, 2} and all(0 <= first < 50 for batch in placed for _, first in batch)


# --- scores

def test_intervals_by_group_from_sums():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(400, 2))
    sums = group_moments(truth + 0.3 * rng.normal(size=(400, 2)), truth, np.repeat(np.arange(20), 20))[None]
    low, high = bootstrap_moments(sums, resamples=200).interval()
    assert (low < high).all() and (high <= 1).all() and low[-1] > 0.8  # the last is the mean of both

    def first(counts):
        return ccc_from_moments(np.tensordot(counts, sums[0], (1, 0)))[:, 0]

    assert np.array_equal(resample(average([first, first]), 20, 50).samples, resample(first, 20, 50).samples)


def test_provenance_of_a_cell(tmp_path, evidence):
    runs = evidence.runs[:2]
    entry = cell("tables", runs)
    write_provenance(tmp_path / "toy", "A toy.", evidence.records, {"sage": {"p": entry}}, None)
    assert entry["runs"] == runs.run.tolist() and (tmp_path / "toy.provenance.json").is_file()


def test_reliability_frame_by_frame(evidence):
    run = evidence.runs.query("model == 'sage'").run.iloc[0]
    table = reliability_frames(evidence, run)
    assert {"visual", "audio"} == set(table.modality) and table.reliability.dropna().between(0, 1).all()
    assert reliability_frames(evidence, evidence.runs.query("model == 'concat'").run.iloc[0]).empty


def test_every_table_is_formatted_row_by_row(evidence):
    compared = comparison(evidence, resamples=20)
    parts = [(tables.comparison_texts, compared), (tables.conventions_texts, compared), (tables.ablation_texts, ablation(evidence, resamples=20)),
             (tables.calibration_texts, calibration(evidence, resamples=20)), (tables.detection_texts, detection(evidence, resamples=20)),
             (tables.reliability_texts, tables.reliability_means(evidence)), (tables.robustness_texts, tables.robustness_table(evidence)),
             (tables.losses_texts, loss_differences(evidence, resamples=20)), (tables.missing_texts, missing_differences(evidence, resamples=20))]
    for texts, table in parts:
        assert len(texts(table)) == len(table) and all(isinstance(text, str) for row in texts(table).to_numpy() for text in row), texts.__name__


def test_every_caption_says_by_which_draws(evidence):
    for caption in (tables.comparison_caption, tables.ablation_caption, tables.calibration_caption, tables.detection_caption, tables.losses_caption, tables.missing_caption):
        assert " 77 " in caption(evidence, 77), caption.__name__
    for caption in (tables.conventions_caption, tables.reliability_caption, tables.robustness_caption, tables.claims_caption):
        assert caption(evidence).endswith("."), caption.__name__


def test_a_table_in_three_formats(tmp_path):
    table = pd.DataFrame({"model": ["sage"], "p": [0.5]})
    texts = pd.DataFrame({"model": [tables.model_label("sage")], "p": ["0.500"]})
    tables.write_formats(tmp_path / "toy", table, texts, "A toy.", words=1)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".md", ".tex"] and "| SAGE | 0.500 |" in (tmp_path / "toy.md").read_text()
    assert tables.row_keys(table.assign(seeds=5), ["model", "seeds"]) == ["sage, 5"]


def test_the_table_of_efficiency_has_a_row_for_each_measured_model():
    record = read_json(ROOT / "results/bench.json")
    table = tables.efficiency_table(record)
    assert sorted(zip(table.label, table.configuration)) == sorted((row["label"], row["configuration"]) for row in record["rows"])
    assert len(tables.efficiency_texts(table)) == len(table) and tables.efficiency_caption(record).endswith(".")


def test_a_figure_begins_empty():
    assert new_figure(3, 2).get_size_inches().tolist() == [3, 2] and not new_figure(3, 2).axes


# --- the sample

def test_hidden_processes_of_the_sample():
    rng, count = np.random.default_rng(0), 400
    opening = speech_rhythm(rng, np.zeros(count))
    assert 0 <= opening.min() and opening.max() <= 1
    phases = draw_phases(rng, count, PHASES)
    changes = np.flatnonzero(phases[1:] != phases[:-1])
    assert set(phases) <= set(PHASES) and (np.diff(changes) * STEP >= 1.4).all()  # none is shorter
    person = draw_person(rng, draw_look(rng), count, phases, nuisances=False)
    assert {"smile", "open_", "brow"} <= set(expression(person, 0))
    sound = draw_sound(rng, [person], draw_look(rng), np.full(count, "", object))
    assert len(sound) == len(soft(phases == "speak")) == count * STEP * RATE and abs(sound).max() <= 1


def test_the_plan_of_a_corpus_keeps_subjects_in_one_split():
    clips = plan_corpus(0, dict(pretrain=2, train=6, validation=4, test=2), nuisances=True)
    split = {}
    for clip in clips:
        for subject in clip.subjects:
            assert split.setdefault(subject, clip.split) == clip.split


# --- processes and files

def test_work_that_is_skipped_where_a_trial_is_broken(tmp_path):
    assert each_trial(_read, {"good": (1,), "bad": (0,)}, tmp_path, "reading", workers=1, skip_broken=True) == {"bad"}
    assert "zero" in (tmp_path / "broken.json").read_text()
    with pytest.raises(DataError, match="zero"):
        each_trial(_read, {"good": (1,), "bad": (0,)}, tmp_path, "reading", workers=1)


def _read(task):
    if not task[0]:
        raise DataError("bad: zero; put another number there")


@pytest.mark.skipif(sys.platform != "linux", reason="nothing happens elsewhere")
def test_a_process_dies_with_its_parent():
    work = f"from sage_nb.core import {die_with_parent.__name__} as tie; tie(); print(1, flush=True); import time; time.sleep(600)"
    code = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {work!r}], stdout=subprocess.PIPE); child.stdout.readline(); print(child.pid)"
    child = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)
    until = time.monotonic() + 60
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until


def test_a_trial_of_the_store_is_read_back(tmp_path):
    arrays = dict(visual=np.zeros((4, 3), np.float32), audio=np.zeros((4, 2), np.float32), va=np.zeros((4, 2), np.float32), cues=np.zeros((4, 1), np.float32),
                  visual_ok=np.ones(4, bool), audio_ok=np.ones(4, bool), valid=np.array([True, False, True, True]))
    write_arrays(tmp_path / "tra001.safetensors", arrays, {"group": "anna"})
    sequence = load_sequence(tmp_path / "tra001.safetensors")
    assert (sequence.id, sequence.group, len(sequence), int(np.sum(sequence.valid))) == ("tra001", "anna", 4, 3)


def test_a_corpus_without_side_files_has_no_truth(tmp_path):
    assert frame_truth(tmp_path, made_up_sequences(1, frames=(9, 9))[0]) == []


def test_provenance_changes_with_what_a_stage_reads(tmp_path):
    (tmp_path / "code.py").write_text("a = 1\n")
    (tmp_path / "input").mkdir()
    before = provenance(tmp_path, "make", ["code.py", "input"], {"epochs": 2})
    (tmp_path / "input/x").write_text("new")
    after = provenance(tmp_path, "make", ["code.py", "input"], {"epochs": 2})
    assert before["code"] == after["code"] and before["inputs"] != after["inputs"]
    with pytest.raises(DataError, match="none: not there, but stage make reads it"):
        provenance(tmp_path, "make", ["none"], {})


def test_the_sample_is_fetched_only_where_there_is_no_data(tmp_path):
    with pytest.raises(DataError, match="no data.dvc to fetch it by"):
        fetch_sample(tmp_path)
    (tmp_path / "data").mkdir()
    fetch_sample(tmp_path)
    assert not list((tmp_path / "data").iterdir())


def test_peak_memory_counts_processes_below():
    with PeakMemory() as peak:
        subprocess.run([sys.executable, "-c", "x = bytearray(200_000_000); import time; time.sleep(2)"], check=True)
    assert peak.bytes > 200_000_000


def test_arithmetic_is_pinned_for_processes_started_later(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    pin_arithmetic()
    assert os.environ["ATEN_CPU_CAPABILITY"] == "avx2"
