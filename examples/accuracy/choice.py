"""Choose a better preset by the rule of docs/accuracy/PLAN.md: levers in pairs with the preset of the same seeds.

    qualifies by score   the mean score is better than the preset's, and the 95 % interval of the difference excludes 0
    qualifies by loss    only where none does by score: the same for how near the training loss is to the baseline's
    chosen               the best mean; but a lever nearly as good that runs more FLOPs in NVFP4 goes before it

Nothing is chosen before every lever has its pairs, or has ended halfway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .pairs import Rows, interval, pairs_of
from .plan import Plan, Stage

TASK = "shapes-unet"  # on which the rule chooses
NEARLY = {"score": 0.05, "loss": 0.01}  # points, and the ratio of training losses
Difference = tuple[float, float | None]  # mean, and half width of its 95 % interval


@dataclass(frozen=True)
class Judged:
    """Hold what one lever gives.

    Attributes:
        better: By "score" (points) and "loss" (how much nearer the loss ratio is to 1), against the preset.
        flops: The share of the training FLOPs in NVFP4.
        state: "complete", "ended halfway" or "runs".
    """

    variant: str
    pairs: int
    better: dict[str, Difference]
    flops: float
    state: str

    def qualifies(self, by: str) -> bool:
        """Return True if the lever is better by that measure, and the interval excludes zero."""
        mean, half = self.better.get(by, (0.0, None))
        return self.state == "complete" and half is not None and mean > half


def judged(rows: Rows, plan: Plan) -> list[Judged]:
    """Return what each lever gives, in the order of the plan."""
    stage, score = _stage(plan), plan.deciding_score(TASK, rows)
    preset, found = _loss_ratios(rows, plan, "preset"), []
    for variant in stage.variants[1:]:
        arm = plan.arm(TASK, variant)
        pairs, mine = pairs_of(rows, arm, "preset"), _loss_ratios(rows, plan, variant)
        nearer = [abs(preset[seed] - 1) - abs(ratio - 1) for seed, ratio in mine.items() if seed in preset]
        better = {"score": pairs.differences(score), "loss": nearer}
        done = len(pairs.rows) + pairs.diverged
        state = "complete" if done >= int(stage.pairs) else "runs"
        if state == "runs" and plan.ended_halfway(stage, arm, rows):
            state = "ended halfway"
        shares = [row["nvfp4_flops_share"] for row, _ in pairs.rows]
        means = {by: interval(values) for by, values in better.items() if values}
        found.append(Judged(variant, len(pairs.rows), means, shares[0] if shares else 0.0, state))
    return found


def _stage(plan: Plan) -> Stage:
    """Return the stage of the levers, the first of which is the preset itself."""
    stage = next(stage for stage in plan.stages if stage.only_after_gap and TASK in stage.tasks)
    assert stage.variants[0] == "preset"
    return stage


def _loss_ratios(rows: Rows, plan: Plan, variant: str) -> dict[int, float]:
    """Return the training loss of the last 20 % of the steps, divided by the baseline's, by seed."""
    pairs = pairs_of(rows, plan.arm(TASK, variant))
    return dict(zip((mine["seed"] for mine, _ in pairs.rows), pairs.loss_ratios(), strict=True))


def chosen(levers: Sequence[Judged]) -> Judged | None:
    """Return the lever that the rule chooses; None if the preset stays, or if levers still run."""
    if any(lever.state == "runs" for lever in levers):
        return None
    for by in ("score", "loss"):
        good = [lever for lever in levers if lever.qualifies(by)]
        if good:
            best = max(lever.better[by][0] for lever in good)
            close = [lever for lever in good if lever.better[by][0] >= best - NEARLY[by]]
            return max(close, key=lambda lever: (lever.flops, lever.better[by][0]))
    return None


HEAD = ("lever", "pairs", "score, better by", "training loss, nearer by", "FLOPs in NVFP4", "state")


def lines(rows: Rows, plan: Plan) -> list[list[str]]:
    """Return the cells of a table with this HEAD."""
    levers = judged(rows, plan)
    choice, found = chosen(levers), []
    for lever in levers:
        cells = [lever.variant, str(lever.pairs)]
        for by, digits in (("score", 2), ("loss", 3)):
            mean, half = lever.better.get(by, (None, None))
            text = "" if mean is None else f"{mean:+.{digits}f}"
            cells.append(text + ("" if half is None else f" ± {half:.{digits}f}"))
        share = f"{lever.flops:.1%}" if lever.pairs else ""
        found.append([*cells, share, "**chosen**" if lever is choice else lever.state])
    return found
