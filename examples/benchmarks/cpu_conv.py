"""Time the three products of single convolutions on a CPU: the integer kernels beside oneDNN in fp32 and bf16.

Operands are quantized before the clock starts; the integer kernels' time includes turning packed codes (w, and x for
wgrad) into panels. oneDNN gets dense channels_last operands. The calls are interleaved, the numbers are medians, in
10^9 multiply-adds a second: of processor time with one thread, which other programs disturb least. Before any time is
printed each integer result is compared with oneDNN's on the same dequantized operands. "Peak" is the measured rate of
fused multiply-adds in fp32, of a matrix product.

    python examples/benchmarks/cpu_conv.py [--shapes unet resnet thin] [--rounds 9] [--threads 1] [--bf16]

With `TE_NVFP4_CV_MACHINE=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2` in the environment the kernels, oneDNN
and torch's own loops use AVX2 only. MKL's matrix products, and so the peak, need `MKL_ENABLE_INSTRUCTIONS=AVX2` too.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from te_nvfp4_cv.backend import native  # noqa: E402
from te_nvfp4_cv.ops.conv import integer, vendor  # noqa: E402
from te_nvfp4_cv.ops.geometry import ConvGeometry, output_size  # noqa: E402
from te_nvfp4_cv.ops.quantize import operand  # noqa: E402
from te_nvfp4_cv.ops.records import (  # noqa: E402
    DEQUANTIZED,
    PACKED,
    RECORDS,
    Face,
    OperandSpec,
    WeightLayout,
    WeightSpec,
)

# (batch, image, channels in, channels out, kernel, stride)
SHAPES = {
    "unet": [
        (16, 64, 64, 64, 3, 1),
        (16, 32, 128, 128, 3, 1),
        (16, 16, 256, 256, 3, 1),
        (16, 8, 512, 512, 3, 1),
        (16, 64, 128, 64, 3, 1),
    ],
    "thin": [(16, 128, 16, 16, 3, 1), (16, 64, 32, 32, 3, 1), (16, 128, 32, 16, 3, 1)],
    "resnet": [
        (16, 24, 64, 64, 3, 1),
        (16, 24, 64, 256, 1, 1),
        (16, 24, 256, 64, 1, 1),
        (16, 24, 128, 128, 3, 2),
        (16, 12, 128, 512, 1, 1),
        (16, 12, 512, 1024, 1, 2),
        (16, 6, 256, 256, 3, 1),
        (16, 6, 1024, 256, 1, 1),
        (16, 3, 512, 512, 3, 1),
        (16, 3, 512, 2048, 1, 1),
    ],
}


def geometry_of(batch: int, size: int, c: int, o: int, kernel: int, stride: int) -> ConvGeometry:
    """Return the geometry of a square 2-D convolution with "same" padding."""
    padding = kernel // 2
    out = output_size(size, kernel, stride, padding, 1)
    two = ((n, n) for n in (size, out, kernel, stride, padding, 1, 0))
    return ConvGeometry(batch, c, o, *two, 1, False)  # type: ignore[call-arg, misc]


def calls(g: ConvGeometry, dtypes: list[torch.dtype]) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Return, for each product, the call of the integer kernels and oneDNN's in each dtype, on equal operands."""
    fold_x, fold_dy = g.folds
    x, dy = torch.randn(g.x_shape), torch.randn(g.y_shape)
    w = torch.randn(g.channels_b, g.channels_a, *g.kernel)
    spec, seed = OperandSpec(1, fold_x, RECORDS, PACKED, rht=True), torch.tensor([1])
    spec_dy = OperandSpec(1, fold_dy, RECORDS, RECORDS, rht=True, stochastic=True)
    w_q = operand.quantize_weight(w, WeightSpec(1, PACKED), torch.float32, "vendor")
    x_q = operand.quantize_operand(x, spec, torch.float32, None, None, "integer")
    dy_q = operand.quantize_operand(dy, spec_dy, torch.float32, seed, None, "integer")
    one, none = torch.ones(1), torch.empty(0, dtype=torch.uint8)
    made: dict[str, dict[str, Callable[[], Tensor]]] = {
        "fprop": {"integer": lambda: integer.fprop(x_q.row, w_q.row, one, None, g, torch.float32)},
        "dgrad": {"integer": lambda: integer.dgrad(dy_q.row, w_q.row, one, g, torch.float32)},
        "wgrad": {"integer": lambda: integer.wgrad(dy_q.col, x_q.col, one, g, torch.float32)},
    }
    layout = WeightLayout(g.channels_b, g.channels_a, 1, False)
    for dtype in dtypes:
        plain, plain_dy = spec._replace(row=DEQUANTIZED), spec_dy._replace(row=DEQUANTIZED, col=DEQUANTIZED)
        x_d = operand.quantize_operand(x, plain, dtype, None, None, "vendor")
        dy_d = operand.quantize_operand(dy, plain_dy, dtype, seed, None, "vendor")
        w_d = operand.unpack_weight(w_q.row, layout, None, dtype, "vendor")
        x_c = operand.unpack_columns(Face(*x_d.col), dtype, "vendor")
        # Copies, because the kernels' own buffers are used again.
        x_r, dy_r, dy_c, w_d, x_c = (
            Face(data.clone(), none) for data in (x_d.row.data, dy_d.row.data, dy_d.col.data, w_d, x_c)
        )
        name = str(dtype)[6:]
        made["fprop"][name] = lambda x=x_r, w=w_d, t=dtype: vendor.fprop(x, w, None, None, g, t)  # type: ignore[misc]
        made["dgrad"][name] = lambda dy=dy_r, w=w_d, t=dtype: vendor.dgrad(dy, w, None, g, t)  # type: ignore[misc]
        made["wgrad"][name] = lambda dy=dy_c, x=x_c, t=dtype: vendor.wgrad(dy, x, None, g, t)  # type: ignore[misc]
    return made


def peak(threads: int) -> float:
    """Return 10^9 multiply-adds a second of a large fp32 matrix product, the best of a few."""
    a, b, best = torch.randn(1024, 1024), torch.randn(1024, 1024), 0.0
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        best = max(best, 1024**3 / (time.perf_counter() - start) / 1e9)
    return best


def main() -> int:
    """Print a table; return exit status 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="time oneDNN in bf16, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    library = native.load()
    if library is None:
        print("no compiled kernels here, nothing to time")
        return 1
    dtypes = [torch.float32] + [torch.bfloat16] * options.bf16
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} threads")
    print(f"kernels: {library.nvfp4_machine().decode()}; peak of fp32: {peak(options.threads):.0f} GMAC/s")
    ratios: dict[str, list[float]] = {}
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    for shape in (shape for name in options.shapes for shape in SHAPES[name]):
        g = geometry_of(*shape)
        for product, variants in calls(g, dtypes).items():
            truth, ours = variants["float32"]().double(), variants["integer"]().double()
            if not ((ours - truth).abs().max() <= 1e-5 * truth.abs().max()):
                print(f"{shape} {product}: wrong result, no times printed")
                return 1
            times: dict[str, list[float]] = {name: [] for name in variants}
            for _ in range(options.rounds):
                for name, run in variants.items():
                    start = clock()
                    run()
                    times[name].append(clock() - start)
            median = {name: statistics.median(values) for name, values in times.items()}
            speeds = "  ".join(f"{name} {g.macs / value / 1e9:6.1f}" for name, value in median.items())
            ratio = median["float32"] / median["integer"]
            kind = "1x1" if g.taps == 1 else "3x3"
            ratios.setdefault(f"{kind} {product}", []).append(ratio)
            print(f"{shape!s:32} {product}  {speeds}  GMAC/s, {ratio:.2f} times fp32's speed", flush=True)
    for name, values in sorted(ratios.items()):
        print(f"{name}: median {statistics.median(values):.2f} times fp32, least {min(values):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
