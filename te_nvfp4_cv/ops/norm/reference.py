"""Normalization + activation by ATen's own operators: the same bits as torch's modules one after the other.

    forward    native_batch_norm / native_group_norm, add_, the activation in the norm's own memory, then ReLU's mask
    backward   but for ReLU: the norm again from z (its output was not saved); then ATen's norm backward

It takes any device and floating dtype. Statistics are never narrower than fp32, whatever ATen returns; ATen then wants
the weight in their dtype, too. Without batch statistics ATen's backward gets 1 / rstd^2 for the variance, which
may differ from the running variance in its last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.ops.norm.spec import NormSpec, Pair, affine_of, split
from te_nvfp4_cv.ops.relu import apply_mask, positive_mask

aten = torch.ops.aten


def norm_forward(
    z: Tensor, residual: Tensor | None, affine: Pair, running: Pair, s: NormSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the operator norm_forward by ATen."""
    wide = torch.promote_types(z.dtype, torch.float32)
    if s.groups:
        y, mean, rstd = _group_norm(z, *affine, s.groups, s.eps)
    else:
        y, mean, rstd = torch.native_batch_norm(z, *affine, *running, s.batch_stats, s.momentum, s.eps)
        if not s.batch_stats:  # ATen returns empty statistics then
            running_mean, running_var = running
            assert running_mean is not None and running_var is not None
            mean, rstd = running_mean.to(wide, copy=True), (running_var.to(wide) + s.eps).rsqrt()
    mean, rstd = mean.to(wide), rstd.to(wide)
    if residual is not None:
        # In place where the sum keeps y's dtype; else torch's promotion, as modules would give it.
        same = torch.promote_types(y.dtype, residual.dtype) == y.dtype
        y = y.add_(residual) if same else y + residual
    if y.stride() != z.stride():  # ATen's group norm returns contiguous memory; masks lie in z's order
        y = torch.empty_like(z, dtype=y.dtype).copy_(y)
    y = activate(y, s.activation, in_place=True)  # in the norm's memory: nobody else has seen it
    masked = s.activation == "relu" and s.need_mask
    return y, mean, rstd, positive_mask(y) if masked else y.new_empty(0, dtype=torch.uint8)


def norm_backward(
    dy: Tensor, z: Tensor, norm: Sequence[Tensor], mask: Tensor, s: NormSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the operator norm_backward by ATen."""
    mean, rstd = norm[:2]
    weight, bias = affine_of(norm)
    w, b = (None if t is None else t.to(mean.dtype) for t in (weight, bias))
    # 1 / rstd^2 is the running variance plus eps, so that ATen is given eps 0 below.
    variance = None if s.batch_stats or s.groups else rstd.square().reciprocal()
    if s.activation == "relu":
        g = apply_mask(dy, mask)
    else:
        if s.groups:
            u = _group_norm(z, weight, bias, s.groups, s.eps)[0]
        elif s.batch_stats:
            # Without running statistics: forward has updated them, and this second run must not.
            u = torch.native_batch_norm(z, weight, bias, None, None, True, 0.0, s.eps)[0]
        else:
            u = torch.native_batch_norm(z, w, b, mean, variance, False, 0.0, 0.0)[0]
        g = _gradient(dy, u, s.activation)
    dresidual = g if s.need_dresidual else dy.new_empty(0)
    # A residual of a wider dtype has widened y, and dy with it.
    g = g.to(z.dtype)
    wanted = [True, weight is not None, weight is not None]
    if s.groups:
        dz, dweight, dbias = _group_norm_backward(g, z, norm, s.groups, wanted)
    else:
        running = (None, None) if s.batch_stats else (mean, variance)
        dz, dweight, dbias = aten.native_batch_norm_backward(
            g, z, w, *running, mean, rstd, s.batch_stats, s.eps if s.batch_stats else 0.0, wanted
        )
    if dz.stride() != z.stride():
        dz = torch.empty_like(z).copy_(dz)
    empty = mean.new_empty(0)
    if weight is None:
        return dz, dresidual, empty, empty.clone()  # an operator's results must not share memory
    return dz, dresidual, dweight.to(mean.dtype), dbias.to(mean.dtype)


def activate(u: Tensor, activation: str, in_place: bool = False) -> Tensor:
    """Return the activation of u."""
    name, slope = split(activation)
    if name.startswith("gelu"):
        approximate = "tanh" if name == "gelu_tanh" else "none"
        return aten.gelu_(u, approximate=approximate) if in_place else F.gelu(u, approximate=approximate)
    if name == "leaky_relu":
        return F.leaky_relu(u, slope, in_place)
    return getattr(F, name)(u, inplace=in_place)  # type: ignore[no-any-return]


def _gradient(dy: Tensor, u: Tensor, activation: str) -> Tensor:
    """Return the gradient of u, from that of its activation."""
    name, slope = split(activation)
    if name.startswith("gelu"):
        return aten.gelu_backward(dy, u, approximate="tanh" if name == "gelu_tanh" else "none")
    if name == "leaky_relu":
        return aten.leaky_relu_backward(dy, u, slope, False)
    if name == "relu6":
        return aten.hardtanh_backward(dy, u, 0.0, 6.0)
    return aten.silu_backward(dy, u) if name == "silu" else aten.hardswish_backward(dy, u)


def _sizes(z: Tensor) -> tuple[int, int, int]:
    return z.shape[0], z.shape[1], math.prod(z.shape[2:])


def _wide(z: Tensor, weight: Tensor | None) -> bool:
    """Tell if ATen's group norm refuses this pair of dtypes on a GPU, so that it must run in fp32."""
    return z.device.type != "cpu" and weight is not None and weight.dtype != z.dtype


def _group_norm(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x = z.float() if _wide(z, weight) else z
    y, mean, rstd = torch.native_group_norm(x, weight, bias, *_sizes(z), groups, eps)
    return y.to(z.dtype), mean, rstd


def _group_norm_backward(
    g: Tensor, z: Tensor, norm: Sequence[Tensor], groups: int, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    weight, _ = affine_of(norm)
    x = z.float() if _wide(z, weight) else z
    # A CPU takes fp32 beside a narrower x, a GPU wants one dtype.
    dtype = norm[0].dtype if z.device.type == "cpu" else x.dtype
    mean, rstd, w = (None if t is None else t.to(dtype) for t in (*norm[:2], weight))
    dz, dweight, dbias = aten.native_group_norm_backward(
        g.to(x.dtype), x, mean, rstd, w, *_sizes(z), groups, wanted
    )
    return dz.to(z.dtype), dweight, dbias
