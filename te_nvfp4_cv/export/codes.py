"""Quantize one layer's weight to the codes and scales with which its forward runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from te_nvfp4_cv import formats
from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.export.computed import is_computed, weight_of
from te_nvfp4_cv.layer import delayed_scaling, grouped, operands
from te_nvfp4_cv.layer.plan import weight_plan
from te_nvfp4_cv.nn import learned
from te_nvfp4_cv.nn.walk import op_of
from te_nvfp4_cv.ops.block_scales import block_of
from te_nvfp4_cv.ops.records import Face
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling


@dataclass(frozen=True)
class Codes:
    """A weight in NVFP4, in the layout that fprop's GEMM takes.

    Attributes:
        data: uint8 codes, two to a byte; matrix.py gives the two layouts.
        scale: uint8, the bytes of the block scales, E4M3 in NVFP4.
        amax: fp32 [1] of the weight.
        input_amax: fp32 [1] of the activations, if delayed scaling found one in training; else None.
        shift: if x is shifted before it is quantized: fp32 [channels of x] to subtract, and fp32 [channels of y] to add
            to the result; else None.
    """

    data: Tensor
    scale: Tensor
    amax: Tensor
    input_amax: Tensor | None = None
    shift: tuple[Tensor, Tensor] | None = None


def quantize_layer(
    module: nn.Module, recipe: NVFP4BlockScaling, trained: Tensor | nn.Module | None = None
) -> Codes:
    """Return the codes with which a layer's forward runs under `recipe`, bit for bit.

    Args:
        trained: what owns the layer's delayed scales; if None, its weight, or the layer itself if that is computed.
    """
    transposed, groups = is_transposed(module), getattr(module, "groups", 1)
    computed = is_computed(module)
    w: Any = weight_of(module) if computed else module.weight
    backend, routed = dispatch.resolve("auto", w.device), op_of(module) == grouped.OP
    plan = weight_plan(w.shape, groups, transposed, recipe, backend, routed)
    # Learned multipliers and clipping become part of the codes.
    as_quantized = w if computed else learned.as_quantized(module, plan)
    # A part of what training multiplies has that product's amax.
    amax = None
    if isinstance(trained, Tensor) and trained.numel() > w.numel():
        amax = trained.detach().abs().amax().float().reshape(1)
    codes = operands.quantize_weight(as_quantized, plan, for_dgrad=False, amax=amax)
    owner = trained if trained is not None else module if computed else w
    input_amax = delayed_scaling.trained_amax(w, recipe, owner) if plan.delayed else None
    face = codes.face(plan.weight_faces[0])
    if transposed and plan.weight_faces[0] == "row":
        # In training one copy serves fprop and dgrad, with its blocks along dgrad's axis. Here only fprop reads it.
        face = Face(*formats.transpose_kernel(*face, w.shape[1], groups, block_of(plan.backend)))
    return Codes(*face, codes.amax, input_amax)


def is_transposed(module: nn.Module) -> bool:
    """Tell whether a layer is a transposed convolution."""
    return bool(getattr(module, "transposed", False))  # a linear layer lacks it
