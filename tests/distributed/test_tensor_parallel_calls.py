"""Tensor-parallel layers at work: bytes on the wire, seeds, blocks, FSDP2, observers, DTensors, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import te_nvfp4_cv as nv
from te_nvfp4_cv.distributed import collectives
from te_nvfp4_cv.layer import observe
from te_nvfp4_cv.ops.block_scales import FORMATS
from te_nvfp4_cv.ops.quantize import rounding_seeds
from tests.distributed.launch import Ranks, ranks_test, two_ranks
from tests.distributed.sharing import COLUMNS, PLAIN, ROWS, check, mesh, part, quiet, recorded, run
from tests.helpers import relative_error, same_bits, values

# ---- what crosses ranks ---------------------------------------------------------------------------------------------


def on_ranks_bytes_on_the_wire(ranks: Ranks) -> list[float]:
    """Per face of the exchanged operand, against bf16; counted by collectives.py and at torch.distributed."""
    w = ranks.world
    x = values((16 * w, 32 * w, 8, 8), seed=1, dtype=torch.bfloat16)
    dy, amaxes, ratios = x.clone(), 64, []
    high = x.numel() * 2 * (w - 1) // w
    for style, places, forward in (
        (COLUMNS(input_layouts=Shard(0)), (Shard(0), Shard(1)), True),
        (ROWS(output_layouts=Shard(0)), (Shard(1), Shard(0)), False),
    ):
        layer = nn.Conv2d(32 * w, 32 * w, 3, padding=1).bfloat16()
        model = parallelize_module(nn.Sequential(layer), mesh(ranks), {"0": style}).to(ranks.device)
        mine = part(x, places[0], ranks).to(ranks.device).requires_grad_()
        with gathers_counted() as counted, collectives.wire_bytes() as wire:
            with nv.nvfp4_autocast(PLAIN):
                y = model(mine)
            in_forward = wire.received
            y.backward(part(dy, places[1], ranks).to(ranks.device))
        faces = [in_forward, wire.received - in_forward] if forward else [wire.received - in_forward]
        faces = faces if forward else [faces[0] / 2] * 2
        assert all(0.28 <= face / high <= 0.29 for face in faces), (faces, high)
        assert len(counted) == 2 and abs(sum(counted) - sum(faces)) <= amaxes
        ratios += [face / high for face in faces]
    return ratios


@contextmanager
def gathers_counted() -> Iterator[list[int]]:
    """Bytes that arrive from others in each all-gather called inside."""
    received: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_into_tensor", "all_gather_single"):
            real = getattr(dist, name, None)

            def counted(*args: Any, real: Any = real, **kwargs: Any) -> Any:
                assert args[0].dtype == torch.uint8
                received.append(args[0].nbytes - args[1].nbytes)
                return real(*args, **kwargs)

            if real is not None:
                patch.setattr(dist, name, counted)
        yield received


def on_ranks_backward_keeps_its_part_of_x(ranks: Ranks) -> None:
    w = ranks.world
    x = values((16, 16 * w, 4, 4), seed=1).to(ranks.device)
    model = parallelize_module(nn.Conv2d(16 * w, 16 * w, 3), mesh(ranks), COLUMNS(input_layouts=Shard(0)))
    with nv.nvfp4_autocast(PLAIN):
        y = model.to(ranks.device)(x)
    kept = [t for t in y.grad_fn.saved_tensors if t is not None and t.dtype == torch.uint8]
    assert sum(t.nbytes for t in kept) <= 0.57 * (x.numel() + model.weight.to_local().numel())


# ---- stochastic rounding --------------------------------------------------------------------------------------------


def on_ranks_seeds_agree_where_ranks_hold_the_same_gradient(ranks: Ranks) -> None:
    w = ranks.world
    recipe, x = nv.NVFP4BlockScaling(), values((16, 16 * w, 4, 4), seed=1).to(ranks.device)
    layer = nn.Conv2d(16 * w, 16 * w, 3, padding=1).to(ranks.device)
    dy = values((16, 16 * w, 4, 4), seed=5).to(ranks.device)
    model = parallelize_module(nn.Sequential(copy.deepcopy(layer)), mesh(ranks), {"0": ROWS()})
    assert rounding_seeds.stream() == 0
    torch.manual_seed(4)
    y, dx, grads = run(layer, x, dy, recipe)
    torch.manual_seed(4)
    got = run(model, part(x, Shard(1), ranks), dy, recipe)
    assert same_bits(got[1], part(dx, Shard(1), ranks))
    assert same_bits(got[2]["0.weight"].full_tensor(), grads["weight"])
    torch.manual_seed(5)
    other = run(model, part(x, Shard(1), ranks), dy, recipe)
    assert not same_bits(got[1], other[1])


def on_ranks_parts_of_a_gradient_are_rounded_by_different_numbers(ranks: Ranks) -> None:
    w, recipe = ranks.world, nv.NVFP4BlockScaling()
    x = values((16, 16 * w, 3, 3), seed=1).to(ranks.device)
    model = parallelize_module(nn.Sequential(nn.Conv2d(16 * w, 16 * w, 1)), mesh(ranks), {"0": COLUMNS()})
    model[0].weight.data.copy_(DTensor.from_local(torch.ones_like(model[0].weight.to_local()), mesh(ranks), [Shard(0)]))
    dy = values((16, 16, 3, 3), seed=5).to(ranks.device)  # the same values on every rank
    with recorded() as seen:
        run(model.to(ranks.device), x, dy, recipe)
    mine = seen["dgrad"][0].clone()
    parts = [torch.empty_like(mine) for _ in range(w)]
    dist.all_gather(parts, mine)
    assert all(not same_bits(parts[0], p) for p in parts[1:])
    # and where the parts travel, all ranks get the same codes
    model = parallelize_module(
        nn.Sequential(nn.Conv2d(16 * w, 16, 1)), mesh(ranks), {"0": ROWS(output_layouts=Shard(0))}
    )
    with recorded() as seen:
        run(model.to(ranks.device), values((16 * w, 16, 3, 3)).to(ranks.device), dy, recipe)
    mine = seen["dgrad"][0].clone()
    parts = [torch.empty_like(mine) for _ in range(w)]
    dist.all_gather(parts, mine)
    assert all(same_bits(parts[0], p) for p in parts)


def on_ranks_streams_follow_a_mesh_of_data_and_tensor_ranks(ranks: Ranks) -> None:
    if ranks.world < 4:
        return
    both = init_device_mesh(ranks.device.type, (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(nn.Linear(32, 32), both["tp"], ROWS())
    try:
        assert rounding_seeds.stream() == ranks.rank // 2 * 2
        with pytest.raises(ValueError, match="mesh"):
            COLUMNS()._apply(nn.Linear(32, 32), both)
    finally:
        parallelize_module(nn.Linear(32 * ranks.world, 32), mesh(ranks), ROWS())
    assert rounding_seeds.stream() == 0


# ---- networks, precision, places ------------------------------------------------------------------------------------


def on_ranks_a_block_trains_as_it_does_unsharded(ranks: Ranks) -> None:
    w = ranks.world
    block = nn.Sequential(
        nn.Conv2d(32, 16 * w, 3, padding=1), nn.ReLU(), nn.Conv2d(16 * w, 32, 3, padding=1, bias=False)
    ).to(ranks.device)
    plan = {"0": COLUMNS(input_layouts=Shard(0)), "2": ROWS(output_layouts=Shard(0))}
    for recipe in (PLAIN, nv.NVFP4BlockScaling(disable_stochastic_rounding=True, tensor_scale="delayed")):
        one, many = copy.deepcopy(block), parallelize_module(copy.deepcopy(block), mesh(ranks), plan)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (one, many)]
        for step in range(3):
            x = values((16 * w, 32, 4, 4), seed=step).to(ranks.device)
            losses = []
            for model, mine, optimizer in ((one, x, optimizers[0]), (many, part(x, Shard(0), ranks), optimizers[1])):
                with nv.nvfp4_autocast(recipe):
                    loss = (model(mine) - mine).square().sum()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
            dist.all_reduce(losses[1])
            assert relative_error(losses[1], losses[0]) <= 1e-4, (recipe, step)
        state = many.state_dict()
        assert list(state) == list(one.state_dict())
        for name, value in one.state_dict().items():
            assert relative_error(state[name].full_tensor(), value) <= 2e-2, name
        many.load_state_dict({name: t.clone() for name, t in state.items()})
        assert nv.saturated_blocks(many).keys() == nv.saturated_blocks(one).keys()
        nv.extra_state(many, load=nv.extra_state(many))
        with torch.no_grad(), nv.nvfp4_autocast(recipe):
            assert many(part(x, Shard(0), ranks)).shape == (16, 32, 4, 4)
        assert isinstance(copy.deepcopy(many)[0].weight, DTensor)


def on_ranks_with_fsdp2_on_a_mesh_of_data_and_tensor_ranks(ranks: Ranks) -> None:
    if ranks.world < 4:
        return
    both = init_device_mesh(ranks.device.type, (2, 2), mesh_dim_names=("dp", "tp"))
    block = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 32, 1)).to(ranks.device)
    plan = {"0": COLUMNS(input_layouts=Shard(0)), "2": ROWS(output_layouts=Shard(0))}
    model = parallelize_module(copy.deepcopy(block), both["tp"], plan)
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=both["dp"])
    x, dy = (values((64, 32, 3, 3), seed=s).to(ranks.device) for s in (1, 2))
    halves = [run(block, x[i : i + 32], dy[i : i + 32], PLAIN) for i in (0, 32)]  # gradients add up
    mine = slice(16 * ranks.rank, 16 * ranks.rank + 16)
    y, dx, grads = run(model, x[mine], dy[mine], PLAIN)
    half, part_ = halves[ranks.rank // 2], slice(16 * (ranks.rank % 2), 16 * (ranks.rank % 2) + 16)
    assert relative_error(y, half[0][part_]) <= 1e-5 and relative_error(dx, half[1][part_]) <= 1e-5
    for name, grad in grads.items():
        assert relative_error(grad.full_tensor(), halves[1][2][name] / 2) <= 1e-5, name
    parallelize_module(nn.Linear(32 * ranks.world, 32), mesh(ranks), ROWS())  # its stream again


@two_ranks
def on_ranks_torch_compile_leaves_the_layers_out(ranks: Ranks) -> None:
    w = ranks.world
    block = nn.Sequential(nn.Linear(16 * w, 16 * w), nn.GELU(), nn.Linear(16 * w, 16 * w))
    model = parallelize_module(block, mesh(ranks), {"0": COLUMNS(), "2": ROWS()}).to(ranks.device)
    x, dy = (values((16, 16 * w), seed=s).to(ranks.device) for s in (1, 2))
    first = run(model, x, dy, PLAIN)[:2]
    second = run(torch.compile(model, backend="eager"), x, dy, PLAIN)[:2]
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def on_ranks_high_precision_is_torchs(ranks: Ranks) -> None:
    w = ranks.world
    x = values((16 * w, 8 * w), seed=1).to(ranks.device)
    dy = values((16 * w, 4 * w), seed=2).to(ranks.device)
    layer = nn.Linear(8 * w, 4 * w).to(ranks.device)
    for ours, torchs, places in (
        (COLUMNS, ColwiseParallel, (Shard(0), Shard(1))),
        (COLUMNS, ColwiseParallel, (Replicate(), Shard(0))),
        (COLUMNS, ColwiseParallel, (Shard(1), Replicate())),
        (ROWS, RowwiseParallel, (Shard(1), Shard(0))),
        (ROWS, RowwiseParallel, (Replicate(), Replicate())),
        (ROWS, RowwiseParallel, (Shard(0), Shard(1))),
    ):
        results = []
        for style, recipe in ((torchs, None), (ours, None), (ours, "off"), (ours, PLAIN)):  # thin: also in NVFP4's
            plan = style(input_layouts=places[0], output_layouts=places[1])
            model = parallelize_module(nn.Sequential(copy.deepcopy(layer)), mesh(ranks), {"0": plan})
            with nv.nvfp4_autocast(enabled=False) if recipe == "off" else nullcontext():
                args = (part(x, places[0], ranks), part(dy, places[1], ranks))
                y, dx, grads = run(model, *args, None if recipe == "off" else recipe)
            results.append((y, dx, *(g.full_tensor() for g in grads.values())))
        for other in results[1:]:
            assert all(relative_error(a, b) <= 1e-6 for a, b in zip(other, results[0], strict=True)), places
    for layer, shape in (
        (nn.Conv2d(3 * w, 4 * w, 3, padding=1), (w, 3 * w, 5, 5)),
        (nn.ConvTranspose2d(3 * w, 4 * w, 2, 2), (w, 3 * w, 5, 5)),
        (nn.Conv1d(3 * w, 4 * w, 3, padding=1, padding_mode="reflect"), (w, 3 * w, 5)),
    ):
        for recipe in (None, PLAIN):
            x = values(shape, seed=1)
            check(layer, COLUMNS(input_layouts=Shard(0)), x, ranks, (Shard(0), Shard(1)), recipe, operands=False)
            check(layer, ROWS(output_layouts=Shard(0)), x, ranks, (Shard(1), Shard(0)), recipe, operands=False)
            check(layer, ROWS(), x, ranks, (Shard(1), Replicate()), recipe, operands=False)


def on_ranks_what_observers_are_told(ranks: Ranks) -> None:
    w = ranks.world
    model = parallelize_module(
        nn.Sequential(nn.Conv2d(16 * w, 16 * w, 1), nn.Conv2d(16 * w, 8 * w, 1), nn.Conv2d(8 * w, 16, 1)),
        mesh(ranks),
        {"0": COLUMNS(output_layouts=Replicate()), "1": COLUMNS(), "2": ROWS()},
    ).to(ranks.device)
    x = values((16, 16 * w, 2, 2)).to(ranks.device)
    report = {row.name: row for row in nv.coverage(model, x).rows}
    assert report["0"].nvfp4 and not report["1"].nvfp4 and not report["2"].nvfp4
    assert "8 out-channels" in report["1"].reason and "8 in-channels" in report["2"].reason
    nv.set_precision(model, {"0": None})
    assert "set_precision" in {r.name: r for r in nv.coverage(model, x).rows}["0"].reason
    calls_seen: list[observe.Call] = []
    nv.set_precision(model, {"0": PLAIN})
    with nv.nvfp4_autocast(), observe.observe(lambda call: calls_seen.append(call)):
        model(x)
    assert [call.recipe is not None for call in calls_seen] == [True, False, False]
    assert calls_seen[0].weight is model[0].weight and calls_seen[0].recipe == PLAIN
    thin = nv.NVFP4Conv2d(16 * w, 8 * w, 1)
    parallelize_module(thin, mesh(ranks), COLUMNS())
    with pytest.raises(ValueError, match="8 out-channels.*\n.*each of"):
        thin.to(ranks.device)(x)


def on_ranks_tensors_that_are_dtensors(ranks: Ranks) -> None:
    w = ranks.world
    layer = nn.Linear(16 * w, 16 * w).to(ranks.device)
    x, dy = (values((16 * w, 16 * w), seed=s).to(ranks.device) for s in (1, 2))
    y, dx, grads = run(copy.deepcopy(layer), x, dy, PLAIN)
    for style, place in ((COLUMNS(use_local_output=False), Shard(1)), (ROWS(use_local_output=False), Replicate())):
        for given in (Shard(0), Shard(1), Replicate()):
            model = parallelize_module(nn.Sequential(copy.deepcopy(layer)), mesh(ranks), {"0": style})
            mine = distribute_tensor(x, mesh(ranks), [given]).requires_grad_()
            with quiet(), nv.nvfp4_autocast(PLAIN):
                out = model(mine)
            assert isinstance(out, DTensor) and out.placements == (place,)
            out.backward(distribute_tensor(dy, mesh(ranks), [place]))
            assert relative_error(out.detach().full_tensor(), y) <= 1e-5
            assert relative_error(mine.grad.full_tensor(), dx) <= 1e-5
            for name, g in grads.items():
                assert relative_error(model[0].get_parameter(name).grad.full_tensor(), g) <= 1e-5


def on_ranks_a_nan_anywhere_reaches_every_rank(ranks: Ranks) -> None:
    w = ranks.world
    layer = nn.Conv2d(16 * w, 16 * w, 3, padding=1)
    for bad in ("nan", "inf"):
        x = values((16 * w, 16 * w, 3, 3), bad, seed=1).to(ranks.device)
        for style, places in (
            (COLUMNS(input_layouts=Shard(0)), (Shard(0), Shard(1))),
            (ROWS(output_layouts=Shard(0)), (Shard(1), Shard(0))),
        ):
            model = parallelize_module(nn.Sequential(copy.deepcopy(layer)), mesh(ranks), {"0": style}).to(ranks.device)
            y, dx, grads = run(model, part(x, places[0], ranks), part(values(tuple(x.shape)), places[1], ranks), PLAIN)
            assert not y.isfinite().any() and not grads["0.weight"].to_local().isfinite().any()
            assert dx.isfinite().all()


def on_ranks_frozen_weights_checkpoints_and_accumulation(ranks: Ranks) -> None:
    w = ranks.world
    x, dy = (values((16 * w, 16 * w), seed=s).to(ranks.device) for s in (1, 2))
    model = parallelize_module(nn.Sequential(nn.Linear(16 * w, 16 * w)), mesh(ranks), {"0": COLUMNS()}).to(ranks.device)
    mine = part(dy, Shard(1), ranks)
    first = run(model, x, mine, PLAIN)[2]["0.weight"].to_local().clone()
    with nv.frozen_weights(model):
        second = run(model, x, mine, PLAIN)[2]["0.weight"].to_local()
    assert relative_error(second, 2 * first) <= 1e-6
    model.zero_grad()
    again = x.detach().requires_grad_()
    with nv.nvfp4_autocast(PLAIN):
        checkpoint(model, again, use_reentrant=False).backward(mine)
    assert same_bits(model[0].weight.grad.to_local(), first)
    with nv.nvfp4_autocast(PLAIN):
        y = model(again)
    with pytest.raises(RuntimeError, match="differentiated again"):
        torch.autograd.grad(torch.autograd.grad(y.sum(), again, create_graph=True)[0].sum(), again)


def on_ranks_what_is_refused(ranks: Ranks) -> None:
    w = ranks.world
    for module, why in (
        (nn.Conv2d(16 * w, 16 * w, 1, groups=w), "groups"),
        (nn.Linear(16, 16 * w + 1), "do not divide"),
        (nn.LayerNorm(16), "cannot be shared out"),
        (type("Own", (nn.Linear,), {})(16 * w, 16 * w), "cannot be shared out"),
    ):
        with pytest.raises(ValueError, match=f"ColwiseParallel.*{why}[\\s\\S]*got:[\\s\\S]*needs:[\\s\\S]*fix:"):
            parallelize_module(module, mesh(ranks), COLUMNS())
    layer = parallelize_module(nn.Linear(16 * w, 16 * w), mesh(ranks), ROWS())
    with pytest.raises(ValueError, match="cannot be shared out"):
        parallelize_module(layer, mesh(ranks), ROWS())
    x = values((16, 16)).to(ranks.device)
    row_scaled = nv.NVFP4BlockScaling(row_scaled_activation=True, disable_rht=True)
    with pytest.raises(ValueError, match="cannot be shared"), nv.nvfp4_autocast(row_scaled):
        layer.to(ranks.device)(x)
    for name in FORMATS:
        refused = pytest.raises(ValueError, match=f"tensor_parallel linear: no form[\\s\\S]*block_format='{name}'")
        with refused, nv.nvfp4_autocast(nv.NVFP4BlockScaling(block_format=name)):
            layer(x)
    delayed = nv.NVFP4BlockScaling(tensor_scale="delayed")
    with pytest.raises(ValueError, match="one group"), nv.nvfp4_autocast(delayed, amax_reduction_group=ranks.group):
        layer(x)
    with nv.nvfp4_autocast(PLAIN, amax_reduction_group=ranks.group):
        layer(x).sum().backward()
    embedding = parallelize_module(nn.Embedding(8, 16 * w), mesh(ranks), COLUMNS()).to(ranks.device)
    assert embedding(torch.zeros(2, dtype=torch.int64, device=ranks.device)).shape == (2, 16)


MESHES = ("streams_follow_a_mesh_of_data_and_tensor_ranks", "with_fsdp2_on_a_mesh_of_data_and_tensor_ranks")
test_on_ranks = ranks_test(globals(), four=(*MESHES, "bytes_on_the_wire"))
