"""Replay the step of a bundle in high precision and in NVFP4, then with each GEMM and each layer taken out.

    1 + 1 + (GEMMs in NVFP4, at most 3) + (layers in NVFP4)     replays, forward and backward, no optimizer step

Every replay starts from the bundle's weights, buffers, seed and delayed scales, in training mode. High precision is the
bundle's autocast dtype without NVFP4. Losses are not scaled as a GradScaler would scale them. The stream of stochastic
rounding begins at the seed, as it does in a step that sets a seed. A builder that nobody asked to run is refused, and a
model that the bundle's weights do not fit.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.backend import devices, dispatch
from te_nvfp4_cv.backend.torch_private import tree_map
from te_nvfp4_cv.errors import describe, type_error, value_error
from te_nvfp4_cv.nn.precision import set_precision
from te_nvfp4_cv.nn.resume import extra_state
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.recipe.fields import GEMMS
from te_nvfp4_cv.recipe.files import parse_recipe
from te_nvfp4_cv.sensitivity import builder as builders
from te_nvfp4_cv.sensitivity.bundle import Bundle, load_bundle
from te_nvfp4_cv.sensitivity.diagnosis import Diagnosis, Replay, without_gemm
from te_nvfp4_cv.sensitivity.layers import Entries, Unit, named, units_of
from te_nvfp4_cv.sensitivity.measure import Loss, Measure, Measured, compare
from te_nvfp4_cv.sensitivity.trace import Trace


def diagnose(
    bundle: Bundle | str | os.PathLike[str],
    build: builders.Build | None = None,
    device: str | torch.device = "cpu",
    backend: str = "auto",
) -> Diagnosis:
    """Find out what made a training step go wrong: NVFP4 or not, and if so which GEMM and which layer.

    Args:
        bundle: what load_bundle returned, or the path of a bundle.
        build: build(arguments) -> (model, loss) with loss(model, batch) -> scalar; the model's weights are overwritten.
            If None, the builder that the bundle names is used, provided it is one of this project's examples.
        device: where to replay; equal bits need the device of the step.
        backend: where layers run, as for nvfp4_autocast.
    Returns:
        A Diagnosis: print it, or call `suggest()`, `recipe()`, `save(path)`.
    Raises:
        ValueError: the bundle, the builder or its model does not fit.
        TypeError: the builder returns something else than a model and a loss function.
        FileNotFoundError: there is no such bundle.
        RuntimeError: there is no such device, or `backend` cannot run here.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> def build(arguments):
        ...     model = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.Flatten(), torch.nn.Linear(32, 16))
        ...     return model, lambda model, batch: model(batch).square().mean()
        >>> state, recipe = build({})[0].state_dict(), nv.NVFP4BlockScaling().to_toml()
        >>> builder, batch = {"name": "rebuild:build", "arguments": {}}, torch.randn(16, 16, 3, 3)
        >>> step = nv.sensitivity.Bundle(state, batch, {"torch": 0}, recipe, builder, step=12, reason="a spike")
        >>> sorted(nv.sensitivity.diagnose(step, build).layers)
        ['0', '2']
    """
    path = "BUNDLE" if isinstance(bundle, Bundle) else os.fspath(bundle)
    loaded = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    dispatch.check_possible(backend)
    # Before the builder, whose code may take minutes, anything that can be refused without it.
    where = devices.usable(device, "diagnose")
    build = builders.recorded(loaded.builder["name"], path) if build is None else build
    model, loss = _built(build, loaded, where)
    recipe = parse_recipe(loaded.recipe_text, "the bundle's recipe") if loaded.recipe_text else None
    # The table was applied to the model of the step, so it must be applied to this one too.
    if recipe is not None and recipe.precision:
        set_precision(model, recipe)
    return _Step(loaded, model, loss, recipe, where, backend).diagnosis()


class _Step:
    """A step that is ready to be replayed."""

    def __init__(
        self, bundle: Bundle, model: nn.Module, loss: Loss, recipe: NVFP4BlockScaling | None,
        device: torch.device, backend: str,
    ) -> None:
        self.bundle, self.model, self.recipe, self.device = bundle, model, recipe, device
        self.batch = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, bundle.batch)
        scales = (bundle.nvfp4_state or {}).get("scales", {})

        def prepare() -> None:
            # Only the scales are the bundle's; where stochastic rounding is in its stream follows from the seed.
            now = extra_state(model)
            extra_state(model, load={**now, "scales": scales})

        self.measure = Measure(model, loss, recipe or NVFP4BlockScaling(), backend, gradients=True, prepare=prepare)

    def diagnosis(self) -> Diagnosis:
        """Run all replays."""
        trace = Trace()
        high = self._in_high_precision(trace)
        head = (self.bundle.step, self.bundle.reason, self.bundle.loss, _replay(high, None, trace))
        if self.recipe is None:
            return Diagnosis(*head)
        watched: list[tuple[Measured, Trace]] = []

        def run() -> None:  # the main replay also tells which layers there are
            trace = Trace()
            watched.append((self._run({}, trace), trace))

        units, _ = units_of(self.model, run)
        nvfp4 = _replay(watched[0][0], high, watched[0][1])
        if not high.finite:  # then nothing that is taken out of NVFP4 can help
            return Diagnosis(*head, nvfp4, recipe_used=self.recipe)
        gemms, layers = self._toggled(units, high)
        return Diagnosis(*head, nvfp4, gemms, layers, self.recipe)

    def _in_high_precision(self, trace: Trace) -> Measured:
        """Run the first replay, which shows whether the builder's code runs here at all."""
        try:
            # Every module gets an entry, so that no table and no set_precision brings NVFP4 back.
            return self._run(dict.fromkeys((module for _, module in named(self.model)), None), trace, outside=False)
        except Exception as error:
            raise value_error(
                "diagnose: the step cannot be replayed.",
                got=f"{type(error).__name__}: {error}",
                needs="a builder whose loss(model, batch) takes the bundle's batch and returns a scalar",
                fix="name the builder that wrote the bundle, or correct it",
            ) from error

    def _toggled(self, units: list[Unit], high: Measured) -> tuple[dict[str, Replay], dict[str, Replay]]:
        """Replay with each GEMM, and then with each layer, in high precision."""
        # The recipes that the layers really ran with, tables included: each replay changes one thing against that.
        own: dict[nn.Module, NVFP4BlockScaling | None] = {unit.module: unit.recipe for unit in units}
        gemms: dict[str, Replay] = {}
        for gemm in GEMMS:
            changed = {
                unit.module: without_gemm(unit.recipe, gemm)
                for unit in units
                # A recipe refuses high_precision_gemms beside "dequantized": backward reads what fprop quantized.
                if gemm in unit.recipe.nvfp4_gemms and unit.recipe.backward_override != "dequantized"
            }
            if changed:
                gemms[gemm] = _replay(self._run({**own, **changed}), high)
        layers = {unit.name: _replay(self._run({**own, unit.module: None}), high) for unit in units}
        return gemms, layers

    def _run(self, entries: Entries, trace: Trace | None = None, outside: bool = True) -> Measured:
        # The bundle holds the name: a dtype is no plain data. Bundle has checked that it is one of two.
        dtype = None if self.bundle.autocast is None else getattr(torch, self.bundle.autocast)
        with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype):
            return self.measure(self.batch, entries, self.bundle.seeds["torch"], outside, trace)


def _replay(found: Measured, high: Measured | None, trace: Trace | None = None) -> Replay:
    error = cosine = None
    # A distance from or to a gradient that is not finite would be no number.
    if high is not None and high.finite and found.finite:
        error, cosine = compare(found, high)
    seen = trace or Trace()  # an unused one has no findings
    return Replay(found.loss, found.gradient_norm, found.finite, error, cosine, seen.forward, seen.backward)


def _built(build: builders.Build, bundle: Bundle, device: torch.device) -> tuple[nn.Module, Loss]:
    try:
        with torch.random.fork_rng([]):  # the weights that it draws are overwritten
            built: Any = build(dict(bundle.builder["arguments"]))
    except Exception as error:  # somebody else's code
        raise value_error(
            "diagnose: the builder failed.",
            got=f"{type(error).__name__}: {error}",
            needs=f"build(arguments) -> (model, loss) for {bundle.builder['arguments']!r}",
            fix="correct the builder, or name the one that wrote the bundle",
        ) from error
    if not (isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], nn.Module) and callable(built[1])):
        raise type_error(
            "diagnose: the builder gave something else.",
            got=", ".join(map(describe, built)) if isinstance(built, tuple) else describe(built),
            needs="(a torch.nn.Module, a function loss(model, batch))",
            fix="return model, loss",
        )
    model, loss = built
    model.to(device)
    try:
        model.load_state_dict(bundle.model_state)
    except RuntimeError as error:
        raise value_error(
            "diagnose: the bundle's weights do not fit the model that the builder made.",
            got="; ".join(line.strip() for line in str(error).splitlines()[1:4]),
            needs="the architecture of the step",
            fix="name the builder that wrote the bundle, or correct its arguments",
        ) from None
    # Modules that the builder put into eval mode train, too: a bundle does not record modes.
    return model.train(), loss
