"""Random programs of two ranks, each with a meaning in one process: what test_random_pairs.py runs.

    alone, ddp    each rank's results are those of the same steps in one process; DDP averages the gradients
    with a group  the same with one tensor scale: those of one process with the batches of both ranks
    fsdp          weights gathered in 4 bits are those of the whole weight, so as ddp
    tp            a pair of layers shared out by channels: those of one process with both parts of the batch

A pair draws a model, the ranks' batch sizes (0 among them), the recipe, a group or none, activation checkpointing,
frozen weights, an evaluation between steps, and sometimes a fault: ranks at different layers. Faults must raise on both
ranks, before the group's timeout; everything else must be equal: outputs and their gradients in every bit, gradients of
weights within the rounding of sums where parts are added.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import te_nvfp4_cv as nv
from tests.distributed.launch import Ranks
from tests.helpers import relative_error, same_bits, values

TIMEOUT = timedelta(seconds=10)
RECIPES = {
    scale: nv.NVFP4BlockScaling(disable_stochastic_rounding=True, tensor_scale=scale)
    for scale in ("current", "delayed")
}


class Net(nn.Module):
    """Layers of one shape, so that only their names tell them apart."""

    def __init__(self, depth: int, norm: bool, linear: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(depth))
        self.norm = nn.GroupNorm(4, 32) if norm else nn.Identity()
        self.head = nn.Linear(32, 16) if linear else nn.Conv2d(32, 16, 1)
        self.order = list(range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = torch.relu(self.norm(self.layers[index](x)))
        return self.head(x.mean((2, 3)) if isinstance(self.head, nn.Linear) else x)


@dataclass(frozen=True)
class Pair:
    """One program. Both ranks draw the same."""

    kind: str
    sizes: tuple[int, int]
    recipe: str
    group: bool
    recompute: bool
    frozen: bool
    evaluate: str  # "", "no_grad" or "inference": between the steps, on rank 0 alone or on both
    fault: bool
    depth: int
    norm: bool
    linear: bool

    @staticmethod
    def draw(rng: random.Random) -> Pair:
        kind = rng.choice(("alone", "alone", "ddp", "ddp", "fsdp", "tp"))
        size = 16 if kind == "tp" else rng.choice((0, 1, 5, 16, 32))
        sizes = (size, rng.choice((size, 0, 16)))
        group = kind in ("alone", "ddp") and rng.random() < 0.6
        fault = group and rng.random() < 0.2
        return Pair(
            kind=kind,
            sizes=(16, 16) if fault else sizes if rng.random() < 0.5 else sizes[::-1],
            recipe=rng.choice(list(RECIPES)),
            group=group,
            recompute=rng.random() < 0.4,
            frozen=kind != "fsdp" and rng.random() < 0.3,
            evaluate=rng.choice(("", "", "no_grad", "inference")) if kind != "tp" else "",
            fault=fault,
            depth=rng.randint(2, 3),
            norm=rng.random() < 0.5,
            linear=rng.random() < 0.5,
        )

    @property
    def raises(self) -> bool:
        """Whether both ranks must raise."""
        return self.fault or (self.kind == "tp" and self.sizes[0] != self.sizes[1])

    def model(self, device: torch.device) -> Any:
        torch.manual_seed(3)
        if self.kind == "tp":
            return nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1)).to(device)
        return Net(self.depth, self.norm, self.linear).to(device)

    def parts(self, step: int, device: torch.device) -> list[Tensor]:
        """The batches of both ranks."""
        return [values((size, 32, 5, 5), seed=10 * step + rank).to(device) for rank, size in enumerate(self.sizes)]


def steps(pair: Pair, model: nn.Module, batches: list[Tensor], group: Any, first: bool = True) -> list[Any]:
    """Two steps: the outputs, the inputs' gradients, and at the end the weights' gradients."""
    seen: list[Any] = []
    for step, x in enumerate(batches):
        x = x.clone().requires_grad_()
        with contextlib.ExitStack() as stack:
            if pair.frozen:
                stack.enter_context(nv.frozen_weights(model))
            stack.enter_context(nv.nvfp4_autocast(RECIPES[pair.recipe], amax_reduction_group=group))
            y = checkpoint(model, x, use_reentrant=False) if pair.recompute else model(x)
            y.backward(torch.ones_like(y) * torch.arange(y.shape[1], device=y.device).view(-1, *[1] * (y.dim() - 2)))
        seen += [y.detach(), x.grad]
        if pair.evaluate and (first or pair.kind == "fsdp") and step == 0:
            mode = torch.inference_mode() if pair.evaluate == "inference" else torch.no_grad()
            with mode, nv.nvfp4_autocast(RECIPES[pair.recipe], amax_reduction_group=group):
                model.eval()(x)
            model.train()
    return seen


def run_pair(pair: Pair, ranks: Ranks, base: Any, mesh: DeviceMesh) -> str:
    """Run one pair and compare; return "equal" or "raised"."""
    device, rank = ranks.device, ranks.rank
    model, whole = pair.model(device), pair.model(device)
    mine = [pair.parts(step, device)[rank] for step in range(2)]
    group = base if pair.group else None
    if pair.fault and rank == 1:
        model.order.reverse()
    run: Any = model
    if pair.kind == "ddp":
        run = DistributedDataParallel(model, process_group=base)
    elif pair.kind == "fsdp":
        nv.fsdp.quantize_gathers(model, RECIPES[pair.recipe])
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif pair.kind == "tp":
        tp = nv.tensor_parallel
        plan = {"0": tp.ColwiseParallel(input_layouts=Shard(0)), "2": tp.RowwiseParallel(output_layouts=Shard(0))}
        run = parallelize_module(model, mesh, plan)
    try:
        found = steps(pair, run, mine, group, rank == 0)
    except (ValueError, RuntimeError) as error:
        assert "imed out" not in str(error), (pair, str(error))
        return f"raised: {error}"
    if pair.group or pair.kind == "tp":
        joined = [torch.cat(pair.parts(step, device)) for step in range(2)]
        expected = [t.split(pair.sizes)[rank] for t in steps(pair, whole, joined, None)]
    else:
        expected = steps(pair, whole, mine, None, rank == 0)
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        if pair.kind == "tp":
            assert a.shape == b.shape and relative_error(a, b) <= 1e-5, (pair, number, relative_error(a, b))
        else:
            assert same_bits(a, b), (pair, number, relative_error(a, b))
    _compare_weights(pair, model, whole, base)
    return "equal"


def _compare_weights(pair: Pair, model: nn.Module, whole: nn.Module, base: Any) -> None:
    """The gradients of weights, added over the ranks, against one process's."""
    # Blocks of 16 images: where a batch cuts one, the codes of the batches together are other ones.
    if pair.group and any(size % 16 for size in pair.sizes):
        return
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        a = torch.zeros_like(q) if p.grad is None else p.grad
        b = torch.zeros_like(q) if q.grad is None else q.grad.clone()
        a = a.full_tensor() if isinstance(a, DTensor) else a.clone()
        if not (pair.group or pair.kind == "tp"):
            if pair.kind == "alone":
                assert same_bits(a, b), (pair, name)
                continue
            dist.all_reduce(b, group=base)
        elif pair.kind == "alone":
            dist.all_reduce(a, group=base)
        if pair.kind in ("ddp", "fsdp"):
            a = a * 2
        assert relative_error(a, b) <= 1e-4 or float((a - b).abs().max()) <= 1e-6, (pair, name, relative_error(a, b))


def random_pairs(ranks: Ranks, seed: int, count: int) -> str:
    """Run `count` pairs; return how many of each kind were equal, and how many raised."""
    base = dist.new_group(timeout=TIMEOUT)
    mesh = DeviceMesh.from_group(base, ranks.device.type)
    rng, told = random.Random(seed), Counter[str]()
    for number in range(count):
        pair = Pair.draw(rng)
        outcome = run_pair(pair, ranks, base, mesh)
        both: list[Any] = [None, None]
        dist.all_gather_object(both, outcome)
        raised = [text.startswith("raised") for text in both]
        assert raised == [pair.raises] * 2, (number, pair, both)
        told[f"{pair.kind} {'raised' if pair.raises else 'equal'}"] += 1
    return ", ".join(f"{kind}: {n}" for kind, n in sorted(told.items()))
