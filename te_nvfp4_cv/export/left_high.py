"""Warn of kernels that a file, or a model for inference, has in high precision without anyone having asked for it."""

from __future__ import annotations

import warnings

from te_nvfp4_cv.export.fit import BY_RECIPE, Sorted
from te_nvfp4_cv.nn.walk import like_weight

MOST = 4  # layers that a warning names


def warn_of_high(where: str, found: Sorted) -> None:
    """Warn of kernels that train in NVFP4 and stay in high precision, and of a model without any layer in NVFP4.

    Args:
        where: the function that the user has called, which calls this one through one other.
    """
    lost = sum(found.lost.values())
    if lost:
        total = lost + sum(like_weight(module).numel() for module, _ in found.quantized.values())
        text = f"nv.export: {lost / total:.0%} of the weights that train in NVFP4 stay in high precision: " + "; ".join(
            f"{name} ({found.high[name]})" for name in found.lost
        )
    elif not found.quantized and any(reason not in BY_RECIPE for reason in found.high.values()):
        names = [f"{name or 'the model'} ({reason})" for name, reason in found.high.items()]
        more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
        text = f"{where}: no layer is in NVFP4, everything stays as it is: {'; '.join(names[:MOST])}{more}"
        if any("float64" in reason for reason in found.high.values()):
            text += ". NVFP4 takes bf16, fp16 and fp32: model.float()"
    else:
        return
    warnings.warn(text, UserWarning, stacklevel=4)  # the line that called nv.export.save or quantize
