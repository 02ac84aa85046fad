"""Warn of kernels that a file, or a model for inference, has in high precision without anyone having asked for it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from te_nvfp4_cv.nn.walk import like_weight

BY_RECIPE = ("the precision table says so", "the recipe runs fprop in high precision")  # reasons that were asked for
MOST = 4  # layers that a warning names


def warn_of_high(where: str, quantized: Mapping[str, Any], high: Mapping[str, str], lost: Mapping[str, int]) -> None:
    """Warn of kernels that train in NVFP4 and stay in high precision, and of a model without any layer in NVFP4.

    Args:
        where: the function that the user has called, which calls this one through one other.
        quantized, high, lost: as `quantized`, `high` and `lost` of fit.Sorted.
    """
    weights = sum(lost.values())
    if weights:
        total = weights + sum(like_weight(module).numel() for module, _ in quantized.values())
        text = f"nv.export: {weights / total:.0%} of the weights that train in NVFP4 stay in high precision: "
        text += "; ".join(f"{name} ({high[name]})" for name in lost)
    elif not quantized and any(reason not in BY_RECIPE for reason in high.values()):
        names = [f"{name or 'the model'} ({reason})" for name, reason in high.items()]
        more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
        text = f"{where}: no layer is in NVFP4, everything stays as it is: {'; '.join(names[:MOST])}{more}"
        if any("float64" in reason for reason in high.values()):
            text += ". NVFP4 takes bf16, fp16 and fp32: model.float()"
    else:
        return
    warnings.warn(text, UserWarning, stacklevel=4)  # the line that called nv.export.save or quantize
