"""`make docs`: the notebooks, with outputs, and the reference of the package as a static site in `_site/`.

Pages are put together in `.work/docs/source` from notebooks and modules, and Sphinx makes the site of them. A notebook is executed once and kept by
the content of what it depends on. A stage's notebook comes with the outputs of `make repro`, if that has run on what is here now."""
from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

sys.path.insert(0, str(Path(__file__).parent))
from reference import Module, anchor, find_examples, read_module, render_module
from sage_nb import core, pipeline
from sage_nb.core import DataError

LINK = re.compile(r'(\]\(|src="|href=")(?![a-z]+:|#)([^)"\s]+)')  # to another file
REPORT = "results/report.html"
HIDDEN = {"hide", "default_exp"}  # directives of cells that are not shown


# --- notebooks

def is_stage(path: Path) -> bool:
    return bool(re.match(r"\d\d_stage_", path.name))


def sources(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def reading_minutes(path: Path) -> tuple[float, float]:
    "Minutes for prose and demonstrations, and for exported code, at 220 words or 40 lines of code a minute; hidden cells are not counted."
    words, shown, exported = 0, 0, 0
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        directives = set(re.findall(r"(?m)^#\| *(\w+)", source))
        lines = sum(bool(line.strip()) and not line.startswith("#|") for line in source.splitlines())
        if cell["cell_type"] == "markdown":
            prose, *blocks = re.sub(r"(?s)```.*?```", "", source), *re.findall(r"(?s)```.*?```", source)
            words += len(prose.split())
            shown += sum(len(block.splitlines()) - 2 for block in blocks)
        elif "export" in directives:
            exported += lines
        elif cell["cell_type"] == "code" and not directives & (HIDDEN | {"echo"}):
            shown += lines
    return words / 220 + shown / 40, exported / 40


def execution_key(root: Path, path: Path) -> str:
    "What a notebook's outputs depend on: its source, the modules it reaches, the environment; and results and runs, or the whole package, if it names them."
    cells, package = sources(path), root / "sage_nb"
    code = "\n".join(cells)
    modules = sorted(package.glob("*.py")) if "subprocess" in code else [package / f"{name}.py" for name in sorted(pipeline.import_closure(path, package))]
    rest = [root / name for name in ("requirements.lock", "params.yaml")]
    if "results" in code and (root / "results").is_dir():
        rest.append(root / "results")
    return core.value_hash([cells, core.content_hash(*modules, *rest), "work" in code and sorted(map(str, (root / "work").glob("runs/*/stage.json")))])


def execute(task: tuple[Path, Path, Path]) -> None:
    "Execute a notebook the way `nbdev_test` does, in its own folder, and keep the copy."
    root, path, copy = task
    try:
        with pipeline._arithmetic_pinned(root):
            pipeline.execute(path, copy.with_suffix(".part.ipynb"), {}, path.parent)
    except SystemExit:
        raise DataError(f"nbs/{path.name}: a cell failed, see above; mend it and run again") from None
    os.replace(copy.with_suffix(".part.ipynb"), copy)


def executed(root: Path, notebooks: list[Path], workers: int = 0) -> dict[str, Path]:
    "Name -> executed copy, made where it is not there yet; copies that nothing uses any more are removed."
    folder = root / ".work/docs/executed"
    folder.mkdir(parents=True, exist_ok=True)
    copies = {path.stem: folder / f"{path.stem}-{execution_key(root, path)}.ipynb" for path in notebooks if not is_stage(path)}
    tasks = [(root, path, copies[path.stem]) for path in notebooks if path.stem in copies and not copies[path.stem].is_file()]
    core.parallel_map(execute, tasks, workers, title="executing notebooks")
    for stale in set(folder.iterdir()) - set(copies.values()):
        stale.unlink()
    return copies


def stage_copies(root: Path) -> dict[str, Path]:
    "Name -> copy of a stage's notebook that `make repro` left, if its source and parameters are those of now and all it read is the sample."
    params = pipeline.read_params(root)
    if not pipeline.is_sample(root, params.get("paths", {})):
        return {}
    found = {}
    for stage, entry in pipeline.read_stages(root, params["paths"]).items():
        notebook, copy, record = root / "nbs" / Path(entry["notebook"]).name, root / ".work/executed" / f"{stage}.ipynb", root / ".work/executed" / f"{stage}.json"
        read = entry["deps"] + [path for path in entry["also"] if (root / path).exists()]
        try:
            now = pipeline.provenance(root, stage, read, {name: value for name, value in pipeline.stage_parameters(root, stage, notebook).items() if name != pipeline.WORKERS})
        except DataError:  # something it reads is not there
            continue
        if copy.is_file() and record.is_file() and core.read_json(record) == json.loads(json.dumps(now)):
            found[notebook.stem] = copy
    return found


def page(root: Path, path: Path, copy: Path | None, api: str | None) -> dict:
    "A notebook as the site shows it: without hidden cells and directives, links from the top of the site, a line below the title that leads on."
    node = json.loads((copy or path).read_text(encoding="utf-8"))
    cells, titled = [], False
    for cell in node["cells"]:
        source = "".join(cell["source"])
        directives = set(re.findall(r"(?m)^#\| *(\w+)", source))
        if cell["cell_type"] == "raw" or directives & HIDDEN and not _shows(cell):
            continue
        source = re.sub(r"(?m)^#\|.*\n?", "", source)
        if cell["cell_type"] == "markdown":
            source = LINK.sub(lambda match: match[1] + os.path.normpath(f"nbs/{match[2]}").removeprefix("nbs/"), source)
            source = re.sub(rf"\[([^\]]*)\]\(({REPORT})\)", r'<a href="\2">\1</a>', source)  # a page of its own, which Sphinx does not know
            if not titled:
                source, titled = re.sub(r"\A(# .*)\n?", lambda match: f"{match[1]}\n\n{_lead(path, copy, api)}\n", source), True
        else:
            cell["outputs"] = [output for output in map(_still, cell["outputs"]) if output]
            cell["metadata"] = {"tags": ["remove-input"]} if "echo: false" in "".join(cell["source"]) or directives & HIDDEN else {}
        cells.append({**cell, "source": source})
    return {**node, "cells": cells, "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}}


def _shows(cell: dict) -> bool:
    "Whether a hidden cell has drawn something for readers."
    return any(kind.startswith(("image/", "text/markdown", "text/html")) for output in cell.get("outputs", ()) for kind in output.get("data", {}))


def _still(output: dict) -> dict | None:
    "The output without what needs a kernel; None where nothing is left. What widgets show is shown by the static picture under them."
    if "data" not in output:
        return output
    data = {kind: value for kind, value in output["data"].items() if "widget" not in kind}
    return {**output, "data": data} if len(data) == len(output["data"]) else None


def _lead(path: Path, copy: Path | None, api: str | None) -> str:
    minutes, more = map(round, reading_minutes(path))
    parts = [f"Notebook `nbs/{path.name}`", f"{max(minutes, 1)} min to read" + (f" and {more} min for its exported code" if more else "")]
    if api:
        parts.append(f"reference of its module: [sage_nb.{api}](api/{api}.md)")
    if is_stage(path) and copy is None:
        parts.append("shown without outputs, because `make repro` has not run here on what is here now")
    return "*" + "; ".join(parts) + "*"


def sections(path: Path) -> dict[str, tuple[str, str]]:
    "Cell -> title and anchor of the section that it stands in."
    found, seen, here = {}, {}, ("", "")
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            for title in re.findall(r"(?m)^#{1,4} +(.+?) *$", re.sub(r"(?s)```.*?```", "", "".join(cell["source"]))):
                title = title.replace("`", "")
                seen[title] = seen.get(title, -1) + 1
                here = (title, anchor(title) + (f"-{seen[title]}" if seen[title] else ""))
        found[cell["id"]] = here
    return found


# --- the source of the site

def broken_links(root: Path) -> list[str]:
    "Links of notebooks to files that the repository does not hold."
    tracked = set(pipeline._git(root, "ls-files", "--cached", "--others", "--exclude-standard").split("\n"))
    return [f"nbs/{path.name}: links to {link}, which is not in the repository" for path in sorted((root / "nbs").glob("*.ipynb"))
            for link in linked(path) if link not in tracked]


def linked(path: Path) -> list[str]:
    "Files, from the root of the repository, that the prose of a notebook links to."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return [os.path.normpath(f"nbs/{unquote(link.split('#')[0])}") for _, link in LINK.findall(re.sub(r"(?s)```.*?```|`[^`\n]*`", "", prose))]


def write_source(root: Path, source: Path, copies: dict[str, Path]) -> None:
    "Write all that Sphinx reads: pages of notebooks, of modules, and the files that they link to."
    shutil.rmtree(source, ignore_errors=True)
    modules = {path.stem: read_module(path) for path in sorted((root / "sage_nb").glob("[a-z]*.py"))}
    notebooks = sorted((root / "nbs").glob("*.ipynb"))
    told_in = {module.notebook: name for name, module in modules.items()}
    examples = find_examples(root)
    known = {entry.name: f"sage_nb.{name}" for name, module in modules.items() for entry in module.entries}
    for path in notebooks:
        core.write_json(source / path.name, page(root, path, copies.get(path.stem), told_in.get(path.stem)))
    for name, module in modules.items():
        core.write_text(source / f"api/{name}.md", render_module(module, known, sections(root / f"nbs/{module.notebook}.ipynb"), examples))
    core.write_text(source / "api/index.md", _overview(modules))
    for path in notebooks:
        for link in linked(path):
            _bring(root, source, link)
    for uses in examples.values():
        for test in {f"tests/{use.test}" for use in uses[:1] if use.test}:
            _bring(root, source, test)
    _add_contents(source, notebooks)


def _overview(modules: dict[str, Module]) -> str:
    ordered = sorted(modules.values(), key=lambda module: module.notebook)
    rows = [f"| [sage_nb.{module.name}]({module.name}.md) | {module.doc.splitlines()[0] if module.doc else ''} |" for module in ordered]
    contents = ["```{toctree}", ":hidden:", "", *[module.name for module in ordered], "```"]
    return "\n".join(["# Reference", "", "Every public name: what it takes and returns, with shapes and units; which errors it raises (`DataError` is bad input: one "
                      "sentence that says what to do; `…` stands for what is filled in); the notebook's section that defines it; an example that the tests run.", "",
                      "| module | |", "|---|---|", *rows, "", *contents]) + "\n"


def _bring(root: Path, source: Path, name: str) -> None:
    "Copy a file that is linked to. A table in Markdown becomes a page."
    if name.startswith("nbs/") or name == REPORT or not (root / name).is_file():
        return
    to = source / name
    to.parent.mkdir(parents=True, exist_ok=True)
    if to.suffix == ".md":
        core.write_text(to, f"---\norphan: true\n---\n# {name}\n\n{(root / name).read_text(encoding='utf-8')}")
    else:
        shutil.copy(root / name, to)


def add_report(root: Path, site: Path) -> None:
    "Put the report into the site, with what it links to; what it says of a notebook leads to that notebook's page."
    text = (root / REPORT).read_text(encoding="utf-8")
    for link in {urlsplit(link).path for link in _Page(text).links if not urlsplit(link).scheme} - {""}:
        file = os.path.normpath(os.path.join(os.path.dirname(REPORT), unquote(link)))
        if not file.startswith("nbs/") and (root / file).is_file():
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / file, site / file)
    core.write_text(site / REPORT, re.sub(r'href="\.\./nbs/(\w+)\.ipynb', r'href="../\1.html', text))


def _add_contents(source: Path, notebooks: list[Path]) -> None:
    "Give the first page the table of contents that the side bar shows."
    index = core.read_json(source / "index.ipynb")
    parts = {"Notebooks": [path for path in notebooks if path.stem != "index" and not is_stage(path)], "Stages": [path for path in notebooks if is_stage(path)]}
    text = ""
    for caption, paths in parts.items():
        entries = [f"{path.stem[:2]} {_title(path)} <{path.stem}>" for path in paths]
        text += "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```", "", ""])
    text += "```{toctree}\n:hidden:\n:caption: Package\n\napi/index\n```\n"
    index["cells"].append({"cell_type": "markdown", "id": "contents", "metadata": {}, "source": text})
    core.write_json(source / "index.ipynb", index)


def _title(path: Path) -> str:
    return re.search(r"(?m)^# +(.+?) *$", "\n".join(source for source in sources(path) if source.startswith("# ")))[1]


# --- the site

class _Page(HTMLParser):
    "Anchors and links of a page."

    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        about = dict(attributes)
        self.anchors |= {about[name] for name in ("id", "name") if about.get(name)}
        self.links += [about[name] for name in ("href", "src") if about.get(name)]


def check_links(site: Path) -> tuple[list[str], list[str]]:
    "Links of a site that lead nowhere, and links to other sites. A script, style or picture from elsewhere leads nowhere: the site works without network."
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    broken, external = [], set()
    for path, content in pages.items():
        for link in content.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto") or parts.netloc:
                external.add(link)
            elif parts.scheme != "data":
                target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                target = target / "index.html" if target.is_dir() else target
                if not target.is_file():
                    broken.append(f"{path.relative_to(site)}: {link}: no such page or file")
                elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                    broken.append(f"{path.relative_to(site)}: {link}: no such place on that page")
    for path in [*pages, *site.rglob("*.css")]:
        text = path.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe|source|video|audio)[^>]*?src="((?:https?:)?//[^"]+)|<link[^>]*rel="stylesheet"[^>]*href="((?:https?:)?//[^"]+)|@import[^;]*?((?:https?:)?//[^"\');]+)|url\(["\']?((?:https?:)?//[^"\')]+)', text)
        broken += [f"{path.relative_to(site)}: fetches {''.join(groups)} from the network" for groups in fetched]
    return broken, sorted(external)


def build(root: Path, site: Path, run: bool = True, workers: int = 0) -> list[str]:
    "Make the site; links to other sites are returned. Anything wrong with it is a `DataError`."
    if faults := broken_links(root):
        raise DataError("\n".join(faults))
    notebooks = sorted((root / "nbs").glob("*.ipynb"))
    copies = executed(root, notebooks, workers) | stage_copies(root) if run else {}
    source = root / ".work/docs/source"
    write_source(root, source, copies)
    made_of, record = core.content_hash(source, root / "docs", root / "sage_nb", root / "results", root / "requirements.lock"), root / ".work/docs/site.json"
    if site.is_dir() and record.is_file() and core.read_json(record)["made_of"] == made_of:
        return check_links(site)[1]
    with core.whole(site) as made:
        done = subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", str(root / "docs"), "-d", str(root / ".work/docs/doctrees"),
                               str(source), str(made)], env={**os.environ, "PYTHONPATH": str(root)})
        if done.returncode:
            raise DataError("docs: Sphinx found faults, see above; mend them and run again")
        (made / ".buildinfo").unlink(missing_ok=True)
        if (root / REPORT).is_file():
            add_report(root, made)
        broken, external = check_links(made)
        if broken:
            raise DataError("\n".join(broken))
    core.write_json(record, {"made_of": made_of})
    return external


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--without-outputs", action="store_true", help="execute nothing")
    given, root = parser.parse_args(), Path(__file__).resolve().parent.parent
    try:
        external = build(root, root / "_site", not given.without_outputs)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    print("Links to other sites, which were not followed:", *external, "", "_site/index.html", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
