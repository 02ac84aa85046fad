"""Time the quantization of one activation on a CPU.

The compiled kernels are compared with the plain torch reference, and with torch.compile of that reference. A
channels_last bf16 activation is quantized rowwise (decoded to bf16, for the convolution) and columnwise with RHT
(packed, saved for backward) in one call; so is a gradient with stochastic rounding. Times are printed only after every
output has been compared bit for bit.

    python examples/benchmarks/cpu_quantize.py [--shape 64 64 64 64] [--rounds 7] [--threads 2] [--inductor]
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

from te_nvfp4_cv import formats  # noqa: E402
from te_nvfp4_cv.ops.geometry import Fold  # noqa: E402
from te_nvfp4_cv.ops.quantize import operand, reference_matrix  # noqa: E402
from te_nvfp4_cv.ops.records import DEQUANTIZED, PACKED, Operand, OperandSpec  # noqa: E402


def spec_of(x: Tensor, stochastic: bool) -> OperandSpec:
    """Return how a training step quantizes x [B, H, W, C]: a gradient's columnwise face is multiplied at once."""
    col = DEQUANTIZED if stochastic else PACKED
    return OperandSpec(1, Fold(1, 0, x.shape[1], 0, x.shape[0]), DEQUANTIZED, col, True, stochastic)


def quantize(x: Tensor, stochastic: bool, backend: str, amax: Tensor | None = None) -> Operand:
    """Make both faces of x [B, H, W, C]; `amax` [2] is that of the step before ("delayed")."""
    seed = torch.tensor([7]) if stochastic else None
    return operand.quantize_operand(x, spec_of(x, stochastic), torch.bfloat16, seed, amax, backend)


def same(a: Operand, b: Operand) -> bool:
    """Return True if two results have the same bits."""
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a.flat(), b.flat(), strict=True))


def median_ms(function: Callable[[], object], rounds: int) -> float:
    """Return the median time of a call, after one call that is not counted."""
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main() -> int:
    """Print a row per operand; return exit status 1 if the kernels' bits differ from the reference's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs=4, type=int, default=[64, 64, 64, 64], metavar=("B", "C", "H", "W"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--inductor", action="store_true", help="also time torch.compile of the reference")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batch, channels, height, width = options.shape
    x = torch.randn(batch, height, width, channels).bfloat16()
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} threads, shape {options.shape} bf16")
    for name, stochastic in (("activation, nearest", False), ("gradient, stochastic", True)):
        if not same(quantize(x, stochastic, "reference"), quantize(x, stochastic, "vendor")):
            print(f"{name}: bits differ from the reference, no times printed")
            return 1
        amax = operand.measure_operand(x, spec_of(x, stochastic), "vendor")
        amax = formats.power_of_two_amax(amax, margin=4 if stochastic else 8)
        if not same(quantize(x, stochastic, "reference", amax), quantize(x, stochastic, "vendor", amax)):
            print(f"{name}: bits differ from the reference with a given amax, no times printed")
            return 1
        eager = median_ms(lambda s=stochastic: quantize(x, s, "reference"), 2)  # type: ignore[misc]
        fused = median_ms(lambda s=stochastic: quantize(x, s, "vendor"), options.rounds)  # type: ignore[misc]
        delayed = median_ms(lambda s=stochastic, a=amax: quantize(x, s, "vendor", a), options.rounds)  # type: ignore[misc]
        row = f"reference {eager:8.1f} ms   compiled {fused:6.1f} ms   {eager / fused:6.1f}x"
        print(f"{name:22} {row}   {x.numel() / fused / 1e6:.2f} G elements/s   delayed {delayed:.1f} ms")
    if options.inductor:
        x_MC = x.movedim(0, -2).reshape(-1, channels).contiguous()
        total = 0.0
        for face in ({"rowwise": True}, {"rowwise": False, "columnwise": True, "rht": True}):
            compiled = torch.compile(lambda v, f=face: reference_matrix.quantize_2d(v, **f), fullgraph=True)  # type: ignore[misc]
            total += median_ms(lambda c=compiled: c(x_MC), options.rounds)  # type: ignore[misc]
        print(f"{'activation, nearest':22} torch.compile of the reference, row- and columnwise: {total:.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
