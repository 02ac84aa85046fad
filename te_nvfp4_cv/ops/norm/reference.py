"""Normalization + activation by ATen's own operators: the same bits as torch's modules one after the other.

    forward    native_batch_norm / native_group_norm, add_, relu_ / silu_ in the norm's own memory, then ReLU's mask
    backward   SiLU: the norm again from z (its output was not kept); then ATen's norm backward

Any device and floating dtype. Without batch statistics ATen's backward gets 1 / rstd^2 for the variance, which may
differ from the running variance in its last bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from te_nvfp4_cv.ops.relu import apply_mask, positive_mask

aten = torch.ops.aten


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See norm_forward in this folder's __init__."""
    if groups:
        y, mean, rstd = _group_norm(z, weight, bias, groups, eps)
    else:
        y, mean, rstd = torch.native_batch_norm(z, weight, bias, running_mean, running_var, batch_stats, momentum, eps)
        if not batch_stats:
            assert running_mean is not None and running_var is not None
            wide = torch.promote_types(running_mean.dtype, torch.float32)
            mean, rstd = running_mean.to(wide, copy=True), (running_var.to(wide) + eps).rsqrt()
    if residual is not None:
        same = torch.promote_types(y.dtype, residual.dtype) == y.dtype
        y = y.add_(residual) if same else y + residual
    if y.stride() != z.stride():
        y = torch.empty_like(z, dtype=y.dtype).copy_(y)
    if activation == "silu":
        return torch.nn.functional.silu(y, inplace=True), mean, rstd, y.new_empty(0, dtype=torch.uint8)
    y = torch.relu_(y)
    return y, mean, rstd, positive_mask(y) if keep else y.new_empty(0, dtype=torch.uint8)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See norm_backward in this folder's __init__."""
    variance = None if batch_stats or groups else rstd.square().reciprocal()
    if activation == "relu":
        g = apply_mask(dy, mask)
    else:
        if groups:
            u = _group_norm(z, weight, bias, groups, eps)[0]
        elif batch_stats:
            u = torch.native_batch_norm(z, weight, bias, None, None, True, 0.0, eps)[0]
        else:
            u = torch.native_batch_norm(z, weight, bias, mean, variance, False, 0.0, 0.0)[0]
        g = aten.silu_backward(dy, u)
    dresidual = g if need_residual else dy.new_empty(0)
    g = g.to(z.dtype)
    wanted = [True, weight is not None, weight is not None]
    if groups:
        dz, dweight, dbias = _group_norm_backward(g, z, mean, rstd, weight, groups, wanted)
    else:
        running = (None, None) if batch_stats else (mean, variance)
        dz, dweight, dbias = aten.native_batch_norm_backward(
            g, z, weight, *running, mean, rstd, batch_stats, eps if batch_stats else 0.0, wanted
        )
    if dz.stride() != z.stride():
        dz = torch.empty_like(z).copy_(dz)
    empty = mean.new_empty(0)
    if weight is None:
        return dz, dresidual, empty, empty.clone()
    return dz, dresidual, dweight.to(mean.dtype), dbias.to(mean.dtype)


def _sizes(z: Tensor) -> tuple[int, int, int]:
    return z.shape[0], z.shape[1], math.prod(z.shape[2:])


def _wide(z: Tensor, weight: Tensor | None) -> bool:
    """Whether ATen's group norm refuses this pair of dtypes on a GPU, so that it runs in fp32."""
    return z.device.type != "cpu" and weight is not None and weight.dtype != z.dtype


def _group_norm(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x = z.float() if _wide(z, weight) else z
    y, mean, rstd = torch.native_group_norm(x, weight, bias, *_sizes(z), groups, eps)
    return y.to(z.dtype), mean, rstd


def _group_norm_backward(
    g: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, groups: int, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    x = z.float() if _wide(z, weight) else z
    dz, dweight, dbias = aten.native_group_norm_backward(
        g.to(x.dtype), x, mean, rstd, weight, *_sizes(z), groups, wanted
    )
    return dz.to(z.dtype), dweight, dbias
