"""Measure a grouped linear layer (mixture of experts) beside one linear layer with as many rows.

    python examples/benchmarks/grouped_time.py [--rounds 15] [--threads 1] [--experts 8] [--rows 4096] [--width 512]
                                               [--dtype fp32] [--backend auto] [--json]

Each round runs one training step of each layer in turn, so that a slow moment of the machine affects both. The rows are
shared out unevenly. Weights are quantized once before (nv.frozen_weights), in both layers: a grouped layer has as many
weights to quantize as experts, which is not what is compared. The script prints medians over the rounds of this
process's CPU time and of the elapsed time, and the ratio of the medians. Before that, the output of the grouped layer
is compared with the same rows multiplied in plain torch.
"""

from __future__ import annotations

import argparse
import json
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

SMALLEST_COSINE = 0.95


def routing(rows: int, experts: int) -> Tensor:
    """Return offsets that give some experts several times the rows of others, and none a multiple of 16 by design."""
    share = torch.arange(1, experts + 1, dtype=torch.float64)
    ends = (share.cumsum(0) / share.sum() * rows).round().long()
    ends[-1] = rows
    return ends


def layers(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Callable[[], Tensor]]]:
    """Return both layers, and by name one training step of each."""
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    made = dict(bias=True, dtype=dtype, backend=options.backend)
    grouped = nv.NVFP4GroupedLinear(options.experts, options.width, options.width, **made)
    linear = nv.NVFP4Linear(options.width, options.width, **made)
    x = torch.randn(options.rows, options.width, dtype=dtype, requires_grad=True)
    dy, offsets = torch.randn(options.rows, options.width, dtype=dtype), routing(options.rows, options.experts)
    truth = torch.cat(
        [
            F.linear(x[a:b], grouped.weight[e], grouped.bias[e])
            for e, (a, b) in enumerate(zip([0, *offsets.tolist()[:-1]], offsets.tolist(), strict=True))
        ]
    )
    cosine = F.cosine_similarity(grouped(x, offsets).flatten().float(), truth.flatten().float(), dim=0)
    if cosine < SMALLEST_COSINE:
        raise SystemExit(f"the grouped layer is wrong: cosine {cosine:.3f} to plain torch")

    def one() -> Tensor:
        x.grad = linear.weight.grad = linear.bias.grad = None
        y: Tensor = linear(x)
        y.backward(dy)
        return y

    def many() -> Tensor:
        x.grad = grouped.weight.grad = grouped.bias.grad = None
        y: Tensor = grouped(x, offsets)
        y.backward(dy)
        return y

    return nn.ModuleList([linear, grouped]), {"linear": one, "grouped": many}


def measure(steps: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, dict[str, float]]:
    """Return medians in milliseconds, by layer, of CPU and elapsed time."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for index in range(rounds + 2):
        for name, step in steps.items():
            before = time.process_time(), time.perf_counter()
            step()
            if index >= 2:  # the first rounds compile, allocate and quantize the weights
                times[name].append((time.process_time() - before[0], time.perf_counter() - before[1]))
    return {
        name: {
            "cpu_ms": 1e3 * statistics.median(cpu for cpu, _ in taken),
            "elapsed_ms": 1e3 * statistics.median(elapsed for _, elapsed in taken),
        }
        for name, taken in times.items()
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time of a grouped linear layer beside one linear layer")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4096, help="tokens, of all experts together")
    parser.add_argument("--width", type=int, default=512, help="input and output features")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, steps = layers(options)
    with nv.frozen_weights(model):
        found = measure(steps, options.rounds)
    ratio = {key: found["grouped"][key] / found["linear"][key] for key in found["linear"]}
    if options.json:
        print(json.dumps({**found, "ratio": ratio}))
        return 0
    print(
        f"{options.rows} rows, {options.width} features, {options.experts} experts, {options.dtype}, one training step"
    )
    for name, row in found.items():
        print(f"  {name:8s} {row['cpu_ms']:8.2f} ms CPU {row['elapsed_ms']:8.2f} ms elapsed")
    print(f"  ratio    {ratio['cpu_ms']:8.3f}        {ratio['elapsed_ms']:8.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
