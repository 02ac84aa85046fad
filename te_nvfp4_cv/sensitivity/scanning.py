"""Measure what each layer does to the loss if it is quantized alone, and if all layers but that one are.

    alone     loss(this layer in NVFP4) - loss(high precision)
    without   loss(all layers in NVFP4 but this one) - loss(high precision)
    all       loss(all layers in NVFP4) - loss(high precision)

The figures are means over the batches, with their standard errors. Batch i runs under the seed `seed + i` in every
configuration, so that dropout masks are the same. A scan of L layers costs 2 + L evaluations of each batch, and 2 + 2 L
in mode "both". The entries that set_precision made do not count while the model is scanned. Afterwards they
are as before, like parameters, gradients, buffers, flags, hooks, delayed scales and the random state.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.errors import check_batches, check_module, check_trainable, value_error
from te_nvfp4_cv.layer.check import checked_recipe
from te_nvfp4_cv.report.forward_pass import recipe_in_force
from te_nvfp4_cv.sensitivity.layers import Entries, Unit, named, units_of
from te_nvfp4_cv.sensitivity.measure import Loss, Measure, Measured, as_loss, compare
from te_nvfp4_cv.sensitivity.scan_report import Change, LayerScan, Scan

MODES = {"one": (True, False), "all_but_one": (False, True), "both": (True, True)}


def scan(
    model: nn.Module,
    loss: Loss | nn.Module,
    batches: Iterable[Any],
    recipe: Any = None,
    mode: str = "one",
    gradients: bool = False,
    backend: str = "auto",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Measure how much each layer's quantization changes the loss, and suggest which layers to spare.

    The model runs as it is: call model.train() or model.eval() first. If torch.autocast is on, it applies. Afterwards
    the model is as it was.

    Args:
        model: the model, which is left unchanged.
        loss: loss(model, batch) -> scalar tensor; or a criterion, which is a module such as nn.CrossEntropyLoss() or a
            function of torch.nn.functional: the loss is then criterion(model(input), target).
        batches: what `loss` takes, or pairs (input, target) for a criterion, which are moved to the model's device.
            Each is read once. A few that stand for the data are enough.
        recipe: a recipe or its name; if None, that of the enclosing context, and without one the default recipe. Its
            [precision] table is left out of the measurement.
        mode: "one" quantizes each layer alone, "all_but_one" all layers but that one, "both" does both.
        gradients: compare the whole gradient as well, and rank by its error. This is a surer sign than the loss, at two
            to three times the cost.
        backend: where layers run, as for nvfp4_autocast.
        seed: the seed of the first batch's random numbers; each further batch adds 1.
        progress: called for each batch as progress(evaluations done, how many there are).
    Returns:
        A Scan: print it, or call `suggest(...)`, `recipe(...)`, `save(path, ...)`, `to_dataframe()`.
    Raises:
        TypeError: `model` is not a module, `batches` is a tensor or no iterable, the loss is not a tensor, or a batch
            for a criterion is not a pair.
        ValueError: no layer runs in NVFP4, there are no batches, or the loss is not a scalar or not finite in high
            precision.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
        >>> batches = [(torch.randn(16, 32), torch.randint(16, (16,)))]
        >>> found = nv.sensitivity.scan(model, torch.nn.CrossEntropyLoss(), batches)
        >>> [row.name for row in found.rows]
        ['0', '2']
        >>> found = nv.sensitivity.scan(model, lambda model, batch: model(batch[0]).square().mean(), batches)
    """
    check_module("scan", model, "scan(model, loss, batches) with loss(model, batch)")
    check_trainable("scan", model)
    if mode not in MODES:
        raise value_error("scan: unknown mode.", got=repr(mode), needs=f"one of {', '.join(MODES)}", fix="mode='both'")
    check_batches("scan", batches)
    dispatch.check_backend(backend)
    # Each configuration sets the precision of every layer; a table would overrule that.
    resolved = checked_recipe(dataclasses.replace(recipe_in_force(recipe), precision=()))
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # DDP's forward prepares a reduction, and then waits for a backward pass
    run = _Run(Measure(model, as_loss(loss), resolved, backend, gradients), MODES[mode], seed, progress)
    # Batch by batch, and not configuration by configuration: a loader is read once, and each batch is held once.
    for index, batch in enumerate(batches):
        run.batch(batch, index)
    if not run.high:
        raise value_error(
            "scan: there are no batches.", got="an iterable without elements", needs="at least one batch",
            fix="pass a list of batches, because an iterator that was read before is empty",
        )
    return run.report()


class _Run:
    """Collect the measurements: for each configuration, one of each batch."""

    def __init__(
        self, measure: Measure, modes: tuple[bool, bool], seed: int, progress: Callable[[int, int], None] | None
    ) -> None:
        self.measure, self.modes, self.seed, self.progress = measure, modes, seed, progress
        self.units: list[Unit] = []
        self.total_flops = 0
        self.high: list[float] = []
        self.everything = _Column()
        self.columns: list[tuple[_Column, _Column]] = []

    def batch(self, batch: Any, index: int) -> None:
        """Measure all configurations on one batch."""
        seed, done = self.seed + index, 0
        if not self.units:
            self._find(batch, seed)
        steps = 2 + len(self.units) * sum(self.modes)

        def measured(entries: Entries) -> Measured:
            nonlocal done
            found = self.measure(batch, entries, seed)
            done += 1
            if self.progress is not None:
                self.progress(done, steps)
            return found

        recipe = self.measure.recipe
        # Every unit has an entry in every configuration, so nothing that set_precision says can interfere.
        none: Entries = dict.fromkeys((unit.module for unit in self.units), None)
        everything = dict.fromkeys(none, recipe)
        high = measured(none)
        if not high.finite:
            what = f"a loss of {high.loss}" if not math.isfinite(high.loss) else "a gradient with NaN or inf"
            raise value_error(
                f"scan: high precision is not finite on batch {index}.",
                got=what,
                needs="a model and a batch that work in high precision",
                fix="nv.sensitivity.kurtosis(model) names weights that are not finite; else look at the batch",
            )
        self.high.append(high.loss)
        self.everything.add(measured(everything), high)
        for unit, (alone, without) in zip(self.units, self.columns, strict=True):
            if self.modes[0]:
                alone.add(measured({**none, unit.module: recipe}), high)
            if self.modes[1]:
                without.add(measured({**everything, unit.module: None}), high)

    def _find(self, batch: Any, seed: int) -> None:
        """Find the units in a forward pass with every module in NVFP4: what set_precision says must not hide one."""
        # Layers show in the forward pass alone, so a backward pass would be wasted.
        look = dataclasses.replace(self.measure, gradients=False)
        every = {module: self.measure.recipe for _, module in named(self.measure.model)}
        self.units, self.total_flops = units_of(self.measure.model, lambda: look(batch, every, seed))
        if not self.units:
            raise value_error(
                "scan: no layer runs in NVFP4.",
                got=f"{type(self.measure.model).__name__} with the recipe {self.measure.recipe!r}",
                needs="convolutions or linear layers with 16 channels on both sides of a group (or thin_layers='pad')",
                fix="print(nv.coverage(model, images)) says why each layer is left out",
            )
        self.columns = [(_Column(), _Column()) for _ in self.units]

    def report(self) -> Scan:
        """Take means and standard errors over the batches."""
        rows = [
            LayerScan(unit.name, unit.op, unit.kernel, unit.flops, alone.change(), without.change())
            for unit, (alone, without) in zip(self.units, self.columns, strict=True)
        ]
        everything = self.everything.change()
        assert everything is not None  # run.high is not empty, so there was a batch
        return Scan(
            rows, statistics.fmean(self.high), everything, len(self.high), self.total_flops, self.measure.recipe
        )


class _Column:
    """The loss changes, gradient errors and cosines of one configuration, one for each batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.errors: list[float] = []
        self.cosines: list[float] = []

    def add(self, found: Measured, high: Measured) -> None:
        self.losses.append(found.loss - high.loss)
        if found.gradients is not None:
            error, cosine = compare(found, high)
            self.errors.append(error)
            self.cosines.append(cosine)

    def change(self) -> Change | None:
        if not self.losses:
            return None
        many = len(self.losses) > 1 and all(map(math.isfinite, self.losses))  # stdev refuses NaN and infinity
        return Change(
            loss=statistics.fmean(self.losses),
            loss_rms=math.sqrt(statistics.fmean(change * change for change in self.losses)),
            standard_error=statistics.stdev(self.losses) / math.sqrt(len(self.losses)) if many else None,
            gradient_error=statistics.fmean(self.errors) if self.errors else None,
            gradient_cosine=statistics.fmean(self.cosines) if self.cosines else None,
        )
