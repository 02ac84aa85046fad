"""Implement the options that change how NVFP4 is trained, and save bad steps as bundles.

    --learn-scales scale|clip    one learnable fraction per NVFP4 layer (nv.learn_scales)
    bundles                      a step whose loss jumps, or that has a value that is not finite, is saved for
                                 `te-nvfp4-cv diagnose` before the optimizer uses it; --no-bundles turns that off

Precisions without a recipe ignore --learn-scales. It is refused together with --parallel fsdp.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.errors import value_error

from .options import Settings
from .precision import Precision
from .spikes import SpikeWatch, write_bundle

MOST_BUNDLES = 3  # per run


def learn(model: nn.Module, settings: Settings, recipe: Any, parallel: bool) -> None:
    """Add the learnable fractions, if --learn-scales asks for them.

    Raises:
        ValueError: If there are several ranks and --high-precision-last, because DDP does not allow parameters that
            some steps do not use.
    """
    if recipe is None or settings.learn_scales == "none":
        return
    if parallel and settings.high_precision_last:
        raise value_error(
            "--learn-scales cannot be used with --high-precision-last on several ranks.",
            got=f"--learn-scales {settings.learn_scales} --high-precision-last {settings.high_precision_last}",
            needs="parameters that every step uses, for DDP",
            fix="leave one of the two out, or train in one process",
        )
    nv.learn_scales(model, settings.learn_scales)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group the model's parameters for the optimizer.

    Multipliers of block scales get no weight decay, which would pull them to zero.
    """
    free = [p for name, p in model.named_parameters() if name.endswith("weight_scale")]
    decayed = [p for name, p in model.named_parameters() if not name.endswith("weight_scale")]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": weight_decay}]
    return groups + ([{"params": free, "weight_decay": 0.0}] if free else [])


def changed(settings: Settings) -> dict[str, Any]:
    """Return those of these options, and of --high-precision-last, that are not at their defaults.

    A checkpoint must agree with them.
    """
    usual = {"learn_scales": "none", "high_precision_last": 0}
    found = {name: getattr(settings, name) for name in usual}
    return {name: value for name, value in found.items() if value != usual[name]}


class Bundles:
    """Save the bad steps of one run.

    Args:
        folder: Folder for bundle_STEP.pt.
        classes: The task's classes, which rebuild.build needs in addition to the settings.
        class_weights: The task's class weights, which it needs too.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        precision: Precision,
        classes: list[str],
        class_weights: Tensor | None,
    ) -> None:
        self.folder, self.settings, self.precision = folder, settings, precision
        self.watch = SpikeWatch(factor=settings.spike_factor) if settings.bundles else None
        self.written = 0
        kept = ["task", "scale", "activation", "dropout", "instances", "backbone", "dice_weight", "ce_weight"]
        kept += ["backbone_weights"] if settings.backbone_weights else []  # their body has other norms
        learns = settings.learn_scales if precision.recipe is not None else "none"
        self.arguments = {
            "options": {key: getattr(settings, key) for key in kept} | {"learn_scales": learns},
            "image_size": list(settings.image_size),
            "classes": list(classes),
            "class_weights": None if class_weights is None else class_weights.tolist(),
        }
        own = () if precision.recipe is None else (precision.recipe, *(r for _, r in precision.recipe.precision if r))
        self._delayed = any(recipe.tensor_scale == "delayed" for recipe in own)
        self._before: dict[str, Any] | None = None

    def before(self, model: nn.Module) -> None:
        """Prepare for a step: copy what its forward pass changes, which are the delayed tensor scales."""
        if self.watch is not None and self.written < MOST_BUNDLES and self._delayed:
            self._before = self.precision.extra_state(model)

    def check(
        self,
        step: int,
        loss: Tensor,
        model: nn.Module,
        whole: Callable[[], dict[str, Any]],
        batch: tuple[Tensor, Any],
        seed: int,
        writes: bool,
        scaled: bool,
        nvfp4: bool,
    ) -> None:
        """Write a bundle if the step is bad. Call it after backward, before the optimizer, on all ranks with one loss.

        Args:
            whole: Returns the whole model's state_dict; it needs all ranks.
            writes: Whether this rank writes.
            scaled: Whether gradients are scaled for fp16, where values that are not finite are part of the method.
            nvfp4: Whether the step ran in NVFP4, which it does not in the last epochs of --high-precision-last.
        """
        if self.watch is None or self.written >= MOST_BUNDLES:
            return
        local = [p.grad for p in model.parameters() if not hasattr(p.grad, "to_local")]
        spike = self.watch.check(step, loss, () if scaled else local)
        if spike is None:
            return
        state = whole()
        self.written += 1
        if not writes:
            return
        path = self.folder / f"bundle_{step:06d}.pt"
        text = self.precision.recipe_text if nvfp4 else ""
        try:
            write_bundle(
                path,
                state=state,
                batch=batch,
                seed=seed,
                recipe_text=text,
                autocast=self.precision.dtype,
                arguments=self.arguments,
                spike=spike,
                nvfp4_state=self._before,
            )
        except RuntimeError as error:  # a full disk must not end the training
            print(f"note: {spike.reason} at step {step}, but the bundle could not be written: {error}")
            return
        print(f"note: {spike.reason} at step {step}; the step is saved: te-nvfp4-cv diagnose {path}", flush=True)
