"""A hundred random networks on images that are cut into rows; test_spatial_models.py runs a few."""

from __future__ import annotations

import pytest

from tests.distributed.launch import Ranks, ranks_test
from tests.distributed.test_spatial_models import run_random


def on_ranks_a_hundred_networks(ranks: Ranks) -> None:
    """Each ends on all ranks within the group's time limit, with the results of one process."""
    assert run_random(ranks, range(100, 212)) >= 100


test_on_ranks = pytest.mark.stress(ranks_test(globals(), worlds=(2,)))
