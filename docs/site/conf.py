"""How the site is built from the repository's own pages: `.ci/site OUT`."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = _PROJECT["name"]
version = release = _PROJECT["version"]
author = "the authors of sere-compile"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinxcontrib.mermaid"]
root_doc = "docs/site/index"
# Pages stand where they are on a disk, so that their links hold in both places.
include_patterns = [
    "docs/site/*.md", "docs/*.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md",
    "passes/README.md", "benchmarks/README.md", "tests/README.md", "tests/*/README.md", "tests/zoo/README.md",
    "sere_compile/models/README.md",
]  # fmt: skip
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
# Pages are for people with the repository as well, who need no table of contents in each.
suppress_warnings = ["toc.not_included", "myst.header"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
add_module_names = False

html_extra_path = ["root"]  # an index at the top, which leads to the first page
html_theme = "furo"
html_title = "sere-compile"
html_show_copyright = False
