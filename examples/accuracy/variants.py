"""Define the variants that a study compares; a variant is a recipe and how training uses it.

    baseline        high precision preset          the preset for the family of networks (recipes/): the default recipe,
    the classifier in high precision other variants  the preset with one thing changed

"Weights in one precision, gradients in another" and the schedules of the last epochs are the levers of LUQ (ICLR 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import te_nvfp4_cv as nv
from te_nvfp4_cv.errors import value_error

LOSSES: dict[str, tuple[tuple[str, Any], ...]] = {
    "class weights": (("class_weights", "median"),),
    "cross-entropy alone": (("dice_weight", 0.0),),
    "Dice x2": (("dice_weight", 2.0),),
}
"""Changes of the loss, for segmentation only."""


@dataclass(frozen=True)
class Variant:
    """Describe one way to train.

    Attributes:
        recipe: The recipe. If None, training runs in high precision.
        last: Share of the epochs, at the end, that run in `last_recipe`.
        last_recipe: The recipe of these epochs. If None, they run in high precision.
        lr: Factor on the learning rate.
        first: Share of the epochs, at the start, that run in high precision.
        learn: The kind for nv.learn_scales, or "" for none.
        loss: Arguments of the task's loss.
    """

    name: str
    recipe: Any
    last: float = 0.0
    last_recipe: Any = None
    lr: float = 1.0
    first: float = 0.0
    learn: str = ""
    loss: tuple[tuple[str, Any], ...] = ()

    def epochs_of(self, total: int) -> tuple[int, int]:
        """Return the number of epochs at the end in `last_recipe`, and at the start in high precision.

        Raises:
            ValueError: If a share amounts to no epoch, or to all of them.
        """
        found = []
        for share in (self.last, self.first):
            count = round(total * share)
            if share and not 0 < count < total:
                raise value_error(
                    f"{self.name}: {total} epochs are too few.",
                    got=f"{share:.0%} of {total} epochs: {count}",
                    needs="at least one epoch in each precision",
                    fix="raise --epochs, or leave the variant out",
                )
            found.append(count)
        return found[0], found[1]


def variants(preset: Any) -> dict[str, Variant]:
    """Return all variants by name, for one preset."""
    changes: dict[str, dict[str, Any]] = {
        "minus RHT": {"disable_rht": True},
        "minus SR": {"disable_stochastic_rounding": True},
        "minus 2D": {"disable_2d_quantization": True},
        "4over6 weights": {"nvfp4_4over6": "weights"},
        "4over6 all, minus RHT": {"nvfp4_4over6": "all", "disable_rht": True},
        "high-precision wgrad": {"high_precision_gemms": ("wgrad",)},
        "high-precision dgrad": {"high_precision_gemms": ("dgrad",)},
        "high-precision fprop": {"high_precision_gemms": ("fprop",)},
        "forward only": {"backward_override": "high_precision"},
        "delayed scales": {"tensor_scale": "delayed"},
        "first and last layer in NVFP4": {"thin_layers": "pad", "precision": ()},
        "last layer in NVFP4": {"precision": ()},
    }
    found = {"baseline": Variant("baseline", None), "preset": Variant("preset", preset)}
    for name, change in changes.items():
        found[name] = Variant(name, replace(preset, name="", **change))
    backward = replace(preset, name="", backward_override="high_precision")
    found["last 15 % of epochs in high precision"] = Variant("last 15 % of epochs in high precision", preset, 0.15)
    found["last 15 % with high-precision gradients"] = Variant(
        "last 15 % with high-precision gradients", preset, 0.15, backward
    )
    levers: dict[str, dict[str, Any]] = {
        "fine-tuned: first 70 % of epochs in high precision": {"first": 0.7},
        "learned block-scale multiplier": {"learn": "scale"},
        "learned clipping": {"learn": "clip"},
    }
    for name, options in levers.items():
        found[name] = Variant(name, preset, **options)
    for name, loss in LOSSES.items():
        for base in ("baseline", "preset"):
            found[f"{base}, {name}"] = Variant(f"{base}, {name}", found[base].recipe, loss=loss)
    for factor in (0.5, 2.0, 4.0, 8.0):
        for base in ("baseline", "preset"):
            name = f"{base}, learning rate x{factor:g}"
            found[name] = Variant(name, found[base].recipe, lr=factor)
    return found


def _suites() -> dict[str, tuple[str, ...]]:
    found = variants(nv.NVFP4BlockScaling())
    rates = tuple(name for name in found if "learning rate" in name)
    losses = tuple(name for name, variant in found.items() if variant.loss)
    levers = tuple(name for name, v in found.items() if v.first or v.learn)
    ablations = tuple(name for name in found if name not in (*rates, *losses, *levers))
    return {
        "seeds": ("baseline", "preset"),
        "ablations": ablations,
        "rates": rates,
        "levers": ("baseline", "preset", *levers),
        "losses": ("baseline", "preset", *losses),
    }


SUITES = _suites()
