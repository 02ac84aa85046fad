"""Write docs/ZOO.md from the rows of run.py: the newest row of each model of the table.

    python examples/zoo/page.py [--rows FILE] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve()
for _folder in (str(_HERE.parents[2]), str(_HERE.parents[1])):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)

from te_nvfp4_cv.cli.trial.run import CHECKS  # noqa: E402
from zoo.models import MODELS, library_of  # noqa: E402
from zoo.run import ROOT, ROWS, read_rows  # noqa: E402

PAGE = ROOT / "docs" / "ZOO.md"
TITLES = {"both": "compile + checkpoint", "ema": "EMA"}
IN_FIGURES = ("share", "gradient", "fuse", "lists", "onnx")  # checks whose cell shows their text where they pass
HEAD = """# The zoo

What NVFP4 makes of {count} models of other libraries, each with tiny settings and random weights. `make zoo` writes
this page from `docs/zoo/rows.jsonl`. {ran} of the {count} have run, each at the commit in the last column (a plus sign:
with changes), where checks that ran again later are named with theirs. [TRY.md](TRY.md) says what each check does, and
how to run them on a model of your own. The table of models is in `examples/zoo/`.

- **NO**: the check found something, which stands below the table. `-`: plain torch cannot do this with the model
  either, or it does not apply. Empty: not run.
- Gradient: the relative error of the NVFP4 gradient, and that of a control in high precision with noise of the same
  size. These networks are small, deep for their size and untrained, so both errors are large.
- Fuse: norms that `nv.fuse` fuses, of all norms. All of it is one step on one thread of a CPU.
"""


def newest(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the last row of each model that the table still has, with the cells of later rows of a few checks.

    Returns:
        By model: the row, whose `commit` also names the commits of the checks that ran later.
    """
    found: dict[str, Mapping[str, Any]] = {}
    later: dict[str, dict[str, str]] = {}
    for row in rows:
        name = row["model"]
        if name not in MODELS:
            continue
        before = found.get(name, {})
        if "asked" in row and "cells" in before:
            if "cells" not in row:  # it ended before its first check
                continue
            later[name] |= {check: row["commit"] for check in row["cells"]}
            found[name] = {**before, "cells": before["cells"] | row["cells"]}
        else:
            found[name], later[name] = row, {}
    return {name: {**row, "commit": _commits(row["commit"], later[name])} for name, row in found.items()}


def _commits(first: str, later: Mapping[str, str]) -> str:
    parts = [first]
    for commit in dict.fromkeys(commit for commit in later.values() if commit != first):
        parts += [f"{', '.join(_title(check) for check in CHECKS if later.get(check) == commit)}: {commit}"]
    return "; ".join(parts)


def page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the text of the page."""
    ran = {name: row for name, row in rows.items() if not row.get("error")}
    parts = [HEAD.format(count=len(MODELS), ran=len(ran)), "## By check\n", _totals(ran), "## By model\n", _table(ran)]
    parts += ["## Findings\n", _findings(ran)]
    absent = [name for name in MODELS if name not in rows]
    if absent:
        parts += [f"## Not run\n\nOf {len(MODELS)} models, {len(absent)} without a row: {'; '.join(absent)}.\n"]
    broken = [f"- {name}: {row['error']}" for name, row in rows.items() if row.get("error")]
    if broken:
        parts += ["## Not run by plain torch\n", "\n".join(broken) + "\n"]
    return "\n".join(parts)


def _totals(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [["check", "holds", "does not", "does not apply"]]
    for check in CHECKS:
        found = [row["cells"][check]["ok"] for row in rows.values() if check in row["cells"]]
        lines.append([_title(check), *(str(sum(ok is kind for ok in found)) for kind in (True, False, None))])
    return _markdown(lines)


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [["model", *map(_title, CHECKS), "commit"]]
    for name in MODELS:
        if name in rows:
            cells = rows[name]["cells"]
            lines.append([name, *(_cell(check, cells.get(check)) for check in CHECKS), rows[name]["commit"]])
    libraries = {row_library: version for row in rows.values() for row_library, version in row["versions"].items()}
    return _markdown(lines) + "\n" + ", ".join(f"{name} {libraries[name]}" for name in sorted(libraries)) + ".\n"


def _findings(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [["model", "check", "what"]]
    for name in MODELS:
        for check, cell in rows.get(name, {}).get("cells", {}).items():
            if cell["ok"] is False:
                lines.append([name, _title(check), cell["text"]])
    return _markdown(lines) if lines[1:] else "None.\n"


def _cell(check: str, cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    if cell["ok"] is None:
        return "-"
    text = cell["text"] if check in IN_FIGURES else "ok"
    # A share of 0 % and a gradient beside its control say more than the word.
    return text if cell["ok"] else f"**NO** {text}" if check in ("share", "gradient") else "**NO**"


def _title(check: str) -> str:
    return TITLES.get(check, check)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rest]) + "\n"


def by_library(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Count the rows of each library."""
    counts: dict[str, int] = {}
    for name in rows:
        counts[library_of(name)] = counts.get(library_of(name), 0) + 1
    return counts


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="page.py", description="Write docs/ZOO.md.")
    parser.add_argument("--rows", type=Path, default=ROWS, metavar="FILE")
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE")
    options = parser.parse_args(arguments)
    rows = newest(read_rows(options.rows))
    options.out.write_text(page(rows), encoding="utf-8")
    print(f"{options.out}: {len(rows)} of {len(MODELS)} models; {by_library(rows)}")


if __name__ == "__main__":
    main()
