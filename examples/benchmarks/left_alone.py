"""Measure what nvfp4_autocast costs a model whose layers all stay in high precision.

    python examples/benchmarks/left_alone.py [--rounds 20] [--size 64] [--batch 16]

A training step of torchvision's ResNet-18 on one thread, in fp32, in plain torch and inside of the context with
`nv.set_precision(model, {"*": None})`. Rounds run each variant once, in turn. The script prints the smallest CPU time
of each, as other work on the machine can only add to it, and checks first that all variants have one loss.
Without the ReLU mask the two steps run the same operators, so the difference is the context's own work. It hangs on the
number of calls and not on their size: with `--size 32 --batch 2` it stands out from the noise of a busy machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

for _folder in (str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])):
    sys.path.insert(0, _folder)

from _torchvision import ensure_torchvision  # noqa: E402

import te_nvfp4_cv as nv  # noqa: E402


def variants(size: int, batch: int) -> dict[str, Callable[[], list[Tensor]]]:
    """Return by name one training step of each variant, which returns its loss."""
    ensure_torchvision()
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model, left = resnet18(num_classes=10), resnet18(num_classes=10)
    left.load_state_dict(model.state_dict())
    nv.set_precision(left, {"*": None})
    x = torch.randn(batch, 3, size, size)

    def step(net: torch.nn.Module, context: AbstractContextManager[object]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            net.zero_grad(set_to_none=True)
            with context:
                loss = net(x).square().mean()
            loss.backward()
            return [loss.detach()]

        return run

    return {
        "plain": step(model, nullcontext()),
        "context, relu_mask=False": step(left, nv.nvfp4_autocast(relu_mask=False)),
        "context": step(left, nv.nvfp4_autocast()),
        "enabled=False, no entries": step(model, nv.nvfp4_autocast(enabled=False)),
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the medians; return exit status 1 if a loss differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    steps = variants(options.size, options.batch)
    losses = [step()[0] for step in steps.values()]
    if not all(torch.equal(loss, losses[0]) for loss in losses):
        print(f"the losses differ: {losses}; no times printed", file=sys.stderr)
        return 1
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            found[name].append((time.process_time() - start) * 1e3)
    plain = min(found["plain"])
    for name, times in found.items():
        cpu = min(times)
        print(f"{name:26} {cpu:8.2f} ms of CPU time   - plain {cpu - plain:6.2f} ms   / plain {cpu / plain:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
