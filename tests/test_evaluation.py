"Evidence, scores, tables and figures: against references written out here, and to the byte."
import csv
import json
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from sage_nb.core import DataError, Sequence, read_json, write_arrays, write_json
from sage_nb.evaluation import (REFERENCES, comparison, describe, evaluate_runs, read_evidence, read_table, reliability_auroc, reliability_by,
                                run_scores, simulate_evidence, write_table)
from sage_nb.figures import architecture_figure, choose_clip, clip_figure, reliability_figure, training_figure, write_figures
from sage_nb.tables import write_tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evidence")


@pytest.fixture(scope="module")
def evidence(folder):
    return simulate_evidence(folder / "evidence", seeds=[0, 1], trials=8, frames=240)


def record(stage, inputs):
    return dict(stage=stage, parameters={"of": stage}, code={f"{stage}.py": "00"}, inputs=inputs)


@pytest.fixture(scope="module")
def tables(folder, evidence):
    train = record("train", {"work/features": {"hash": "11"}})
    evaluate = record("evaluate", {"work/runs": {"hash": "22", "made_by": train}, "data/truth": {"hash": "33"}})
    write_tables(evidence.folder, folder / "tables", resamples=200, provenance=record("tables", {"work/evidence": {"hash": "44", "made_by": evaluate}}))
    return folder / "tables" / "comparison"


def reference_ccc(x, y):
    x, y = [float(v) for v in x], [float(v) for v in y]
    n = len(x)
    mx, my = sum(x) / n, sum(y) / n
    sx, sy = sum((v - mx) ** 2 for v in x) / n, sum((v - my) ** 2 for v in y) / n
    sxy = sum((a - mx) * (b - my) for a, b in zip(x, y)) / n
    return 2 * sxy / (sx + sy + (mx - my) ** 2)


def rows_of(path):
    with open(f"{path}.csv", newline="") as file:
        return list(csv.DictReader(file))


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


def test_tables_agree(tables):
    rows = rows_of(tables)
    markdown = [re.split(r" *\| *", line)[1:-1] for line in tables.with_suffix(".md").read_text().splitlines() if line.startswith("|")][2:]
    latex = [line.removesuffix(r" \\").split(" & ") for line in tables.with_suffix(".tex").read_text().splitlines() if line.endswith(r"\\")][1:]
    assert len(rows) == len(markdown) == len(latex) == 6
    plain = [[cell.replace("**", "").replace("–", "--") for cell in row] for row in markdown]
    assert plain == [[re.sub(r"\\textbf{(.*)}", r"\1", cell) for cell in row] for row in latex]
    for row, texts in zip(rows, plain):
        shown = texts[3:7] + re.findall(r"-?\d\.\d+", texts[7])
        for name, text in zip(("ccc_valence", "ccc_arousal", "p", "p_std", "p_low", "p_high"), shown):
            assert text == "--" if row[name] == "" else abs(float(text) - float(row[name])) <= 0.00051
        assert texts[2] == ("--" if row["seeds"] == "0" else row["seeds"])


def test_caption_names_what_a_score_depends_on(tables):
    for name in (".md", ".tex"):
        text = tables.with_suffix(name).read_text()
        for part in ("Validation split of the simulated evidence", "all labelled frames of the set concatenated", "bootstrap", "200 draws",
                     "post-processing: none", "selection on dev", "SAGE alone has further loss terms", "calibration subjects"):
            assert part in text


def test_provenance_covers_every_cell(tables, evidence):
    provenance = json.loads(tables.with_name("comparison.provenance.json").read_text())
    rows = rows_of(tables)
    assert set(provenance["cells"]) == {f"{row['model']}, {row['configuration']}" for row in rows}
    for row in rows:
        cells = provenance["cells"][f"{row['model']}, {row['configuration']}"]
        assert set(cells) == set(row)
        for cell in cells.values():
            assert cell["stage"] in provenance["stages"] and set(cell["runs"]) <= set(provenance["runs"])
        own = [run for run in evidence.runs.run if run.startswith(f"{row['model']}-")]
        assert cells["p"]["runs"] == own and cells["p"]["seeds"] == ([0, 1] if own else [])
    assert provenance["cells"]["concat, equal"]["sage_gain"]["runs"] == ["concat-0", "concat-1", "sage-0", "sage-1"]
    stages = provenance["stages"]
    assert set(stages) == {"train", "evaluate", "tables"} and stages["tables"]["inputs"] == {"work/evidence": {"hash": "44", "made_by": "evaluate"}}
    for stage in stages.values():  # parameters, code and data of each, and no stage left out on the way back
        assert stage["parameters"] and stage["code"] and all(entry["hash"] for entry in stage["inputs"].values())
        assert {entry["made_by"] for entry in stage["inputs"].values() if "made_by" in entry} <= set(stages)
    for run in provenance["runs"].values():
        assert {"recipe", "settings", "seed", "fingerprint"} <= set(run)


def test_reliability_is_that_of_observed_frames(evidence):
    frames = evidence.predictions("sage-0").merge(evidence.truth, on=["trial", "frame"])
    chosen = frames[(frames.visual_nuisance == "") & (frames.audio_nuisance == "")]
    summary = reliability_by(evidence).query("seed == 0 and name == 'clean' and modality == 'audio' and stage == 1").iloc[0]
    assert not chosen.audio_ok.all()
    assert summary.reliability == pytest.approx(chosen.reliability_audio_1[chosen.audio_ok].mean(), abs=1e-6)
    assert summary.weight == pytest.approx(chosen.weight_audio_1.mean(), abs=1e-6)
    observed = frames[frames.visual_ok]
    clean, other = (observed.reliability_visual_0[(observed.visual_nuisance == "") == side].to_numpy() for side in (True, False))
    pairs = (clean[:, None] > other[None]).mean() + (clean[:, None] == other[None]).mean() / 2
    measured = reliability_auroc(evidence).query("seed == 0 and modality == 'visual' and stage == 0").auroc.iloc[0]
    assert measured == pytest.approx(pairs, abs=1e-9)
    heard = frames[frames.audio_ok]
    speaks = (heard.audio_nuisance == "") & (heard.phase == "speak")
    own, other = (heard.reliability_audio_1[speaks == side].to_numpy() for side in (True, False))
    pairs = (own[:, None] > other[None]).mean() + (own[:, None] == other[None]).mean() / 2
    measured = reliability_auroc(evidence).query("seed == 0 and stage == 1").set_index("modality").auroc_own
    assert measured["audio"] == pytest.approx(pairs, abs=1e-9) and np.isnan(measured["visual"])


def test_figures_are_the_same_bytes_in_another_process(folder, evidence):
    write_figures(evidence.folder, folder / "here")
    code = f"from sage_nb.figures import write_figures; write_figures({str(evidence.folder)!r}, {str(folder / 'there')!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONHASHSEED": "7", "MPLBACKEND": "svg"})
    names = sorted(path.name for path in (folder / "here").iterdir())
    assert names == sorted(f"{name}.{kind}" for name in ("clip", "reliability", "training", "architecture") for kind in ("png", "svg", "provenance.json"))
    for name in names:
        assert (folder / "here" / name).read_bytes() == (folder / "there" / name).read_bytes(), name
    for path in (folder / "here").glob("*.svg"):
        text = path.read_text()
        assert "date" not in text.lower() and not re.search(r"20\d\d-\d\d-\d\d", text)


def test_figures_of_odd_evidence(tmp_path):
    bare = simulate_evidence(tmp_path / "bare", seeds=[0], trials=2, frames=200, truth=False)
    assert bare.truth.empty and choose_clip(bare) == "clip00"
    assert len(write_figures(bare.folder, tmp_path / "figures")) == 4


def test_clip_without_nuisance_and_clip_without_sound(evidence):
    truth = evidence.truth[evidence.truth.trial == "clip00"]
    assert (truth.visual_nuisance == "").all() and (truth.audio_nuisance == "").all()
    assert not evidence.predictions("sage-0").query("trial == 'clip01'").audio_ok.any()
    texts = {trial: [text.get_text() for panel in clip_figure(evidence, trial).axes for text in panel.texts] for trial in ("clip00", "clip01")}
    assert set(texts["clip00"]) == {"listen", "react", "speak"} and "no sound in this trial" in texts["clip01"]


def test_text_is_legible_and_nothing_is_cut(evidence):
    for figure in (clip_figure(evidence), reliability_figure(evidence), training_figure(evidence), architecture_figure()):
        figure.draw_without_rendering()
        drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()  # inches
        assert width == 7.1 and min(drawn.x0, drawn.y0, width - drawn.x1, height - drawn.y1) > -0.001
        assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 7


def write_store(folder, parts):
    "A feature store of the given sequences, by split."
    index = {s.id: dict(split=split, group=s.group, subject=s.group) for split, part in parts.items() for s in part}
    for s in (s for part in parts.values() for s in part):
        arrays = dict(visual=s.visual, audio=s.audio, va=s.va, visual_ok=s.visual_ok, audio_ok=s.audio_ok, valid=s.valid, cues=s.cues,
                      frame=np.arange(1, 61, dtype=np.int32), time=np.arange(60) / 25 + 0.5)
        write_arrays(folder / f"{s.id}.safetensors", arrays, index[s.id])
    write_json(folder / "index.json", index)


def train_run(folder, model, parts, seed=0, selection="dev"):
    "A run as stage `train` leaves it."
    from sage_nb.training import fit

    fit(model, parts["train"], parts["dev"], run_dir=folder, seed=seed, epochs=2, window=40)
    write_json(folder / "run.json", read_json(folder / "run.json") | dict(selection=selection))


@pytest.fixture
def parts():
    rng = np.random.default_rng(0)

    def draw(name, group, frames=60):
        ok = rng.random((2, frames)) > 0.2
        return Sequence(name, rng.normal(size=(frames, 5)).astype(np.float32), rng.normal(size=(frames, 4)).astype(np.float32),
                        rng.uniform(-1, 1, (frames, 2)).astype(np.float32), ok[0], ok[1], np.arange(frames) > 3,
                        rng.normal(size=(frames, 2)).astype(np.float32), group)

    return {"train": [draw(f"t{i}", f"g{i}") for i in range(8)], "dev": [draw(f"d{i}", f"h{i}") for i in range(3)],
            "validation": [draw(f"v{i}", f"k{i // 2}") for i in (1, 0, 2)]}


def test_evaluate_runs_from_a_store_and_a_trained_run(tmp_path, parts):
    import torch
    from sage_nb.baselines import build_model
    from sage_nb.training import predict_sequences

    write_store(tmp_path / "store", parts)
    write_json(tmp_path / "sample.json", dict(version="0.3"))
    (tmp_path / "truth").mkdir()
    for s in parts["validation"]:
        lines = ["frame,phase,visual_nuisance,audio_nuisance", *(f"{i},speak,{'hand' if i < 20 else ''},{'noise' if i > 40 else ''}" for i in range(1, 60))]
        (tmp_path / "truth" / f"{s.id}.csv").write_text("\n".join(lines) + "\n")
    torch.set_num_threads(1)
    model = build_model("sage", 5, 4, 2, visual_width=8, audio_width=8)
    train_run(tmp_path / "runs" / "sage-0", model, parts)
    for out in ("one", "two"):
        evaluate_runs(tmp_path / "runs", tmp_path / "store", tmp_path / "truth", tmp_path / out, tmp_path / "corpus", workers=1)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert {str(f) for f in files} == {"runs.parquet", "history.parquet", "truth.parquet", "evidence.json", "predictions/sage-0.parquet"}
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    evidence = read_evidence(tmp_path / "one")
    frames = evidence.predictions("sage-0")
    assert frames.trial.tolist() == sorted(frames.trial) and frames.frame.tolist() == list(range(1, 61)) * 3
    v1 = frames[frames.trial == "v1"]
    truth, said = parts["validation"][0], predict_sequences(model, parts["validation"])[0]
    assert np.allclose(v1.time, np.arange(60) / 25 + 0.5) and (v1.group == "k0").all()
    assert np.array_equal(v1.valid, truth.valid) and np.array_equal(v1.valence[truth.valid.tolist()], truth.va[truth.valid, 0])
    assert np.allclose(v1[["pred_valence", "pred_arousal"]], said.va, atol=1e-6)
    assert np.allclose(v1.reliability_audio_2, said.reliability[:, 1, 2], atol=1e-6)
    assert np.allclose(v1.weight_visual_0, said.weights[:, 0, 0], atol=1e-6)
    assert evidence.runs.model.tolist() == ["sage"] and len(evidence.history) == 2
    assert (evidence.about["corpus"], evidence.about["selection"]) == ("sample corpus 0.3", "dev")
    write_tables(tmp_path / "one", tmp_path / "tables", resamples=20)


def test_a_corpus_without_side_files(tmp_path, parts):
    import torch
    from sage_nb.baselines import build_model

    torch.set_num_threads(1)
    write_store(tmp_path / "store", parts)
    (tmp_path / "truth").mkdir()
    for name in ("concat", "sage"):
        train_run(tmp_path / "runs" / f"{name}-0", build_model(name, 5, 4, 2, visual_width=8, audio_width=8), parts, selection="validation")
    for run in (tmp_path / "runs").iterdir():  # evaluating again does not keep predictions of other runs by the same name
        write_table(tmp_path / "evidence" / "predictions" / f"{run.name}.parquet", pd.DataFrame(dict(trial=["old"])))
    evaluate_runs(tmp_path / "runs", tmp_path / "store", tmp_path / "truth", tmp_path / "evidence", tmp_path / "wild", workers=1)
    evidence = read_evidence(tmp_path / "evidence")
    assert evidence.truth.empty and len(evidence.predictions("sage-0")) == 180
    assert describe(evidence).startswith("Validation split of the wild: 3 trials") and "selection on validation" in describe(evidence)
    for name in write_figures(evidence.folder, tmp_path / "figures"):
        caption = json.loads((tmp_path / "figures" / f"{name}.provenance.json").read_text())["caption"]
        assert "AUROC" not in caption and "shaded" not in caption
    labels = [label.get_text() for label in reliability_figure(evidence).axes[0].get_yticklabels()]
    assert labels == ["all frames"]


def test_runs_selected_on_different_parts_are_not_mixed(tmp_path, parts):
    from sage_nb.baselines import build_model

    write_store(tmp_path / "store", parts)
    for seed, selection in ((0, "dev"), (1, "validation")):
        train_run(tmp_path / "runs" / f"concat-{seed}", build_model("concat", 5, 4, 2, visual_width=8, audio_width=8), parts, seed, selection)
    with pytest.raises(DataError, match="concat-0, concat-1: selected on dev and validation"):
        evaluate_runs(tmp_path / "runs", tmp_path / "store", None, tmp_path / "evidence", tmp_path)
    assert not (tmp_path / "evidence").exists()


def test_bad_input_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="train first"):
        evaluate_runs(tmp_path, tmp_path, None, tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="evidence.json: no such file"):
        write_tables(tmp_path, tmp_path / "tables")
    evidence = simulate_evidence(tmp_path / "evidence", seeds=[0], trials=2, frames=200)
    (evidence.folder / "predictions" / "sage-0.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="sage-0.parquet: not a readable parquet file"):
        write_figures(evidence.folder, tmp_path / "figures")
    assert not (tmp_path / "figures").exists()
