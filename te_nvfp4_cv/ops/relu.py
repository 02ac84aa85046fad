"""ReLU's 1-bit mask: one bit per element is all that ReLU's backward needs.

    masked_relu     x  -> relu(x), bits
    relu_in_place   x  -> bits; x becomes relu(x)
    positive_mask   y  -> bits, in memory order: set where torch's threshold_backward lets the gradient through,
                          not (y <= 0), so also for NaN
    apply_mask      dy -> dy where the bit is set, else +0

A CPU runs compiled kernels, CUDA runs Triton's, and everything else plain torch. Eager calls on plain tensors run at
once, and others through a custom operator of torch. The tensors must be dense; the caller (layer/relu.py) sees to it.

A mask's bits are in memory order, which a graph of torch.compile has decided when it was traced. The operators take the
strides that were traced: torch 2.14 traces others than there are behind a group normalization of channels_last images.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from te_nvfp4_cv.backend import dispatch, native
from te_nvfp4_cv.backend.dispatch import runs_directly
from te_nvfp4_cv.backend.registration import without_autocast

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # what the kernels take


def masked_relu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return relu(x) and its mask as positive_mask gives it; on CUDA in one pass."""
    return _masked_relu(x) if runs_directly(x) else masked_relu_op(x, [*x.stride()])


def _masked_relu(x: Tensor) -> tuple[Tensor, Tensor]:
    if _by_kernels(x):
        from te_nvfp4_cv.ops.triton import elementwise

        return elementwise.relu_mask(x, torch.empty_like(x))
    y = torch.relu(x)
    return y, _positive_mask(y)


def relu_in_place(x: Tensor) -> Tensor:
    """Turn x into relu(x), and return its mask; on CUDA in one pass."""
    if runs_directly(x) and _by_kernels(x):
        from te_nvfp4_cv.ops.triton import elementwise

        increment_version(x)  # as an operator of torch would: whoever saved x for backward must notice
        return elementwise.relu_mask(x, x)[1]
    torch.relu_(x)
    return positive_mask(x)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::masked_relu", mutates_args=())
def masked_relu_op(x: Tensor, strides: list[int]) -> tuple[Tensor, Tensor]:
    """Call masked_relu on x with these strides."""
    return _masked_relu(_laid_out(x, strides))


@masked_relu_op.register_fake
def _(x, strides):  # type: ignore[no-untyped-def]
    return x.new_empty_strided(x.shape, strides), x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def positive_mask(y: Tensor) -> Tensor:
    """Return one bit for every element of y in memory order, uint8 [ceil(n / 8)], set where ReLU's backward passes.

    That is where not (y <= 0) rather than where y > 0: torch lets the gradient of a NaN through.
    """
    return _positive_mask(y) if runs_directly(y) else positive_mask_op(y, [*y.stride()])


def _positive_mask(y: Tensor) -> Tensor:
    if _by_kernels(y):
        from te_nvfp4_cv.ops.triton import elementwise

        return elementwise.relu_mask(y, None)[1]
    library = native.load() if y.device.type == "cpu" else None
    n = y.numel()
    if library is not None and y.dtype in (torch.bfloat16, torch.float32):
        mask = torch.empty(-(-n // 8), dtype=torch.uint8, device=y.device)
        library.nvfp4_positive_mask(
            y.data_ptr(), mask.data_ptr(), n, y.dtype == torch.bfloat16, torch.get_num_threads()
        )
        return mask
    # Not y > 0: the negation lets a NaN through, as torch's backward does.
    bits = torch.nn.functional.pad(~(_memory(y) <= 0), (0, -n % 8)).view(-1, 8).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=y.device)).sum(1, dtype=torch.uint8)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::positive_mask", mutates_args=())
def positive_mask_op(y: Tensor, strides: list[int]) -> Tensor:
    """Call positive_mask on y with these strides."""
    return _positive_mask(_laid_out(y, strides))


@positive_mask_op.register_fake
def _(y, strides):  # type: ignore[no-untyped-def]
    return y.new_empty((y.numel() + 7) // 8, dtype=torch.uint8)


def apply_mask(dy: Tensor, mask: Tensor) -> Tensor:
    """Return dy where the mask's bit is set, else 0.

    dy must be dense, in the memory order of the tensor that the mask was made of.
    """
    return _apply_mask(dy, mask) if runs_directly(dy) else apply_mask_op(dy, mask, [*dy.stride()])


def _apply_mask(dy: Tensor, mask: Tensor) -> Tensor:
    if _by_kernels(dy):
        from te_nvfp4_cv.ops.triton import elementwise

        return elementwise.apply_mask(dy, mask)
    library = native.load() if dy.device.type == "cpu" else None
    n = dy.numel()
    dx = torch.empty_like(dy)
    if library is not None and dy.element_size() in (2, 4):  # bytes are copied or zeroed, whatever the dtype
        library.nvfp4_apply_mask(
            dy.data_ptr(), mask.data_ptr(), dx.data_ptr(), n, dy.element_size() == 2, torch.get_num_threads()
        )
        return dx
    bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=dy.device)) & 1
    _memory(dx).copy_(torch.where(bits.view(-1)[:n].bool(), _memory(dy), 0.0))
    return dx


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::apply_mask", mutates_args=())
def apply_mask_op(dy: Tensor, mask: Tensor, strides: list[int]) -> Tensor:
    """Call apply_mask on dy with these strides."""
    return _apply_mask(_laid_out(dy, strides), mask)


@apply_mask_op.register_fake
def _(dy, mask, strides):  # type: ignore[no-untyped-def]
    return dy.new_empty_strided(dy.shape, strides)


def _laid_out(x: Tensor, strides: list[int]) -> Tensor:
    return x if [*x.stride()] == strides else x.new_empty_strided(x.shape, strides).copy_(x)


def _by_kernels(y: Tensor) -> bool:
    return y.dtype in DTYPES and dispatch.kernels_run(y.device)


def _memory(y: Tensor) -> Tensor:
    """View a dense tensor's elements in memory order, as 1-D."""
    return y.as_strided((y.numel(),), (1,))
