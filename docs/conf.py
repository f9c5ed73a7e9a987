"""How Sphinx makes the documentation site, by `make docs`.

The source folder is the project's root, so that pages link to each other and to files of the code as they do on a code
host. Only what `include_patterns` names is read. Neither the build nor a reader takes anything from the network.
"""

from __future__ import annotations

import importlib.metadata
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

project = "recontrol"
author = "the recontrol contributors"
release = importlib.metadata.version("recontrol")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/**",
    "deploy/README.md",
    "examples/README.md",
    "value_models/pretrained/**",
]
exclude_patterns = [".*", "build", "**/__pycache__", "tests", "runs", "server", "*.egg-info"]

# The heads' pages are rendered from their cards, with a section for each head one level further down.
suppress_warnings = ["myst.header"]

# Pages have the anchors that a code host gives their headings.
myst_heading_anchors = 3

# Docstrings are plain English in which `name` is code.
default_role = "code"
autodoc_class_signature = "separated"
autodoc_default_options = {"members": True, "exclude-members": "model_config, __init__, __new__"}
autodoc_member_order = "bysource"
autodoc_typehints = "description"

html_theme = "furo"
html_title = f"recontrol {release}"
html_favicon = "../server/playground/icon.svg"
html_show_sphinx = False
# The address of the site is its first page.
html_additional_pages = {"index": "redirect.html"}
templates_path = ["templates"]


def as_markup(_app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: an indented block is shown as it is, and a bar is a bar."""
    marked: list[str] = []
    for is_blank, block in groupby(list(lines), key=lambda line: not line.strip()):
        text = list(block)
        if not is_blank and text[0].startswith(" "):
            marked += ["::", "", *text]
        else:
            marked += [line.replace("|", "\\|") for line in text]
    lines[:] = marked


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", as_markup)
