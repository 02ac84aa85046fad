"""Settings of Sphinx for the site that `make docs` builds. The build is strict: every warning is an error."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("NVTE_PROJECT_BUILDING", "1")  # TransformerEngine's wheel imports without its CUDA part

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
suppress_warnings = ["myst.xref_missing"]  # the README links to files of the repository, which are no pages


def as_written(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Show a docstring as it was written.

    A module's docstring contains tables in plain text, so everything after its first line becomes a literal block.
    In other docstrings the star of shapes like [B, *image, C] is escaped, or reST would take it for emphasis.
    """
    if what == "module" and any(lines[1:]):
        lines[:] = [lines[0], "", "::", "", *(f"    {line}" for line in lines[1:]), ""]
    else:
        lines[:] = [re.sub(r"(?<=[\[ ])\*(?=\w)", r"\\*", line) for line in lines]


def write_tutorial(app: Any) -> None:
    """Write the notebook as the page tutorial.md."""
    cells = json.loads((HERE / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    (HERE / "tutorial.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def setup(app: Any) -> None:
    """Connect the two functions above; Sphinx calls this function."""
    app.connect("autodoc-process-docstring", as_written)
    app.connect("builder-inited", write_tutorial)
