"""The rules of the house: floors, notebooks and package in step, dependencies, what git may hold."""
import ast
import configparser
import csv
import hashlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, environment
from sage_nb.baselines import build_model
from sage_nb.evaluation import ABLATIONS, LABELS
from sage_nb.features import CUE_OWNERS
from sage_nb.pipeline import GIVEN, import_closure, imported_modules, notebook_parameters, read_params, read_stages
from sage_nb.sage import SAGE
from sage_nb.training import Settings, fit, matching_width

MODEL_CODE = ("metrics", "interaction", "reliability", "losses", "sage", "baselines", "windows", "corruption", "training")  # torch and numpy only
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
STAGES = [path for path in NOTEBOOKS if re.match(r"\d\d_stage_", path.name)]
READERS = [ROOT / f"nbs/{name}.ipynb" for name in ("24_your_own_features", "29_affwild2_in_place", "44_live_camera")]  # they export nothing
MODULES = [path for path in NOTEBOOKS if re.match(r"\d\d_(?!stage_)", path.name) and path not in READERS]


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def git(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)


# --- notebooks and package

def test_notebooks_are_numbered_in_the_order_of_the_floors():
    names = [path.name for path in NOTEBOOKS if path.name != "index.ipynb"]
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", name) for name in names)
    numbers = [name[:2] for name in names]
    assert len(set(numbers)) == len(numbers)
    assert max(path.name for path in MODULES + READERS[:2]) < min(path.name for path in STAGES)  # the live camera wants a run that they make


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_from_floors_below(path):
    floors = {other.stem[3:]: other.stem[:2] for other in MODULES}
    module = ROOT / "sage_nb" / f"{path.stem[3:]}.py"
    for imported in imported_modules(module):
        assert floors[imported] < path.stem[:2], f"{module.name} imports {imported}, which is not below it"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_one_notebook_one_module(path):
    exports = [line for cell in cells(path) for line in "".join(cell["source"]).splitlines() if line.startswith("#| default_exp")]
    assert exports == [f"#| default_exp {path.stem[3:]}"]


@pytest.mark.parametrize("path", READERS, ids=lambda path: path.stem)
def test_a_readers_notebook_exports_nothing(path):
    assert "#| export" not in path.read_text() and "#| default_exp" not in path.read_text()


def test_features_of_ones_own_need_only_model_code():
    assert imported_modules(READERS[0]) <= {"core", *MODEL_CODE}


def test_every_module_has_a_notebook():
    assert {path.stem for path in (ROOT / "sage_nb").glob("*.py")} == {path.stem[3:] for path in MODULES} | {"__init__", "_modidx"}


def test_package_is_what_the_notebooks_export(tmp_path):
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"],
                   cwd=tmp_path, env=environment(tmp_path), check=True, capture_output=True)
    made = {path.name: path.read_text() for path in (tmp_path / "sage_nb").glob("*.py")}
    assert made == {path.name: path.read_text() for path in (ROOT / "sage_nb").glob("*.py")}


def test_notebooks_are_clean(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path / "settings.ini")
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    subprocess.run([sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean()"],
                   cwd=tmp_path, env=environment(tmp_path), check=True, capture_output=True)
    for path in NOTEBOOKS:
        assert path.read_text() == (tmp_path / "nbs" / path.name).read_text(), f"{path.name}: run nbdev_clean"
        for cell in cells(path):
            assert not cell.get("outputs") and cell.get("execution_count") is None, f"{path.name} holds outputs"
            assert "nbdev_export()" not in "".join(cell["source"]), f"{path.name} would rewrite the package while it runs"


def test_cell_ids_are_kept():
    for path in NOTEBOOKS:
        ids = [cell["id"] for cell in cells(path)]
        assert len(set(ids)) == len(ids), path.name


# --- the stages

@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_a_stage_notebook_has_no_logic_of_its_own(path):
    first, *rest = cells(path)
    assert (first["cell_type"], "".join(first["source"])) == ("raw", "---\nskip_exec: true\n---")
    tagged = [cell for cell in rest if "parameters" in cell["metadata"].get("tags", ())]
    assert len(tagged) == 1 and notebook_parameters(path)
    for cell in rest:
        if cell["cell_type"] == "code":
            assert "#|" not in "".join(cell["source"])
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                assert not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.While, ast.Try, ast.Lambda)), ast.unparse(node)


@pytest.fixture(scope="module")
def stages() -> dict:
    return read_stages(ROOT, read_params(ROOT)["paths"])


def test_every_stage_notebook_is_a_stage(stages):
    assert [f"work/sources/{path.name}" for path in STAGES] == [stage["notebook"] for stage in stages.values()]
    assert all(path.stem.endswith(f"_stage_{name}") for path, name in zip(STAGES, stages))
    assert yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["sources"]["deps"] == [f"nbs/{path.name}" for path in STAGES]


def test_a_stage_depends_on_what_it_imports_and_no_more(stages):
    for name, stage in stages.items():
        listed = {Path(dep).stem for dep in stage["deps"] if dep.startswith("sage_nb")}
        assert listed == import_closure(ROOT / "nbs" / Path(stage["notebook"]).name, ROOT / "sage_nb"), name
        assert "pipeline" not in listed


def test_a_stage_depends_on_the_paths_and_parameters_it_is_given(stages):
    params = read_params(ROOT)
    entries = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for name, stage in stages.items():
        section = params.get(name, {})
        apart_from_workers = [f"{name}.{own}" for own in section if own != "scheduler"]
        assert entries[name].get("params", []) == ([name] * bool(section) if len(apart_from_workers) == len(section) else apart_from_workers)
        given = set(notebook_parameters(ROOT / "nbs" / Path(stage["notebook"]).name))
        declared = set(re.findall(r"paths\.(\w+)", json.dumps(entries[name])))
        assert given - set(GIVEN) == set(section) | declared, name


def test_stepping_through_prepare_makes_the_splits_of_the_pipeline():
    section = read_params(ROOT)["prepare"]
    assert {name: notebook_parameters(ROOT / "nbs/31_stage_prepare.ipynb")[name] for name in section} == section


def test_changing_the_fusion_extracts_nothing_again(stages):
    fusion = {"interaction", "reliability", "losses", "sage", "baselines", "training", "evaluation", "robustness"}
    corruption = {"windows", "corruption", "suite"}  # with which the copies and the suite are made, but not the store
    for name, banned in dict(prepare=fusion | corruption, pretrain=fusion | corruption, encode=fusion, corrupt=fusion).items():
        assert not {Path(dep).stem for dep in stages[name]["deps"]} & banned, name


def test_every_row_of_the_comparison_and_of_the_ablations_can_be_built_and_has_words():
    train = read_params(ROOT)["train"]
    assert set(train["models"]) == set(LABELS) and set(train["ablations"]) == set(ABLATIONS)
    assert set(train["ablation_seeds"]) <= set(train["seeds"]) and set(read_params(ROOT)["evaluate"]["robustness_seeds"]) <= set(train["seeds"])
    for label, about in (train["models"] | train["ablations"]).items():
        options = about.get("options", {})
        if options.get("hidden") == "match sage":
            options["hidden"] = matching_width(64, 64, len(CUE_OWNERS), cue_owners=CUE_OWNERS)
        build_model(about.get("model", label), 64, 64, len(CUE_OWNERS), cue_owners=CUE_OWNERS, **options)
        Settings(**(settings := about.get("settings", {})))
        assert not set(settings) & set(inspect.signature(fit).parameters), label


def test_an_ablation_is_not_sage_itself():
    "Each changes an option or a setting to what is not its default, in the type of the default."
    defaults = {name: p.default for name, p in inspect.signature(SAGE).parameters.items()} | asdict(Settings())
    for label, about in read_params(ROOT)["train"]["ablations"].items():
        [(name, value)] = (about.get("options", {}) | about.get("settings", {})).items()
        assert about["model"] == "sage" and value != defaults[name] and type(value) is type(defaults[name]), label


def test_the_suite_corrupts_what_is_evaluated():
    params = read_params(ROOT)
    assert params["corrupt"]["split"] == params["evaluate"]["split"] and params["tables"]["seed"] == params["figures"]["seed"]
    assert params["tables"]["resamples"] == params["figures"]["resamples"]


def test_the_replication_differs_from_the_pipeline_in_its_corpora_alone(stages):
    assert [name for name, stage in stages.items() if stage["apart"]] == (apart := ["replicate", "verdict", "tune"])
    assert not any(out in dep for name in apart for out in stages[name]["outs"] for other, stage in stages.items() if other not in apart for dep in stage["deps"])
    params = read_params(ROOT)
    own, train = params["replicate"], params["train"]
    corpora, expected = own["corpora"], params["prepare"] | params["pretrain"] | params["encode"]
    expected |= dict(epochs=train["epochs"], selection=train["selection"], split=params["evaluate"]["split"], seeds=train["seeds"][:3], corpora=corpora)
    assert own == expected and params["verdict"] == {name: params["tables"][name] for name in ("resamples", "seed")}
    assert corpora["second"]["models"] == train["models"] and {"concat", "concat_wide", "concat_readouts", "sage"} <= set(corpora["control"]["models"])
    assert all(train["models"][label] == about for label, about in corpora["control"]["models"].items())
    samples = {name: about["sample"] for name, about in corpora.items()}
    assert samples == {"second": {"seed": 1}, "control": {"seed": 2, "nuisances": False}}  # the sample's own seed is 0


def test_changing_a_figure_runs_one_stage(stages):
    assert [name for name, stage in stages.items() if "sage_nb/figures.py" in stage["deps"]] == ["figures"]


def test_the_report_comes_last_and_is_cheap(stages):
    assert list(stages)[-1] == "report" and stages["report"]["outs"].keys() == {"results/report.html", "results/report.provenance.json"}
    assert [dep for dep in stages["report"]["deps"] if not dep.startswith(("sage_nb/", "work/sources/"))] == ["results/tables", "results/figures"]
    assert stages["report"]["also"] == list(stages["verdict"]["outs"])


def test_only_evaluation_reads_the_truth(stages):
    truth = read_params(ROOT)["paths"]["truth"]
    readers = {name for name, stage in stages.items() if any(truth.startswith(dep.rstrip("/")) for dep in stage["deps"])}
    assert readers == {"conditions", "evaluate"}
    package = ROOT / "sage_nb"
    trained = import_closure(package / "training.py", package) | import_closure(ROOT / "nbs/36_stage_train.ipynb", package) | {"training"}
    assert {"windows", "sage", "features"} <= trained and not trained & {"evaluation", "conditions", "robustness"}
    for module in trained - {"sample"}:
        names = {getattr(node, field, None) for node in ast.walk(ast.parse((package / f"{module}.py").read_text()))
                 for field in ("id", "attr", "arg", "name", "value")}
        assert not names & {"read_truth", "frame_truth", "visual_nuisance", "audio_nuisance"}, module


def test_results_are_in_git_and_the_rest_is_in_the_cache(stages):
    results = read_params(ROOT)["paths"]["results"]
    for stage in stages.values():
        for out in stage["outs"]:
            assert (out in stage["cached"]) != out.startswith(f"{results}/")


# --- packaging

def test_settings_and_pyproject_agree():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    settings, project = settings["DEFAULT"], tomllib.loads((ROOT / "pyproject.toml").read_text())
    about = project["project"]
    assert (about["name"], about["description"]) == (settings["lib_name"], settings["description"])
    assert about["requires-python"] == f">={settings['min_python']}"
    assert project["tool"]["setuptools"]["packages"] == [settings["lib_path"]]
    assert about["authors"] == [{"name": settings["author"]}]
    assert [f"{name}={target}" for name, target in about["scripts"].items()] == [settings["console_scripts"]]
    assert about["urls"]["Repository"] == settings["git_url"]
    init = (ROOT / "sage_nb/__init__.py").read_text()
    assert f'__version__ = "{settings["version"]}"' in init
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == settings["version"]
    assert settings["license"] == "apache2" and about["license"] == "Apache-2.0" and "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


def test_lock_fulfils_pyproject():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    locked = {}
    for requirement in map(Requirement, lines):
        [pin] = requirement.specifier
        assert pin.operator == "==" and requirement.url is None, f"{requirement} is not pinned"
        locked[canonicalize_name(requirement.name)] = pin.version
        if re.match(r"nvidia-|cuda-|triton", requirement.name):
            assert str(requirement.marker) == 'sys_platform == "linux"', f"{requirement.name} exists for Linux only"
    for wanted in map(Requirement, [*about["dependencies"], *about["optional-dependencies"]["dev"]]):
        assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)]), f"{wanted} against {locked[canonicalize_name(wanted.name)]}"


def test_runtime_imports_are_declared():
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = {"cv2": "opencv-python-headless", "yaml": "pyyaml"}
    extras = {"core.py": "cluster", "pipeline.py": "dev"}  # module -> the extra without which some of it does not work

    def names(requirements):
        return {re.match(r"[A-Za-z0-9_-]+", requirement)[0].lower() for requirement in requirements}

    for path in (ROOT / "sage_nb").glob("[a-z]*.py"):
        extra = extras.get(path.name)
        allowed = names(about["dependencies"]) | (names(about["optional-dependencies"][extra]) if extra else set()) | ({"nbclient"} if extra == "dev" else set())
        for node in ast.walk(ast.parse(path.read_text())):
            found = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in {name.split(".")[0] for name in found} - set(sys.stdlib_module_names) - {"sage_nb"}:
                assert packages.get(name, name).lower() in allowed, f"{path.name} imports {name}, which pyproject.toml does not ask for"


def test_model_code_needs_only_torch_and_numpy():
    banned = ("av", "cv2", "torchaudio", "pandas", "matplotlib", "scipy", "pyarrow", "yaml", "tqdm", "dvc", "papermill", "nbdev", "joblib", "distributed")
    code = f"import sys; sys.modules.update(dict.fromkeys({banned!r})); from sage_nb import {', '.join(MODEL_CODE)}"
    done = subprocess.run([sys.executable, "-c", code], env=environment(ROOT), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- git and dvc

def test_dvc_config():
    config = configparser.ConfigParser()
    config.read(ROOT / ".dvc/config")
    assert config["'remote \"sample\"'"]["url"] == "../sample-remote"
    assert "remote" not in config["core"], "a default remote would receive what nobody meant to push"
    assert all(config["core"][name] == "false" for name in ("analytics", "autostage", "check_update"))


def test_data_dvc_is_pulled_from_the_sample_remote_and_never_pushed():
    [out] = yaml.safe_load((ROOT / "data.dvc").read_text())["outs"]
    assert (out["path"], out["remote"], out["push"]) == ("data", "sample", False)


def test_objects_of_the_sample_remote_match_their_names():
    objects = [path for path in (ROOT / "sample-remote/files/md5").rglob("*") if path.is_file()]
    assert objects
    for path in objects:
        assert hashlib.md5(path.read_bytes()).hexdigest() == path.parent.name + path.name.removesuffix(".dir"), path.name
    assert sum(path.stat().st_size for path in objects) < 40e6


@pytest.mark.parametrize("path", ["data/corpus/videos/a.mp4", "data/truth/a.csv", "work/features/a.safetensors", ".work/train/x/y",
                                  "results-local/figures/clip.png", ".dvc/cache/files/md5/00/11", ".dvc/tmp/lock", "a/cropped_aligned/b/00001.jpg",
                                  "any/where/video.avi", "affwild/VA_Estimation_Challenge/Train_Set/a.txt", ".venv/bin/python"])
def test_what_must_not_be_committed_is_ignored(path):
    assert git("check-ignore", "-q", "--no-index", path).returncode == 0


def test_results_are_not_ignored():
    for path in ("results/tables/comparison.csv", "results/figures/clip.png", "results/report.html", "data.dvc", "dvc.lock"):
        assert git("check-ignore", "-q", "--no-index", path).returncode == 1


def test_planted_data_cannot_be_added(tmp_path):
    shutil.copy(ROOT / ".gitignore", tmp_path / ".gitignore")
    planted = [tmp_path / "data/real/face.jpg", tmp_path / "results-local/figures/clip.png"]
    git("init", "-q", folder=tmp_path)
    for path in planted:
        path.parent.mkdir(parents=True)
        path.touch()
        assert git("add", str(path), folder=tmp_path).returncode != 0
    git("add", "-A", folder=tmp_path)
    assert git("ls-files", folder=tmp_path).stdout.split() == [".gitignore"]


def test_bytes_of_remote_and_results_are_left_alone():
    for path in ("sample-remote/files/md5/00/11", "results/tables/comparison.csv"):
        assert git("check-attr", "text", path).stdout.strip().endswith("text: unset")
    assert git("check-attr", "eol", "nbs/00_core.ipynb").stdout.strip().endswith("eol: lf")


def test_the_sample_meets_its_conditions():
    rows = list(csv.DictReader((ROOT / "results/tables/conditions.csv").open(encoding="utf-8")))
    assert len(rows) >= 6 and all(row["met"] == "True" for row in rows), rows


def test_readme_is_complete():
    assert "@@" not in (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_the_index_notebook():
    done = subprocess.run([sys.executable, "-m", "sage_nb.pipeline", "readme", "--check"], cwd=ROOT, env=environment(ROOT),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_search_found_is_what_is_trained():
    "The best cell of every row of results/tuning/tuning.csv stands in the models of the comparison; forms of concatenation take over that of concat."
    params = read_params(ROOT)
    tune, models = params["tune"], params["train"]["models"]
    best = {row["model"]: row["best"] for row in csv.DictReader((ROOT / "results/tuning/tuning.csv").open())}
    assert sorted(best) == sorted(tune["models"]) == sorted(set(models) - {"concat_wide", "concat_readouts", "sage_no_calibration"})
    for label, cell in best.items():
        assert models[label] == (tune["grid"] | tune["further"].get(label, {}))[cell], label
    assert all(models[label]["settings"] == models["concat"]["settings"] for label in ("concat_wide", "concat_readouts"))
