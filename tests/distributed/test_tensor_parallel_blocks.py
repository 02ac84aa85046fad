"""Blocks with norms in tensor parallelism: equal to the unsharded block, by plans that nv.tensor_parallel.plan writes.

Models that are shared out in other ways: uneven parts, torch's own plans, export, statistics of weights.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor import parallel as torchs
from torch.distributed.tensor.parallel import parallelize_module

import te_nvfp4_cv as nv
from tests.distributed.launch import Ranks, ranks_test
from tests.distributed.sharing import COLUMNS, PLAIN, ROWS, mesh, part, run
from tests.helpers import relative_error, same_bits, values

NORMS = nv.tensor_parallel.NormParallel


class LayerNorm2d(nn.LayerNorm):
    """As torchvision and timm have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Residual(nn.Module):
    """A block beside a skip connection."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + x)


def conv(inside: int, out: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inside, out, size, padding=size // 2, bias=False, **options)


def blocks(w: int) -> dict[str, tuple[nn.Module, list[str]]]:
    """Blocks of networks with 16 channels on each rank, and the styles of their plans in order."""
    c, d = 16 * w, 32 * w
    basic = [conv(c, d), nn.BatchNorm2d(d), nn.ReLU(), conv(d, c), nn.BatchNorm2d(c)]
    bottleneck = [conv(c, d, 1), nn.BatchNorm2d(d), nn.ReLU(), conv(d, d), nn.BatchNorm2d(d), nn.ReLU(), conv(d, c, 1)]
    double = [conv(c, d), nn.GroupNorm(w, d), nn.SiLU(), conv(d, c), nn.GroupNorm(8, c)]
    inverted = [conv(c, d, 1), nn.BatchNorm2d(d), nn.ReLU6(), conv(d, d, groups=d), nn.PReLU(d), conv(d, c, 1)]
    wide = [conv(c, d), nn.GroupNorm(1, d), nn.ReLU(), conv(d, d, 1), LayerNorm2d(d), nn.GELU(), conv(d, c, 1)]
    crossed = [
        conv(c, 3 * d),
        nn.InstanceNorm2d(3 * d, affine=True),
        nn.GroupNorm(3 * w // 2, 3 * d),
        conv(3 * d, c, 1),
    ]
    return {
        "basic": (Residual(*basic), ["C", "N", "R"]),
        "bottleneck": (Residual(*bottleneck), ["C", "N", "C", "N", "R"]),
        "double": (nn.Sequential(*double), ["C", "N", "R"]),
        "inverted": (Residual(*inverted), ["C", "N", "N", "N", "R"]),
        "wide": (Residual(*wide), ["C", "N", "C", "N", "R"]),
        "crossed": (nn.Sequential(*crossed), ["C", "N", "N", "R"]),
        "mlp": (nn.Sequential(nn.Linear(c, d), nn.LayerNorm(d), nn.GELU(), nn.Linear(d, c)), ["C", "N", "R"]),
    }


def on_ranks_blocks_with_norms_are_the_unsharded_ones(ranks: Ranks) -> None:
    for name, (block, styles) in blocks(ranks.world).items():
        for module in block.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
        block = block.to(ranks.device)
        plan = nv.tensor_parallel.plan(block, mesh(ranks))
        order = {key: i for i, (key, _) in enumerate(block.named_modules())}
        assert [type(plan[key]).__name__[0] for key in sorted(plan, key=order.get)] == styles, name
        one, many = block, parallelize_module(copy.deepcopy(block), mesh(ranks), plan)
        shape = (16, 16 * ranks.world) if name == "mlp" else (16, 16 * ranks.world, 4, 4)
        for recipe in (None, PLAIN):
            x, dy = (values(shape, seed=s).to(ranks.device) for s in (1, 2))
            results = [run(model, x, dy, recipe) for model in (one, many)]
            # Sums that cross ranks are exact, those of torch's norm are not: beside a tie that is another code.
            crosses = name in ("wide", "crossed", "mlp")
            tolerance = 1e-2 if recipe is not None and crosses else 1e-4
            for expected, found in zip(results[0][:2], results[1][:2], strict=True):
                assert relative_error(found, expected) <= tolerance, (name, recipe, relative_error(found, expected))
            for key, expected in results[0][2].items():
                found = results[1][2][key]
                found = found.full_tensor() if isinstance(found, DTensor) else found
                assert relative_error(found, expected) <= tolerance, (name, key, relative_error(found, expected))
            one.zero_grad()
            many.zero_grad()
        for (key, buffer), other in zip(one.named_buffers(), many.buffers(), strict=True):
            other = other.full_tensor() if isinstance(other, DTensor) else other
            assert relative_error(other, buffer) <= 1e-3, (name, key)
        one, many = one.eval(), many.eval()
        with torch.no_grad(), nv.nvfp4_autocast(PLAIN):
            assert relative_error(many(x), one(x)) <= 1e-2, name
        many.load_state_dict(many.state_dict())


@contextlib.contextmanager
def in_fp64(model: nn.Module) -> Iterator[None]:
    """Let the norms of a model, which is not shared out, compute in fp64."""
    norms = [m for m in model.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))]

    def call(norm: nn.Module, x: Tensor) -> Tensor:
        wide = {name: p.double() for name, p in norm.named_parameters()}
        del norm.forward
        try:
            return torch.func.functional_call(norm, wide, x.double()).to(x.dtype)
        finally:
            norm.forward = functools.partial(call, norm)

    for norm in norms:
        norm.forward = functools.partial(call, norm)
    yield
    for norm in norms:
        del norm.forward


def on_ranks_norms_whose_sums_cross_ranks_are_those_in_fp64(ranks: Ranks) -> None:
    """So codes are the same on any number of ranks, and a whole block is as near as a pair of layers is."""
    for name in ("wide", "crossed", "mlp"):
        block, _ = blocks(ranks.world)[name]
        block = block.to(ranks.device)
        many = parallelize_module(copy.deepcopy(block), mesh(ranks), nv.tensor_parallel.plan(block, mesh(ranks)))
        shape = (16, 16 * ranks.world) if name == "mlp" else (16, 16 * ranks.world, 4, 4)
        for seed in range(3):
            x, dy = (values(shape, seed=s).to(ranks.device) for s in (seed, 10 + seed))
            with in_fp64(block):
                expected = run(block, x, dy, PLAIN)
            found = run(many, x, dy, PLAIN)
            for one, other in zip(expected[:2], found[:2], strict=True):
                assert relative_error(other, one) <= 1e-6, (name, seed)
            for key, one in expected[2].items():
                other = found[2][key]
                other = other.full_tensor() if isinstance(other, DTensor) else other
                # Equal codes give equal gradients of weights, but where two norms stand in a row.
                good = same_bits(other, one) if name != "wide" else relative_error(other, one) <= 1e-6
                assert good, (name, seed, key)
            block.zero_grad()
            many.zero_grad()


def on_ranks_norms_keep_dtensors_autocast_and_observers(ranks: Ranks) -> None:
    w = ranks.world
    for norm in (
        nn.BatchNorm2d(16 * w),
        nn.GroupNorm(1, 16 * w),
        LayerNorm2d(16 * w),
        conv(16 * w, 16 * w, groups=16 * w),
    ):
        norm = norm.to(ranks.device)
        x = values((4, 16 * w, 3, 3), seed=1, dtype=torch.bfloat16).to(ranks.device)
        with torch.autocast(ranks.device.type, torch.bfloat16):
            expected = norm(x)
            many = parallelize_module(copy.deepcopy(norm), mesh(ranks), NORMS())
            found = many(part(x, Shard(1), ranks))
            assert found.dtype == expected.dtype and "on" in repr(many)
            assert relative_error(found, part(expected, Shard(1), ranks)) <= 1e-2
            whole = many(distribute_tensor(x, mesh(ranks), [Shard(0)]))
            assert isinstance(whole, DTensor) and whole.placements == (Shard(1),)
            assert relative_error(whole.full_tensor(), expected) <= 1e-2
        with pytest.raises(ValueError, match="not split by channels"):
            many(x)
    report = {row.name: row for row in nv.coverage(nn.Sequential(many), part(x, Shard(1), ranks).float()).rows}
    assert not report["0"].nvfp4 and "depthwise" in report["0"].reason
    plain = blocks(w)["basic"][0].to(ranks.device)
    block = parallelize_module(plain, mesh(ranks), nv.tensor_parallel.plan(plain, mesh(ranks)))
    before = run(block, x.float(), x.float(), PLAIN)[0]
    nv.fuse(block)
    assert same_bits(run(block, x.float(), x.float(), PLAIN)[0], before)


def on_ranks_what_norms_refuse(ranks: Ranks) -> None:
    w = ranks.world
    own = type("Own", (nn.GroupNorm,), {"forward": lambda self, x: nn.GroupNorm.forward(self, x).relu()})
    for module, why in (
        (nn.BatchNorm2d(16 * w + 1), "cannot be shared out"),
        (nn.SyncBatchNorm(16 * w), "cannot be shared out"),
        (nn.LayerNorm((16 * w, 4)), "cannot be shared out"),
        (nn.Conv2d(16 * w, 16 * w, 1), "cannot be shared out"),
        (nn.PReLU(), "cannot be shared out"),
        (own(1, 16 * w), "a forward of its own"),
    ):
        with pytest.raises(ValueError, match=f"NormParallel.*[\\s\\S]*{why}[\\s\\S]*fix:"):
            parallelize_module(module, mesh(ranks), NORMS())
    with pytest.raises(ValueError, match="nothing to share out"):
        nv.tensor_parallel.plan(nn.Sequential(nn.Conv2d(3, 16 * w - 1, 3), nn.Conv2d(16 * w - 1, 16, 3)), mesh(ranks))


def on_ranks_uneven_and_empty_parts_raise_on_every_rank(ranks: Ranks) -> None:
    w, first = ranks.world, ranks.rank == 0
    pair = nn.Sequential(conv(16 * w, 16 * w), nn.ReLU(), conv(16 * w, 16 * w)).to(ranks.device)
    plan = {"0": COLUMNS(input_layouts=Shard(0)), "2": ROWS(output_layouts=Shard(0))}
    model = parallelize_module(copy.deepcopy(pair), mesh(ranks), plan)
    x = values((16, 16 * w, 4, 4), seed=1).to(ranks.device)
    for mine in (
        x[:0] if first else x,
        x[:5] if first else x,
        x[..., :3] if first else x,
        x[:0, ..., :2] if first else x[:0],
    ):
        for recipe in (PLAIN, None):
            with pytest.raises(ValueError, match="differ in shape[\\s\\S]*to .* along axis"):
                run(model, mine, mine, recipe)
    # The ranks have left together, and go on; parts of a DTensor may be uneven.
    odd = x[: w + 1] if w + 1 < 16 else x
    expected = run(pair, odd, odd, PLAIN)[:2]
    whole = {"0": COLUMNS(), "2": ROWS()}
    many = parallelize_module(copy.deepcopy(pair), mesh(ranks), whole)
    found = run(many, distribute_tensor(odd, mesh(ranks), [Shard(0)]), odd, PLAIN)
    assert relative_error(found[0], expected[0]) <= 1e-5
    assert relative_error(found[1].full_tensor(), expected[1]) <= 1e-5
    empty = run(model, x[:0], x[:0], PLAIN)
    assert empty[0].shape == x[:0].shape


def on_ranks_torchs_plans_name_ours(ranks: Ranks) -> None:
    w = ranks.world
    plan = {"0": torchs.ColwiseParallel(), "1": torchs.RowwiseParallel()}
    mlp = nn.Sequential(nn.Linear(16 * w, 16 * w), nn.Linear(16 * w, 16 * w)).to(ranks.device)
    model = parallelize_module(copy.deepcopy(mlp), mesh(ranks), plan)
    x = values((16, 16 * w), seed=1).to(ranks.device)
    with pytest.raises(RuntimeError, match=r"torch's tensor parallelism[\s\S]*nv\.tensor_parallel\.ColwiseParallel"):
        run(model, x, x, PLAIN)
    nv.set_precision(model, {"*": None})
    assert relative_error(run(model, x, x, PLAIN)[0], mlp(x)) <= 1e-5


def on_ranks_export_and_statistics_gather(ranks: Ranks) -> None:
    block = blocks(ranks.world)["basic"][0].to(ranks.device).eval()
    many = parallelize_module(copy.deepcopy(block), mesh(ranks), nv.tensor_parallel.plan(block, mesh(ranks)))
    x = values((4, 16 * ranks.world, 4, 4), seed=1).to(ranks.device)
    saved = nv.export.save(many, ranks.folder / "many", PLAIN)
    if ranks.rank == 0:
        nv.export.save(block, ranks.folder / "one", PLAIN)
        assert (ranks.folder / "many.safetensors").read_bytes() == (ranks.folder / "one.safetensors").read_bytes()
    assert len(saved.quantized) == 2 and isinstance(many.body[0].weight, DTensor)
    quantized, alone = nv.export.quantize(many, [x], PLAIN), nv.export.quantize(block, [x], PLAIN)
    assert same_bits(quantized(x), alone(x))
    onnx = [
        nv.export.to_onnx(nn.Sequential(alone, last), x, ranks.folder / f"{name}.onnx", form="portable")
        for name, last in (("many", many), (f"one{ranks.rank}", block))
    ]
    assert onnx[0].quantized == onnx[1].quantized and onnx[0].files[0].read_bytes() == onnx[1].files[0].read_bytes()
    with pytest.raises(RuntimeError):
        nv.export.save(many, ranks.folder / "many.safetensors" / "no_folder", PLAIN)
    expected = nv.sensitivity.kurtosis(block).to_dict()
    assert nv.sensitivity.kurtosis(many).to_dict() == expected
    for mark in (False, True):
        model = copy.deepcopy(block)
        if mark:
            nv.fsdp.quantize_gathers(model, PLAIN)
        fully_shard(model, mesh=mesh(ranks))
        assert nv.sensitivity.kurtosis(model).to_dict() == expected, mark
    dist.barrier()


test_on_ranks = ranks_test(globals(), four=())


def test_plans_of_networks():
    models, mesh = pytest.importorskip("torchvision.models"), SimpleNamespace(size=lambda: 2)
    for make, counts in (
        (models.resnet18, [8, 8, 8]),
        (models.resnet50, [32, 32, 16]),
        (models.convnext_tiny, [18, 0, 18]),
    ):
        with torch.device("meta"):
            styles = Counter(type(style) for style in nv.tensor_parallel.plan(make(), mesh).values())
        assert [styles[kind] for kind in (COLUMNS, NORMS, ROWS)] == counts, make


class Tied(nn.Module):
    """Four layers, of which the last has the first one's weight, or reads it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.c, self.d = (nn.Linear(64, 64) for _ in range(4))
        if how == "tied":
            self.d.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.d(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))))
        return x @ self.a.weight if self.how == "read" else x


def test_plans_leave_tied_weights_whole():
    mesh = SimpleNamespace(size=lambda: 2)
    for how, shared in (("", "abcd"), ("tied", "bc"), ("read", "bcd")):
        assert "".join(nv.tensor_parallel.plan(Tied(how), mesh)) == shared, how
