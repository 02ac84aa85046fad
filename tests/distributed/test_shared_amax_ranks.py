"""Amaxes that ranks share: with empty batches, beside DDP's own collectives, and with ranks at different layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import te_nvfp4_cv as nv
from te_nvfp4_cv.layer import shared_amax
from tests.distributed.launch import Ranks, ranks_test
from tests.helpers import same_bits, values

PLAIN = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)
DELAYED = nv.NVFP4BlockScaling(disable_stochastic_rounding=True, tensor_scale="delayed")


class Net(nn.Module):
    """Layers of one shape, so that no size tells them apart, and a branch before the first of DDP's buckets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.extra, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 16)
        self.condition = nn.Linear(1, 500)

    def forward(self, x: Tensor, *, turned: bool = False, extra: bool = False, condition: bool = False) -> Tensor:
        if condition:
            x = x * (1 + self.condition(torch.ones(1, 1, device=x.device)).mean())
        for layer in (self.b, self.a) if turned else (self.a, self.b):
            x = torch.relu(layer(x))
        return self.head((x + self.extra(x) if extra else x).mean((2, 3)))


def net(ranks: Ranks) -> Net:
    torch.manual_seed(1)
    return Net().to(ranks.device)


def step(model: nn.Module, x: Tensor, group: Any, recipe: Any = PLAIN, recompute: bool = False, **branch: bool) -> None:
    with nv.nvfp4_autocast(recipe, amax_reduction_group=group):
        y = checkpoint(model, x, use_reentrant=False, **branch) if recompute else model(x, **branch)
    y.square().sum().backward()


def on_ranks_an_empty_batch_takes_part(ranks: Ranks) -> None:
    for recipe, recompute in ((PLAIN, False), (DELAYED, False), (PLAIN, True)):
        model, alone = net(ranks), net(ranks)
        for turn in range(3):  # delayed scales move at the second one
            x = values((16, 16, 6, 6), seed=turn).to(ranks.device)
            x.requires_grad_(turn != 1)
            full = ranks.rank == turn % ranks.world
            step(model, x if full else x[:0], ranks.group, recipe, recompute)
            # What another rank's batch of zeros would do: nothing, as this one's amaxes are the largest.
            step(alone, x, None, recipe)
            for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
                if q.grad is not None:
                    assert same_bits(p.grad, q.grad if full else torch.zeros_like(q)), (recipe, turn, name)
                    p.grad = q.grad = None
    with nv.nvfp4_autocast(PLAIN, amax_reduction_group=ranks.group), torch.no_grad():
        assert net(ranks)(x[:0]).shape == (0, 16)  # evaluation asks nobody


def on_ranks_an_empty_batch_in_a_compiled_step(ranks: Ranks) -> None:
    if ranks.world > 2:
        return
    torch._dynamo.reset()
    x = values((16, 16, 6, 6), seed=3).to(ranks.device)
    model, alone = net(ranks), net(ranks)
    step(torch.compile(model, backend="aot_eager"), x if ranks.rank == 0 else x[:0], ranks.group)
    step(torch.compile(alone, backend="aot_eager"), x, None)
    if ranks.rank == 0:
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            assert q.grad is None or same_bits(p.grad, q.grad)
    torch._dynamo.reset()


def on_ranks_buckets_of_ddp_meet_no_amax(ranks: Ranks) -> None:
    """A branch of one rank alone is in high precision, and turns the order of DDP's buckets there."""
    assert shared_amax.own_group(ranks.group, ranks.device) is not ranks.group
    assert shared_amax.own_group(ranks.group, ranks.device) is shared_amax.own_group(ranks.group, ranks.device)
    ids = [ranks.rank] if ranks.device.type == "cuda" else None
    model = DistributedDataParallel(net(ranks), device_ids=ids, find_unused_parameters=True, bucket_cap_mb=0.001)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for turn in range(3):
        x = values((16, 16, 6, 6), seed=10 * turn + ranks.rank).to(ranks.device)
        optimizer.zero_grad()
        step(model, x, ranks.group, condition=ranks.rank == 0)
        optimizer.step()
    for p in model.parameters():
        everybody = [torch.empty_like(p) for _ in range(ranks.world)]
        dist.all_gather(everybody, p.detach().contiguous())
        assert all(same_bits(everybody[0], other) for other in everybody)


def on_ranks_at_different_layers_all_raise(ranks: Ranks) -> None:
    first, x = ranks.rank == 0, values((16, 16, 6, 6), seed=ranks.rank).to(ranks.device)
    turned, alone = ({"turned": first}, ("a.weight", "b.weight")), ({"extra": first}, ("extra.weight", "head.weight"))
    for branch, named in (turned, alone):
        with pytest.raises(RuntimeError, match="amaxes of different layers") as error:
            step(net(ranks), x, ranks.group, **branch)
        assert all(name in str(error.value) for name in named), error.value
    # Outside of modules there are no names, and sizes are compared.
    weights = [values((n, 16), seed=n).to(ranks.device).requires_grad_() for n in (16, 32)]
    with pytest.raises(RuntimeError, match=r"this one is at input of a layer with a weight \((16|32), 1, 16\)"):
        with nv.nvfp4_autocast(PLAIN, amax_reduction_group=ranks.group):
            nn.functional.linear(x[..., 0, 0], weights[ranks.rank % 2])
    # The ranks have all left together, and can go on.
    step(net(ranks), x, ranks.group)


test_on_ranks = ranks_test(globals())


def test_a_gpu_s_answer_is_looked_at_when_it_has_come(monkeypatch):
    class Event:
        arrived = False

        def __init__(self, device: Any) -> None:
            pass

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return Event.arrived

    monkeypatch.setattr(torch, "Event", Event)
    later = shared_amax.Later()
    right, wrong = shared_amax._tags("a.weight", "input", torch.device("cpu")), torch.tensor([1, -1, 5, -4])
    for seen in (right, wrong):
        later.add(seen, "input, 'a.weight'")
    later.look()
    assert later.waits
    Event.arrived = True
    with pytest.raises(RuntimeError, match="this one is at input, 'a.weight'"):
        later.look()
    assert not later.waits
