"""Draw the results of study.py: gaps with their intervals, and loss curves side by side. Needs matplotlib.

    python examples/accuracy/plots.py [FILE ..] --out docs/accuracy

    forest.svg          the gap of each variant with its 95 % interval, one panel per kind of run, all to one scale
    curves_KIND.svg     training loss of the baseline and the preset: the mean over seeds, and each seed thinly
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve()
if str(_HERE.parents[1]) not in sys.path:
    sys.path.insert(0, str(_HERE.parents[1]))
sys.path.append(str(_HERE.parents[2]))

from accuracy.pairs import Rows  # noqa: E402
from accuracy.plan import PLAN, read_plan  # noqa: E402
from accuracy.rows import Arm, read_rows  # noqa: E402
from accuracy.table import kinds, summary  # noqa: E402
from te_nvfp4_cv.errors import need_package  # noqa: E402

COLOURS = {"baseline": "tab:gray", "preset": "tab:green"}
FAILED = 20.0  # points: a larger loss is written and not drawn, because it would flatten all other gaps


def forest(rows: Rows, plan_file: Path, path: Path) -> None:
    """Draw the gaps with their intervals into one file."""
    plt = _pyplot()
    panels = []
    for kind, names in kinds(rows).items():
        plan = read_plan(plan_file, kind.size) if kind.size in ("cpu", "full") else None
        found = [summary(rows, replace(kind, variant=name), plan) for name in names]
        found = [s for s in found if s.get("gaps")]
        if found:
            panels.append((kind, found))
    heights = [len(found) + 1 for _, found in panels]
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 0.32 * sum(heights) + 1), squeeze=False, sharex=True,
                                gridspec_kw={"height_ratios": heights})  # fmt: skip
    for (kind, found), ax in zip(panels, axes[:, 0], strict=True):
        for place, s in enumerate(found):
            mean, half, _ = s["gaps"].get(s["decides"]) or next(iter(s["gaps"].values()))
            if mean < -FAILED:
                text = f"\u2190 {mean:.0f} \u00b1 {half or 0.0:.0f}"
                ax.text(0.01, place, text, transform=ax.get_yaxis_transform(), va="center")
            else:
                ax.errorbar([mean], [place], xerr=[[half or 0.0]] * 2, fmt="o", color="tab:green", capsize=3)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_yticks(range(len(found)), [f"{s['variant']} ({s['pairs']})" for s in found])
        ax.set_ylim(len(found) - 0.5, -0.5)
        ax.set_title(f"{kind.task}, {kind.size}, {kind.epochs} epochs", loc="left", fontsize=10)
        ax.grid(axis="x", alpha=0.3)
    axes[-1, 0].set_xlabel("score of the variant - score of the baseline:\npoints, 95 % interval (number of pairs)")
    _save(plt, figure, path)


def curves(rows: Rows, kind: Arm, path: Path) -> None:
    """Draw the loss curves of one kind of run."""
    plt = _pyplot()
    figure, ax = plt.subplots(figsize=(7, 4))
    for variant, colour in COLOURS.items():
        mine = [row for arm, row in rows.items() if replace(arm, seed=0) == replace(kind, variant=variant)]
        lines = [row["curve"] for row in mine if not row["diverged"]]
        if not lines:
            continue
        steps = [(i + 1) * mine[0]["steps"] / len(lines[0]) for i in range(len(lines[0]))]
        for line in lines:
            ax.plot(steps, line, color=colour, linewidth=0.5, alpha=0.4)
        mean = [statistics.fmean(values) for values in zip(*lines, strict=True)]
        ax.plot(steps, mean, color=colour, linewidth=2, label=f"{variant}, mean of {len(lines)}")
    ax.set_title(f"{kind.task}, {kind.size}, {kind.epochs} epochs", loc="left", fontsize=10)
    ax.set_xlabel("step")
    ax.set_ylabel("training loss")
    ax.set_yscale("log")
    for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        axis("{x:.2g}")
    ax.grid(alpha=0.3, which="both")
    ax.legend()
    _save(plt, figure, path)


def _pyplot() -> Any:
    need_package("matplotlib", "plots.py: a package is missing.", needs="matplotlib", fix='pip install ".[train]"')
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "study"  # equal rows give an equal file
    matplotlib.rcParams["svg.fonttype"] = "none"  # texts stay texts, and the files small
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw all pictures of the results files."""
    parser = argparse.ArgumentParser(prog="plots.py", description="Draw the results of the accuracy study.")
    parser.add_argument("results", type=Path, nargs="*", metavar="FILE", default=[PLAN.with_name("study.jsonl")])
    parser.add_argument("--plan", type=Path, default=PLAN, metavar="FILE")
    parser.add_argument("--out", type=Path, default=PLAN.parent, metavar="FOLDER")
    options = parser.parse_args(arguments)
    rows = read_rows(options.results)
    if not rows:
        parser.error(f"no rows in {', '.join(map(str, options.results))}")
    forest(rows, options.plan, options.out / "forest.svg")
    for kind in kinds(rows):
        curves(rows, kind, options.out / f"curves_{kind.task}_{kind.size}_{kind.compute}_{kind.epochs}.svg")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as refusal:
        sys.exit(f"error: {refusal}")
