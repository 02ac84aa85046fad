"""Experts on several ranks: rows that travel as codes, and weights [E, O, C] that FSDP2 gathers in 4 bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import te_nvfp4_cv as nv
from te_nvfp4_cv import formats
from te_nvfp4_cv.distributed.collectives import wire_bytes
from te_nvfp4_cv.distributed.fsdp_weight import GatheredWeight
from te_nvfp4_cv.ops.quantize import reference_matrix
from tests.distributed.launch import Ranks, ranks_test
from tests.helpers import same_bits, values

NO_SR = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)
CHANNELS = 72  # the last block of a row is padded


def rows_of(rank: int, world: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[int]]:
    """Return a rank's rows and how many go where; the last rank has none, and the rest send none to the first."""
    sizes = [0 if to == 0 and rank else 5 + 3 * rank + to for to in range(world)] if rank < world - 1 else [0] * world
    return values((sum(sizes), CHANNELS), dtype=dtype, seed=rank) * (rank + 1), sizes


def exchanged(ranks: Ranks, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the rows that come to this rank, in high precision."""
    parts = [rows_of(rank, ranks.world, dtype) for rank in range(ranks.world)]
    return torch.cat([x.split(sizes)[ranks.rank] for x, sizes in parts])


def quantized(x: Tensor, amax: Tensor) -> Tensor:
    """Return the values of x's codes: the specification, on one process."""
    padded = nn.functional.pad(x, (0, -x.shape[1] % 16))
    made = reference_matrix.quantize_2d(padded, rowwise=True, amax_rowwise=amax)
    return formats.dequantize(made.row_data, made.row_scale, made.row_amax)[:, : x.shape[1]].to(x.dtype)


def on_ranks_codes_are_those_of_quantizing_after_the_exchange(ranks: Ranks) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, sizes = rows_of(ranks.rank, ranks.world, dtype)
        whole = torch.cat([rows_of(rank, ranks.world, dtype)[0] for rank in range(ranks.world)])
        rows, received = nv.distributed.dispatch(x.to(ranks.device), sizes, ranks.group)
        here = exchanged(ranks, dtype)
        assert sum(received) == len(here) and same_bits(rows.cpu(), quantized(here, whole.abs().amax().float().view(1)))


def on_ranks_a_grouped_layer_has_the_bits_of_an_exchange_in_high_precision(ranks: Ranks) -> None:
    """Fprop of the experts, with the ranks' shared amax of x."""
    for dtype in (torch.float32, torch.bfloat16):
        x, sizes = rows_of(ranks.rank, ranks.world, dtype)
        layer = nv.NVFP4GroupedLinear(3, CHANNELS, 32, dtype=dtype).to(ranks.device)
        results = []
        for rows in (nv.distributed.dispatch(x.to(ranks.device), sizes, ranks.group)[0], exchanged(ranks, dtype)):
            offsets = torch.tensor([len(rows) // 3, len(rows) // 2, len(rows)], device=ranks.device)
            with nv.nvfp4_autocast(NO_SR, amax_reduction_group=ranks.group):
                results.append(layer(rows.to(ranks.device), offsets))
        assert same_bits(*(y.detach() for y in results))


def on_ranks_bytes_and_the_way_back(ranks: Ranks) -> None:
    x = values((48 * ranks.world, 256), dtype=torch.bfloat16, seed=ranks.rank).to(ranks.device).requires_grad_()
    with wire_bytes() as wire:
        rows, received = nv.distributed.dispatch(x, [48] * ranks.world, ranks.group, NO_SR)
    assert wire.received <= 0.29 * 2 * 256 * 48 * (ranks.world - 1)
    back = nv.distributed.combine(rows * 2, received, ranks.group)
    assert same_bits(back, 2 * nv.distributed.combine(rows, received, ranks.group))
    with wire_bytes() as wire:
        back.backward(dy := values(tuple(x.shape), dtype=torch.bfloat16, seed=7 + ranks.rank).to(ranks.device))
    # combine's gradient travels in high precision, dispatch's as codes
    assert wire.received <= 1.29 * 2 * 256 * 48 * (ranks.world - 1)
    all_dy = [values(tuple(x.shape), dtype=torch.bfloat16, seed=7 + rank) * 2 for rank in range(ranks.world)]
    amax = torch.stack(all_dy).abs().amax().float().view(1)
    assert x.grad is not None and same_bits(x.grad.cpu(), quantized((dy * 2).cpu(), amax))


def on_ranks_bad_sizes_raise_everywhere(ranks: Ranks) -> None:
    x, sizes = torch.zeros(4, 32, device=ranks.device), [4] + [0] * (ranks.world - 1)
    wrong = sizes if ranks.rank else [3] + sizes[1:]
    with pytest.raises(ValueError, match="rank 0" if ranks.rank else r"sizes \[3, 0"):
        nv.distributed.dispatch(x, wrong, ranks.group)
    with pytest.raises(ValueError, match="without 4over6"):
        recipe = nv.NVFP4BlockScaling(nvfp4_4over6="all", disable_rht=True)
        nv.distributed.dispatch(x, sizes, ranks.group, recipe)
    with pytest.raises(ValueError, match="block_format='mxfp4'"):
        nv.distributed.dispatch(x, sizes, ranks.group, nv.NVFP4BlockScaling(block_format="mxfp4"))
    x[1, 1] = torch.nan if ranks.rank == 0 else 0.0
    rows, _ = nv.distributed.dispatch(x, sizes, ranks.group)
    assert bool(rows.isnan().all())


def on_ranks_rows_of_different_kinds_raise_everywhere(ranks: Ranks) -> None:
    first, sizes = ranks.rank == 0, [2] * ranks.world
    rows = torch.ones(2 * ranks.world, 32, device=ranks.device)
    with pytest.raises(ValueError, match=r"of different kinds[\s\S]*bfloat16 on rank 0; \[T, 32\] float32 on rank 1"):
        nv.distributed.combine(rows.bfloat16() if first else rows, sizes, ranks.group)
    with pytest.raises(ValueError, match=r"of different kinds[\s\S]*\[T, 16\] float32 on rank 0; \[T, 32\]"):
        nv.distributed.dispatch(rows[:, :16] if first else rows, sizes, ranks.group)
    # A rank that neither sends nor gets rows may have any.
    none, only = [0] * ranks.world, [0] * (ranks.world - 1) + [2]
    last = ranks.rank == ranks.world - 1
    x = rows[:2] if last else torch.ones(0, 8, dtype=torch.bfloat16, device=ranks.device)
    assert same_bits(nv.distributed.combine(x, only if last else none, ranks.group), x)


def on_ranks_all_take_part_in_backward(ranks: Ranks) -> None:
    x = torch.ones(2 * ranks.world, 32, device=ranks.device, requires_grad=ranks.rank == 0)
    rows, received = nv.distributed.dispatch(x, [2] * ranks.world, ranks.group, NO_SR)
    nv.distributed.combine(rows * 2, received, ranks.group).sum().backward()
    assert (x.grad is not None and same_bits(x.grad, torch.full_like(x, 2))) == (ranks.rank == 0)
    with torch.no_grad():  # nobody trains
        assert not nv.distributed.dispatch(x, received, ranks.group)[0].requires_grad
    x = x.detach().requires_grad_()
    y = nv.distributed.combine(x * x, received, ranks.group).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="trying to differentiate twice"):
        dx.sum().backward()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nv.NVFP4GroupedLinear(4, 32, 24), nv.NVFP4GroupedLinear(4, 24, 32, bias=False)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x, offsets)), offsets)


def on_ranks_fsdp_gathers_experts_in_4_bits(ranks: Ranks) -> None:
    """The same results, and gradients that are the sum of the ranks' ones; 24 rows an expert are a tile and a half."""
    torch.manual_seed(5)
    alone = Model().to(ranks.device)
    model: Any = copy.deepcopy(alone)
    assert nv.fsdp.quantize_gathers(model, NO_SR) == ["up.weight", "down.weight"]
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for layer in (model.up, model.down, model):
        fully_shard(layer, mesh=mesh)
    offsets = torch.tensor([10, 10, 30, 40], device=ranks.device)
    given = [values((40, 32), seed=rank).to(ranks.device) for rank in range(ranks.world)]
    seen: list[Any] = []
    model.up.register_forward_pre_hook(lambda module, args: seen.append(module.weight))
    with nv.nvfp4_autocast(NO_SR):
        y = model(given[ranks.rank], offsets)
    y.sum().backward()
    assert type(seen[0]) is GatheredWeight, type(seen[0])
    assert seen[0]._codes.shape == (4 * 24, 1, 16), seen[0]._codes.shape  # bytes for 32 channels
    with nv.nvfp4_autocast(NO_SR):
        for rank, x in enumerate(given):
            expected = alone(x, offsets)
            assert rank != ranks.rank or same_bits(y.detach(), expected.detach())
            (expected.sum() / ranks.world).backward()
    for ours, theirs in ((model.up, alone.up), (model.down, alone.down)):
        assert torch.allclose(ours.weight.grad.full_tensor(), theirs.weight.grad, rtol=1e-5, atol=1e-6)
        assert same_bits(ours.state_dict()["weight"].full_tensor(), theirs.weight.detach())


test_on_ranks = ranks_test(globals())
