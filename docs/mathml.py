"""A renderer of formulas for Sphinx: LaTeX to MathML when the site is built, by docutils' own converter. Browsers draw it without any script."""
import re
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging


REWRITTEN = [  # what docutils lacks or reads otherwise -> the same, written so that it does not
    (r"\\([bB]igg?)\s*(?=[(\[]|\\(\{|langle))", r"\\\1l"), (r"\\([bB]igg?)\s*(?=[)\]]|\\(\}|rangle))", r"\\\1r"), (r"\\[bB]igg?(?![a-zA-Z])", ""), (r"\\dots(?![a-zA-Z])", r"\\ldots"),
    (r"\\([tdc]?frac)(\d)(\d)", r"\\\1{\2}{\3}"),  # \tfrac12, which it takes for twelve over what follows
    (r"\\(bar|hat|tilde|overline)\s*([a-zA-Z]|\\[a-zA-Z]+|\{(?:[^{}]|\{[^{}]*\})*\})", r"{{}\\\1{\2}}"),  # or an index would go below the letter
    (r"\\operatorname\*", r"\\operatorname"), (r"\\(log|min|max)\s*(?=\\mathrm)", r"\\\1\\,"),
]


CHILDREN = {"mfrac": 2, "msub": 2, "msup": 2, "mover": 2, "munder": 2, "mroot": 2, "msubsup": 3, "munderover": 3}


def convert(tex: str, block: bool = False) -> str:
    "MathML of a formula; `MathError` where docutils does not know it, or makes something of it that browsers would draw as something else."
    mathml = tex2mathml(known_to_docutils(tex), as_block=block)
    for element in ElementTree.fromstring(mathml.replace("&ApplyFunction;", "")).iter():
        if len(element) != CHILDREN.get(name := element.tag.split("}")[1], len(element)):
            raise MathError(f"{name} with {len(element)} parts")
    return mathml


def known_to_docutils(tex: str) -> str:
    "The formula as docutils reads it rightly."
    for pattern, replacement in REWRITTEN:
        tex = re.sub(pattern, replacement, tex)
    return tex


def _convert(self, node: nodes.Element, block: bool) -> None:
    tex = node.astext()
    try:
        mathml = convert(tex, block)
    except MathError as error:
        logging.getLogger(__name__).warning("not a formula that docutils knows (%s): %s", error, tex, location=node)
        mathml = self.encode(tex)
    self.body.append(f'<div class="math">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def setup(app) -> dict:
    app.add_html_math_renderer("mathml", inline_renderers=(lambda self, node: _convert(self, node, False), None),
                               block_renderers=(lambda self, node: _convert(self, node, True), None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
