"""Recipes of the plug-in, by this package's fields."""

from __future__ import annotations

from typing import Any

import te_nvfp4_cv as nv
from te_nvfp4_cv import te_plugin

SR_OFF = {"disable_stochastic_rounding": True}


def recipe(backend: str = "reference", **fields: Any) -> Any:
    """The plug-in's recipe; the reference backend sums in the order of TransformerEngine's reference."""
    return te_plugin.recipe(nv.NVFP4BlockScaling(**fields), backend=backend)
