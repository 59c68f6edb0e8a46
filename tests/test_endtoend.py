"""The whole pipeline at a small size: a scratch copy that is its own git repository, with a small corpus rendered for it."""
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, commit, environment
from sage_nb.pipeline import read_params, read_stages

COPIED = (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitattributes", ".gitignore", "Makefile", "dvc.yaml", "nbs", "params.yaml",
          "pyproject.toml", "requirements.lock", "sage_nb", "settings.ini",
          "results/bench.json")
SMALL = dict(prepare=dict(dev_groups=2, calibration_groups=2), pretrain=dict(visual_steps=5, audio_steps=5),
             conditions=dict(seeds=[0], epochs=1), evaluate=dict(robustness_seeds=[0]), tables=dict(resamples=50), figures=dict(resamples=50),
             replicate=dict(dev_groups=1, calibration_groups=1, visual_steps=5, audio_steps=5, epochs=1, seeds=[0], corpora=dict(control=dict(
                 sample=dict(seed=2, nuisances=False, seconds=[3, 3.5], subjects=dict(pretrain=1, train=4, validation=2, test=1)), models=dict(concat={}, sage={})))),
             verdict=dict(resamples=50), tune=dict(epochs=1, models=["concat", "sage"], grid=dict(as_it_is={}), further=dict(sage=dict(two_steps=dict(options=dict(steps=2))))))
KEPT = dict(models=["visual", "audio", "concat", "sage", "sage_no_calibration"], ablations=["no_reliability"])

ONE_CORE = ["taskset", "-c", str(min(os.sched_getaffinity(0)))] if shutil.which("taskset") else []


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scratch") / "sage_nb"
    for name in COPIED:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        else:
            shutil.copy(ROOT / name, target)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for stage, values in SMALL.items():
        assert set(values) <= set(params[stage])
        params[stage].update(values)
    params["train"].update(seeds=[0, 1], ablation_seeds=[0], epochs=2, **{name: {label: params["train"][name][label] for label in labels} for name, labels in KEPT.items()})
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    subprocess.run([sys.executable, "-m", "sage_nb.cli", "sample", "data", "--subjects", "pretrain=1", "train=6", "validation=4", "test=1", "--seconds", "4", "5"],
                   cwd=folder, env=environment(folder), check=True)
    commit(folder)
    return folder


def make(folder: Path, target: str, *prefix: str) -> str:
    "Run a target of the Makefile with the environment that runs this test; its output."
    done = subprocess.run([*prefix, "make", "-s", "-o", "env", target, f"VENV={sys.prefix}"], cwd=folder, env=environment(folder),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_from_raw_video_to_tables_and_figures_and_again(scratch):
    said = make(scratch, "repro")
    assert "peak memory" in said
    for name in ("tables/comparison.md", "figures/clip.png", "figures/reliability.png", "figures/training.png", "figures/architecture.png", "report.html"):
        assert f"results/{name}" in said and (scratch / "results" / name).stat().st_size > 0

    rows = list(csv.DictReader((scratch / "results/tables/comparison.csv").open()))
    assert list(rows[0])[:9] == ["model", "configuration", "seeds", "ccc_valence", "ccc_arousal", "p", "p_std", "p_low", "p_high"]
    assert set(KEPT["models"]) < {row["model"] for row in rows} and {row["seeds"] for row in rows if row["model"] == "sage"} == {"2"}
    rows = list(csv.DictReader((scratch / "results/tables/ablation.csv").open()))
    assert [(row["model"], row["seeds"]) for row in rows] == [("sage", "2"), ("sage_no_calibration", "2"), ("no_reliability", "1")]
    rows = list(csv.DictReader((scratch / "results/tables/robustness.csv").open()))
    assert {row["model"] for row in rows} == set(KEPT["models"])
    stages = read_stages(scratch, read_params(scratch)["paths"])
    assert [line.split()[0] for line in said.splitlines() if line.endswith(" MB") and "together" not in line] == [name for name, stage in stages.items() if not stage["apart"]]
    assert not (scratch / "results/replication").exists() and "The comparison was not repeated on other corpora" in (scratch / "results/report.html").read_text()
    about = json.loads((scratch / "results/report.provenance.json").read_text())
    assert set(about["stages"]["report"]["inputs"]) == {"results/tables", "results/figures"} and "data/corpus" in about["stages"]["prepare"]["inputs"]
    for path in (scratch / "results").glob("*/*.md"), (scratch / "results").glob("*/*.png"):
        for file in path:
            about = json.loads(file.with_suffix(".provenance.json").read_text())
            assert about["cells"] and "data/corpus" in json.dumps(about["stages"])

    assert "Nothing to do: every stage is up to date." in make(scratch, "repro")
    stray = subprocess.run(["git", "status", "--porcelain"], cwd=scratch, capture_output=True, text=True).stdout.split("\n")
    assert {line[3:] for line in stray if line} == {"dvc.lock", "results/tables/", "results/figures/", "results/report.html", "results/report.provenance.json"}

    commit(scratch)
    assert "verified: every file of results/ and dvc.lock has the bytes that are committed" in make(scratch, "verify", *ONE_CORE)  # bytes do not depend on how many work


def test_a_fusion_parameter_runs_no_extraction_and_a_figure_runs_one_stage(scratch):
    stages = [name for name, stage in read_stages(scratch, read_params(scratch)["paths"]).items() if not stage["apart"]]

    def would_run() -> list[str]:
        done = subprocess.run([sys.executable, "-m", "dvc", "status", "--json", *stages], cwd=scratch, env=environment(scratch), capture_output=True, text=True)
        return sorted(json.loads(done.stdout))

    assert would_run() == []
    params = yaml.safe_load((scratch / "params.yaml").read_text())
    params["train"]["epochs"] += 1
    (scratch / "params.yaml").write_text(yaml.safe_dump(params))
    assert would_run() == ["train"]
    params["train"]["epochs"] -= 1
    (scratch / "params.yaml").write_text(yaml.safe_dump(params))
    with (scratch / "sage_nb/figures.py").open("a") as file:
        file.write("\n")
    assert would_run() == ["figures"]


def test_the_replication_makes_its_corpora_and_judges_them(scratch):
    said = make(scratch, "replicate", *ONE_CORE)  # starting workers would take longer than their work
    assert {path.name for path in (scratch / "work/replication").iterdir()} == {"control", "stage.json"} and not (scratch / ".work/replicate").exists()
    rows = {name: list(csv.DictReader((scratch / f"results/replication/{name}.csv").open())) for name in ("replication", "verdicts")}
    assert [(row["corpus"], row["model"], row["seeds"]) for row in rows["replication"]] == [("control", "concat", "1"), ("control", "sage", "1")]
    assert [row["criterion"] for row in rows["verdicts"]] == ["P of SAGE less that of concatenation", "verdict: criteria that are met"]
    about = json.loads((scratch / "results/replication/verdicts.provenance.json").read_text())
    assert set(about["stages"]) == {"replicate", "verdict"} and "sample.py" in about["stages"]["replicate"]["code"] and "results/replication/verdicts.md" in said
    if (scratch / "results/report.html").is_file():  # made before: it now tells of the replication too
        assert "“control”" in (scratch / "results/report.html").read_text() and "results/report.html" in said
        assert "results/replication" in json.loads((scratch / "results/report.provenance.json").read_text())["stages"]["report"]["inputs"]


def test_the_search_has_a_row_a_model_and_takes_its_best(scratch):
    make(scratch, "tune", *ONE_CORE)
    rows = list(csv.DictReader((scratch / "results/tuning/tuning.csv").open()))
    assert [row["model"] for row in rows] == ["concat", "sage"] and rows[0]["two_steps"] == "" and rows[0]["best"] == "as_it_is"
    assert rows[1]["best"] == max(("as_it_is", "two_steps"), key=lambda cell: float(rows[1][cell]))
