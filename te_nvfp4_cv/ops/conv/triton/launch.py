"""Launch the implicit GEMM kernels: the `triton` backend's convolutions, on packed operands.

fprop and dgrad are one kernel. Rows that gather from the strided side (dgrad, and fprop of a transposed convolution)
are split into classes by their coordinates modulo the stride. Within a class the taps that hit a pixel at all are
fixed, so no product is spent on zeros, and the class is a correlation of stride 1. Every class is a launch.
The convolution's kernel w is small: one launch turns its packed face into rows along the contraction, whatever face it
is. wgrad writes parts of sums to a workspace, and a second launch adds them in order: equal inputs give equal bits.
Nothing here reads a tensor's value. Tile sizes and the number of parts depend on shapes and the GPU alone.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from te_nvfp4_cv.backend import tuning
from te_nvfp4_cv.backend.devices import on_its_device
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.ops.conv.triton import kernels, weight_rows
from te_nvfp4_cv.ops.conv.triton.walks import data_classes, weight_arguments
from te_nvfp4_cv.ops.gemm.triton.launch import (
    NATIVE_TILES,
    OTHER_TILES,
    TWO_PACKED,
    WIDE_FROM,
    Gpu,
    candidates_of,
    gpu_of,
    key_of,
    rule_of,
    unit_of,
)
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.records import Face

PARTS_BYTES = 1 << 28  # largest workspace of wgrad, unless one part is larger

tuning.register(
    "conv_data",  # one packed operand: the kernel is fp16 but for FP4 tensor cores
    {
        0: rule_of((256, 128, 128, 4, 1)),
        80: rule_of((128, 128, 128, 8, 3), (128, 64, 128, 8, 3), (128, 128, 64, 4, 3)),
        90: rule_of((128, 256, 128, 8, 3), (128, 128, 128, 8, 3), (128, 64, 128, 8, 3), (128, 128, 64, 4, 3)),
        100: TWO_PACKED[100],
        120: TWO_PACKED[120],
    },
    candidates_of(NATIVE_TILES, OTHER_TILES),
)
tuning.register(
    "conv_weight", {0: rule_of((64, 64, 128, 4, 1)), **TWO_PACKED}, candidates_of(NATIVE_TILES, OTHER_TILES)
)


# ---- fprop and dgrad ------------------------------------------------------------------------------------------------


def prepare(w: Tensor, scale: Tensor, g: ConvGeometry, to_b: bool, step: int, gpu: Gpu) -> tuple[Tensor, Tensor]:
    """Turn a packed face of the kernel into rows of data_product: data, and scale, which is empty for fp16 data.

    Args:
        to_b: rows are the channels of the b side, and those of the a side are contracted; else the reverse.
        step: blocks of 16 a step of data_product; the contraction is padded to a multiple of it.
    """
    each_b, each_a = g.channels_b // g.groups, g.channels_a // g.groups
    each, each_in = (each_b, each_a) if to_b else (each_a, each_b)
    if to_b:
        face = weight_rows.TILES if scale.dim() == 4 else weight_rows.ROWS
    else:
        face = weight_rows.COLUMNS if w.dim() == 5 else weight_rows.TRANSPOSE
    blocks = -(-each_in // BLOCK)
    padded = -(-blocks // step) * step
    rows = each * g.groups
    # FP4 tensor cores take codes and scales as they are. Others multiply fp16: w is decoded here, once.
    if gpu.native:
        out = torch.empty(rows, g.taps, padded * 8, dtype=torch.uint8, device=w.device)
        out_scale = torch.empty(rows, g.taps, padded, dtype=torch.uint8, device=w.device)
    else:
        out = torch.empty(rows, g.taps, padded * 16, dtype=torch.float16, device=w.device)
        out_scale = scale.new_empty(0)
    total = rows * g.taps * padded
    block = 4096 if w.device.type == "cpu" else 128  # the interpreter wants few programs
    weight_rows.prepare_kernel[(triton.cdiv(total, block),)](
        w.contiguous(),
        scale.contiguous(),
        out,
        out_scale,
        total,
        g.taps,
        blocks,
        padded,
        each,
        each_in,
        FACE=face,
        HALF=not gpu.native,
        QUADS=gpu.quads,
        QB=step,
        BLOCK=block,
        num_warps=4,
    )
    return out, out_scale


def data(
    x: Face,
    w: Face,
    alpha: Tensor | None,
    bias: Tensor | None,
    g: ConvGeometry,
    to_b: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Launch fprop or dgrad; the result is [B, *image, channels]."""
    image = g.b_size if to_b else g.a_size
    channels, contracted = (g.channels_b, g.channels_a) if to_b else (g.channels_a, g.channels_b)
    y = torch.empty((g.batch, *image, channels), dtype=dtype, device=x[0].device)
    if not y.numel():  # CUDA refuses an empty grid
        return y
    gpu = gpu_of(y.device)
    # Everything that does not depend on the tile is computed before `run`, which a search calls many times.
    each, blocks = channels // g.groups, -(-(contracted // g.groups) // BLOCK)
    launches = data_classes(g, to_b)
    x_data, x_scale = (part.contiguous() for part in x)
    alpha, bias = (None if t is None else t.contiguous() for t in (alpha, bias))
    unit = unit_of(blocks)

    def run(tile: tuning.Config) -> None:
        step = tile["BK"] // BLOCK
        chunks = -(-blocks // step)
        kernel, kernel_scale = prepare(*w, g, to_b, step, gpu)
        for a in launches:
            grid = (triton.cdiv(a["rows"], tile["BM"]) * triton.cdiv(each, tile["BN"]), g.groups)
            kernels.data_product[grid](
                x_data,
                x_scale,
                kernel,
                kernel_scale,
                y if alpha is None else alpha,  # not read then, but a pointer must be there; likewise the bias
                y if bias is None else bias,
                y,
                **{name: value for name, value in a.items() if name != "hits"},
                channels=each,
                units=blocks // unit,
                x_units=blocks // unit * g.groups,
                chunks=chunks,
                steps=chunks * a["hits"],
                TAPS=max(a["hits"], 1),
                UNIT=unit,
                FULL=blocks % step == 0,
                # 64-bit offsets take registers, so they are used only where 32 bits do not reach.
                WIDE=max(x_data.numel(), y.numel(), kernel.numel()) >= WIDE_FROM,
                ALPHA=0 if alpha is None else 1 if alpha.numel() == 1 else 2,
                BIAS=bias is not None,
                **gpu.how,
                **tile,
            )

    key = key_of(gpu, max(a["rows"] for a in launches), each, blocks * BLOCK)
    run(tuning.config("conv_data", gpu.arch, (*key, min(g.taps, 32)), run))
    return y


@on_its_device
def fprop(
    x: Face, w: Face, alpha: Tensor | None, bias: Tensor | None, geometry: ConvGeometry, dtype: torch.dtype
) -> Tensor:
    """Run the operator conv_fprop. Without alpha the operands carry the tensor scales."""
    return data(x, w, alpha, bias, geometry, not geometry.transposed, dtype)


@on_its_device
def dgrad(dy: Face, w: Face, alpha: Tensor | None, geometry: ConvGeometry, dtype: torch.dtype) -> Tensor:
    """Run the operator conv_dgrad."""
    return data(dy, w, alpha, None, geometry, geometry.transposed, dtype)


# ---- wgrad ----------------------------------------------------------------------------------------------------------


def parts_of(gpu: Gpu, tiles: int, steps: int, size: int) -> int:
    """Choose into how many parts the contraction is cut.

    That is about two programs a multiprocessor, eight steps a part, and a bounded workspace of `size` values a part.
    """
    wanted = min(-(-2 * gpu.processors // max(tiles, 1)), -(-steps // 8), PARTS_BYTES // (4 * max(size, 1)))
    return max(1, min(wanted, 65535))  # where the second axis of a grid ends


def takes_words(gpu: Gpu, each_b: int, each_a: int, *scales: Tensor) -> bool:
    """Tell if a kernel may load columnwise scales by words of four channels."""
    return gpu.native and each_b % 4 == 0 == each_a % 4 and all(scale.data_ptr() % 4 == 0 for scale in scales)


@on_its_device
def wgrad(dy: Face, x: Face, alpha: Tensor | None, geometry: ConvGeometry, dtype: torch.dtype) -> Tensor:
    """Run the operator conv_wgrad."""
    g = geometry
    dw = torch.empty(g.weight_shape, dtype=dtype, device=dy.data.device)
    if not dw.numel():
        return dw
    (b, b_scale), (a, a_scale) = (x, dy) if g.transposed else (dy, x)
    gpu = gpu_of(dw.device)
    each_a, each_b = g.channels_a // g.groups, g.channels_b // g.groups
    arguments = weight_arguments(g.folded)
    alpha = None if alpha is None else alpha.contiguous()
    b, b_scale, a, a_scale = (t.contiguous() for t in (b, b_scale, a, a_scale))

    def run(tile: tuning.Config) -> None:
        line_chunks = max(1, -(-arguments["width"] * BLOCK // tile["BK"]))
        tiles = triton.cdiv(each_b, tile["BM"]) * triton.cdiv(each_a, tile["BN"]) * g.taps
        parts = parts_of(gpu, tiles * g.groups, arguments["lines"] * line_chunks, dw.numel())
        # fp32 parts added in order by a second kernel: atomics would give other bits from run to run.
        sums = torch.empty((parts, *dw.shape), dtype=torch.float32, device=dw.device)
        kernels.weight_product[(tiles, parts, g.groups)](
            b,
            b_scale,
            a,
            a_scale,
            sums,
            **arguments,
            line_chunks=line_chunks,
            parts=parts,
            channels_b=g.channels_b,
            channels_a=g.channels_a,
            each_b=each_b,
            each_a=each_a,
            WORDS=takes_words(gpu, each_b, each_a, b_scale, a_scale),
            **gpu.how,
            **tile,
        )
        block = 65536 if gpu.arch == 0 else 1024
        kernels.sum_parts[(triton.cdiv(dw.numel(), block),)](
            sums,
            sums if alpha is None else alpha,
            dw,
            dw.numel(),
            parts,
            g.taps * each_a if g.transposed else 1,  # a factor per channel of x: axis 0 of a transposed kernel, else 1
            g.channels_b if g.transposed else each_a,
            ALPHA=0 if alpha is None else 1 if alpha.numel() == 1 else 2,
            BLOCK=block,
            num_warps=4,
        )

    key = key_of(gpu, each_b, each_a, arguments["width"] * BLOCK)
    run(tuning.config("conv_weight", gpu.arch, (*key, min(g.taps, 32)), run))
    return dw
