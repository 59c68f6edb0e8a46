"""The robustness suite from raw video to the verdict: what is encoded again and what is not, what a run's rows hold, and what the sums tell."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from clips import SOUND_RATE, annotate, talking, write_video

from sage_nb import robustness, suite
from sage_nb.affwild2 import Corpus
from sage_nb.backbones import save_encoder
from sage_nb.baselines import build_model
from sage_nb.core import DataError, Rows, read_arrays, read_json, write_arrays, write_json
from sage_nb.corruption import FAMILIES, Condition, conditions
from sage_nb.encoders import AudioEncoder, VisualEncoder
from sage_nb.evaluation import read_table, write_table
from sage_nb.features import CUE_OWNERS, CUES, encode_corpus, load_sequences, prepare_corpus
from sage_nb.metrics import ccc, group_moments, moments
from sage_nb.robustness import (evaluate_robustness, load_corrupted, loss_differences, missing_differences, predict_condition, robustness_areas,
                                robustness_curves)
from sage_nb.suite import encode_corrupted
from sage_nb.training import load_run, model_arrays, predict_sequences

FPS, COUNT = 25, 110
OWNER = np.array(list(CUE_OWNERS.lower()))
SUMS = [f"{name}_{axis}" for axis in ("valence", "arousal") for name in ("n", "x", "y", "xx", "yy", "xy")]
MEDIA = [(name, s) for name, about in FAMILIES.items() if about.level == "media" for s in (1, 2, 3)]


# --- from raw video

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Two people's clips and one without sound: prepared, encoded, and corrupted."
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("suite")
    rng, times = np.random.default_rng(0), np.arange(COUNT) / FPS
    for i, name in enumerate(("a", "b", "c")):
        seconds = np.arange(round(COUNT / FPS * SOUND_RATE)) / SOUND_RATE
        sound = 0.1 * np.sin(2 * np.pi * (200 + 80 * i) * seconds) * (1 + np.sin(2 * np.pi * (2 + i) * seconds))
        pictures = talking(COUNT) if name != "b" else [p if t < 5 or t > 9 else np.full_like(p, 90) for t, p in enumerate(talking(COUNT))]
        write_video(root / "corpus/videos" / f"{name}.mp4", pictures, times, None if name == "c" else sound)
        va = 0.4 * np.sin(times[:, None] * [1, 2] + i) + 0.05 * rng.normal(size=(COUNT, 2))
        annotate(root / f"corpus/annotations/VA_Estimation_Challenge/Validation_Set/{name}.txt", [*va[:-1], (-5, -5)])
    (root / "corpus/annotations/VA_Estimation_Challenge/Train_Set").mkdir()
    prepare_corpus(Corpus(root / "corpus"), root / "prepared", workers=1)
    torch.manual_seed(0)
    for kind, net in (("visual", VisualEncoder()), ("audio", AudioEncoder())):
        save_encoder(root / "encoders" / f"{kind}.safetensors", net)
    encode_corpus(root / "prepared", root / "encoders", root / "store", workers=1)
    encode(root, "suite")
    return root


def encode(root, folder, **settings):
    encode_corrupted(Corpus(root / "corpus"), root / "prepared", root / "encoders", root / "store", root / folder, workers=1, **settings)


def both(root, name, family, severity, folder="suite"):
    return read_arrays(root / "store" / f"{name}.safetensors")[0], read_arrays(root / folder / f"{family}-{severity}" / f"{name}.safetensors")[0]


@pytest.mark.parametrize("family, severity", MEDIA)
def test_a_file_holds_what_changed_and_where(made, family, severity):
    modality = FAMILIES[family].modality
    for name in ("a", "b", "c"):
        clean, worse = both(made, name, family, severity)
        assert set(worse) == {modality, f"{modality}_ok", "cues", "corrupted"}
        inside = worse["corrupted"]
        assert inside.dtype == bool and 0.4 < inside.mean() < 0.6
        assert np.array_equal(inside, both(made, name, family, 1)[1]["corrupted"])
        changed = (worse[modality] != clean[modality]).any(1)
        if (name, modality) == ("c", "audio"):
            assert not changed.any() and not worse["audio_ok"].any()  # there is no sound to corrupt
            continue
        observed = changed[inside & worse[f"{modality}_ok"]]
        assert observed.sum() >= 0.9 * len(observed) and (severity == 3 or len(observed) > 30)
        if severity < 3:
            assert np.array_equal(worse[f"{modality}_ok"], clean[f"{modality}_ok"])
        if modality == "visual":
            assert severity == 3 or not changed[~inside].any()
            assert not worse["visual"][~worse["visual_ok"]].any() and np.isnan(worse["cues"][~worse["visual_ok"]][:, OWNER == "v"]).all()
            assert np.array_equal(worse["cues"][:, OWNER == "a"], clean["cues"][:, OWNER == "a"], equal_nan=True)
        else:
            edge = np.convolve(inside, np.ones(2 * 8 + 1), "same") > 0  # the encoder hears a third of a second around a frame
            assert not changed[~edge].any()
            assert np.array_equal(worse["cues"][:, OWNER == "v"], clean["cues"][:, OWNER == "v"], equal_nan=True)


def test_cues_see_what_was_done(made):
    for family, cue in dict(blur="sharpness", darkness="brightness", noise="level").items():
        values = []
        for severity in (1, 2):
            clean, worse = both(made, "a", family, severity)
            values.append((worse["cues"] - clean["cues"])[worse["corrupted"], CUES.index(cue)].mean())
        sign = 1 if family == "noise" else -1
        assert 0 < sign * values[0] < sign * values[1], family


def test_a_face_that_is_lost_is_lost_at_the_worst_only(made):
    clean, dark = both(made, "a", "darkness", 3)
    assert clean["visual_ok"].all() and both(made, "a", "darkness", 2)[1]["visual_ok"].all()
    assert not dark["visual_ok"][dark["corrupted"]].all() and dark["visual_ok"][: dark["corrupted"].argmax()].all()


def test_encoding_goes_on_where_it_stopped_and_decodes_nothing_twice(made, monkeypatch):
    paths = {path: path.stat().st_mtime_ns for path in (made / "suite").rglob("*.safetensors")}
    assert len(paths) == 3 * len(MEDIA)
    gone = made / "suite/blur-2/a.safetensors"
    before = gone.read_bytes()
    gone.unlink()
    videos = []
    monkeypatch.setattr(suite, "read_frames", lambda path, original=suite.read_frames: videos.append(path.stem) or original(path))
    encode(made, "suite")
    assert videos == ["a"] and gone.read_bytes() == before
    assert all(path.stat().st_mtime_ns == time for path, time in paths.items() if path != gone)
    encode(made, "again")
    assert videos == ["a", "a", "b", "c"]  # once for all visual conditions
    for path in paths:
        assert path.read_bytes() == (made / "again" / path.relative_to(made / "suite")).read_bytes()


def test_another_seed_gives_other_stretches_and_does_not_mix(made):
    with pytest.raises(DataError, match="another seed"):
        encode(made, "suite", seed=1)
    encode(made, "other", seed=1)
    assert not np.array_equal(both(made, "a", "noise", 1)[1]["corrupted"], both(made, "a", "noise", 1, "other")[1]["corrupted"])


def test_a_split_that_is_not_there_is_refused(made):
    with pytest.raises(DataError, match="no trial of split 'dev'"):
        encode(made, "dev", split="dev")
    assert not (made / "dev").exists()


# --- loading and predicting

def test_every_condition_loads_and_labels_stay(made):
    clean = load_sequences(made / "store", "validation")
    for c in conditions():
        sequences, masks = load_corrupted(made / "store", made / "suite", "validation", c.family, c.severity)
        assert [s.id for s in sequences] == [s.id for s in clean]
        for s, mask, before in zip(sequences, masks, clean):
            assert mask.dtype == bool and mask.shape == (COUNT,) and mask.any() == (c.severity > 0)
            assert np.array_equal(s.va, before.va) and np.array_equal(s.valid, before.valid) and s.group == before.group
            assert c.modality != "visual" or np.array_equal(s.audio, before.audio)
            assert c.modality != "audio" or np.array_equal(s.visual, before.visual)
    with pytest.raises(DataError):
        load_corrupted(made / "store", made / "suite", "validation", "rain", 1)


@pytest.mark.parametrize("family", ["frame_drops", "sound_shift"])
def test_features_on_disk_are_those_in_memory(made, tmp_path, family):
    there, here = (load_corrupted(made / "store", made / "suite", "validation", family, 2, scratch)[0] for scratch in (tmp_path, None))
    changed = "visual" if family == "frame_drops" else "audio"
    for one, other in zip(there, here, strict=True):
        assert isinstance(getattr(one, changed), Rows) and isinstance(getattr(other, changed), np.ndarray)
        assert np.array_equal(one.visual[:], other.visual) and np.array_equal(one.audio[:], other.audio)
    assert not list(tmp_path.iterdir())


def test_tables_joined_on_disk_are_the_table_written_at_once(tmp_path):
    rng, parts = np.random.default_rng(0), []
    for number, rows in enumerate((700_000, 3, 700_000, 10)):
        table = pd.DataFrame(dict(family=f"f{number}", frame=np.arange(rows, dtype=np.int32), energy=rng.standard_normal(rows, np.float32), ok=True))
        parts.append(tmp_path / f"{number}.parquet")
        write_table(parts[-1], table)
    robustness._join(parts, tmp_path / "joined.parquet")
    write_table(tmp_path / "at_once.parquet", pd.concat(map(read_table, parts), ignore_index=True))
    assert (tmp_path / "joined.parquet").read_bytes() == (tmp_path / "at_once.parquet").read_bytes()


def test_a_shift_is_in_seconds_of_the_clip(made):
    shifted = load_corrupted(made / "store", made / "suite", "validation", "sound_shift", 3)[0][0]
    assert (load_sequences(made / "store", "validation")[0].audio_ok & ~shifted.audio_ok).sum() in (FPS - 1, FPS, FPS + 1)


@pytest.fixture(scope="module")
def runs(made):
    for label, name, kind, configuration, seed in (("concat", "concat", "comparison", "equal", 0), ("concat", "concat", "comparison", "equal", 1),
                                                   ("sage", "sage", "comparison", "equal", 0), ("no_reliability", "sage", "ablation", "equal", 0),
                                                   ("late", "concat", "comparison", "faithful", 0)):
        torch.manual_seed(seed)
        model = build_model(name, 64, 64, len(CUES), cue_owners=CUE_OWNERS)
        folder = made / "runs" / f"{label}-{seed}"
        write_arrays(folder / "model.safetensors", model_arrays(model))
        write_json(folder / "run.json", dict(label=label, name=name, kind=kind, configuration=configuration, recipe=model.recipe, seed=seed))
    return made / "runs"


def test_rows_are_the_moments_of_the_prediction(made, runs):
    condition = Condition("blur", "media", "visual", 2, True)
    rows, trusted = predict_condition([runs / "concat-1", runs / "sage-0"], made / "store", made / "suite", "validation", condition)
    assert rows.run.tolist() == ["concat-1"] * 3 + ["sage-0"] * 3 and rows.group.tolist() == ["a", "b", "c"] * 2
    assert all((rows[name] == value).all() for name, value in condition._asdict().items())
    sequences, masks = load_corrupted(made / "store", made / "suite", "validation", "blur", 2)
    for run, part in rows.groupby("run"):
        for s, p, row in zip(sequences, predict_sequences(load_run(runs / run), sequences), part.to_dict("records")):
            sums = moments(p.va, s.va, s.valid)
            assert [row[name] for name in SUMS] == pytest.approx(sums.ravel())
            if run == "sage-0":
                frames = trusted[trusted.trial == s.id]
                assert np.array_equal(frames[["reliability_visual_0", "reliability_audio_0"]], p.reliability[:, :, 0])
                assert np.array_equal(frames.ok, s.visual_ok) and np.array_equal(frames.energy, s.cues[:, CUES.index("brightness")], equal_nan=True)
                assert np.array_equal(frames.corrupted, masks[sequences.index(s)]) and frames.frame.tolist() == list(range(1, COUNT + 1))
    assert set(trusted.run) == {"sage-0"} and trusted.reliability_audio_0.dtype == np.float32


def test_all_conditions_of_the_runs_that_are_compared(made, runs, tmp_path, monkeypatch):
    few = [c for c in conditions() if c.severity == 0 or c.family in ("noise", "audio_missing") and c.severity == 3]
    monkeypatch.setattr("sage_nb.corruption.conditions", lambda: few)
    table = evaluate_robustness(runs, made / "store", made / "suite", tmp_path / "whole", workers=1)
    pd.testing.assert_frame_equal(table, read_table(tmp_path / "whole/robustness.parquet"))
    assert set(table.run) == {"concat-0", "concat-1", "sage-0"}  # neither an ablation nor another configuration
    assert set(table.family) == {"clean", "noise", "audio_missing"} and len(table) == 3 * 3 * 3
    trusted = read_table(tmp_path / "whole/corrupted_reliability.parquet")
    assert set(trusted.run) == {"sage-0"} and set(trusted.family) == {"noise"} and len(trusted) == 3 * COUNT
    chosen = evaluate_robustness(runs, made / "store", made / "suite", tmp_path / "some", models=["concat"], seeds=[1], workers=1)
    assert set(chosen.run) == {"concat-1"} and not (tmp_path / "some/corrupted_reliability.parquet").exists()
    with pytest.raises(DataError, match="no run of the comparison"):
        evaluate_robustness(runs, made / "store", made / "suite", tmp_path / "none", models=["lfan"], workers=1)

    # cut off after the first condition: goes on, and ends at the same bytes
    seen, original = [], robustness.predict_condition

    def interrupted(runs_, store, folder, split, condition, scratch):
        seen.append(condition.family)
        if seen == ["clean", condition.family] and condition.family != "clean":
            raise KeyboardInterrupt
        return original(runs_, store, folder, split, condition, scratch)

    monkeypatch.setattr(robustness, "predict_condition", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_robustness(runs, made / "store", made / "suite", tmp_path / "cut", workers=1)
    evaluate_robustness(runs, made / "store", made / "suite", tmp_path / "cut", workers=1)
    assert seen.count("clean") == 1
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == ["corrupted_reliability.parquet", "robustness.parquet"]
    for name in ("corrupted_reliability.parquet", "robustness.parquet"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- what the sums tell

GROUPS = np.repeat([f"g{i:02d}" for i in range(20)], 60)


def evidence(tmp_path, scale, seeds=(0, 1), noise=0.0):
    """Every model predicts scale(model, condition) times the truth, plus noise: for a truth of mean 0 and variance v,
    concordance is 2 s / (1 + s^2) without noise."""
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 0.3, (len(GROUPS), 2))
    truth -= truth.mean(0)
    parts = []
    for model in ("concat", "sage", "visual", "audio"):
        for seed in seeds:
            for c in conditions():
                said = scale(model, c) * truth + noise * np.random.default_rng([seed, c.severity]).normal(size=truth.shape)
                sums = group_moments(said, truth, GROUPS)
                parts.append(pd.DataFrame(dict(run=f"{model}-{seed}", model=model, configuration="equal", seed=seed, **c._asdict(),
                                               group=np.unique(GROUPS), **dict(zip(SUMS, sums.reshape(20, -1).T)))))
    table = pd.concat(parts).sample(frac=1, random_state=0)  # the order of rows must not matter
    write_table(tmp_path / "robustness.parquet", table)
    return SimpleNamespace(folder=tmp_path)


def shrunk(s):
    return 2 * s / (1 + s * s)


def test_curves_areas_and_losses_of_models_that_shrink(tmp_path):
    step = dict(concat=0.2, sage=0.1, visual=0.25, audio=0.25)
    found = evidence(tmp_path, lambda model, c: 1 - step[model] * c.severity * (2 if c.seen else 1) / 2)
    curves = robustness_curves(found)
    assert len(curves) == 4 * 10 * 4 and (curves.seeds == 2).all() and np.allclose(curves.p_std, 0)
    for row in curves.itertuples():
        wanted = shrunk(1 - step[row.model] * row.severity * (2 if row.seen else 1) / 2)
        assert row.p == pytest.approx(wanted) and row.ccc_valence == pytest.approx(wanted) and row.ccc_arousal == pytest.approx(wanted)

    areas = robustness_areas(curves).set_index(["model", "family", "seen"]).area
    for model in step:
        for seen, double in ((True, 2), (False, 1)):
            wanted = np.mean([shrunk(1 - step[model] * s * double / 2) for s in range(4)])
            assert areas[model, "all", seen] == pytest.approx(wanted)
            assert areas[model, "visual_missing" if seen else "darkness", seen] == pytest.approx(wanted)

    losses = loss_differences(found, resamples=40)
    assert len(losses) == (10 + 2) * 4
    for row in losses.itertuples():
        levels = (1, 2, 3) if row.severity == "mean" else (int(row.severity),)
        mine, theirs = (np.mean([1 - shrunk(1 - step[model] * s * (2 if row.seen else 1) / 2) for s in levels]) for model in ("sage", "concat"))
        assert (row.loss, row.loss_other, row.difference) == pytest.approx((mine, theirs, theirs - mine))
        assert row.low - 0.01 < row.difference < row.high + 0.01 and row.low > 0
    assert set(losses[losses.family == "all"].seen) == {True, False}


def test_equal_models_differ_by_nothing_in_every_resample(tmp_path):
    found = evidence(tmp_path, lambda model, c: 1 - 0.1 * c.severity, noise=0.2)
    assert robustness_curves(found).p_std.max() > 0
    assert np.allclose(loss_differences(found, resamples=40)[["difference", "low", "high"]], 0)
    assert np.allclose(missing_differences(found, resamples=40)[["difference", "low", "high"]], 0)


def test_intervals_come_from_groups_and_are_of_the_seed(tmp_path):
    found = evidence(tmp_path, lambda model, c: 1 - (0.2 if model == "concat" else 0.1) * c.severity, noise=0.2)
    one, two, other = loss_differences(found, resamples=60), loss_differences(found, resamples=60), loss_differences(found, resamples=60, seed=1)
    pd.testing.assert_frame_equal(one, two)
    assert not np.allclose(one.low, other.low) and np.allclose(one.difference, other.difference)
    assert (one.low < one.difference).all() and (one.difference < one.high).all()
    swapped = loss_differences(found, "concat", "sage", resamples=60)
    assert np.allclose(swapped.difference, -one.difference) and np.allclose(swapped.low, -one.high)


def test_losses_need_both_models(tmp_path):
    found = evidence(tmp_path, lambda model, c: 1.0)
    for pair in (("sage", "lfan"), ("cold", "concat")):
        empty = loss_differences(found, *pair, resamples=5)
        assert empty.empty and list(empty) == ["family", "level", "modality", "seen", "severity", "loss", "loss_other", "difference", "low", "high"]


def test_without_a_modality_the_model_of_the_other_is_the_measure(tmp_path):
    def scale(model, c):
        if model == "sage":
            return {("visual_missing", 3): 0.5, ("audio_missing", 3): 0.9}.get((c.family, c.severity), 1.0)
        return dict(visual=0.8, audio=0.6).get(model, 1.0)

    table = missing_differences(evidence(tmp_path, scale), resamples=20).set_index("missing")
    assert table.alone.to_dict() == dict(visual="audio", audio="visual")
    assert table.difference.to_dict() == pytest.approx(dict(visual=shrunk(0.5) - shrunk(0.6), audio=shrunk(0.9) - shrunk(0.8)))
    assert missing_differences(SimpleNamespace(folder=tmp_path), "lfan").empty


def test_the_score_is_that_of_the_pooled_frames(tmp_path):
    found = evidence(tmp_path, lambda model, c: 1.0, seeds=(0,), noise=0.3)
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 0.3, (len(GROUPS), 2))
    truth -= truth.mean(0)
    said = truth + 0.3 * np.random.default_rng([0, 2]).normal(size=truth.shape)
    row = robustness_curves(found).query("model == 'sage' and family == 'blur' and severity == 2").iloc[0]
    assert row.ccc_arousal == pytest.approx(ccc(said[:, 1], truth[:, 1])) and np.isnan(row.p_std) and row.seeds == 1


def test_seed_and_strengths_of_the_suite_are_recorded(made):
    strengths = {name: list(about.strengths) for name, about in FAMILIES.items() if about.level == "media"}
    faces = dict(detect_every=5, face_model=None, several_faces=None, smallest_face=0.2)
    assert read_json(made / "suite/suite.json") == dict(seed=0, strengths=strengths, faces=faces)
