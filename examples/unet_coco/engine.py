"""Train one precision on any task (task.py), from a seed or from a checkpoint.

    step t:  torch.manual_seed(mix_seed(seed, t));  lr(t) = lr / 2 * (1 + cos(pi t / T));  AdamW on the task's loss

The state after step t depends only on (settings, seed, t), not on how often the run was stopped before: data order,
augmentation and dropout are functions of the seed and the position, and the checkpoint contains the rest. Checkpoints
are written at the end of each epoch, at the last step, every --save-every steps and when a signal stops the run
(stopping.py); a validation that was stopped is done first after a resume. With several ranks, each trains with its
part of the batch and with separate dropout, mix_seed(seed, t, rank); all evaluate the whole split, and rank 0 writes.
Training stops with an error at a loss that is not finite, and refuses a checkpoint of another run or one beyond
--epochs.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from te_nvfp4_cv import sensitivity
from te_nvfp4_cv.errors import runtime_error
from te_nvfp4_cv.telemetry import Telemetry

from .average import Average
from .backends import backend_of
from .identity import data_identity
from .initial import load_initial
from .levers import Bundles, learn, parameter_groups
from .metrics import saved_bytes, to_device
from .options import Settings
from .order import TrainOrder, eval_loader, mix_seed, train_loader
from .parallel import whole_model, whole_state, wrap
from .position import Position
from .precision import Precision
from .ranks import Ranks
from .resumable import Resumable
from .split import SegmentationData
from .stopping import Stop, Stopped
from .tasks import make_task
from .tracking import Progress

WARM_UP_STEPS = 3
TIMES_KEPT = 1000


class Trainer(Resumable):
    """Train and evaluate one precision: hold its model, optimizer and data.

    Args:
        folder: Folder for last.pt.
        ranks: The ranks that train together. Every method must be called on all of them.
        stop: What raises Stopped between two steps when a signal has come; a SharedStop on several ranks.
    """

    def __init__(
        self,
        precision: Precision,
        settings: Settings,
        data: SegmentationData,
        device: torch.device,
        folder: Path,
        ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
        stop: Stop | None = None,
    ) -> None:
        self.precision, self.settings, self.device, self.folder = precision, settings, device, folder
        self.ranks, self.stop = ranks, stop or Stop()
        backend_of(precision, device)  # raises if it cannot run here
        self.task = make_task(settings, data)
        self.data = data_identity(data, settings)
        # The same seed for every precision, so that all of them start from the same weights.
        random.seed(settings.seed)
        np.random.seed(settings.seed % 2**32)
        torch.manual_seed(settings.seed)
        self.model = self._new_model()
        if not (settings.resume and self._has_checkpoint()):
            self.task.load_pretrained(self.model)
            if settings.init_from is not None:
                load_initial(self.model, settings.init_from, settings.init_skip, precision.recipe is None)
        self.wrapped = wrap(self.model, precision, ranks, device, settings.deterministic)
        self._whole: tuple[int, nn.Module] | None = None
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, settings.weight_decay), lr=settings.lr, fused=True
        )
        self.average = Average(self.model, settings.ema) if settings.ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision.dtype == torch.float16)
        loading = settings.workers, device.type == "cuda", self.task.collate
        train_set = self.task.dataset(data.train, train=True)
        self.order = TrainOrder(len(data.train), settings.batch_size, settings.seed, ranks.rank, ranks.world)
        self.loader = train_loader(train_set, self.order, *loading)
        self.eval_loaders = {
            raw.name: eval_loader(self.task.dataset(raw, train=False), settings.batch_size, *loading)
            for raw in (data.val, data.test)
            if raw is not None
        }
        self.val_images = len(data.val)
        self.total_steps = settings.epochs * len(self.order)
        if settings.steps is not None:
            self.total_steps = min(self.total_steps, settings.steps)
        self.schedule_steps = settings.schedule_steps or settings.epochs * len(self.order)
        self.position = Position()
        self._pending: list[Tensor] = []  # losses that are still on the device
        self._scores: tuple[int, dict[str, float]] | None = None  # of the last validation: its step, loss and scores
        self.steps_here = 0  # steps that this process has done, without those before a resume
        self.bundles = Bundles(folder, settings, precision, self.task.class_names, self.task.class_weights)

    def _new_model(self) -> nn.Module:
        model = self.task.model().to(self.device)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.precision.prepare(model)
        learn(model, self.settings, self.precision.recipe, bool(self.ranks.parallel))
        return model

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, watch: Telemetry) -> None:
        """Train from `position` to the last step, with a checkpoint at each epoch's end and at the last step.

        Args:
            watch: Telemetry, which samples steps at its interval and receives the run's figures.
        """
        at, every = self.position, self.settings.log_every
        if at.step < self.total_steps and at.curve and at.curve[-1]["step"] % every:
            at.curve.pop()  # the last step of a run that --steps had stopped; a run in one go has no such row
        progress = Progress(self.precision.name, self.total_steps, at.step, self.ranks.rank)
        try:
            if at.epoch and not at.batch and not self._is_validated():
                self._validate(progress, watch)
                with self.stop.deferred():
                    self._save()
            self.model.train()
            while at.step < self.total_steps:
                self._train_epoch(progress, watch)
        except Stopped as stopped:
            with self.stop.deferred():
                self._drain()
                self._save()
            stopped.done = f"step {at.step} of {self.total_steps} of {self.precision.name}"
            raise
        finally:
            progress.close()

    def _train_epoch(self, progress: Progress, watch: Telemetry) -> None:
        at = self.position
        self.order.epoch, self.order.start = at.epoch, at.batch
        self._whole = None  # with FSDP2 this is a full copy, which must not take memory while the shards train
        if not at.batch and at.epoch and self._nvfp4_of(at.epoch) is not self._nvfp4_of(at.epoch - 1):
            # the statistics of batch norms, if the model has any, come from NVFP4 until here
            loader = self.stop.between(self.loader)
            sensitivity.update_bn(self.model, loader, self.context(at.epoch), device=self.device)
        for images, targets in self.loader:
            with self.stop.deferred():
                self._train_batch(images, targets, progress, watch)
            if at.batch == len(self.order) or at.step == self.total_steps:
                break
        if at.batch == len(self.order):
            with self.stop.deferred():
                at.last_epoch_loss = sum(at.losses) / len(at.losses)
                at.epoch, at.batch, at.losses = at.epoch + 1, 0, []
            self._validate(progress, watch)
        with self.stop.deferred():
            self._save()

    def _train_batch(self, images: Tensor, targets: Any, progress: Progress, watch: Telemetry) -> None:
        """Take one step, and do all that belongs to it: times, position, losses, curve, checkpoint."""
        at, every, save_every = self.position, self.settings.log_every, self.settings.save_every
        begun = self._clock()
        self._pending.append(self._step(*to_device(images, targets, self.device), watch))
        times = at.first_ms if self.steps_here < WARM_UP_STEPS else at.step_ms
        times.append((self._clock() - begun) * 1e3)
        del times[:-TIMES_KEPT]
        self.steps_here += 1
        at.step, at.batch = at.step + 1, at.batch + 1
        last = at.step == self.total_steps
        ends, saves = last or at.batch == len(self.order), bool(save_every and at.step % save_every == 0)
        first = self.steps_here == 1  # of which a line is printed at once: it tells that all works
        if at.step % every == 0 or ends or saves or first:
            self._drain()
        figures: dict[str, float] = {}
        if at.step % every == 0 or last:
            figures = {"loss": sum(at.losses[-every:]) / len(at.losses[-every:]), "lr": self._lr(at.step - 1)}
            at.curve.append({"step": at.step, **figures})
            watch.scalars(at.step, {f"train/{key}": value for key, value in figures.items()})
        shown = figures or ({"loss": at.losses[-1], "lr": self._lr(at.step - 1)} if first else {})
        progress.step(at.step, self.order.batch_size, shown)
        if saves and not ends:  # at the end of an epoch and of the run a checkpoint is written anyway
            self._save()

    def _step(self, images: Tensor, targets: Any, watch: Telemetry) -> Tensor:
        """Run one optimizer step and return the loss of the whole batch, on the device."""
        at, rank = self.position, self.ranks.rank
        # Rank 0 draws what a single process would draw.
        seed = mix_seed(self.settings.seed, at.step, *([rank] if rank else []))
        self.bundles.before(self.model)
        torch.manual_seed(seed)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(at.step)
        self.optimizer.zero_grad(set_to_none=True)
        # get_scale waits for the GPU, so it is called in sampled steps only.
        with watch.step(at.step, self.scaler.get_scale() if watch.due(at.step) else 1.0):
            with self.context(at.epoch):
                output = self.wrapped(images, *self.task.inputs(targets))
                loss = self.task.loss(output, targets, self.ranks.group)
            self.scaler.scale(loss).backward()
        # Before the optimizer step: a replay needs the weights from before it.
        self.bundles.check(
            at.step + 1,
            loss,
            self.model,
            lambda: whole_state(self.model, self.optimizer, self.ranks)[0],
            (images, targets),
            seed,
            rank == 0,
            self.scaler.is_enabled(),
            self._nvfp4_of(at.epoch) is not None,
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(at.step)
        return loss.detach()

    def _lr(self, step: int) -> float:
        return self.settings.lr / 2 * (1 + math.cos(math.pi * min(step / self.schedule_steps, 1.0)))

    def _drain(self) -> None:
        """Fetch the losses of the last steps, and raise an error if one is not finite."""
        at = self.position
        values = torch.stack(self._pending).tolist() if self._pending else []
        self._pending.clear()
        for back, value in zip(range(len(values), 0, -1), values, strict=True):
            if not math.isfinite(value):
                raise runtime_error(
                    f"{self.precision.name}: the training has diverged.",
                    got=f"loss {value} at step {at.step - back + 1}",
                    needs="a finite loss",
                    fix="lower --lr, or choose a safer recipe; the last checkpoint is from before this step",
                )
        at.losses += values

    def _is_validated(self) -> bool:
        """Return whether the epoch that has just ended has its row, or --eval-every leaves it out."""
        at = self.position
        if at.epoch % self.settings.eval_every and at.epoch < self.settings.epochs:
            return True
        return bool(at.epochs) and at.epochs[-1]["step"] == at.step

    def _validate(self, progress: Progress, watch: Telemetry) -> None:
        """Validate the epoch that has just ended, if --eval-every wants it."""
        if self._is_validated():
            return
        at = self.position
        with progress.phase(f"validating on {self.val_images} images"):
            row = self._validated_row(watch)
        with self.stop.deferred():
            at.epochs.append(row)
        progress.line(f"{self.precision.name:>8}  {self._in_words(row)}")

    def _validated_row(self, watch: Telemetry) -> dict[str, float]:
        """Validate, report the scores, and return the row of history.json."""
        at = self.position
        scores = self.scores()
        watch.scalars(at.step, {f"val/{key}": value for key, value in scores.items()})
        row = {"epoch": at.epoch + at.batch / len(self.order), "step": at.step, "train_loss": self._train_loss()}
        return row | {"val_loss" if key == "loss" else key: value for key, value in scores.items()}

    def _in_words(self, row: dict[str, float]) -> str:
        shown = "  ".join(f"{title} {row[key]:.3f}" for key, title in self.task.titles.items() if key in row)
        return (
            f"epoch {row['epoch']:>3g}/{self.settings.epochs}  train loss {row['train_loss']:.4f}"
            f"  val loss {row['val_loss']:.4f}  {shown}"
        )

    def _train_loss(self) -> float:
        """Return the mean loss of the epoch so far, or of the one that has just ended."""
        at = self.position
        return sum(at.losses) / len(at.losses) if at.losses else at.last_epoch_loss

    def history(self, watch: Telemetry) -> dict[str, list[dict[str, float]]]:
        """Return the rows for history.json, with a validation at the last step also if that is within an epoch.

        That last row is not part of `position`: a run in one go would not have it.
        """
        at = self.position
        rows = at.epochs
        if not rows or rows[-1]["step"] != at.step:
            rows = [*rows, self._validated_row(watch)]
        return {"curve": at.curve, "epochs": rows}

    def tell_again(self, watch: Telemetry) -> None:
        """Report the figures of the checkpoint's step again after a resume.

        TensorBoard then hides what it already has for later steps.
        """
        at = self.position
        for row in at.curve[-1:]:
            if row["step"] == at.step:
                watch.scalars(at.step, {"train/loss": row["loss"], "train/lr": row["lr"]})
        for row in at.epochs[-1:]:
            if row["step"] == at.step:
                scores = {key: row[key] for key in row if key in self.task.titles}
                watch.scalars(
                    at.step, {f"val/{key}": value for key, value in scores.items()} | {"val/loss": row["val_loss"]}
                )

    def _clock(self) -> float:
        if self.device.type == "cuda":
            # Work on a GPU is asynchronous; without waiting, only the launches would be timed.
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    # ---- evaluation --------------------------------------------------------------------------------------------------

    @property
    def whole(self) -> nn.Module:
        """Return the model to evaluate.

        No rank waits for another one in this model. Getting it may need all ranks, so all of them must call this.
        """
        if self._whole is None or self._whole[0] != self.position.step:
            self._whole = None
            # Making a copy draws weights, which must not move the generator that training uses.
            with torch.random.fork_rng(devices=[]):
                self._whole = self.position.step, whole_model(self.model, self._new_model, self.ranks)
        return self._whole[1]

    def evaluate(self, split: str, high_precision: bool = False) -> dict[str, float]:
        """Compute loss and scores of a split, in the precision of the training or, with the same weights, in fp32."""
        context = nullcontext if high_precision else self.context
        with self.averaged():
            return self.task.evaluate(self.whole, self.stop.between(self.eval_loaders[split]), self.device, context)

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the model has the weights to evaluate: with --ema their average."""
        return nullcontext() if self.average is None else self.average.used()

    def scores(self) -> dict[str, float]:
        """Return loss and scores of the validation split at this step, computed once."""
        if self._scores is None or self._scores[0] != self.position.step:
            self._scores = self.position.step, self.evaluate("val")
        return self._scores[1]

    def context(self, epoch: int | None = None) -> AbstractContextManager[None]:
        """Return the context for a forward pass of that epoch; --high-precision-last turns NVFP4 off in its epochs.

        If `epoch` is None, it is the epoch of the last step, for evaluation.
        """
        at = self.position
        if epoch is None:
            # At the end of an epoch, at.epoch is already the number of the next one.
            epoch = at.epoch if at.batch or not at.step else at.epoch - 1
        return self.precision.context(self.device, self._nvfp4_of(epoch) is not None)

    def _nvfp4_of(self, epoch: int) -> Any:
        """Return the recipe in that epoch, or None in high precision."""
        return self.precision.recipe if epoch < self.settings.epochs - self.settings.high_precision_last else None

    def summary(self) -> dict[str, float | int]:
        """Return the row of summary.json for this precision."""
        at = self.position
        val, main = dict(self.scores()), self.task.main
        images, targets = next(iter(self._measured_batches()))
        images, targets = to_device(images, targets, self.device)
        inputs = self.task.inputs(targets)
        row: dict[str, float | int] = {
            "train_loss": self._train_loss(),
            "val_loss": val.pop("loss"),
            **val,
            f"{main}_hp": self.evaluate("val", high_precision=True)[main],
            "step_ms": statistics.median(at.step_ms or at.first_ms),
            "saved_bytes": saved_bytes(self.whole, images, lambda: self.context(0), *inputs),
            "nvfp4_flops_share": self.precision.flops_share(self.whole, images, *inputs),
        }
        if "test" in self.eval_loaders:
            row |= {f"test_{key}": value for key, value in self.evaluate("test").items() if key != "loss"}
        return row

    def _measured_batches(self) -> Any:
        """Return the first training batch of epoch 0, so that every precision counts its bytes on the same images."""
        self.order.epoch, self.order.start = 0, 0
        return self.loader
