"""A roofline estimate of what a network would take on a GPU that is not here. An estimate, never a measurement.

    time of a GEMM or pass = max(FLOPs / (efficiency * peak), bytes / (efficiency * bandwidth))

    bf16     fprop, dgrad and wgrad read their two operands and write their result once, in 2 bytes an element
    nvfp4    the same GEMMs on operands of 4.5 bits, at the FP4 rate where the GPU has one, at the bf16 rate where not
             (then they read dequantized operands, 2 bytes); plus the passes that quantize x, dy and w, which read 2
             (w: 4) bytes an element and write each face that training keeps

Convolutions and linear layers only: norms, activations, the optimizer and the host's launches are left out, in both
precisions alike, so that a real step gains less. Layers that the recipe leaves in high precision cost the same in both.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from te_nvfp4_cv.context import context_manager
from te_nvfp4_cv.errors import check_module, check_trainable, value_error
from te_nvfp4_cv.layer import delayed_scaling, observe
from te_nvfp4_cv.ops.geometry import BLOCK
from te_nvfp4_cv.recipe.block_scaling import as_recipe

PACKED = 0.5 + 1 / BLOCK  # bytes of an NVFP4 value
EFFICIENCY = 0.7  # of peak and of bandwidth, that tuned kernels reach


@dataclass(frozen=True)
class GPU:
    """Dense peaks in FLOP/s, bandwidth in bytes/s. fp4: 0 where there are no FP4 tensor cores.

    Source: NVIDIA's data sheets (half of the figures that count sparsity).
    """

    name: str
    bf16: float
    fp4: float
    bandwidth: float


GPUS = {
    "b200": GPU("B200", 2.25e15, 9.0e15, 8.0e12),
    "rtx5090": GPU("GeForce RTX 5090", 2.095e14, 1.676e15, 1.792e12),
    "h200": GPU("H200", 9.89e14, 0.0, 4.8e12),
}


@dataclass(frozen=True)
class Estimate:
    """One layer, all its calls. Times in seconds; `bound`: what limits the NVFP4 training GEMMs."""

    name: str
    op: str
    nvfp4: bool
    flops: float
    train_bf16: float
    train_nvfp4: float
    infer_bf16: float
    infer_nvfp4: float
    bound: str


@dataclass(frozen=True)
class Projection:
    """The estimates of a network, for one batch."""

    gpu: GPU
    batch: int
    layers: tuple[Estimate, ...]
    efficiency: float

    def total(self, field: str) -> float:
        """Sum over the layers, in seconds."""
        return float(sum(getattr(layer, field) for layer in self.layers))

    @property
    def assumptions(self) -> list[str]:
        """What the numbers rest on."""
        fp4 = f"{self.gpu.fp4 / 1e15:g} PFLOP/s FP4" if self.gpu.fp4 else "no FP4 tensor cores: bf16 products of codes"
        return [
            f"{self.gpu.name}: {self.gpu.bf16 / 1e12:g} TFLOP/s bf16, {fp4}, {self.gpu.bandwidth / 1e12:g} TB/s",
            f"{self.efficiency:.0%} of both peaks reached; each operand read and each result written once",
            "convolutions and linear layers only; no norms, activations, optimizer or launches",
        ]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; times in seconds."""
        fields = ("train_bf16", "train_nvfp4", "infer_bf16", "infer_nvfp4")
        return {
            "estimate": True,
            "gpu": asdict(self.gpu),
            "batch": self.batch,
            "assumptions": self.assumptions,
            **{name: self.total(name) for name in fields},
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        head = ("layer", "precision", "GFLOP", "train bf16, ms", "nvfp4", "infer bf16, ms", "nvfp4", "bound by")
        cells: list[tuple[str, ...]] = [head]
        for row in self.layers:
            times = (row.train_bf16, row.train_nvfp4, row.infer_bf16, row.infer_nvfp4)
            precision = "nvfp4" if row.nvfp4 else "high"
            cells.append((row.name, precision, f"{row.flops / 1e9:.2f}", *(f"{t * 1e3:.4f}" for t in times), row.bound))
        widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
        lines = [f"ESTIMATE for {self.gpu.name}, batch {self.batch}. Assumptions:"]
        lines += [f"  {text}" for text in self.assumptions]
        for line in cells:
            shown = [c.ljust(w) if n < 2 else c.rjust(w) for n, (c, w) in enumerate(zip(line, widths, strict=True))]
            lines.append("  ".join(shown).rstrip())
        for what, a, b in (("training", "train_bf16", "train_nvfp4"), ("inference", "infer_bf16", "infer_nvfp4")):
            bf16, nvfp4 = self.total(a), self.total(b)
            ratio = f"{bf16 / nvfp4:.2f}x" if nvfp4 else "nothing to run"
            lines.append(f"{what}: bf16 {bf16 * 1e3:.3f} ms, nvfp4 {nvfp4 * 1e3:.3f} ms (estimate: {ratio})")
        return "\n".join(lines)


def project(
    model: nn.Module,
    *inputs: Any,
    gpu: str = "b200",
    batch: int = 32,
    recipe: Any = None,
    efficiency: float = EFFICIENCY,
) -> Projection:
    """Estimate training and inference time of a network.

    Args:
        inputs: of one forward pass, which runs here once; one image is enough.
        gpu: "b200", "rtx5090" or "h200"; batch: images a step.
        efficiency: share of peak and bandwidth that kernels reach, in (0, 1].
    Raises:
        TypeError: no module; ValueError: another GPU, a number out of range.
    """
    check_module("project", model, "project(model, *inputs)")
    check_trainable("project", model)
    if gpu not in GPUS or batch < 1 or not 0 < efficiency <= 1:
        raise value_error(
            "project: an argument is out of range.",
            got=f"gpu={gpu!r}, batch={batch}, efficiency={efficiency}",
            needs=f"a GPU of {', '.join(GPUS)}; batch >= 1; efficiency in (0, 1]",
            fix="project(model, image, gpu='b200', batch=32)",
        )
    resolved = as_recipe(recipe)
    names = {id(p): "" if name == "weight" else name.removesuffix(".weight") for name, p in model.named_parameters()}
    found: dict[str, list[Estimate]] = {}

    def observer(call: observe.Call) -> observe.Seen:
        def finished(y: torch.Tensor) -> None:
            name = names.get(id(call.weight), "(no parameter)")
            sizes = _sizes(call, y, batch / _batch(inputs))
            found.setdefault(name, []).append(_estimate(name, call, sizes, GPUS[gpu], efficiency))

        return observe.Seen(finished=finished)

    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        context = context_manager.nvfp4_autocast(resolved)
        with torch.no_grad(), delayed_scaling.reading_only(), context, observe.observe(observer):
            model(*inputs)
    finally:
        for module, flag in training:
            module.training = flag
    return Projection(GPUS[gpu], batch, tuple(_sum(rows) for rows in found.values()), efficiency)


def _batch(inputs: tuple[Any, ...]) -> int:
    return next((int(x.shape[0]) for x in inputs if isinstance(x, torch.Tensor) and x.dim()), 1)


def _sum(rows: list[Estimate]) -> Estimate:
    times = ("flops", "train_bf16", "train_nvfp4", "infer_bf16", "infer_nvfp4")
    return replace(rows[0], **{name: sum(getattr(row, name) for row in rows) for name in times})


@dataclass(frozen=True)
class _Sizes:
    """Elements of x, w and y, and multiply-adds of one GEMM."""

    x: float
    w: float
    y: float
    macs: float


def _sizes(call: observe.Call, y: torch.Tensor, images: float) -> _Sizes:
    """Of one call; `images`: how many times as many images the step has."""
    x, w = call.x.numel() * images, float(call.weight.numel())
    per_pixel = w / call.weight.shape[0]  # weights that an output pixel, transposed an input one, meets per channel
    pixels = x if "transpose" in call.op else y.numel() * images
    return _Sizes(x, w, y.numel() * images, pixels * per_pixel)


def _estimate(name: str, call: observe.Call, sizes: _Sizes, gpu: GPU, efficiency: float) -> Estimate:
    x, w, y = sizes.x, sizes.w, sizes.y
    flops, bandwidth, bf16 = 2 * sizes.macs, gpu.bandwidth * efficiency, gpu.bf16 * efficiency

    def gemm(peak: float, read: float, written: float) -> float:
        return max(flops / peak, (read + 2 * written) / bandwidth)

    operands = ((x, w, y), (y, w, x), (y, x, w))  # of fprop, dgrad and wgrad: two that are read, one that is written
    plain = [gemm(bf16, 2 * (a + b), c) for a, b, c in operands]
    recipe = call.recipe if call.reason == "" else None
    if recipe is None:
        return Estimate(name, call.op, False, flops, sum(plain), sum(plain), plain[0], plain[0], "")
    peak, size = (gpu.fp4 * efficiency, PACKED) if gpu.fp4 else (bf16, 2.0)
    times, compute = [], 0
    for kind, usual, (a, b, c) in zip(("fprop", "dgrad", "wgrad"), plain, operands, strict=True):
        in_nvfp4 = kind in recipe.nvfp4_gemms
        times.append(gemm(peak, size * (a + b), c) if in_nvfp4 else usual)
        compute += in_nvfp4 and flops / peak >= (size * (a + b) + 2 * c) / bandwidth

    def of(kind: str, face: float) -> float:
        return face if kind in recipe.nvfp4_gemms else 0.0

    def one_pass(read: float, faces: float) -> float:
        return read + faces if faces else 0.0  # bytes a value; an operand that no GEMM takes in NVFP4 is left alone

    of_x = one_pass(
        2, of("fprop", size) + of("wgrad", PACKED)
    )  # the face that is used now, the packed one that is kept
    of_w = one_pass(4, max(of("fprop", PACKED), of("dgrad", PACKED)))
    of_dy = one_pass(2, of("dgrad", size) + of("wgrad", size))
    passes = (of_x * x + of_w * w + of_dy * y) / bandwidth
    at_inference = one_pass(2, of("fprop", size)) * x / bandwidth  # weights are quantized already
    bound = "compute" if compute == len(recipe.nvfp4_gemms) else "memory" if not compute else "both"
    return Estimate(
        name, call.op, True, flops, sum(plain), sum(times) + passes, plain[0], times[0] + at_inference, bound
    )
