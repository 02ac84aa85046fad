"""Marks of weights that FSDP2 gathers in 4 bits: through evaluation, late values and assignment; refused placements."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import te_nvfp4_cv as nv
from te_nvfp4_cv.distributed.fsdp_weight import ShardedWeight
from tests.distributed.launch import Ranks, ranks_test, two_ranks
from tests.helpers import relative_error, same_bits, values

NO_SR = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(32, 32, 3), nn.GroupNorm(4, 32), nn.Conv2d(32, 64, 1))


def sharded(model: nn.Module, ranks: Ranks, mark: bool = True, **options: Any) -> Any:
    if mark:
        assert nv.fsdp.quantize_gathers(model, NO_SR) == ["0.weight", "2.weight"]
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    fully_shard(model[0], mesh=mesh, **options)  # type: ignore[index]
    return fully_shard(model, mesh=mesh)


def step(model: nn.Module, ranks: Ranks) -> Tensor:
    with nv.nvfp4_autocast(NO_SR):
        loss = model(values((4, 32, 6, 6), seed=ranks.rank).to(ranks.device)).square().mean()
    loss.backward()
    return loss.detach()


def is_marked(parameter: Any) -> bool:
    return isinstance(getattr(parameter, "_local_tensor", parameter), ShardedWeight)


@two_ranks
def on_ranks_training_goes_on_after_inference_mode(ranks: Ranks) -> None:
    model = sharded(net().to(ranks.device), ranks)
    before = step(model, ranks)
    with torch.inference_mode(), nv.nvfp4_autocast(NO_SR):
        model(values((4, 32, 6, 6), seed=ranks.rank).to(ranks.device))
    assert same_bits(step(model, ranks), before)


@two_ranks
def on_ranks_a_model_without_values_keeps_its_marks(ranks: Ranks) -> None:
    expected = step(sharded(net().to(ranks.device), ranks), ranks)
    with torch.device("meta"):
        model = net()
    model = sharded(model, ranks)
    place = model.state_dict()
    whole = {name: value.to(ranks.device) for name, value in net().state_dict().items()}
    parts = {n: distribute_tensor(v, place[n].device_mesh, place[n].placements) for n, v in whole.items()}
    model.load_state_dict({n: nn.Parameter(v) for n, v in parts.items()}, assign=True)
    assert is_marked(model[0].weight) and is_marked(model[2].weight)
    assert same_bits(step(model, ranks), expected)
    assert not any(is_marked(entry) for entry in model.state_dict().values())
    with torch.device("meta"):
        model = net()
    model = sharded(model, ranks)
    model.to_empty(device=ranks.device)
    assert is_marked(model[0].weight) and isinstance(model[0].weight, DTensor)


@two_ranks
def on_ranks_an_empty_batch_reads_no_weight(ranks: Ranks) -> None:
    from te_nvfp4_cv.errors import _warned

    model, alone = sharded(net().to(ranks.device), ranks), net().to(ranks.device)
    _warned.clear()
    x = values((4, 32, 6, 6), seed=1).to(ranks.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "nvfp4")
        for _ in range(2):
            with nv.nvfp4_autocast(NO_SR):
                loss = model(x[: 4 * ranks.rank]).square().sum()
            loss.backward()
    with nv.nvfp4_autocast(NO_SR):
        (2 * alone(x).square().sum()).backward()
    for found, expected in zip(model.parameters(), alone.parameters(), strict=True):
        assert relative_error(found.grad.full_tensor(), expected.grad / 2) <= 1e-5  # FSDP2 takes the mean of the ranks


def on_ranks_shards_that_are_no_rows_are_refused_by_name(ranks: Ranks) -> None:
    columns = {"shard_placement_fn": lambda p: Shard(1) if p.dim() == 4 else Shard(0)}
    cases = [(columns, r"a shard \(32, \d+, 3, 3\) of")]
    if ranks.world == 4:
        cases.append(({"reshard_after_forward": 2}, "reshard_after_forward=2 on 4 ranks"))
    for options, got in cases:
        with pytest.raises(RuntimeError, match=f"'0.weight' cannot be gathered.*\n.*{got}"):
            step(sharded(net().to(ranks.device), ranks, **options), ranks)


test_on_ranks = ranks_test(globals(), four=("shards_that_are_no_rows_are_refused_by_name",))


@pytest.mark.filterwarnings("ignore:nvfp4")  # of the other layer
def test_an_assigned_weight_of_another_kind_loses_its_mark_with_a_warning():
    model = net()
    nv.fsdp.quantize_gathers(model, NO_SR)
    model.load_state_dict(net().bfloat16().state_dict(), assign=True)
    assert is_marked(model[0].weight.data) and model[0].weight.dtype == torch.bfloat16
    with torch.inference_mode():  # whose views of a weight are no tensors of that mode
        assert not model[0].weight.detach().is_inference()
    with pytest.warns(UserWarning, match="'0.weight', .* is gathered in high precision"):
        model.load_state_dict(net().double().state_dict(), assign=True)
    assert not is_marked(model[0].weight.data)
