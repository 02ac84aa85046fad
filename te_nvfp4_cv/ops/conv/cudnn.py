"""The three GEMMs by NVIDIA's libraries on packed operands, on the FP4 tensor cores of sm_100: the backend "cudnn".

    convolutions of one group        cudnn-frontend's NVFP4 convolution: fprop, and dgrad of stride 1, which is the
                                     convolution of dy with the taps in reverse order
    linear layers, 1x1 convolutions  cuBLAS (gemm/cublas.py), in all three products
    everything else                  the Triton kernels: wgrad, groups, other numbers of channels. It is said once

The operands, their codes and scales are those of the backend "triton": the images' scales as they are, the weight's in
tiles of 128 x 4. The libraries return sums in fp32; tensor scales and bias are applied to them here, with one rounding.
Needs nvidia-cudnn-frontend from 1.32 on and nvidia-cutlass-dsl from 4.8 on, which compile a kernel for each layer.
Not executed: no such GPU was there. tests/ops compare layouts and arguments with what the library's engine checks, and
emulate its product.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend.devices import on_its_device
from te_nvfp4_cv.errors import runtime_error, warn_once
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.ops.conv.vendor import finish
from te_nvfp4_cv.ops.gemm import cublas
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.records import Face

ENGINES = "CUDNN_FRONTEND_ENABLE_FROST_ENGINES"  # the library's switch for its newer engines


@on_its_device
def fprop(
    x: Face, w: Face, alpha: Tensor | None, bias: Tensor | None, geometry: ConvGeometry, dtype: torch.dtype
) -> Tensor:
    """Multiply as operators.conv_fprop does."""
    return _data(x, w, alpha, bias, geometry, not geometry.transposed, dtype)


@on_its_device
def dgrad(dy: Face, w: Face, alpha: Tensor | None, geometry: ConvGeometry, dtype: torch.dtype) -> Tensor:
    """Multiply as operators.conv_dgrad does."""
    return _data(dy, w, alpha, None, geometry, geometry.transposed, dtype)


def _data(
    x: Face,
    w: Face,
    alpha: Tensor | None,
    bias: Tensor | None,
    g: ConvGeometry,
    to_b: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply from the a side to the b side (`to_b`), or back."""
    from te_nvfp4_cv.ops.conv.triton import launch

    contracted, channels = (g.channels_a, g.channels_b) if to_b else (g.channels_b, g.channels_a)
    shape = g.b_shape if to_b else g.a_shape
    matrix = is_matrix(g) and cublas.takes(contracted, channels)
    reason = None if matrix else refusal(g, to_b)
    if reason is not None:
        warn_once(
            "cudnn leaves layers to Triton",
            f"nvfp4: backend 'cudnn' leaves layers to its Triton kernels, here {contracted} -> {channels} channels: "
            f"{reason} (said once)",
        )
        return launch.data(x, w, alpha, bias, g, to_b, dtype)
    # Rows along the contraction, whatever face the weight has, as the kernels of Blackwell read them.
    rows, scales = launch.prepare(*w, g, to_b, 1, dataclasses.replace(launch.gpu_of(w.data.device), native=True))
    if matrix:
        found = cublas.multiply(x.data.flatten(0, -2), x.scale.flatten(0, -2), rows.flatten(1), scales.flatten(1))
    else:
        if not to_b:
            rows, scales = rows.flip(1), scales.flip(1)
        found = library(g, to_b, x.data.device)(x, rows, scales)
    return finish(found.view(shape), alpha, bias, dtype)


@on_its_device
def wgrad(dy: Face, x: Face, alpha: Tensor | None, geometry: ConvGeometry, dtype: torch.dtype) -> Tensor:
    """Multiply as operators.conv_wgrad does. The libraries have no convolution for it, only the product of matrices."""
    from te_nvfp4_cv.ops.conv.triton import launch

    g = geometry
    b, a = (x, dy) if g.transposed else (dy, x)
    if not (is_matrix(g) and cublas.takes(b.scale.numel() // g.channels_b * BLOCK, g.channels_a)):
        return launch.wgrad(dy, x, alpha, g, dtype)
    if alpha is not None and alpha.numel() != 1:  # one factor per channel of x
        alpha = alpha.view(-1, 1, 1) if g.transposed else alpha
    return finish(cublas.multiply(*_by_channels(b), *_by_channels(a)).view(g.weight_shape), alpha, None, dtype)


def _by_channels(face: Face) -> tuple[Tensor, Tensor]:
    """Return a columnwise face [N16, *image, C] with the contraction innermost: data [C, L / 2], scale [C, L / 16]."""
    return face.data.movedim(-2, 0).flatten(1), face.scale.movedim(-1, 0).flatten(1)


def is_matrix(g: ConvGeometry) -> bool:
    """Return True if each output pixel reads the pixel at its own place: a product of two matrices."""
    return g.taps == 1 and g.groups == 1 and g.a_size == g.b_size and not any(g.padding) and set(g.stride) <= {1}


def refusal(g: ConvGeometry, to_b: bool) -> str | None:
    """Return why cudnn-frontend's convolution does not take this product, or None if it does (its release 1.32)."""
    contracted, channels = (g.channels_a, g.channels_b) if to_b else (g.channels_b, g.channels_a)
    if g.rank == 0 or g.groups != 1:
        return "a linear layer whose sizes are no multiples of 32 and 16" if g.rank == 0 else "several groups"
    if contracted not in (64, 128, 192) and contracted % 256:
        return "it contracts 64, 128, 192 or a multiple of 256 channels"
    if channels % 4:
        return "it writes a multiple of 4 channels"
    if max(g.stride) > (8 if to_b else 1):
        return "strides over 8" if to_b else "a gradient through strides"
    _, _, kernel, _, padding, dilation = sizes_of(g, to_b)
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(p < 0 or p > 16 or not -16 <= p - r <= 15 for p, r in zip(padding, reach, strict=True)):
        return "padding or kernels that reach further than 16 pixels"
    return None


def sizes_of(g: ConvGeometry, to_b: bool) -> tuple[tuple[int, ...], ...]:
    """Return the product as a plain convolution of three image axes: input, output, kernel, stride, padding, dilation.

    Without `to_b` its stride is 1, and it pads with what the taps in reverse order reach over.
    """
    g = g.with_axes(3)
    if to_b:
        return g.a_size, g.b_size, g.kernel, g.stride, g.padding, g.dilation
    padding = tuple(d * (k - 1) - p for k, d, p in zip(g.kernel, g.dilation, g.padding, strict=True))
    return g.b_size, g.a_size, g.kernel, g.stride, padding, g.dilation


# ---- cudnn-frontend -------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def library(g: ConvGeometry, to_b: bool, device: torch.device) -> Convolution:
    """Return the compiled convolution of a product; compiling one takes seconds."""
    return Convolution(g, to_b, device)


def last(size: tuple[int, ...]) -> list[int]:
    """Return the strides of [N, C, depth, height, width] in memory with channels innermost."""
    _, c, d, h, w = size
    return [c * d * h * w, 1, h * w * c, w * c, c]


class Operands:
    """The tensors of a convolution as cudnn-frontend wants them: [N, C, depth, height, width], channels innermost."""

    def __init__(self, g: ConvGeometry, to_b: bool) -> None:
        """Take the sizes of a product that `refusal` lets pass."""
        image, out, kernel, self.stride, self.padding, self.dilation = sizes_of(g, to_b)
        contracted, channels = (g.channels_a, g.channels_b) if to_b else (g.channels_b, g.channels_a)
        self.image = (g.batch, contracted, *image)
        self.weight = (channels, contracted, *kernel)
        self.output = (g.batch, channels, *out)

    def scales(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the size of an operand's block scales."""
        return (size[0], size[1] // BLOCK, *size[2:])

    def bound(self, x: Face, rows: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        """Return image, its scales, weight, its scales and an empty output, in the memory that the kernel reads.

        Args:
            x: a rowwise face [B, *image, C / 2] and [B, *image, C / 16].
            rows: the weight's codes [channels, taps, C / 2], with scales [channels, taps, C / 16].
        """
        image = _codes(x.data, self.image)
        # Scales of the images: one row a pixel, and a third axis of one.
        image_scales = x.scale.contiguous().view(-1, self.image[1] // BLOCK, 1).view(torch.float8_e4m3fn)
        weight = _codes(rows, self.weight)
        weight_scales = cublas.swizzled(scales.flatten(1))
        n, c, *out = self.output
        y = torch.empty((n, *out, c), dtype=torch.float32, device=rows.device)
        return image, image_scales, weight, weight_scales, y.movedim(-1, 1)


def _codes(data: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return packed codes as a tensor of pairs of E2M1 values [N, C / 2, depth, height, width]."""
    n, c, *image = size
    return data.contiguous().view(n, *image, c // 2).view(torch.float4_e2m1fn_x2).movedim(-1, 1)


class Convolution:
    """One product, compiled by cudnn-frontend: call it with a rowwise face and the weight's rows."""

    def __init__(self, g: ConvGeometry, to_b: bool, device: torch.device) -> None:
        """Describe the product as a graph of the library, and let its NVFP4 engine compile it.

        Raises:
            RuntimeError: another engine of the library would run it.
        """
        import cudnn

        self.operands, self.device = Operands(g, to_b), device
        self.handle = cudnn.create_handle()
        self.graph, self.tensors = graph_of(cudnn, self.operands, self.handle)
        self.lock = threading.Lock()  # the stream is the handle's: another thread may set its own before this one runs
        before = os.environ.get(ENGINES)
        os.environ[ENGINES] = "1"  # read while it builds; other graphs of this process are none of our business
        try:
            self.graph.build([cudnn.heur_mode.A])
        finally:
            if before is None:
                del os.environ[ENGINES]
            else:
                os.environ[ENGINES] = before
        chosen = getattr(self.graph.selected_engine, "name", None)
        if chosen != "frost_conv":
            raise runtime_error(
                "nvfp4: cudnn-frontend does not run this convolution in NVFP4.",
                got=f"its engine {chosen!r} for image {self.operands.image}, weight {self.operands.weight}",
                needs="frost_conv, on sm_100, with nvidia-cudnn-frontend >= 1.32 and nvidia-cutlass-dsl >= 4.8",
                fix="pip install -U nvidia-cudnn-frontend nvidia-cutlass-dsl, or backend='triton'",
            )

    def __call__(self, x: Face, rows: Tensor, scales: Tensor) -> Tensor:
        """Return the sums, fp32 [N, depth, height, width, channels]."""
        import cudnn

        bound = self.operands.bound(x, rows, scales)
        with self.lock:
            cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream(self.device).cuda_stream)
            self.graph.execute(dict(zip(self.tensors, bound, strict=True)), handle=self.handle)
        return bound[-1].movedim(1, -1)


def graph_of(cudnn: Any, operands: Operands, handle: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the library's graph of one product, and its tensors in the order of Operands.bound."""
    kind = cudnn.data_type
    graph = cudnn.pygraph(
        io_data_type=kind.FP4_E2M1, intermediate_data_type=kind.FLOAT, compute_data_type=kind.FLOAT, handle=handle
    )
    block = [1, BLOCK, 1, 1, 1]
    tensors, values = [], []
    for size, order in ((operands.image, "NONE"), (operands.weight, "F8_128x4")):
        small = operands.scales(size)
        data = graph.tensor(dim=[*size], stride=last(size), data_type=kind.FP4_E2M1)
        scale = graph.tensor(
            dim=[*small], stride=last(small), data_type=kind.FP8_E4M3,
            reordering_type=getattr(cudnn.tensor_reordering, order),
        )  # fmt: skip
        values.append(graph.block_scale_dequantize(data, scale, block_size=block))
        tensors += [data, scale]
    padding, stride, dilation = (list(n) for n in (operands.padding, operands.stride, operands.dilation))
    y = graph.conv_fprop(*values, pre_padding=padding, post_padding=padding, stride=stride, dilation=dilation)
    y.set_output(True).set_data_type(kind.FLOAT).set_dim([*operands.output]).set_stride(last(operands.output))
    return graph, (*tensors, y)
