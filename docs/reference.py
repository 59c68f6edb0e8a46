"""The reference of the package, written from its source: signatures, docstrings, the comments behind arguments (nbdev's docments: shapes and units),
the errors raised, the place that defines a name, and an example that runs in the tests. Nothing is imported; autodoc would not see the comments."""
from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

MODULE_LINK = re.compile(r"# %% \.\./nbs/(\S+)\.ipynb #(\w+)")


@dataclass
class Parameter:
    name: str
    annotation: str = ""
    default: str = ""
    about: str = ""  # the comment behind it


@dataclass
class Entry:
    "A public name, or a public method of one."
    name: str  # with the class in front, for a method
    kind: str  # a directive of Sphinx's Python domain
    signature: str = ""  # behind the name
    doc: str = ""
    parameters: list[Parameter] = field(default_factory=list)
    returns: Parameter | None = None
    errors: list[str] = field(default_factory=list)  # messages of `DataError`
    options: tuple[str, ...] = ()  # of the directive
    bases: list[str] = field(default_factory=list)  # of a class: those of the package, and qualified ones
    cell: str = ""  # id of the notebook's cell
    members: list[Entry] = field(default_factory=list)


@dataclass
class Module:
    name: str
    doc: str
    notebook: str  # its stem
    entries: list[Entry]


# --- reading

def read_module(path: Path) -> Module:
    "The public names of a module, in the order of its source."
    return _reader(path).module()


@cache
def _reader(path: Path) -> _Reader:
    return _Reader(path)


class _Reader:
    def __init__(self, path: Path):
        source = path.read_text(encoding="utf-8")
        self.path, self.name, self.tree, self.lines = path, path.stem, ast.parse(source), source.splitlines()
        self.comments = {token.start[0]: token.string.lstrip("# ") for token in tokenize.generate_tokens(io.StringIO(source).readline)
                         if token.type == tokenize.COMMENT and not token.string.startswith("# %%")}
        self.public = next(ast.literal_eval(node.value) for node in self.tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
        self.owners = {name: f"sage_nb.{self.name}" for name in self.public}  # where a name of an annotation is documented
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                self.owners |= {alias.name: f"sage_nb.{node.module}" for alias in node.names if node.module}
        self.functions = {node.name: node for node in self.tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}

    def module(self) -> Module:
        entries, cell, notebook, above = [], "", "", {}
        cells = {number: match.groups() for number, line in enumerate(self.lines, 1) if (match := MODULE_LINK.match(line))}
        for node in self.tree.body:
            notebook, cell = cells[max((n for n in cells if n <= node.lineno), default=min(cells))]
            for name in self._names(node):
                if name in self.public:
                    entry = self._entry(node, name)
                    entry.cell = cell
                    for parameter in entry.parameters if entry.kind == "function" else ():  # what has the name and type of one above means the same
                        key = (parameter.name, parameter.annotation)
                        parameter.about = parameter.about or above.get(key, "")
                        above.setdefault(key, parameter.about)
                    entries.append(entry)
        return Module(self.name, ast.get_docstring(self.tree) or "", notebook, entries)

    @staticmethod
    def _names(node: ast.stmt) -> list[str]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            return [node.name]
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]

    def _entry(self, node: ast.stmt, name: str) -> Entry:
        if isinstance(node, ast.FunctionDef):
            return self._function(node, name, "function")
        if isinstance(node, ast.ClassDef):
            return self._class(node)
        value = ast.unparse(node.value)
        alone = isinstance(node, ast.AnnAssign) or isinstance(node.targets[0], ast.Name)
        return Entry(name, "data", doc=self._comment(node.lineno), options=(f":value: {value}",) if alone and len(value) <= 100 else ())

    def _comment(self, line: int) -> str:
        "What is said on a line, or on lines of their own above it."
        if line in self.comments:
            return self.comments[line]
        above = []
        while (line := line - 1) in self.comments and self.lines[line - 1].lstrip().startswith("#"):
            above.insert(0, self.comments[line])
        return " ".join(above)

    def _parameters(self, function: ast.FunctionDef, method: bool) -> list[Parameter]:
        given = function.args
        plain = [*given.posonlyargs, *given.args]
        defaults = dict(zip((a.arg for a in reversed(plain)), reversed(given.defaults))) | {a.arg: d for a, d in zip(given.kwonlyargs, given.kw_defaults) if d}
        listed = [("", a) for a in plain[1 if method else 0:]] + [("*", given.vararg)] * bool(given.vararg) + [("", a) for a in given.kwonlyargs] + [("**", given.kwarg)] * bool(given.kwarg)
        return [Parameter(stars + a.arg, ast.unparse(a.annotation) if a.annotation else "", ast.unparse(defaults[a.arg]) if a.arg in defaults else "",
                          self._comment(a.lineno) if a.lineno != function.lineno else "") for stars, a in listed]

    def _function(self, node: ast.FunctionDef, name: str, kind: str) -> Entry:
        decorators = {ast.unparse(d) for d in node.decorator_list}
        method = kind == "method" and "staticmethod" not in decorators
        options = tuple(f":{d}:" for d in ("staticmethod", "classmethod") if d in decorators)
        shown = ast.FunctionDef(**{**dict(ast.iter_fields(node)), "body": [ast.Pass()], "decorator_list": []})
        shown = ast.parse(ast.unparse(ast.fix_missing_locations(shown))).body[0]
        if method:
            del (shown.args.posonlyargs or shown.args.args)[0]
        for a in ast.walk(shown.args):
            if isinstance(a, ast.arg) and a.annotation:
                a.annotation = self._linked(a.annotation)
        returns = self._linked(shown.returns) if shown.returns else None
        signature = f"({ast.unparse(shown.args)})" + (f" -> {ast.unparse(returns)}" if returns else "")
        doc = docstring(node) + (" (A context manager.)" if "contextmanager" in decorators else "")
        last = node.returns.end_lineno if node.returns else node.body[0].lineno - 1
        back = self._comment(last) if node.returns and last in self.comments else ""
        entry = Entry(name, "property" if decorators & {"property", "cached_property"} else kind, signature, doc, self._parameters(node, method),
                      Parameter("return", ast.unparse(node.returns), about=back) if node.returns else None, self._errors(node), options)
        if entry.kind == "property":
            entry.signature, entry.options = "", ((f":type: {ast.unparse(returns)}",) if returns else ())
        return entry

    def _linked(self, annotation: ast.expr) -> ast.expr:
        "The annotation with names of the package written so that Sphinx links them and shows the last part only."
        owners = self.owners

        class Link(ast.NodeTransformer):
            def visit_Name(self, node):
                return ast.UnaryOp(ast.Invert(), ast.parse(f"{owners[node.id]}.{node.id}", mode="eval").body) if node.id in owners else node

            def visit_Constant(self, node):  # a forward reference
                return self.visit(ast.parse(node.value, mode="eval").body) if isinstance(node.value, str) and node.value in owners else node

        return Link().visit(annotation)

    def _class(self, node: ast.ClassDef) -> Entry:
        bases = [ast.unparse(base) for base in node.bases]
        kind = "exception" if "Exception" in bases else "class"
        record = "NamedTuple" in bases or any("dataclass" in ast.unparse(d) for d in node.decorator_list)
        methods = {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}
        entry = Entry(node.name, kind)
        if built := self._method(node, "__init__", node.name):
            entry = built
            entry.signature = entry.signature.removesuffix(" -> None")
        elif record:
            for child in node.body:
                if isinstance(child, ast.AnnAssign) and not child.target.id.startswith("_"):
                    default = _field_default(child.value)
                    entry.parameters.append(Parameter(child.target.id, ast.unparse(self._linked(child.annotation)), default, self._comment(child.lineno)))
            entry.signature = f"({', '.join(f'{p.name}: {p.annotation}' + (f' = {p.default}' if p.default else '') for p in entry.parameters)})"
        entry.kind, entry.returns, entry.options = kind, None, ()
        entry.doc = "\n\n".join(filter(None, [docstring(node), docstring(methods["__init__"]) if "__init__" in methods else ""]))
        entry.bases = [base for base in bases if base in self.owners or "." in base]
        entry.members = [self._method(node, name, f"{node.name}.{name}") for name in methods if not name.startswith("_") or name == "__call__"]
        return entry

    def _definitions(self, node: ast.ClassDef, name: str) -> list[tuple[_Reader, ast.FunctionDef]]:
        "A method as the class defines it, and as its bases in the package do, each with who reads it."
        found = [(self, child) for child in node.body if isinstance(child, ast.FunctionDef) and child.name == name]
        for base in map(ast.unparse, node.bases):
            reader = self if base in self.functions else _reader(self.path.with_name(f"{self.owners[base].split('.')[1]}.py")) if base in self.owners else None
            found += reader._definitions(reader.functions[base], name) if reader else []
        return found

    def _method(self, node: ast.ClassDef, name: str, title: str) -> Entry | None:
        "A method; what it does not say itself is said by the one that it replaces."
        entries = [reader._function(function, title, "method") for reader, function in self._definitions(node, name)]
        for base in entries[1:]:
            said = {(p.name, p.annotation): p.about for p in base.parameters}
            for parameter in entries[0].parameters:
                parameter.about = parameter.about or said.get((parameter.name, parameter.annotation), "")
            if not entries[0].doc or "[" in base.doc and "[" not in entries[0].doc:
                entries[0].doc = "\n\n".join(filter(None, [entries[0].doc, base.doc]))
            if entries[0].returns and base.returns and entries[0].returns.annotation == base.returns.annotation:
                entries[0].returns.about = entries[0].returns.about or base.returns.about
        return entries[0] if entries else None

    @cache
    def _errors(self, node: ast.FunctionDef) -> list[str]:
        "Messages of the `DataError`s that a function raises, itself or through private functions of its module; `…` stands for what is filled in."
        found, new, seen = [], [node], set()
        while new:
            function = new.pop(0)
            seen.add(function.name)
            for child in ast.walk(function):
                if isinstance(child, ast.Call) and ast.unparse(child.func) in ("DataError", "core.DataError") and child.args:
                    message = _message(child.args[0])
                    found += [message] * (message not in found and len(message) > 12)
                called = child.func.id if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) else ""
                if called.startswith("_") and called in self.functions and called not in seen:
                    new.append(self.functions[called])
        return found


def _field_default(value: ast.expr | None) -> str:
    "The default of a field of a record, through `dataclasses.field`."
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        factory = given.get("default_factory")
        value = factory.body if isinstance(factory, ast.Lambda) else ast.Call(factory, [], []) if factory else given.get("default")
    return ast.unparse(value) if value else ""


def docstring(node: ast.AST) -> str:
    return ast.get_docstring(node) or ""


def _message(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_message(part) for part in node.values)
    return "…"


# --- examples

@dataclass
class Example:
    code: str
    notebook: str = ""  # the stem of the notebook it stands in
    test: str = ""  # or the file of tests


def find_examples(root: Path) -> dict[str, list[Example]]:
    "Name -> the cells of notebooks, and then the tests, that run and use it: cells that are shown first, and short ones first."
    found: dict[str, list[tuple]] = {}
    modules = {path.stem for path in (root / "sage_nb").glob("*.py")}
    for path in sorted((root / "nbs").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        if "skip_exec" in "".join(cells[0]["source"]):
            continue
        for cell in cells:
            source = "".join(cell["source"])
            directives = set(re.findall(r"(?m)^#\| *(\S+)", source))
            if cell["cell_type"] == "code" and not directives & {"export", "default_exp", "eval:"}:
                code = re.sub(r"(?m)^(#\|.*\n?|[%!].*)", "", source).strip()
                for name in _used(code, modules):
                    found.setdefault(name, []).append(("hide" in directives, code.count("\n"), Example(code, notebook=path.stem)))
    for path in sorted((root / "tests").glob("test_*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                code = ast.get_source_segment(source, node)
                for name in _used(code, modules):
                    found.setdefault(name, []).append((2, code.count("\n"), Example(code, test=path.name)))
    examples = {name: [example for *_, example in sorted(uses, key=lambda use: use[:2])] for name, uses in found.items()}
    entries = [entry for path in sorted((root / "sage_nb").glob("[a-z]*.py")) for entry in read_module(path).entries]
    for entry in entries:  # a record is shown by what returns it
        for name in {word for one in (entry, *entry.members) if one.returns for word in re.findall(r"\w+", one.returns.annotation)}:
            if name not in examples and entry.name in examples:
                examples[name] = examples[entry.name]
    return examples


def _used(code: str, modules: set[str]) -> set[str]:
    "Names that the code uses and did not give to something else itself: `name`, or `module.name`."
    used, own = set(), set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else own).add(node.id)
        elif isinstance(node, ast.arg):
            own.add(node.arg)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            used.add(node.attr)
    return used - own


# --- writing

def anchor(title: str) -> str:
    "The anchor of a heading, as JupyterLab makes it, so that links of notebooks hold there and here (`myst_heading_slug_func`)."
    return title.strip().replace(" ", "-")


def escape(text: str, known: dict[str, str]) -> str:
    "A docstring as Markdown that says just what the docstring says; `name` in backticks becomes a link where it is a public one."
    parts = re.split(r"(`[^`]*`)", text)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = re.sub(r"([\\*_<>\[\]{}$~|#])", r"\\\1", part)
        elif (name := part.strip("`")) in known:
            parts[i] = f"{{py:obj}}`~{known[name]}.{name}`"
    return "".join(parts)


def render_module(module: Module, known: dict[str, str], section: dict[str, tuple[str, str]], examples: dict[str, list[Example]]) -> str:
    "The page of a module as MyST Markdown. `section`: cell -> title and anchor of the section of the notebook that it stands in."
    notebook = f"../{module.notebook}.ipynb"
    lines = [f"# sage_nb.{module.name}", "", escape(module.doc, known), "", f"Told and defined in the notebook [{module.notebook}]({notebook}).", "",
             f"```{{py:module}} sage_nb.{module.name}\n```", ""]
    for entry in module.entries:
        lines += ["", f"## {escape(entry.name, {})}", "", *_directive(entry, known, 4 if entry.members else 3)]
        title, place = section[entry.cell]
        lines += ["", f"Defined under [{escape(title, {})}]({notebook}#{place})."]
        if entry.kind != "data" and entry.name in examples:
            own = [example for example in examples[entry.name] if example.notebook == module.notebook]
            example = (own or examples[entry.name])[0]
            place = f"[{example.notebook}](../{example.notebook}.ipynb)" if example.notebook else f"[tests/{example.test}](../tests/{example.test})"
            lines += ["", '<details class="example"><summary>An example that the tests run</summary>', "", "```python", example.code, "```", "", f"From {place}.", "", "</details>"]
    return "\n".join(lines) + "\n"


def _directive(entry: Entry, known: dict[str, str], fence: int) -> list[str]:
    lines = ["`" * fence + f"{{py:{entry.kind}}} {entry.name}{entry.signature}", *entry.options, "", escape(entry.doc, known), ""]
    if entry.bases:
        lines += ["Bases: " + ", ".join(escape(f"`{base}`", known) for base in entry.bases), ""]
    described = [p for p in entry.parameters if p.about]
    lines += [f":param {escape(p.name, {})}: {escape(p.about, known)}" for p in described]
    if entry.returns and entry.returns.about:
        lines.append(f":returns: {escape(entry.returns.about, known)}")
    lines += [f":raises DataError: {escape(message, known)}" for message in entry.errors]
    for member in entry.members:
        lines += ["", *_directive(member, known, 3)]
    return [*lines, "`" * fence]
