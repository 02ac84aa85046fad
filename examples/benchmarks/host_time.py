"""Measure the host time of one NVFP4 convolution that is so small that its arithmetic takes almost no time.

Its forward and backward under nvfp4_autocast are interleaved with the same convolution in plain torch.

    python examples/benchmarks/host_time.py [--rounds 400] [--threads 1] [--json]

The convolution is 3x3, 16 -> 16 channels, on 16 images of 4x4 in fp32; both the images and the weight get gradients.
Each round runs each variant once, in turn, so that a slow moment of the machine affects both. The script prints medians
over the rounds, and their ratio, of the elapsed time and of this process's CPU time. On a machine with other work, the
elapsed time includes waiting for a core, and the longer variant waits more often: compare CPU times there. Before any
time is printed, the output and the gradients are compared with plain torch's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import te_nvfp4_cv as nv  # noqa: E402

WARM_UP = 5
SMALLEST_COSINE = 0.95


def variants() -> dict[str, Callable[[], list[Tensor]]]:
    """Return by name one step of each variant; a step returns the output and the gradients of images and weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 16, 4, 4, generator=generator).requires_grad_()
    w = nn.Parameter(torch.randn(16, 16, 3, 3, generator=generator) / 12)
    gradient = torch.randn(16, 16, 4, 4, generator=generator)
    recipe = nv.NVFP4BlockScaling()

    def plain() -> list[Tensor]:
        x.grad = w.grad = None
        y = F.conv2d(x, w, None, 1, 1)
        y.backward(gradient)
        assert x.grad is not None and w.grad is not None
        return [y.detach(), x.grad, w.grad]

    def quantized() -> list[Tensor]:
        x.grad = w.grad = None
        with nv.nvfp4_autocast(recipe):
            y = F.conv2d(x, w, None, 1, 1)
        y.backward(gradient)
        assert x.grad is not None and w.grad is not None
        return [y.detach(), x.grad, w.grad]

    return {"plain": plain, "nvfp4": quantized}


def problem(exact: list[Tensor], quantized: list[Tensor]) -> str:
    """Return what is wrong with the quantized results, or "" if they are what NVFP4 should give."""
    for name, a, b in zip(("y", "dx", "dw"), exact, quantized, strict=True):
        cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
        if not cosine > SMALLEST_COSINE:
            return f"{name} is wrong (cosine with plain torch {cosine:.3f})"
        if torch.equal(a, b):
            return f"{name} equals plain torch's: the layer did not run in NVFP4"
    return ""


def medians(steps: dict[str, Callable[[], list[Tensor]]], rounds: int) -> dict[str, tuple[float, float]]:
    """Return the median milliseconds of each step over interleaved rounds, elapsed time and CPU time."""
    passed: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            step()
            passed[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
    return {name: (statistics.median(passed[name]) * 1e3, statistics.median(cpu[name]) * 1e3) for name in steps}


def main(arguments: list[str] | None = None) -> int:
    """Print both medians and their ratio; return exit status 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    torch.set_num_threads(options.threads)
    steps = variants()
    for _ in range(WARM_UP):  # the first call also compiles
        results = {name: step() for name, step in steps.items()}
    wrong = problem(results["plain"], results["nvfp4"])
    if wrong:
        print(f"{wrong}: no times printed", file=sys.stderr)
        return 1
    median = medians(steps, options.rounds)
    (plain, plain_cpu), (ours, ours_cpu) = median["plain"], median["nvfp4"]
    if options.json:
        times = {"plain_ms": plain, "nvfp4_ms": ours, "ratio": ours / plain}
        cpu = {"plain_cpu_ms": plain_cpu, "nvfp4_cpu_ms": ours_cpu, "cpu_ratio": ours_cpu / plain_cpu}
        print(json.dumps({**times, **cpu}))
        return 0
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} threads, {options.rounds} rounds")
    for name, (value, cpu_value) in median.items():
        ratios = f"/ plain {value / plain:.2f}   CPU {cpu_value:7.3f} ms   / plain {cpu_value / plain_cpu:.2f}"
        print(f"{name:6} {value:7.3f} ms   {ratios}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
