"""What several test files share: the project's folder, and commands run the way a user would."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sage_nb.evaluation import simulate_evidence

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


def environment(folder: Path, **more: str) -> dict[str, str]:
    "For commands run in a copy of the project: its own package, and nothing left behind outside of it."
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SAGE_NB", "DVC", "GIT_"))}
    return {**own, "PYTHONPATH": str(folder), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DVC_SITE_CACHE_DIR": str(folder / ".work/site"), **more}


def pipeline(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    "Run `python -m sage_nb.pipeline`."
    return subprocess.run([sys.executable, "-m", "sage_nb.pipeline", *arguments], cwd=folder, env=environment(folder),
                          capture_output=True, text=True)


def commit(folder: Path) -> None:
    "Make the folder a git repository, if need be, and commit all that is in it."
    for command in (["init", "-q", "-b", "main"], ["add", "-A"],
                    ["-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-q", "-m", "test"]):
        subprocess.run(["git", *command], cwd=folder, check=True, env=environment(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evidence")


@pytest.fixture(scope="module")
def evidence(folder):
    "Simulated evidence of two seeds, in a folder of the module's own."
    return simulate_evidence(folder / "evidence", seeds=[0, 1], trials=8, frames=240)


LONGEST = ("test_endtoend.py", "test_pipeline.py", "test_efficiency.py")  # begun first, so that no worker is left alone with one of them


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
