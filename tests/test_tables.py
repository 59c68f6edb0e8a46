"Tables: three formats of the same cells, provenance of each, criteria that can be missed, and the same bytes in another process."
import csv
import json
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from sage_nb.core import DataError, write_json
from sage_nb.evaluation import LABELS, comparison, read_evidence, read_table, simulate_evidence, variant_differences, write_table
from sage_nb.robustness import robustness_curves
from sage_nb.tables import claims, comparison_criteria, control_criteria, latex, published, robustness_table, write_replication, write_tables

BENCH = dict(processor="an example", torch="2", batch=8, frames=300, visual_dim=512, audio_dim=128,
             rows=[dict(label=label, configuration="equal", parameters=12345, fusion_parameters=34, multiply_adds=5678, ms_step=ms, ms_frame=0.01, ratio=ratio)
                   for label, ms, ratio in (("sage", 30.0, 1.5), ("tagf", 25.0, None), ("concat", 20.0, 1.0))],
             bars=[dict(bar="step of equal SAGE / step of equal lfan", value=1.7, most=1.5, met=False)])
UNSEEN = ("darkness", "frame_drops", "sound_shift")
NAMES = ["comparison", "conventions", "ablation", "calibration", "detection", "reliability", "robustness", "robustness_losses", "robustness_missing", "efficiency",
         "published", "claims"]


def record(stage, inputs):
    return dict(stage=stage, parameters={"of": stage}, code={f"{stage}.py": "00"}, inputs=inputs)


@pytest.fixture(scope="module")
def tables(folder, evidence):
    write_json(folder / "bench.json", BENCH)
    train = record("train", {"work/features": {"hash": "11"}})
    evaluate = record("evaluate", {"work/runs": {"hash": "22", "made_by": train}, "data/truth": {"hash": "33"}})
    return write_tables(evidence.folder, folder / "tables", resamples=200, bench=folder / "bench.json",
                        provenance=record("tables", {"work/evidence": {"hash": "44", "made_by": evaluate}}))


def rows_of(path):
    with open(f"{path}.csv", newline="") as file:
        return list(csv.DictReader(file))


def markdown_of(path):
    lines = path.with_suffix(".md").read_text().splitlines()
    return [re.split(r" *\| *", line)[1:-1] for line in lines if line.startswith("|")]


def test_every_table_is_there_in_three_formats(folder, tables):
    assert list(tables) == NAMES
    found = {path.name for path in (folder / "tables").iterdir()}
    assert found == {f"{name}{end}" for name in NAMES for end in (".csv", ".md", ".tex", ".provenance.json")}


@pytest.mark.parametrize("name", NAMES)
def test_formats_agree(folder, tables, name):
    path = folder / "tables" / name
    heads, _, *cells = markdown_of(path)
    body = [line.removesuffix(r" \\") for line in path.with_suffix(".tex").read_text().splitlines() if line.endswith(r"\\")]
    assert len(rows_of(path)) == len(tables[name]) == len(cells) == len(body) - 1 and all(len(row) == len(heads) for row in cells)
    for row, line in zip([heads, *cells], body):
        plain = re.sub(r"\\textbf{(.*?)}", r"\1", line)
        for code, mark in ((r"$-$", "−"), (r"$<$", "<"), (r"$>$", ">"), (r"$\geq$", "≥"), (r"$\leq$", "≤"), ("--", "–")):
            plain = plain.replace(code, mark)
        assert re.sub(r"\\([&%$#_{}])", r"\1", plain) == " & ".join(cell.replace("**", "") for cell in row)


def test_shown_numbers_are_those_of_the_csv(folder, tables):
    for row, texts in zip(rows_of(folder / "tables/comparison"), markdown_of(folder / "tables/comparison")[2:]):
        texts = [cell.replace("**", "") for cell in texts]
        shown = texts[3:7] + re.findall(r"-?\d\.\d+", texts[7])
        for name, text in zip(("ccc_valence", "ccc_arousal", "p", "p_std", "p_low", "p_high"), shown):
            assert text == "–" if row[name] == "" else abs(float(text) - float(row[name])) <= 0.00051
        gain = re.findall(r"-?\d\.\d+", texts[8])
        assert gain == [] if row["sage_gain"] == "" else [float(g) for g in gain] == pytest.approx([float(row[f"sage_gain{e}"]) for e in ("", "_low", "_high")], abs=0.00051)
        assert texts[2] == ("–" if row["seeds"] == "0" else row["seeds"]) and texts[10] == (row["verdict"] or "–")


def test_captions_name_what_a_score_depends_on(folder, tables):
    said = {"comparison": ["all labelled frames of the set concatenated", "bootstrap", "200 draws", "Holm", "it alone has the known order", "alone uses the calibration subjects",
                           LABELS["concat_readouts"], LABELS["poe"], LABELS["cold"], LABELS["sage_no_calibration"], "not a baseline", "table of ablations"],
            "conventions": ["chosen for each model on dev", "No number of this table is comparable"], "ablation": ["seeds that both were trained with"],
            "calibration": ["conformal", "5 bins", "100 draws"], "detection": ["logistic regression", "fitted for each question on the truth of dev", "while the subject speaks", "the same frames of the clean video"],
            "robustness": ["audio missing, babble, blur, clipping, noise, occlusion, visual missing"], "robustness_losses": ["Loss: P without corruption less P with it"]}
    for name, parts in said.items():
        for end in (".md", ".tex"):
            text = (folder / "tables" / name).with_suffix(end).read_text()
            for part in ["Validation split of the simulated evidence", "selection on dev", "post-processing: none", *parts]:
                assert part in text, (name, part)
    text = (folder / "tables/published.md").read_text()
    assert "Aff-Wild2" in text and "not comparable" in text and "simulated" not in text


@pytest.mark.parametrize("name", NAMES)
def test_provenance_covers_every_cell(folder, tables, evidence, name):
    found = json.loads((folder / "tables" / f"{name}.provenance.json").read_text())
    rows = rows_of(folder / "tables" / name)
    assert len(found["cells"]) == len(rows)
    for key, cells in found["cells"].items():
        assert set(cells) == set(rows[0])
        assert any(part in key.split(", ") or part in key for row in rows for part in row.values() if part)
        for cell in cells.values():
            assert cell["stage"] in ({"tables"} if name not in ("efficiency", "published") else {"bench", "published sources"})
            assert set(cell["runs"]) <= set(found["runs"]) <= set(evidence.runs.run)
    stages = found["stages"]
    assert set(stages) == {"train", "evaluate", "tables"} and stages["tables"]["inputs"] == {"work/evidence": {"hash": "44", "made_by": "evaluate"}}
    for stage in stages.values():  # parameters, code and data of each, and no stage left out on the way back
        assert stage["parameters"] and stage["code"] and all(entry["hash"] for entry in stage["inputs"].values())
        assert {entry["made_by"] for entry in stage["inputs"].values() if "made_by" in entry} <= set(stages)
    for run in found["runs"].values():
        assert {"recipe", "settings", "seed", "fingerprint"} <= set(run)


def test_provenance_names_the_runs_behind_a_difference(folder, tables, evidence):
    cells = {name: json.loads((folder / "tables" / f"{name}.provenance.json").read_text())["cells"] for name in NAMES}
    of = cells["comparison"]["concat, equal"]
    assert of["p"]["runs"] == ["concat-0", "concat-1"] and of["p"]["seeds"] == [0, 1] and cells["comparison"]["best constant, reference"]["p"]["runs"] == []
    assert of["sage_gain"]["runs"] == of["p_value"]["runs"] == ["concat-0", "concat-1", "sage-0", "sage-1"]
    assert set(of["p_holm"]["runs"]) == set(of["verdict"]["runs"]) == set(evidence.runs.run[(evidence.runs.kind == "comparison") & (evidence.runs.model != "sage_no_calibration")])
    assert cells["comparison"]["sage_no_calibration, equal"]["p_holm"]["runs"] == ["sage_no_calibration-0", "sage_no_calibration-1"]
    assert cells["ablation"]["sage_no_calibration"]["gain"]["runs"] == ["sage-0", "sage-1", "sage_no_calibration-0", "sage_no_calibration-1"]
    assert cells["ablation"]["steps_0"]["gain"]["runs"] == ["sage-0", "sage-1", "steps_0-0", "steps_0-1"]
    assert cells["ablation"]["steps_0"]["p"]["runs"] == ["steps_0-0", "steps_0-1"]
    assert cells["robustness"]["late"]["blur"]["runs"] == ["late-0", "late-1"]
    assert cells["calibration"]["estimate, both"]["ence_after"]["runs"] == ["sage-0", "sage-1"]
    assert cells["robustness_missing"]["sage, audio"]["p_alone"]["runs"] == ["visual-0", "visual-1", "sage-0", "sage-1"]


def test_robustness_against_the_sums(tables, evidence):
    table = tables["robustness"].set_index("model")
    moments = read_table(evidence.folder / "robustness.parquet").query("model == 'late'")

    def p(part):
        scores = []
        for seed in (0, 1):
            for axis in ("valence", "arousal"):
                n, x, y, xx, yy, xy = (part[part.seed == seed][f"{name}_{axis}"].sum() for name in ("n", "x", "y", "xx", "yy", "xy"))
                scores.append(2 * (xy / n - x * y / n**2) / (xx / n - (x / n) ** 2 + yy / n - (y / n) ** 2 + (x / n - y / n) ** 2))
        return np.mean(scores)

    clean = p(moments[moments.severity == 0])
    areas = {family: np.mean([clean, *(p(moments[(moments.family == family) & (moments.severity == s)]) for s in (1, 2, 3))])
             for family in moments.family.unique() if family != "clean"}
    assert table.clean["late"] == pytest.approx(clean) and table.blur["late"] == pytest.approx(areas["blur"])
    assert table.seen["late"] == pytest.approx(np.mean([a for f, a in areas.items() if f not in UNSEEN]))
    assert table.unseen["late"] == pytest.approx(np.mean([areas[f] for f in UNSEEN]))
    assert list(table.index[-4:]) == ["sage", "sage_no_calibration", "no_reliability", "steps_0"] and len(table.columns) == 4 + 10
    assert robustness_table(evidence).equals(tables["robustness"]) and robustness_curves(evidence).severity.max() == 3


def test_published_results_keep_their_own_table(folder, tables):
    table = published()
    assert len(table) == 10 and (table["validation mean"] != "–").all() and (table["test mean"] != "–").sum() == 5
    assert all(re.fullmatch(r"–|0\.\d{2,4}", value) for column in table.columns[3:9] for value in table[column]) and (table.source != "").all()
    assert not any(name in " ".join(table.method) for name in ("SAGE", "TAGF", "concat"))
    own = {row["model"] for row in rows_of(folder / "tables/comparison")}
    assert not own & set(table.method)


def criterion(table, start):
    [row] = [row for row in table.itertuples() if row.criterion.startswith(start)]
    return row


def test_criteria_are_met_and_missed_by_their_numbers(tables):
    args = [tables[name].copy() for name in ("comparison", "detection", "calibration", "robustness_losses", "robustness_missing")]
    compared, detected, calibrated, losses, missing = args
    for gain, p, met in ((0.03, 0.01, True), (0.01, 0.01, False), (0.03, 0.06, False)):
        changed = compared.assign(sage_gain=compared.sage_gain.where(compared.model != "concat", gain), p_holm=compared.p_holm.where(compared.model != "concat", p))
        table = claims(changed, *args[1:]).set_index("criterion")
        assert table.met["P of SAGE less that of concatenation"] == met and table.measured["P of SAGE less that of concatenation"] == gain
    others = compared[compared.model.isin(["visual"])]
    many = pd.concat([compared[compared.model == "concat"], *[others.assign(model=f"m{i}", sage_gain=0.05, p_holm=0.01) for i in range(8)]])
    row = criterion(claims(many, *args[1:]), "other baselines")
    assert row.measured == 8 and row.met
    assert not criterion(claims(many.iloc[:-1], *args[1:]), "other baselines").met
    assert not criterion(claims(many.assign(verdict=["SAGE below", *many.verdict[1:]]), *args[1:]), "baselines significantly above").met
    row = criterion(claims(*args), "conditions in which")
    big = losses[losses.severity.isin(["1", "2", "3"]) & (losses.family != "all") & (losses.loss_other >= 0.05)]
    assert row.measured == (big.low > 0).sum() and row.wanted == str(len(big)) and 0 < len(big) < 30
    worse = losses.assign(low=losses.low.where(losses.index != big.index[0], -0.001))
    assert not criterion(claims(compared, detected, calibrated, worse, missing), "conditions in which").met
    lost = missing.assign(difference=[-0.031, -0.029, -0.5, -0.5])  # the variant is held to nothing
    assert [row.met for row in claims(compared, detected, calibrated, losses, lost).itertuples() if " without " in row.criterion] == [False, True]
    low = detected.assign(auroc=0.75, gain=-0.01)
    met = {row.criterion.removeprefix("AUROC of reliability, "): row.met for row in claims(compared, low, calibrated, losses, missing).itertuples()
           if row.criterion.startswith("AUROC of reliability, ")}
    assert met == {"the sample's own visual nuisances": False, "the sample's own audio nuisances": False, "own voice": True,
                   "visual corruption of severity ≥ 2 from the clean video": False, "audio corruption of severity ≥ 2 from the clean video": False}
    below = [row.met for row in claims(compared, low, calibrated, losses, missing).itertuples() if row.criterion.startswith("AUROC of reliability less")]
    assert len(below) == 5 and not any(below)
    planted = detected.assign(auroc=0.9, gain=0.1).assign(auroc=lambda t: t.auroc.where((t.task != "audio corruption") | (t.kind != "all"), 0.79))  # the pooled row decides
    assert [row.criterion for row in claims(compared, planted, calibrated, losses, missing).itertuples() if row.criterion.startswith("AUROC") and not row.met] == [
        "AUROC of reliability, audio corruption of severity ≥ 2 from the clean video"]
    planted = calibrated.assign(ence_after=0.16, ence_before=0.15, coverage_after_low=0.85, coverage_after_high=0.899)
    assert not any(row.met for row in claims(compared, detected, planted, losses, missing).itertuples() if row.criterion.startswith(("ENCE", "coverage")))
    planted = calibrated.assign(ence_after=0.15, ence_before=0.15, coverage_after_low=0.85, coverage_after_high=0.9)
    assert all(row.met for row in claims(compared, detected, planted, losses, missing).itertuples() if row.criterion.startswith(("ENCE", "coverage")))
    row = criterion(claims(*args, bars=BENCH["bars"]), "step of equal SAGE")
    assert (row.measured, row.wanted, row.met) == (1.7, "≤ 1.5", False)


def test_efficiency_comes_from_the_record(folder, tables):
    texts = markdown_of(folder / "tables/efficiency")[2:]
    assert [row[0] for row in texts] == ["concatenation", "TAGF", "SAGE"] and texts[2][2:] == ["12,345", "34", "5,678", "30.0", "0.0100", "1.50"]
    assert texts[1][-1] == "–" and "512 visual and 128 audio features" in (folder / "tables/efficiency.md").read_text()


def test_the_same_bytes_in_another_process(folder, tables, evidence):
    code = (f"from sage_nb.tables import write_tables; write_tables({str(evidence.folder)!r}, {str(folder / 'again')!r}, resamples=200, "
            f"bench={str(folder / 'bench.json')!r})")
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    for name in NAMES:
        for end in (".csv", ".md", ".tex"):
            assert (folder / "again" / f"{name}{end}").read_bytes() == (folder / "tables" / f"{name}{end}").read_bytes(), name


def test_little_evidence_gives_few_tables(tmp_path):
    simulate_evidence(tmp_path / "evidence", seeds=[0], trials=4, frames=200, truth=False, models=["visual", "concat"])
    (tmp_path / "evidence/robustness.parquet").unlink()
    found = write_tables(tmp_path / "evidence", tmp_path / "tables", resamples=100, bench=tmp_path / "none.json")
    assert list(found) == ["comparison", "conventions", "published"] and len(list((tmp_path / "tables").iterdir())) == 12
    assert found["comparison"].seeds.tolist() == [0, 0, 1, 1] and found["comparison"].sage_gain.isna().all()
    with pytest.raises(DataError, match="evidence.json: no such file"):
        write_tables(tmp_path, tmp_path / "tables")


@pytest.fixture(scope="module")
def replicated(folder):
    for corpus, seed, models in (("second", 1, ["visual", "concat", "concat_readouts", "cold", "sage"]), ("control", 2, ["concat", "sage"])):
        simulate_evidence(folder / "replication" / corpus, seeds=[0, 1], trials=8, frames=240, models=models)
        write_json(folder / "replication" / corpus / "sample.json", dict(seed=seed, nuisances=corpus == "second"))
    replicate = record("replicate", {})
    return write_replication(folder / "replication", folder / "replicated", resamples=200,
                             provenance=record("verdict", {"work/replication": {"hash": "55", "made_by": replicate}}))


def test_a_replication_is_the_comparison_of_each_corpus(folder, replicated):
    table, verdicts = replicated["replication"], replicated["verdicts"]
    assert table[["corpus", "model"]].agg("-".join, axis=1).tolist() == ["second-visual", "second-concat", "second-concat_readouts", "second-cold", "second-sage",
                                                                         "control-concat", "control-sage"]
    for corpus, part in table.groupby("corpus"):
        alone = comparison(read_evidence(folder / "replication" / corpus), resamples=200)
        columns = [name for name in table if name != "corpus"]
        pd.testing.assert_frame_equal(part[columns].reset_index(drop=True), alone[alone.seeds > 0][columns].reset_index(drop=True))
    assert verdicts.groupby("corpus", sort=False).size().to_dict() == {"second": 5, "control": 2}
    for _, part in verdicts.groupby("corpus"):
        *rows, last = part.itertuples()
        assert last.criterion.startswith("verdict") and last.measured == sum(row.met for row in rows) and last.wanted == str(len(rows)) and last.met == all(row.met for row in rows)
    for name, rows in (("replication", 7), ("verdicts", 7)):
        text = (folder / "replicated" / f"{name}.md").read_text()
        assert "“second”: seed 1, with nuisances." in text and "“control”: seed 2, without nuisances." in text and "200 draws" in text
        found = json.loads((folder / "replicated" / f"{name}.provenance.json").read_text())
        assert len(found["cells"]) == rows and set(found["stages"]) == {"replicate", "verdict"}
        assert {run.split("/")[0] for run in found["runs"]} == {"second", "control"}
    cells = json.loads((folder / "replicated/replication.provenance.json").read_text())["cells"]
    assert cells["control, concat, equal"]["sage_gain"]["runs"] == ["control/concat-0", "control/concat-1", "control/sage-0", "control/sage-1"]
    assert cells["second, cold, equal"]["p"]["runs"] == ["second/cold-0", "second/cold-1"]


def test_criteria_of_the_control_are_about_cost(tables):
    compared = tables["comparison"]
    changed = compared.assign(sage_gain=-0.001, sage_gain_low=compared.model.map({"concat": -0.021, "concat_wide": -0.019, "concat_readouts": 0.01}))
    assert [row["met"] for row in control_criteria(changed)] == [False, True, True]
    assert not any(row["met"] for row in comparison_criteria(changed)[:3])  # what costs nothing is not yet better


def test_a_replication_of_nothing_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match="no corpus in it .* run `make replicate`"):
        write_replication(tmp_path, tmp_path / "tables")
    simulate_evidence(tmp_path / "other", seeds=[0], trials=4, frames=200, models=["visual", "concat"])
    write_json(tmp_path / "other/sample.json", dict(seed=3, nuisances=False))
    with pytest.raises(DataError, match="nothing to judge"):
        write_replication(tmp_path, tmp_path / "tables", resamples=100)


def test_latex_escapes():
    text = latex(pd.DataFrame({"a_b": ["50 %"], "c": ["x & y"], "d": ["**−1 < 2**"]}), "≥ 1 #", "t")
    assert r"a\_b & c & d" in text and r"50 \% & x \& y & \textbf{$-$1 $<$ 2}" in text and r"\caption{$\geq$ 1 \#}" in text


def test_a_variant_counts_in_no_criterion_and_has_lines_for_comparison(folder, tables, evidence):
    compared, found = tables["comparison"], tables["claims"]
    planted = compared.assign(sage_gain=compared.sage_gain.where(compared.model != "sage_no_calibration", -0.3))
    assert comparison_criteria(planted) == comparison_criteria(compared)
    lines = found[found.criterion.str.startswith("for comparison: P of SAGE without calibration subjects less that of ")]
    differences = variant_differences(evidence, ["concat", "concat_wide", "concat_readouts"], resamples=200)
    assert lines[["measured", "low", "high"]].to_numpy() == pytest.approx(differences[["difference", "low", "high"]].to_numpy())
    assert lines.met.isna().all() and (lines.wanted == "–").all() and found.met[~found.index.isin(lines.index)].notna().all()
    shown = [row for row in markdown_of(folder / "tables/claims")[2:] if row[0].startswith("for comparison")]
    assert [row[1] for row in shown] == ["–"] * 3 and {row["met"] for row in rows_of(folder / "tables/claims")} == {"True", "False", ""}


def test_published_results_are_the_confirmed_ones(root):
    "Every confirmed row of the list of sources, with its decimals, and no other."
    confirmed = {(row["year"], row["set"], *(row[f"ccc_{name}"] or "–" for name in ("valence", "arousal", "mean"))) for row in rows_of(root / "tests/published")
                 if row["confirmed"] == "yes"}
    shown = {(row["year"], part, *(row[f"{part} {name}"] for name in ("valence", "arousal", "mean"))) for row in published().to_dict("records")
             for part in ("validation", "test") if row[f"{part} mean"] != "–"}
    assert shown == confirmed and len(confirmed) == 15


def test_provenance_of_the_suite_names_the_seeds_that_it_was_asked_of(tmp_path):
    simulate_evidence(tmp_path / "evidence", seeds=[0, 1], trials=6, frames=200, models=["visual", "audio", "concat", "sage"])
    for name in ("robustness", "corrupted_reliability"):
        table = read_table(tmp_path / f"evidence/{name}.parquet")
        write_table(tmp_path / f"evidence/{name}.parquet", table[table.run.str.endswith("-0")])
    write_tables(tmp_path / "evidence", tmp_path / "tables", resamples=100)
    cells = {name: json.loads((tmp_path / f"tables/{name}.provenance.json").read_text())["cells"] for name in ("robustness", "robustness_losses", "robustness_missing", "detection")}
    assert cells["robustness"]["concat"]["blur"]["runs"] == ["concat-0"] and cells["robustness_missing"]["sage, audio"]["p"]["runs"] == ["visual-0", "sage-0"]
    assert {tuple(row["loss"]["runs"]) for row in cells["robustness_losses"].values()} == {("concat-0", "sage-0")}
    seeds = {key: row["auroc"]["seeds"] for key, row in cells["detection"].items()}
    assert {tuple(value) for key, value in seeds.items() if "corruption" in key} == {(0,)} and seeds["own voice, all"] == [0, 1]
