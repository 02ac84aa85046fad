"""Print tables from results files of study.py: each variant in pairs with the baseline of the same seed (pairs.py).

    python examples/accuracy/table.py [FILE ..]         default: docs/accuracy/study.jsonl

    gap, 95 %       mean difference of the last weights' scores, with its half interval, and the standard deviation
    averaged        the same for the averaged weights;   * marks which of the two decides (docs/accuracy/PLAN.md)
    tail loss       mean training loss of the last 20 % of the steps, divided by the baseline's, with its half interval
    to go           pairs that the target still needs, given the standard deviation so far; 0 before any conclusion

Rows of the small study of before, which has no averaged weights, are read too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve()
if str(_HERE.parents[1]) not in sys.path:
    sys.path.insert(0, str(_HERE.parents[1]))
sys.path.append(str(_HERE.parents[2]))

from accuracy.pairs import FIXED, PLANNED, Pairs, Rows, interval, pairs_of  # noqa: E402
from accuracy.plan import PLAN, Plan, read_plan  # noqa: E402
from accuracy.rows import Arm, read_rows  # noqa: E402

COLUMNS = (
    "variant", "pairs", "score", "averaged", "gap, 95 % (sd)", "gap, averaged (sd)", "against the preset", "tail loss",
    "FLOPs in NVFP4", "to go",
)  # fmt: skip


def kinds(rows: Rows) -> dict[Arm, list[str]]:
    """Return the variants by kind of run: an arm with the variant "baseline" and seed 0."""
    found: dict[Arm, list[str]] = {}
    for arm in rows:
        names = found.setdefault(replace(arm, variant="baseline", seed=0), [])
        if arm.variant not in names:
            names.append(arm.variant)
    return found


def baseline_of(variant: str) -> str:
    """Return the variant to compare with: the baseline with the same learning rate and loss, in the small study."""
    base, comma, rest = variant.partition(", ")
    return f"baseline, {rest}" if comma and base in ("baseline", "preset") else "baseline"


def summary(rows: Rows, arm: Arm, plan: Plan | None) -> dict[str, Any]:
    """Return what the table says of one variant of one kind.

    Args:
        arm: Any seed of the variant.
        plan: The plan for the pairs to go. If None, there is no target.
    """
    mine = [row for other, row in rows.items() if replace(other, seed=arm.seed) == arm]
    good = [row for row in mine if not row["diverged"]]
    found: dict[str, Any] = {"variant": arm.variant, "pairs": len(mine), "diverged": len(mine) - len(good)}
    for score in ("score", "ema_score"):
        values = [row[score] for row in good if score in row]
        found |= {score: statistics.fmean(values)} if values else {}
    if good and "nvfp4_flops_share" in good[0]:
        found["flops"] = good[0]["nvfp4_flops_share"]
    against = baseline_of(arm.variant)
    if arm.variant == against:
        return found
    pairs = pairs_of(rows, arm, against)
    found["pairs"] = len(pairs.rows)
    first = plan.first_pairs if plan else 4
    found["decides"] = pairs.chosen_score(first)
    to_target = plan is not None and plan.has_target(arm)
    level = PLANNED if to_target else FIXED
    found["gaps"] = {score: _gap(pairs, score, level) for score in ("score", "ema_score") if pairs.differences(score)}
    if pairs.rows:
        found["loss_ratio"], found["loss_half"] = interval(pairs.loss_ratios(), level)
    if against == "baseline" and arm.variant != "preset":
        same = pairs_of(rows, arm, "preset")
        found["against_preset"] = _gap(same, found["decides"], FIXED) if same.differences(found["decides"]) else None
    if plan and to_target:
        found["to_go"] = max(0, plan.pairs_to_target(arm.task, rows, arm.variant) - len(pairs.rows) - pairs.diverged)
    return found


def _gap(pairs: Pairs, score: str, level: float) -> tuple[float, float | None, float | None]:
    """Return mean, half interval and standard deviation of the differences."""
    differences = pairs.differences(score)
    return *interval(differences, level), statistics.stdev(differences) if len(differences) > 1 else None


def markdown(rows: Rows, plans: Mapping[str, Plan]) -> str:
    """Return one Markdown table per task, size, compute dtype and number of epochs.

    Args:
        plans: The plans by size.
    """
    lines: list[str] = []
    for kind, names in kinds(rows).items():
        plan = plans.get(kind.size)
        lines += [f"**{kind.task}, {kind.size}, {kind.epochs} epochs, activations in {kind.compute}**", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [_line(summary(rows, replace(kind, variant=name), plan)) for name in names]
        lines.append("")
    return "\n".join(lines)


def _line(s: Mapping[str, Any]) -> str:
    cells = [s["variant"] + (f" ({s['diverged']} diverged)" if s["diverged"] else ""), str(s["pairs"])]
    cells += [f"{s[score]:.2f}" if score in s else "" for score in ("score", "ema_score")]
    for score in ("score", "ema_score"):
        gap = s.get("gaps", {}).get(score)
        cells.append("" if gap is None else shown(*gap) + (" *" if s["decides"] == score else ""))
    cells.append(shown(*s["against_preset"][:2]) if s.get("against_preset") else "")
    loss = "" if "loss_ratio" not in s else f"{s['loss_ratio']:.3f}"
    cells.append(loss + (f" ± {s['loss_half']:.3f}" if s.get("loss_half") is not None else ""))
    cells.append(f"{s['flops']:.1%}" if s.get("flops") else "")
    cells.append(str(s.get("to_go", "")))
    return f"| {' | '.join(cells)} |"


def shown(mean: float, half: float | None, deviation: float | None = None) -> str:
    """Return a gap as text, with its half interval and standard deviation as far as they are known."""
    text = f"{mean:+.2f}" + (f" ± {half:.2f}" if half is not None else "")
    return text + (f" ({deviation:.2f})" if deviation is not None else "")


def main(arguments: Sequence[str] | None = None) -> str:
    """Print the tables of the results files, and return them as text."""
    parser = argparse.ArgumentParser(prog="table.py", description="Print the tables of the accuracy study.")
    parser.add_argument("results", type=Path, nargs="*", metavar="FILE", default=[PLAN.with_name("study.jsonl")])
    parser.add_argument("--plan", type=Path, default=PLAN, metavar="FILE")
    options = parser.parse_args(arguments)
    missing = [str(path) for path in options.results if not path.is_file()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
    text = markdown(read_rows(options.results), {size: read_plan(options.plan, size) for size in ("cpu", "full")})
    print(text)
    return text


if __name__ == "__main__":
    try:
        main()
    except ValueError as refusal:
        sys.exit(f"error: {refusal}")
