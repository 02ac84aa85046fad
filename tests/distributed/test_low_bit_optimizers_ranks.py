"""Optimizers with states of 8 and 4 bits under DDP and FSDP2: the bits of one process that has the ranks' batches.

Their states have one scale for 256 numbers. Rows of a weight on two ranks are whole such blocks here, so that sharded
states are those of the whole weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import te_nvfp4_cv as nv
from te_nvfp4_cv import fsdp
from tests.distributed.launch import Ranks, ranks_test, two_ranks
from tests.helpers import same_bits, values
from tests.low_bit_optimizers import SHARES, build, eagerly, state_bytes

NO_SR = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)
AVAILABLE = [name for name in SHARES if build(name) is not None]


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(64, 64, 3, stride=2, bias=False)]
    # Half of each weight is 4,096 values or more: smaller ones keep fp32 states.
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 128, bias=False))


def loss_of(net: nn.Module, rank: int, step: int) -> Tensor:
    with nv.nvfp4_autocast(NO_SR):
        return net(values((16, 32, 6, 6), seed=10 * step + rank)).square().mean()


def of_one_process(make: Callable[..., Any], ranks: Ranks) -> nn.Module:
    net = network()
    optimizer = make(net.parameters())
    for step in range(3):
        optimizer.zero_grad()
        for rank in range(ranks.world):
            (loss_of(net, rank, step) / ranks.world).backward()
        with eagerly():
            optimizer.step()
    return net


def train(net: nn.Module, optimizer: Any, ranks: Ranks) -> None:
    for step in range(3):
        optimizer.zero_grad()
        loss_of(net, ranks.rank, step).backward()
        with eagerly():
            optimizer.step()


@two_ranks
def on_ranks_ddp(ranks: Ranks) -> None:
    for name in AVAILABLE:
        make: Any = build(name)
        net = DistributedDataParallel(network())
        train(net, make(net.parameters()), ranks)
        for p, q in zip(net.parameters(), of_one_process(make, ranks).parameters(), strict=True):
            assert same_bits(p.detach(), q.detach()), name


@two_ranks
def on_ranks_fsdp2_with_weights_gathered_in_4_bits(ranks: Ranks) -> None:
    for name in AVAILABLE:
        make: Any = build(name)
        if name.startswith("bitsandbytes"):  # knows no DTensor
            continue
        net = network()
        assert len(fsdp.quantize_gathers(net, NO_SR)) == 3
        fully_shard(net, mesh=init_device_mesh("cpu", (ranks.world,)))
        optimizer = make(net.parameters())
        train(net, optimizer, ranks)
        whole = sum(8 * p.numel() for p in network().parameters())
        assert state_bytes(optimizer) < SHARES[name] * whole / ranks.world, name
        for entry, q in zip(net.state_dict().values(), of_one_process(make, ranks).parameters(), strict=True):
            assert isinstance(entry, DTensor) and same_bits(entry.full_tensor(), q.detach()), name


if AVAILABLE:
    test_on_ranks = ranks_test(globals(), worlds=(2,))
else:

    @pytest.mark.skip(reason="neither torchao nor bitsandbytes is installed")
    def test_on_ranks() -> None:
        """Skipped."""
