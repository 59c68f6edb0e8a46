"""Nothing of a closed corpus can be committed or pushed by accident: planted files, tried in scratch copies of the repository."""
import hashlib
import io
import json
import logging
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, commit, environment, pipeline
from test_pipeline import make_project, real_data, set_params

from sage_nb import efficiency
from sage_nb.core import write_json
from sage_nb.pipeline import bench, is_sample, provenance, read_params, read_stages, stage_parameters, write_sources

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")  # in DVC
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()

# Real data and what is made of them, by the names that they have or may be given ...
NAMES = """
4-30-1920x1080.mp4 video1.avi VIDEO2.MP4 clip.mkv clip.mov clip.webm sound.wav sound.m4a batch1.zip batch2.zip cropped_aligned_batch1.zip labels.rar corpus.tar.gz
cropped_aligned/4-30-1920x1080/00001.jpg cropped_aligned_new/video1_left/00002.jpg 00003.jpg 00004.JPG 00005.jpeg face.bmp face.webp
VA_Estimation_Challenge/Train_Set/4-30-1920x1080.txt VA_Estimation_Challenge/Validation_Set/video1_left.txt Train_Set/video2.txt video3.txt
test_set_example.txt submission.txt predictions.parquet evidence/runs.parquet features/4.safetensors model.safetensors features.npz va.npy va.pkl va.pt va.h5
labels.xlsx labels.tsv labels.mat Untitled.ipynb 31_stage_prepare-Copy1.ipynb 31_stage_prepare.nbconvert.ipynb .ipynb_checkpoints/31_stage_prepare-checkpoint.ipynb
affwild2.dvc face.pdf face.gif report.html .4.safetensors.77.part.safetensors core
""".split()
# ... and the places where they may come to lie; those marked + take tables and pictures of the sample, so the next names are not tried there
PLACES = ["", "data", "data/corpus", "data/corpus/videos", "data/corpus/annotations", "data/pretrain", "work", "work/prepared/corpus", "work/features/copies",
          "work/evidence", ".work", ".work/try/prepared", ".work/executed", "results-local", "results-local/figures", "Aff-Wild2", "Aff Wild 2/annotations",
          "real", "affwild2/videos", "nbs", "nbs/data", "nbs/.work", "sage_nb", "sage_nb/data", "tests", "tests/data", "docs", ".ci", ".dvc", ".dvc/cache/files/md5/00",
          ".dvc/tmp", "sample-remote", "sample-remote/files/md5/00", "results/features", "results+", "results/tables+", "results/figures+", "results/tuning+", "results/real"]
TABLES = "labels.csv subjects.csv comparison.csv index.json stage.json evidence.json clip.png notes.md clip.svg table.tex 4.py".split()


def git(folder, *arguments, check=True):
    return subprocess.run(["git", "-c", "user.name=test", "-c", "user.email=test@example.org", *arguments], cwd=folder, env=environment(folder),
                          capture_output=True, text=True, check=check)


def dvc(folder, *arguments):
    "DVC's command line, in this process: starting another takes a second."
    from dvc.cli import main

    out, log = io.StringIO(), logging.StreamHandler(io.StringIO())
    logging.getLogger("dvc").addHandler(log)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.chdir(folder)
        patch.setenv("DVC_SITE_CACHE_DIR", str(folder / ".work/site"))
        code = main(list(arguments))
    logging.getLogger("dvc").removeHandler(log)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), log.stream.getvalue())


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    "A copy of the repository with a small sample in the place of the sample, committed."
    folder = tmp_path_factory.mktemp("template") / "sage_nb"
    for name in TRACKED:
        if not name.startswith(("sample-remote/", "data.dvc", "dvc.lock")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in ("corpus/videos/tra001.mp4", "pretrain/videos/pre001.mp4", "truth/tra001.csv", "sample.json"):
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data" / name).write_text("{}\n")
    git(folder, "init", "-q", "-b", "main")
    assert dvc(folder, "add", "-q", "data").returncode == 0 and dvc(folder, "push", "-q", "-r", "sample", "data.dvc").returncode == 0
    record = yaml.safe_load((folder / "data.dvc").read_text())
    record["outs"][0].update(remote="sample", push=False)
    (folder / "data.dvc").write_text(yaml.safe_dump(record))
    git(folder, "add", "-f", "sample-remote")
    commit(folder)
    assert len(git(folder, "ls-files", "sample-remote").stdout.split()) == 2 and not git(folder, "status", "--porcelain").stdout
    return folder


@pytest.fixture
def checkout(template, tmp_path):
    return shutil.copytree(template, tmp_path / "sage_nb", symlinks=True)


def plant(folder: Path, *names: str) -> list[bytes]:
    "Write files of content that nothing else has."
    contents = []
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            contents.append(f"planted as {name}\n".encode())
            path.write_bytes(contents[-1])
    return contents


def assert_git_holds_none_of(folder: Path, contents: list[bytes], but: set[str] = frozenset()) -> None:
    "Neither the index nor any object, here and after a push; `but`: tracked files that have changed."
    names = [hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest() for content in contents]
    for repository in (folder, folder.parent / "pushed.git"):
        if repository is not folder:
            shutil.rmtree(repository, ignore_errors=True)
            git(folder, "init", "-q", "--bare", str(repository))
            git(folder, "push", "-q", "--mirror", str(repository))
        done = subprocess.run(["git", "cat-file", "--batch-check"], cwd=repository, input="\n".join(names), capture_output=True, text=True, check=True)
        assert [content for content, line in zip(contents, done.stdout.splitlines(), strict=True) if not line.endswith(" missing")] == []
    assert set(git(folder, "diff", "--name-only", "main~", "main", check=False).stdout.split()) <= but


def take_all(folder: Path) -> None:
    "All that a careless hand does."
    git(folder, "add", ".")
    git(folder, "add", "-A")
    git(folder, "add", "--all", ":/")
    git(folder, "commit", "-q", "-a", "--allow-empty", "-m", "all that is there")


def remote_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in (folder / "sample-remote").rglob("*") if path.is_file()}


# --- git

def test_planted_files_are_not_taken(checkout):
    "Every name in every place, at once."
    names = [f"{place.rstrip('+')}/{name}".lstrip("/") for place in PLACES for name in NAMES + TABLES * (not place.endswith("+"))]
    taken = {"sage_nb/4.py", "tests/4.py"}  # code
    contents = plant(checkout, *(name for name in names if name not in taken))
    assert len(contents) > 1500
    take_all(checkout)
    assert_git_holds_none_of(checkout, contents)
    assert not git(checkout, "status", "--porcelain").stdout


def test_a_planted_file_is_refused_by_name(checkout):
    names = ["data/corpus/videos/4.mp4", "00001.jpg", "batch1.zip", "nbs/Untitled.ipynb", "VA_Estimation_Challenge/Train_Set/4.txt", "work/features/4.safetensors",
             "results-local/figures/clip.png", "results/4.txt", "sample-remote/files/md5/00/11"]
    contents = plant(checkout, *names)
    for name in names:
        done = git(checkout, "add", name, check=False)
        assert done.returncode == 1 and "ignored by one of your .gitignore files" in done.stderr
    assert_git_holds_none_of(checkout, contents)


def test_a_link_to_the_corpus_is_not_taken(checkout, tmp_path):
    plant(tmp_path, "real/videos/4.mp4")
    for place in ("real", "Aff-Wild2", "nbs/real", "results/real", "data/real", "tests/real"):
        (checkout / place).symlink_to(tmp_path / "real")
    take_all(checkout)
    assert not git(checkout, "status", "--porcelain").stdout and str(tmp_path) not in git(checkout, "grep", "-l", "real", check=False).stdout
    assert git(checkout, "diff", "--name-only", "main~", "main").stdout == ""


def test_a_corpus_that_is_a_repository_is_not_taken(checkout):
    plant(checkout, "real/videos/4.mp4")
    git(checkout / "real", "init", "-q")
    git(checkout / "real", "add", "-A")
    git(checkout / "real", "commit", "-q", "-m", "mine")
    take_all(checkout)
    assert git(checkout, "diff", "--name-only", "main~", "main").stdout == ""


def refused_by_the_hook(folder: Path, *words: str) -> None:
    head = git(folder, "rev-parse", "HEAD").stdout
    done = git(folder, "commit", "-a", "-m", "all that is there", check=False)
    assert done.returncode == 1 and done.stderr.startswith("pre-commit: ") and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words) and git(folder, "rev-parse", "HEAD").stdout == head
    git(folder, "reset", "-q")


def test_the_hook_refuses_notebooks_with_outputs_and_what_was_forced(checkout):
    for _ in range(2):
        assert subprocess.run(["make", "-s", "hook"], cwd=checkout, env=environment(checkout), capture_output=True, text=True).stderr == ""
    path = checkout / "nbs/31_stage_prepare.ipynb"
    source, executed = path.read_text(), json.loads(path.read_text())
    executed["cells"][-1]["outputs"] = [dict(output_type="display_data", metadata={}, data={"image/png": "a face"})]
    path.write_text(json.dumps(executed))
    refused_by_the_hook(checkout, "nbs/31_stage_prepare.ipynb: holds outputs", "clear them")
    path.write_text(source)
    shutil.copy(path, checkout / "nbs/50_mine.ipynb")
    (checkout / "nbs/50_mine.ipynb").write_text(json.dumps(executed))
    git(checkout, "add", "-A")
    refused_by_the_hook(checkout, "nbs/50_mine.ipynb: holds outputs")
    (checkout / "nbs/50_mine.ipynb").unlink()
    for name in ("data/corpus/videos/4.mp4", "a b/ü.txt", "sample-remote/files/md5/00/11", "nbs/Untitled.ipynb"):
        plant(checkout, name)
        git(checkout, "add", "-f", name)
        refused_by_the_hook(checkout, f"{name}: .gitignore keeps this out")
    plant(checkout, "tests/test_more.py")
    (checkout / "README.md").unlink()
    git(checkout, "add", "-A")
    assert git(checkout, "commit", "-q", "-m", "code").returncode == 0  # all else goes through
    assert git(checkout, "show", "--name-status", "--format=").stdout == "D\tREADME.md\nA\ttests/test_more.py\n"


def test_the_hook_says_nothing_of_a_commit_that_adds_nothing(checkout):
    assert subprocess.run(["make", "-s", "hook"], cwd=checkout, env=environment(checkout), capture_output=True, text=True).stderr == ""
    (checkout / "README.md").unlink()
    for arguments in (["-a", "-m", "one file less"], ["--amend", "-m", "in other words"], ["--allow-empty", "-m", "nothing"]):
        done = git(checkout, "commit", "-q", *arguments, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), arguments
    assert git(checkout, "log", "--format=%s").stdout.splitlines()[:2] == ["nothing", "in other words"]


def test_a_hook_that_is_there_stays_and_none_is_put_elsewhere(checkout, tmp_path):
    hook = checkout / ".git/hooks/pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("mine")
    (inner := checkout / "inner").mkdir()
    shutil.copy(checkout / "Makefile", inner)
    for folder in (checkout, inner, Path(shutil.copytree(inner, tmp_path / "elsewhere"))):  # the second lies in another repository, the third in none
        assert subprocess.run(["make", "-s", "hook"], cwd=folder, env=environment(folder), capture_output=True, text=True).stderr == ""
        assert hook.read_text() == "mine" and not (folder / ".git/hooks/pre-commit").exists() or folder == checkout


# --- dvc

def add_stages(checkout: Path) -> list[bytes]:
    "Something planted in every output of every stage, and in DVC's hands as if the stages had run."
    stages = read_stages(checkout, read_params(checkout)["paths"])
    shutil.copytree(checkout / "nbs", checkout / "work/sources")
    contents = plant(checkout, *(f"{out}/{name}" for stage in stages.values() for out in stage["cached"] for name in ("4.safetensors", "index.json")))
    done = dvc(checkout, "commit", "-q", "-f")
    assert done.returncode == 0, done.stderr
    locked = yaml.safe_load((checkout / "dvc.lock").read_text())["stages"]
    assert set(locked) == {"sources", *stages}
    return contents


def test_what_stages_make_goes_to_no_remote(checkout):
    before, contents = remote_files(checkout), add_stages(checkout)
    cached = {path.parent.name + path.name for path in (checkout / ".dvc/cache/files/md5").rglob("*") if path.is_file()}
    assert {hashlib.md5(content).hexdigest() for content in contents} <= cached  # so there is something to push
    refused = dvc(checkout, "push")
    assert refused.returncode == 1 and "no remote specified" in refused.stderr
    for arguments in ([], ["work/features/4.safetensors"]):
        done = dvc(checkout, "push", "-r", "sample", *arguments)
        assert "pushed" not in done.stdout and remote_files(checkout) == before, (arguments, done.stdout)
    assert dvc(checkout, "push", "-r", "sample", "--run-cache").returncode == 0
    more = remote_files(checkout) - before
    assert all(name.startswith("sample-remote/runs/") for name in more)  # which hashes came of which
    take_all(checkout)
    dvc(checkout, "push", "-r", "sample", "--all-commits")
    assert remote_files(checkout) == before | more
    assert_git_holds_none_of(checkout, contents, but={"dvc.lock"})
    assert "planted" not in (lock := (checkout / "dvc.lock").read_text()) and "safetensors" not in lock


def test_every_output_is_in_git_or_kept_from_remotes():
    for stage, entry in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items():
        for out in entry["outs"]:
            [(path, about)] = out.items()
            assert about == (dict(cache=False) if path.startswith("${paths.results}/") else dict(push=False)), (stage, path)


def test_a_folder_in_the_repository_is_not_added(checkout):
    contents = plant(checkout, "real/videos/4.mp4", "data/real/00001.jpg")
    before = remote_files(checkout)
    for arguments in (["real"], ["--to-remote", "-r", "sample", "-o", "other", "real"]):
        done = dvc(checkout, "add", *arguments)
        assert done.returncode == 1 and "git-ignored" in done.stderr
    assert dvc(checkout, "push", "-r", "sample").returncode == 0 and remote_files(checkout) == before
    take_all(checkout)
    assert_git_holds_none_of(checkout, contents)


def replace_data(checkout: Path) -> list[bytes]:
    shutil.rmtree(checkout / "data")
    return plant(checkout, "data/corpus/videos/4-30-1920x1080.mp4", "data/corpus/VA_Estimation_Challenge/Train_Set/4-30-1920x1080.txt", "data/corpus/cropped_aligned/4/00001.jpg")


def test_the_corpus_in_the_place_of_the_sample_is_not_pushed(checkout):
    before, contents = remote_files(checkout), replace_data(checkout)
    assert dvc(checkout, "add", "-q", "data").returncode == 0
    [out] = yaml.safe_load((checkout / "data.dvc").read_text())["outs"]
    assert set(out) == {"md5", "size", "nfiles", "hash", "path", "remote", "push"} and out["push"] is False and out["nfiles"] == 3
    for arguments in ([], ["data.dvc"]):
        done = dvc(checkout, "push", "-r", "sample", *arguments)
        assert "pushed" not in done.stdout and remote_files(checkout) == before, arguments
    take_all(checkout)
    assert_git_holds_none_of(checkout, contents, but={"data.dvc"})


def test_what_is_pushed_by_force_stays_out_of_git(checkout):
    "A data.dvc written anew has lost what keeps it from the remote inside the repository. What goes there is seen by nobody."
    before, contents = remote_files(checkout), replace_data(checkout)
    (checkout / "data.dvc").unlink()
    assert dvc(checkout, "add", "-q", "data").returncode == 0 and dvc(checkout, "push", "-r", "sample").returncode == 0
    assert len(remote_files(checkout) - before) == 4
    take_all(checkout)
    assert_git_holds_none_of(checkout, contents, but={"data.dvc"})
    assert set(git(checkout, "ls-files", "sample-remote").stdout.split()) == before


def test_naming_a_scheduler_makes_nothing_stale(checkout, monkeypatch):
    from dvc.repo import Repo

    add_stages(checkout)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(checkout / ".work/site"))
    monkeypatch.chdir(checkout)
    text = (checkout / "params.yaml").read_text()

    def stale(old: str, new: str) -> set[str]:
        assert text.count(old) == 1
        (checkout / "params.yaml").write_text(text.replace(old, new))
        return set(Repo(str(checkout)).status())

    assert stale("&scheduler null", "&scheduler tcp://host:8786") == set()
    assert stale("&detect_every 5", "&detect_every 4") == {"prepare", "corrupt", "replicate"}
    assert stale("skip_broken: false  # true: a trial", "skip_broken: true  # true: a trial") == {"prepare", "replicate"}
    assert stale("skip_broken: false  # true: one", "skip_broken: true  # true: one") == {"encode"}
    assert stale("  visual: {}", "  visual: {encoder: ir50, weights: w}") == {"pretrain", "replicate"}


# --- results

@pytest.mark.parametrize("name, measured", [("videos/tra002.mp4", True), ("videos/4-30-1920x1080.mp4", False)])
def test_a_closed_corpus_is_not_measured_into_what_git_takes(tmp_path, monkeypatch, name, measured):
    plant(tmp_path, "data/corpus/videos/tra001.mp4", "data/sample.json", f"data/corpus/{name}", "real/corpus/videos/4.mp4")
    given = []
    monkeypatch.setattr(efficiency, "write_extraction", lambda path, corpus, scratch: given.append(corpus))
    monkeypatch.setattr(efficiency, "extraction_text", str)
    for corpus in ("data/corpus", "real/corpus", str(tmp_path / "real/corpus"), "data/none"):
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(dict(paths=dict(corpus=corpus))))
        bench(tmp_path, "extraction")
    assert given == [tmp_path / "data/corpus" if measured else None, None, None, None]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    "A toy project whose work/ was made of a corpus that is not a sample."
    project = make_project(tmp_path_factory.mktemp("made") / "project")
    real_data(project, "results-local")
    (project / "work/no-truth").mkdir(parents=True)
    write_sources(project)
    stage = read_stages(project, read_params(project)["paths"])["make"]
    write_json(project / "work/items/0.json", 1.0)
    write_json(project / "work/items/stage.json", provenance(project, "make", stage["deps"], stage_parameters(project, "make", project / stage["notebook"])))
    return project


@pytest.mark.parametrize("corpus", ["real", "sample"])
def test_results_are_refused_by_what_they_were_made_of_however_a_stage_is_called(made, tmp_path, corpus):
    "The parameters name the real corpus, or the sample again, while work/ is of the real one."
    project = shutil.copytree(made, tmp_path / "project")
    real_data(project, "results") if corpus == "real" else set_params(project)
    for command in (["-m", "sage_nb.pipeline", "run", "report"], ["-m", "dvc", "repro", "-s", "report"]):
        done = subprocess.run([sys.executable, *command], cwd=project, env=environment(project), capture_output=True, text=True)
        assert done.returncode != 0 and "params.yaml: paths.results is results, where git would take" in done.stderr, (command, done.stderr)
        assert not (project / "results").exists()


@pytest.mark.parametrize("name", ["videos/4-30-1920x1080.mp4", "videos/tra01.avi", "VA_Estimation_Challenge/Train_Set/4.txt", "cropped_aligned/4/00001.JPG", "batch1.zip"])
def test_a_corpus_copied_over_the_sample_is_no_sample(tmp_path, name):
    plant(tmp_path, "data/corpus/videos/tra001.mp4", "data/corpus/VA_Estimation_Challenge/Train_Set/tra001_left.txt", "data/corpus/subjects.csv",
          "data/corpus/test_set_example.txt", "data/sample.json", f"real/{name}")
    assert is_sample(tmp_path, {"corpus": "data/corpus"})
    (tmp_path / "data/corpus/more").symlink_to(tmp_path / "real")
    assert not is_sample(tmp_path, {"corpus": "data/corpus"})


def test_the_sample_is_one():
    assert is_sample(ROOT, read_params(ROOT)["paths"])


def test_results_beside_a_corpus_copied_over_the_sample_are_refused(tmp_path):
    project = make_project(tmp_path / "project")
    plant(project, "data/corpus/videos/4-30-1920x1080.mp4")
    done = pipeline(project, "repro")
    assert done.returncode == 2 and done.stderr.startswith("params.yaml: paths.results is results, where git would take") and not (project / "work").exists()


# --- what is in git

KINDS = {"py": 200_000, "css": 10_000, "ipynb": 200_000, "md": 60_000, "csv": 60_000, "tex": 60_000, "json": 3_000_000, "svg": 1_500_000, "png": 600_000, "yaml": 20_000, "lock": 60_000, "toml": 5_000,
         "ini": 5_000, "cff": 5_000, "dvc": 1_000, "": 20_000}


def test_what_is_tracked_is_of_a_known_kind_and_size():
    for name in TRACKED:
        if not name.startswith("sample-remote/"):
            kind = Path(name).suffix.lstrip(".")
            assert kind in KINDS and (ROOT / name).stat().st_size <= KINDS[kind], name
            assert (ROOT / name).is_file() and not (ROOT / name).is_symlink(), name


def test_gitignore_names_all_that_is_tracked():
    done = subprocess.run(["git", "check-ignore", "--no-index", "--stdin"], cwd=ROOT, input="\n".join(TRACKED), capture_output=True, text=True)
    assert {name for name in done.stdout.splitlines() if not name.startswith("sample-remote/")} == set()


def test_gitignore_names_all_that_the_pipeline_writes_to_results():
    done = git(ROOT, "status", "--porcelain", "--ignored", "--untracked-files=all", "results")
    assert [line for line in done.stdout.splitlines() if line.startswith("!!") and "/." not in line] == []


def test_tables_and_figures_in_git_are_of_samples():
    alone = {"results/tables/arithmetic.json", "results/tuning/tuning.csv"}
    results = {name for name in TRACKED if name.startswith("results/") and name.count("/") == 2} - alone
    sources = {name: json.loads((ROOT / name).read_text()) for name in results if name.endswith(".provenance.json")}
    assert {re.sub(r"(\.provenance)?\.\w+$", "", name) for name in results} == {name.removesuffix(".provenance.json") for name in sources}
    for name, about in sources.items():
        corpora = {path for stage in about["stages"].values() for key, path in stage["parameters"].items() if key in ("corpus", "pretrain")}
        assert corpora <= {"data/corpus", "data/pretrain"}, name


def test_the_sample_remote_holds_what_data_dvc_names_and_nothing_else():
    objects = ROOT / "sample-remote/files/md5"
    [out] = yaml.safe_load((ROOT / "data.dvc").read_text())["outs"]
    files = json.loads((objects / out["md5"][:2] / out["md5"][2:]).read_text())
    named = {out["md5"], *(file["md5"] for file in files)}
    assert {name for name in TRACKED if name.startswith("sample-remote/")} == {f"sample-remote/files/md5/{name[:2]}/{name[2:]}" for name in named}
    assert len(files) == out["nfiles"] and all(re.fullmatch(r"(sample\.json|(corpus|pretrain|truth)/(\w+/)*((pre|tra|val|tes)\d{3}(_left|_right)?|subjects|test_set_example)\.\w{3})",
                                                            file["relpath"]) for file in files)
