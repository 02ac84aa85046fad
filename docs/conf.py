"""Settings of Sphinx for the site that `make docs` builds. The build is strict: every warning is an error."""

from __future__ import annotations

import importlib.util
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGES = {  # files that are shown as a page of another name
    "README.md": "index.md",
    "CONTRIBUTING.md": "made/contributing.md",
    "CHANGELOG.md": "made/changelog.md",
    "examples/README.md": "made/examples.md",
}
sys.path.insert(0, str(ROOT))
os.environ.setdefault("NVTE_PROJECT_BUILDING", "1")  # TransformerEngine's wheel imports without its CUDA part

sys.path.insert(0, str(ROOT / "examples"))
from _torchvision import ensure_torchvision  # noqa: E402

from te_nvfp4_cv.version import __version__  # noqa: E402

if importlib.util.find_spec("torchvision"):
    ensure_torchvision()  # Lightning imports torchvision, whose wheel fails beside a CPU-only torch

project, author, release = "te_nvfp4_cv", "te_nvfp4_cv contributors", __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb"]
html_theme = "furo"
html_title = f"te_nvfp4_cv {release}"
exclude_patterns = ["zoo", "tutorial.md", "made/readme.md", "made/tutorial.md"]  # tutorials: of earlier versions
myst_heading_anchors = 3
nb_execution_mode = "force"  # the tutorial runs at each build, so its outputs are those of this version
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = True


def as_written(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Show a docstring as it was written.

    A module's docstring contains tables in plain text, so everything after its first line becomes a literal block.
    In other docstrings the star of shapes like [B, *image, C] is escaped, or reST would take it for emphasis.
    """
    if what == "module" and any(lines[1:]):
        lines[:] = [lines[0], "", "::", "", *(f"    {line}" for line in lines[1:]), ""]
    else:
        lines[:] = [re.sub(r"(?<=[\[ ])\*(?=\w)", r"\\*", line) for line in lines]


def site_links(text: str, source: str, page: str) -> str:
    """Rewrite the links of a file of the repository for the site, where other files are pages.

    Args:
        text: The file's text.
        source: The file's path in the repository: links in the text are relative to it.
        page: The path of the page that shows the text, below docs/. Links become relative to that.
    """

    def rewrite(link: re.Match[str]) -> str:
        label, path, anchor = link.groups(default="")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / target).exists():
            return link.group()  # no link but code, or a broken one: then the build stops with a warning
        if target not in PAGES and not target.startswith("docs/"):
            return label  # a file without a page, such as LICENSE
        shown = PAGES.get(target, target.removeprefix("docs/"))
        return f"[{label}]({posixpath.relpath(shown, posixpath.dirname(page) or '.')}{anchor})"

    return re.sub(r"\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", rewrite, text)


def command_line() -> str:
    """Return a page with the help of every command, as its parser gives it."""
    from te_nvfp4_cv.cli import COMMANDS, build_parser

    os.environ["COLUMNS"] = "110"  # argparse's width
    parser, commands = build_parser()
    parts = ["# The command line", f"```text\n{parser.format_help()}```"]
    for command in COMMANDS:
        parts.append(f"## {command.name}\n\n```text\n{commands.choices[command.name].format_help()}```")
    return "\n\n".join(parts)


def write_pages(app: Any) -> None:
    """Write the pages of docs/made: files from outside of docs/, the command line."""
    (HERE / "made").mkdir(exist_ok=True)
    pages = {"cli.md": command_line()}
    for source, page in PAGES.items():
        if source.endswith(".md"):
            text = (ROOT / source).read_text(encoding="utf-8")
            # index.md includes the README, so its links are relative to docs/.
            pages["readme.md" if page == "index.md" else posixpath.basename(page)] = site_links(text, source, page)
    for name, text in pages.items():
        (HERE / "made" / name).write_text(text + "\n", encoding="utf-8")


def read_page(app: Any, docname: str, content: list[str]) -> None:
    """Rewrite the links of a page that Sphinx has read; those of docs/made are written as they must be."""
    if not docname.startswith("made/") and docname != "index":
        content[0] = site_links(content[0], f"docs/{docname}.md", f"{docname}.md")


def setup(app: Any) -> None:
    """Connect the functions above; Sphinx calls this function."""
    app.connect("autodoc-process-docstring", as_written)
    app.connect("builder-inited", write_pages)
    app.connect("source-read", read_page)
