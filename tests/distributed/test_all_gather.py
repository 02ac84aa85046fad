"""all_gather against quantizing the whole tensor with the shared amax: every dim, face, layout and setting, in bits."""

from __future__ import annotations

import itertools
import random

import torch
import torch.distributed as dist

import te_nvfp4_cv as nv
from te_nvfp4_cv.formats import BLOCK
from tests.distributed.gathering import (
    AXES,
    FACES,
    KINDS,
    assert_equal,
    packed,
    poisoned,
    quantizer,
    quiet,
    shards_of,
)
from tests.distributed.launch import Ranks, ranks_test
from tests.helpers import values

all_gather = nv.distributed.all_gather
SHARD = {"rows": (32, 48), "height": (2, 3, 16, 32), "batch": (2, 3, 16, 32), "channel": (3, 2, 16, 32)}


def _whole(
    shape: tuple[int, ...], dim: str, sizes: list[int], dtype: torch.dtype, kind: str = "normal"
) -> torch.Tensor:
    """A tensor whose shards have these sizes along dim; the same on every rank."""
    axis = AXES[dim] % len(shape)
    return values((*shape[:axis], sum(sizes), *shape[axis + 1 :]), kind, dtype, seed=sum(shape) + sum(sizes))


def _check(ranks: Ranks, x: torch.Tensor, dim: str, sizes: list[int], q: nv.NVFP4Quantizer, case: object) -> None:
    """The plain shard and the packed one, in both layouts where the shape has them."""
    x = x.to(ranks.device)
    expected, shard = q(x), shards_of(x, dim, sizes)[ranks.rank]
    with quiet(), poisoned():
        assert_equal(all_gather(shard, ranks.group, dim, quantizer=q), expected, (case, "plain"))
        assert_equal(all_gather(packed(q, shard, x), ranks.group, dim), expected, (case, "te"))
        tiles = x.dim() > 2 and all(part.shape[-2] % BLOCK == 0 for part in (x, *shards_of(x, dim, sizes)))
        if q.columnwise_usage and tiles:
            got = all_gather(packed(q, shard, x, "ntile"), ranks.group, dim)
            assert_equal(got, expected.to_columnwise_layout("ntile"), (case, "ntile"))


def on_ranks_every_dim_face_and_setting(ranks: Ranks) -> None:
    for dim, kind, faces in itertools.product(SHARD, KINDS, FACES):
        sizes = [SHARD[dim][AXES[dim]]] * ranks.world
        both = faces == "both" and ranks.world == 2
        dtypes = (torch.bfloat16, torch.float32) if both else (torch.bfloat16,)
        for dtype in dtypes:
            x = _whole(SHARD[dim], dim, sizes, dtype)
            _check(ranks, x, dim, sizes, quantizer(kind, faces), (dim, kind, faces, dtype))


def on_ranks_other_dimensions_and_backends(ranks: Ranks) -> None:
    """Linear's [B, S, K], one and three spatial axes, fp16, and the backend that runs here by default."""
    shapes = [("rows", (16, 3, 32)), ("batch", (5, 16, 32)), ("height", (2, 16, 16)), ("channel", (16, 16))]
    shapes += [("batch", (16, 48)), ("rows", (2, 2, 3, 16, 16)), ("batch", (2, 2, 3, 16, 16)), ("channel", (32,))]
    for dim, shape in shapes:
        sizes = [shape[AXES[dim]]] * ranks.world
        x = _whole(shape, dim, sizes, torch.float16)
        faces = "row" if len(shape) == 1 else "both"
        _check(ranks, x, dim, sizes, quantizer("rht", faces, backend="auto"), (dim, shape))


def on_ranks_nan_inf_and_zeros(ranks: Ranks) -> None:
    """One element of one shard, or all of them: every shard then has the amax of the whole."""
    for kind, dim in itertools.product(("nan", "inf", "zeros", "negative zeros", "huge", "subnormal"), SHARD):
        sizes = [SHARD[dim][AXES[dim]]] * ranks.world
        for setting in ("plain", "rht", "2d"):
            x = _whole(SHARD[dim], dim, sizes, torch.float32, kind)
            _check(ranks, x, dim, sizes, quantizer(setting, backend="auto"), (kind, dim, setting))
    x = torch.full((16 * ranks.world, 16), float("nan"))
    _check(ranks, x, "rows", [16] * ranks.world, quantizer(), "all NaN")


def on_ranks_uneven_shards_of_whole_blocks(ranks: Ranks) -> None:
    """Random sizes, zeros among them; the last shard may end inside a block where nothing follows it."""
    for i in range(60):
        dim, kind = random.choice(list(SHARD)), random.choice(list(KINDS))
        faces = random.choice(list(FACES))
        sizes = [16 * random.randrange(4) for _ in range(ranks.world)]
        ragged = dim == "rows" or dim == "channel" or faces == "row" and kind != "2d"
        if ragged:
            sizes[-1] += random.randrange(16)
        shape = {"rows": (0, 40), "height": (0, 2, 5, 24), "batch": (3, 2, 0, 24), "channel": (2, 3, 5, 0)}[dim]
        _check(ranks, _whole(shape, dim, sizes, torch.bfloat16), dim, sizes, quantizer(kind, faces), (i, dim, sizes))


def on_ranks_rowwise_shards_of_any_size(ranks: Ranks) -> None:
    """Blocks along K do not mind where rows, images or pixel rows are split; those along M not where channels are."""
    for dim, faces in (("rows", "row"), ("height", "row"), ("batch", "row"), ("channel", "col")):
        sizes = [3 + 2 * rank for rank in range(ranks.world)]
        shape = (0, 40) if dim == "rows" else (2, 3, 5, 24)
        _check(ranks, _whole(shape, dim, sizes, torch.bfloat16), dim, sizes, quantizer("plain", faces), dim)


def on_ranks_empty_shards(ranks: Ranks) -> None:
    """All of them, all but one, and tensors that have no elements for another reason."""
    some = [0] * ranks.world
    some[ranks.world // 2] = 32
    for dim, sizes in itertools.product(SHARD, ([0] * ranks.world, some)):
        x = _whole(SHARD[dim], dim, sizes, torch.bfloat16)
        _check(ranks, x, dim, sizes, quantizer("rht"), (dim, sizes))
        own = quantizer("rht")(shards_of(x, dim, sizes)[ranks.rank])  # an empty shard's amax is its own: 0
        assert_equal(all_gather(own, ranks.group, dim), quantizer("rht")(x), (dim, sizes))
    for dim, shape in (("rows", (16, 0)), ("height", (2, 0, 16, 16)), ("batch", (0, 3, 16, 16)), ("channel", (0, 16))):
        sizes = [shape[AXES[dim]]] * ranks.world
        _check(ranks, _whole(shape, dim, sizes, torch.bfloat16), dim, sizes, quantizer(), (dim, shape))


def on_ranks_amaxes_reduced_before(ranks: Ranks) -> None:
    """Shards quantized apart, by quantizers that share the amax; and many shards whose amax is that of another rank."""
    x = values((16 * ranks.world, 32), dtype=torch.bfloat16).to(ranks.device)
    x[-1, -1] = 100.0
    shard = x[16 * ranks.rank : 16 * ranks.rank + 16]
    reducing = quantizer("rht", with_amax_reduction=True, amax_reduction_group=ranks.group)
    got = all_gather(reducing(shard), ranks.group)
    expected = quantizer("rht")(x).make_like(quantizer=reducing)
    assert_equal(got, expected)
    alone = [dist.new_group([rank]) for rank in range(ranks.world)][ranks.rank]
    other = quantizer("rht", with_amax_reduction=True, amax_reduction_group=alone)  # its group does not count
    assert_equal(all_gather(shard, ranks.group, quantizer=other), expected.make_like(quantizer=other))
    assert float(got.amax_rowwise) == 100.0 and other.amax_reduction_group is alone and other.with_amax_reduction


test_on_ranks = ranks_test(
    globals(), four=("every_dim_face_and_setting", "uneven_shards_of_whole_blocks", "empty_shards")
)
