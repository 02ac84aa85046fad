"""Print tables from a results file of study.py, each variant against the baseline of the same seed.

    python examples/accuracy/table.py runs/accuracy.jsonl

    d_s = score of the variant - score of the baseline, for each seed s
    gap = mean of d_s, with the 95 % interval mean +- t(n - 1) * std / sqrt(n);  significant: 0 lies outside it

Runs with a factor on the learning rate are compared with the baseline of the same factor. The table marks a variant
with runs that diverged. With one seed there is no interval.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve()
if str(_HERE.parents[1]) not in sys.path:
    sys.path.insert(0, str(_HERE.parents[1]))
sys.path.append(str(_HERE.parents[2]))

from accuracy.study import read_results  # noqa: E402

# two-sided 95 % quantiles of Student's t, by degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def interval(differences: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the half width of its 95 % interval; the half width is None for a single value."""
    mean = statistics.fmean(differences)
    count = len(differences)
    if count < 2:
        return mean, None
    quantile = T95[count - 2] if count - 2 < len(T95) else T95[-1]  # a little too wide beyond 16 seeds
    return mean, quantile * statistics.stdev(differences) / math.sqrt(count)


def baseline_of(variant: str) -> str:
    """Return the variant to compare with: the baseline with the same learning rate and loss."""
    base, comma, rest = variant.partition(", ")
    return f"baseline, {rest}" if comma and base in ("baseline", "preset") else "baseline"


def rows(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Summarize the runs in one row per variant of a task, size, compute dtype and number of epochs."""
    # If a run occurs twice, the last line of the file counts.
    runs = {(r["task"], r["size"], r["compute"], r["epochs"], r["variant"], r["seed"]): r for r in results}
    kinds = list(dict.fromkeys(key[:4] for key in runs))
    found = []
    for kind in kinds:
        for variant in dict.fromkeys(key[4] for key in runs if key[:4] == kind):
            mine = {key[5]: r for key, r in runs.items() if key[:4] == kind and key[4] == variant}
            good = {seed: r for seed, r in mine.items() if not r["diverged"]}
            base = {s: runs.get((*kind, baseline_of(variant), s)) for s in good}
            # Only seeds that have both runs form a pair.
            pairs = [(good[s], b) for s, b in base.items() if b is not None and not b["diverged"]]
            row: dict[str, Any] = dict(zip(("task", "size", "compute", "epochs"), kind, strict=True))
            row |= {"variant": variant, "seeds": len(mine), "diverged": len(mine) - len(good)}
            if good:
                row["score"] = statistics.fmean(r["score"] for r in good.values())
                row["score_hp"] = statistics.fmean(r["score_hp"] for r in good.values())
            if pairs and variant != baseline_of(variant):
                row["gap"], row["half_width"] = interval([a["score"] - b["score"] for a, b in pairs])
                row["loss_ratio"] = statistics.fmean(a["tail_loss"] / b["tail_loss"] for a, b in pairs)
                preset = {s: runs.get((*kind, "preset", s)) for s in good}
                same = [r["score"] - p["score"] for s, r in good.items() if (p := preset[s]) and not p["diverged"]]
                if same and baseline_of(variant) == "baseline" and variant != "preset":
                    row["against_preset"], row["against_preset_half_width"] = interval(same)
            found.append(row)
    return found


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """Format the rows as Markdown, with one table per task, size, compute dtype and number of epochs."""
    lines: list[str] = []
    kinds = list(dict.fromkeys((r["task"], r["size"], r["compute"], r["epochs"]) for r in table))
    for kind in kinds:
        lines += [
            f"**{kind[0]}, {kind[1]}, {kind[3]} epochs, activations in {kind[2]}**",
            "",
            "| variant | seeds | score | weights in high precision | gap (95 %) | significant "
            "| against the preset (95 %) | tail loss, ratio |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for r in table:
            if (r["task"], r["size"], r["compute"], r["epochs"]) == kind:
                lines.append(_line(r))
        lines.append("")
    return "\n".join(lines)


def _line(r: Mapping[str, Any]) -> str:
    name = r["variant"] + (f" ({r['diverged']} diverged)" if r["diverged"] else "")
    score, high = (f"{r[key]:.2f}" if key in r else "" for key in ("score", "score_hp"))
    gap = significant = loss = against = ""
    if "gap" in r:
        half = r["half_width"]
        gap = _shown(r["gap"], half)
        significant = "one seed" if half is None else "yes" if abs(r["gap"]) > half else "no"
        loss = f"{r['loss_ratio']:.3f}"
    if "against_preset" in r:
        against = _shown(r["against_preset"], r["against_preset_half_width"])
    return f"| {name} | {r['seeds']} | {score} | {high} | {gap} | {significant} | {against} | {loss} |"


def _shown(mean: float, half: float | None) -> str:
    return f"{mean:+.2f}" + (f" ± {half:.2f}" if half is not None else "")


def main(arguments: Sequence[str] | None = None) -> str:
    """Print the tables of the results files, and return them as text."""
    parser = argparse.ArgumentParser(prog="table.py", description="Print the tables of the accuracy study.")
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE")
    options = parser.parse_args(arguments)
    missing = [str(path) for path in options.results if not path.is_file()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
    text = markdown(rows(row for path in options.results for row in read_results(path)))
    print(text)
    return text


if __name__ == "__main__":
    try:
        main()
    except ValueError as refusal:
        sys.exit(f"error: {refusal}")
