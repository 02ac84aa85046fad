"""Define the variants that the study compares; a variant is a recipe and how training uses it.

    baseline     high precision
    preset       the preset for the family of networks (recipes/): the default recipe, the classifier in high precision
    others       the preset with one thing changed

Formats without a tensor scale have no code for the gradients of a mean over pixels, which are below 1e-5. There the
loss is multiplied by a power of two and the gradients are divided by it, which rounds nothing.

A schedule that ends in high precision is the lever of LUQ (ICLR 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from te_nvfp4_cv.errors import value_error


@dataclass(frozen=True)
class Variant:
    """Describe one way to train.

    Attributes:
        recipe: The recipe. If None, training runs in high precision.
        last: Share of the epochs, at the end, that run in high precision.
        learn: The kind for nv.learn_scales, or "" for none.
        loss_scale: What the loss is multiplied by in backward, a power of two.
    """

    name: str
    recipe: Any
    last: float = 0.0
    learn: str = ""
    loss_scale: float = 1.0

    def epochs_in_nvfp4(self, total: int) -> int:
        """Return the number of epochs, at the start, that run in `recipe`.

        Raises:
            ValueError: If `last` amounts to no epoch, or to all of them.
        """
        count = round(total * self.last)
        if self.last and not 0 < count < total:
            raise value_error(
                f"{self.name}: {total} epochs are too few.",
                got=f"{self.last:.0%} of {total} epochs: {count}",
                needs="at least one epoch in each precision",
                fix="give the stage more epochs, or leave the variant out",
            )
        return total - count


def variants(preset: Any, blocks: Sequence[str]) -> dict[str, Variant]:
    """Return all variants by name, for one preset.

    Args:
        blocks: Names of the modules that are the network's first and last block.
    """
    high = tuple((block, None) for block in blocks)
    without_fprop = replace(preset, name="", precision=(), high_precision_gemms=("fprop",))
    high_fprop = tuple((block, without_fprop) for block in blocks)
    changes: dict[str, dict[str, Any]] = {
        "4over6 weights": {"nvfp4_4over6": "weights"},
        "4over6, 1x16 weights, no RHT": {
            "nvfp4_4over6": "all",
            "disable_2d_quantization": True,
            "disable_rht": True,  # 4over6 of activations does not go with it
        },
        "first and last block in high precision": {"precision": (*preset.precision, *high)},
        "high-precision fprop of the first and last block": {"precision": (*preset.precision, *high_fprop)},
        "high-precision fprop": {"high_precision_gemms": ("fprop",)},
        "high-precision dgrad": {"high_precision_gemms": ("dgrad",)},
        "high-precision wgrad": {"high_precision_gemms": ("wgrad",)},
        "mean shift": {"activation_shift": "mean"},
        "delayed scales": {"tensor_scale": "delayed"},
        "power-of-two scales": {"tensor_scale": "current_pow2"},
        "thin layers in NVFP4": {"thin_layers": "pad"},
        "minus RHT": {"disable_rht": True},
        "minus SR": {"disable_stochastic_rounding": True},
        "minus 2D": {"disable_2d_quantization": True},
    }
    found = [
        Variant("baseline", None),
        Variant("preset", preset),
        Variant("last 15 % of epochs in high precision", preset, last=0.15),
        Variant("learned block-scale multiplier", preset, learn="scale"),
    ]
    found += [Variant(name, replace(preset, name="", **change)) for name, change in changes.items()]
    found += [
        Variant(name, replace(preset, name="", block_format=block_format), loss_scale=loss_scale)
        for name, block_format, loss_scale in (
            ("MXFP4", "mxfp4", 1.0),
            ("UE5M3 scales, no tensor scale", "nvfp4_ue5m3", 1.0),
            ("UE5M3 scales, no tensor scale, loss times 2^20", "nvfp4_ue5m3", 2.0**20),
            ("E4M3 scales, no tensor scale, loss times 2^20", "fp4_e4m3_only", 2.0**20),
        )
    ]
    return {variant.name: variant for variant in found}
