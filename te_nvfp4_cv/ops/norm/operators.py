"""Normalization + activation in one pass, forward and backward, as custom operators on plain tensors.

    forward    u = (z - mean) * rstd * weight + bias;  y = act(u + residual);  kept: z, mean, rstd, ReLU's 1-bit mask
    backward   g = act'(u) * dy, u from z again (SiLU), or the mask (ReLU)
               dbias = sum g;  dweight = sum g * xhat;  dresidual = g
               dz = rstd * (weight * g - mean(weight * g) - xhat * mean(weight * g * xhat))    the means over what was
                    normalized together; with running statistics dz = rstd * weight * g

`groups` 0 is batch normalization (one mean a channel, over batch and image), otherwise group normalization (one mean an
image and group). Neither the norm's output nor the activation is kept. Backends: "reference" is ATen's own chain of
operators, so its bits are those of torch's modules; "triton" are the kernels, which compute in fp32 and round once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.backend.registration import without_autocast
from te_nvfp4_cv.ops.geometry import Fold
from te_nvfp4_cv.ops.norm import reference
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.records import OperandSpec

ACTIVATIONS = ("relu", "silu")
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def backend_for(z: Tensor, wanted: str = "auto") -> str:
    """ "triton" where the kernels serve this tensor, else "reference"; fp64, old GPUs and missing Triton take the
    latter.
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
    groups: int,
    batch_stats: bool,
    momentum: float,
    eps: float,
    activation: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalize, add, activate.

    Args:
        z: [B, C, *image] (or [B, C]), dense (contiguous or channels_last).
        residual: z's shape, its dtype or another; only with activation "relu".
        weight, bias: [C], both or none.
        running_mean, running_var: [C]; updated with `momentum` where batch_stats, else used.
        groups: 0 for batch normalization.
        activation: "relu" or "silu".
        keep: backward will come: write the mask.
    Returns:
        y in z's dtype (promoted with the residual's); mean and rstd, [C] or [B, groups]; ReLU's mask (ops/relu.py), or
        empty.
    """
    module = _room(backend)
    return module.norm_forward(
        z, residual, weight, bias, running_mean, running_var, groups, batch_stats, momentum, eps, activation, keep
    )


@norm_forward.register_fake
def _(  # type: ignore[no-untyped-def]
    z, residual, weight, bias, running_mean, running_var, groups, batch_stats, momentum, eps, activation, keep, backend
):
    dtype = z.dtype if residual is None else torch.promote_types(z.dtype, residual.dtype)
    shape = (z.shape[0], groups) if groups else (z.shape[1],)
    y = torch.empty_like(z, dtype=dtype)
    stat = torch.float64 if z.dtype == torch.float64 else torch.float32
    mask = z.new_empty((z.numel() + 7) // 8 if activation == "relu" and keep else 0, dtype=torch.uint8)
    return y, z.new_empty(shape, dtype=stat), z.new_empty(shape, dtype=stat), mask


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::norm_backward", mutates_args=())
def norm_backward(
    dy: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor,
    groups: int,
    batch_stats: bool,
    eps: float,
    activation: str,
    need_residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dz in z's dtype, dresidual in dy's or empty, dweight, dbias: fp32 [C], or empty without a weight).

    Args:
        dy: y's shape, strides and dtype.
        The others: as given to norm_forward, and what it returned.
    """
    module = _room(backend)
    return module.norm_backward(
        dy, z, weight, bias, mean, rstd, mask, groups, batch_stats, eps, activation, need_residual
    )


@norm_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    dy, z, weight, bias, mean, rstd, mask, groups, batch_stats, eps, activation, need_residual, backend
):
    dresidual = torch.empty_like(dy) if need_residual else dy.new_empty(0)
    affine = z.new_empty(z.shape[1] if weight is not None else 0, dtype=mean.dtype)
    return torch.empty_like(z), dresidual, affine, torch.empty_like(affine)


# ---- in two steps, for an activation that is quantized where it is made (kernels only) ------------------------------


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::norm_statistics", mutates_args=("running_mean", "running_var"))
def norm_statistics(
    z: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    groups: int,
    batch_stats: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of norm_forward, and its update of the running statistics."""
    return _room("triton").statistics(z, running_mean, running_var, groups, batch_stats, momentum, eps)


@norm_statistics.register_fake
def _(z, running_mean, running_var, groups, batch_stats, momentum, eps):  # type: ignore[no-untyped-def]
    shape = (z.shape[0], groups) if groups else (z.shape[1],)
    return z.new_empty(shape, dtype=torch.float32), z.new_empty(shape, dtype=torch.float32)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::norm_apply", mutates_args=("y", "mask"))
def norm_apply(
    z: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    y: Tensor,
    mask: Tensor,
    groups: int,
    activation: str,
) -> None:
    """Write norm_forward's y, in z's memory order, and its mask unless that is empty."""
    _room("triton").apply(z, residual, weight, bias, mean, rstd, y, mask, groups, activation)


@norm_apply.register_fake
def _(z, residual, weight, bias, mean, rstd, y, mask, groups, activation):  # type: ignore[no-untyped-def]
    return None


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::norm_quantize", mutates_args=("mask",))
def norm_quantize(
    z: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor,
    groups: int,
    activation: str,
    images: int,
    row: int,
    col: int,
    rht: bool,
    e4m3_max: int,
    dtype: torch.dtype,
    amax: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What operands.quantize_operand gives for norm_forward's y, which is not written; the mask is, unless it is empty.

    Args:
        z: [B, C, *image], channels innermost in memory, C a multiple of 16; residual: z's memory order.
        images: B rounded up to a multiple of 16.
        row: NONE, PACKED or DEQUANTIZED; col: NONE or PACKED; the others as in operands.quantize_operand.
    """
    from te_nvfp4_cv.ops.norm.triton import quantize_launch

    return quantize_launch.norm_quantize(
        z, residual, weight, bias, mean, rstd, mask, groups, activation, images, row, col, rht, e4m3_max, dtype, amax
    )


@norm_quantize.register_fake
def _(  # type: ignore[no-untyped-def]
    z, residual, weight, bias, mean, rstd, mask, groups, activation, images, row, col, rht, e4m3_max, dtype, amax
):
    fold = Fold(1, 0, z.shape[2] if z.dim() > 2 else 1, 0, images)
    y = z.new_empty(z.movedim(1, -1).shape)
    spec = OperandSpec(1, fold, row, col, rht, e4m3_max=e4m3_max)
    return operand.quantize_operand(y, spec, dtype, None, amax, "triton").flat()


def _room(backend: str):  # type: ignore[no-untyped-def]
    if backend == "reference":
        return reference
    from te_nvfp4_cv.ops.norm.triton import launch  # Triton is imported only where its kernels run

    return launch
