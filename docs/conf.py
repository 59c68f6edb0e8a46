"""Sphinx's settings for the site that `docs/build.py` puts together; it works without network."""
import sys
from pathlib import Path

from sphinx.pycode import ModuleAnalyzer

sys.path.insert(0, str(Path(__file__).parent))

project, author, copyright = "sage_nb", "The sage_nb authors", "2026, The sage_nb authors"
extensions = ["myst_nb", "sphinx.ext.viewcode", "mathml"]
html_theme, html_title = "furo", "sage_nb"
html_static_path, html_css_files = [str(Path(__file__).parent / "site.css")], ["site.css"]
html_copy_source = html_show_sphinx = False
html_math_renderer = "mathml"  # formulas are converted here; MathJax would be fetched from the network
myst_enable_extensions = ["dollarmath", "fieldlist"]
myst_heading_anchors, myst_heading_slug_func = 4, "reference.anchor"
myst_update_mathjax = False
viewcode_follow_imported_members = False
nb_execution_mode = "off"  # docs/build.py has executed them
nb_merge_streams = True
python_maximum_signature_line_length = 88
python_display_short_literal_types = True
toc_object_entries = add_module_names = False
pygments_style, pygments_dark_style = "friendly", "native"


def setup(app):
    "Give `viewcode` the source of a module from its file, so that nothing is imported."
    package = Path(__file__).parent.parent

    def source(app, module):
        analyzer = ModuleAnalyzer.for_file(package / f"{module.replace('.', '/')}.py", module)
        analyzer.find_tags()
        return analyzer.code, analyzer.tags

    app.connect("viewcode-find-source", source)
