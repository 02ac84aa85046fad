"""Memory layouts: what torch hands in and wants back, as the contiguous channels-last arrays that operators take.

    x [B, C, *image], or [..., C] of a linear layer    <->  [B, *image, C]
    w [axis 0, axis 1, *kernel]                        <-   [axis 0, taps, axis 1]
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from te_nvfp4_cv.backend import scratch
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.records import DEQUANTIZED, PACKED, RECORD, RECORDS, Face, OperandSpec, WeightSpec

Shape = tuple[int, ...]
Shapes = tuple[Shape, Shape, Shape, Shape]
Make = Callable[[Shape, torch.dtype, torch.device], Tensor]

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}  # by the image's rank


def image_last(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return [B, C, *image] (or [..., C] of a linear layer) as contiguous [B, *image, C]; no copy if channels_last."""
    return (x if len(shape) == 2 else x.movedim(1, -1)).reshape(shape).contiguous()


def image_first(y: Tensor, shape: tuple[int, ...], x_shape: tuple[int, ...], channels_last: bool) -> Tensor:
    """Undo image_last for a result, and give it the strides that torch would give it."""
    if len(shape) == 2:  # a linear layer: only the leading axes were flattened
        y = y if len(x_shape) == 2 else y.reshape(*x_shape[:-1], shape[-1])
    else:
        y = y.view(shape).movedim(-1, 1)
        y = y if channels_last else contiguous(y)
    # A copy is a tensor of its own; of one pixel, contiguous() is the view itself.
    return not_a_view(y) if torch.compiler.is_compiling() or y._is_view() else y


def contiguous(y: Tensor) -> Tensor:
    """Return y contiguous, with the strides of a new tensor along axes of one element, too.

    One pixel or one tap is contiguous with its channels first and last. torch tells the two apart by strides that no
    element needs: from them later layers choose their memory format, and DistributedDataParallel compares them.
    """
    made = y.contiguous()
    return made.view(-1).view(made.shape) if made is y else made


def like_image_first(like: Tensor, shape: tuple[int, ...], x_shape: tuple[int, ...], channels_last: bool) -> Tensor:
    """Return an empty tensor of `like`'s dtype and device with the shape and strides of image_first's result."""
    if len(shape) == 2:
        return like.new_empty((*x_shape[:-1], shape[-1]))
    y = like.new_empty(shape).movedim(-1, 1)
    return y if channels_last else torch.empty_like(y, memory_format=torch.contiguous_format)


def not_a_view(y: Tensor) -> Tensor:
    """Return a tensor on y's memory that is not a view: autograd refuses in-place operations on a view that a Function
    returns.
    """
    # detach() shares the version of y: a checkpoint that holds y notices what is written to its memory.
    return y.clone() if torch.compiler.is_compiling() else y.detach()


def is_channels_last(x: Tensor) -> bool:
    """Return True if torch would treat x as channels_last (2-D and 3-D images only)."""
    if x.dim() not in (4, 5):
        return False
    if torch.compiler.is_compiling():
        return _suggests_channels_last(x)
    try:
        return _like_channels_last(x.shape, x.stride())
    except TypeError:  # a traced size has no hash
        return _suggests_channels_last(x)


@functools.lru_cache(maxsize=4096)
def _like_channels_last(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    # torch answers in Python, in about 20 microseconds, from sizes and strides alone: one answer each is enough.
    return _suggests_channels_last(torch.empty_strided(shape, stride, device="meta"))


def _suggests_channels_last(x: Tensor) -> bool:
    return torch._prims_common.suggest_memory_format(x) != torch.contiguous_format


def lies_channels_last(x: Tensor) -> bool:
    """Tell if x's memory is channels_last without gaps; unlike is_channels_last, contiguous memory may be both."""
    layout = CHANNELS_LAST.get(x.dim() - 2)
    return layout is not None and x.is_contiguous(memory_format=layout)


def is_dense(x: Tensor) -> bool:
    """Tell if x's memory is contiguous or channels_last: a fixed order of the axes without gaps."""
    return x.is_contiguous() or lies_channels_last(x)


def kernel_as(dw: Tensor, g: ConvGeometry, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    """Return dw [axis 0, taps, axis 1] as the parameter's [axis 0, axis 1, *kernel], in its memory format."""
    if g.rank == 0:
        return dw.reshape(shape)
    dw = dw.view(dw.shape[0], *g.kernel, dw.shape[2]).movedim(-1, 1)
    return dw if channels_last else contiguous(dw)


def in_memory_order(x: Tensor) -> Tensor:
    """Return x's values as one dense piece of memory, in any order: a copy only where x has gaps or overlaps."""
    if x.is_contiguous():
        return x
    order = sorted(range(x.dim()), key=lambda axis: -x.stride()[axis])
    return x.permute(order).contiguous()


# ---- faces that quantization writes into ----------------------------------------------------------------------------


def _new(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def for_one_call(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialized tensor that nobody needs after the call, in reused memory where that is faster."""
    if device.type != "cpu" or math.prod(shape) * dtype.itemsize < scratch.SMALL:
        return torch.empty(shape, dtype=dtype, device=device)
    return scratch.empty(shape, dtype)


def operand_faces(
    x: Tensor, spec: OperandSpec, dtype: torch.dtype, make: Make = _new, block: int = BLOCK
) -> tuple[Face, Face]:
    """Return (rowwise, columnwise) faces for x [B, *image, C]; a face that the spec does not ask for is empty.

    Args:
        make: allocates dequantized values, which live for one call only.
        block: how many values share a scale.
    """
    try:
        shapes = _cached_operand_shapes(x.shape, spec, block)
    except TypeError:  # a traced size has no hash
        shapes = _operand_shapes(x.shape, spec, block)
    return _face(x, spec.row, *shapes[0], dtype, make), _face(x, spec.col, *shapes[1], dtype, make)


def _operand_shapes(x: tuple[int, ...], spec: OperandSpec, block: int) -> tuple[Shapes, Shapes]:
    """Return for either face the shapes of its packed data, of its scale, of its values and of its records."""
    channels, f = x[-1], spec.fold
    of_group = channels // spec.groups
    blocks, scales = spec.groups * -(-of_group // BLOCK), spec.groups * -(-of_group // block)
    folded = (f.rows, *x[2:-1], channels) if len(x) > 2 else (channels,)
    row = ((*x[:-1], blocks * 8), (*x[:-1], scales), tuple(x), (*x[:-1], blocks * RECORD))
    columns, column_scales = (f.images // BLOCK, *folded, 8), (-(-f.images // block), *folded)
    # Records of columns lie as wgrad adds them up: pixel, block of images, channel.
    records = (*folded[:-1], f.images // BLOCK, channels * RECORD)
    return row, (columns, column_scales, (f.images, *folded), records)


_cached_operand_shapes = functools.lru_cache(maxsize=4096)(_operand_shapes)


def weight_faces(w: Tensor, spec: WeightSpec, dtype: torch.dtype, block: int = BLOCK) -> tuple[Face, Face]:
    """Return (rowwise, columnwise) faces for w [axis 0, axis 1, *kernel]; `block` values share a scale."""
    n, c, taps = w.shape[0], w.shape[1], math.prod(w.shape[2:])
    kb, ob = -(-c // BLOCK), -(-(n // spec.groups) // BLOCK)
    scales_k, scales_o = -(-c // block), -(-(n // spec.groups) // block)
    row_scale = (spec.groups, scales_o, taps, scales_k) if spec.two_d else (n, taps, scales_k)
    columns, values = (spec.groups, ob, taps, c), (n, taps, c)  # weights have no records
    row = _face(w, spec.row, (n, taps, kb * 8), row_scale, values, values, dtype, _new)
    return row, _face(w, spec.col, (*columns, 8), (spec.groups, scales_o, taps, c), values, values, dtype, _new)


def _face(
    like: Tensor,
    form: int,
    data: tuple[int, ...],
    scale: tuple[int, ...],
    values: tuple[int, ...],
    records: tuple[int, ...],
    dtype: torch.dtype,
    make: Make,
) -> Face:
    """Return one face in its form, of which the shapes are given; one that is not asked for is empty."""
    if form == PACKED:
        return Face(like.new_empty(data, dtype=torch.uint8), like.new_empty(scale, dtype=torch.uint8))
    empty = like.new_empty(0, dtype=torch.uint8)
    if form == RECORDS:
        return Face(make(records, torch.uint8, like.device), empty)
    return Face(make(values, dtype, like.device) if form == DEQUANTIZED else torch.empty_like(empty), empty)
