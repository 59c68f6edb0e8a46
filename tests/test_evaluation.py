"Evidence, scores and statistics: against references written out here, and to the byte."
import json

import numpy as np
import pandas as pd
import pytest

from sage_nb.core import DataError, Sequence, read_json, write_arrays, write_json
from sage_nb.evaluation import (REFERENCES, SMOOTHING, VARIANTS, ablation, calibration, comparison, conventions, describe, detection, evaluate_runs,
                                fit_meter, is_variant, meter_features, read_evidence, read_table, reliability_auroc, reliability_by, run_scores,
                                simulate_evidence, smooth_predictions, truth_masks, variant_differences, write_table)
from sage_nb.features import CUES
from sage_nb.metrics import ence, holm


def reference_ccc(x, y):
    x, y = [float(v) for v in x], [float(v) for v in y]
    n = len(x)
    mx, my = sum(x) / n, sum(y) / n
    sx, sy = sum((v - mx) ** 2 for v in x) / n, sum((v - my) ** 2 for v in y) / n
    sxy = sum((a - mx) * (b - my) for a, b in zip(x, y)) / n
    return 2 * sxy / (sx + sy + (mx - my) ** 2)


def test_scores_are_the_official_ones(evidence):
    scores = run_scores(evidence).set_index("run")
    for run in ("visual-0", "sage-1"):
        frames = evidence.predictions(run)
        frames = frames[frames.valid]  # face found or not
        assert not frames.visual_ok.all() and not frames.audio_ok.all()
        valence = reference_ccc(frames.pred_valence, frames.valence)
        arousal = reference_ccc(frames.pred_arousal, frames.arousal)
        assert scores.ccc_valence[run] == pytest.approx(valence, abs=1e-9)
        assert scores.ccc_arousal[run] == pytest.approx(arousal, abs=1e-9)
        assert scores.p[run] == pytest.approx((valence + arousal) / 2, abs=1e-9)


def test_comparison_against_a_bootstrap_over_frames_written_out(evidence):
    table = comparison(evidence, resamples=40, seed=3).set_index("model")
    tables = {model: [evidence.predictions(f"{model}-{seed}").query("valid") for seed in (0, 1)] for model in ("concat", "sage")}
    groups = sorted(tables["sage"][0].group.unique())
    draws = np.random.default_rng(3).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), 40)

    def p(part):
        return (reference_ccc(part.pred_valence, part.valence) + reference_ccc(part.pred_arousal, part.arousal)) / 2

    resampled = {}
    for model, runs in tables.items():
        resampled[model] = np.array([np.mean([p(pd.concat([run[run.group == g] for g, n in zip(groups, draw) for _ in range(n)])) for run in runs])
                                     for draw in draws[:40]])
        low, high = np.percentile(resampled[model], [2.5, 97.5])
        assert (table.p_low[model], table.p_high[model]) == pytest.approx((low, high), abs=1e-7)
        each = [p(run) for run in runs]
        assert (table.p[model], table.p_std[model]) == pytest.approx((np.mean(each), np.std(each, ddof=1)), abs=1e-7)
    low, high = np.percentile(resampled["sage"] - resampled["concat"], [2.5, 97.5])
    assert (table.sage_gain_low["concat"], table.sage_gain_high["concat"]) == pytest.approx((low, high), abs=1e-7)


def test_reference_rows(evidence):
    table = comparison(evidence, resamples=20).set_index("model")
    constant, video = (table.loc[name] for name in REFERENCES)
    assert constant[["ccc_valence", "ccc_arousal", "p", "p_low", "p_high"]].tolist() == [0] * 5 and constant.seeds == 0
    frames = evidence.predictions("concat-0").query("valid")
    means = frames.groupby("trial").valence.transform(lambda v: v.astype(float).mean())
    assert video.ccc_valence == pytest.approx(reference_ccc(means, frames.valence), abs=1e-7)


def test_one_seed_has_no_spread(tmp_path):
    table = comparison(simulate_evidence(tmp_path, seeds=[5], trials=4, frames=200), resamples=20).set_index("model")
    assert table.seeds["sage"] == 1 and np.isnan(table.p_std["sage"]) and np.isfinite(table.p_low["sage"])


def test_runs_over_different_frames_are_not_compared(tmp_path):
    simulate_evidence(tmp_path, seeds=[0], trials=4, frames=200)
    path = tmp_path / "predictions" / "sage-0.parquet"
    frames = read_table(path)
    frames.loc[20, "valence"] += 0.1
    write_table(path, frames)
    with pytest.raises(DataError, match="sage cover other frames or labels"):
        comparison(read_evidence(tmp_path), resamples=10)


def test_p_values_against_counting(evidence):
    table = comparison(evidence, resamples=200, seed=3).set_index("model")
    groups = sorted(evidence.predictions("sage-0").group.unique())
    draws = np.random.default_rng(3).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), 200)

    def sums(run):  # [G, 2, 6]
        frames = evidence.predictions(run).query("valid")
        parts = [frames[frames.group == g] for g in groups]
        return np.array([[[len(q), *(s.sum() for s in (x, y, x * x, y * y, x * y))] for x, y in ((q[f"pred_{a}"].astype(float), q[a].astype(float))
                                                                                                for a in ("valence", "arousal"))] for q in parts])

    def p(run):
        n, x, y, xx, yy, xy = np.moveaxis(np.einsum("rg,gds->rds", draws, sums(run)), -1, 0)
        return (2 * (xy / n - x * y / n**2) / (xx / n - (x / n) ** 2 + yy / n - (y / n) ** 2 + (x / n - y / n) ** 2)).mean(1)

    sage, expected = (p("sage-0") + p("sage-1")) / 2, {}
    for model in ("visual", "audio", "concat", "concat_wide", "concat_readouts", "late", "cold"):
        gain = sage - (p(f"{model}-0") + p(f"{model}-1")) / 2
        expected[model] = min(1, 2 * (1 + min((gain <= 0).sum(), (gain >= 0).sum())) / 201)
        assert table.p_value[model] == pytest.approx(expected[model])
    largest = 0
    for k, (model, value) in enumerate(sorted(expected.items(), key=lambda item: item[1])):
        largest = max(largest, min(1, value * (7 - k)))
        assert table.p_holm[model] == pytest.approx(largest)
        assert table.verdict[model] == ("SAGE above" if largest < 0.05 else "not told apart")  # in this simulation SAGE is never below
    assert table.p_holm[["sage", "sage_no_calibration", *REFERENCES]].isna().all() and table.p_value[["sage", "sage_no_calibration"]].isna().all()


def test_a_variant_of_sage_is_compared_and_is_no_baseline(evidence):
    "Its difference has the interval of the same draws; the corrected p of the others are what they are without it."
    table, differences = comparison(evidence, resamples=200).set_index("model"), variant_differences(evidence, ["concat", "late", "lfan"], resamples=200)
    assert evidence.runs.model[is_variant(evidence.runs)].unique().tolist() == ["sage_no_calibration"]
    row = table.loc["sage_no_calibration"]
    assert row.verdict == "" and row.sage_gain == pytest.approx(table.p["sage"] - row.p) and row.sage_gain_low < row.sage_gain < row.sage_gain_high
    assert differences[["model", "other"]].to_numpy().tolist() == [["sage_no_calibration", other] for other in ("concat", "late")]
    for one in differences.itertuples():
        assert one.difference == pytest.approx(row.p - table.p[one.other]) and one.low < one.difference < one.high
    evidence = read_evidence(evidence.folder)
    evidence.runs = evidence.runs[evidence.runs.model != "sage_no_calibration"]
    without = comparison(evidence, resamples=200).set_index("model")
    assert without.p_holm.equals(table.p_holm.drop("sage_no_calibration")) and variant_differences(evidence, ["concat"]).empty


def test_holm_on_known_values():
    assert holm([0.01, 0.013, 0.014, 0.19, 0.35, 0.5, 0.63, 0.67, 0.75, 0.81]) == pytest.approx(  # sorted: 10 p1, 9 p2, ..., made monotone and cut at 1
        [0.1, 0.117, 0.117, 1, 1, 1, 1, 1, 1, 1])
    assert holm([0.04, 0.001]) == pytest.approx([0.04, 0.002]) and np.isnan(holm([np.nan, 0.5])[0]) and holm([np.nan, 0.5])[1] == 0.5


def test_a_model_that_is_better_than_sage_is_said_to_be(tmp_path):
    simulate_evidence(tmp_path, seeds=[0], trials=12, frames=200, models=["concat", "late", "sage"])
    frames = read_table(tmp_path / "predictions" / "concat-0.parquet")
    frames[["pred_valence", "pred_arousal"]] = frames[["valence", "arousal"]].fillna(0)
    write_table(tmp_path / "predictions" / "concat-0.parquet", frames)
    table = comparison(read_evidence(tmp_path), resamples=500).set_index("model")
    assert table.verdict["concat"] == "SAGE below" and table.sage_gain_high["concat"] < 0 and table.p_holm["concat"] == pytest.approx(2 * 2 / 501)


def test_conventions_by_hand():
    truth = np.array([[0, 0], [1, 1], [2, 2], [5, 5], [6, 6], [9, 9]], float)
    said = np.array([[0, 1], [2, 2], [1, 3], [5, 9], [7, 9], [0, 0]], float)
    valid, trials = np.array([True] * 5 + [False]), np.array([0, 0, 0, 1, 1, 1])
    found = conventions(said, truth, valid, trials)
    pairs = [(said[:5, d], truth[:5, d]) for d in (0, 1)]
    videos = [[reference_ccc(x[part], y[part]) if np.ptp(x[part]) else 0 for part in (slice(0, 3), slice(3, 5))] for x, y in pairs]
    assert found["p_video"] == found["p_window"] == pytest.approx(np.mean(videos))  # one window a trial

    def centred(v):
        return np.r_[v[:3] - v[:3].mean(), v[3:] - v[3:].mean()]

    within = [reference_ccc(centred(x), centred(y)) for x, y in pairs]
    between = [reference_ccc(x - centred(x), y - centred(y)) for x, y in pairs]  # three frames of one mean, two of the other
    assert found["p_within"] == pytest.approx(np.mean(within)) and found["p_between"] == pytest.approx(np.mean(between))
    for (x, y), inside, outside in zip(pairs, within, between):  # together they are the pooled score, weighted by their denominators
        parts = (centred(x), centred(y)), (x - centred(x), y - centred(y))
        size = [a.var() + b.var() + (a.mean() - b.mean()) ** 2 for a, b in parts]
        assert reference_ccc(x, y) == pytest.approx((inside * size[0] + outside * size[1]) / sum(size))


def test_smoothing_is_chosen_on_dev_and_nowhere_else(tmp_path):
    simulate_evidence(tmp_path, seeds=[0, 1], trials=4, frames=200, models=["concat", "sage"])
    rng = np.random.default_rng(0)

    def say(part, run, noise):
        frames = read_table(tmp_path / part / f"{run}.parquet")
        for axis in ("valence", "arousal"):
            frames[f"pred_{axis}"] = (frames[axis].fillna(0) + rng.normal(0, noise, len(frames))).astype(np.float32)
        write_table(tmp_path / part / f"{run}.parquet", frames)

    for seed in (0, 1):
        say("dev", f"concat-{seed}", 0.0)  # on dev every window hurts, on validation all would help
        say("predictions", f"concat-{seed}", 0.5)
        say("dev", f"sage-{seed}", 0.5)  # and the other way round
        say("predictions", f"sage-{seed}", 0.0)
    table = comparison(read_evidence(tmp_path), resamples=20).set_index("model")
    assert table.window["concat"] == 1 and table.p_smoothed["concat"] == pytest.approx(table.p["concat"])
    assert table.window["sage"] > 1 and table.p_smoothed["sage"] < table.p["sage"] == pytest.approx(1)
    frames = [read_table(tmp_path / "predictions" / f"sage-{seed}.parquet") for seed in (0, 1)]
    smooth = []
    for part in frames:
        half, scores = table.window["sage"] // 2, []
        for axis in ("valence", "arousal"):
            out = np.concatenate([[v[max(i - half, 0) : i + half + 1].mean() for i in range(len(v))] for _, one in part.groupby("trial")
                                  for v in [one[f"pred_{axis}"].to_numpy(float)]])
            scores.append(reference_ccc(out[part.valid], part[axis][part.valid]))
        smooth.append(np.mean(scores))
    assert table.p_smoothed["sage"] == pytest.approx(np.mean(smooth), abs=1e-9)
    about = json.loads((tmp_path / "evidence.json").read_text())
    write_json(tmp_path / "evidence.json", about | dict(selection="validation"))  # as the lineage selects: nothing is left to choose on
    table = comparison(read_evidence(tmp_path), resamples=20)
    assert table.window.isna().all() and table.p_smoothed.isna().all()


def test_the_grid_of_windows_holds_none_and_is_odd():
    assert SMOOTHING[0] == 1 and all(window % 2 for window in SMOOTHING) and list(SMOOTHING) == sorted(set(SMOOTHING))
    values = np.arange(12.0).reshape(2, 6, 1)
    assert smooth_predictions(values, np.array([0, 0, 0, 0, 1, 1]), 3)[1, :, 0].tolist() == [6.5, 7, 8, 8.5, 10.5, 10.5]


def test_ablation_compares_shared_seeds(tmp_path):
    simulate_evidence(tmp_path, seeds=[0, 1, 2], trials=4, frames=200, models=["sage", "steps_0", "no_reliability"])
    runs = read_table(tmp_path / "runs.parquet")
    write_table(tmp_path / "runs.parquet", runs[runs.run != "steps_0-2"])
    evidence = read_evidence(tmp_path)
    table, scores = ablation(evidence, resamples=50).set_index("model"), run_scores(evidence).set_index("run").p
    assert table.index.tolist() == ["sage", "no_reliability", "steps_0"] and table.seeds.tolist() == [3, 3, 2]
    assert table.p["steps_0"] == pytest.approx(scores[["steps_0-0", "steps_0-1"]].mean())
    assert table.gain["steps_0"] == pytest.approx(scores[["steps_0-0", "steps_0-1"]].mean() - scores[["sage-0", "sage-1"]].mean())
    assert table.gain["no_reliability"] == pytest.approx(scores[[f"no_reliability-{k}" for k in range(3)]].mean() - scores[[f"sage-{k}" for k in range(3)]].mean())
    assert np.isnan(table.auroc_visual["no_reliability"]) and np.isnan(table.ence["no_reliability"])
    assert table.changed["steps_0"] == "no interaction step" and table.changed["sage"] == "nothing"
    frames = [evidence.predictions(f"steps_0-{k}").query("valid") for k in (0, 1)]
    assert table.ence["steps_0"] == pytest.approx(np.mean([ence(f[f"pred_{a}"], f[a], np.exp(f[f"log_var_{a}"]), bins=5) for f in frames for a in ("valence", "arousal")]))


def test_a_variant_stands_among_the_ablations_with_all_its_seeds_and_an_unknown_label_has_its_own_words(tmp_path):
    simulate_evidence(tmp_path, seeds=[0, 1], trials=4, frames=200, models=["concat", "sage", "sage_no_calibration", "steps_0"])
    runs = read_table(tmp_path / "runs.parquet")
    write_table(tmp_path / "runs.parquet", runs[runs.run != "steps_0-1"].replace({"model": {"steps_0": "trust_at_input"}}))
    table = ablation(read_evidence(tmp_path), resamples=50)
    assert table.model.tolist() == ["sage", "sage_no_calibration", "trust_at_input"] and table.seeds.tolist() == [2, 2, 1]
    assert table.changed.tolist() == ["nothing", VARIANTS["sage_no_calibration"], "trust at input"]


def pairs_won(high, low):
    high, low = np.asarray(high, float), np.asarray(low, float)
    return ((high[:, None] > low[None]).mean() + (high[:, None] == low[None]).mean() / 2)


def test_masks_of_what_the_side_file_knows():
    side = pd.DataFrame([("speak", "", ""), ("speak", "hand", "noise"), ("listen", "", ""), ("listen", "", "noise"), ("react", "blur", ""), (None, None, None)],
                        columns=["phase", "visual_nuisance", "audio_nuisance"])
    assert {name: mask.nonzero()[0].tolist() for name, mask in truth_masks(side).items()} == dict(
        visual_clean=[0, 2, 3], visual_disturbed=[1, 4], audio_clean=[0, 2, 4], audio_disturbed=[1, 3], own_voice=[0], own_disturbed=[1], other_voice=[2])


def test_detection_of_planted_reliability(tmp_path):
    simulate_evidence(tmp_path, seeds=[0, 1], trials=8, frames=240, models=["sage"])
    truth, rng = read_table(tmp_path / "truth.parquet"), np.random.default_rng(1)
    tables = {}
    for seed, step in ((0, 1.0), (1, 0.0)):  # the first seed knows all, the second nothing
        frames = read_table(tmp_path / "predictions" / f"sage-{seed}.parquet")
        side = frames[["trial", "frame"]].merge(truth, how="left")
        frames["reliability_visual_0"] = (rng.random(len(frames)) * 0.4 + step * 0.5 * (side.visual_nuisance == "")).round(2).astype(np.float32)
        frames["reliability_audio_0"] = (rng.random(len(frames)) * 0.4 + step * 0.5 * (side.phase == "speak")).round(2).astype(np.float32)
        write_table(tmp_path / "predictions" / f"sage-{seed}.parquet", frames)
        tables[seed] = frames.merge(truth, on=["trial", "frame"])
    signals = read_table(tmp_path / "signals.parquet")  # what brightness says on dev is wrong on validation
    side = signals[["trial", "frame"]].merge(truth, how="left").visual_nuisance.fillna("")
    sign = np.where(signals.split == "dev", -1, 1)
    signals["visual_energy"] = np.where(signals.visual_ok, sign * (side == "") + 0.01 * rng.random(len(signals)), np.nan)
    write_table(tmp_path / "signals.parquet", signals)
    evidence = read_evidence(tmp_path)
    table = detection(evidence, resamples=100).set_index(["task", "kind"])
    clean, hit = ([f[f.visual_ok & ((f.visual_nuisance == "") == state)] for f in tables.values()] for state in (True, False))
    expected = [pairs_won(a.reliability_visual_0, b.reliability_visual_0) for a, b in zip(clean, hit)]
    assert expected[0] == 1 and abs(expected[1] - 0.5) < 0.1
    row = table.loc["visual nuisance", "all"]
    assert row.auroc == pytest.approx(np.mean(expected)) and (row.reliable, row.unreliable) == (len(clean[0]), len(hit[0]))
    assert row.auroc_low <= row.auroc <= row.auroc_high and row.auroc_low < row.auroc_high
    assert row.baseline < 0.05 and row.gain == pytest.approx(row.auroc - row.baseline)
    hand = [pairs_won(a.reliability_visual_0, b.reliability_visual_0[b.visual_nuisance == "hand"]) for a, b in zip(clean, hit)]
    assert table.loc["visual nuisance", "hand"].auroc == pytest.approx(np.mean(hand))
    own, listens = ([f.reliability_audio_0[f.audio_ok & (f.audio_nuisance == "") & (f.phase == phase)] for f in tables.values()] for phase in ("speak", "listen"))
    assert table.loc["own voice", "all"].auroc == pytest.approx(np.mean([pairs_won(a, b) for a, b in zip(own, listens)]))
    speaks = [f[f.audio_ok & (f.phase == "speak")] for f in tables.values()]  # elsewhere even undisturbed sound is somebody else's
    expected = np.mean([pairs_won(f.reliability_audio_0[f.audio_nuisance == ""], f.reliability_audio_0[f.audio_nuisance != ""]) for f in speaks])
    assert table.loc["audio nuisance", "all"].auroc == pytest.approx(expected)
    stage = reliability_auroc(evidence).query("stage == 0").groupby("modality")[["auroc", "auroc_own"]].mean()
    assert stage.auroc["visual"] == pytest.approx(row.auroc) and stage.auroc_own["audio"] == pytest.approx(table.loc["own voice", "all"].auroc)


def test_detection_of_corruption(evidence):
    table = detection(evidence, resamples=50).set_index(["task", "kind"])
    corrupted = read_table(evidence.folder / "corrupted_reliability.parquet").query("modality == 'audio' and severity >= 2 and ok").merge(evidence.truth, on=["trial", "frame"])
    runs = {run: evidence.predictions(run)[["trial", "frame", "audio_ok", "reliability_audio_0"]] for run in ("sage-0", "sage-1")}
    free = corrupted[(corrupted.phase == "speak") & (corrupted.audio_nuisance == "")]
    for kind, frames in (("all", free), *free.groupby("family"), ("with_nuisances", corrupted)):
        inside = [(f[f.corrupted], f[~f.corrupted]) for _, f in frames.groupby("run")]
        row = table.loc["audio corruption", kind]
        pairs = [f.merge(runs[f.run.iloc[0]], on=["trial", "frame"], suffixes=("", "_clean")) for f, _ in inside]  # each frame and itself, clean
        assert row.auroc == pytest.approx(np.mean([pairs_won(f.reliability_audio_0_clean, f.reliability_audio_0) for f in pairs]))
        assert row.reliable == row.unreliable == len(pairs[0]) and 0.5 < row.auroc_low < row.auroc < row.auroc_high
        if kind != "with_nuisances":
            row = table.loc["audio corruption, within the clip", kind]
            assert row.auroc == pytest.approx(np.mean([pairs_won(outside.reliability_audio_0, f.reliability_audio_0) for f, outside in inside]))
            assert (row.reliable, row.unreliable) == (len(inside[0][1]), len(inside[0][0])) and np.isfinite(row.baseline)
    assert len(free.family.unique()) == 3 and len(corrupted) > len(free)
    assert table.loc["audio corruption", "all"].auroc != pytest.approx(table.loc["audio corruption, within the clip", "all"].auroc, abs=1e-3)


def test_the_meter_sees_the_energy_of_the_corrupted_clip(tmp_path):
    "Planted: a corruption that moves the energy as the nuisance of dev did is found, one that leaves it as it was is not."
    simulate_evidence(tmp_path, seeds=[0], trials=6, frames=200, models=["sage"])
    truth, signals = read_table(tmp_path / "truth.parquet"), read_table(tmp_path / "signals.parquet")
    side = signals[["trial", "frame"]].merge(truth, how="left").visual_nuisance.fillna("")
    rng = np.random.default_rng(0)
    signals["visual_energy"] = np.where(signals.visual_ok, 0.5 - 0.3 * (side != "") + 0.01 * rng.normal(size=len(signals)), np.nan)
    write_table(tmp_path / "signals.parquet", signals)
    corrupted = read_table(tmp_path / "corrupted_reliability.parquet")
    clean = corrupted[["trial", "frame"]].merge(signals, how="left").visual_energy.to_numpy()
    corrupted["energy"] = clean - 0.3 * (corrupted.corrupted & (corrupted.family == "darkness"))
    write_table(tmp_path / "corrupted_reliability.parquet", corrupted)
    table = detection(read_evidence(tmp_path), resamples=20).set_index(["task", "kind"])
    assert table.baseline["visual nuisance", "all"] > 0.95 and table.baseline["visual corruption", "darkness"] > 0.95
    assert table.baseline["visual corruption", "blur"] == pytest.approx(0.5, abs=1e-6)


def test_features_of_a_meter():
    signals = pd.DataFrame(dict(trial=["a"] * 20 + ["b"] * 2, audio_energy=[*range(20), 4, np.nan], visual_ok=[False] + [True] * 21, audio_ok=[True] * 21 + [False]))
    found = meter_features(signals, "audio")
    assert found[:20, 0].tolist() == list(range(20)) and found[:20, 1].tolist() == [i - 9.5 for i in range(20)] and (found[:20, 2] == abs(found[:20, 1])).all()
    assert found[[0, 7, 19], 3].tolist() == [3.5, 7, 15.5]  # fifteen frames, fewer at the ends of a clip, and none of another clip
    assert found[20, :4].tolist() == [4, 0, 0, 4] and np.isnan(found[21, 0])
    assert found[[0, 1], 4].tolist() == [0, 1] and found[[0, 19], 6] == pytest.approx([7 / 8, 1]) and found[20:, 7].tolist() == [0.5, 0.5]


def test_a_meter_is_the_logistic_regression_of_its_frames():
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3)) * [1, 20, 0] + [0, 5, 1]  # one feature tells nothing
    odds = x[:, 0] - 0.05 * x[:, 1] + 0.8
    high, used = rng.random(300) < 1 / (1 + np.exp(-odds)), rng.random(300) < 0.8
    z = np.c_[np.ones(300), (x[:, :2] - x[used, :2].mean(0)) / x[used, :2].std(0)]

    def loss(w):
        return np.logaddexp(0, np.where(high[used], -1, 1) * (z[used] @ w)).sum() + 0.5 * w @ w

    expected = z @ minimize(loss, np.zeros(3), tol=1e-12).x
    assert fit_meter(x, high & used, ~high & used)(x) == pytest.approx(expected, abs=1e-4)
    x[5, 0] = np.nan  # a missing one is nothing out of the ordinary
    assert np.isfinite(fit_meter(x, high & used, ~high & used)(x)).all()
    assert fit_meter(x, high, high & False)(x).min() > 0  # one side alone: still finite


def test_intervals_of_a_detection_are_those_of_resampled_frames(tmp_path):
    evidence = simulate_evidence(tmp_path, seeds=[0], trials=8, frames=200, models=["sage"])
    row = detection(evidence, resamples=60, seed=2).set_index(["task", "kind"]).loc["visual nuisance", "all"]
    frames = evidence.predictions("sage-0").merge(evidence.truth, on=["trial", "frame"], how="left")
    frames = frames[frames.visual_ok & frames.phase.notna()]
    groups = sorted(frames.group.unique())
    samples = []
    for draw in np.random.default_rng(2).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), 60):
        part = pd.concat([frames[frames.group == g] for g, n in zip(groups, draw) for _ in range(n)])
        samples.append(pairs_won(part.reliability_visual_0[part.visual_nuisance == ""], part.reliability_visual_0[part.visual_nuisance != ""]))
    assert (row.auroc_low, row.auroc_high) == pytest.approx(tuple(np.nanpercentile(samples, [2.5, 97.5])), abs=1e-9)


def test_calibration_of_planted_uncertainty(tmp_path):
    from scipy.stats import spearmanr

    simulate_evidence(tmp_path, seeds=[0, 1], trials=8, frames=200, models=["sage"])
    for seed in (0, 1):
        path = tmp_path / "predictions" / f"sage-{seed}.parquet"
        frames = read_table(path)
        for axis in ("valence", "arousal"):  # an interval that holds exactly 90 % of one axis, all of the other
            error = (frames[f"pred_{axis}"] - frames[axis]).abs()
            frames[f"half_width_{axis}"] = np.float32(error.quantile(0.9) if axis == "valence" else 3)
        write_table(path, frames)
    evidence = read_evidence(tmp_path)
    table = calibration(evidence, resamples=60, seed=5).set_index(["what", "axis"])
    assert table.coverage_after["estimate", "valence"] == pytest.approx(0.9, abs=0.002) and table.coverage_after["estimate", "arousal"] == 1
    assert table.coverage_after["estimate", "both"] == pytest.approx(table.coverage_after["estimate"][["valence", "arousal"]].mean())
    frames = [evidence.predictions(f"sage-{k}").query("valid") for k in (0, 1)]
    for when, name in (("before", "raw_log_var"), ("after", "log_var")):
        expected = np.mean([ence(f.pred_arousal, f.arousal, np.exp(f[f"{name}_arousal"]), bins=5) for f in frames])
        assert table[f"ence_{when}"]["estimate", "arousal"] == pytest.approx(expected)
    heard = [f[f.audio_ok] for f in frames]
    assert table.frames["audio readout, stage 2", "valence"] == len(heard[0]) < len(frames[0])
    errors = [(f.readout_audio_2_valence - f.valence).abs() for f in heard]
    assert table.rank_correlation["audio readout, stage 2", "valence"] == pytest.approx(
        np.mean([spearmanr(f.readout_log_var_audio_2_valence, e)[0] for f, e in zip(heard, errors)]))
    for when, name in (("before", "raw_readout_log_var"), ("after", "readout_log_var")):
        inside = [(e <= 1.645 * np.exp(f[f"{name}_audio_2_valence"] / 2)).mean() for f, e in zip(heard, errors)]
        assert table[f"coverage_{when}"]["audio readout, stage 2", "valence"] == pytest.approx(np.mean(inside))
    groups = sorted(frames[0].group.unique())
    samples = []
    for draw in np.random.default_rng(5).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), 60):
        parts = [pd.concat([f[f.group == g] for g, n in zip(groups, draw) for _ in range(n)]) for f in heard]
        samples.append(np.mean([spearmanr(f.readout_log_var_audio_2_valence, (f.readout_audio_2_valence - f.valence).abs())[0] for f in parts]))
    row = table.loc["audio readout, stage 2", "valence"]
    assert (row.rank_correlation_low, row.rank_correlation_high) == pytest.approx(tuple(np.percentile(samples, [2.5, 97.5])), abs=1e-9)


def test_the_same_evidence_to_the_byte(tmp_path):
    for name in ("one", "two"):
        simulate_evidence(tmp_path / name, seeds=[3], trials=2, frames=200, models=["late", "sage"])
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 11 and all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_reliability_is_that_of_observed_frames(evidence):
    frames = evidence.predictions("sage-0").merge(evidence.truth, on=["trial", "frame"])
    chosen = frames[(frames.visual_nuisance == "") & (frames.audio_nuisance == "")]
    summary = reliability_by(evidence).query("seed == 0 and name == 'clean' and modality == 'audio' and stage == 1").iloc[0]
    assert not chosen.audio_ok.all()
    assert summary.reliability == pytest.approx(chosen.reliability_audio_1[chosen.audio_ok].mean(), abs=1e-6)
    assert summary.weight == pytest.approx(chosen.weight_audio_1.mean(), abs=1e-6)


def write_store(folder, parts):
    "A feature store of the given sequences, by split."
    index = {s.id: dict(split=split, group=s.group, subject=s.group) for split, part in parts.items() for s in part}
    for s in (s for part in parts.values() for s in part):
        arrays = dict(visual=s.visual, audio=s.audio, va=s.va, visual_ok=s.visual_ok, audio_ok=s.audio_ok, valid=s.valid, cues=s.cues,
                      frame=np.arange(1, 61, dtype=np.int32), time=np.arange(60) / 25 + 0.5)
        write_arrays(folder / f"{s.id}.safetensors", arrays, index[s.id])
    write_json(folder / "index.json", index)


def train_run(folder, model, parts, seed=0, selection="dev", **more):
    "A run as stage `train` leaves it."
    from sage_nb.training import fit

    fit(model, parts["train"], parts["dev"], run_dir=folder, seed=seed, epochs=2, window=40)
    write_json(folder / "run.json", read_json(folder / "run.json") | dict(selection=selection) | more)


@pytest.fixture
def parts():
    rng = np.random.default_rng(0)

    def draw(name, group, frames=60):
        ok = rng.random((2, frames)) > 0.2
        return Sequence(name, rng.normal(size=(frames, 5)).astype(np.float32), rng.normal(size=(frames, 4)).astype(np.float32),
                        rng.uniform(-1, 1, (frames, 2)).astype(np.float32), ok[0], ok[1], np.arange(frames) > 3,
                        rng.normal(size=(frames, len(CUES))).astype(np.float32), group)

    return {"train": [draw(f"t{i}", f"g{i}") for i in range(8)], "dev": [draw(f"d{i}", f"h{i}") for i in range(3)],
            "validation": [draw(f"v{i}", f"k{i // 2}") for i in (1, 0, 2)]}


def test_evaluate_runs_from_a_store_and_a_trained_run(tmp_path, parts):
    import torch
    from sage_nb.baselines import build_model
    from sage_nb.training import predict_sequences

    write_store(tmp_path / "store", parts)
    write_json(tmp_path / "sample.json", dict(version="0.3"))
    (tmp_path / "truth").mkdir()
    for s in [*parts["validation"], *parts["dev"]]:
        lines = ["frame,phase,visual_nuisance,audio_nuisance", *(f"{i},speak,{'hand' if i < 20 else ''},{'noise' if i > 40 else ''}" for i in range(1, 60))]
        (tmp_path / "truth" / f"{s.id}.csv").write_text("\n".join(lines) + "\n")
    torch.set_num_threads(1)
    model = build_model("sage", 5, 4, len(CUES), visual_width=8, audio_width=8)
    train_run(tmp_path / "runs" / "sage-0", model, parts, label="no_ordinal", kind="ablation")
    for out in ("one", "two"):
        evaluate_runs(tmp_path / "runs", tmp_path / "store", tmp_path / "truth", tmp_path / out, tmp_path / "corpus", workers=1)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert {str(f) for f in files} == {"runs.parquet", "history.parquet", "truth.parquet", "signals.parquet", "evidence.json", "predictions/sage-0.parquet",
                                       "dev/sage-0.parquet"}
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    evidence = read_evidence(tmp_path / "one")
    frames = evidence.predictions("sage-0")
    assert frames.trial.tolist() == sorted(frames.trial) and frames.frame.tolist() == list(range(1, 61)) * 3
    v1 = frames[frames.trial == "v1"]
    truth, said = parts["validation"][0], predict_sequences(model, parts["validation"])[0]
    assert np.allclose(v1.time, np.arange(60) / 25 + 0.5) and (v1.group == "k0").all()
    assert np.array_equal(v1.valid, truth.valid) and np.array_equal(v1.valence[truth.valid.tolist()], truth.va[truth.valid, 0])
    assert np.allclose(v1[["pred_valence", "pred_arousal"]], said.va, atol=1e-6)
    assert np.allclose(v1.reliability_audio_1, said.reliability[:, 1, 1], atol=1e-6)
    assert np.allclose(v1.weight_visual_0, said.weights[:, 0, 0], atol=1e-6)
    assert evidence.runs[["model", "base", "kind"]].to_numpy().tolist() == [["no_ordinal", "sage", "ablation"]] and evidence.history.model.tolist() == ["no_ordinal"] * 2
    dev = evidence.predictions("sage-0", "dev")
    assert list(dev) == list(frames)[: len(dev.columns)] and list(dev)[-1] == "pred_arousal" and dev.trial.tolist() == [f"d{i}" for i in range(3) for _ in range(60)]
    said = predict_sequences(model, parts["dev"])[1]
    assert np.allclose(dev[dev.trial == "d1"][["pred_valence", "pred_arousal"]], said.va, atol=1e-6)
    assert sorted(evidence.truth.trial.unique()) == ["v0", "v1", "v2"] and sorted(evidence.dev_truth.trial.unique()) == ["d0", "d1", "d2"]
    signals = evidence.signals.merge(frames[["trial", "frame", "visual_ok", "audio_ok"]], on=["trial", "frame"])
    assert (signals.split == "validation").all() and (signals.visual_ok_x == signals.visual_ok_y).all() and len(signals) == 180
    assert np.array_equal(signals.audio_energy[signals.trial == "v1"], parts["validation"][0].cues[:, CUES.index("level")])
    assert (evidence.about["corpus"], evidence.about["selection"]) == ("sample corpus 0.3", "dev")


def test_a_corpus_without_side_files(tmp_path, parts):
    import torch
    from sage_nb.baselines import build_model

    torch.set_num_threads(1)
    write_store(tmp_path / "store", parts)
    (tmp_path / "truth").mkdir()
    for name in ("concat", "sage"):
        train_run(tmp_path / "runs" / f"{name}-0", build_model(name, 5, 4, len(CUES), visual_width=8, audio_width=8), parts, selection="validation")
    for run in (tmp_path / "runs").iterdir():  # evaluating again does not keep predictions of other runs by the same name
        write_table(tmp_path / "evidence" / "predictions" / f"{run.name}.parquet", pd.DataFrame(dict(trial=["old"])))
    evaluate_runs(tmp_path / "runs", tmp_path / "store", tmp_path / "truth", tmp_path / "evidence", tmp_path / "wild", workers=1)
    evidence = read_evidence(tmp_path / "evidence")
    assert evidence.truth.empty and len(evidence.predictions("sage-0")) == 180
    assert describe(evidence).startswith("Validation split of the wild: 3 trials") and "selection on validation" in describe(evidence)
    assert reliability_by(evidence).name.unique().tolist() == ["all frames"] and detection(evidence).empty


def test_runs_selected_on_different_parts_are_not_mixed(tmp_path, parts):
    from sage_nb.baselines import build_model

    write_store(tmp_path / "store", parts)
    for seed, selection in ((0, "dev"), (1, "validation")):
        train_run(tmp_path / "runs" / f"concat-{seed}", build_model("concat", 5, 4, len(CUES), visual_width=8, audio_width=8), parts, seed, selection)
    with pytest.raises(DataError, match="concat-0, concat-1: selected on dev and validation"):
        evaluate_runs(tmp_path / "runs", tmp_path / "store", None, tmp_path / "evidence", tmp_path)
    assert not (tmp_path / "evidence").exists()


def test_bad_input_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="train first"):
        evaluate_runs(tmp_path, tmp_path, None, tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="evidence.json: no such file"):
        read_evidence(tmp_path)
    evidence = simulate_evidence(tmp_path / "evidence", seeds=[0], trials=2, frames=200)
    (evidence.folder / "predictions" / "sage-0.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="sage-0.parquet: not a readable parquet file"):
        comparison(evidence)
