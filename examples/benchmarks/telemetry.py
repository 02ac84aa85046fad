"""Measure what telemetry costs: a sampled training step against a plain one, and the share of a run's time.

    python examples/benchmarks/telemetry.py [--case small] [--rounds 7] [--threads 1] [--device cpu]

The overhead of a run that samples every N steps is (sampled step - plain step) / (N * plain step), at the default N.
The record is written to a JSON lines file, as in a run. Times are medians of interleaved steps. Before they are
printed, the weights after three sampled steps are compared, bit for bit, with those after three steps without
telemetry.
"""

from __future__ import annotations

import argparse
import inspect
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unet_coco"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from unet import UNet  # noqa: E402

import te_nvfp4_cv as nv  # noqa: E402
from te_nvfp4_cv import telemetry  # noqa: E402

CASES = {"big": (1.0, 64, 16), "small": (0.25, 128, 16), "tiny": (0.125, 64, 16)}  # scale, image side, batch
RECIPE = nv.NVFP4BlockScaling()


class Run:
    """Hold the UNet, its data and its optimizer, with the same numbers at each construction."""

    def __init__(self, case: str, device: torch.device, dtype: torch.dtype | None, file: Path | None) -> None:
        scale, size, batch = CASES[case]
        torch.manual_seed(0)
        self.dtype, self.device = dtype, device
        self.net: nn.Module = UNet(21, scale=scale).to(device, memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(batch, 3, size, size, generator=generator)
        self.x = x.to(device, memory_format=torch.channels_last)
        self.y = torch.randint(0, 21, (batch, size, size), generator=generator).to(device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), 1e-3)
        sinks = [] if file is None else [telemetry.JSONL(file)]
        self.watch = telemetry.attach(self.net, sinks=sinks)

    def step(self, number: int) -> float:
        """Run one training step and return its seconds; telemetry samples the steps that its interval divides."""
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with self.watch.step(number):
            with (
                torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None),
                nv.nvfp4_autocast(RECIPE),
            ):
                loss = F.cross_entropy(self.net(self.x).float(), self.y)
            loss.backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def measure(case: str, device: torch.device, dtype: torch.dtype | None, rounds: int, folder: Path) -> bool:
    """Print one case; return False if the weights with and without telemetry differ."""
    every = inspect.signature(telemetry.attach).parameters["every"].default
    watched, plain = Run(case, device, dtype, folder / f"{case}.jsonl"), Run(case, device, dtype, None)
    for number in range(3):
        torch.manual_seed(number)
        watched.step(number * every)
        torch.manual_seed(number)
        plain.step(number * every)
    if not all(torch.equal(a, b) for a, b in zip(watched.net.parameters(), plain.net.parameters(), strict=True)):
        print(f"{case}: telemetry changed the weights: no times printed")
        return False
    times: dict[str, list[float]] = {"plain": [], "sampled": []}
    for number in range(rounds):
        times["plain"].append(watched.step(number * every + 1))
        times["sampled"].append(watched.step((number + 3) * every))
    base, sampled = statistics.median(times["plain"]), statistics.median(times["sampled"])
    print(
        f"{case:6} plain {base * 1e3:8.1f} ms   sampled {sampled * 1e3:8.1f} ms   {sampled / base:.2f} times"
        f"   every {every} steps: {100 * (sampled - base) / (every * base):.1f} % of the run"
    )
    return True


def main() -> int:
    """Print all cases; return exit status 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--case", nargs="+", default=["tiny", "small"], choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compute", choices=("fp32", "bf16"), default="bf16", help="dtype of activations")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, {name}, {options.threads} threads, {options.rounds} rounds, {options.compute}")
    dtype = torch.bfloat16 if options.compute == "bf16" else None
    with tempfile.TemporaryDirectory() as folder:
        return 0 if all([measure(case, device, dtype, options.rounds, Path(folder)) for case in options.case]) else 1


if __name__ == "__main__":
    sys.exit(main())
