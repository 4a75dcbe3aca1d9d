"""Sphinx: the documents as a site, built from the repository's root: ``sphinx-build -W -c docs . build/site``.

The pages stay at the paths that they have in the repository. So their links lead to the same page on GitHub and in the
site. Those in docs/reference/ are the site's alone: Sphinx fills them from the docstrings.
"""

from typing import Any

import mobilemamba

project, author = "mobilemamba", "The mobilemamba authors"
version = release = mobilemamba.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/reference/index"
include_patterns = ["*.md", "docs/*.md", "docs/reference/*.md", "examples/README.md"]
include_patterns += ["benchmarks/NOTES.md", "benchmarks/results/*.md"]
suppress_warnings = ["toc.not_included"]  # tables in benchmarks/results, which pages link to; tests/test_site.py
html_theme = "furo"
html_extra_path = ["reference/index.html"]  # leads from the top of the site to its start page
html_title = f"mobilemamba {version}"

myst_heading_anchors = 4  # named as GitHub names them
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring, napoleon_numpy_docstring = True, False


def link_by_last_name(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """A role such as ``:class:`MobileMamba``` in another room's docstring leads to the only class of that name."""
    if node.get("refdomain") != "py":
        return None
    node["refspecific"] = True
    return env.get_domain("py").resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], node["reftarget"], node, contnode
    )


def setup(app: Any) -> None:
    app.connect("missing-reference", link_by_last_name)
