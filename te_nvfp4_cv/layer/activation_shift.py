"""Subtract the mean of each input channel before x is quantized: the recipe's activation_shift="mean".

    y = conv(x, w) = conv(x - m, w) + conv(M, w)        m [C]: the mean of each channel; M: an image of m everywhere

The first product runs in NVFP4, on values without the mean that would use up their four bits. The second is exact, in
fp32, and costs next to nothing: all pixels of M are alike, so it is one image of one channel with the kernel
sum over c of w[:, c] m[c]. Both are padded with the same zeros, which stay zeros: so borders are right. Its gradient is
autograd's, and gives dw what the mean contributes; m counts as a constant, because y does not depend on it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.backend.torch_private import without_function_modes
from te_nvfp4_cv.ops.geometry import ConvArgs


def shifted(op: str, x: Tensor, w: Tensor, args: ConvArgs) -> tuple[Tensor, Tensor]:
    """Return x minus the mean of each of its channels, in x's dtype, and what must be added to y, in fp32.

    Args:
        op: as nv.functional names it.
        x: as torch.nn.functional takes it, not empty.
    """
    rank = w.dim() - 2
    channel = x.dim() - 1 - rank
    with torch.autocast(x.device.type, enabled=False), without_function_modes():
        real, others = x.float(), [axis for axis in range(x.dim()) if axis != channel]
        with torch.no_grad():
            # In fp64, so that equal values are their mean: what rounding left of them would be the amax that a delayed
            # scale goes by. Without other axes, x is one row and the mean itself; no axes would mean all to torch.
            m = x.mean(others, dtype=torch.float64).float() if others else real.detach()
        # In fp32: the difference of two bf16 numbers is exact there.
        return (real - m.reshape(-1, *(1,) * rank)).to(x.dtype), constant(op, x, w.float(), m, args)


def constant(op: str, x: Tensor, w: Tensor, m: Tensor, args: ConvArgs) -> Tensor:
    """Return the layer's product with an image that is m at each pixel: [O], or [1, O, *image] with axes as y has them.

    Args:
        x: the input, of which the sizes and the device count.
        w: fp32; m: fp32 [C].
    """
    rank = w.dim() - 2
    if not rank:
        return w @ m
    groups, kernel = args.groups, w.shape[2:]
    if "transpose" in op:  # w [C, O / G, *kernel]
        parts = w.unflatten(0, (groups, -1)) * m.reshape(groups, -1, *(1,) * (rank + 1))
        taps = parts.sum(1).reshape(1, -1, *kernel)
    else:  # w [O, C / G, *kernel]
        parts = w.unflatten(0, (groups, -1)) * m.reshape(groups, 1, -1, *(1,) * rank)
        taps = parts.sum(2).reshape(-1, 1, *kernel)
    ones = x.new_ones((1, 1, *x.shape[-rank:]), dtype=torch.float32)
    rest = (args.output_padding, 1, args.dilation) if "transpose" in op else (args.dilation, 1)
    y: Tensor = getattr(F, op)(ones, taps, None, args.stride, args.padding, *rest)
    return y if x.dim() == rank + 2 else y.squeeze(0)
