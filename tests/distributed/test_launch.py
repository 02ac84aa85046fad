"""The launcher itself: what ranks return reaches the test, what they raise fails it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.distributed.launch import Ranks, ranks_test, results


def on_ranks_meet(ranks: Ranks) -> int:
    total = torch.tensor([ranks.rank + 1], device=ranks.device)
    dist.all_reduce(total)
    assert int(total) == ranks.world * (ranks.world + 1) // 2
    return ranks.rank


test_on_ranks = ranks_test(globals(), worlds=(2,))


def test_what_ranks_return_comes_back_in_their_order(tmp_path_factory):
    assert results(__file__, 2, "meet", tmp_path_factory) == [0, 1]
