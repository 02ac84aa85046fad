"""Compare the bytes that autograd saves for backward in NVFP4 and in bf16, on unmodified models.

    python examples/benchmarks/memory.py [--models resnet50 densenet121] [--batch 16] [--size 64] [--keep]

Both run under torch.autocast(bfloat16) in training mode. The benchmark counts every storage that autograd holds after
the forward pass once, except parameters, buffers and the input. It does not rely on nv.coverage. The first row is one
convolution whose input nothing else saves, which shows what a layer itself needs. "activations" is the ratio of the
bytes that grow with the image, computed from the difference to half the size, in which copies of the weights cancel.
The ratio of large images approaches it. Ratios do not depend on the device.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from _torchvision import ensure_torchvision  # noqa: E402
from benchmarks import measured  # noqa: E402

import te_nvfp4_cv as nv  # noqa: E402
from te_nvfp4_cv.report.memory import saved_bytes  # noqa: E402

BOUNDS = {"conv input": 0.30, "resnet50": 0.80, "deeplabv3_resnet50": 0.80, "densenet121": 0.80}
MODELS = ("resnet50", "deeplabv3_resnet50", "densenet121")


def build(name: str) -> nn.Module:
    """Build a torchvision model with random weights in training mode, or one convolution after a Shift."""
    if name == "conv input":
        return nn.Sequential(Shift(), nn.Conv2d(64, 64, 3, padding=1))
    ensure_torchvision()
    import torchvision

    if name.startswith("deeplab"):
        make: Callable[..., nn.Module] = getattr(torchvision.models.segmentation, name)
        return make(weights=None, weights_backbone=None)
    return getattr(torchvision.models, name)()


class Shift(nn.Module):
    """Add a parameter to x, which gives a new activation that only the next layer saves."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift  # an addition saves nothing for backward


def measure(name: str, batch: int = 16, size: int = 64, recipe: nv.NVFP4BlockScaling | None = None) -> tuple[int, int]:
    """Return the bytes saved for backward, first in bf16 and then in NVFP4."""
    torch.manual_seed(0)
    model = build(name)
    channels = 64 if name == "conv input" else 3
    x = torch.randn(batch, channels, size, size)
    if name == "conv input":
        # Already bf16, so that autocast makes no copy of it.
        x = x.bfloat16()
    plain = saved_bytes(model, (x,), None)
    gc.collect()
    return plain, saved_bytes(model, (x,), recipe or nv.NVFP4BlockScaling())


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Print the table, and return the larger of the two ratios for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="torchvision names")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="image height and width")
    parser.add_argument("--recipe", default="default", help="recipe name or path")
    measured.add_option(parser)
    options = parser.parse_args(arguments)
    recipe = nv.load_recipe(options.recipe)
    ratios = {}
    print(f"batch {options.batch}, {options.size}x{options.size}, bf16 autocast, recipe {options.recipe}")
    print(f"{'model':<24}{'bf16 MiB':>12}{'nvfp4 MiB':>12}{'ratio':>8}{'activations':>14}{'bound':>8}")
    for name in ("conv input", *options.models):
        plain, ours = measure(name, options.batch, options.size, recipe)
        plain_half, ours_half = measure(name, options.batch, options.size // 2, recipe)
        ratios[name] = max(ours / plain, growth := (ours - ours_half) / (plain - plain_half))
        bound = f"{BOUNDS[name]:.2f}" if name in BOUNDS else ""
        sizes = f"{plain / 2**20:>12.2f}{ours / 2**20:>12.2f}{ours / plain:>8.3f}"
        print(f"{name:<24}{sizes}{growth:>14.3f}{bound:>8}", flush=True)
        halves = {"bf16, half the size": plain_half, "nvfp4, half the size": ours_half}
        measured.keep(options.keep, "memory", name, {"bf16": plain, "nvfp4": ours} | halves)
    return ratios


if __name__ == "__main__":
    main()
