"""Time a UNet training step on a CPU, in NVFP4, plain fp32 and bf16 autocast.

NVFP4 runs under bf16 autocast, with current and with delayed tensor scales. The variants are interleaved; the output
has medians and ratios. A step is forward, loss and backward (no optimizer); model and images are channels_last. There
are two cases: "big" is scale 1.0, 64x64, batch 16, "small" is scale 0.25, 128x128, batch 16. Before any time is
printed, each variant's loss and gradients are compared with fp32's.

    python examples/benchmarks/cpu_step.py [--case big small] [--rounds 9] [--threads 2]

`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1` in the environment avoids page faults, for every variant.
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
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unet_coco"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from unet import UNet  # noqa: E402

import te_nvfp4_cv as nv  # noqa: E402

CASES = {"big": (1.0, 64, 16), "small": (0.25, 128, 16)}


def variants(net: nn.Module, x: torch.Tensor, target: torch.Tensor) -> dict[str, Callable[[], float]]:
    """Make the training step of each variant, by name; a step leaves gradients in `net` and returns the loss."""
    current, delayed = nv.NVFP4BlockScaling(), nv.NVFP4BlockScaling(tensor_scale="delayed")

    def step(autocast: bool, recipe: nv.NVFP4BlockScaling | None) -> float:
        net.zero_grad(set_to_none=True)
        enabled = recipe is not None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), nv.nvfp4_autocast(recipe, enabled=enabled):
            loss = F.cross_entropy(net(x).float(), target)
        loss.backward()
        return loss.item()

    return {
        "fp32": lambda: step(False, None),
        "bf16": lambda: step(True, None),
        "nvfp4": lambda: step(True, current),
        "delayed": lambda: step(True, delayed),
    }


def gradients(net: nn.Module) -> torch.Tensor:
    """Return all gradients as one vector."""
    return torch.cat([p.grad.flatten().float() for p in net.parameters() if p.grad is not None])


def main() -> int:
    """Print a table per case; return exit status 1 if a variant's gradients are wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} threads; tensor scale of nvfp4: current")
    print(f"medians of {options.rounds} interleaved rounds")
    for case in options.case:
        scale, size, batch = CASES[case]
        torch.manual_seed(0)
        net = UNet(21, scale=scale, dropout=0.0).to(memory_format=torch.channels_last)
        x = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
        target = torch.randint(0, 21, (batch, size, size))
        steps, exact = variants(net, x, target), torch.empty(0)
        for name, step in steps.items():  # the first call also compiles
            step()
            loss, grad = step(), gradients(net)
            exact = grad if name == "fp32" else exact
            cosine = F.cosine_similarity(grad, exact, dim=0).item()
            if not (cosine > 0.8 and torch.isfinite(grad).all()):
                print(f"{case}: gradients of {name} are wrong (cosine with fp32 {cosine:.3f}): no times printed")
                return 1
            print(f"{case}: {name} loss {loss:.4f}, cosine of all gradients with fp32 {cosine:.4f}")
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(options.rounds):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
        median = {name: statistics.median(values) for name, values in times.items()}
        for name, value in median.items():
            row = f"/ fp32 {value / median['fp32']:.2f}   / bf16 {value / median['bf16']:.2f}"
            print(f"{case:6} {name:7} {value * 1e3:8.1f} ms   {row}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
