"""What the package says of itself: every public name described, with shapes and units, and shown by an example that runs; and the site made of it."""
import importlib
import inspect
import json
import os
import re
import shutil
import sys

import pytest

from conftest import ROOT, pipeline
from sage_nb.core import DataError
from sage_nb.pipeline import write_sources
from test_pipeline import make_project

sys.path.insert(0, str(ROOT / "docs"))
import build  # noqa: E402
import reference  # noqa: E402
from docutils.utils.math import MathError  # noqa: E402
from mathml import convert  # noqa: E402

MODULES = {path.stem: reference.read_module(path) for path in sorted((ROOT / "sage_nb").glob("[a-z]*.py"))}
PUBLIC = {entry.name for module in MODULES.values() for entry in module.entries}
EXAMPLES = reference.find_examples(ROOT)

# A parameter says what it is by a comment, unless its type does (one of the package, or of a library, that is no number, text, path, list or array), its
# name is explained in the docstring, it is a flag, or it is one of these, which mean the same everywhere.
PLAIN = {"int", "float", "str", "bool", "object", "list", "tuple", "dict", "set", "None", "Path", "Callable", "Iterable", "Tensor", "torch", "np", "ndarray", "pd", "DataFrame"}
TERMS = {"path", "root", "folder", "seed", "seeds", "resamples", "dropout", "heads", "model", "split", "configuration", "bins", "name", "caption", "text", "suffix",
         "visual_dim", "audio_dim", "cue_dim", "**front", "level", "momentum"}
SHAPE = re.compile(r"\[|any shape|same shape|broadcast")


def lacking(kind: str) -> list[str]:
    "What is lacking, a line a name."
    found = []
    for module in MODULES.values():
        for entry in module.entries:
            if kind == "example" and entry.kind != "data" and entry.name not in EXAMPLES:
                found.append(f"{module.name}.{entry.name}: an example")
            if kind == "words" and not entry.doc and not any(option.startswith(":value: ") and "'" in option for option in entry.options):
                found.append(f"{module.name}.{entry.name}: words")  # names listed in a constant say it themselves
            if kind == "words":
                found += [f"{module.name}.{member.name}: words" for member in entry.members if not words(entry, member)]
            for one in (entry, *entry.members):
                check = {"shape": without_shape, "comment": without_comment}.get(kind)
                names = [p.name for p in one.parameters if check and check(words(entry, one), p)]
                found += [f"{module.name}.{one.name}: {kind} of {', '.join(names)}"] * bool(names)
    return found


def array(parameter) -> bool:
    return bool(re.search(r"\b(Tensor|ndarray)\b", parameter.annotation))


def words(entry, one) -> str:
    "The docstring; of a class's one use, calling it, that of the class."
    return one.doc or (entry.doc if one.name in (f"{entry.name}.forward", f"{entry.name}.__call__") else "")


def without_shape(doc: str, parameter) -> bool:
    return array(parameter) and not SHAPE.search(parameter.about) and not SHAPE.search(doc)


def without_comment(doc: str, parameter) -> bool:
    telling = set(re.findall(r"\w+", re.sub(r"'[^']*'", "", parameter.annotation))) - PLAIN
    explained = re.search(rf"\b{re.escape(parameter.name.strip('*'))}\b", doc)
    return not (parameter.about or array(parameter) or telling or explained or parameter.annotation == "bool" or parameter.name in TERMS)


@pytest.mark.parametrize("kind", ["words", "comment", "shape", "example"])
def test_every_public_name_says_what_it_takes_and_is_shown(kind):
    assert lacking(kind) == []


@pytest.mark.parametrize("name", MODULES)
def test_signatures_are_those_of_the_objects(name):
    "Read from the source, against what Python says of the imported object."
    module = importlib.import_module(f"sage_nb.{name}")
    assert [entry.name for entry in MODULES[name].entries] and {entry.name for entry in MODULES[name].entries} == set(module.__all__)
    for entry in MODULES[name].entries:
        thing = getattr(module, entry.name)
        if entry.kind == "data":
            continue
        for one in (entry, *(member for member in entry.members if member.kind != "property")):
            own = inspect.getattr_static(thing, one.name.split(".")[1]) if one is not entry else thing
            if entry.parameters or one is not entry or entry.kind == "function":
                given = list(inspect.signature(getattr(own, "__func__", own)).parameters.values())
                given = given[1:] if one is not entry and not isinstance(own, staticmethod) else given
                stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
                assert [p.name for p in one.parameters] == [stars.get(p.kind, "") + p.name for p in given], one.name
                assert [bool(p.default) for p in one.parameters] == [p.default is not inspect.Parameter.empty for p in given], one.name


def test_a_page_says_what_the_source_says(tmp_path):
    (tmp_path / "toy.py").write_text('''"Toys."
__all__ = ["SIZE", "Ball", "throw", "Toy"]
# %% ../nbs/00_toy.ipynb #abcd
from .core import Sequence
SIZE = 3  # cm
class Ball:
    "Round."
    def __init__(self, radius: float):  # not about the argument
        pass
class Toy(Ball):
    "Any."
def throw(
    ball: Ball,
    far: list[Sequence] = (),  # [N] metres, <not> a *tag*
    # how, on
    # two lines
    how: str = "up",
) -> float:  # seconds
    "Throw `Ball`. It may be lost."
    if how:
        raise DataError(f"{how}: no such way; say up or down")
    return _land(ball)
def _land(ball):
    raise DataError("nowhere to land; throw less far")
''')
    module = reference.read_module(tmp_path / "toy.py")
    page = reference.render_module(module, {"Ball": "sage_nb.toy"}, {"abcd": ("Toys", "Toys")}, {"throw": [reference.Example("throw(1)", notebook="00_toy")]})
    for line in ["## SIZE", ":value: 3", "cm", "```{py:class} Ball(radius: float)", "```{py:class} Toy(radius: float)", "Bases: {py:obj}`~sage_nb.toy.Ball`",
                 "```{py:function} throw(ball: ~sage_nb.toy.Ball, far: list[~sage_nb.core.Sequence]=(), how: str='up') -> float",
                 "Throw {py:obj}`~sage_nb.toy.Ball`. It may be lost.", r":param far: \[N\] metres, \<not\> a \*tag\*", ":param how: how, on two lines", ":returns: seconds",
                 ":raises DataError: …: no such way; say up or down", ":raises DataError: nowhere to land; throw less far", "throw(1)",
                 "Defined under [Toys](../00_toy.ipynb#Toys)."]:
        assert line in page.splitlines(), line


def test_an_example_is_a_use_and_not_a_namesake():
    assert reference._used("import ccc\nmetrics.ccc(x)\nmodel.rmse", {"metrics"}) == {"metrics", "ccc", "x", "model"}
    assert reference._used("ccc = 1\nccc + 1", set()) == set()


@pytest.mark.parametrize("text, says", [
    ('<a href="b.html">', "b.html: no such page or file"), ('<a href="#there">', "no such place"), ('<a href="a.html#there">', "no such place"),
    ('<img src="https://x.org/a.png">', "fetches https://x.org/a.png from the network"), ('<link rel="stylesheet" href="//x.org/a.css">', "from the network"),
    ('<script src="https://x.org/a.js"></script>', "from the network"), ('<a href="a.html#here">', None), ('<a href="https://x.org">', None)])
def test_broken_links_of_a_site_are_found(tmp_path, text, says):
    (tmp_path / "a.html").write_text(f'<p id="here">{text}')
    broken, external = build.check_links(tmp_path)
    assert (says is None and broken == []) or len([line for line in broken if says in line]) == 1
    assert external == (["https://x.org"] if text == '<a href="https://x.org">' else external)


def test_links_of_notebooks_lead_to_what_git_holds():
    assert build.broken_links(ROOT) == []


def test_the_report_is_a_page_of_the_site_and_leads_on(tmp_path):
    root, site = tmp_path / "project", tmp_path / "site"
    (root / "results/tables").mkdir(parents=True)
    (root / "results/tables/claims.csv").write_text("a\n")
    (root / "results/report.html").write_text('<p id="a"><a href="../nbs/00_toy.ipynb#Toys">toy</a> <a href="tables/claims.csv">claims</a> <a href="#a">up</a>')
    path = toy(root, "# Toy\nSee [the report](../results/report.html).\n")
    site.mkdir()
    (site / "00_toy.html").write_text('<p id="Toys">' + build.page(root, path, None, None)["cells"][0]["source"])
    assert build.check_links(site)[0] == ["00_toy.html: results/report.html: no such page or file"]
    build.add_report(root, site)
    assert build.check_links(site) == ([], []) and (site / "results/tables/claims.csv").is_file()


def toy(folder, *cells: str):
    "A project with one notebook."
    (folder / "nbs").mkdir(parents=True)
    (folder / "sage_nb").mkdir()
    for name in ("params.yaml", "requirements.lock"):
        (folder / name).write_text("")
    (folder / "sage_nb/core.py").write_text("")
    kinds = [dict(cell_type="markdown" if cell.startswith("# ") else "code", id=f"c{i}", metadata={}, source=cell.splitlines(True)) for i, cell in enumerate(cells)]
    for cell in kinds:
        cell.update(dict(outputs=[], execution_count=None) if cell["cell_type"] == "code" else {})
    path = folder / "nbs/00_toy.ipynb"
    path.write_text(json.dumps(dict(cells=kinds, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")), nbformat=4, nbformat_minor=5)))
    return path


def test_a_notebook_is_executed_once_and_again_when_what_it_depends_on_changes(tmp_path):
    path = toy(tmp_path / "project", "# Toy\n", "from pathlib import Path\nwith Path('../runs').open('a') as file: file.write('x')\n", "#| hide\nfrom sage_nb import core\n")
    root = tmp_path / "project"

    before = dict(os.environ)

    def runs() -> int:
        copies = build.executed(root, [path], workers=1)
        assert list((root / ".work/docs/executed").iterdir()) == list(copies.values())
        return len((root / "runs").read_text())

    (root / "sage_nb/__init__.py").write_text("")
    (root / "sage_nb/core.py").write_text("import os\n\ndef die_with_parent(pid):\n    pass\n")
    assert (runs(), runs()) == (1, 1) and os.environ == before
    (root / "sage_nb/other.py").write_text("")  # which it does not import
    assert runs() == 1
    (root / "sage_nb/core.py").write_text("def die_with_parent(pid):\n    return\n")
    assert runs() == 2


def test_a_notebook_that_fails_is_named(tmp_path):
    path = toy(tmp_path / "project", "# Toy\n", "1 / 0\n")
    shutil.copytree(ROOT / "sage_nb", tmp_path / "project/sage_nb", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.raises(DataError, match="nbs/00_toy.ipynb: a cell failed"):
        build.executed(tmp_path / "project", [path], workers=1)
    assert not list((tmp_path / "project/.work/docs/executed").glob("*[0-9a-f].ipynb"))


def test_what_only_the_pipeline_executes_is_a_stage():
    assert {path.stem for path in (ROOT / "nbs").glob("*.ipynb") if build.is_stage(path)} == {path.stem for path in (ROOT / "nbs").glob("*.ipynb") if "skip_exec" in build.sources(path)[0]}


def test_a_stage_is_shown_with_outputs_while_they_are_of_what_is_here(tmp_path):
    project = make_project(tmp_path / "project")
    write_sources(project)
    assert build.stage_copies(project) == {}
    assert pipeline(project, "run", "make").returncode == 0
    assert build.stage_copies(project) == {"20_stage_make": project / ".work/executed/make.ipynb"}
    (project / "data/corpus/4.mp4").touch()  # no longer a sample, of which everything may be shown
    assert build.stage_copies(project) == {}
    (project / "data/corpus/4.mp4").unlink()
    (project / "data/corpus/base.txt").write_text("2")
    assert build.stage_copies(project) == {}


def test_a_page_of_a_notebook_shows_what_readers_need(tmp_path):
    path = toy(tmp_path, "# Toy\nSee [SAGE](11_sage.ipynb) and [results](../results/tables/claims.md).\n", "#| hide\nsecret = 1\n", "#| export\ndef toy(): pass\n", "toy()\n")
    node = json.loads(path.read_text())
    widget = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "slider"}
    node["cells"][3]["outputs"] = [dict(output_type="display_data", data=data, metadata={}) for data in (widget, {"image/png": "x", "text/plain": "figure"})]
    path.write_text(json.dumps(node))
    title, code, shown = build.page(tmp_path, path, None, "toy")["cells"]
    assert title["source"] == ("# Toy\n\n*Notebook `nbs/00_toy.ipynb`; 1 min to read; reference of its module: [sage_nb.toy](api/toy.md)*\n"
                               "See [SAGE](11_sage.ipynb) and [results](results/tables/claims.md).\n")
    assert code["source"] == "def toy(): pass\n"
    assert [list(output["data"]) for output in shown["outputs"]] == [["image/png", "text/plain"]]  # the picture under the widget


def test_minutes_count_prose_and_shown_code_apart_from_exported_code(tmp_path):
    path = toy(tmp_path, "# Toy\n" + "word " * 218 + "\n```\n" + "make\n" * 10 + "```\n", "#| hide\n" + "x = 1\n" * 99, "#| export\n" + "y = 1\n\n" * 100, "z = 1\n" * 30, "#| echo: false\nz\n")
    assert build.reading_minutes(path) == (2, 2.5)
    assert "; 2 min to read and 2 min for its exported code*" in build.page(tmp_path, path, None, None)["cells"][0]["source"]


def test_notebooks_read_as_fast_as_the_index_says():
    paths = sorted((ROOT / "nbs").glob("*.ipynb"))
    minutes = [build.reading_minutes(path)[0] for path in paths]
    assert not [path.name for path, reading in zip(paths, minutes) if round(reading) > 15]
    assert sum(reading < 7.5 for reading in minutes) > len(paths) / 2


@pytest.mark.parametrize("tex, mathml", [
    (r"\tfrac12 x", "<mn>1</mn><mn>2</mn></mfrac><mi>x</mi>"), (r"\dots", "…"), (r"\frac{\big( x \big)}{2}", "</mo></mrow><mn>2</mn></mfrac>"), (r"\big|x\big|", "<mi>x</mi>"),
    (r"\bar e_{m,0}", "</mover></mrow><mrow><mi>m</mi>"), (r"\overline{\mathrm{ok}}_t", "</mover></mrow><mi>t</mi></msub>"),
    (r"\operatorname*{mean}_i", '<msub><mi mathvariant="normal">mean</mi><mi>i</mi></msub>'), (r"\bigcup", "⋃")])
def test_formulas_become_mathml_and_need_no_network(tex, mathml):
    found = re.sub(r"\s*\n\s*", "", convert(tex))
    assert mathml in found, found


@pytest.mark.parametrize("tex", [r"\nosuch x", r"\frac{\bigl( x}{2}"])
def test_a_formula_that_would_be_drawn_wrongly_is_refused(tex):
    with pytest.raises(MathError):
        convert(tex)
