"""JupyterLab as readers use it: a real server as `make lab` starts it, notebooks opened in a browser and run from its menu."""
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from browser import context, page  # noqa: F401
from conftest import ROOT, environment

COMMAND = 'exec jupyter lab --ServerApp.root_dir="{}" nbs/index.ipynb'


PATIENCE = 600  # seconds; far more than anything takes, for machines that do other things as well


class Lab:
    "A JupyterLab server on a copy of the project, with settings and files of its own, so that nothing is saved into the project."

    def __init__(self, folder: Path):
        self.folder = folder / "project"
        for name in ("nbs", "sage_nb", "results"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"))
        shutil.copy(ROOT / "params.yaml", self.folder / "params.yaml")
        own = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
        own |= {f"JUPYTERLAB_{name}_DIR": str(folder / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
        options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=reader", "--LabApp.news_url=",
                   "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.extension_manager=readonly"]
        command = " ".join([COMMAND.format(self.folder), *options])
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(["sh", "-c", command], cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
                                            env=environment(self.folder, IPYTHONDIR=str(folder / "ipython"), OMP_NUM_THREADS="1", **own))
        self.port = self._port(folder)

    def _port(self, folder: Path) -> int:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self.process.poll() is None:
            for path in (folder / "runtime").glob("jpserver-*.json"):
                if text := path.read_text():
                    return json.loads(text)["port"]
            time.sleep(0.1)
        raise AssertionError((folder / "log").read_text())

    def address(self, notebook: str) -> str:
        return f"http://127.0.0.1:{self.port}/lab/tree/nbs/{notebook}?reset&token=reader"

    def processes(self) -> list[psutil.Process]:
        server = psutil.Process(self.process.pid)
        return [server, *server.children(recursive=True)]

    def end(self, how: signal.Signals) -> list[psutil.Process]:
        "End the server; processes that are still there half a minute later."
        processes = self.processes()
        self.process.send_signal(how)
        self.process.wait(30)
        return psutil.wait_procs(processes, timeout=30)[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    if lab.process.poll() is None:
        lab.end(signal.SIGTERM)


def open_notebook(lab: Lab, page, notebook: str) -> None:
    "Open a notebook and wait for its kernel: the indicator in its toolbar says idle before there is one, the bar at the bottom does not."
    page.set_default_timeout(PATIENCE * 1000)
    page.faults = []
    page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("requestfailed", lambda request: page.faults.append(request.url))
    page.goto(lab.address(notebook))
    page.locator(".jp-NotebookPanel:visible").wait_for()
    page.locator(".jp-StatusBar-Widget", has_text="Python 3 (ipykernel) | Idle").wait_for()


def choose(page, menu: str, item: str) -> None:
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{menu}$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{item}$")).click()


def run_all(lab: Lab, page, notebook: str) -> list[dict]:
    "Run all cells from the menu, wait for the kernel, save from the menu; the code cells that were saved."
    open_notebook(lab, page, notebook)
    choose(page, "Run", "Run All Cells")
    path, until = lab.folder / "nbs" / notebook, time.monotonic() + PATIENCE
    while True:
        page.wait_for_timeout(500)
        page.locator(".jp-StatusBar-Widget", has_text="Python 3 (ipykernel) | Idle").wait_for()
        choose(page, "File", "Save Notebook")  # the file says of every cell what readers find, also of those far from the screen
        page.wait_for_timeout(500)
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        errors = [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
        assert not errors, "\n".join(errors[0]["traceback"])
        if all(cell["execution_count"] for cell in cells):
            return cells
        assert time.monotonic() < until, f"{notebook}: not finished"


def ours(page) -> list[str]:
    "Faults, without what JupyterLab does by itself: it asks for a picture by the notebook's own link, breaks off, and fetches it from the files."
    return [fault for fault in page.faults if "/lab/tree/results/" not in fault]


def test_make_lab_is_what_is_tested_here():
    recipe = (ROOT / "Makefile").read_text().split("\nlab: env\n")[1].split("\n\n")[0]
    assert recipe.strip().removeprefix("@") == COMMAND.format("$(CURDIR)")


@pytest.mark.parametrize("notebook", ["06_interaction", "11_sage", "16_evaluation", "24_your_own_features"])  # 07: below
def test_a_notebook_runs_from_the_menu(lab, page, notebook):
    cells = run_all(lab, page, f"{notebook}.ipynb")
    assert any(cell["outputs"] for cell in cells) and ours(page) == []


def test_a_slider_redraws_its_picture_and_a_still_one_stands_below(lab, page):
    cells = run_all(lab, page, "07_reliability.ipynb")
    stills = [output["data"]["image/png"].replace("\n", "") for cell in cells for output in cell["outputs"] if "image/png" in output.get("data", {})]
    slider = page.locator(".widget-slider [role=slider]").first
    slider.scroll_into_view_if_needed()
    moving = page.locator(".widget-output img")
    before = moving.get_attribute("src")
    assert before.split(",")[1].replace("\n", "") in stills  # they begin alike
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("before => document.querySelector('.widget-output img')?.src != before", arg=before)
    assert ours(page) == []


def test_the_index_opens_with_its_pictures_and_leads_on(lab, page):
    cells = run_all(lab, page, "index.ipynb")
    assert any("text/markdown" in output.get("data", {}) for cell in cells for output in cell["outputs"])  # the main table
    shown = page.evaluate("[...document.querySelectorAll('.jp-RenderedMarkdown img')].map(img => img.naturalWidth)")
    assert shown and all(width > 0 for width in shown)
    page.locator(".jp-RenderedMarkdown a", has_text="00 core").first.click()
    page.locator(".jp-NotebookPanel:visible h1", has_text="The ground floor").wait_for()
    assert ours(page) == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_ends_leaves_no_process(tmp_path, page, how):
    lab = Lab(tmp_path)
    open_notebook(lab, page, "06_interaction.ipynb")
    assert len(lab.processes()) > 1  # a kernel
    assert lab.end(how) == []
