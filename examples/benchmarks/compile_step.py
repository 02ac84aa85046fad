"""Compare torch.compile with eager mode, and measure what the context costs layers that stay in high precision.

    python examples/benchmarks/compile_step.py [--case small big] [--rounds 9] [--threads 2]

The benchmark takes the UNet's training step and has two parts:

compiled      forward, loss and backward of the UNet under bf16 autocast and nvfp4_autocast, compiled by inductor with
              fullgraph=True, against the same step in eager mode; graphs, graph breaks and recompilations are counted
left alone    the same step with every layer in high precision: inside an enabled context through set_precision, inside
              a disabled context, and outside any context

Times are medians of interleaved rounds; the first calls, which compile, are not timed. Before any time is printed, the
compiled loss is compared with eager's, and the results in high precision are compared bit for bit.
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
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unet_coco"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from unet import UNet  # noqa: E402

import te_nvfp4_cv as nv  # noqa: E402

CASES = {"big": (1.0, 64, 16), "small": (0.25, 128, 16), "tiny": (0.125, 32, 16)}
LOSS_BAND = 0.01
RECIPE = nv.NVFP4BlockScaling()
Step = Callable[[], float]


def step_of(forward: Callable[[torch.Tensor], torch.Tensor], net: nn.Module, case: str, **context: bool) -> Step:
    """Make a training step that leaves gradients in `net` and returns the loss.

    It runs in nvfp4_autocast with the arguments `context`, or without any context if there are none.
    """
    _, size, batch = CASES[case]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, size, size, generator=generator).to(memory_format=torch.channels_last)
    target = torch.randint(0, 21, (batch, size, size), generator=generator)

    def loss_of() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(forward(x).float(), target)

    def step() -> float:
        net.zero_grad(set_to_none=True)
        if context:
            with nv.nvfp4_autocast(RECIPE, **context):
                loss = loss_of()
        else:
            loss = loss_of()
        loss.backward()
        return loss.item()

    return step


def unet(case: str) -> nn.Module:
    """Build the example's UNet, with the same weights at each call."""
    torch.manual_seed(0)
    return UNet(21, scale=CASES[case][0], dropout=0.0).to(memory_format=torch.channels_last)


def medians(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Run the steps interleaved and return the median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def compiled_case(case: str, rounds: int) -> bool:
    """Print eager and compiled times; return False if results are wrong."""
    # Two nets with the same weights, because each step leaves gradients in its net.
    net, twin = unet(case), unet(case)
    run = torch.compile(twin, fullgraph=True)
    steps = {"eager": step_of(net, net, case, enabled=True), "compiled": step_of(run, twin, case, enabled=True)}
    start = time.perf_counter()
    losses = {name: step() for name, step in steps.items()}
    seconds = time.perf_counter() - start
    for step in steps.values():
        step()
    graphs = counters["stats"]["unique_graphs"]
    if abs(losses["compiled"] - losses["eager"]) > LOSS_BAND * losses["eager"] or counters["graph_break"]:
        print(f"{case}: losses {losses}, graph breaks {dict(counters['graph_break'])}: no times printed")
        return False
    median = medians(steps, rounds)
    more = counters["stats"]["unique_graphs"] - graphs
    print(f"{case}: first steps {seconds:.0f} s; {graphs} graph, 0 graph breaks, {more} recompilations after step 2")
    for name, value in median.items():
        print(f"{case:6} {name:9} {value * 1e3:8.1f} ms   / eager {value / median['eager']:.2f}")
    return not more


def left_alone_case(case: str, rounds: int) -> bool:
    """Print times of high-precision steps inside and outside contexts; return False if results differ."""
    net, marked = unet(case), unet(case)
    nv.set_precision(marked, {"*": None})
    steps = {
        "outside": step_of(net, net, case),
        "disabled": step_of(net, net, case, enabled=False),
        "high precision": step_of(marked, marked, case, enabled=True),
    }
    losses = {name: step() for name, step in steps.items()}
    if len(set(losses.values())) != 1:
        print(f"{case}: a context changed layers that it should leave alone: {losses}: no times printed")
        return False
    median = medians(steps, rounds)
    for name, value in median.items():
        print(f"{case:6} {name:14} {value * 1e3:8.1f} ms   / outside {value / median['outside']:.3f}")
    return True


def main() -> int:
    """Print both tables per case; return exit status 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--case", nargs="+", default=["small", "big"], choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("compiled", "left-alone"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} threads, {options.rounds} rounds")
    right = True
    for case in options.case:
        if options.only != "compiled":
            right &= left_alone_case(case, options.rounds)
        if options.only != "left-alone":
            counters.clear()
            right &= compiled_case(case, options.rounds)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
