"""How Sphinx builds the documentation; `make docs` calls it."""

import os
import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

from sb3_ppo_ext import __version__

project = "sb3_ppo_ext"
author = "The sb3_ppo_ext maintainers"
project_copyright = f"2026, {author}"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# A notebook is executed whenever its page is built. No outputs are kept for later, as
# they depend on the code of the package too. An error in a cell, and a warning in its
# output, fails the build.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 180
nb_execution_raise_on_error = True
nb_output_stderr = "error"
nb_merge_streams = True
nb_code_prompt_show = "Show the code of the figure"
nb_code_prompt_hide = "Hide the code of the figure"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # their networks are small

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
# A longer signature has a line for each argument.
python_maximum_signature_line_length = 200

html_math_renderer = "mathml"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["notebooks.css"]
html_title = f"sb3_ppo_ext {version}"
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True
copybutton_line_continuation_character = "\\"


def setup(app: Sphinx) -> None:
    """
    Formulas become MathML, which browsers show by themselves. Sphinx's own ways need
    a script from another server, or LaTeX. Links to pages of benchmark results, which
    also work on GitHub, become downloads. In narrow tables, paths break at slashes.
    """

    def mathml(formula: nodes.Element, *, as_block: bool) -> str:
        # Without a font for mathematics, Chromium draws an accent across its letter.
        markup: str = tex2mathml(formula.astext(), as_block=as_block)
        return markup.replace(' accent="true"', "")

    def inline(writer: Any, node: nodes.math) -> None:
        writer.body.append(mathml(node, as_block=False))
        raise nodes.SkipNode

    def display(writer: Any, node: nodes.math_block) -> None:
        writer.body.append(mathml(node, as_block=True))
        raise nodes.SkipNode

    def link_results(app: Sphinx, docname: str, source: list[str]) -> None:
        # Without "path:", MyST would look for a page of this documentation.
        results = r"\]\((\.\./\.\./benchmarks/results/[^)#]+\.md)\)"
        source[0] = re.sub(results, r"](path:\1)", source[0])

    def break_paths(app: Sphinx, doctree: nodes.document, docname: str) -> None:
        for entry in doctree.findall(nodes.entry):
            for literal in entry.findall(nodes.literal):
                first, *others = literal.astext().split("/")
                if not others or len(literal.children) > 1:
                    continue
                literal.children.clear()
                literal += nodes.Text(first)
                for part in others:
                    literal[-1] = nodes.Text(literal[-1].astext() + "/")
                    literal += nodes.raw("", "<wbr>", format="html")
                    literal += nodes.Text(part)

    app.connect("source-read", link_results)
    app.connect("doctree-resolved", break_paths)
    app.add_html_math_renderer(
        "mathml", inline_renderers=(inline, None), block_renderers=(display, None)
    )
