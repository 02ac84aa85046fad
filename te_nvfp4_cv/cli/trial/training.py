"""The checks of the training step: it runs in NVFP4, what part of it does, and how good its gradient is."""

from __future__ import annotations

import math

from te_nvfp4_cv.cli.trial.cells import FACTOR, SLACK, Cell, Finding, Trial
from te_nvfp4_cv.cli.trial.control import SEED, control
from te_nvfp4_cv.cli.trial.subject import seeded
from te_nvfp4_cv.report.watch import coverage

DRAWS = 5  # of the control, at most


def runs(trial: Trial) -> Cell:
    """Check that a step gives a finite loss, and every parameter the gradient that it has in high precision."""
    high, nvfp4 = trial.high, trial.nvfp4
    if not math.isfinite(nvfp4.loss) and math.isfinite(high.loss):
        raise Finding(f"loss {nvfp4.loss} (high precision {high.loss:.3g})")
    lost = [name for name in high.gradients if name not in nvfp4.gradients]
    if lost:
        raise Finding(f"{len(lost)} parameters without a gradient: {lost[0]}")
    broken = [n for n, g in nvfp4.gradients.items() if not g.isfinite().all() and high.gradients[n].isfinite().all()]
    if broken:
        raise Finding(f"{len(broken)} gradients are not finite: {broken[0]}")
    dead = [n for n, g in nvfp4.gradients.items() if high.gradients[n].any() and not g.any()]
    if dead:
        raise Finding(f"{len(dead)} gradients are zero: {dead[0]}")
    return Cell(True, "ok")


def share(trial: Trial) -> Cell:
    """Report the share of FLOPs in NVFP4, as nv.coverage says. It is a finding if none runs in NVFP4."""
    model, (args, kwargs) = trial.copy(), trial.subject.training_call()
    seeded()
    report = coverage(model, *args, recipe=trial.recipe, backend=trial.backend, **kwargs)
    told = sum(row.calls for row in report.rows if row.nvfp4)
    if told != trial.calls:
        raise Finding(f"coverage counts {told} calls in NVFP4, the step made {trial.calls}")
    return Cell(told > 0, f"{report.nvfp4_flops_share:.0%}")


def gradient(trial: Trial) -> Cell:
    """Compare the gradient's error with that of the control: of its largest draw, where one does not decide.

    Draws differ by a few per cent, but by a factor where batch norms see few values of a channel: noise in the forward
    pass then changes their variances, by which backward divides.
    """
    own, other = trial.nvfp4.error(trial.high), 0.0
    for seed in range(SEED, SEED + DRAWS):
        noisy = trial.step(trial.copy(), control(trial.recipe, trial.backend, seed))
        other = max(other, noisy.error(trial.high))
        if own <= FACTOR * other + SLACK:
            break
    return Cell(own <= FACTOR * other + SLACK, f"{own:.2f} / {other:.2f}")
