"""Streams of stochastic rounding: ranks seeded alike round differently, but those that share a stream round alike."""

from __future__ import annotations

import torch
import torch.distributed as dist

import te_nvfp4_cv as nv
from te_nvfp4_cv.ops.quantize import rounding_seeds
from tests.distributed.launch import Ranks, ranks_test, results
from tests.helpers import same_bits, values


def _gathered(value: torch.Tensor, ranks: Ranks) -> list[torch.Tensor]:
    out = [torch.empty_like(value) for _ in range(ranks.world)]
    dist.all_gather(out, value)
    return out


def _gradient(ranks: Ranks) -> torch.Tensor:
    """dw of one layer: the same x, w, dy and torch seed on every rank."""
    torch.manual_seed(3)
    conv = torch.nn.Conv2d(16, 16, 3, padding=1).to(ranks.device)
    x = values((16, 16, 4, 4), seed=1).to(ranks.device)
    with nv.nvfp4_autocast():
        y = conv(x)
    y.backward(values(tuple(y.shape), seed=2).to(ranks.device))
    return conv.weight.grad.detach()


def on_ranks_differ_unless_they_share_a_stream(ranks: Ranks) -> None:
    own = _gathered(_gradient(ranks), ranks)
    assert all(not same_bits(own[0], other) for other in own[1:])
    try:
        rounding_seeds.share_stream(0)
        shared = _gathered(_gradient(ranks), ranks)
    finally:
        rounding_seeds.share_stream(None)
    assert all(same_bits(own[0], other) for other in shared)


def on_ranks_torch_draws_the_same_numbers_with_and_without_rounding(ranks: Ranks) -> None:
    torch.manual_seed(3)
    _gradient(ranks)
    after = torch.rand(4)
    torch.manual_seed(3)
    values((16, 16, 4, 4), seed=1)
    torch.nn.Conv2d(16, 16, 3, padding=1)
    assert same_bits(after, torch.rand(4))


def on_ranks_streams_go_on_where_extra_state_left_them(ranks: Ranks) -> None:
    torch.manual_seed(7)
    like = torch.zeros(1)
    rounding_seeds.draw_seed(like)
    saved = nv.extra_state(torch.nn.Linear(16, 16))
    objects = [saved]
    dist.broadcast_object_list(objects, src=0)  # rank 0 writes the checkpoint; all ranks read it
    expected = [int(rounding_seeds.draw_seed(like)) for _ in range(3)]
    torch.manual_seed(7)
    nv.extra_state(torch.nn.Linear(16, 16), load=objects[0])
    assert [int(rounding_seeds.draw_seed(like)) for _ in range(3)] == expected


def on_ranks_seeds(ranks: Ranks) -> list[int]:
    torch.manual_seed(11)
    return [int(rounding_seeds.draw_seed(torch.zeros(1))) for _ in range(5)]


test_on_ranks = ranks_test(globals(), worlds=(2,))


def test_rank_0_draws_what_a_single_process_draws(tmp_path_factory):
    by_rank = results(__file__, 2, "seeds", tmp_path_factory)
    torch.manual_seed(11)
    assert by_rank[0] == [int(rounding_seeds.draw_seed(torch.zeros(1))) for _ in range(5)]
    assert not set(by_rank[0]) & set(by_rank[1])
