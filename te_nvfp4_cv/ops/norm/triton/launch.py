"""Launch the kernels of normalization + activation: shapes, tiles, grids and the memory they need.

The signatures are those of reference.py. Tensors are bf16, fp16 or fp32, contiguous or channels_last. Group
normalization of images whose size is no multiple of 8 goes through reference.py, since a byte of the mask would lie in
two images. So does that of more images than a grid holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from te_nvfp4_cv.backend.devices import on_its_device
from te_nvfp4_cv.ops.layouts import lies_channels_last
from te_nvfp4_cv.ops.norm import reference
from te_nvfp4_cv.ops.norm.spec import ACTIVATIONS, NormSpec, Pair, affine_of, norm_of, split
from te_nvfp4_cv.ops.norm.triton import apply_kernels, kernels
from te_nvfp4_cv.ops.triton.launching import start
from te_nvfp4_cv.ops.triton.numerics import OPTIONS

BLOCK = 2048  # elements of a program that goes through memory once
TILE = 4096  # elements of a reduction's tile
PROGRAMS = 1024  # that a reduction aims at
SPLITS = 128  # at most, of one slice
MOST_SLICES = 65535  # where the second and third axis of a grid end


@dataclass(frozen=True)
class Shape:
    """The memory of z as the kernels see it."""

    slices: int
    slice_size: int
    channels: int
    group_channels: int
    last: bool  # channels are the innermost axis
    outer: int  # images of a slice that lie apart (channels first)
    inner: int  # rows between them

    @property
    def elementwise(self) -> tuple[tuple[int, int], dict[str, Any]]:
        """The grid and the arguments of the elementwise kernels."""
        # Runtime integers where that costs little: as a constant, each layer's would compile a kernel of its own.
        sizes = dict(slice_size=self.slice_size, inner=self.inner, channels=self.channels)
        runtime = self.last and self.group_channels == 1 and self.channels % 8 == 0 and self.channels < 2**20
        known = 0 if runtime else self.channels
        more = dict(CHANNELS=known, GROUP_CHANNELS=self.group_channels, LAST=self.last, BLOCK=BLOCK)
        return (triton.cdiv(self.slice_size, BLOCK), self.slices), sizes | more

    @property
    def tile(self) -> tuple[int, int]:
        """The rows and channels of a reduction's tile; the axis that lies innermost in memory is the long one."""
        if self.last:
            cols = min(64, triton.next_power_of_2(self.channels))
            return min(TILE // cols, max(16, triton.next_power_of_2(self.inner))), cols
        rows = min(512, max(16, triton.next_power_of_2(self.inner)))
        return rows, min(TILE // 2 // rows, triton.next_power_of_2(self.channels))  # more spills registers

    def reduction(self) -> tuple[tuple[int, int, int], dict[str, Any]]:
        """Return the grid and the arguments of the reductions."""
        rows, cols = self.tile
        per_image = triton.cdiv(self.inner, rows)
        items = per_image * self.outer
        blocks = triton.cdiv(self.channels, cols)
        # Enough programs to fill a GPU, but no split without a tile.
        splits = min(items, SPLITS, max(1, triton.cdiv(PROGRAMS, blocks * self.slices)))
        walk = dict(slice_size=self.slice_size, per_image=per_image, items=items, inner=self.inner)
        return (splits, blocks, self.slices), dict(walk, channels=self.channels, ROWS=rows, COLS=cols, LAST=self.last)

    def finish(self, splits: int) -> tuple[tuple[int, int], dict[str, Any]]:
        """Return the grid and the arguments of the kernels that merge splits."""
        sizes = dict(splits=splits, channels=self.channels, group_channels=self.group_channels)
        sizes |= dict(SPLITS=SPLITS)
        if self.group_channels > 1 or self.slices > 1:
            width = triton.next_power_of_2(self.group_channels)
            return (self.channels // self.group_channels, self.slices), dict(sizes, GROUP=True, WIDTH=width)
        return (triton.cdiv(self.channels, 32), 1), dict(sizes, GROUP=False, WIDTH=32)


def shape_of(z: Tensor, groups: int) -> Shape:
    """Describe a dense z [B, C, *image] for the kernels."""
    batch, channels, pixels = z.shape[0], z.shape[1], math.prod(z.shape[2:])
    last = pixels == 1 or lies_channels_last(z)
    if groups:  # an image is a slice
        return Shape(batch, channels * pixels, channels, channels // groups, last, 1, pixels)
    outer, inner = (1, batch * pixels) if last else (batch, pixels)
    return Shape(1, z.numel(), channels, 1, last, outer, inner)


def by_reference(shape: Shape) -> bool:
    """Tell if reference.py must run this shape; see the top of this file."""
    return shape.slices > MOST_SLICES or (shape.slices > 1 and shape.slice_size % 8 != 0)


@on_its_device
def norm_forward(
    z: Tensor, residual: Tensor | None, affine: Pair, running: Pair, s: NormSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the operator norm_forward by the kernels."""
    if by_reference(shape_of(z, s.groups)):
        return reference.norm_forward(z, residual, affine, running, s)
    mean, rstd = statistics(z, *running, s)
    dtype = z.dtype if residual is None else torch.promote_types(z.dtype, residual.dtype)
    y = torch.empty_like(z, dtype=dtype)
    mask = torch.empty(s.mask_bytes(z), dtype=torch.uint8, device=z.device)
    apply(z, residual, norm_of(mean, rstd, *affine), y, mask, s)
    return y, mean, rstd, mask


@on_its_device
def apply(z: Tensor, residual: Tensor | None, norm: Sequence[Tensor], y: Tensor, mask: Tensor, s: NormSpec) -> None:
    """Write the activation into y, and ReLU's mask unless it is empty."""
    grid, arguments = shape_of(z, s.groups).elementwise
    start(
        apply_kernels.apply_kernel,
        grid,
        z,
        z if residual is None else ordered(residual, z),
        *pointers(norm),
        y,
        mask if mask.numel() else norm[1],
        AFFINE=len(norm) == 4,
        RESIDUAL=residual is not None,
        **activation_of(s),
        KEEP=mask.numel() > 0,
        **arguments,
        **OPTIONS,  # as quantize_launch.py: the same bits
    )


@on_its_device
def norm_backward(
    dy: Tensor, z: Tensor, norm: Sequence[Tensor], mask: Tensor, s: NormSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the operator norm_backward by the kernels."""
    shape = shape_of(z, s.groups)
    if by_reference(shape):
        return reference.norm_backward(dy, z, norm, mask, s)
    mean, rstd = norm[:2]
    shared: dict[str, Any] = dict(AFFINE=len(norm) == 4, **activation_of(s))
    bits = mask if mask.numel() else rstd  # others than ReLU have no mask; the kernel does not read it then
    pointed = pointers(norm)
    grid, arguments = shape.reduction()
    partial = torch.empty((shape.slices, grid[0], 2, shape.channels), dtype=torch.float32, device=z.device)
    start(
        kernels.backward_sums_kernel,
        grid,
        dy,
        z,
        bits,
        *pointed,
        partial,
        group_channels=shape.group_channels,
        WHOLE_BYTES=shape.last and shape.channels % 8 == 0 and arguments["COLS"] % 8 == 0,
        **arguments,
        **shared,
    )
    # Two tensors, because an operator's results must not share memory; without an axis of slices where there is one.
    sizes = (shape.slices, shape.channels)[shape.slices == 1 :]
    dbias, dweight = (torch.empty(sizes, dtype=torch.float32, device=z.device) for _ in range(2))
    slope, offset = torch.empty_like(mean), torch.empty_like(mean)  # dz is linear in z, with these per group
    finish, merge = shape.finish(grid[0])
    start(
        kernels.finish_backward,
        finish,
        partial,
        pointed[0],
        rstd,
        dbias,
        dweight,
        slope,
        offset,
        count=float(shape.slice_size * shape.group_channels // shape.channels),
        AFFINE=len(norm) == 4,
        BATCH_STATS=s.batch_stats,
        **merge,
    )
    dz = torch.empty_like(z)
    dresidual = torch.empty_like(dy) if s.need_dresidual else dy.new_empty(0)
    programs, elementwise = shape.elementwise
    start(
        apply_kernels.backward_apply_kernel,
        programs,
        dy,
        z,
        bits,
        *pointed,
        slope,
        offset,
        dz,
        dresidual if s.need_dresidual else dz,
        RESIDUAL=s.need_dresidual,
        **elementwise,
        **shared,
    )
    if len(norm) == 2:
        return dz, dresidual, mean.new_empty(0), mean.new_empty(0)
    if shape.slices > 1:
        dweight, dbias = dweight.sum(0), dbias.sum(0)
    return dz, dresidual, dweight, dbias


@on_its_device
def statistics(
    z: Tensor, running_mean: Tensor | None, running_var: Tensor | None, s: NormSpec
) -> tuple[Tensor, Tensor]:
    """Return mean and rstd, fp32 [C] or [B, groups]. The running statistics are updated, or used without batch
    statistics.
    """
    if not s.batch_stats:
        assert running_mean is not None and running_var is not None
        return running_mean.to(torch.float32, copy=True), (running_var.float() + s.eps).rsqrt()
    shape = shape_of(z, s.groups)
    grid, arguments = shape.reduction()
    partial = torch.empty((shape.slices, grid[0], 3, shape.channels), dtype=torch.float32, device=z.device)
    start(kernels.statistics_kernel, grid, z, partial, **arguments)
    mean, rstd = (torch.empty(s.statistics_shape(z), dtype=torch.float32, device=z.device) for _ in range(2))
    finish, merge = shape.finish(grid[0])
    update = running_mean is not None
    start(
        kernels.finish_statistics,
        finish,
        partial,
        mean,
        rstd,
        running_mean if update else mean,
        running_var if update else mean,
        momentum=s.momentum,
        eps=s.eps,
        UPDATE=update,
        **merge,
    )
    return mean, rstd


def activation_of(s: NormSpec) -> dict[str, Any]:
    """Return the kernels' constants for the activation."""
    name, slope = split(s.activation)
    return dict(ACTIVATION=1 + ACTIVATIONS.index(name), SLOPE=slope)


def pointers(norm: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weight, bias, mean and rstd of a launch; without an affine part the first two are not read."""
    mean, rstd = norm[:2]
    weight, bias = affine_of(norm)
    if weight is None or bias is None:
        return mean, mean, mean, rstd
    return weight.contiguous(), bias.contiguous(), mean, rstd


def ordered(residual: Tensor, z: Tensor) -> Tensor:
    """Return the residual in z's memory order."""
    if residual.stride() == z.stride():
        return residual
    return torch.empty_like(z, dtype=residual.dtype).copy_(residual)
