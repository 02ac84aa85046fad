"""200 random programs of two ranks (pairs.py): no hang, and each is equal to its meaning or raises on both ranks."""

from __future__ import annotations

import pytest

from tests.distributed.launch import Ranks, ranks_test
from tests.distributed.pairs import random_pairs


def on_ranks_200_random_pairs(ranks: Ranks) -> str:
    return random_pairs(ranks, seed=1, count=200)


test_on_ranks = pytest.mark.stress(ranks_test(globals(), worlds=(2,)))
