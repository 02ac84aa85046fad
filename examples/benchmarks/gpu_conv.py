"""Time the three GEMMs of a convolution on a GPU, in cuDNN, in the vendor path and in Triton.

    python examples/benchmarks/gpu_conv.py [--layers "r50 256->256 k3 @14"] [--out results.jsonl]

cuDNN runs in bf16 and Triton on packed operands, and so do NVIDIA's libraries where the backend "cudnn" can run: its
1x1 layers are torch.nn.functional.scaled_mm. x and w are channels_last, and cuDNN picks its algorithm by measuring
(cudnn.benchmark). The vendor path is what a training step does apart from the norm and the activation: quantize x and
w, unpack w, fprop, quantize dy, unpack w and x, dgrad, wgrad. The tensor scale is "delayed" (no amax pass; the scales
of fprop and dgrad are multiplied into w). Before any time is printed, each layer's y, dx and dw of both backends are
compared with float64 convolutions of the dequantized operands on a sample of channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu import LAYERS, Layer, Results, Timer, copy_bandwidth, gemm_rate, need_cuda, parser, relative_error
from torch import Tensor

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.ops.conv import operators
from te_nvfp4_cv.ops.geometry import ConvGeometry, Fold
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.records import (
    DEQUANTIZED,
    PACKED,
    Face,
    Operand,
    OperandSpec,
    WeightCodes,
    WeightLayout,
    WeightSpec,
)

aten = torch.ops.aten
SCALE = 6.0 * 448 * 2.0**-8  # an amax whose decode scale is a power of two


def geometry(layer: Layer) -> ConvGeometry:
    """Describe the layer in the form that the operators need."""
    size, kernel, one = (layer.size,) * 2, (layer.kernel,) * 2, (1, 1)
    pad = (layer.kernel // 2,) * 2
    return ConvGeometry(layer.batch, layer.c_in, layer.c_out, size, size, kernel, one, pad, one, (0, 0), 1, False)


def plain(layer: Layer, x: Tensor, w: Tensor, dy: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Make the calls of cuDNN's three GEMMs on tensors [B, C, H, W] in channels_last memory."""
    pad, one = [layer.kernel // 2] * 2, [1, 1]

    def backward(mask: list[bool]) -> Callable[[], Tensor]:
        index = mask.index(True)
        return lambda: aten.convolution_backward(dy, x, w, None, one, pad, one, False, [0, 0], 1, mask)[index]

    return {
        "fprop": lambda: aten.convolution(x, w, None, one, pad, one, False, [0, 0], 1),
        "dgrad": backward([True, False, False]),
        "wgrad": backward([False, True, False]),
    }


class Path:
    """Run the parts of one backend's step on x [B, H, W, C], w [O, C, k, k], dy [B, P, Q, O]."""

    def __init__(self, layer: Layer, backend: str, x: Tensor, w: Tensor, dy: Tensor) -> None:
        self.backend, self.x, self.w, self.dy, self.layer = backend, x, w, dy, layer
        self.geometry = geometry(layer)
        self.form = DEQUANTIZED if backend == "vendor" else PACKED
        self.amax = torch.full((2,), SCALE, device=x.device)
        self.seed = torch.full((1,), 3, dtype=torch.int64, device=x.device)
        self.alpha = torch.ones(1, device=x.device)
        self.epilogue = None if backend == "vendor" else self.alpha  # the vendor path has the scales in the weight
        self.x_q, self.dy_q, self.w_q = self.quantize_x(), self.quantize_dy(), self.quantize_w()
        self.w_face, self.col = self.unpack_w(), self.unpack_x()

    def _operand(self, t: Tensor, row: int, col: int, stochastic: bool) -> Operand:
        spec = OperandSpec(1, Fold(1, 0, t.shape[1], 0, t.shape[0]), row, col, True, stochastic)
        seed = self.seed if stochastic else None
        return operand.quantize_operand(t, spec, torch.bfloat16, seed, self.amax, self.backend)

    def quantize_x(self) -> Operand:
        return self._operand(self.x, self.form, PACKED, False)

    def quantize_dy(self) -> Operand:
        return self._operand(self.dy, self.form, self.form, True)

    def quantize_w(self) -> WeightCodes:
        return operand.quantize_weight(self.w, WeightSpec(1, PACKED, pow2=True), torch.bfloat16, self.backend)

    def unpack_w(self) -> Face:
        face = self.w_q.row
        if self.form == PACKED:
            return face
        layout = WeightLayout(self.layer.c_out, self.layer.c_in, 1, False)
        values = operand.unpack_weight(face, layout, self.alpha, torch.bfloat16, self.backend)
        return Face(values, face.scale.new_empty(0))

    def unpack_x(self) -> Face:
        face = self.x_q.col
        if self.form == PACKED:
            return face
        return Face(operand.unpack_columns(face, torch.bfloat16, self.backend), face.scale.new_empty(0))

    def fprop(self) -> Tensor:
        args = (self.epilogue, None, self.geometry, torch.bfloat16, self.backend)
        return operators.conv_fprop(self.x_q.row, self.w_face, *args)

    def dgrad(self) -> Tensor:
        args = (self.epilogue, self.geometry, torch.bfloat16, self.backend)
        return operators.conv_dgrad(self.dy_q.row, self.w_face, *args)

    def wgrad(self) -> Tensor:
        return operators.conv_wgrad(self.dy_q.col, self.col, self.alpha, self.geometry, torch.float32, self.backend)

    def parts(self) -> dict[str, Callable[[], object]]:
        """Return the parts by name, without those that this backend does not have."""
        found: dict[str, Callable[[], object]] = {
            "quantize x": self.quantize_x,
            "quantize w": self.quantize_w,
            "quantize dy": self.quantize_dy,
        }
        if self.form == DEQUANTIZED:
            found |= {"unpack w": self.unpack_w, "unpack w for dgrad": self.unpack_w, "unpack x": self.unpack_x}
        return found | {"fprop": self.fprop, "dgrad": self.dgrad, "wgrad": self.wgrad}


def wrong(layer: Layer, path: Path, vendor: Path) -> str:
    """Check a backend's results and say what is wrong, or return "" if nothing is.

    They are compared with float64 results on the vendor path's dequantized operands (the self-test checks quantization
    itself), for 8 output channels of y and dw and 8 input channels of dx.
    """
    pad, few = layer.kernel // 2, 8
    x, dy = (t.movedim(-1, 1) for t in (vendor.x_q.row.data, vendor.dy_q.row.data))
    w = vendor.w_face.data.view(layer.c_out, layer.kernel, layer.kernel, layer.c_in).movedim(-1, 1)
    images = slice(-1, None)  # float64 convolutions are slow: the last image of y and dx
    y = torch.nn.functional.conv2d(x[images].double(), w[:few].double(), padding=pad)
    error = relative_error(path.fprop()[images, ..., :few].movedim(-1, 1), y)
    if not error < 6e-3:
        return f"fprop: relative error {error:.1e}"
    dx = torch.nn.functional.conv_transpose2d(dy[images].double(), w[:, :few].double(), padding=pad)
    # both paths draw the same random numbers, from one seed with the same kernels
    error = relative_error(path.dgrad()[images, ..., :few].movedim(-1, 1), dx)
    if not error < 6e-3:
        return f"dgrad: relative error {error:.1e}"
    x_col, dy_col = vendor.col.data, vendor.dy_q.col.data
    padded = torch.nn.functional.pad(x_col, (0, 0, pad, pad, pad, pad))
    size, dw = layer.size, path.wgrad()
    for tap in range(layer.kernel**2):  # one tap is a matrix product in fp32 of exact bf16 numbers
        r, s = divmod(tap, layer.kernel)
        rows = padded[:, r : r + size, s : s + size].reshape(-1, layer.c_in).double()
        truth = dy_col[..., :few].reshape(-1, few).double().t() @ rows
        error = relative_error(dw[:few, tap], truth)
        del rows
        if not error < 6e-3:
            return f"wgrad: relative error {error:.1e} (tap {tap})"
        if tap >= 1:  # a corner and an edge are enough
            break
    return ""


def runs(backend: str, device: torch.device) -> bool:
    """Return True if a backend can run here: "cudnn" needs a B200 and two packages; the others say what they miss."""
    if backend != "cudnn":
        return True
    try:
        return device.type == "cuda" and dispatch.resolve(backend, device) == backend
    except RuntimeError:
        return False


def main(arguments: list[str] | None = None) -> int:
    """Print a table per layer; return 1 if a result is wrong."""
    options_of = parser((__doc__ or "").splitlines()[0])
    names = [layer.name for layer in LAYERS]
    options_of.add_argument("--layers", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    kinds = ["vendor", "triton", "cudnn"]
    options_of.add_argument("--backends", nargs="+", choices=kinds, help="default: all that can run here")
    options = options_of.parse_args(arguments)
    device, results = need_cuda(), Results(options.out, "conv")
    backends = options.backends or [kind for kind in kinds if runs(kind, device)]
    results.machine(device)
    torch.backends.cudnn.benchmark = True
    timer, status = Timer(device, options.rounds), 0
    copy, gemm = copy_bandwidth(timer, device), gemm_rate(timer, device)
    print(f"copy of 2 GiB: {copy:.0f} GB/s; bf16 matrix product 8192^3: {gemm:.0f} TFLOP/s; tensor scale: delayed")
    results.add(copy_gb_s=copy, gemm_tflop_s=gemm)
    for layer in (layer for layer in LAYERS if layer.name in options.layers):
        torch.manual_seed(0)
        x = torch.randn(layer.batch, layer.size, layer.size, layer.c_in, device=device, dtype=torch.bfloat16)
        dy = torch.randn(layer.batch, layer.size, layer.size, layer.c_out, device=device, dtype=torch.bfloat16)
        w = torch.randn(layer.c_out, layer.c_in, layer.kernel, layer.kernel, device=device)
        w = w.to(memory_format=torch.channels_last)
        base: dict[str, float] = {}
        for name, run in plain(layer, x.movedim(-1, 1), w.bfloat16(), dy.movedim(-1, 1)).items():
            base[name] = timer.ms(run)
            _print(results, layer, "cudnn bf16", name, base[name], gemm)
        vendor = Path(layer, "vendor", x, w, dy)
        for backend in backends:
            path = vendor if backend == "vendor" else Path(layer, backend, x, w, dy)
            problem = wrong(layer, path, vendor)
            if problem:
                print(f"{layer.name}: {backend} is WRONG, no times printed: {problem}")
                results.add(layer=layer.name, path=backend, error=problem)
                status = 1
                continue
            times = {name: timer.ms(run) for name, run in path.parts().items()}
            for name, ms in times.items():
                _print(results, layer, backend, name, ms, gemm, base.get(name))
            ratio = sum(times.values()) / sum(base.values())
            print(f"{layer.name:<24}{backend:<12}whole step / cuDNN bf16: {ratio:.2f}")
            results.add(layer=layer.name, path=backend, step_ratio=ratio)
            del path
        del vendor, x, dy, w
    return status


def _print(
    results: Results, layer: Layer, path: str, part: str, ms: float, gemm: float, base: float | None = None
) -> None:
    rate = layer.flops / ms / 1e9 if part in ("fprop", "dgrad", "wgrad") else None
    shown = "" if rate is None else f"{rate:7.0f} TFLOP/s{rate / gemm:6.2f} of GEMM"
    shown += "" if base is None else f"{ms / base:6.2f} x cuDNN"
    print(f"{layer.name:<24}{path:<12}{part:<20}{1e3 * ms:9.1f} us{shown}")
    results.add(layer=layer.name, path=path, part=part, us=1e3 * ms, tflop_s=rate, of_cudnn=base and ms / base)


if __name__ == "__main__":
    raise SystemExit(main())
