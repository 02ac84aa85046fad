"""Time a training step on a GPU and measure its peak memory, in NVFP4 and in bf16.

    python examples/benchmarks/gpu_step.py [--models unet resnet50 unet-silu] [--out results.jsonl]

A step is forward, loss and backward under torch.autocast(bfloat16), without an optimizer, on channels_last models;
gradients are written in place. Times are medians of interleaved rounds. The models are unet (base 64, 256x256, batch
32, GroupNorm + ReLU), unet-silu (the same with SiLU) and resnet50 (224x224, batch 128). The name of a variant lists its
parts: backend, tensor scale, "fused" after nv.fuse, "graph" as a CUDA graph. Before any time is printed, the gradients
of each variant are compared with bf16's. Peak memory is measured in eager mode, one variant at a time, in excess of
model and images; it is given as a ratio to bf16's. --profile writes the kernels of one NVFP4 step, longest first.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu import Results, capture, need_cuda, parser, positive
from torch import Tensor, nn
from unet_coco.unet import UNet

import te_nvfp4_cv as nv


@dataclass(frozen=True)
class Variant:
    """Describe one way to run the step."""

    name: str
    recipe: nv.NVFP4BlockScaling | None = None
    backend: str = "auto"
    fused: bool = False
    graph: bool = False


def variants(graphs: bool, triton: bool) -> list[Variant]:
    """Return the variants. bf16 comes first, because the others are compared with it."""
    current, delayed, pow2 = (nv.NVFP4BlockScaling(tensor_scale=s) for s in ("current", "delayed", "current_pow2"))
    found = [
        Variant("bf16"),
        Variant("bf16 fused", fused=True),
        Variant("vendor current", current, "vendor"),
        Variant("vendor current_pow2", pow2, "vendor"),
        Variant("vendor delayed", delayed, "vendor"),
        Variant("vendor delayed fused", delayed, "vendor", fused=True),
    ]
    if triton:
        found += [Variant("triton delayed", delayed, "triton")]
    if graphs:
        found += [
            Variant(f"{variant.name} graph", variant.recipe, variant.backend, variant.fused, True)
            for variant in found
            if variant.name != "vendor current"
        ]
    return found


def build(name: str, device: torch.device, batch: int | None, size: int | None) -> tuple[nn.Module, Tensor, Tensor]:
    """Build a model, images and a target, in channels_last."""
    torch.manual_seed(0)
    if name == "resnet50":
        from _torchvision import ensure_torchvision

        ensure_torchvision()
        import torchvision

        model, batch, size, classes = torchvision.models.resnet50(), batch or 128, size or 224, 1000
        target = torch.randint(classes, (batch,))
    else:
        activation = "silu" if name.endswith("silu") else "relu"
        model, batch, size = UNet(21, scale=1.0, activation=activation, dropout=0.0), batch or 32, size or 256
        target = torch.randint(21, (batch, size, size))
    images = torch.randn(batch, 3, size, size)
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, images.to(device, memory_format=torch.channels_last), target.to(device)


class Step:
    """Run a variant's training step on a separate copy of the model."""

    def __init__(self, variant: Variant, model: nn.Module, images: Tensor, target: Tensor) -> None:
        self.variant, self.images, self.target = variant, images, target
        # A copy for each variant: nv.fuse rewrites the model, and delayed scales are kept per weight.
        self.model = copy.deepcopy(model)
        if variant.fused:
            nv.fuse(self.model)
        self.loss = torch.zeros((), device=images.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def eager(self) -> None:
        """Run forward, loss and backward once, with gradients that start from zero."""
        for p in self.model.parameters():
            p.grad = None
        variant = self.variant
        context: Any = contextlib.nullcontext()
        if variant.recipe is not None:
            context = nv.nvfp4_autocast(variant.recipe, backend=variant.backend)
        with torch.autocast(self.images.device.type, torch.bfloat16), context:
            logits = self.model(self.images)
        loss = F.cross_entropy(logits.float(), self.target)
        loss.backward()
        self.loss = loss.detach()

    def capture(self) -> None:
        """Capture the step as a CUDA graph, which later calls replay."""
        self.graph = capture(self.eager)

    def __call__(self) -> None:
        if self.graph is None:
            self.eager()
        else:
            self.graph.replay()

    def gradients(self) -> Tensor:
        """Return all gradients as one vector."""
        return torch.cat([p.grad.flatten().float() for p in self.model.parameters() if p.grad is not None])


def peak(step: Step) -> int:
    """Measure the bytes that a step needs in addition to model, images and gradients, by the allocator's peak."""
    step()  # after this step, gradients, plans and states exist
    torch.cuda.synchronize()
    gc.collect()
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in step.model.parameters() if p.grad is not None)
    for p in step.model.parameters():
        p.grad = None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - gradients


def wall_ms(run: Callable[[], object], repeats: int) -> float:
    """Return the milliseconds of a call, by the host's clock over `repeats` calls in a row.

    Gaps between kernel launches count, as in training.
    """
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / repeats


def measure(name: str, options: Any, device: torch.device, results: Results) -> int:
    """Measure all variants of one model; return 1 if a gradient is wrong."""
    model, images, target = build(name, device, options.batch, options.size)
    steps: dict[str, Step] = {}
    truth, memory, status = torch.empty(0), {}, 0
    for variant in variants(not options.no_graphs, not options.no_triton):
        step = Step(variant, model, images, target)
        try:
            if variant.graph:
                step.capture()
            else:
                memory[variant.name] = peak(step)
            step()
            step()
        except Exception as failure:  # one variant that cannot run must not cost the others their times
            print(f"{name}: {variant.name}: {type(failure).__name__}: {str(failure)[:600]}", flush=True)
            results.add(model=name, variant=variant.name, error=f"{type(failure).__name__}: {str(failure)[:600]}")
            status = 1
            continue
        grads = step.gradients()
        if variant.name == "bf16":
            truth = grads
        cosine = float(F.cosine_similarity(grads, truth, dim=0))
        if not (cosine > 0.8 and bool(grads.isfinite().all())):
            print(f"{name}: {variant.name}: gradients are WRONG (cosine with bf16 {cosine:.3f}): no times", flush=True)
            results.add(model=name, variant=variant.name, error=f"cosine with bf16 {cosine:.3f}")
            status = 1
            continue
        first = wall_ms(step, options.repeats)  # recorded in case the run is stopped before the interleaved rounds
        text = (
            f"loss {float(step.loss):.4f}, cosine of gradients with bf16 {cosine:.4f}, not interleaved {first:.2f} ms"
        )
        print(f"{name}: {variant.name}: {text}", flush=True)
        results.add(model=name, variant=variant.name, cosine=cosine, not_interleaved_ms=first)
        steps[variant.name] = step
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for _ in range(options.rounds):
        for variant, step in steps.items():
            times[variant].append(wall_ms(step, options.repeats))
    medians = {variant: statistics.median(values) for variant, values in times.items()}
    for variant, ms in medians.items():
        base = medians.get("bf16 graph" if variant.endswith("graph") else "bf16", float("nan"))
        fields = {"ms": ms, "ratio": ms / base}
        text = f"{name:<12}{variant:<28}{ms:9.2f} ms  / bf16 {ms / base:.3f}"
        if variant in memory:
            fields |= {"peak_bytes": memory[variant], "peak_ratio": memory[variant] / memory["bf16"]}
            text += f"   peak {memory[variant] / 2**20:8.0f} MiB  / bf16 {fields['peak_ratio']:.3f}"
        print(text, flush=True)
        results.add(model=name, variant=variant, **fields)
    if options.profile is not None:
        chosen = "vendor delayed" if "vendor delayed" in steps else next(iter(steps))
        write_profile(steps[chosen], options.profile, f"{name}, {chosen}")
    return status


def write_profile(step: Step, path: Path, title: str) -> None:
    """Profile one step with torch.profiler and append its kernels to a text file, longest first."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=70)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{title}\n{table}\n")


def main(arguments: list[str] | None = None) -> int:
    """Print a table per model; return 1 if a variant does not run or computes wrong gradients."""
    options_of = parser((__doc__ or "").splitlines()[0])
    options_of.set_defaults(rounds=9)
    names = ["unet", "resnet50", "unet-silu"]
    options_of.add_argument("--models", nargs="+", default=names, choices=names)
    options_of.add_argument("--batch", type=positive, help="batch size, instead of 32 (unet) and 128 (resnet50)")
    options_of.add_argument("--size", type=positive, help="image side, instead of 256 (unet) and 224 (resnet50)")
    options_of.add_argument("--repeats", type=positive, default=3, help="steps timed in a row (default: 3)")
    options_of.add_argument("--no-graphs", action="store_true", help="no CUDA graphs")
    options_of.add_argument("--no-triton", action="store_true", help="leave out the implicit GEMM on packed operands")
    options_of.add_argument("--profile", type=Path, help="append a table of the kernels of a step to this file")
    options = options_of.parse_args(arguments)
    device, results = need_cuda(), Results(options.out, "step")
    results.machine(device)
    torch.backends.cudnn.benchmark = True
    print(
        f"medians of {options.rounds} interleaved rounds of {options.repeats} steps; ratios to bf16 (graph: its graph)"
    )
    status = 0
    for name in options.models:
        status |= measure(name, options, device, results)
        gc.collect()
        torch.cuda.empty_cache()
    return status


if __name__ == "__main__":
    raise SystemExit(main())
