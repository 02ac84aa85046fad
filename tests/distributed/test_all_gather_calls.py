"""all_gather as it is called: handles, groups, several tensors, what cannot be packed, errors, bytes on the wire."""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import te_nvfp4_cv as nv
from te_nvfp4_cv import errors
from te_nvfp4_cv.distributed.collectives import wire_bytes
from tests.distributed.gathering import (
    AXES,
    assert_equal,
    calls_counted,
    packed,
    quantizer,
    quiet,
    shards_of,
)
from tests.distributed.launch import Ranks, ranks_test
from tests.helpers import values

all_gather = nv.distributed.all_gather
coalesced = nv.distributed.all_gather_coalesced


def _rows(ranks: Ranks, rows: int = 16, K: int = 32, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """(the whole, this rank's rows of it)"""
    x = values((rows * ranks.world, K), dtype=dtype, seed=rows + K).to(ranks.device)
    return x, x[rows * ranks.rank :][:rows]


def _assert_usable(ranks: Ranks) -> None:
    x, shard = _rows(ranks)
    assert_equal(all_gather(shard, ranks.group, quantizer=quantizer()), quantizer()(x))


def on_ranks_async(ranks: Ranks) -> None:
    """Handles waited for in another order than they were started in, twice, and one that nobody waits for."""
    q = quantizer("rht")
    wholes, handles = [], []
    for rows in (16, 32, 48):
        x, shard = _rows(ranks, rows)
        shard = shard.clone()
        handles.append(all_gather(shard, ranks.group, async_op=True, quantizer=q))
        shard.zero_()  # what was sent was read at the call
        wholes.append(q(x))
    dropped = all_gather(packed(q, *reversed(_rows(ranks))), ranks.group, "rows", True)
    assert isinstance(dropped, nv.distributed.AllGatherHandle)
    del dropped
    gc.collect()
    for whole, handle in reversed(list(zip(wholes, handles, strict=True))):
        got = handle.wait()
        assert_equal(got, whole)
        assert handle.wait() is got
    errors._warned.clear()
    x, shard = values((5 * ranks.world, 16)), values((5 * ranks.world, 16))[5 * ranks.rank :][:5]
    with pytest.warns(UserWarning, match="cut blocks"):
        handle = all_gather(shard, ranks.group, async_op=True, quantizer=q)
    assert_equal(handle.wait(), q(x))
    assert handle.wait() is handle.wait()


def on_ranks_groups(ranks: Ranks) -> None:
    """Groups of one rank, without communication, and of two; a group of others."""
    q = quantizer("rht")
    x, _ = _rows(ranks)
    alone = [dist.new_group([rank]) for rank in range(ranks.world)]
    for dim in ("rows", "batch", "channel"):
        with calls_counted() as received, wire_bytes() as counter:
            assert_equal(all_gather(x[:13], alone[ranks.rank], dim, quantizer=q), q(x[:13]))
            t = q(x[:13]).requires_grad_()
            handle = all_gather(t, alone[ranks.rank], dim, async_op=True)
        got = handle.wait()
        assert_equal(got, q(x[:13]))
        assert handle.wait() is got and got.rowwise_data.data_ptr() != t.rowwise_data.data_ptr()
        assert received == [] and counter.received == 0
    with pytest.raises(ValueError, match="not in the group"):
        all_gather(x, alone[ranks.rank - 1], quantizer=q)
    with pytest.raises(ValueError, match="not in the group"):
        all_gather(x, dist.GroupMember.NON_GROUP_MEMBER, quantizer=q)
    pairs = [dist.new_group([first, first + 1]) for first in range(0, ranks.world, 2)]
    mine = ranks.rank // 2
    whole = x[32 * mine :][:32]  # another tensor in each pair
    shard = whole[16 * (ranks.rank % 2) :][:16]
    assert_equal(all_gather(shard, pairs[mine], quantizer=q), q(whole))
    assert_equal(all_gather(x[16 * ranks.rank :][:16], quantizer=q), q(x))  # the default group


def on_ranks_several_tensors(ranks: Ranks) -> None:
    """Plain, packed, with one face or two, in high precision: all in one message after number and metadata."""
    q, q2 = quantizer("rht"), quantizer("2d", "row")
    x, shard = _rows(ranks)
    y, y_shard = _rows(ranks, 32, 48, torch.float32)
    z = values((3 * ranks.world, 16), dtype=torch.bfloat16).to(ranks.device)
    shards = [shard, packed(q2, y_shard, y), z[3 * ranks.rank :][:3], y_shard]
    expected = [q(x), q2(y), q(z), q(y)]
    with calls_counted() as received, wire_bytes() as counter, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = coalesced(shards, ranks.group, quantizer=q)
    assert len(received) == 3 and sum(received) == counter.received  # the number of tensors goes first
    for a, b in zip(got, expected, strict=True):
        assert_equal(a, b)
    handles = coalesced(shards, ranks.group, async_op=True, quantizer=q)
    for handle, b in reversed(list(zip(handles, expected, strict=True))):
        assert_equal(handle.wait(), b)
        assert handle.wait() is handle.wait()
    assert coalesced([], ranks.group) == []
    shards[1] = q2(y_shard * (1 + ranks.rank))
    with pytest.raises(ValueError, match="all_gather_coalesced, tensor 1: .* tensor scales"):
        coalesced(shards, ranks.group, quantizer=q)
    _assert_usable(ranks)


def on_ranks_values_where_blocks_would_be_cut(ranks: Ranks) -> None:
    """The whole is quantized from values, with a warning once; packed shards are dequantized first."""
    shapes = {"rows": (0, 40), "height": (0, 3, 16, 24), "batch": (2, 3, 0, 24), "channel": (2, 3, 16, 0)}
    for i in range(24):
        dim, kind = random.choice(list(AXES)), random.choice(["plain", "rht", "2d", "4over6"])
        layout = "ntile" if dim == "channel" and i % 2 else "te"
        sizes = [random.choice([0, 1, 5, 17, 32]) for _ in range(ranks.world - 1)] + [20]
        sizes[0] = 7
        shape = list(shapes[dim])
        shape[AXES[dim]] = sum(sizes)
        if dim == "height":
            shape[1:3] = 1, 5
        x = values(tuple(shape), dtype=torch.bfloat16, seed=i).to(ranks.device)
        shards, q = shards_of(x, dim, sizes), quantizer(kind)
        errors._warned.clear()
        with pytest.warns(UserWarning, match="cut blocks of 16") as told:
            assert_equal(all_gather(shards[ranks.rank], ranks.group, dim, quantizer=q), q(x), (i, dim))
            t = packed(q, shards[ranks.rank], x, layout)
            got = all_gather(t, ranks.group, dim)
        assert len([w for w in told if "all_gather" in str(w.message)]) == 1
        seen = torch.cat([packed(q, shard, x).dequantize() for shard in shards], AXES[dim])
        assert_equal(got, q(seen).to_columnwise_layout(layout), (i, dim, kind, sizes))


def on_ranks_blocks_cut_in_one_face_or_place_only(ranks: Ranks) -> None:
    """The last shard inside of others' rows; tiles of 16 rows in a rowwise face, of 16 channels in a columnwise one."""
    cases = [("batch", (2, 3, 0, 24), [16] * (ranks.world - 1) + [5], quantizer("plain", "col"))]
    cases += [("rows", (0, 32), [5] * ranks.world, quantizer("2d", "row"))]
    cases += [("channel", (32, 0), [5] * ranks.world, quantizer("2d", "col"))]
    for dim, shape, sizes, q in cases:
        reducing = nv.NVFP4Quantizer(**{**q.settings(), "with_amax_reduction": True})
        size = list(shape)
        size[AXES[dim]] = sum(sizes)
        x = values(tuple(size), dtype=torch.bfloat16).to(ranks.device)
        errors._warned.clear()
        with pytest.warns(UserWarning, match="cut blocks of 16"), calls_counted() as received:
            got = all_gather(shards_of(x, dim, sizes)[ranks.rank], ranks.group, dim, quantizer=reducing)
        assert len(received) == 2  # the whole is on every rank: nobody is asked for its amax again
        assert_equal(got, q(x).make_like(quantizer=reducing), dim)


def on_ranks_row_scaled(ranks: Ranks) -> None:
    x, shard = _rows(ranks)
    q = quantizer("plain", "both", row_scaled_nvfp4=True)
    errors._warned.clear()
    with pytest.warns(UserWarning, match="row-scaled tensor has no tensor scale"):
        assert_equal(all_gather(shard, ranks.group, quantizer=q), q(x))
    seen = torch.cat([q(part).dequantize() for part in shards_of(x, "channel", [32 // ranks.world] * ranks.world)], -1)
    own = shards_of(x, "channel", [32 // ranks.world] * ranks.world)[ranks.rank]
    assert_equal(all_gather(q(own), ranks.group, "channel"), q(seen))


def on_ranks_stochastic_rounding(ranks: Ranks) -> None:
    """Every rank gets the same codes, whether codes travelled or values, though each draws its own seeds."""
    for rows in (16, 5):
        x, shard = _rows(ranks, rows)
        q = quantizer(stochastic_rounding=True)
        got = all_gather(shard, ranks.group, quantizer=q)
        everyone = [torch.empty_like(got.rowwise_data) for _ in range(ranks.world)]
        dist.all_gather(everyone, got.rowwise_data)
        assert all(torch.equal(data, everyone[0]) for data in everyone)
        nearest = quantizer()(x)
        assert not torch.equal(got.rowwise_data, nearest.rowwise_data)
        assert torch.equal(got.rowwise_scale_inv.view(torch.uint8), nearest.rowwise_scale_inv.view(torch.uint8))


def on_ranks_grad_and_inference_modes(ranks: Ranks) -> None:
    x, shard = _rows(ranks, dtype=torch.float32)
    q = quantizer("rht")
    weight = torch.nn.Parameter(shard.clone())
    assert_equal(all_gather(weight, ranks.group, quantizer=q), q(x))
    assert_equal(all_gather(weight.clone(), ranks.group, quantizer=q), q(x))
    t = packed(q, weight, x).requires_grad_()
    assert_equal(all_gather(t, ranks.group), q(x))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            handle = all_gather(shard, ranks.group, async_op=True, quantizer=q)
            assert_equal(all_gather(t, ranks.group), q(x))
        assert_equal(handle.wait(), q(x))
    whole = all_gather(shard, ranks.group, quantizer=q)
    whole.mul_(2)  # the quantizer that it holds serves
    assert_equal(whole, q(q(x).dequantize() * 2))
    assert_equal(all_gather(x.t().contiguous().t()[16 * ranks.rank :][:16], ranks.group, quantizer=q), q(x))


def on_ranks_shards_that_do_not_fit(ranks: Ranks) -> None:
    """One rank differs: all raise the same, and the group serves on."""
    x, shard = _rows(ranks)
    last = ranks.rank == ranks.world - 1
    q = quantizer("rht")
    t = packed(q, shard, x)
    tile = packed(q, x[:16].reshape(1, 1, 16, 32), x)
    nan = x[:16].clone()
    nan[0, 0] = float("nan")
    other: dict[str, tuple[Any, Any]] = {  # message: (what all ranks but the last gather, what the last one does)
        "amax_rowwise: .* on rank": (t, q(shard * 0.5)),
        "amax_rowwise: .* nan on rank": (t, q(nan)),
        "amax_columnwise: .* on rank": (t, t.make_like(amax_columnwise=t.amax_columnwise * 2)),
        "packed: ": (t, (shard, q)),
        "rowwise: True on rank.* False on rank": (t, packed(quantizer("rht", "col"), shard, x)),
        "columnwise: ": (t, packed(quantizer("rht", "row"), shard, x)),
        "dtype: bfloat16 on .* float32 on": (t, packed(q, shard.float(), x.float())),
        "RHT: ": (t, packed(quantizer(), shard, x)),
        "sign mask: ": (t, packed(quantizer("rht without signs"), shard, x)),
        "ntile layout: ": (tile, tile.to_columnwise_layout("ntile")),
        "4over6: ": (packed(quantizer(), shard, x), packed(quantizer("4over6"), shard, x)),
        "e4m3_max: 256 on .* 448 on": (
            packed(quantizer("4over6"), shard, x),
            packed(quantizer("4over6", nvfp4_e4m3_max=448), shard, x),
        ),
        "row-scaled: ": (quantizer()(shard), quantizer(row_scaled_nvfp4=True)(shard)),
        "quantizer: ": (t, t.make_like(quantizer=None)),
        "quantizer: settings": (
            (shard, quantizer("4over6")),
            (shard, quantizer("4over6", nvfp4_4over6_err_mode="MSE")),
        ),
        "dimensions: ": (t, t.view(4, 4, 32)),
        r"shape: \(16, 32\) on .* \(16, 16\) on": ((shard, q), (shard[:, :16], q)),
    }
    for message, pair in other.items():
        given = pair[last]
        mine, own = given if isinstance(given, tuple) else (given, None)
        for async_op in (False, True):
            with pytest.raises(ValueError, match=f"got:   {message}"):
                all_gather(mine, ranks.group, async_op=async_op, quantizer=own)
    with pytest.raises(ValueError, match="dim: rows on .*; channel on"):
        all_gather(t, ranks.group, "channel" if last else "rows")
    _assert_usable(ranks)
    errors._warned.clear()
    unmade = t.make_like(quantizer=None)
    assert_equal(all_gather(unmade, ranks.group), q(x).make_like(quantizer=None))
    with pytest.raises(ValueError, match="nothing can quantize the whole"):
        all_gather(packed(q, shard[:5], x).make_like(quantizer=None), ranks.group)
    with pytest.warns(UserWarning, match="cut blocks"):
        got = all_gather(packed(q, shard[:5], x).make_like(quantizer=None), ranks.group, quantizer=q)
    assert got.quantizer == q
    _assert_usable(ranks)


def on_ranks_arguments_of_one_rank(ranks: Ranks) -> None:
    """A rank that refuses its arguments does not leave the others waiting."""
    x, shard = _rows(ranks)
    q = quantizer()
    bad: list[tuple[type, Callable[[], Any]]] = [
        (TypeError, lambda: all_gather(shard, ranks.group)),
        (TypeError, lambda: all_gather([shard], ranks.group, quantizer=q)),
        (TypeError, lambda: all_gather(shard, ranks.group, quantizer=nv.NVFP4BlockScaling())),
        (ValueError, lambda: all_gather(shard, ranks.group, "columns", quantizer=q)),
        (ValueError, lambda: all_gather(shard.double(), ranks.group, quantizer=q)),
        (ValueError, lambda: all_gather(shard, ranks.group, "height", quantizer=q)),
    ]
    for error, call in bad:
        if ranks.rank == ranks.world - 1:
            with pytest.raises(error, match="fix:") as raised:
                call()
            assert "another rank" not in str(raised.value)
        else:
            with pytest.raises(ValueError, match=f"an error on rank {ranks.world - 1}"):
                all_gather(shard, ranks.group, quantizer=q)
        _assert_usable(ranks)


def on_ranks_other_numbers_of_tensors(ranks: Ranks) -> None:
    """A rank with fewer tensors, or with none, does not leave the others waiting."""
    _, shard = _rows(ranks)
    for fewer in (0, 1, 2):
        count = fewer if ranks.rank == ranks.world - 1 else 3
        with pytest.raises(ValueError, match=f"3 on rank.*; {fewer} on rank {ranks.world - 1} tensors"):
            coalesced([shard] * count, ranks.group, quantizer=quantizer())
        _assert_usable(ranks)


def on_ranks_bytes_on_the_wire(ranks: Ranks) -> dict[str, float]:
    """Metadata included, against the values in bf16; counted by the library and by what torch.distributed is handed."""
    shapes = {"activation": (8, 32, 16, 64), "tokens": (256, 256)}
    ratios = {}
    for name, shape in shapes.items():
        for faces in ("row", "col", "both"):
            q, x = quantizer("rht", faces, backend="auto"), values(shape, dtype=torch.bfloat16).to(ranks.device)
            with calls_counted() as received, wire_bytes() as counter, quiet():
                all_gather(x, ranks.group, "batch" if len(shape) == 4 else "rows", quantizer=q)
            assert sum(received) == counter.received and len(received) == 2
            ratios[f"{name} {faces}"] = counter.received / ((ranks.world - 1) * x.nbytes)
            assert ratios[f"{name} {faces}"] <= (0.57 if faces == "both" else 0.29), (name, faces, ratios)
    with calls_counted() as received, wire_bytes() as counter, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        all_gather(x[: 5 + ranks.rank], ranks.group, quantizer=q)  # values; as long as the longest
    assert sum(received) == counter.received
    assert received[1] == (ranks.world - 1) * (4 + ranks.world) * x.shape[1] * 2
    return ratios


test_on_ranks = ranks_test(globals(), four=("groups", "values_where_blocks_would_be_cut", "bytes_on_the_wire"))
