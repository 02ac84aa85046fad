"""Sphinx's settings of the site that `make docs` builds, strictly: every warning is an error."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("NVTE_PROJECT_BUILDING", "1")  # TransformerEngine's wheel without its compiled part

from te_nvfp4_cv.version import __version__  # noqa: E402

project, author, release = "te_nvfp4_cv", "te_nvfp4_cv contributors", __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
html_theme = "furo"
html_title = f"te_nvfp4_cv {release}"
exclude_patterns = ["accuracy"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
suppress_warnings = ["myst.xref_missing"]  # README's links to files of the repository


def as_written(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """A module's docstring is text with tables of its own: its first line, then the rest as it stands. Elsewhere the
    star of shapes like [B, *image, C] is a star.
    """
    if what == "module" and lines:
        lines[:] = [lines[0], "", "::", "", *(f"    {line}" for line in lines[1:]), ""]
    else:
        lines[:] = [re.sub(r"(?<=[\[ ])\*(?=\w)", r"\\*", line) for line in lines]


def write_tutorial(app: Any) -> None:
    """The notebook as a page."""
    cells = json.loads((HERE / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    (HERE / "tutorial.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", as_written)
    app.connect("builder-inited", write_tutorial)
