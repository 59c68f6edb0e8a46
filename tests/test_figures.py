"Figures: what they show, what they are drawn without, and the same bytes from the same evidence."
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from conftest import ROOT, environment
from sage_nb import figures
from sage_nb.core import DataError, read_json
from sage_nb.evaluation import (ABLATIONS, LABELS, VARIANTS, ablation, comparison, detection, read_evidence, read_table, reliability_by, simulate_evidence,
                                write_table)
from sage_nb.figures import (BLUE, COLOURS, FAMILIES, PAGE, STYLE, ablation_figure, calibration_figure, choose_clip, choose_swings, clip_figure,
                             comparison_figure, detection_figure, fusion_swings, gallery_figure, plane_figure, reliability_figure, robustness_areas_figure, robustness_figure,
                             training_figure, write_figures)
from sage_nb.robustness import robustness_areas, robustness_curves

NAMES = ["architecture", "training", "comparison", "ablation", "robustness", "robustness_areas", "reliability", "clip", "detection", "calibration",
         "gallery", "plane"]


@pytest.fixture(scope="module", autouse=True)
def coarse():
    "Few dots per inch: quick, and all else stays."
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STYLE, "savefig.dpi", 50)
        yield


@pytest.fixture(scope="module")
def evidence(folder):
    return simulate_evidence(folder / "evidence", seeds=[0, 1], trials=6, frames=200,
                             models=["visual", "audio", "concat", "late", "sage", "no_reliability", "steps_0"])


@pytest.fixture(scope="module")
def drawn(folder, evidence):
    "Name -> figure, as they were written."
    kept, save = {}, figures.save_figure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save_figure", lambda figure, path: save(kept.setdefault(path.name, figure), path))
        assert write_figures(evidence.folder, folder / "figures", resamples=100, provenance=dict(stage="figures", parameters={}, code={}, inputs={})) == list(kept)
    return kept


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def many(columns: dict) -> pd.DataFrame:
    "A comparison of all models with made-up numbers."
    rows = pd.DataFrame(dict(model=list(LABELS), configuration="equal", seeds=5, p=np.linspace(0.3, 0.6, len(LABELS))))
    rows = rows.assign(p_low=rows.p - 0.1, p_high=rows.p + 0.05, sage_gain=0.6 - rows.p, sage_gain_low=0.57 - rows.p, sage_gain_high=0.63 - rows.p, p_holm=0.01)
    rows.loc[rows.model == "sage", ["sage_gain", "sage_gain_low", "sage_gain_high", "p_holm"]] = np.nan
    return rows.assign(**columns)


def test_every_figure_is_written_with_its_source(folder, evidence, drawn):
    assert list(drawn) == NAMES
    assert {p.name for p in (folder / "figures").iterdir()} == {f"{n}.{s}" for n in NAMES for s in ("png", "svg", "provenance.json")}
    runs = set(evidence.runs.run)
    for name in NAMES:
        record = read_json(folder / "figures" / f"{name}.provenance.json")
        used = {run for row in record["cells"].values() for entry in row.values() for run in entry["runs"]}
        assert used == set(record["runs"]) and used <= runs and bool(used) == (name != "architecture")
        assert len(record["caption"]) > 60 and all(entry["stage"] == "figures" for row in record["cells"].values() for entry in row.values())
        if name != "architecture":
            assert "dev" in record["caption"]  # what selected the models
        picture = (folder / "figures" / f"{name}.svg").read_text()
        assert float(ElementTree.fromstring(picture).get("width").removesuffix("pt")) / 72 == pytest.approx(PAGE)
        assert "<dc:date" not in picture
    ablations = read_json(folder / "figures/ablation.provenance.json")["cells"]
    assert set(ablations["steps_0"]["gain"]["runs"]) == {"steps_0-0", "steps_0-1", "sage-0", "sage-1"}  # a difference rests on both


def test_the_same_bytes_from_another_process(folder, evidence, drawn):
    again = folder / "again"
    code = f"""from sage_nb.evaluation import comparison, model_keys, read_evidence
from sage_nb.figures import *
from sage_nb.robustness import robustness_curves
STYLE["savefig.dpi"] = 50
evidence = read_evidence({str(evidence.folder)!r})
models = [model for model, _ in model_keys(evidence, "comparison")]
for name, figure in dict(comparison=comparison_figure(comparison(evidence, 100)), robustness_areas=robustness_areas_figure(robustness_curves(evidence), models),
                         gallery=gallery_figure(evidence), plane=plane_figure(evidence), clip=clip_figure(evidence)).items():
    save_figure(figure, {str(again)!r} + "/" + name)
"""
    again.mkdir()
    subprocess.run([sys.executable, "-c", code], env=environment(ROOT, PYTHONHASHSEED="7"), check=True)
    paths = list(again.iterdir())
    assert len(paths) == 10
    for path in paths:
        assert path.read_bytes() == (folder / "figures" / path.name).read_bytes(), path.name


def test_text_is_legible_and_nothing_is_cut(drawn):
    for name, figure in drawn.items():
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()  # inches
        assert width == PAGE and min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.01, name
        assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 7, name


def test_damaged_evidence_leaves_nothing_half_written(folder):
    damaged = simulate_evidence(folder / "damaged", seeds=[0], trials=2, frames=200, models=["concat", "sage"])
    (damaged.folder / "predictions/sage-0.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="sage-0.parquet: not a readable parquet file"):
        write_figures(damaged.folder, folder / "nothing")
    assert not (folder / "nothing").exists()


def test_a_corpus_without_side_files(folder):
    bare = simulate_evidence(folder / "bare", seeds=[0], trials=4, frames=200, truth=False, models=["concat", "sage"])
    assert bare.truth.empty and choose_clip(bare) == "clip00"
    assert [label.get_text() for label in reliability_figure(bare).axes[0].get_yticklabels()] == ["all frames"]
    for figure in (clip_figure(bare), gallery_figure(bare), reliability_figure(bare)):
        assert not [text for text in texts(figure) if "nuisance" in text or "AUROC" in text]


def test_clip_without_nuisance_and_clip_without_sound(evidence):
    assert (evidence.truth[evidence.truth.trial == "clip00"][["visual_nuisance", "audio_nuisance"]] == "").all(axis=None)
    assert not evidence.predictions("sage-0").query("trial == 'clip01'").audio_ok.any()
    written = {trial: {text.get_text() for panel in clip_figure(evidence, trial).axes for text in panel.texts} for trial in ("clip00", "clip01")}
    assert written["clip00"] == {"listen", "react", "speak"} and "no sound in this trial" in written["clip01"]
    with pytest.raises(DataError, match="covers trial nobody"):
        clip_figure(evidence, "nobody")
    with pytest.raises(DataError, match="no run of late has reliability"):
        reliability_figure(evidence, "late")


def test_what_evidence_lacks_is_left_out(folder, monkeypatch):
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: None)
    bare = simulate_evidence(folder / "few", seeds=[0], trials=4, frames=200, truth=False, models=["concat", "sage"])
    (bare.folder / "robustness.parquet").unlink()
    assert write_figures(bare.folder, folder / "out", resamples=20) == ["architecture", "training", "comparison", "reliability", "clip", "calibration", "gallery",
                                                                        "plane"]
    for run in bare.runs.run:  # a model that estimates and says no more
        table = bare.predictions(run)
        write_table(bare.folder / "predictions" / f"{run}.parquet", table.loc[:, :"pred_arousal"])
    assert write_figures(bare.folder, folder / "out", resamples=20) == ["architecture", "training", "comparison", "plane"]


def test_all_models_fit_and_nothing_is_smaller_than_seven_points():
    figure = comparison_figure(many({}))
    assert figure.get_size_inches()[1] < 9
    labels = figure.axes[0].get_yticklabels()
    assert sorted(label.get_text() for label in labels) == sorted(LABELS.values())
    heads = [text.get_text() for text in figure.axes[0].texts]
    assert heads == [name for name in FAMILIES if name] + [""] and "others" not in heads
    for figure in (figure, ablation_figure(pd.DataFrame([dict(model=m, changed=c, p=0.5, gain=-0.01, gain_low=-0.02, gain_high=0.0) for m, c in (VARIANTS | ABLATIONS).items()]))):
        figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
        assert all(not a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
        assert all(text.get_fontsize() >= 7 for text in figure.findobj(Text) if text.get_text())


def test_a_model_of_no_family_and_of_another_configuration():
    rows = pd.concat([many({}), many(dict(configuration="faithful"))])
    mine = many({}).head(1).assign(model="mine")
    figure = comparison_figure(pd.concat([rows, mine]))
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(names) == len(LABELS) + 1 and "mine" in names and "others" in [text.get_text() for text in figure.axes[0].texts]


def test_markers_say_what_the_corrected_test_said():
    table = many({})
    table.loc[table.model == "gmu", "p_holm"] = 0.2
    table.loc[table.model == "can", ["sage_gain", "sage_gain_low", "sage_gain_high"]] = [-0.1, -0.2, -0.05]
    figure = comparison_figure(table)
    marks = {round(float(line.get_ydata()[0]), 3): line for line in figure.axes[1].lines if line.get_marker() not in ("None", None, "")}
    places = dict(zip((label.get_text() for label in figure.axes[0].get_yticklabels()), figure.axes[0].get_yticks().round(3)))
    assert len(marks) == len(LABELS) - 1
    assert to_hex(marks[places["GMU"]].get_markerfacecolor()) == to_hex("white") and to_hex(marks[places["LFAN"]].get_markerfacecolor()) != to_hex("white")
    assert marks[places["CAN"]].get_marker() == "s" and "above SAGE, corrected $p$ < .05" in texts(figure)
    assert "variant, not tested" not in texts(figure)
    table.loc[table.model == "sage_no_calibration", "p_holm"] = np.nan
    figure = comparison_figure(table)
    marks = {round(float(line.get_ydata()[0]), 3): line for line in figure.axes[1].lines if line.get_marker() not in ("None", None, "")}
    variant = marks[places[LABELS["sage_no_calibration"]]]
    assert variant.get_marker() == "D" and to_hex(variant.get_markerfacecolor()) == to_hex("white") and "variant, not tested" in texts(figure)


def test_ablations_are_drawn_where_the_table_has_them(evidence):
    table = ablation(evidence, resamples=50)
    figure = ablation_figure(table)
    drawn = sorted(float(line.get_xdata()[0]) for line in figure.axes[0].lines if line.get_marker() in ("o", "s"))
    assert drawn == pytest.approx(sorted(table.gain.dropna())) and {f"{gain:+.3f}".replace("-", "−") for gain in table.gain.dropna()} <= set(texts(figure))
    for column, marker, face in (("gain_low", "s", True), ("gain_high", "o", True)):  # above, below zero
        moved = table.assign(gain=0.0, gain_low=-0.1, gain_high=0.1).assign(**{column: 0.05 if column == "gain_low" else -0.05})
        moved.loc[0, "gain"] = np.nan
        [line, *_] = [line for line in ablation_figure(moved).axes[0].lines if line.get_marker() in ("o", "s")]
        assert line.get_marker() == marker and (line.get_markerfacecolor() != "white") == face


def test_robustness_curves_and_areas(evidence):
    curves = robustness_curves(evidence)
    models = ["visual", "audio", "concat", "late", "sage"]
    figure = robustness_figure(curves, models)
    panels = [panel for panel in figure.axes if panel.get_title()]
    assert len(panels) == curves[["family", "modality"]].drop_duplicates().shape[0]
    own = curves[(curves.model == "sage") & (curves.family == "blur")].sort_values("severity")
    [panel] = [panel for panel in panels if panel.get_title() == "blur (visual)"]
    [line] = [line for line in panel.lines if to_hex(line.get_color()) == to_hex(BLUE)]
    assert line.get_ydata() == pytest.approx(own.p.to_numpy()) and len(panel.lines) == len(models)
    tinted = {panel.get_title() for panel in panels if to_hex(panel.get_facecolor()) != to_hex("white")}
    assert len(tinted) == curves[curves.seen][["family", "modality"]].drop_duplicates().shape[0]
    assert "1 other models" in texts(figure) and "training contains it" in texts(figure)

    figure = robustness_areas_figure(curves, models)
    picture = figure.axes[0].images[0].get_array()
    areas = robustness_areas(curves).set_index(["model", "family", "modality"]).area
    assert picture.shape == (len(models), 1 + len(panels)) and not picture[-1].any()  # SAGE less itself
    titles = [label.get_text().replace("\n", " ") for label in figure.axes[0].get_xticklabels()]
    column = titles.index("blur (visual) *")
    assert picture[models.index("late"), column] == pytest.approx(areas["late", "blur", "visual"] - areas["sage", "blur", "visual"])
    assert sum(title.endswith("*") for title in titles) == len(tinted)
    assert not robustness_areas_figure(curves, models[:-1]).axes[0].images[0].get_array().any()  # without SAGE nothing is compared


def test_stated_against_actual_error(evidence):
    figure = calibration_figure(evidence, resamples=50, bins=5)
    assert len(figure.axes) == 2 * 5  # the estimate, two readouts at two stages; two axes
    points = {}
    for run in ("sage-0", "sage-1"):
        table = evidence.predictions(run)
        table = table[table.valid].sort_values("log_var_valence", kind="stable")
        part = np.array_split(np.arange(len(table)), 5)[4]
        points[run] = [np.sqrt(np.exp(table.log_var_valence.to_numpy(float)[part]).mean()),
                       np.sqrt(((table.pred_valence - table.valence).to_numpy(float)[part] ** 2).mean())]
    lines = [line for line in figure.axes[0].lines if line.get_marker() == "o" and to_hex(line.get_color()) == to_hex(BLUE)]
    assert [lines[0].get_xdata()[4], lines[0].get_ydata()[4]] == pytest.approx(np.mean(list(points.values()), 0), rel=1e-5)
    with pytest.raises(DataError, match="no run of late states a variance"):
        calibration_figure(evidence, "late")


def test_detection_has_a_row_for_every_question(evidence):
    table = detection(evidence, resamples=20)
    figure = detection_figure(table)
    marks = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert sorted(float(line.get_xdata()[0]) for line in marks) == pytest.approx(sorted(table.auroc.dropna()))
    assert {text.get_text() for text in figure.axes[0].texts} == set(table.task)
    with pytest.raises(DataError, match="side files"):
        detection_figure(table.head(0))


def swing_evidence(folder, shares, seeds=(0,)):
    "Evidence whose weights are set by hand: trial -> visual share of each frame (missing = the face is)."
    evidence = simulate_evidence(folder, seeds=seeds, trials=len(shares), frames=200, models=["concat", "sage"])
    path = evidence.folder / "predictions/sage-0.parquet"
    table = read_table(path)
    share = np.concatenate([shares[trial] for trial in sorted(shares)])
    table["visual_ok"], table["audio_ok"] = np.isfinite(share), True
    for s in range(3):
        table[f"weight_visual_{s}"], table[f"weight_audio_{s}"] = np.nan_to_num(share) * 2 / 3, (1 - np.nan_to_num(share)) * 2 / 3
    write_table(path, table)
    return read_evidence(folder)


def test_a_swing_is_a_fall_with_a_recovery(tmp_path):
    def path(*values):
        return np.repeat(values, 40).astype(float)

    shares = {"clip00": path(0.9, 0.9, 0.2, 0.8, 0.8), "clip01": path(0.9, 0.8, 0.5, 0.2, 0.1),  # falls and stays down
              "clip02": path(0.1, 0.6, 0.6, 0.1, 0.1), "clip03": path(0.7, 0.7, np.nan, 0.7, 0.7)}  # the face missing is no change of mind
    swings = fusion_swings(swing_evidence(tmp_path / "evidence", shares)).set_index("trial")
    assert swings.loc["clip00", ["modality", "start", "end"]].tolist() == ["visual", 81, 120] and swings.depth["clip00"] == pytest.approx(0.6)
    assert swings.loc["clip02", ["modality", "start", "end"]].tolist() == ["audio", 41, 120] and swings.depth["clip02"] == pytest.approx(0.5)
    assert all(swings.depth.get(trial, 0) == pytest.approx(0) for trial in ("clip01", "clip03"))


def test_errors_of_a_swing_count_labelled_frames_of_its_stretch(tmp_path):
    shares = {f"clip{i:02d}": np.repeat([0.9, 0.1, 0.9], [60, 80, 60]) for i in range(4)}
    evidence = swing_evidence(tmp_path / "evidence", shares)
    swings = fusion_swings(evidence).set_index("trial")
    for name, column in (("sage", "error"), ("concat", "error_against")):
        table = evidence.predictions(f"{name}-0")
        part = table[(table.trial == "clip02") & table.frame.between(61, 140) & table.valid]
        error = (np.abs(part.pred_valence - part.valence).mean() + np.abs(part.pred_arousal - part.arousal).mean()) / 2
        assert swings[column]["clip02"] == pytest.approx(error, rel=1e-5)
    assert len(fusion_swings(evidence, least=81)) == 0 and list(fusion_swings(evidence, least=81).columns) == list(fusion_swings(evidence).columns)


def test_the_gallery_shows_the_harm_too(evidence):
    chosen = choose_swings(pd.DataFrame(dict(trial=list("abcdefghi"), depth=np.linspace(1, 0.2, 9), error=[0.5, 0.1, 0.2] + [0.0] * 6, error_against=0.3)))
    assert chosen.trial.tolist() == ["b", "c", "a"]
    titles = [panel.get_title() for panel in gallery_figure(evidence).axes if panel.get_title()]
    shown = choose_swings(fusion_swings(evidence))
    assert len(titles) == len(shown) and all(title.startswith(trial) for title, trial in zip(titles, shown.trial))
    assert [("helped" in title) for title in titles] == (shown.error < shown.error_against).tolist()


def test_the_plane_counts_labelled_frames(evidence):
    figure = plane_figure(evidence, least=5)
    counts = [np.nan_to_num(np.ma.filled(panel.images[0].get_array().astype(float), np.nan)).sum() for panel in figure.axes[:3]]
    frames = evidence.predictions("sage-0").valid.sum()
    assert counts[0] == frames and all(0.9 * frames < count <= frames for count in counts[1:])  # of a mean over seeds, cells under one frame are blank
    truth = evidence.predictions("sage-0").query("valid")
    rows, columns = np.nonzero(np.nan_to_num(np.ma.filled(figure.axes[0].images[0].get_array().astype(float), np.nan)))
    assert (rows.min() / 10 - 1 <= truth.arousal.min()) and ((columns.max() + 1) / 10 - 1 >= truth.valence.max())  # arousal upwards


def test_training_highlights_four_and_counts_the_rest(evidence):
    figure = training_figure(evidence)
    assert f"{evidence.runs[evidence.runs.kind == 'comparison'].model.nunique() - len(COLOURS)} other models" in texts(figure)
    assert not set(ABLATIONS.values()) & set(texts(figure))


def test_reliability_by_condition_and_stage(evidence):
    table = reliability_by(evidence)
    figure = reliability_figure(evidence)
    drawn = sorted(value for line in figure.axes[0].lines for value in line.get_xdata() if np.isfinite(value))
    mean = table[table.modality == "visual"].groupby(["stage", "kind", "name"]).reliability.mean().dropna()
    assert drawn == pytest.approx(sorted(mean))


def test_a_reader_s_style_changes_nothing(evidence, folder, drawn):
    import matplotlib

    from sage_nb.figures import save_figure

    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "axes.grid": True}):
        save_figure(comparison_figure(comparison(evidence, 100)), folder / "styled")
    assert (folder / "styled.png").read_bytes() == (folder / "figures/comparison.png").read_bytes()
