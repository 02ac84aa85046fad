"""Train and score one variant of a task from one seed.

    lr(t) = lr / 2 * (1 + cos(pi t / T))

The initial weights, batches, crops and flips depend only on the seed, so two runs of one seed differ only in the
precision. A loss that is not finite, or ten times as large as at the start, ends the run as diverged.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from unet_coco.order import mix_seed

import te_nvfp4_cv as nv

from .tasks import Task, order_of
from .variants import Variant

COMPUTE = {"fp32": None, "bf16": torch.bfloat16}


@contextlib.contextmanager
def precision(recipe: Any, device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Enter torch.autocast with `dtype`, unless it is None, and inside it NVFP4, if there is a recipe."""
    with contextlib.ExitStack() as stack:
        if dtype is not None:
            stack.enter_context(torch.autocast(device.type, dtype))
        if recipe is not None:
            stack.enter_context(nv.nvfp4_autocast(recipe))
        yield


@dataclass
class Trained:
    """Hold a finished run: the model, the recipe for evaluating it, its losses, and whether it diverged."""

    model: nn.Module
    recipe: Any
    losses: list[float]
    steps: int
    diverged: bool
    seconds: float


def fit(
    task: Task, variant: Variant, seed: int, device: torch.device, compute: str, epochs: int | None = None
) -> dict[str, Any]:
    """Train and evaluate one run, and return its part of a line of the results file."""
    run = train(task, variant, seed, device, compute, epochs)
    losses = run.losses
    row: dict[str, Any] = {"steps": len(losses), "diverged": run.diverged, "seconds": run.seconds}
    if not run.diverged:
        row |= _scores(task, run.model, run.recipe, device, COMPUTE[compute])
        tail = losses[-max(1, run.steps // 5) :]
        row["tail_loss"] = sum(tail) / len(tail)  # of the last 20 % of the steps
    stride = max(1, len(losses) // 100)
    row["curve"] = [round(sum(part) / len(part), 5) for part in _parts(losses, stride)]
    return row


def train(
    task: Task, variant: Variant, seed: int, device: torch.device, compute: str, epochs: int | None = None
) -> Trained:
    """Train one variant from one seed, without evaluating it."""
    dtype = COMPUTE[compute]
    torch.manual_seed(seed)
    model = task.model().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    recipe = None if variant.first else variant.recipe
    # The table is set even if training starts in high precision, because learn_scales below needs it.
    _set_table(model, variant.recipe)
    if variant.learn:
        nv.learn_scales(model, variant.learn)
    base = task.size.lr * variant.lr
    optimizer = task.optimizer(model, base)
    order = order_of(task, seed)
    total_epochs = epochs or task.size.epochs
    steps = total_epochs * len(order)
    last, first = variant.epochs_of(total_epochs)
    diverged = False
    losses: list[float] = []
    begun, step = time.perf_counter(), 0
    for epoch in range(total_epochs):
        if last and epoch == total_epochs - last:
            recipe = variant.last_recipe
            _set_table(model, recipe)
        if first and epoch == first:
            recipe = variant.recipe
        model.train()
        order.epoch = epoch
        pending = []
        for keys in order:
            for group in optimizer.param_groups:
                group["lr"] = base / 2 * (1 + math.cos(math.pi * step / steps))
            x, y = task.batch(keys, seed, device)
            # Random numbers of a step, such as dropout and rounding, depend on (seed, step) only.
            torch.manual_seed(mix_seed(seed, step))
            with precision(recipe, device, dtype):
                loss = task.loss(model(x), y, **dict(variant.loss))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            pending.append(loss.detach())
            step += 1
        losses += torch.stack(pending).tolist()
        diverged = not all(map(math.isfinite, losses)) or losses[-1] > 10 * losses[0]
        if diverged:
            break
    return Trained(model, recipe, losses, steps, diverged, time.perf_counter() - begun)


def _set_table(model: nn.Module, recipe: Any) -> None:
    if recipe is not None and recipe.precision:
        nv.set_precision(model, recipe)


def _scores(task: Task, model: nn.Module, recipe: Any, device: torch.device, dtype: Any) -> dict[str, float]:
    model.eval()
    score, loss = task.score(model, device, lambda: precision(recipe, device, dtype))
    high = score if recipe is None else task.score(model, device, lambda: precision(None, device, dtype))[0]
    return {"score": score, "score_hp": high, "eval_loss": loss}


def _parts(values: list[float], size: int) -> Iterator[list[float]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
