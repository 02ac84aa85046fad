"""Refuse fields of a recipe that do not go together, as TransformerEngine does when it builds its quantizers."""

from __future__ import annotations

from typing import Any

from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.recipe.fields import PLAIN


def check(recipe: Any) -> None:
    """Refuse a recipe that no quantizer can carry out.

    Args:
        recipe: An NVFP4BlockScaling.
    Raises:
        ValueError: Two fields do not go together.
    """
    name = repr(recipe.name or "NVFP4BlockScaling")
    activations = recipe.nvfp4_4over6 in ("activations", "all")
    if activations and not recipe.disable_rht:
        raise value_error(
            f"recipe {name}: 4over6 of activations does not go with RHT.",
            got=f"nvfp4_4over6={recipe.nvfp4_4over6!r}, disable_rht=False",
            needs="nvfp4_4over6 'none' or 'weights', or disable_rht=True",
            fix="add disable_rht=True to the recipe, or use nvfp4_4over6='weights'",
        )
    if recipe.row_scaled_activation and not recipe.disable_rht:
        raise value_error(
            f"recipe {name}: row-scaled activations do not go with RHT.",
            got="row_scaled_activation=True, disable_rht=False",
            needs="row_scaled_activation=False, or disable_rht=True",
            fix="add disable_rht=True to the recipe",
        )
    if recipe.row_scaled_activation and activations and "wgrad" in recipe.nvfp4_gemms:
        raise value_error(
            f"recipe {name}: wgrad cannot use row-scaled 4over6 activations.",
            got=f"row_scaled_activation=True, nvfp4_4over6={recipe.nvfp4_4over6!r}, wgrad in NVFP4",
            needs="one of: row_scaled_activation=False, nvfp4_4over6 'none' or 'weights', wgrad in high precision",
            fix="set backward_override='high_precision', or drop one of the two",
        )
    if recipe.tensor_scale != "current" and recipe.row_scaled_activation:
        what, why = {
            "delayed": ("delayed scales", "the rows of one step are not those of the next"),
            "current_pow2": ("powers of two", "it is multiplied into the weight"),
        }[recipe.tensor_scale]
        raise value_error(
            f"recipe {name}: {what} do not go with row-scaled activations.",
            got=f"tensor_scale={recipe.tensor_scale!r}, row_scaled_activation=True",
            needs=f"one scale per tensor: {why}",
            fix="set tensor_scale='current', or row_scaled_activation=False",
        )
    _check_block_format(recipe, name)
    if recipe.tensor_scale == "delayed" and recipe.grouped_scale == "expert":
        raise value_error(
            f"recipe {name}: delayed scales do not go with scales of experts.",
            got="tensor_scale='delayed', grouped_scale='expert'",
            needs="one scale per tensor: the rows that an expert has in one step are not those of the next",
            fix="set tensor_scale='current' or 'current_pow2', or grouped_scale='operand'",
        )


def _check_block_format(recipe: Any, name: str) -> None:
    # What each of these fields changes is NVFP4's tensor scale, or how its block scales are chosen.
    only = ("tensor_scale", "row_scaled_activation", "nvfp4_4over6")
    wrong = {field: getattr(recipe, field) for field in only if getattr(recipe, field) != PLAIN[field]}
    if recipe.block_format != "nvfp4" and wrong:
        raise value_error(
            f"recipe {name}: a field of NVFP4 does not go with another block format.",
            got=f"block_format={recipe.block_format!r}, " + ", ".join(f"{field}={v!r}" for field, v in wrong.items()),
            needs="blocks without a tensor scale, one rule for their scales: "
            + ", ".join(f"{field}={PLAIN[field]!r}" for field in wrong),
            fix=f"leave out {', '.join(wrong)}, or block_format",
        )
