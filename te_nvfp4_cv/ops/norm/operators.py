"""Normalization + activation in one pass, forward and backward, as custom operators on plain tensors.

    forward    u = (z - mean) * rstd * weight + bias;  y = act(u + residual);  saved: z, mean, rstd, ReLU's 1-bit mask
    backward   g = act'(u) * dy, u from z again, or the mask (ReLU)
               dbias = sum g;  dweight = sum g * xhat;  dresidual = g
               dz = rstd * (weight * g - mean(weight * g) - xhat * mean(weight * g * xhat))    the means over what was
                    normalized together; with running statistics dz = rstd * weight * g

Neither the norm's output nor the activation is saved for backward. The backend "reference" is ATen's own chain of
operators, so its bits are those of torch's modules; "triton" are the kernels, which compute in fp32 and round once.
How a norm is computed travels to the operators as a list of floats, NormSpec.encode. What it subtracts and multiplies
with travels as `norm`, a list of two or four tensors: mean and rstd, then weight and bias where there is an affine
part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.backend.dispatch import runs_directly
from te_nvfp4_cv.backend.registration import without_autocast
from te_nvfp4_cv.ops.layouts import operand_faces
from te_nvfp4_cv.ops.norm import reference
from te_nvfp4_cv.ops.norm.spec import NormSpec
from te_nvfp4_cv.ops.quantize.amax import collect
from te_nvfp4_cv.ops.quantize.operand import separate
from te_nvfp4_cv.ops.records import Collector, Operand, OperandSpec

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def backend_for(z: Tensor, wanted: str = "auto") -> str:
    """Return "triton" where the kernels serve this tensor, else "reference"; fp64, old GPUs and a missing Triton take
    the latter.
    """
    if wanted == "reference" or z.dtype not in KERNEL_DTYPES or not z.numel():
        return "reference"
    if z.device.type == "cuda":
        able = torch.cuda.get_device_capability(z.device) >= dispatch.MINIMUM_CAPABILITY and dispatch.has_triton()
        return "triton" if able else "reference"
    return "triton" if wanted == "triton" or dispatch.kernels_serve(z.device) else "reference"


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::norm_forward", mutates_args=("running_mean", "running_var"))
def norm_forward(
    z: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    spec: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalize, add, activate.

    Args:
        z: [B, C, *image] (or [B, C]), dense (contiguous or channels_last).
        residual: z's shape, its dtype or another; only with activation "relu".
        weight, bias: [C], both or none.
        running_mean, running_var: [C]; updated with `momentum` where batch_stats, else used.
        spec: NormSpec.encode().
    Returns:
        y in z's dtype (promoted with the residual's); mean and rstd, [C] or [B, groups]; ReLU's mask (ops/relu.py), or
        empty.
    """
    s = NormSpec.decode(spec)
    return _module(s.backend).norm_forward(z, residual, (weight, bias), (running_mean, running_var), s)


@norm_forward.register_fake
def _(z, residual, weight, bias, running_mean, running_var, spec):  # type: ignore[no-untyped-def]
    s = NormSpec.decode(spec)
    dtype = z.dtype if residual is None else torch.promote_types(z.dtype, residual.dtype)
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32  # statistics are never narrower than fp32
    mean, rstd = (z.new_empty(s.statistics_shape(z), dtype=wide) for _ in range(2))
    return torch.empty_like(z, dtype=dtype), mean, rstd, z.new_empty(s.mask_bytes(z), dtype=torch.uint8)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::norm_backward", mutates_args=())
def norm_backward(
    dy: Tensor, z: Tensor, norm: list[Tensor], mask: Tensor, spec: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiate norm_forward.

    Args:
        dy: y's shape, strides and dtype.
        z: as given to norm_forward.
        norm: mean and rstd as norm_forward returned them, then weight and bias where they were given.
        mask: as norm_forward returned it.
        spec: NormSpec.encode().
    Returns:
        dz in z's dtype; dresidual in dy's, or empty; dweight and dbias, fp32 [C], or empty without a weight.
    """
    s = NormSpec.decode(spec)
    if dy.stride() != z.stride():  # a graph may have been traced with others: see ops/relu.py
        dy = torch.empty_like(z, dtype=dy.dtype).copy_(dy)
    return _module(s.backend).norm_backward(dy, z, norm, mask, s)


@norm_backward.register_fake
def _(dy, z, norm, mask, spec):  # type: ignore[no-untyped-def]
    dresidual = torch.empty_like(dy) if NormSpec.decode(spec).need_dresidual else dy.new_empty(0)
    affine = z.new_empty(z.shape[1] if len(norm) == 4 else 0, dtype=norm[0].dtype)
    return torch.empty_like(z), dresidual, affine, torch.empty_like(affine)


# ---- in two steps, for an activation that is quantized where it is made (kernels only) ------------------------------


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::norm_statistics", mutates_args=("running_mean", "running_var"))
def norm_statistics(
    z: Tensor, running_mean: Tensor | None, running_var: Tensor | None, spec: list[float]
) -> tuple[Tensor, Tensor]:
    """Return norm_forward's mean and rstd, and update the running statistics as it does."""
    return _module("triton").statistics(z, running_mean, running_var, NormSpec.decode(spec))


@norm_statistics.register_fake
def _(z, running_mean, running_var, spec):  # type: ignore[no-untyped-def]
    shape = NormSpec.decode(spec).statistics_shape(z)
    return z.new_empty(shape, dtype=torch.float32), z.new_empty(shape, dtype=torch.float32)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::norm_apply", mutates_args=("y", "mask"))
def norm_apply(
    z: Tensor, residual: Tensor | None, norm: list[Tensor], y: Tensor, mask: Tensor, spec: list[float]
) -> None:
    """Write norm_forward's y, in z's memory order, and its mask unless that is empty."""
    _module("triton").apply(z, residual, norm, y, mask, NormSpec.decode(spec))


@norm_apply.register_fake
def _(z, residual, norm, y, mask, spec):  # type: ignore[no-untyped-def]
    return None


def norm_quantize(
    z: Tensor,
    residual: Tensor | None,
    norm: list[Tensor],
    mask: Tensor,
    s: NormSpec,
    spec: OperandSpec,
    dtype: torch.dtype,
    given: tuple[Tensor, Collector | None] | None,
) -> Operand:
    """Quantize as norm_quantize_op does. `given`: amaxes, fp32 [2], and what takes what the call observes."""
    if runs_directly(z):
        from te_nvfp4_cv.ops.norm.triton import quantize_launch

        return quantize_launch.norm_quantize(z, residual, norm, mask, s, spec, dtype, given)
    amax, collector = (None, None) if given is None else given
    made = Operand.from_flat(norm_quantize_op(z, residual, norm, mask, s.encode(), spec.to_ints(), dtype, amax))
    if collector is not None:
        collect(collector, made.observed)
    return made


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::norm_quantize", mutates_args=("mask",))
def norm_quantize_op(
    z: Tensor,
    residual: Tensor | None,
    norm: list[Tensor],
    mask: Tensor,
    spec: list[float],
    operand: list[int],
    dtype: torch.dtype,
    amax: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantize norm_forward's y without writing it; the mask is written unless it is empty.

    Args:
        z: [B, C, *image], channels innermost in memory, C a multiple of 16.
        residual: in z's memory order.
        operand: OperandSpec.to_ints() with nothing folded, nearest rounding, one tensor scale, no 4over6 and no
            DEQUANTIZED columnwise face.
        dtype: of a dequantized face.
        amax: fp32 [2], as in quantize_operand, or None.
    Returns:
        Operand.flat() as quantize_operand gives it for the activation, bit for bit.
    """
    from te_nvfp4_cv.ops.norm.triton import quantize_launch

    s, how = NormSpec.decode(spec), OperandSpec.from_ints(operand)
    given = None if amax is None else (amax, None)
    return separate(quantize_launch.norm_quantize(z, residual, norm, mask, s, how, dtype, given))


@norm_quantize_op.register_fake
def _(z, residual, norm, mask, spec, operand, dtype, amax):  # type: ignore[no-untyped-def]
    row, col = operand_faces(z.movedim(1, -1), OperandSpec.from_ints(operand), dtype)
    row_amax, col_amax = (z.new_empty(1, dtype=torch.float32) for _ in range(2))
    return Operand(row, row_amax, col, col_amax, z.new_empty(0 if amax is None else 3, dtype=torch.float32)).flat()


def _module(backend: str) -> Any:
    """Return the module that serves a backend; Triton is imported only where its kernels run."""
    if backend == "reference":
        return reference
    from te_nvfp4_cv.ops.norm.triton import launch

    return launch
