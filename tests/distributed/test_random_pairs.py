"""Random programs of two ranks (pairs.py): a few of them; test_random_pairs_stress.py runs 200."""

from __future__ import annotations

from tests.distributed.launch import Ranks, ranks_test
from tests.distributed.pairs import random_pairs


def on_ranks_random_pairs(ranks: Ranks) -> str:
    return random_pairs(ranks, seed=0, count=12)


test_on_ranks = ranks_test(globals(), worlds=(2,))
