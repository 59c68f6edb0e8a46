"""The whole pipeline at a small size: a scratch copy that is its own git repository, with a small corpus rendered for it."""
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, commit, environment

COPIED = (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitattributes", ".gitignore", "Makefile", "dvc.yaml", "nbs", "params.yaml",
          "pyproject.toml", "requirements.lock", "sage_nb", "settings.ini")
SMALL = dict(prepare=dict(dev_groups=2, calibration_groups=2), pretrain=dict(visual_steps=10, audio_steps=10),
             conditions=dict(seeds=[0], epochs=2), train=dict(models=["concat", "sage"], seeds=[0], epochs=3), tables=dict(resamples=50))


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
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    subprocess.run([sys.executable, "-m", "sage_nb.cli", "sample", "data", "--subjects", "pretrain=1", "train=8", "validation=7", "test=1", "--seconds", "4", "6"],
                   cwd=folder, env=environment(folder), check=True)
    commit(folder)
    return folder


def make(folder: Path, target: str) -> str:
    "Run a target of the Makefile with the environment that runs this test; its output."
    done = subprocess.run(["make", "-s", "-o", "env", target, f"VENV={sys.prefix}"], cwd=folder, env=environment(folder),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_from_raw_video_to_tables_and_figures_and_again(scratch):
    said = make(scratch, "repro")
    assert "peak memory" in said
    for name in ("tables/comparison.md", "figures/clip.png", "figures/reliability.png", "figures/training.png", "figures/architecture.png"):
        assert f"results/{name}" in said and (scratch / "results" / name).stat().st_size > 0

    rows = list(csv.DictReader((scratch / "results/tables/comparison.csv").open()))
    assert list(rows[0])[:9] == ["model", "configuration", "seeds", "ccc_valence", "ccc_arousal", "p", "p_std", "p_low", "p_high"]
    assert {"concat", "sage"} < {row["model"] for row in rows}
    for path in (scratch / "results").glob("*/*.md"), (scratch / "results").glob("*/*.png"):
        for file in path:
            about = json.loads(file.with_suffix(".provenance.json").read_text())
            assert about["cells"] and "data/corpus" in json.dumps(about["stages"])

    assert "Nothing to do: every stage is up to date." in make(scratch, "repro")
    stray = subprocess.run(["git", "status", "--porcelain"], cwd=scratch, capture_output=True, text=True).stdout.split("\n")
    assert {line[3:] for line in stray if line} == {"dvc.lock", "results/"}

    commit(scratch)
    assert "verified: every file of results/ and dvc.lock has the bytes that are committed" in make(scratch, "verify")


def test_a_fusion_parameter_runs_no_extraction_and_a_figure_runs_one_stage(scratch):
    def would_run() -> list[str]:
        done = subprocess.run([sys.executable, "-m", "dvc", "status", "--json"], cwd=scratch, env=environment(scratch), capture_output=True, text=True)
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
