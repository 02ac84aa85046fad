"""Provide what all GPU benchmarks need: the device, timing, the machine's ceilings, shapes, and result lines.

A time is the median over replays of a CUDA graph of the call. The L2 cache is overwritten before each replay, so that
neither Python nor a warm cache is measured. Bandwidth counts bytes read plus bytes written. The two ceilings, a large
copy and a large bf16 matrix product, are measured in the same run. Every benchmark checks its results first and prints
no time for a wrong result. Without a CUDA device it says so and exits with status 2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from te_nvfp4_cv.backend import cache  # noqa: E402


@dataclass(frozen=True)
class Layer:
    """Describe a convolution of a known network: x [B, C, S, S], w [O, C, k, k], stride 1, padding k // 2."""

    name: str
    batch: int
    c_in: int
    c_out: int
    kernel: int
    size: int

    @property
    def flops(self) -> int:
        """Return the FLOPs of one of the three GEMMs."""
        return 2 * self.batch * self.size**2 * self.c_in * self.c_out * self.kernel**2


LAYERS = (
    Layer("unet 64->64 k3 @256", 32, 64, 64, 3, 256),
    Layer("unet 128->128 k3 @128", 32, 128, 128, 3, 128),
    Layer("unet 256->256 k3 @64", 32, 256, 256, 3, 64),
    Layer("unet 512->512 k3 @32", 32, 512, 512, 3, 32),
    Layer("unet 1024->1024 k3 @16", 32, 1024, 1024, 3, 16),
    Layer("r50 64->64 k1 @56", 128, 64, 64, 1, 56),
    Layer("r50 256->64 k1 @56", 128, 256, 64, 1, 56),
    Layer("r50 1024->256 k1 @14", 128, 1024, 256, 1, 14),
    Layer("r50 256->256 k3 @14", 128, 256, 256, 3, 14),
)


def need_cuda() -> torch.device:
    """Return the GPU, or exit with status 2 if there is none."""
    if not torch.cuda.is_available():
        print("needs a CUDA device: torch sees none here, so there is nothing to measure", file=sys.stderr)
        raise SystemExit(2)
    return torch.device("cuda", torch.cuda.current_device())


def parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with the options that all GPU benchmarks have."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--out", type=Path, help="append results to this file, one JSON object per line")
    found.add_argument("--rounds", type=positive, default=15, help="timed repetitions (default: 15)")
    return found


def positive(text: str) -> int:
    """Parse an argument that must be at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


class Results:
    """Write result lines. Each is appended and flushed at once, so that an interrupted run loses nothing."""

    def __init__(self, path: Path | None, benchmark: str) -> None:
        self.path, self.benchmark = path, benchmark
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **fields: Any) -> None:
        """Write one line with these fields."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"benchmark": self.benchmark, **fields}) + "\n")

    def machine(self, device: torch.device) -> None:
        """Write a line that describes the machine."""
        identity = cache.identity(device)
        print(", ".join(f"{name} {value}" for name, value in identity.items()))
        self.add(**identity, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())


class Timer:
    """Time calls on the current device, as the module's docstring describes."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.rounds = rounds
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.scratch = torch.empty(max(4 * l2, 1 << 28), dtype=torch.uint8, device=device)

    def ms(self, run: Callable[[], object]) -> float:
        """Return the median milliseconds of a call."""
        with torch.no_grad():
            graph = capture(run)
            times = []
            for _ in range(self.rounds):
                # This evicts everything else from the L2 cache.
                self.scratch.zero_()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
        del graph
        return statistics.median(times)


def capture(run: Callable[[], object], warm_up: int = 3) -> torch.cuda.CUDAGraph:
    """Capture one call as a CUDA graph, after a warm-up on a side stream, which capture requires."""
    side = torch.cuda.Stream()
    # The first calls compile kernels and allocate memory, which must not happen inside a capture.
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def copy_bandwidth(timer: Timer, device: torch.device) -> float:
    """Measure the GB/s of a copy of 2 GiB, counting bytes read plus bytes written."""
    source = torch.randint(0, 255, (1 << 31,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / timer.ms(lambda: target.copy_(source)) / 1e6


def gemm_rate(timer: Timer, device: torch.device, size: int = 8192) -> float:
    """Measure the TFLOP/s of a bf16 matrix product of random numbers."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / timer.ms(lambda: a @ b) / 1e9


def relative_error(a: Tensor, truth: Tensor) -> float:
    """Return the relative Frobenius norm of the difference.

    It is summed over slabs, because a large tensor in float64 may not fit in memory.
    """
    difference = norm = 0.0
    for x, y in zip(a.flatten().split(1 << 24), truth.flatten().split(1 << 24), strict=True):
        difference += float((x.double() - y.double()).square().sum())
        norm += float(y.double().square().sum())
    return (difference / norm) ** 0.5 if norm else float("nan")
