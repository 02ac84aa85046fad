"""FSDP2 with weights gathered in 4 bits: the codes of one process, plain checkpoints, 4 bits on the wire.

The single process runs the ranks' batches one after another and averages their gradients, in the dtype and order of the
collective where that is unique: with two ranks bits are compared.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import te_nvfp4_cv as nv
from te_nvfp4_cv import fsdp
from te_nvfp4_cv.distributed.fsdp_weight import GatheredWeight, ShardedWeight
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.records import PACKED, Face, WeightCodes, WeightLayout, WeightSpec
from tests.distributed.launch import Ranks, ranks_test, two_ranks
from tests.helpers import relative_error, same_bits, values

NO_SR = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)
DELAYED = nv.NVFP4BlockScaling(disable_stochastic_rounding=True, tensor_scale="delayed")


class Block(nn.Module):
    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
        self.norm = nn.GroupNorm(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """64 channels: on 4 ranks whole tiles; 32: half tiles. The stem and the head are too thin."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.first, self.second = Block(64), Block(64, groups=2)
        self.down = nn.Conv2d(64, 32, 3, stride=2)
        self.third = Block(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.down(self.second(self.first(self.stem(x)))))
        return self.head(x.mean((2, 3)))


MARKED = [f"{name}.weight" for name in ("first.conv", "second.conv", "down", "third.conv")]


def net(ranks: Ranks, kind: str = "") -> Net:
    """The network; with a kind, its layers learn a scale or a clipping threshold."""
    torch.manual_seed(1)
    model = Net().to(ranks.device)
    if kind:
        assert len(nv.learn_scales(model, kind)) == len(MARKED)
    return model


def sharded(
    ranks: Ranks, recipe: Any = NO_SR, mesh: Any = None, policy: Any = None, reshard: bool = True, mark: bool = True
) -> Net:
    model = net(ranks)
    if mark:
        assert fsdp.quantize_gathers(model, recipe) == MARKED
    mesh = init_device_mesh(ranks.device.type, (ranks.world,)) if mesh is None else mesh
    options = {"mesh": mesh, "reshard_after_forward": reshard, **({} if policy is None else {"mp_policy": policy})}
    for block in (model.first, model.second, model.third):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def batch(rank: int, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x = values((16, 3, 9, 9), seed=100 * step + rank) * (1.0 + rank)
    return x.to(device), torch.arange(16, device=device) % 10


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor], recipe: Any = NO_SR) -> Tensor:
    with nv.nvfp4_autocast(recipe):
        return nn.functional.cross_entropy(model(data[0]).float(), data[1])


def single(ranks: Ranks, steps: int, recipe: Any = NO_SR) -> tuple[Net, list[list[float]], Any]:
    """One process with the batches of all ranks: (model, losses by step and rank, optimizer)."""
    model = net(ranks)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        losses.append([])
        for rank in range(ranks.world):
            loss = loss_of(model, batch(rank, step, ranks.device), recipe)
            (loss / ranks.world).backward()
            losses[-1].append(loss.item())
        optimizer.step()
    return model, losses, optimizer


def train(model: Any, ranks: Ranks, steps: int, recipe: Any = NO_SR, optimizer: Any = None, start: int = 0) -> Any:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch(ranks.rank, step, ranks.device), recipe)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


def full(model: nn.Module) -> dict[str, Tensor]:
    """The whole state_dict on every rank."""
    return {
        key: (entry.full_tensor() if isinstance(entry, DTensor) else entry) for key, entry in model.state_dict().items()
    }


def watch_codes(model: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """What quantized layers find as their weight's codes, copied, by name; filled by forward passes."""
    seen: dict[str, tuple[Tensor, ...]] = {}
    original = GatheredWeight.codes_for

    def codes_for(self: GatheredWeight, plan: Any) -> WeightCodes:
        found = original(self, plan)
        seen[self.form.name] = tuple(part.clone() for part in found.flat())
        return found

    GatheredWeight.codes_for = codes_for  # type: ignore[method-assign]
    return seen


def codes_of_whole(w: Tensor, groups: int, pow2: bool = False) -> tuple[Tensor, ...]:
    return operand.quantize_weight(w, WeightSpec(groups, PACKED, pow2=pow2), torch.float32, "vendor").flat()


# ---- equal to one process -------------------------------------------------------------------------------------------


def on_ranks_training_equals_one_process(ranks: Ranks) -> None:
    expected, losses, _ = single(ranks, 3)
    model = sharded(ranks)
    found, _ = train(model, ranks, 3)
    wanted = [by_rank[ranks.rank] for by_rank in losses]
    state, reference = full(model), expected.state_dict()
    assert list(state) == list(reference)
    if ranks.world == 2:
        assert found == wanted
        assert all(same_bits(state[key], reference[key]) for key in state)
    else:  # the order of four summands is the collective's
        assert found[0] == wanted[0]
        assert all(abs(a - b) <= 2e-3 * abs(b) for a, b in zip(found, wanted, strict=True))
        assert all(relative_error(state[key], reference[key]) < 2e-2 for key in state)


def on_ranks_plain_fsdp2_learns_scales(ranks: Ranks) -> None:
    """A fraction is one element, the shard of one rank; an older checkpoint has it without axes."""
    for kind in ("scale", "clip"):
        one, many = net(ranks, kind), net(ranks, kind)
        older = {name: t.reshape(()) if t.shape == (1,) else t for name, t in one.state_dict().items()}
        assert sum(not t.dim() for t in older.values()) == len(MARKED)
        many.load_state_dict(older)
        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        for module in (many.first, many.second, many.third, many):
            fully_shard(module, mesh=mesh)
        optimizers = [torch.optim.SGD(model.parameters(), 1e-1) for model in (one, many)]
        for step in range(2):
            for rank in range(ranks.world):
                (loss_of(one, batch(rank, step, ranks.device)) / ranks.world).backward()
            loss_of(many, batch(ranks.rank, step, ranks.device)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        names = [name for name in one.state_dict() if f"weight_{kind}" in name]
        found, wanted = full(many), one.state_dict()
        assert all(found[name].shape == (1,) and found[name] != 1 for name in names)
        assert all(relative_error(found[name], wanted[name]) < 1e-4 for name in wanted), kind


def on_ranks_codes_are_those_of_the_whole_weight(ranks: Ranks) -> None:
    for recipe, pow2 in ((NO_SR, False), (DELAYED, True)):
        model = sharded(ranks, recipe)
        before = full(model)
        seen = watch_codes(model)
        loss_of(model, batch(ranks.rank, 0, ranks.device), recipe)
        assert sorted(seen) == sorted(MARKED)
        for name in MARKED:
            expected = codes_of_whole(before[name], 2 if name == "second.conv.weight" else 1, pow2)
            assert all(same_bits(a, b) for a, b in zip(seen[name], expected, strict=True)), name


def on_ranks_every_way_of_resharding_gives_the_same(ranks: Ranks) -> None:
    results = [train(sharded(ranks, reshard=reshard), ranks, 2)[0] for reshard in (True, False)]
    assert results[0] == results[1]


def on_ranks_nan_in_one_shard_reaches_all(ranks: Ranks) -> None:
    model = sharded(ranks)
    if ranks.rank == 1:
        with torch.no_grad():
            model.first.conv.weight.to_local().plain.view(-1)[0] = float("nan")
    assert not loss_of(model, batch(ranks.rank, 0, ranks.device)).isfinite()


# ---- mixed precision, accumulation ----------------------------------------------------------------------------------


def on_ranks_mixed_precision_quantizes_what_is_stored(ranks: Ranks) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(ranks, policy=policy)
    before, seen = full(model), watch_codes(model)
    losses, _ = train(model, ranks, 3)
    assert all(loss < 10 for loss in losses) and all(entry.dtype == torch.float32 for entry in full(model).values())
    model = sharded(ranks, policy=policy)
    loss_of(model, batch(ranks.rank, 0, ranks.device))
    expected = codes_of_whole(before["first.conv.weight"], 1)  # the fp32 shards, not their bf16 cast
    assert all(same_bits(a, b) for a, b in zip(seen["first.conv.weight"], expected, strict=True))


def on_ranks_gradient_accumulation(ranks: Ranks) -> None:
    """Two batches, synchronized once, against one process with all of them."""
    model, reference = sharded(ranks), net(ranks)
    model.set_requires_gradient_sync(False)
    loss_of(model, batch(ranks.rank, 0, ranks.device)).backward()
    model.set_requires_gradient_sync(True)
    loss_of(model, batch(ranks.rank, 1, ranks.device)).backward()
    for rank in range(ranks.world):
        for step in range(2):
            (loss_of(reference, batch(rank, step, ranks.device)) / ranks.world).backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert relative_error(p.grad.full_tensor(), q.grad) < 1e-5, name


def on_ranks_gradient_clipping_and_checkpointing(ranks: Ranks) -> None:
    from torch.utils.checkpoint import checkpoint

    plain, again = sharded(ranks), sharded(ranks)
    loss_of(plain, batch(ranks.rank, 0, ranks.device)).backward()
    forward = again.first.forward
    again.first.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    loss_of(again, batch(ranks.rank, 0, ranks.device)).backward()
    for p, q in zip(plain.parameters(), again.parameters(), strict=True):
        assert same_bits(p.grad.full_tensor(), q.grad.full_tensor())
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1e-3)
    assert float(norm.full_tensor()) > 0


def on_ranks_composable_checkpoints(ranks: Ranks) -> None:
    """`torch.distributed._composable` copies names of torch.utils.checkpoint before a context can change them."""
    from torch.distributed._composable import checkpoint

    plain = sharded(ranks)
    loss_of(plain, batch(ranks.rank, 0, ranks.device)).backward()
    again = net(ranks)
    fsdp.quantize_gathers(again, NO_SR)
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in (again.first, again.second, again.third):
        checkpoint(block)
        fully_shard(block, mesh=mesh)
    fully_shard(again, mesh=mesh)
    loss_of(again, batch(ranks.rank, 0, ranks.device)).backward()
    for p, q in zip(plain.parameters(), again.parameters(), strict=True):
        assert same_bits(p.grad.full_tensor(), q.grad.full_tensor())


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def on_ranks_state_dicts_are_plain(ranks: Ranks) -> None:
    model = sharded(ranks)
    plain = net(ranks)
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    for name, entry in state.items():
        assert type(entry) is DTensor and type(entry.to_local()) is Tensor, name
        assert same_bits(entry.full_tensor(), plain.state_dict()[name])
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if ranks.rank == 0:
        assert all(type(entry) is Tensor for entry in whole.values())
        Net().load_state_dict(whole)
    train(model, ranks, 1)
    changed = full(model)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole if ranks.rank == 0 else {}, options=options)
    after = full(model)
    assert all(same_bits(after[name], value) for name, value in plain.state_dict().items())
    assert not same_bits(changed["first.conv.weight"], after["first.conv.weight"])
    assert isinstance(model.first.conv.weight.to_local(), ShardedWeight)  # still gathered in 4 bits
    torch.manual_seed(0)
    assert train(model, ranks, 2)[0] == train(sharded(ranks), ranks, 2)[0]


def on_ranks_distributed_checkpoints_go_to_another_number_of_ranks(ranks: Ranks) -> None:
    """Half of the ranks save, all of them go on; with nvfp4's own state, delayed scales included."""
    half = ranks.world // 2
    mesh = DeviceMesh(ranks.device.type, list(range(half)))
    group = dist.new_group(list(range(half)))
    folder, extra = ranks.folder / "checkpoint", ranks.folder / "extra.pt"
    if ranks.rank < half:
        model = sharded(ranks, DELAYED, mesh)
        _, optimizer = train(model, ranks, 2, DELAYED)
        parts = get_state_dict(model, optimizer)
        dcp.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=folder, process_group=group)
        if ranks.rank == 0:
            torch.save({"nvfp4": nv.extra_state(model), "seed": torch.initial_seed()}, extra)
        torch.save(full(model), ranks.folder / f"whole{ranks.rank}.pt")
    dist.barrier()
    model = sharded(ranks, DELAYED)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    names = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(names, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=names["model"], optim_state_dict=names["optimizer"])
    loaded = torch.load(extra, weights_only=True)
    torch.manual_seed(loaded["seed"])
    nv.extra_state(model, load=loaded["nvfp4"])
    whole = torch.load(ranks.folder / "whole0.pt", weights_only=True)
    assert all(same_bits(value.cpu(), whole[name].cpu()) for name, value in full(model).items())
    scales = nv.extra_state(model)["scales"]
    assert sorted(scales) == sorted(MARKED) and all(
        torch.equal(scales[name]["entries"][0]["used"], loaded["nvfp4"]["scales"][name]["entries"][0]["used"])
        for name in scales
    )
    losses, _ = train(model, ranks, 2, DELAYED, optimizer, start=2)
    assert all(loss < 10 for loss in losses)


def on_ranks_resuming_changes_no_bit(ranks: Ranks) -> None:
    """Stochastic rounding and delayed scales on: four steps are two, a checkpoint, and two."""
    recipe = nv.NVFP4BlockScaling(tensor_scale="delayed")
    torch.manual_seed(9)
    expected = sharded(ranks, recipe)
    torch.manual_seed(9)
    losses, _ = train(expected, ranks, 4, recipe)
    model = sharded(ranks, recipe)
    torch.manual_seed(9)
    first, optimizer = train(model, ranks, 2, recipe)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(parts, checkpoint_id=ranks.folder / "checkpoint")
    saved, rng = nv.extra_state(model), torch.get_rng_state()
    other = sharded(ranks, recipe)
    optimizer = torch.optim.AdamW(other.parameters(), 1e-2)
    names = dict(zip(("model", "optimizer"), get_state_dict(other, optimizer), strict=True))
    dcp.load(names, checkpoint_id=ranks.folder / "checkpoint")
    set_state_dict(other, optimizer, model_state_dict=names["model"], optim_state_dict=names["optimizer"])
    torch.set_rng_state(rng)
    nv.extra_state(other, load=saved)
    second, _ = train(other, ranks, 2, recipe, optimizer, start=2)
    assert first + second == losses
    a, b = full(expected), full(other)
    assert all(same_bits(a[name], b[name]) for name in a)


# ---- bytes ----------------------------------------------------------------------------------------------------------


class Received(TorchDispatchMode):
    """Bytes that gathers and all-reduces hand to this rank, counted where they enter torch.distributed's operators."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.bytes, self.world = 0, world

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d._allgather_base_.default:
            self.bytes += (args[0].numel() - args[1].numel()) * args[0].element_size()
        elif func is torch.ops.c10d.allreduce_.default:
            self.bytes += sum(2 * (self.world - 1) * t.numel() * t.element_size() // self.world for t in args[0])
        return func(*args, **(kwargs or {}))


def on_ranks_bytes_on_the_wire(ranks: Ranks) -> list[int]:
    """[received, of bf16 weights] for a module whose parameters are all marked."""
    sizes = []
    for mark in (True, False):
        torch.manual_seed(0)
        conv = nn.Conv2d(64, 128, 3, padding=1, bias=False).to(ranks.device)
        policy = MixedPrecisionPolicy() if mark else MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        if mark:
            assert fsdp.quantize_gathers(conv, NO_SR) == ["weight"]
        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        fully_shard(conv, mesh=mesh, mp_policy=policy)

        x = values((16, 64, 4, 4)).to(ranks.device)
        with Received(ranks.world) as received, nv.nvfp4_autocast(NO_SR), torch.no_grad():
            conv(x)
        sizes.append(received.bytes)
    plain = 128 * 64 * 9 * 2 * (ranks.world - 1) // ranks.world
    assert sizes[1] == plain, sizes  # the counter sees what FSDP2 sends in bf16
    assert sizes[0] <= 0.29 * sizes[1], sizes
    return sizes


# ---- what cannot be, is said ----------------------------------------------------------------------------------------


def on_ranks_uneven_shards_travel_in_high_precision(ranks: Ranks) -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(16, 17), nn.Linear(17, 16)).to(ranks.device)
    expected = copy.deepcopy(linear)
    assert fsdp.quantize_gathers(linear, NO_SR) == ["0.weight", "1.weight"]
    fully_shard(linear, mesh=init_device_mesh(ranks.device.type, (ranks.world,)))
    x = values((16, 16), seed=ranks.rank).to(ranks.device)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with nv.nvfp4_autocast(NO_SR):
                y = linear(x)
        y.sum().backward()
        told = [str(w.message) for w in caught if "even shards" in str(w.message)]
        assert len(told) == (1 if _ == 0 else 0)
    with nv.nvfp4_autocast(NO_SR):
        assert same_bits(y, expected(x))


def on_ranks_readers_in_high_precision_are_told(ranks: Ranks) -> None:
    model = sharded(ranks)
    x, _ = batch(ranks.rank, 0, ranks.device)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        found = model(x)
        model(x)
    told = [str(w.message) for w in caught if "gathered in 4 bits" in str(w.message)]
    assert len(told) == len(MARKED)
    reference = net(ranks)
    with torch.no_grad():
        for name in MARKED:
            module = reference.get_submodule(name.removesuffix(".weight"))
            groups = getattr(module, "groups", 1)
            codes, scales, *_, amax = codes_of_whole(module.weight, groups)
            layout = WeightLayout(*module.weight.shape[:2], groups, False)
            w = operand.unpack_weight(Face(codes, scales), layout, None, torch.float32, "reference")
            module.weight.copy_((w * (amax / 2688)).view(len(w), 3, 3, -1).movedim(-1, 1))
        assert relative_error(found, reference(x)) < 1e-5
    other = nv.NVFP4BlockScaling(disable_2d_quantization=True)
    words = r"gathered in 4 bits for another recipe(?s:.*)fix:"
    with pytest.raises(RuntimeError, match=words), nv.nvfp4_autocast(other):
        model(x)


@two_ranks
def on_ranks_compiled_blocks(ranks: Ranks) -> None:
    """Blocks compile alike whether FSDP2 gathers in high precision or in 4 bits. (GroupNorm sums in another order in a
    graph.)
    """
    frames: list[int] = []
    x, _ = batch(ranks.rank, 0, ranks.device)
    for mark in (False, True):
        results = []
        for compiled in (False, True):
            torch._dynamo.reset()
            model = sharded(ranks, mark=mark)
            if compiled:
                for block in (model.first, model.second, model.third):
                    block.compile(backend="aot_eager")
            with nv.nvfp4_autocast(NO_SR), torch.no_grad():
                results.append(model(x))
        assert relative_error(*results) < 1e-6, mark
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
        torch._dynamo.utils.counters.clear()
    assert 0 < frames[1] <= frames[0], frames


@two_ranks
def on_ranks_codes_are_inputs_of_graphs(ranks: Ranks) -> None:
    """A marked block is one graph, forward and backward, with the bits of eager mode; so are two image sizes."""
    results, counts = [], torch._dynamo.utils.counters
    for compiled in (False, True):
        torch._dynamo.reset()
        counts.clear()
        model = net(ranks)
        for block in (model.first, model.second, model.third):
            block.norm = nn.Identity()
        assert fsdp.quantize_gathers(model, NO_SR) == MARKED
        for block in (model.first, model.second, model.third):
            if compiled:
                block.compile(backend="aot_eager", fullgraph=True)
            fully_shard(block, mesh=init_device_mesh(ranks.device.type, (ranks.world,)))
        fully_shard(model, mesh=init_device_mesh(ranks.device.type, (ranks.world,)))
        losses, optimizer = train(model, ranks, 2)
        optimizer.zero_grad()
        x, target = batch(ranks.rank, 2, ranks.device)
        loss = loss_of(model, (nn.functional.interpolate(x, 11), target))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        results.append((losses, full(model)))
    assert counts["graph_break"] == {} and counts["stats"]["unique_graphs"] >= 3, counts
    (expected, state), (found, other) = results
    assert found == expected and all(same_bits(other[name], value) for name, value in state.items())


CHECKPOINTS = "distributed_checkpoints_go_to_another_number_of_ranks"
test_on_ranks = ranks_test(globals(), four=(CHECKPOINTS, "bytes_on_the_wire", "uneven_shards_travel_in_high_precision"))


# ---- one process ----------------------------------------------------------------------------------------------------


def test_what_is_marked():
    model = Net()
    nv.set_precision(model, {"second": None})
    assert fsdp.quantize_gathers(model, NO_SR, lambda module, name: name != "down") == [MARKED[0], MARKED[3]]
    assert isinstance(model.first.conv.weight.data, ShardedWeight) and not isinstance(model.down.weight, ShardedWeight)
    assert isinstance(model.first.conv.weight, nn.Parameter)
    assert all(type(entry) is Tensor for entry in model.state_dict().values())


@pytest.mark.parametrize(
    "recipe",
    [
        nv.NVFP4BlockScaling(disable_2d_quantization=True),
        nv.NVFP4BlockScaling(nvfp4_4over6="weights"),
        nv.NVFP4BlockScaling(high_precision_gemms=("dgrad",)),
        nv.NVFP4BlockScaling(backward_override="dequantized"),
    ],
    ids=lambda r: r.key,
)
def test_weights_that_cannot_be_gathered_so_are_left(recipe):
    assert fsdp.quantize_gathers(Net(), recipe) == []


def test_a_precision_table_is_followed():
    recipe = nv.NVFP4BlockScaling(precision={"first.*": None, "third": nv.NVFP4BlockScaling(nvfp4_4over6="weights")})
    assert fsdp.quantize_gathers(Net(), recipe) == MARKED[1:3]
    with pytest.raises(ValueError, match="matches no module"):
        fsdp.quantize_gathers(Net(), nv.NVFP4BlockScaling(precision={"nowhere": None}))


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    assert fsdp.quantize_gathers(model) == ["0.weight"]
    assert model[0].weight is model[1].weight


@pytest.mark.parametrize(("model", "recipe"), [("model", None), (nn.Linear(16, 16), 4)])
def test_wrong_arguments_are_type_errors(model, recipe):
    with pytest.raises(TypeError, match=r"(?s)got:.*needs:.*fix:"):
        fsdp.quantize_gathers(model, recipe)


def test_a_marked_model_trains_unsharded():
    """Marking alone changes nothing that a single process computes."""
    losses = []
    for mark in (False, True):
        torch.manual_seed(0)
        model = Net()
        if mark:
            fsdp.quantize_gathers(model, NO_SR)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        losses.append([])
        for step in range(2):
            loss = loss_of(model, batch(0, step, torch.device("cpu")))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]
