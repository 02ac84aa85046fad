"""Convolutions of dequantized operands by the vendor's library: oneDNN on a CPU, cuDNN on CUDA, through aten.

code * scale has at most 6 significant bits, so it is exact in bf16 and the result is the quantized GEMM's, up to the
order of accumulation and one rounding. alpha (both tensor scales) and the bias are applied to the result in fp32.
Without alpha, w carries the scales and the library adds the bias, rounded to the operands' dtype as under
torch.autocast. 1-D convolutions run as 2-D ones of height 1, linear layers as a matrix product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.backend import dispatch, native
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.records import Alpha, Face

aten = torch.ops.aten


def fprop(
    x: Face,
    w: Face,
    alpha: Tensor | Alpha | None,
    bias: Tensor | None,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply as operators.conv_fprop does; the scales are empty. A linear layer's result may be in `out`."""
    # With alpha the bias comes after it, in fp32; without, the library adds it in the pass that it makes anyway.
    inner, outer = (bias, None) if alpha is None else (None, bias)
    if geometry.rank == 0:
        # A linear layer's weight has one tap: [O, 1, C] -> [O, C].
        y = linear(x.data, w.data[:, 0], inner, alpha is not None, out)
    else:
        g = geometry.at_least_2d
        y = convolution(_channels_first(x.data, g.x_shape), _kernel(w.data, g), inner, g)
        y = _channels_last(y, geometry.y_shape)
    return finish(y, alpha, outer, dtype)


def dgrad(
    dy: Face,
    w: Face,
    alpha: Tensor | Alpha | None,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply as operators.conv_dgrad does; the scales are empty. out: as for fprop."""
    if geometry.rank == 0:
        return finish(product(dy.data, w.data[:, 0], alpha is not None, out), alpha, None, dtype)
    g = geometry.at_least_2d
    dy_first, x_like = _channels_first(dy.data, g.y_shape), _empty_image(dy.data, g.x_shape)
    dx, _, _ = convolution_backward(dy_first, x_like, _kernel(w.data, g), g, [True, False, False])
    return finish(_channels_last(dx, geometry.x_shape), alpha, None, dtype)


def wgrad(
    dy: Face,
    x: Face,
    alpha: Tensor | Alpha | None,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply as operators.conv_wgrad does; the scales are empty. out: as for fprop."""
    if geometry.rank == 0:
        out = None if out is None else out[:, 0]
        dw = product(dy.data.t(), x.data, alpha is not None, out).unsqueeze(1)
    else:
        # Columnwise operands are folded, and dy and x have the images of the folded geometry.
        g = geometry.folded.at_least_2d
        w_like = _empty_image(dy.data, (g.channels_b, *g.kernel, g.channels_a // g.groups))
        _, dw, _ = convolution_backward(
            _channels_first(dy.data, g.y_shape), _channels_first(x.data, g.x_shape), w_like, g, [False, True, False]
        )
        dw = _channels_last(dw, geometry.weight_shape)
    if isinstance(alpha, Tensor) and alpha.numel() != 1:  # one factor per channel of x
        alpha = alpha.view(-1, 1, 1) if geometry.transposed else alpha
    return finish(dw, alpha, None, dtype)


def linear(x: Tensor, w: Tensor, bias: Tensor | None, scaled: bool, out: Tensor | None = None) -> Tensor:
    """Return x @ w.t(), with the bias added by the library; scaled, out: as for `product`."""
    return product(x, w.t(), scaled, out) if bias is None else F.linear(x, w, bias.to(x.dtype))


def product(a: Tensor, b: Tensor, scaled: bool, out: Tensor | None = None) -> Tensor:
    """Return a @ b, in `out` if that has their dtype.

    On CUDA in fp32 where tensor scales follow, since cuBLAS may add parts of a bf16 result in bf16.
    """
    if a.device.type == "cuda" and a.dtype == torch.bfloat16 and scaled and a.numel() and b.numel():
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b if out is None or out.dtype != a.dtype else torch.mm(a, b, out=out)


def convolution(x: Tensor, w: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    """Run the vendor's convolution on channels-first views, in fp32 where `_safe` says so."""
    x, w = _safe(g, x, w)
    bias = None if bias is None else bias.to(x.dtype)
    return aten.convolution(x, w, bias, g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups)


def convolution_backward(
    dy: Tensor, x: Tensor, w: Tensor, g: ConvGeometry, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the vendor's (dx, dw, db). What the mask leaves out is not computed, and its operand is not read."""
    dy, x, w = _safe(g, dy, x, w)
    return aten.convolution_backward(
        dy, x, w, None, g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups, mask
    )


def _safe(g: ConvGeometry, *operands: Tensor) -> tuple[Tensor, ...]:
    """Return the operands; contiguous and in fp32 on a CPU where oneDNN's bf16 kernels cannot be trusted (torch 2.13).

    Where some tap or output row reads nothing but padding, the channels_last ones leave such taps of dw unwritten and
    can crash; padded 3-D ones leave parts of dw unwritten in either layout (seen on small volumes).
    """
    unsafe = g.touches_only_padding or (g.rank == 3 and any(g.padding))
    if operands[0].device.type != "cpu" or not unsafe:
        return operands
    return tuple(t.float().contiguous() for t in operands)


def _channels_first(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return [B, *image, C] memory as the [B, C, *image] view that aten wants."""
    return x.view(shape).movedim(-1, 1)


def _kernel(w: Tensor, g: ConvGeometry) -> Tensor:
    return w.view(w.shape[0], *g.kernel, w.shape[2]).movedim(-1, 1)


def _channels_last(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    return y.movedim(1, -1).contiguous().view(shape)


def _empty_image(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return an argument of which aten reads the shape and layout but not the values."""
    return like.new_empty(shape).movedim(-1, 1)


def finish(y: Tensor, alpha: Tensor | Alpha | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return round(y * alpha + bias) in `dtype`, with one rounding; y is contiguous and may be overwritten."""
    if alpha is None:
        return y.to(dtype)
    if (isinstance(alpha, Alpha) or alpha.numel() == 1) and dispatch.kernels_serve(y.device):
        from te_nvfp4_cv.ops.triton import elementwise

        return elementwise.scale_bias(y, alpha, bias, dtype)
    assert isinstance(alpha, Tensor)
    library = native.load() if y.device.type == "cpu" else None
    kinds = (torch.bfloat16, torch.float32)
    if library is None or alpha.numel() != 1 or y.dtype not in kinds:
        out = y.float() * alpha
        return (out if bias is None else out + bias.float()).to(dtype)
    # In place where the dtype stays. The kernel does not write fp16: it is cast from y's dtype at the end.
    out = y if dtype not in kinds or dtype == y.dtype else torch.empty_like(y, dtype=dtype)
    if bias is not None:
        bias = bias.detach().float().contiguous()
    channels = y.shape[-1] if bias is not None else 1  # without a bias all that counts is the number of elements
    library.nvfp4_scale_bias(
        y.data_ptr(),
        out.data_ptr(),
        y.numel() // max(channels, 1),
        channels,
        float(alpha),
        None if bias is None else bias.data_ptr(),
        y.dtype == torch.bfloat16,
        out.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out.to(dtype)
