"""Read the plan of the study (docs/accuracy/plan.toml) and say which runs it wants next, given those that are done."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from te_nvfp4_cv.errors import value_error

from .pairs import Rows, has_gap, pairs_of, pairs_planned
from .rows import Arm
from .tasks import TASKS, variants_of

PLAN = Path(__file__).resolve().parents[2] / "docs" / "accuracy" / "plan.toml"
TO_THE_TARGET = "to the target"


@dataclass(frozen=True)
class Stage:
    """Hold one stage of the plan, as the file explains it.

    Attributes:
        pairs: A number, or TO_THE_TARGET; then the stage has one variant.
        first_seed: The seed of the first pair.
        halfway: After so many pairs only variants go on that are better than the preset somewhere. 0: all of them.
    """

    title: str
    tasks: tuple[str, ...]
    variants: tuple[str, ...]
    pairs: int | str
    epochs: int | None = None
    only_after_gap: bool = False
    first_seed: int = 0
    halfway: int = 0


@dataclass(frozen=True)
class Plan:
    """Hold the plan for one size. `tasks` gives the half width to reach, and the largest number of pairs."""

    size: str
    compute: str
    backend: str
    first_pairs: int
    budget_hours: float
    tasks: dict[str, dict[str, float]]
    stages: tuple[Stage, ...]

    def wanted(self, rows: Rows) -> Iterator[Arm]:
        """Yield the runs that are not done, in the order of the plan; none if the budget is spent.

        Later stages may wait for earlier ones: they appear when what decides about them is done.
        """
        spent = sum(row["cpu_seconds"] for arm, row in rows.items() if arm.size == self.size)
        if spent >= 3600 * self.budget_hours:
            return
        seen = set(rows)
        for stage in self.stages:
            pairs = {task: self._pairs(stage, task, rows) for task in stage.tasks}
            for pair in range(max(pairs.values())):
                for task in stage.tasks:
                    for variant in ("baseline", *stage.variants) if pair < pairs[task] else ():
                        arm = self.arm(task, variant, stage.first_seed + pair, stage.epochs)
                        dropped = pair >= stage.halfway > 0 and self.ended_halfway(stage, arm, rows)
                        if arm not in seen and not dropped:
                            seen.add(arm)
                            yield arm

    def arm(self, task: str, variant: str, seed: int = 0, epochs: int | None = None) -> Arm:
        """Return the arm, with the task's own number of epochs unless `epochs` is given."""
        return Arm(task, self.size, self.compute, epochs or TASKS[task][self.size].epochs, variant, seed)

    def has_target(self, arm: Arm) -> bool:
        """Return True if the plan chooses the number of this variant's pairs by the half interval that they reach."""
        return any(
            stage.pairs == TO_THE_TARGET and arm.task in stage.tasks and arm.variant in stage.variants
            and arm == self.arm(arm.task, arm.variant, arm.seed, stage.epochs)
            for stage in self.stages
        )  # fmt: skip

    def pairs_to_target(self, task: str, rows: Rows, variant: str = "preset") -> int:
        """Return how many pairs of the variant are wanted, as far as those that are done tell."""
        pairs = pairs_of(rows, self.arm(task, variant))
        differences = pairs.differences(pairs.chosen_score(self.first_pairs))
        most = int(self.tasks[task]["most"])
        wanted = pairs_planned(differences, self.first_pairs, self.tasks[task]["target"], most)
        return min(wanted + pairs.diverged, most)

    def shows_gap(self, task: str, rows: Rows) -> bool:
        """Return True if the pairs of the preset are complete and show a gap."""
        pairs = pairs_of(rows, self.arm(task, "preset"))
        complete = len(pairs.rows) + pairs.diverged >= self.pairs_to_target(task, rows)
        return complete and has_gap(pairs, self.deciding_score(task, rows))

    def deciding_score(self, task: str, rows: Rows) -> str:
        """Return which score decides on this task, "score" or "ema_score": the preset's pairs say it for all levers."""
        return pairs_of(rows, self.arm(task, "preset")).chosen_score(self.first_pairs)

    def ended_halfway(self, stage: Stage, arm: Arm, rows: Rows) -> bool:
        """Return True if the first pairs are neither in the score nor in the training loss better than the preset's."""
        seeds = range(stage.first_seed, stage.first_seed + stage.halfway)
        first = {other: row for other, row in rows.items() if other.seed in seeds}
        pairs = pairs_of(first, arm, "preset")
        if arm.variant in ("baseline", "preset") or len(pairs.rows) + pairs.diverged < stage.halfway:
            return False
        if not pairs.rows:
            return True
        better = fmean(pairs.differences("score")) > 0 or fmean(pairs.loss_ratios()) < 1
        return not better

    def _pairs(self, stage: Stage, task: str, rows: Rows) -> int:
        if stage.only_after_gap and not self.shows_gap(task, rows):
            return 0
        if stage.pairs != TO_THE_TARGET:
            return int(stage.pairs)
        (variant,) = stage.variants
        return self.pairs_to_target(task, rows, variant)


def read_plan(path: Path, size: str) -> Plan:
    """Read the plan for one size.

    Raises:
        ValueError: If it names something that does not exist, or asks for what a variant cannot do.
    """
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    if size not in table:
        raise value_error(f"{path}: no such size.", got=size, needs=" or ".join(table), fix="--size cpu")
    given = dict(table[size])
    stages = tuple(_stage(stage, path) for stage in given.pop("stages"))
    plan = Plan(size=size, stages=stages, **given)
    for stage in stages:
        if stage.pairs == TO_THE_TARGET and len(stage.variants) != 1:
            raise value_error(
                f"{path}: a stage has one target and several variants.",
                got=f"{stage.title}: {', '.join(stage.variants)}",
                needs="one variant, whose pairs are added until its half interval is at the target",
                fix="give each of them a stage",
            )
        for task in stage.tasks:
            if stage.pairs == TO_THE_TARGET or stage.only_after_gap:
                _known(path, "task of [tasks]", task, plan.tasks)
            epochs = plan.arm(task, "baseline", epochs=stage.epochs).epochs
            for name in stage.variants:
                _known(path, "variant", name, variants_of(task))
                variants_of(task)[name].epochs_in_nvfp4(epochs)  # raises now, not after hours
    return plan


def _stage(given: dict[str, Any], path: Path) -> Stage:
    for key in given:
        _known(path, "field of a stage", key, {field.name for field in fields(Stage)})
    for task in given["tasks"]:
        _known(path, "task", task, TASKS)
    given |= {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    return Stage(**given)


def _known(path: Path, kind: str, name: str, known: Any) -> None:
    if name not in known:
        raise value_error(
            f"{path}: unknown {kind}.", got=name, needs="; ".join(known), fix="correct the plan, which names it"
        )
