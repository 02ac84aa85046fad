"""Time every quantization kernel on a GPU, with its GB/s and its share of the copy bandwidth of the same run.

    python examples/benchmarks/gpu_quantize.py [--layers "unet 64->64 k3 @256"] [--out results.jsonl]

x is bf16 channels-last, as in training. With "current" scales, the tensor scale comes from x's amax, which takes a
separate pass; with "delayed" scales it is given, and one pass does everything. GB/s count the bytes that the operation
must move: an input that is read twice counts twice. Before any time is printed, the self-test of the kernels runs, and
for each shape a region of the full-size result is compared with the reference, bit for bit (with stochastic rounding,
against the two neighbouring codes).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu import LAYERS, Layer, Results, Timer, copy_bandwidth, need_cuda, parser
from torch import Tensor

from te_nvfp4_cv import selftest
from te_nvfp4_cv.ops.geometry import Fold
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.records import DEQUANTIZED, NONE, PACKED, Operand, OperandSpec, WeightLayout, WeightSpec
from te_nvfp4_cv.selftest.setting import Setting

ROWS, PIXELS = 2, 5  # the region to compare: the last rows and pixels of the last images
TARGETS = {"x: row dq + column packed, RHT, delayed": 0.65, "dy: row dq + column dq, RHT, SR, delayed": 0.65}


def spec_of(x: Tensor, row: int = NONE, col: int = NONE, stochastic: bool = False) -> OperandSpec:
    """Return how x [B, H, W, C] is quantized, with RHT."""
    return OperandSpec(1, Fold(1, 0, x.shape[1], 0, x.shape[0]), row, col, True, stochastic)


def quantize(x: Tensor, row: int, col: int, stochastic: bool, amax: Tensor | None, backend: str) -> Operand:
    """Make both faces of x [B, H, W, C]."""
    seed = torch.full((1,), 11, dtype=torch.int64, device=x.device) if stochastic else None
    return operand.quantize_operand(x, spec_of(x, row, col, stochastic), torch.bfloat16, seed, amax, backend)


def region(x: Tensor) -> Tensor:
    """Return the last two rows and five pixels of the last 16 images, the far end of the tensor."""
    return x[-16:, -ROWS:, -PIXELS:].contiguous()


def wrong(x: Tensor, amax: Tensor) -> str:
    """Check the kernels' results for x and say what is wrong, or return "" if nothing is."""
    small, cpu = region(x).cpu(), amax.cpu()
    for row, col in ((DEQUANTIZED, PACKED), (PACKED, PACKED), (DEQUANTIZED, DEQUANTIZED)):
        ours = quantize(x, row, col, False, amax, "vendor")
        truth = quantize(small, row, col, False, cpu, "reference")
        names = ("row data", "row scale", "column data", "column scale")
        pairs = zip((*ours.row, *ours.col), (*truth.row, *truth.col), strict=True)
        for name, (mine, expected) in zip(names, pairs, strict=True):
            if not expected.numel():
                continue
            packed_column = name.startswith("column") and col == PACKED
            part = mine[-1:] if packed_column else mine[-16:]
            part = part[:, -ROWS:, -PIXELS:].cpu()
            if not torch.equal(part.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)):
                return f"{name} differs from the reference (forms {row}, {col})"
    nearest = quantize(x, DEQUANTIZED, DEQUANTIZED, False, amax, "vendor")
    stochastic = quantize(x, DEQUANTIZED, DEQUANTIZED, True, amax, "vendor")
    scale = quantize(x, PACKED, NONE, False, amax, "vendor").row.scale
    step = 2 * scale.view(torch.float8_e4m3fn).float().repeat_interleave(16, -1)
    if not bool(((stochastic.row.data.float() - nearest.row.data.float()).abs() <= step).all()):
        return "stochastic rounding moved a value by more than a step"
    if not bool(stochastic.col.data.isfinite().all()):
        return "stochastic rounding left a value of the columnwise face unwritten"
    measured = operand.measure_operand(x, spec_of(x), "vendor")
    if float(measured[0]) != float(x.abs().amax()):
        return "the measured amax is not x's"
    return ""


def jobs(x: Tensor, amax: Tensor) -> dict[str, tuple[float, Callable[[], object]]]:
    """Return the bytes per element and the call of each operation, by name."""

    def q(row: int, col: int, stochastic: bool, delayed: bool) -> Callable[[], object]:
        return lambda: quantize(x, row, col, stochastic, amax if delayed else None, "vendor")

    packed, wide = 0.5625, 2.0
    col = quantize(x, NONE, PACKED, False, amax, "vendor").col
    return {
        "amax of x and of its rotation": (2.0, lambda: operand.measure_operand(x, spec_of(x), "vendor")),
        "x: row dq + column packed, RHT, delayed": (2 + wide + packed, q(DEQUANTIZED, PACKED, False, True)),
        "x: row dq + column packed, RHT, current": (4 + wide + packed, q(DEQUANTIZED, PACKED, False, False)),
        "x: row packed + column packed, RHT, delayed": (2 + 2 * packed, q(PACKED, PACKED, False, True)),
        "dy: row dq + column dq, RHT, SR, delayed": (2 + 2 * wide, q(DEQUANTIZED, DEQUANTIZED, True, True)),
        "dy: row dq + column dq, RHT, SR, current": (4 + 2 * wide, q(DEQUANTIZED, DEQUANTIZED, True, False)),
        "dy: row packed + column packed, RHT, SR, delayed": (2 + 2 * packed, q(PACKED, PACKED, True, True)),
        "columns back to bf16": (packed + wide, lambda: operand.unpack_columns(col, torch.bfloat16, "vendor")),
    }


def weight_jobs(layer: Layer, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return the calls for the layer's fp32 weight, by name. Latency limits them, so only times are shown."""
    w = torch.randn(layer.c_out, layer.c_in, layer.kernel, layer.kernel, device=device)
    w = w.to(memory_format=torch.channels_last)
    spec, layout = WeightSpec(1, PACKED), WeightLayout(layer.c_out, layer.c_in, 1, False)
    row = operand.quantize_weight(w, spec, torch.bfloat16, "vendor").row
    return {
        "w: 16x16, packed": lambda: operand.quantize_weight(w, spec, torch.bfloat16, "vendor"),
        "w: packed to bf16": lambda: operand.unpack_weight(row, layout, None, torch.bfloat16, "vendor"),
    }


def main(arguments: list[str] | None = None) -> int:
    """Print a row per kernel and shape; return 1 if a result is wrong."""
    options_of = parser((__doc__ or "").splitlines()[0])
    names = [layer.name for layer in LAYERS]
    options_of.add_argument("--layers", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    options = options_of.parse_args(arguments)
    device, results = need_cuda(), Results(options.out, "quantize")
    results.machine(device)
    for check in selftest.QUANTIZATION:
        try:
            print(f"{check.__name__}: {check(Setting(device, 'vendor'))}")
        except Exception as failure:
            print(f"{check.__name__}: WRONG, no times printed: {failure}")
            results.add(check=check.__name__, error=str(failure))
            return 1
    timer, status = Timer(device, options.rounds), 0
    copy = copy_bandwidth(timer, device)
    print(f"copy of 2 GiB: {copy:.0f} GB/s")
    results.add(copy_gb_s=copy)
    for layer in (layer for layer in LAYERS if layer.name in options.layers):
        x = torch.randn(layer.batch, layer.size, layer.size, layer.c_in, device=device, dtype=torch.bfloat16)
        amax = torch.tensor([6.0 * 448 * 2.0**-8] * 2, device=device)
        problem = wrong(x, amax)
        if problem:
            print(f"{layer.name}: WRONG, no times printed: {problem}")
            results.add(layer=layer.name, error=problem)
            status = 1
            continue
        for name, (size, run) in jobs(x, amax).items():
            ms = timer.ms(run)
            rate = size * x.numel() / ms / 1e6
            target = f"  target {TARGETS[name]:.2f}" if name in TARGETS else ""
            print(f"{layer.name:<24}{name:<50}{1e3 * ms:8.1f} us{rate:7.0f} GB/s{rate / copy:6.2f} of copy{target}")
            fields = {"us": 1e3 * ms, "gb_s": rate, "of_copy": rate / copy, "elements": x.numel()}
            results.add(layer=layer.name, kernel=name, **fields)
        for name, run in weight_jobs(layer, device).items():
            ms = timer.ms(run)
            print(f"{layer.name:<24}{name:<50}{1e3 * ms:8.1f} us")
            results.add(layer=layer.name, kernel=name, us=1e3 * ms)
        del x
    return status


if __name__ == "__main__":
    raise SystemExit(main())
