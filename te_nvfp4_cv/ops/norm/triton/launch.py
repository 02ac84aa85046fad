"""Launches the kernels of normalization + activation: shapes, tiles, grids and the memory they need.

Same signatures as reference.py. Takes bf16, fp16 and fp32, contiguous or channels_last. Group normalization of images
whose size is no multiple of 8 goes through reference.py: a mask's byte would lie in two images. So does that of more
images than a grid holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from te_nvfp4_cv.backend.devices import on_its_device
from te_nvfp4_cv.ops.norm import reference
from te_nvfp4_cv.ops.norm.triton import kernels
from te_nvfp4_cv.ops.triton.numerics import OPTIONS

ACTIVATIONS = {"relu": 1, "silu": 2}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
BLOCK = 2048  # elements of a program that goes through memory once
TILE = 4096  # elements of a reduction's tile
PROGRAMS = 1024  # that a reduction aims at
SPLITS = 128  # at most, of one slice
MOST_SLICES = 65535  # where the second and third axis of a grid end


@dataclass(frozen=True)
class Shape:
    """z as the kernels see it."""

    slices: int
    slice_size: int
    channels: int
    group_channels: int
    last: bool  # channels are the innermost axis
    outer: int  # images of a slice that lie apart (channels first)
    inner: int  # rows between them

    @property
    def grid(self) -> tuple[int, int]:
        """Of the elementwise kernels."""
        return triton.cdiv(self.slice_size, BLOCK), self.slices

    @property
    def tile(self) -> tuple[int, int]:
        """(rows, channels) of a reduction's tile; the axis that lies innermost in memory is the long one."""
        if self.last:
            cols = min(64, triton.next_power_of_2(self.channels))
            return min(TILE // cols, max(16, triton.next_power_of_2(self.inner))), cols
        rows = min(512, max(16, triton.next_power_of_2(self.inner)))
        return rows, min(TILE // 2 // rows, triton.next_power_of_2(self.channels))  # more spills registers

    def reduction(self) -> tuple[tuple[int, int, int], dict[str, Any]]:
        """(grid, arguments) of the reductions."""
        rows, cols = self.tile
        per_image = triton.cdiv(self.inner, rows)
        items = per_image * self.outer
        blocks = triton.cdiv(self.channels, cols)
        splits = min(items, SPLITS, max(1, triton.cdiv(PROGRAMS, blocks * self.slices)))
        arguments = dict(
            slice_size=self.slice_size,
            per_image=per_image,
            items=items,
            inner=self.inner,
            channels=self.channels,
            ROWS=rows,
            COLS=cols,
            LAST=self.last,
        )
        return (splits, blocks, self.slices), arguments

    @property
    def finish(self) -> tuple[tuple[int, int], dict[str, Any]]:
        """(grid, arguments) of the kernels that merge splits."""
        if self.group_channels > 1 or self.slices > 1:
            width = triton.next_power_of_2(self.group_channels)
            return (self.channels // self.group_channels, self.slices), dict(GROUP=True, WIDTH=width)
        return (triton.cdiv(self.channels, 32), 1), dict(GROUP=False, WIDTH=32)


def shape_of(z: Tensor, groups: int) -> Shape:
    """The kernels' view of a dense z [B, C, *image]."""
    batch, channels, pixels = z.shape[0], z.shape[1], math.prod(z.shape[2:])
    last = pixels == 1 or (z.dim() in FORMATS and z.is_contiguous(memory_format=FORMATS[z.dim()]))
    if groups:
        return Shape(batch, channels * pixels, channels, channels // groups, last, 1, pixels)
    outer, inner = (1, batch * pixels) if last else (batch, pixels)
    return Shape(1, z.numel(), channels, 1, last, outer, inner)


def by_reference(shape: Shape) -> bool:
    return shape.slices > MOST_SLICES or (shape.slices > 1 and shape.slice_size % 8 != 0)


@on_its_device
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
    shape = shape_of(z, groups)
    if by_reference(shape):
        return reference.norm_forward(
            z, residual, weight, bias, running_mean, running_var, groups, batch_stats, momentum, eps, activation, keep
        )
    mean, rstd = statistics(z, running_mean, running_var, groups, batch_stats, momentum, eps)
    dtype = z.dtype if residual is None else torch.promote_types(z.dtype, residual.dtype)
    y = torch.empty_like(z, dtype=dtype)
    masked = activation == "relu" and keep
    mask = torch.empty((z.numel() + 7) // 8 if masked else 0, dtype=torch.uint8, device=z.device)
    apply(z, residual, weight, bias, mean, rstd, y, mask, groups, activation)
    return y, mean, rstd, mask


@on_its_device
def apply(
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
    """Write the activation into y, and ReLU's mask unless it is empty."""
    shape = shape_of(z, groups)
    kernels.apply_kernel[shape.grid](
        z,
        z if residual is None else ordered(residual, z),
        *affine(weight, bias, mean),
        mean,
        rstd,
        y,
        mask if mask.numel() else rstd,
        shape.slice_size,
        shape.inner,
        CHANNELS=shape.channels,
        GROUP_CHANNELS=shape.group_channels,
        LAST=shape.last,
        AFFINE=weight is not None,
        RESIDUAL=residual is not None,
        ACTIVATION=ACTIVATIONS[activation],
        KEEP=mask.numel() > 0,
        BLOCK=BLOCK,
        **OPTIONS,  # as produce.py: the same bits
    )


@on_its_device
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
    shape = shape_of(z, groups)
    if by_reference(shape):
        return reference.norm_backward(
            dy, z, weight, bias, mean, rstd, mask, groups, batch_stats, eps, activation, need_residual
        )
    shared: dict[str, Any] = dict(AFFINE=weight is not None, ACTIVATION=ACTIVATIONS[activation])
    bits = mask if mask.numel() else rstd
    grid, arguments = shape.reduction()
    partial = torch.empty((shape.slices, grid[0], 2, shape.channels), dtype=torch.float32, device=z.device)
    kernels.backward_sums_kernel[grid](
        dy,
        z,
        bits,
        *affine(weight, bias, mean),
        mean,
        rstd,
        partial,
        group_channels=shape.group_channels,
        WHOLE_BYTES=shape.last and shape.channels % 8 == 0 and arguments["COLS"] % 8 == 0,
        **arguments,
        **shared,
    )
    sums = torch.empty((2, shape.slices, shape.channels), dtype=torch.float32, device=z.device)
    slope, offset = torch.empty_like(mean), torch.empty_like(mean)
    finish, merge = shape.finish
    kernels.finish_backward[finish](
        partial,
        affine(weight, bias, mean)[0],
        rstd,
        sums,
        slope,
        offset,
        grid[0],
        shape.channels,
        shape.group_channels,
        float(shape.slice_size * shape.group_channels // shape.channels),
        AFFINE=weight is not None,
        BATCH_STATS=batch_stats,
        SPLITS=triton.next_power_of_2(grid[0]),
        **merge,
    )
    dz = torch.empty_like(z)
    dresidual = torch.empty_like(dy) if need_residual else dy.new_empty(0)
    kernels.backward_apply_kernel[shape.grid](
        dy,
        z,
        bits,
        *affine(weight, bias, mean),
        mean,
        rstd,
        slope,
        offset,
        dz,
        dresidual if need_residual else dz,
        shape.slice_size,
        shape.inner,
        CHANNELS=shape.channels,
        GROUP_CHANNELS=shape.group_channels,
        LAST=shape.last,
        RESIDUAL=need_residual,
        BLOCK=BLOCK,
        **shared,
    )
    if weight is None:
        return dz, dresidual, mean.new_empty(0), mean.new_empty(0)
    dbias, dweight = sums.sum(1).unbind(0)
    return dz, dresidual, dweight.clone(), dbias.clone()


@on_its_device
def statistics(
    z: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    groups: int,
    batch_stats: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """mean and rstd, fp32 [C] or [B, groups]; the running statistics are updated, or used without batch statistics."""
    if not batch_stats:
        assert running_mean is not None and running_var is not None
        return running_mean.to(torch.float32, copy=True), (running_var.float() + eps).rsqrt()
    shape = shape_of(z, groups)
    grid, arguments = shape.reduction()
    partial = torch.empty((shape.slices, grid[0], 3, shape.channels), dtype=torch.float32, device=z.device)
    kernels.statistics_kernel[grid](z, partial, **arguments)
    size = (z.shape[0], groups) if groups else (z.shape[1],)
    mean, rstd = (torch.empty(size, dtype=torch.float32, device=z.device) for _ in range(2))
    finish, merge = shape.finish
    update = running_mean is not None
    kernels.finish_statistics[finish](
        partial,
        mean,
        rstd,
        running_mean if update else mean,
        running_var if update else mean,
        grid[0],
        shape.channels,
        shape.group_channels,
        momentum,
        eps,
        UPDATE=update,
        SPLITS=triton.next_power_of_2(grid[0]),
        **merge,
    )
    return mean, rstd


def affine(weight: Tensor | None, bias: Tensor | None, placeholder: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernels take for weight and bias; without an affine part they read neither."""
    return (placeholder, placeholder) if weight is None or bias is None else (weight.contiguous(), bias.contiguous())


def ordered(residual: Tensor, z: Tensor) -> Tensor:
    """The residual in z's memory order."""
    if residual.stride() == z.stride():
        return residual
    return torch.empty_like(z, dtype=residual.dtype).copy_(residual)
