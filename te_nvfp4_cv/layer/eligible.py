"""layer.eligible."""

from __future__ import annotations

import torch
from torch import Tensor

from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MINIMUM = 16  # channels on either side of a group


def ineligible(op: str, x: Tensor, w: Tensor, groups: int, recipe: NVFP4BlockScaling) -> str | None:
    """Why a valid torch call does not run in NVFP4, or None. Says nothing about shapes that torch would refuse too."""
    if not isinstance(x, Tensor) or not isinstance(w, Tensor):
        return "an operand is not a tensor"
    for name, tensor in (("input", x), ("weight", w)):
        if tensor.dtype not in DTYPES:
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
    if x.device.type == "meta":
        return "meta tensors hold no values"
    if x.device != w.device:
        return f"input on {x.device}, weight on {w.device}"
    if x.is_sparse or w.is_sparse or x.layout != torch.strided or w.layout != torch.strided:
        return "an operand is not a dense tensor"
    if w.dim() < 2 or groups < 1 or w.shape[0] % groups:
        return None
    transposed = "transpose" in op
    sides = (w.shape[0] // groups, w.shape[1])
    thin = min(sides)
    if thin < MINIMUM:
        names = ("in", "out") if transposed else ("out", "in")
        which = names[0] if sides[0] < MINIMUM else names[1]
        if groups > 1:
            kind = "depthwise" if w.shape[1] == 1 else "thin groups"
            return f"{kind}: {thin} {which}-channel{'s' if thin > 1 else ''} per group, fewer than {MINIMUM}"
        if recipe.thin_layers != "pad":
            plural = "s" if thin > 1 else ""
            fewer = f"thin layer: {thin} {which}-channel{plural}, fewer than {MINIMUM}"
            return f"{fewer} (recipe.thin_layers='high_precision')"
    if not recipe.nvfp4_gemms:
        return "recipe.high_precision_gemms names all three GEMMs"
    return None
