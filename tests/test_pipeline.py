"""The runner, on a toy project with its own git repository: parameters, resuming, killing, reproducing."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import yaml

from clusters import wait_for
from conftest import ROOT, commit, environment, pipeline

from sage_nb.core import DataError
from sage_nb.pipeline import check_params, execute, repro, run_stage, write_sources

PARAMS = dict(paths=dict(corpus="data/corpus", truth="data/truth", items="work/items", results="results"),
              make=dict(count=6, scale=2.0, pause=0.0), report=dict(title="squares"))
STAGES = """stages:
  sources:
    cmd: exec python -m sage_nb.pipeline sources
    deps: [nbs/20_stage_make.ipynb, nbs/21_stage_report.ipynb]
    outs: [work/sources]
  make:
    cmd: exec python -m sage_nb.pipeline run make
    deps: [work/sources/20_stage_make.ipynb, sage_nb/core.py, "${paths.corpus}"]
    params: [make]
    outs: ["${paths.items}"]
  report:
    cmd: exec python -m sage_nb.pipeline run report
    deps: [work/sources/21_stage_report.ipynb, sage_nb/core.py, "${paths.items}", "${paths.truth}"]
    params: [report]
    outs: ["${paths.results}/tables": {cache: false}]
"""
MAKE = """from pathlib import Path
import time
from sage_nb import core
base = float(Path(corpus, "base.txt").read_text()) if Path(corpus, "base.txt").read_text().strip() != "word" else None
if base is None:
    raise core.DataError(f"{corpus}/base.txt: not a number; write one")
for i in range(count):
    path = Path(items) / f"{i}.json"
    if path.exists():
        print("kept", i)
        continue
    if pause:
        core.parallel_map(time.sleep, [pause, pause], workers=2)
    core.write_json(path, base + scale * i)
    print("made", i)"""
REPORT = """from pathlib import Path
from sage_nb import core
values = [core.read_json(path) for path in sorted(Path(items).glob("[0-9]*.json"))]
core.write_text(f"{results}/tables/table.csv", "title,total\\n" + f"{title},{sum(values)}\\n")
core.write_json(f"{results}/tables/arithmetic.json", core.arithmetic())"""


ASIDE = """  aside:
    cmd: exec python -m sage_nb.pipeline run aside
    deps: [work/sources/22_stage_aside.ipynb, sage_nb/core.py]
    params: [aside]
    meta: {apart: true}
    outs: ["${paths.results}/aside": {cache: false}]
"""
ASIDE_CODE = """from pathlib import Path
from sage_nb import core
if Path(scratch, "half").exists():
    print("kept half")
else:
    core.write_json(f"{scratch}/half", word)
    raise core.DataError("only half; run again")
core.write_text(f"{results}/aside/said.txt", core.read_json(f"{scratch}/half"))"""


def notebook(path: Path, parameters: str, code: str) -> None:
    cells = [dict(cell_type="raw", id="skip", metadata={}, source="---\nskip_exec: true\n---")]
    cells += [dict(cell_type="code", id=name, metadata=meta, source=source, outputs=[], execution_count=None)
              for name, meta, source in (("parameters", {"tags": ["parameters"]}, parameters), ("code", {}, code))]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))


def add_code(path: Path, line: str) -> None:
    saved = json.loads(path.read_text())
    saved["cells"][-1]["source"] += f"\n{line}"
    path.write_text(json.dumps(saved))


@pytest.fixture
def project(tmp_path) -> Path:
    return make_project(tmp_path / "project")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    "A project after `repro`; for tests that change nothing in it, or copy it."
    folder = make_project(tmp_path_factory.mktemp("built") / "project")
    done = pipeline(folder, "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "made 5" in done.stdout and "peak memory" in done.stdout
    assert "KeyboardInterrupt" not in done.stdout + done.stderr  # with which Jupyter ends a kernel
    return folder


@pytest.fixture
def copied(built, tmp_path) -> Path:
    return shutil.copytree(built, tmp_path / "copied", symlinks=True)


def make_project(folder: Path) -> Path:
    (folder / "nbs").mkdir(parents=True)
    for name in (".dvc", "sage_nb"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "cache", "tmp", "config.local"))
    for name in (".gitignore", ".dvcignore", "Makefile"):
        shutil.copy(ROOT / name, folder / name)
    notebook(folder / "nbs/20_stage_make.ipynb", 'corpus = "c"\nitems = "i"\ncount = 1\nscale = 1.0\npause = 0.0', MAKE)
    notebook(folder / "nbs/21_stage_report.ipynb", 'items = "i"\nresults = "r"\ntitle = "t"', REPORT)
    (folder / "data/corpus").mkdir(parents=True)
    (folder / "data/corpus/base.txt").write_text("1")
    (folder / "data/truth").mkdir()
    (folder / "data/truth/1.csv").touch()
    (folder / "data/sample.json").write_text("{}\n")
    (folder / "dvc.yaml").write_text(STAGES)
    set_params(folder)
    commit(folder)
    return folder


def set_params(folder: Path, **sections: dict) -> None:
    params = {name: {**values, **sections.get(name, {})} for name, values in PARAMS.items()}
    (folder / "params.yaml").write_text(yaml.safe_dump({**params, **{k: v for k, v in sections.items() if k not in params}}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for name in ("results", "work", ".work/executed", "dvc.lock")
            for path in ([folder / name] if (folder / name).is_file() else sorted((folder / name).rglob("*"))) if path.is_file()}


def test_second_repro_has_nothing_to_do(built):
    assert (built / "results/tables/table.csv").read_text() == "title,total\nsquares,36.0\n"
    again = pipeline(built, "repro")
    assert again.returncode == 0 and "Nothing to do: every stage is up to date." in again.stdout


def test_repro_of_some_stages_is_a_call(copied, capfd):
    set_params(copied, make=dict(count=7), report=dict(title="cubes"))
    assert repro(copied, stages=["make"]) == 0
    said = capfd.readouterr().out
    assert "made 6" in said and (copied / "work/items/6.json").is_file() and "squares" in (copied / "results/tables/table.csv").read_text()


def test_a_notebook_is_run_with_parameters_and_its_copy_kept_whatever_happens(tmp_path):
    notebook(tmp_path / "toy.ipynb", "count = 1", "from sage_nb import core\nif count > 2:\n    raise core.DataError('too many; take two')\nprint(count * 21)")
    done = execute(tmp_path / "toy.ipynb", tmp_path / "copies/toy.ipynb", dict(count=2), tmp_path)
    assert "42" in json.dumps(done.cells[-1].outputs)
    with pytest.raises(DataError, match="too many; take two"):
        execute(tmp_path / "toy.ipynb", tmp_path / "copies/toy.ipynb", dict(count=3), tmp_path)
    assert "too many" in (tmp_path / "copies/toy.ipynb").read_text()


def test_two_runs_give_identical_bytes(built, project):
    assert pipeline(project, "repro").returncode == 0
    assert contents(project) == contents(built)
    assert ".work/executed/make.ipynb" in contents(built) and "work/items/stage.json" in contents(built)


def test_only_what_changed_runs_again(copied):
    project = copied
    set_params(project, report=dict(title="cubes"))
    again = pipeline(project, "repro")
    assert "Running stage 'report'" in again.stdout and "Running stage 'make'" not in again.stdout
    path = project / "nbs/20_stage_make.ipynb"
    saved = json.loads(path.read_text())
    saved["cells"][1]["outputs"] = [dict(output_type="stream", name="stdout", text="seen")]
    saved["cells"][1]["execution_count"] = 7
    path.write_text(json.dumps(saved))
    again = pipeline(project, "repro")
    assert "Running stage 'sources'" in again.stdout and "Running stage 'make'" not in again.stdout


@pytest.mark.parametrize("sections, sentence", [
    (dict(make=dict(cuont=3)), "params.yaml: make.cuont is not a parameter of this stage; remove it or use one of: count, scale, pause"),
    (dict(mkae=dict(count=3)), "params.yaml: no stage is called mkae; rename the section to one of: make, report"),
    (dict(make=dict(scale="1e-3")), "params.yaml: make.scale is '1e-3', but must be a number, written like 0.001 (for example 1.0); change it"),
    (dict(paths=dict(corpus="data/none")), "data/none: no such folder; put the data there, or change paths.corpus in params.yaml"),
    (dict(paths=dict(truth="data/none")), "data/none: no such folder; put the data there, or change paths.truth in params.yaml"),
    (dict(paths=dict(corpse="data")), "params.yaml: paths.corpse is not used by any stage; remove it or use one of: corpus, items, results, truth"),
])
def test_bad_parameters_are_refused_before_anything_runs(project, sections, sentence):
    set_params(project, **sections)
    done = pipeline(project, "repro")
    assert (done.returncode, done.stderr, done.stdout) == (2, sentence + "\n", "")
    assert not (project / "work").exists()


def test_missing_parameter_and_broken_yaml(project):
    params = {**PARAMS, "make": dict(count=1, pause=0.0)}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    done = pipeline(project, "repro")
    assert done.returncode == 2 and done.stderr == "params.yaml: make.scale is missing; add it (the notebook's own default is 1.0)\n"
    (project / "params.yaml").write_text("make: {count: 1\n")
    done = pipeline(project, "repro")
    assert done.returncode == 2 and done.stderr.startswith("params.yaml: not valid YAML in line") and done.stderr.count("\n") == 1


def test_bad_input_inside_a_stage_is_one_sentence(project):
    assert pipeline(project, "sources").returncode == 0
    (project / "data/corpus/base.txt").write_text("word")
    done = pipeline(project, "run", "make")
    assert (done.returncode, done.stderr) == (2, "data/corpus/base.txt: not a number; write one\n")
    assert not (project / "work/items").exists()


def test_bad_input_inside_a_stage_ends_repro_with_its_exit_code(project):
    (project / "data/corpus/base.txt").write_text("word")
    done = pipeline(project, "repro")
    assert done.returncode == 2 and "data/corpus/base.txt: not a number; write one\n" in done.stderr and "Traceback" not in done.stderr
    (project / "data/corpus/base.txt").write_text("several words")
    assert pipeline(project, "repro").returncode not in (0, 2)


def real_data(project: Path, results: str) -> None:
    "A corpus that no `sage-nb sample` made, and of which nobody knows the truth."
    (project.parent / "real").mkdir(exist_ok=True)
    (project.parent / "real/base.txt").write_text("2")
    set_params(project, paths=dict(corpus="../real", truth="work/no-truth", results=results))


@pytest.mark.parametrize("results, ignore", [("results", None), ("elsewhere", "/elsewhere/"), ("../results-local", None), ("results-local/../results", None),
                                             ("results-local", "")])
def test_results_of_real_data_are_refused_where_git_looks(project, results, ignore):
    real_data(project, results)
    if ignore is not None:
        (project / ".gitignore").write_text(ignore)
    done = pipeline(project, "repro")
    assert done.returncode == 2 and done.stderr.startswith(f"params.yaml: paths.results is {results}, ") and done.stderr.count("\n") == 1
    assert not (project / "work").exists() and not (project / results).exists()


def test_a_link_does_not_make_real_data_a_sample(project):
    real_data(project, "results")
    shutil.rmtree(project / "data/corpus")
    (project / "data/corpus").symlink_to(project.parent / "real")
    set_params(project)
    done = pipeline(project, "repro")
    assert done.returncode == 2 and done.stderr.startswith("params.yaml: paths.results is results")


def test_real_data_without_truth_goes_where_git_does_not_look(project):
    real_data(project, "results-local")
    done = pipeline(project, "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project / "results-local/tables/table.csv").read_text() == "title,total\nsquares,42.0\n"
    assert not any((project / "work/no-truth").iterdir()) and not (project / "results").exists()
    assert "Nothing to do" in pipeline(project, "repro").stdout
    subprocess.run(["git", "add", "-A"], cwd=project, check=True)
    tracked = subprocess.run(["git", "ls-files"], cwd=project, capture_output=True, text=True).stdout
    assert "results-local" not in tracked and "real" not in tracked


def test_what_a_killed_process_left_half_written_is_no_output(project):
    add_code(project / "nbs/20_stage_make.ipynb", 'Path(items, ".9.json.1.part.json").touch()')
    assert pipeline(project, "sources").returncode == 0
    assert pipeline(project, "run", "make").returncode == 0
    assert {path.name for path in (project / "work/items").iterdir()} == {*(f"{i}.json" for i in range(6)), "stage.json"}


def test_an_out_may_be_a_file(project):
    (project / "dvc.yaml").write_text(STAGES.replace('"${paths.results}/tables": {cache: false}', '"${paths.results}/page.html": {cache: false}'))
    path, source = project / "nbs/21_stage_report.ipynb", 'results = "r"\nitems = "i"\ntitle = "t"'
    notebook(path, source, "from sage_nb import core")
    write_sources(project)
    run_stage(project, "make")
    with pytest.raises(DataError, match="^21_stage_report.ipynb: it ended without writing results/page.html; let it write to the folder in `results`$"):
        run_stage(project, "report")
    assert not (project / "results").exists()
    for text in ("one", "another"):
        notebook(path, source, f'from sage_nb import core\ncore.write_text(f"{{results}}/page.html", "{text}")')
        write_sources(project)
        run_stage(project, "report")
        assert {file.name: file.read_text() for file in (project / "results").iterdir()} == {"page.html": text}


def test_what_is_made_of_a_stage_apart_is_made_again_when_that_has_changed(project):
    "The stage reads it where it is there; DVC, which must not make it, does not look."
    (project / "dvc.yaml").write_text(STAGES.replace('    outs: ["${paths.results}/tables": {cache: false}]', '''    meta: {also: ["${paths.results}/aside"]}
    outs: ["${paths.results}/page.provenance.json": {cache: false}]''').replace("21_stage_report.ipynb]", "21_stage_report.ipynb, nbs/22_stage_aside.ipynb]", 1) + ASIDE)
    notebook(project / "nbs/21_stage_report.ipynb", 'items = "i"\nresults = "r"\ntitle = "t"\nprovenance = {}',
             'from sage_nb import core\ncore.write_json(f"{results}/page.provenance.json", dict(stages=dict(report=provenance)))')
    notebook(project / "nbs/22_stage_aside.ipynb", 'results = "results"\nword = ""', 'from sage_nb import core\ncore.write_text(f"{results}/aside/said.txt", word)')

    def read() -> set[str]:
        return set(json.loads((project / "results/page.provenance.json").read_text())["stages"]["report"]["inputs"])

    set_params(project, aside=dict(word="once"))
    assert pipeline(project, "repro").returncode == 0 and read() == {"work/items", "data/truth"}
    done = pipeline(project, "repro", "aside")
    assert done.returncode == 0 and "Running stage 'report'" in done.stdout and read() == {"work/items", "data/truth", "results/aside"}
    assert "Nothing to do" in pipeline(project, "repro").stdout
    shutil.rmtree(project / "results/aside")
    assert "Running stage 'report'" in pipeline(project, "repro").stdout and read() == {"work/items", "data/truth"}


def test_another_error_shows_its_traceback(project):
    assert pipeline(project, "sources").returncode == 0
    (project / "data/corpus/base.txt").write_text("several words")
    done = pipeline(project, "run", "make")
    assert done.returncode == 1 and "could not convert string to float" in done.stderr and "papermill" not in done.stderr
    assert "\x1b" not in done.stderr


def test_a_dependency_that_is_not_listed_is_refused(project):
    path = project / "nbs/20_stage_make.ipynb"
    path.write_text(path.read_text().replace("import time", "import time\\nfrom sage_nb import metrics"))
    assert pipeline(project, "sources").returncode == 0
    done = pipeline(project, "run", "make")
    assert done.returncode == 2
    assert done.stderr == ("dvc.yaml: the deps of stage make are not what its notebook imports; "
                           "add or remove sage_nb/metrics.py\n")


def test_code_edited_during_a_run_is_noticed(project):
    set_params(project, make=dict(count=2, pause=1.5))
    assert pipeline(project, "sources").returncode == 0
    running = subprocess.Popen([sys.executable, "-m", "sage_nb.pipeline", "run", "make"], cwd=project, env=environment(project),
                               stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list((project / ".work/make").glob("*/items/0.json")))
    set_params(project, make=dict(count=2, pause=1.4))
    assert running.communicate()[1] == "stage make: its code, parameters or input changed while it ran; run again\n"
    assert running.returncode == 2 and not (project / "work/items").exists()


def test_without_git(project):
    shutil.rmtree(project / ".git")
    done = pipeline(project, "repro")
    assert done.returncode == 2 and "not a git repository, as a downloaded zip is not" in done.stderr and done.stderr.count("\n") == 1


def test_sample_is_fetched_whole_and_only_when_there_is_no_data(project):
    run = {**environment(project), "PWD": str(project)}
    config = (project / ".dvc/config").read_bytes()
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "data"], cwd=project, env=run, check=True)
    record = yaml.safe_load((project / "data.dvc").read_text())
    subprocess.run([sys.executable, "-m", "dvc", "push", "-q", "-r", "sample", "data.dvc"], cwd=project, env=run, check=True)
    record["outs"][0].update(remote="sample", push=False)
    (project / "data.dvc").write_text(yaml.safe_dump(record))
    shutil.rmtree(project / "data")
    shutil.rmtree(project / ".dvc/cache")
    assert pipeline(project, "fetch").returncode == 0 and (project / "data/corpus/base.txt").is_file()
    shutil.rmtree(project / "data")
    shutil.rmtree(project / ".dvc/cache")
    done = pipeline(project, "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project / "data/corpus/base.txt").read_text() == "1" and (project / ".dvc/config").read_bytes() == config
    assert not (project / ".work/fetch").exists() and "Nothing to do" in pipeline(project, "repro").stdout
    shutil.rmtree(project / "data/corpus")
    (project / "data/mine.txt").write_text("keep me")
    done = pipeline(project, "repro")
    assert (done.returncode, done.stderr.split(":")[0]) == (2, "data/corpus")
    assert (project / "data/mine.txt").read_text() == "keep me"
    shutil.rmtree(project / "data")
    (project / "data.dvc").unlink()
    done = pipeline(project, "repro")
    assert done.returncode == 2 and done.stderr.startswith("data: no such folder, and no data.dvc")


def test_a_changed_parameter_starts_from_nothing(project):
    set_params(project, make=dict(pause=0.6))
    kill_at(project, "0.json", lambda family: family[0])
    set_params(project, make=dict(pause=0.0, scale=3.0))
    done = pipeline(project, "repro")
    assert done.returncode == 0 and "kept" not in done.stdout


def test_what_changes_no_byte_of_a_trial_keeps_all_that_is_done(project, capsys):
    path = project / "nbs/20_stage_make.ipynb"
    notebook(path, 'corpus = "c"\nitems = "i"\ncount = 1\nscale = 1.0\npause = 0.0\nscheduler = None\nskip_broken = False', MAKE)
    add_code(path, 'print("by", scheduler)\nif not skip_broken:\n    raise core.DataError("trial 6: broken; mend it")')
    write_sources(project)

    def run(**changes):
        set_params(project, make=dict(scheduler=None, skip_broken=False) | changes)
        with nullcontext() if changes.get("skip_broken") else pytest.raises(DataError, match="^trial 6: broken; mend it$"):
            run_stage(project, "make")
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("made", "kept", "by"))]

    made, kept = ([f"{word} {i}" for i in range(6)] for word in ("made", "kept"))
    assert run() == [*made, "by None"]
    assert run(scale=3.0) == [*made, "by None"]  # another trial
    assert run(scale=3.0, skip_broken=True, scheduler="tcp://host:8786") == [*kept, "by tcp://host:8786"]
    about = json.loads((project / "work/items/stage.json").read_text())["parameters"]
    assert about["skip_broken"] is True and about["scale"] == 3.0 and "scheduler" not in about
    assert not (project / ".work/make").exists()


def test_a_parameter_that_dvc_does_not_follow_is_refused(project):
    (project / "dvc.yaml").write_text(STAGES.replace("params: [make]", "params: [make.count, make.scale]"))
    with pytest.raises(DataError, match="^dvc.yaml: the params of stage make lack make.pause, so a change of it would run nothing; add it$"):
        check_params(project)
    (project / "dvc.yaml").write_text(STAGES.replace("params: [make]", "params: [make.count, make.scale, make.pause]"))
    check_params(project)


def kill_at(project: Path, item: str, choose) -> None:
    "Start `make repro`, kill one of its processes when an item is there, and see that all the others go too."
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    make = subprocess.Popen(["make", "-s", "-o", "env", "repro", f"VENV={sys.prefix}"], cwd=project,
                            env=environment(project, SAGE_NB_TEST=mark), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def family() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SAGE_NB_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda process: (process.create_time(), process.pid))

    try:
        wait_for(lambda: list((project / ".work/make").glob(f"*/items/{item}")))
        wait_for(lambda: choose(family())).send_signal(signal.SIGKILL)
        make.wait(60)
        wait_for(lambda: not family(), 15)
    finally:
        for process in family():
            process.kill()


def named(word: str):
    def choose(family: list[psutil.Process]) -> psutil.Process | None:
        for process in family:
            try:
                if word in " ".join(process.cmdline()):
                    return process
            except psutil.Error:  # it ended meanwhile
                continue

    return choose


def test_killed_again_and_again_the_run_ends_in_the_same_bytes(project):
    set_params(project, make=dict(pause=0.4, count=9))
    victims = [lambda family: family[0], named("sage_nb.pipeline repro"), named("dvc repro"), named("pipeline run make"),
               named("ipykernel"), named("LokyProcess")]  # make, the launcher, dvc, the runner, the kernel, a worker
    for i, choose in enumerate(victims):
        kill_at(project, f"{i}.json", choose)
        assert not (project / "work/items").exists()
    done = pipeline(project, "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"kept {i}\n" in done.stdout for i in range(6)) and "made 8" in done.stdout
    assert (project / "results/tables/table.csv").read_text() == f"title,total\nsquares,{float(sum(1 + 2 * i for i in range(9)))}\n"
    assert {path.name for path in (project / "work/items").iterdir()} == {*(f"{i}.json" for i in range(9)), "stage.json"}
    assert sorted(path.name for path in (project / ".work").iterdir()) == ["executed", "ipython", "log", "site"]


def test_verify_and_a_stage_apart(copied):
    project = copied
    assert pipeline(project, "verify").stderr.startswith("results: nothing of it is in git")
    (project / "results/record.txt").write_text("measured once")  # an input that lies among the results
    stages = STAGES.replace('"${paths.items}", "${paths.truth}"', '"${paths.items}", "${paths.truth}", results/record.txt')
    (project / "dvc.yaml").write_text(stages.replace("21_stage_report.ipynb]", "21_stage_report.ipynb, nbs/22_stage_aside.ipynb]", 1) + ASIDE)
    notebook(project / "nbs/22_stage_aside.ipynb", 'results = "results"\nscratch = "scratch"\nword = ""', ASIDE_CODE)
    set_params(project, aside=dict(word="once more"))
    done = pipeline(project, "repro")
    assert done.returncode == 0 and "Running stage 'report'" in done.stdout and "Running stage 'aside'" not in done.stdout
    done = pipeline(project, "repro", "aside")
    assert done.returncode == 2 and "only half; run again" in done.stderr and not (project / "results/aside").exists()
    done = pipeline(project, "repro", "aside")
    assert done.returncode == 0 and "kept half" in done.stdout and (project / "results/aside/said.txt").read_text() == "once more"
    assert not (project / ".work/aside").exists()
    commit(project)
    (project / "results/tables/stray.csv").touch()
    assert pipeline(project, "verify").stderr.startswith("results/tables/stray.csv: changed since the last commit")
    shutil.rmtree(project / "results/tables")  # as a verify that was killed leaves it
    done = pipeline(project, "verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified: every file of results/ and dvc.lock has the bytes that are committed" in done.stdout
    assert "Running stage 'make'" in done.stdout and "kept" not in done.stdout
    assert (project / "results/record.txt").read_text() == "measured once"
    assert "Running stage 'aside'" not in done.stdout and "results/aside: not rebuilt" in done.stdout
    assert (project / "results/aside/said.txt").read_text() == "once more"
    table, record = project / "results/tables/table.csv", project / "results/tables/arithmetic.json"
    table.write_text(table.read_text().replace("36.0", "36.01"))
    commit(project)
    done = pipeline(project, "verify")
    assert done.returncode == 1 and "NOT verified: rebuilt on the same arithmetic" in done.stdout and "table.csv" in done.stdout
    subprocess.run(["git", "checkout", "-q", "results", "dvc.lock"], cwd=project, check=True)
    record.write_text(record.read_text().replace('"torch sum": "', '"torch sum": "0'))
    commit(project)
    done = pipeline(project, "verify")
    assert done.returncode == 0 and "verified in part: the same files were made, and csv cells agree within 0.03" in done.stdout
    assert "figures not at all" in done.stdout
    subprocess.run(["git", "checkout", "-q", "results", "dvc.lock"], cwd=project, check=True)
    add_code(project / "nbs/21_stage_report.ipynb", 'core.write_text(f"{results}/tables/more.csv", "")')
    commit(project)
    done = pipeline(project, "verify")
    assert done.returncode == 1 and "results/tables/more.csv: was made, but is not committed" in done.stdout
