"""Triton kernels that pass once over a dense tensor in memory order: ReLU with its 1-bit mask, the mask's application,
and a GEMM's tensor scales with bias.

One program handles BLOCK elements, eight consecutive ones a thread and step, so that eight of them make one byte of a
mask. Offsets are int64: tensors may exceed 2^31 elements. Launch functions allocate results and check nothing.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from te_nvfp4_cv.backend.devices import on_its_device
from te_nvfp4_cv.ops.records import Alpha
from te_nvfp4_cv.ops.triton.launching import Bound, start

BLOCK = 4096


@triton.jit
def relu_mask_kernel(x, y, mask, n, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    """Set bit i of byte j of the mask where x[8 j + i] > 0 or NaN; write y = x where it is set, else +0 (if WRITE)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    left = tl.minimum(n - start, BLOCK).to(tl.int32)
    byte = tl.arange(0, BLOCK // 8)
    # [BLOCK / 8, 8]: a row of eight elements is one byte of the mask.
    at = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    value = tl.load(x + start + at, mask=at < left, other=0.0)  # zeros beyond the end set no bit
    # Not value > 0: a NaN passes, as in torch.
    passes = ~(value.to(tl.float32) <= 0.0)
    bits = tl.where(passes, 1, 0) << tl.arange(0, 8)[None, :]
    tl.store(mask + start // 8 + byte, tl.sum(bits, 1).to(tl.uint8), mask=byte * 8 < left)
    if WRITE:
        tl.store(y + start + at, tl.where(passes, value, 0.0).to(y.dtype.element_ty), mask=at < left)


@triton.jit
def apply_mask_kernel(dy, mask, dx, n, BLOCK: tl.constexpr):
    """Write dx = dy where the mask's bit is set, else +0."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    left = tl.minimum(n - start, BLOCK).to(tl.int32)
    byte = tl.arange(0, BLOCK // 8)
    at = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    bits = tl.load(mask + start // 8 + at // 8, mask=at < left, other=0).to(tl.int32)  # eight lanes, one cache line
    passes = ((bits >> tl.arange(0, 8)[None, :]) & 1) != 0
    value = tl.load(dy + start + at, mask=at < left, other=0.0)
    tl.store(dx + start + at, tl.where(passes, value, 0.0).to(dx.dtype.element_ty), mask=at < left)


@triton.jit
def product_of(a, b, number, PARTS: tl.constexpr):
    """Return a[0], or (a[0] * b[0]) * number where PARTS is 2: the two parts and the number of a records.Alpha."""
    factor = tl.load(a)
    if PARTS == 2:
        factor = (factor * tl.load(b)) * number
    return factor


@triton.jit
def scale_bias_kernel(
    y, out, alpha, other, bias, number, n, channels, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write out = round(y * alpha + bias[i % channels]), computed in fp32; alpha is that of product_of."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    inside = at < n - start
    value = tl.load(y + start + at, mask=inside, other=0.0).to(tl.float32)
    value = value * product_of(alpha, other, number, PARTS)
    if HAS_BIAS:
        # The 64-bit remainder is taken once, of a scalar; lanes stay in 32 bits.
        first = (start % channels).to(tl.int32)
        value = value + tl.load(bias + (first + at) % channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + at, value.to(out.dtype.element_ty), mask=inside)


def parts_of(alpha: Tensor | Alpha) -> Alpha:
    """Return what product_of takes; of a tensor the other two parts are not read."""
    return alpha if isinstance(alpha, Alpha) else Alpha(alpha, alpha, 1.0)


@on_its_device
def relu_mask(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Write relu(x) into y, which may be x. Returns y and the mask; without y, x and the mask of what is positive."""
    write, y = y is not None, x if y is None else y
    mask = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)
    # CUDA refuses an empty grid.
    if x.numel():
        start(relu_mask_kernel, (triton.cdiv(x.numel(), BLOCK),), x, y, mask, x.numel(), WRITE=write, BLOCK=BLOCK)
    return y, mask


@on_its_device
def apply_mask(dy: Tensor, mask: Tensor) -> Tensor:
    """Return dy where the mask's bit is set, else 0."""
    dx = torch.empty_like(dy)
    if dy.numel():
        start(apply_mask_kernel, (triton.cdiv(dy.numel(), BLOCK),), dy, mask, dx, dy.numel(), BLOCK=BLOCK)
    return dx


@on_its_device
def scale_bias(y: Tensor, alpha: Tensor | Alpha, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return round(y * alpha + bias) in `dtype` for a contiguous y [..., C] and alpha fp32 [1] (see records.Alpha).

    Where the dtypes agree, the result overwrites y.
    """
    out = y if y.dtype == dtype else torch.empty_like(y, dtype=dtype)
    if y.numel():
        has_bias, parts = bias is not None, parts_of(alpha)
        # A pointer must be there for a bias that is not read, too.
        third = bias.contiguous() if bias is not None else parts.a
        kinds = (y.dtype, dtype, third.dtype)
        launch = scale_bias_of(y.numel(), y.shape[-1], kinds, 1 + isinstance(alpha, Alpha), parts.number, has_bias)
        launch(y, out, parts.a, parts.b, third)
    return out


@functools.lru_cache(maxsize=4096)
def scale_bias_of(
    n: int, channels: int, kinds: tuple[torch.dtype, ...], parts: int, number: float, has_bias: bool
) -> Bound:
    """Return the launch of scale_bias_kernel for n values.

    Args:
        kinds: dtypes of y, of the result and of the bias; a launch serves one.
        parts: of the factor, one or two; `number` belongs to the latter.
    """
    constants = dict(PARTS=parts, HAS_BIAS=has_bias, BLOCK=BLOCK)
    return Bound(scale_bias_kernel, (triton.cdiv(n, BLOCK),), (number, n, channels), constants)
