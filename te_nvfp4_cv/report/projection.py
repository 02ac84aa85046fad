"""Estimate by roofline what a network would take on a GPU that is not here: an estimate, never a measurement.

    time of a GEMM or pass = max(FLOPs / (efficiency * peak), bytes / (efficiency * bandwidth))

    bf16     fprop, dgrad and wgrad read their two operands and write their result once, in 2 bytes an element
    nvfp4    the same GEMMs on operands of 4.5 bits, at the GPU's FP4 rate; without FP4 tensor cores at its bf16 rate,
             on dequantized operands of 2 bytes. Added are the passes that quantize x, dy and w: they read 2 bytes an
             element (w: 4) and write what the GEMMs read and backward saves

Only convolutions and linear layers count. Norms, activations, the optimizer and the host's launches are left out in
both precisions alike, so a real step gains less. Layers that the recipe leaves in high precision cost the same in both.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from te_nvfp4_cv.context.context_manager import nvfp4_autocast
from te_nvfp4_cv.errors import check_module, check_trainable, value_error
from te_nvfp4_cv.layer import delayed_scaling, observe
from te_nvfp4_cv.nn.walk import named_modules
from te_nvfp4_cv.ops.geometry import BLOCK
from te_nvfp4_cv.recipe.block_scaling import as_recipe
from te_nvfp4_cv.report.forward_pass import gemm_flops, running, untouched
from te_nvfp4_cv.report.text import aligned

PACKED = 0.5 + 1 / BLOCK  # bytes of an NVFP4 value
EFFICIENCY = 0.7  # the share of peak and of bandwidth that tuned kernels reach
TIMES = ("train_bf16", "train_nvfp4", "infer_bf16", "infer_nvfp4")


@dataclass(frozen=True)
class GPU:
    """A GPU's dense peaks in FLOP/s (fp4 is 0 without FP4 tensor cores), and its bandwidth in bytes/s.

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
    """The estimate of one layer, all its calls in one precision together.

    Times are in seconds. `bound` is what limits the NVFP4 GEMMs of training:
    "compute", "memory", or "both" if GEMMs differ; "" for a layer in high precision.
    """

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
        """Sum a field of Estimate over the layers."""
        return float(sum(getattr(layer, field) for layer in self.layers))

    @property
    def assumptions(self) -> list[str]:
        """Return what the numbers rest on, as sentences."""
        fp4 = f"{self.gpu.fp4 / 1e15:g} PFLOP/s FP4" if self.gpu.fp4 else "no FP4 tensor cores: bf16 products of codes"
        return [
            f"{self.gpu.name}: {self.gpu.bf16 / 1e12:g} TFLOP/s bf16, {fp4}, {self.gpu.bandwidth / 1e12:g} TB/s",
            f"{self.efficiency:.0%} of both peaks reached; each operand read and each result written once",
            "convolutions and linear layers only; no norms, activations, optimizer or launches",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the estimates as dicts, lists, strings and numbers, with times in seconds."""
        return {
            "estimate": True,
            "gpu": asdict(self.gpu),
            "batch": self.batch,
            "assumptions": self.assumptions,
            **{name: self.total(name) for name in TIMES},
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        head = ("layer", "precision", "GFLOP a GEMM", "train bf16, ms", "nvfp4", "infer bf16, ms", "nvfp4", "bound by")
        cells: list[tuple[str, ...]] = [head]
        for row in self.layers:
            times = (f"{getattr(row, name) * 1e3:.4f}" for name in TIMES)
            precision = "nvfp4" if row.nvfp4 else "high"
            cells.append((row.name, precision, f"{row.flops / 1e9:.2f}", *times, row.bound))
        lines = [f"ESTIMATE for {self.gpu.name}, batch {self.batch}. Assumptions:"]
        lines += [f"  {text}" for text in self.assumptions]
        lines += aligned(cells, left=2)
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
    """Estimate training and inference time of a network. The model is left unchanged.

    Args:
        inputs: arguments of the model, which runs here once in evaluation mode; one image is enough.
        gpu: "b200", "rtx5090" or "h200".
        batch: images in a step.
        recipe: a recipe, or its name or path; if None, the default recipe.
        efficiency: share of peak and bandwidth that kernels reach, above 0 and at most 1.
    Raises:
        TypeError: `model` is not a module.
        ValueError: another GPU, or a number out of range.
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
    # By the weight; of one that is computed, by the module that is running.
    names = {id(p): "" if name == "weight" else name.removesuffix(".weight") for name, p in model.named_parameters()}
    modules = {m: name for name, m in named_modules(model) if not isinstance(m, torch.jit.ScriptModule)}
    found: dict[tuple[str, bool], list[Estimate]] = {}

    def observer(call: observe.Call) -> observe.Seen:
        own = (names[id(w)] for w in (call.weight, call.weight._base) if id(w) in names)  # of a part of one, the whole
        name = next(own, modules.get(stack[-1], "") if stack else "(no parameter)")

        def finished(y: torch.Tensor) -> None:
            images = batch / _batch(inputs)  # how many times as many as the call has
            row = _estimate(name, call, y, images, GPUS[gpu], efficiency)
            found.setdefault((name, row.nvfp4), []).append(row)

        return observe.Seen(finished=finished)

    with (
        untouched(model), delayed_scaling.reading_only(), running(modules) as stack,
        nvfp4_autocast(resolved), observe.observe(observer),
    ):  # fmt: skip
        model.eval()  # `untouched` puts the flags back
        with torch.no_grad():
            model(*inputs)
    return Projection(GPUS[gpu], batch, tuple(_sum(rows) for rows in found.values()), efficiency)


def _batch(inputs: tuple[Any, ...]) -> int:
    return next((int(x.shape[0]) for x in inputs if isinstance(x, torch.Tensor) and x.dim()), 1)


def _sum(rows: list[Estimate]) -> Estimate:
    # The calls of one layer in one precision: name and op are those of the first.
    return replace(rows[0], **{name: sum(getattr(row, name) for row in rows) for name in ("flops", *TIMES)})


def _estimate(
    name: str, call: observe.Call, result: torch.Tensor, images: float, gpu: GPU, efficiency: float
) -> Estimate:
    """Estimate one call for a step with `images` times as many images as the call has."""
    x, w, y = call.x.numel() * images, float(call.weight.numel()), result.numel() * images
    flops = images * gemm_flops(call.op, call.x, call.weight.shape, result)
    bandwidth, bf16 = gpu.bandwidth * efficiency, gpu.bf16 * efficiency

    def gemm(peak: float, read: float, written: float) -> float:
        return max(flops / peak, (read + 2 * written) / bandwidth)  # results are bf16, 2 bytes

    # fprop, dgrad and wgrad: two operands that are read, and the result that is written
    operands = ((x, w, y), (y, w, x), (y, x, w))
    plain = [gemm(bf16, 2 * (a + b), c) for a, b, c in operands]
    recipe = call.recipe if call.reason == "" else None
    if recipe is None:
        return Estimate(name, call.op, False, flops, sum(plain), sum(plain), plain[0], plain[0], "")
    # Without FP4 tensor cores the quantization pass writes dequantized bf16 operands, and the GEMMs read those.
    peak, size = (gpu.fp4 * efficiency, PACKED) if gpu.fp4 else (bf16, 2.0)
    times, compute = [], 0
    for kind, usual, (a, b, c) in zip(("fprop", "dgrad", "wgrad"), plain, operands, strict=True):
        in_nvfp4 = kind in recipe.nvfp4_gemms
        times.append(gemm(peak, size * (a + b), c) if in_nvfp4 else usual)
        compute += in_nvfp4 and flops / peak >= (size * (a + b) + 2 * c) / bandwidth

    def written_for(kind: str, face: float) -> float:
        return face if kind in recipe.nvfp4_gemms else 0.0

    def bytes_of_pass(read: float, written: float) -> float:
        return read + written if written else 0.0  # an operand that no GEMM takes in NVFP4 is not quantized

    # Of x, fprop's face is used at once, and wgrad's is saved for backward, packed whatever the GPU.
    for_x = bytes_of_pass(2, written_for("fprop", size) + written_for("wgrad", PACKED))
    # max, not a sum: with 16x16 blocks fprop and dgrad read one copy.
    for_w = bytes_of_pass(4, max(written_for("fprop", PACKED), written_for("dgrad", PACKED)))
    for_dy = bytes_of_pass(2, written_for("dgrad", size) + written_for("wgrad", size))
    passes = (for_x * x + for_w * w + for_dy * y) / bandwidth
    at_inference = bytes_of_pass(2, written_for("fprop", size)) * x / bandwidth  # weights are quantized already
    bound = "compute" if compute == len(recipe.nvfp4_gemms) else "memory" if not compute else "both"
    return Estimate(
        name, call.op, True, flops, sum(plain), sum(times) + passes, plain[0], times[0] + at_inference, bound
    )
