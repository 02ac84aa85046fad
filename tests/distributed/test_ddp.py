"""DistributedDataParallel as it is: the steps of one process that runs the ranks' batches one after another.

With two ranks bits are compared: half of a gradient is exact and two summands have one order. Names, precisions and
contexts work through DDP and torch.compile together.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import te_nvfp4_cv as nv
from tests.distributed.launch import Ranks, ranks_test, two_ranks
from tests.helpers import relative_error, same_bits, values

NO_SR = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)
TABLE = {"stem": None, "body.*": nv.NVFP4BlockScaling(disable_rht=True, disable_stochastic_rounding=True)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(16, 32, 3, padding=1)
        self.body = nn.Sequential(nn.GroupNorm(4, 32), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2, padding=1))
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def net(ranks: Ranks, table: Any = None) -> Net:
    torch.manual_seed(1)
    model = Net().to(ranks.device)
    if table is not None:
        nv.set_precision(model, table)
    return model


def loss_of(model: nn.Module, ranks: Ranks, rank: int, step: int, recipe: Any = NO_SR, group: Any = None) -> Tensor:
    x = (values((16, 16, 8, 8), seed=10 * step + rank) * (1.0 + rank)).to(ranks.device)
    with nv.nvfp4_autocast(recipe, amax_reduction_group=group):
        return model(x).square().mean()


def distributed(model: nn.Module, ranks: Ranks, **options: Any) -> DistributedDataParallel:
    ids = [ranks.rank] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, **options)


def on_ranks_training_equals_one_process(ranks: Ranks) -> None:
    model, reference = distributed(net(ranks, TABLE), ranks), net(ranks, TABLE)
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, reference)]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_of(model, ranks, ranks.rank, step)
        loss.backward()
        for rank in range(ranks.world):
            expected = loss_of(reference, ranks, rank, step)
            (expected / ranks.world).backward()
            if rank == ranks.rank and (ranks.world == 2 or step == 0):
                assert same_bits(loss.detach(), expected.detach())
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach()) if ranks.world == 2 else relative_error(p, q) < 2e-2


def on_ranks_stochastic_rounding_leaves_the_weights_equal(ranks: Ranks) -> None:
    model = distributed(net(ranks), ranks)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, ranks, ranks.rank, step, nv.NVFP4BlockScaling()).backward()
        optimizer.step()
    for p in model.parameters():
        everybody = [torch.empty_like(p) for _ in range(ranks.world)]
        torch.distributed.all_gather(everybody, p.detach().contiguous())
        assert all(same_bits(everybody[0], other) for other in everybody)


@two_ranks
def on_ranks_plain_names_through_every_wrapper(ranks: Ranks) -> None:
    expected = loss_of(net(ranks, TABLE), ranks, ranks.rank, 0).detach()
    assert not same_bits(expected, loss_of(net(ranks), ranks, ranks.rank, 0).detach())
    torch._dynamo.reset()
    wrappers = {
        "ddp": lambda model: distributed(model, ranks),
        "compiled": lambda model: torch.compile(model, backend="aot_eager"),
        "compiled ddp": lambda model: torch.compile(distributed(model, ranks), backend="aot_eager"),
        "ddp of compiled": lambda model: distributed(torch.compile(model, backend="aot_eager"), ranks),
    }
    for name, wrap in wrappers.items():
        model = wrap(net(ranks))
        nv.set_precision(model, TABLE)
        assert relative_error(loss_of(model, ranks, ranks.rank, 0), expected) < 1e-6, name
        assert list(nv.extra_state(model)["scales"]) == []
    torch._dynamo.reset()


@two_ranks
def on_ranks_shared_amaxes_in_a_compiled_step(ranks: Ranks) -> None:
    """The group crosses the operator's boundary: compiled and eager steps ask the ranks alike."""
    grads = []
    torch._dynamo.reset()
    for compiled in (False, True):
        model = net(ranks)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        loss_of(run, ranks, ranks.rank, 0, group=ranks.group).backward()
        grads.append([p.grad for p in model.parameters()])
    alone = net(ranks)
    loss_of(alone, ranks, ranks.rank, 0).backward()
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(*grads, strict=True))
    assert any(not same_bits(p.grad, g) for p, g in zip(alone.parameters(), grads[0], strict=True))
    torch._dynamo.reset()


@two_ranks
def on_ranks_gradients_of_one_tap_lie_as_the_buckets_do(ranks: Ranks) -> None:
    """DDP warns where the strides of a gradient are not its parameter's, along axes of one element too."""
    model = distributed(nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 16, 1)).to(ranks.device), ranks)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for step in range(2):
            loss_of(model, ranks, ranks.rank, step).backward()
    assert not [str(warning.message) for warning in found if "strides" in str(warning.message)]


def on_ranks_frozen_weights_and_accumulation(ranks: Ranks) -> None:
    plain, frozen = distributed(net(ranks), ranks), distributed(net(ranks), ranks)
    for model in (plain, frozen):
        with nv.frozen_weights(model) if model is frozen else torch.enable_grad():
            with model.no_sync():
                loss_of(model, ranks, ranks.rank, 0).backward()
            loss_of(model, ranks, ranks.rank, 1).backward()
    for p, q in zip(plain.parameters(), frozen.parameters(), strict=True):
        assert same_bits(p.grad, q.grad)


test_on_ranks = ranks_test(globals(), four=("training_equals_one_process",))
