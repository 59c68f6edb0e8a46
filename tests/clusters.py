"""For tests of spread work: scripts that can be killed, and a Dask cluster on this machine whose processes can be."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, environment
from joblib.externals.loky import ProcessPoolExecutor

from sage_nb import core

PIN = "from sage_nb.core import pin_arithmetic; pin_arithmetic()"


@pytest.fixture(autouse=True)
def bounded():
    "No test of a file that imports this can hang."
    def ring(*_):
        raise TimeoutError("the test took too long")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def wait_for(condition, seconds: float = 60.0):
    "The first true value of a condition."
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return value


def contents(folder: Path) -> dict[str, bytes]:
    "Name and bytes of everything in a folder."
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def script(folder: Path, code: str) -> subprocess.Popen:
    "Python in a process group of its own, in which Ctrl-C works; `family` finds whatever it started."
    code = (f"import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
            f"import tasks\nfrom sage_nb import core\n{code}")
    return subprocess.Popen([sys.executable, "-c", code], env=environment(ROOT, SAGE_NB_TEST=str(folder)), cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def family(folder: Path) -> list[psutil.Process]:
    "The processes of the script that runs in a folder."
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SAGE_NB_TEST") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def said(text: str) -> str:
    "Standard error without the progress lines that a slow machine sees."
    return re.sub(r"^\w+: \d+ of \d+, \d+ s\n", "", text, flags=re.M)


class Cluster:
    "A scheduler, at first without workers; `address` is where it listens."

    def __init__(self, folder: Path, **settings: str):  # for scratch; settings of Dask as environment variables
        self.folder, self.settings, self.processes = folder, settings, []
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "scheduler.json"
        self.scheduler = self._start("scheduler", "--port", "0", "--scheduler-file", str(file))
        self._wait_for(lambda: file.exists() and file.read_text())
        self.address = json.loads(file.read_text())["address"]

    def _start(self, kind: str, *arguments: str, pythonpath: str = f"{ROOT}:{ROOT / 'tests'}") -> subprocess.Popen:
        own = {name: value for name, value in os.environ.items() if name not in core._PINNED}
        with (self.folder / "log").open("a") as log:
            process = subprocess.Popen([sys.executable, "-m", f"distributed.cli.dask_{kind}", "--host", "127.0.0.1", "--no-dashboard", *arguments],
                                       stdout=log, stderr=log, cwd=self.folder, env={**own, **self.settings, "PYTHONPATH": pythonpath},
                                       preexec_fn=partial(core.die_with_parent, os.getpid()))
        self.processes.append(process)
        return process

    def _wait_for(self, condition) -> None:
        try:
            wait_for(condition)
        except AssertionError:
            raise AssertionError((self.folder / "log").read_text()) from None

    def add_worker(self, pin: bool = True, **options) -> subprocess.Popen:
        "Start a worker, one nanny and one thread, as the notebook tells; it has joined when this returns."
        from distributed import Client

        name = f"worker-{len(self.processes)}"
        worker = self._start("worker", "--name", name, "--nthreads", "1", "--local-directory", str(self.folder),
                             *(["--preload-nanny", PIN] if pin else []), self.address, **options)
        with Client(self.address, set_as_default=False) as client:
            self._wait_for(lambda: name in [other["name"] for other in client.scheduler_info(n_workers=-1)["workers"].values()])
            if pin:
                client.run(core.arithmetic)  # imports torch: from now on it is as quick as the others
        return worker

    @staticmethod
    def kill(process: subprocess.Popen) -> None:
        "SIGKILL for a nanny and for the process that works."
        working = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in working:
            child.kill()
        process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            if process.poll() is None:
                self.kill(process)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    "A scheduler and one worker; a task may kill two."
    with Cluster(tmp_path_factory.mktemp("cluster"), DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="1") as cluster:
        cluster.add_worker()
        yield cluster


@pytest.fixture(scope="module")
def pinned():
    "Submit calls to a process whose arithmetic is pinned, as that of a stage is."
    pool = ProcessPoolExecutor(1, env=core._PINNED, initializer=core._start_worker, initargs=(os.getpid(),))
    yield pool.submit
    pool.shutdown(kill_workers=True)
