"""Launch the `triton` backend's products of grouped linear layers. The arguments are those of ops/conv/grouped.py.

Nothing here reads an offset: launches cover what any offsets could need. Tiles are those of a linear layer with as many
rows as an expert has on average.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from te_nvfp4_cv.backend import tuning
from te_nvfp4_cv.backend.devices import on_its_device
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.ops.conv.triton import grouped_kernels
from te_nvfp4_cv.ops.conv.triton.launch import prepare, takes_words
from te_nvfp4_cv.ops.experts import Experts
from te_nvfp4_cv.ops.gemm.triton.launch import WIDE_FROM, gpu_of, key_of, unit_of
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.records import Face


@on_its_device
def fprop(
    x: Face,
    w: Face,
    alpha: Tensor | None,
    bias: Tensor | None,
    experts: Experts,
    geometry: ConvGeometry,
    dtype: torch.dtype,
) -> Tensor:
    """Return y [T, O]."""
    return _data(x, w, alpha, bias, experts, geometry, True, dtype)


@on_its_device
def dgrad(
    dy: Face, w: Face, alpha: Tensor | None, experts: Experts, geometry: ConvGeometry, dtype: torch.dtype
) -> Tensor:
    """Return dx [T, C]."""
    return _data(dy, w, alpha, None, experts, geometry, False, dtype)


def _data(
    x: Face,
    w: Face,
    alpha: Tensor | None,
    bias: Tensor | None,
    experts: Experts,
    g: ConvGeometry,
    to_b: bool,
    dtype: torch.dtype,
) -> Tensor:
    each, contracted = (g.y_shape[-1], g.x_shape[-1]) if to_b else (g.x_shape[-1], g.y_shape[-1])
    y = torch.empty((g.batch, each), dtype=dtype, device=x.data.device)
    gpu, blocks = gpu_of(y.device), -(-contracted // BLOCK)
    x_data, x_scale = (part.contiguous() for part in x)
    alpha, bias, offsets = (None if t is None else t.contiguous() for t in (alpha, bias, experts.offsets))
    unit = unit_of(blocks)

    def run(tile: tuning.Config) -> None:
        step = tile["BK"] // BLOCK
        chunks = -(-blocks // step)
        kernel, kernel_scale = prepare(*w, g, to_b, step, gpu)
        # Each expert, and the rows of nobody, may end in a tile that is not full.
        tiles = g.batch // tile["BM"] + g.groups + 1
        grouped_kernels.grouped_product[(tiles * triton.cdiv(each, tile["BN"]),)](
            x_data,
            x_scale,
            kernel,
            kernel_scale,
            y if alpha is None else alpha,  # not read then, but a pointer must be there; likewise the bias
            y if bias is None else bias,
            offsets,
            y,
            tokens=g.batch,
            experts=g.groups,
            channels=each,
            units=blocks // unit,
            chunks=chunks,
            UNIT=unit,
            FULL=blocks % step == 0,
            WIDE=max(x_data.numel(), y.numel(), kernel.numel()) >= WIDE_FROM,
            ALPHA=0 if alpha is None else 1 if alpha.numel() == 1 else 2,
            BIAS=bias is not None,
            **gpu.how,
            **tile,
        )

    key = key_of(gpu, -(-g.batch // g.groups), each, blocks * BLOCK)
    run(tuning.config("conv_data", gpu.arch, (*key, 1), run))
    return y


@on_its_device
def wgrad(
    dy: Face, x: Face, alpha: Tensor | None, experts: Experts, geometry: ConvGeometry, dtype: torch.dtype
) -> Tensor:
    """Return dw [E * O, 1, C]."""
    g = geometry
    dw = torch.empty(g.weight_shape, dtype=dtype, device=dy.data.device)
    gpu, each_b, each_a = gpu_of(dw.device), g.y_shape[-1], g.x_shape[-1]
    operands = [part.contiguous() for part in (*dy, *x)]
    alpha, offsets = (None if t is None else t.contiguous() for t in (alpha, experts.offsets))

    def run(tile: tuning.Config) -> None:
        tiles = triton.cdiv(each_b, tile["BM"]) * triton.cdiv(each_a, tile["BN"])
        grouped_kernels.grouped_weight[(tiles, g.groups)](
            *operands,
            dw if alpha is None else alpha,
            offsets,
            dw,
            tokens=g.batch,
            experts=g.groups,
            each_b=each_b,
            each_a=each_a,
            ALPHA=0 if alpha is None else 1 if alpha.numel() == 1 else 2,
            WORDS=takes_words(gpu, each_b, each_a, operands[1], operands[3]),
            **gpu.how,
            **tile,
        )

    key = key_of(gpu, each_b, each_a, -(-g.batch // g.groups))
    run(tuning.config("conv_weight", gpu.arch, (*key, 1), run))
    return dw


@on_its_device
def row_sums(dy: Tensor, experts: Experts) -> Tensor:
    """Return db, fp32 [E, O]."""
    total = torch.empty(experts.number, dy.shape[-1], dtype=torch.float32, device=dy.device)
    grid = (triton.cdiv(dy.shape[-1], 64), experts.number)
    sizes = (dy.shape[0], experts.number, dy.shape[-1])
    grouped_kernels.grouped_sums[grid](dy.contiguous(), experts.offsets.contiguous(), total, *sizes, ROWS=32, BLOCK=64)
    return total
