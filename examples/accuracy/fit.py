"""Train and score one arm: one variant of a task from one seed. Stop anywhere and go on with the same bits.

    lr(t) = lr * t / W  for t < W (the warm-up);   then lr / 2 * (1 + cos(pi (t - W) / (T - W)));   W = 5 % of T steps
    average(t) = the mean of the weights so far for t < H, then average + (weights - average) / H;   H = 10 % of T

The initial weights, batches, augmentation and dropout depend only on the seed, so two arms of one seed differ only in
the precision. The score of the averaged weights stands beside that of the last ones; running statistics of batch norms
are averaged like weights. A loss that is not finite, or ten times as large as at the start, ends the run as diverged.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from unet_coco.backends import keep_backend
from unet_coco.checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from unet_coco.order import mix_seed
from unet_coco.precision import Precision

import te_nvfp4_cv as nv

from .provenance import differences, machine
from .tasks import Task, order_of
from .variants import Variant

COMPUTE = {"fp32": None, "bf16": torch.bfloat16}
WARM_UP, HORIZON, TAIL = 0.05, 0.1, 0.2


class Stopped(Exception):
    """Raised when a run was asked to stop; its checkpoint is written."""


@dataclass(frozen=True)
class Setting:
    """Say where and how runs compute.

    Attributes:
        compute: The dtype of activations outside of NVFP4, a key of COMPUTE.
        backend: Where NVFP4 layers run, as nv.nvfp4_autocast takes it.
        stop: Returns True when the run is to stop.
        every: Seconds between two checkpoints.
    """

    device: torch.device
    compute: str = "fp32"
    backend: str = "auto"
    stop: Callable[[], bool] = lambda: False
    every: float = 240.0

    def precision(self, variant: Variant) -> Precision:
        """Return the precision in which this variant trains."""
        return Precision(variant.name, COMPUTE[self.compute], variant.recipe, backend=self.backend)


class Average:
    """Hold the moving average of a model's weights and running statistics."""

    def __init__(self, model: nn.Module, horizon: float) -> None:
        self.now = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        self.values = [tensor.detach().clone() for tensor in self.now]
        self.horizon, self.seen = max(1.0, horizon), 0

    @torch.no_grad()
    def update(self) -> None:
        """Add the model as it is now."""
        self.seen += 1
        share = 1 / min(self.seen, self.horizon)
        for value, now in zip(self.values, self.now, strict=True):
            value.lerp_(now, share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the averaged values until the block ends."""
        last = [tensor.detach().clone() for tensor in self.now]
        self._write(self.values)
        try:
            yield
        finally:
            self._write(last)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self.now, values, strict=True):
            tensor.copy_(value)


class Run:
    """Train one variant from one seed; `train` does the work, and `row` scores it.

    Args:
        path: The checkpoint. It is read if it exists, and written while the run trains. If None, there is none.
    """

    def __init__(
        self, task: Task, variant: Variant, seed: int, setting: Setting, epochs: int | None = None,
        path: Path | None = None,
    ) -> None:  # fmt: skip
        self.task, self.variant, self.seed, self.setting, self.path = task, variant, seed, setting, path
        self.epochs = epochs or task.size.epochs
        self.epochs_in_nvfp4 = variant.epochs_in_nvfp4(self.epochs)
        self.order = order_of(task, seed)
        self.steps = self.epochs * len(self.order)
        self.precision = setting.precision(variant)
        self.machines: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Go to the first step."""
        torch.manual_seed(self.seed)
        self.model = self.task.model().to(self.setting.device, memory_format=torch.channels_last)  # type: ignore
        if self.variant.recipe is not None and self.variant.recipe.precision:
            nv.set_precision(self.model, self.variant.recipe)
        if self.variant.learn:
            nv.learn_scales(self.model, self.variant.learn)
        self.optimizer = self.task.optimizer(self.model, self.task.size.lr)
        self.average = Average(self.model, HORIZON * self.steps)
        self.step, self.diverged = 0, False
        self.losses: list[float] = []
        self.seconds = self.cpu_seconds = 0.0
        self.machines = []
        self._pending: list[Tensor] = []

    # ---- training ------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train from where the checkpoint ends, or from the first step, to the last one.

        Raises:
            Stopped: The setting asked for it. The checkpoint is written.
        """
        if self.path is not None and self.path.is_file():
            self._load(self.path)
        self._note_machine()
        saved, clocks = time.monotonic(), (time.perf_counter(), time.process_time())
        while self.step < self.steps and not self.diverged:
            epoch, self.order.start = divmod(self.step, len(self.order))
            self.order.epoch = epoch
            for keys in self.order:
                self._one_step(keys, epoch)
                late = time.monotonic() - saved > self.setting.every
                stop = self.setting.stop()
                if late or stop or self.step % len(self.order) == 0:
                    clocks = self._read_clocks(clocks)
                    self._collect_losses()
                    if self.path is not None and (late or stop or self.step == self.steps):
                        save_checkpoint(self.path, self._state())
                        saved = time.monotonic()
                    if stop:
                        raise Stopped
                    if self.diverged:
                        break

    def _one_step(self, keys: list[tuple[int, int]], epoch: int) -> None:
        warm_up = max(1, round(WARM_UP * self.steps))
        if self.step < warm_up:
            factor = (self.step + 1) / warm_up
        else:
            factor = (1 + math.cos(math.pi * (self.step - warm_up) / (self.steps - warm_up))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.task.size.lr * factor
        self.model.train()
        x, y = self.task.batch(keys, self.seed, self.setting.device)
        # Random numbers of a step, such as dropout and rounding, depend on (seed, step) only.
        torch.manual_seed(mix_seed(self.seed, self.step))
        with self.precision.context(self.setting.device, nvfp4=epoch < self.epochs_in_nvfp4):
            loss = self.task.loss(self.model(x), y)
        self.optimizer.zero_grad(set_to_none=True)
        scale = self.variant.loss_scale
        (loss * scale).backward()
        if scale != 1:
            for p in self.model.parameters():
                if p.grad is not None:
                    p.grad /= scale
        self.optimizer.step()
        self.average.update()
        self._pending.append(loss.detach())
        self.step += 1

    def _collect_losses(self) -> None:
        """Read the losses of the steps since the last call; on a GPU, reading waits for it."""
        if self._pending:
            self.losses += torch.stack(self._pending).tolist()
            self._pending = []
        self.diverged = not all(map(math.isfinite, self.losses)) or self.losses[-1] > 10 * self.losses[0]

    def _read_clocks(self, before: tuple[float, float]) -> tuple[float, float]:
        now = time.perf_counter(), time.process_time()
        self.seconds += now[0] - before[0]
        self.cpu_seconds += now[1] - before[1]
        return now

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _identity(self) -> list[Any]:
        return [self.variant.name, self.seed, self.setting.compute, self.steps, self.precision.recipe_text]

    def _state(self) -> dict[str, Any]:
        return {
            "identity": self._identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values,
            "averaged": self.average.seen,
            "rng": rng_state(self.setting.device),
            "nvfp4": self.precision.extra_state(self.model),
            "step": self.step,
            "losses": self.losses,
            "clocks": (self.seconds, self.cpu_seconds),
            "machines": self.machines,
        }

    def _load(self, path: Path) -> None:
        """Go on from a checkpoint; stay at the first step if it is another run's, or if bits would differ."""
        state = load_checkpoint(path)
        if state["identity"] != self._identity():
            print(f"note: {path.name} belongs to another run; starting again", flush=True)
            return
        then = state["machines"][-1]
        try:
            precision = keep_backend(path, then["backend"], self.precision, self.setting.device)
        except RuntimeError as error:
            print(f"note: starting again: {error}", flush=True)
            return
        found = differences(then, machine(precision, self.setting.device))
        if found:
            print(f"note: {path.name}: another {', '.join(found)} than when it began; starting again", flush=True)
            return
        self.precision = precision
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for value, saved in zip(self.average.values, state["average"], strict=True):
            value.copy_(saved)
        self.average.seen, self.step, self.losses = state["averaged"], state["step"], state["losses"]
        set_rng_state(state["rng"], self.setting.device)
        self.precision.load_extra_state(self.model, state["nvfp4"])
        self.seconds, self.cpu_seconds = state["clocks"]
        self.machines = state["machines"]
        self._collect_losses()

    def _note_machine(self) -> None:
        now = machine(self.precision, self.setting.device)
        if now not in self.machines:
            self.machines.append(now)

    # ---- the row -------------------------------------------------------------------------------------------------

    def row(self) -> dict[str, Any]:
        """Score the trained run and return its part of a line of the results file.

        Raises:
            Stopped: The setting asked for it. The trained weights are in the checkpoint.
        """
        row: dict[str, Any] = {"steps": self.step, "diverged": self.diverged}
        clocks = time.perf_counter(), time.process_time()
        if not self.diverged:
            row |= self._scores("")
            with self.average.in_place():
                row |= self._scores("ema_")
            tail = self.losses[-max(1, round(TAIL * self.steps)) :]
            row["tail_loss"] = sum(tail) / len(tail)
        stride = max(1, len(self.losses) // 100)
        parts = [self.losses[start : start + stride] for start in range(0, len(self.losses), stride)]
        row["curve"] = [round(sum(part) / len(part), 5) for part in parts]
        images = self.task.batch([(0, i) for i in range(min(self.task.size.batch, self.task.count))], 0,
                                 self.setting.device)[0]  # fmt: skip
        share = self.precision.flops_share(self.model, images)
        row["nvfp4_flops_share"] = share * self.epochs_in_nvfp4 / self.epochs
        self._read_clocks(clocks)
        row |= {"seconds": round(self.seconds, 1), "cpu_seconds": round(self.cpu_seconds, 1)}
        row |= self.machines[-1]
        return row if len(self.machines) == 1 else row | {"machines": self.machines}

    def _scores(self, prefix: str) -> dict[str, float]:
        self.model.eval()
        device, nvfp4 = self.setting.device, self.epochs_in_nvfp4 == self.epochs

        @contextlib.contextmanager
        def context(nvfp4: bool) -> Iterator[None]:
            if self.setting.stop():
                raise Stopped
            with self.precision.context(device, nvfp4):
                yield

        score, loss = self.task.score(self.model, device, lambda: context(nvfp4))
        high = score
        if nvfp4 and self.variant.recipe is not None:
            high = self.task.score(self.model, device, lambda: context(False))[0]
        return {f"{prefix}score": score, f"{prefix}score_hp": high, f"{prefix}eval_loss": loss}
