"The training engine: resuming, selecting, refusing; windows and losses."
import json
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from sage_nb import core, training
from sage_nb.baselines import build_model
from sage_nb.core import DataError
from sage_nb.corruption import augment
from sage_nb.losses import beta_nll, masked_ccc, ordinal, va_loss
from sage_nb.training import Settings, fit, load_run, predict_sequences, score, train_runs
from sage_nb.windows import collate, made_up_sequences, random_starts, training_batches, window_starts

TINY = dict(visual_width=8, audio_width=8)
FRAMES = (40, 70)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data():
    return [made_up_sequences(count, seed, FRAMES)[0] for count, seed in ((16, 1), (6, 2), (6, 3))]


def model_of(name="sage", seed=0, **options):
    torch.manual_seed(seed)
    return build_model(name, 16, 12, 2, **TINY, **options)


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


KILLED_RUN = """
import os, signal, sys
import torch
from sage_nb import training
from sage_nb.baselines import build_model
from sage_nb.windows import made_up_sequences
deadly, folders = int(sys.argv[1]), sys.argv[2:]
torch.set_num_threads(1)
calls, loss = 0, training.va_loss
def counted(*args):
    global calls
    calls += 1
    if calls == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(*args)
training.va_loss = counted
data = [made_up_sequences(count, seed, (40, 70))[0] for count, seed in ((16, 1), (6, 2), (6, 3))]
for folder in folders:
    torch.manual_seed(0)
    model = build_model("sage", 16, 12, 2, visual_width=8, audio_width=8)
    training.fit(model, *data, run_dir=folder, epochs=8, window=60)
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    "Two batches an epoch: killed in the middle of the third epoch, then of the eighth and last, when SAGE has calibrated."

    def run(folder, deadly, *more):
        return subprocess.run([sys.executable, "-c", KILLED_RUN, str(deadly), folder, *more]).returncode

    assert run(tmp_path / "cut", 6) == -signal.SIGKILL
    assert set(content(tmp_path / "cut")) == {"resume.safetensors"}  # no half of a result
    assert len(core.read_arrays(tmp_path / "cut" / "resume.safetensors")[1]["history"]) == 2
    assert run(tmp_path / "cut", 12) == -signal.SIGKILL
    assert len(core.read_arrays(tmp_path / "cut" / "resume.safetensors")[1]["history"]) == 7
    assert run(tmp_path / "cut", 0, tmp_path / "whole") == 0
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    assert set(content(tmp_path / "whole")) == {"model.safetensors", "run.json", "history.json"}


def test_same_seed_same_bytes_and_another_seed_others(tmp_path, data):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(99)  # what a notebook did before must not matter
        torch.rand(len(folder))
        fit(model_of(seed=seed), *data, run_dir=tmp_path / folder, seed=seed, epochs=3, window=60)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a")["model.safetensors"] != content(tmp_path / "c")["model.safetensors"]


def test_fit_leaves_the_callers_random_numbers_alone(data):
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = model_of("visual")
    torch.manual_seed(5)
    fit(model, *data, epochs=1, window=60)
    assert torch.equal(torch.rand(3), expected) and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("change", [dict(learning_rate=0.02), dict(seed=1), dict(squared=0.2)])
def test_a_changed_setting_does_not_resume(tmp_path, data, monkeypatch, change):
    def interrupted(*args):
        raise KeyboardInterrupt

    plain = dict(epochs=3, window=60)
    fit(model_of("concat"), *data, run_dir=tmp_path / "new", **plain | change)
    with monkeypatch.context() as patch:  # cut off after the first epoch
        calls, epoch = [], training._epoch
        patch.setattr(training, "_epoch", lambda *a: epoch(*a) if calls.append(0) or len(calls) < 2 else interrupted())
        with pytest.raises(KeyboardInterrupt):
            fit(model_of("concat"), *data, run_dir=tmp_path / "old", **plain)
    assert (tmp_path / "old" / "resume.safetensors").is_file()
    fit(model_of("concat"), *data, run_dir=tmp_path / "old", **plain | change)
    assert content(tmp_path / "old") == content(tmp_path / "new")


def test_changed_data_does_not_reuse_a_finished_run(tmp_path, data):
    train, val, calibration = data
    fit(model_of("concat"), train, val, calibration, tmp_path, epochs=1, window=60)
    before = content(tmp_path)
    other = [replace(train[0], va=train[0].va * 0.5), *train[1:]]
    fit(model_of("concat"), other, val, calibration, tmp_path, epochs=1, window=60)
    assert content(tmp_path)["run.json"] != before["run.json"]


def test_a_finished_run_is_kept(tmp_path, data, monkeypatch):
    history = fit(model_of(), *data, run_dir=tmp_path, epochs=3, window=60)
    before = content(tmp_path)
    monkeypatch.setattr(training, "_train", None)  # would fail if it trained
    model = model_of(seed=7)
    assert fit(model, *data, run_dir=tmp_path, epochs=3, window=60) == history
    assert content(tmp_path) == before
    again = load_run(tmp_path)
    for a, b in zip(predict_sequences(model, data[1]), predict_sequences(again, data[1])):
        assert np.array_equal(a.va, b.va) and np.array_equal(a.log_var, b.log_var)


def test_the_best_eligible_epoch_is_kept(tmp_path, data):
    history = fit(model := model_of(), *data, run_dir=tmp_path, epochs=10, window=60)
    run = json.loads((tmp_path / "run.json").read_text())
    assert [h["eligible"] for h in history] == [epoch >= 7 for epoch in range(10)]  # calibrated from epoch 7 on
    best = max((h for h in history if h["eligible"]), key=lambda h: h["dev_p"])
    assert (run["best_epoch"], run["dev_p"], run["epochs"]) == (best["epoch"], best["dev_p"], 10)
    assert sum(score(predict_sequences(model, data[1]), data[1])) / 2 == best["dev_p"]


def test_training_stops_early(data):
    history = fit(model_of("concat"), *data, epochs=60, window=60, patience=2, learning_rate=0.0)
    assert len(history) == 3  # the first is the best; the next two are no better


def test_the_last_part_moves_only_fusion_and_head(data):
    seen = {}
    model = model_of()
    finish = model.finish
    model.finish = lambda: (finish(), seen.update(before={k: v.clone() for k, v in model.state_dict().items()}))
    fit(model, *data, epochs=6, window=60)
    moved = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, seen["before"][k])}
    assert moved == {"head", "kappa", "slope", "shift", "quantile", "alone"}  # the last four by calibration of the output
    assert (seen["before"]["branch.slope"] != 1).all()  # and calibration came before


def test_predicted_variances_are_right_on_the_calibration_sequences_at_every_stage(data):
    "Trust at stage 0 scales the input, whose errors were measured: so the fit is a fixed point, and nothing that moves later may undo it."
    model = model_of()
    fit(model, *data, epochs=6, window=60)
    outputs, va, valid, _ = training._outputs(model, data[2], torch.device("cpu"))
    for s in range(model.stages):
        log_var = torch.cat([o.readout_log_var[..., s, :].flatten(0, 1) for o in outputs])  # [N, M, 2]
        error = torch.cat([(o.readouts[..., s, :] - y[:, :, None]).flatten(0, 1) for o, y in zip(outputs, va)])
        counts = torch.cat([(v[..., None] & o.ok).flatten(0, 1) for o, v in zip(outputs, valid)])  # [N, M]
        for m in range(2):
            z2 = (error.square() / log_var.exp())[counts[:, m], m].mean(0)
            torch.testing.assert_close(z2, torch.ones(2), atol=0.02, rtol=0)


def test_a_model_learns():
    train, val = (made_up_sequences(n, seed, (150, 150), 48, 48, misled=0.1)[0] for seed, n in ((1, 32), (2, 12)))
    history = fit(build_model("concat", 48, 48, 2, **TINY), train, val, epochs=12, window=150)
    assert history[-1]["loss_va"] < 0.7 * history[0]["loss_va"] and max(h["dev_p"] for h in history) > 0.4


def test_bad_calls_are_refused(data):
    train, val, _ = data
    with pytest.raises(DataError, match="unknown setting learning_rat; the settings are epochs"):
        fit(model_of("concat"), train, val, learning_rat=1)
    unlabelled = [replace(s, valid=np.zeros(len(s), bool)) for s in val]
    with pytest.raises(DataError, match="no labelled frame in val"):
        fit(model_of("concat"), train, unlabelled)
    with pytest.raises(DataError, match="no labelled frame in train"):
        fit(model_of("concat"), [], val)
    with pytest.raises(DataError, match="do not belong to this model"):
        training.load_arrays(model_of("concat"), training.model_arrays(model_of("visual")))


def test_without_calibration_a_part_of_val_serves(data):
    rest, chosen = training._split_off(data[1])
    assert len(chosen) == 2 and not {s.group for s in rest} & {s.group for s in chosen} and len(rest) + len(chosen) == 6
    pair = [replace(s, group="one") for s in data[1]]
    assert training._split_off(pair) == (pair, pair)


def test_sequences_of_any_make(tmp_path):
    "No cues, unequal lengths down to a single frame, missing labels, a modality that is never there."
    rng = np.random.default_rng(0)

    def sequence(i, frames):
        return core.Sequence(f"s{i}", rng.normal(size=(frames, 3)).astype(np.float32), rng.normal(size=(frames, 9)).astype(np.float32),
                             rng.uniform(-1, 1, (frames, 2)).astype(np.float32), rng.random(frames) > 0.3, np.zeros(frames, bool), rng.random(frames) > 0.2)

    train, val = [sequence(i, n) for i, n in enumerate((1, 40, 90, 7))], [sequence(9, 30), sequence(10, 3)]
    model = build_model("sage", 3, 9, **TINY)
    fit(model, train, val, epochs=3, window=30)
    predictions = predict_sequences(model, train, window=30, hop=20)
    assert [len(p.va) for p in predictions] == [1, 40, 90, 7] and all(np.isfinite(p.va).all() for p in predictions)
    assert all((p.weights[:, 1] == 0).all() for p in predictions)


def test_runs_side_by_side(tmp_path, data):
    store = tmp_path / "store"
    index = {}
    for split, part in zip(("train", "dev", "calibration"), data):
        for s in part:
            index[s.id] = dict(split=split)
            core.write_arrays(store / f"{s.id}.safetensors", {k: getattr(s, k) for k in
                              ("visual", "audio", "va", "visual_ok", "audio_ok", "valid", "cues")}, dict(group=s.group))
    core.write_json(store / "index.json", index)
    models = {"visual": {}, "sage": None, "wide": {"model": "concat", "options": {"hidden": "match sage"}, "settings": {"augment": 0.0}}}
    folders = train_runs(store, tmp_path / "runs", models, [3], kind="ablation", workers=2, epochs=1, window=60)
    assert [f.name for f in folders] == ["visual-3", "sage-3", "wide-3"]
    _, run, wide = (json.loads((folder / "run.json").read_text()) for folder in folders)
    assert (run["label"], run["name"], run["kind"], run["configuration"], run["seed"], run["selection"]) == ("sage", "sage", "ablation", "equal", 3, "dev")
    assert (wide["label"], wide["name"], wide["settings"]["augment"], run["settings"]["augment"]) == ("wide", "concat", 0.0, 0.6)
    assert abs(wide["parameters"] / run["parameters"] - 1) < 0.01  # as many as SAGE has
    assert load_run(folders[1])(*collate(data[0], [(0, 0)], 60).inputs).va.shape[2] == 2
    with pytest.raises(DataError, match="model visual: optoins is not known"):
        train_runs(store, tmp_path / "runs", {"visual": {"optoins": {}}}, [3])


def test_calibration_may_come_inside_after_or_not_at_all(data):
    lines = {}
    for when in ("inside", "after", "never"):
        model = model_of()
        history = fit(model, *data, epochs=4, window=60, refine_steps=5, calibrate=when)
        lines[when] = model.branch.slope.clone(), model.quantile.clone(), [h["eligible"] for h in history]
    assert lines["inside"][2] == [False, False, False, True] and all(lines["after"][2]) and all(lines["never"][2])
    assert (lines["never"][0] == 1).all() and (lines["never"][1] == 1.645).all()
    assert (lines["after"][0] != 1).all() and (lines["inside"][0] != 1).all() and (lines["after"][1] != 1.645).all()
    with pytest.raises(DataError, match="calibrate 'before' is not known"):
        fit(model_of(), *data, calibrate="before")


def test_copies_are_shown_and_known(data):
    "A window that shows its copy has the copy's features, flags and cues, and says where it was corrupted."
    copies = [replace(s, copy=replace(s, visual=s.visual + 1, corrupted=np.tile([True, False], (len(s), 1)))) for s in data[0]]
    batch = collate(copies, [(i, 0) for i in range(len(copies))], 60)
    shown = augment(batch, np.random.default_rng(0), probability=1, copies=1)
    assert torch.equal(shown.visual, batch.copy.visual) and torch.equal(shown.corrupted, batch.copy.corrupted) and shown.corrupted[..., 0].any()
    assert shown.copy is None and not batch.corrupted.any()
    untouched = augment(batch, np.random.default_rng(0), probability=0, copies=1)
    assert torch.equal(untouched.visual, batch.visual) and not untouched.corrupted.any()
    assert training.data_hash(copies) != training.data_hash(data[0])


# windows and batches


@pytest.mark.parametrize("length", [1, 59, 60, 61, 250, 311])
def test_windows_cover_everything(length):
    covered = np.zeros(length, int)
    for start in window_starts(length, 60, 40):
        assert start == 0 or start + 60 <= length
        covered[start : start + 60] += 1
    assert (covered > 0).all()
    assert all(0 <= start <= max(length - 60, 0) for start in random_starts(length, 60, np.random.default_rng(0)))


def test_overlapping_windows_are_averaged(data):
    "Against windows predicted one by one."
    model, sequence = model_of().eval(), made_up_sequences(1, 5, (150, 150))[0][0]
    total, count = np.zeros((150, 2)), np.zeros((150, 1))
    for start in (0, 40, 80, 90):
        with torch.no_grad():
            va = model(*collate([sequence], [(0, start)], 60).inputs).va[0].numpy()
        total[start : start + 60] += va
        count[start : start + 60] += 1
    [prediction] = predict_sequences(model, [sequence], window=60, hop=40)
    np.testing.assert_allclose(prediction.va, total / count, atol=1e-5)


def test_batches_hold_different_trials():
    sequences = made_up_sequences(30, 0, (40, 70))[0] + made_up_sequences(2, 1, (400, 400))[0]
    for b in training_batches(sequences, 60, 8, np.random.default_rng(0)):
        first = {tuple(row.tolist()) for row in b.cues[:, 0]}
        assert len(b.mask) >= 8 and len(first) >= 8


def test_padding_and_unlabelled_frames_do_not_train(data):
    batch = collate(data[0], [(i, 0) for i in range(8)], 60)
    model = model_of("concat").eval()
    loss = va_loss(model(*batch.inputs).va, batch.va, batch.valid[..., None])
    hidden = torch.where(batch.valid[..., None], batch.va, torch.nan)
    assert torch.equal(va_loss(model(*batch.inputs).va, hidden, batch.valid[..., None]), loss)


def test_augmentation_leaves_a_witness_and_the_labels(data):
    batch = collate(data[0], [(i, 0) for i in range(16)], 60)
    kinds = set()
    for seed in range(20):
        out = augment(batch, np.random.default_rng(seed), 1.0, stretch=(5, 20))
        visual = (out.visual != batch.visual).any(-1) | (out.visual_ok != batch.visual_ok)
        audio = (out.audio != batch.audio).any(-1) | (out.audio_ok != batch.audio_ok)
        assert not (visual.any(1) & audio.any(1)).any()
        assert torch.equal(out.va, batch.va) and torch.equal(out.valid, batch.valid) and torch.equal(out.mask, batch.mask)
        kinds |= {(bool(v.any()), bool(a.any())) for v, a in zip(visual, audio)}
    assert {(True, False), (False, True)} <= kinds


# losses, against numbers


def test_ccc_by_hand():
    pred, target = torch.tensor([[0.0, 1.0, 2.0, 9.0]]), torch.tensor([[0.0, 2.0, 4.0, float("nan")]])
    mask = torch.tensor([[True, True, True, False]])
    # means 1 and 2, variances 2/3 and 8/3, covariance 4/3: 2 * 4/3 / (2/3 + 8/3 + 1) = 8/13
    assert masked_ccc(pred, target, mask).item() == pytest.approx(8 / 13)
    # squared errors 0, 1, 4: mean 5/3
    assert va_loss(pred, target, mask, squared=0.3).item() == pytest.approx(1 - 8 / 13 + 0.3 * 5 / 3)


def test_the_loss_of_nothing_is_finite():
    pred = torch.zeros(2, 5, 2, requires_grad=True)
    loss = va_loss(pred, torch.full((2, 5, 2), torch.nan), torch.zeros(2, 5, 1, dtype=torch.bool))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(pred.grad).all()


def test_beta_nll_and_ordinal_by_hand():
    error, log_var = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 4.0]).log1p()  # variances 1 and 5
    everything, first = torch.tensor([True, True]), torch.tensor([True, False])
    assert beta_nll(error, log_var, first).item() == pytest.approx(0.5)
    assert beta_nll(error, log_var, everything, beta=0.0).item() == pytest.approx((0.5 + 0.5 * (9 / 5 + np.log(5))) / 2)
    assert beta_nll(error, log_var, everything).item() == pytest.approx((0.5 + 0.5 * (9 / 5 + np.log(5)) * 5**0.5) / 2)
    # pairs (1, 3) with the right order by log 5, and (3, 1) with the wrong one, weighted by |1 - 3|
    assert ordinal(error, log_var, error.flip(0), log_var.flip(0), everything).item() == pytest.approx(np.log(1 + 1 / 5))
    assert ordinal(error, -log_var, error.flip(0), -log_var.flip(0), everything).item() == pytest.approx(np.log(6))


def test_schedule():
    rates = [training.learning_rate(step, 200, Settings(learning_rate=0.5, warmup=0.25)) for step in range(200)]
    assert rates[0] == pytest.approx(0.01) and rates[49] == rates[50] == 0.5 and rates[125] == pytest.approx(0.25)
    assert 0 < rates[-1] < 0.001


def test_calibration_counts_every_labelled_frame_once():
    sequences, _ = made_up_sequences(3, 0, (640, 1250))
    sequences[1].valid[:500] = False
    outputs, va, valid, groups = training._outputs(model_of("concat"), sequences, torch.device("cpu"))
    assert sum(int(v.sum()) for v in valid) == sum(int(s.valid.sum()) for s in sequences)
    assert sorted({g for part in groups for g in part}) == sorted(s.group for s in sequences) and all(len(g) == len(v) for g, v in zip(groups, valid))


def test_a_causal_model_predicts_a_file_as_a_stream_would():
    "Longer than a window of prediction: what is said at a moment is the same whether or not the file goes on."
    [long], _ = made_up_sequences(1, 0, (1400, 1400))
    model = model_of(causal=True)
    whole = predict_sequences(model, [long])[0]
    for frames in (700, 1100):
        fields = ("visual", "audio", "va", "visual_ok", "audio_ok", "valid", "cues")
        [begun] = predict_sequences(model, [replace(long, **{f: getattr(long, f)[:frames] for f in fields})])
        np.testing.assert_allclose(begun.va, whole.va[:frames], atol=1e-6)
        np.testing.assert_allclose(begun.reliability, whole.reliability[:frames], atol=1e-6)


def test_calibration_needs_labels(data):
    unlabelled = [replace(s, valid=np.zeros(len(s), bool)) for s in data[2]]
    with pytest.raises(DataError, match="no labelled frame in calibration"):
        fit(model_of(), *data[:2], unlabelled, epochs=1, window=60)
    fit(model_of(), *data[:2], unlabelled, epochs=1, window=60, calibrate="never")
