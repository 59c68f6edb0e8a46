"""A renderer of formulas for Sphinx: LaTeX to MathML when the site is built, by docutils' own converter. Browsers draw it without any script."""
import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging


def known_to_docutils(tex: str) -> str:
    "The formula with the two commands that docutils lacks written by others."
    return re.sub(r"\\([bB]igg?)(?![a-zA-Z])", r"\\\1l", tex).replace(r"\dots", r"\ldots")


def _convert(self, node: nodes.Element, block: bool) -> None:
    tex = known_to_docutils(node.astext())
    try:
        mathml = tex2mathml(tex, as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("not a formula that docutils knows (%s): %s", error, tex, location=node)
        mathml = self.encode(tex)
    self.body.append(f'<div class="math">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def setup(app) -> dict:
    app.add_html_math_renderer("mathml", inline_renderers=(lambda self, node: _convert(self, node, False), None),
                               block_renderers=(lambda self, node: _convert(self, node, True), None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
