"""The stream of seeds of stochastic rounding: a function of torch's seed, apart from torch's generator."""

from __future__ import annotations

import threading

import pytest
import torch

from te_nvfp4_cv.ops.quantize import rounding_seeds


def draw(n: int = 4) -> list[int]:
    return [int(rounding_seeds.draw_seed(torch.empty(0))) for _ in range(n)]


def test_the_stream_follows_torchs_seed_and_restarts_with_it():
    torch.manual_seed(3)
    first = draw()
    assert len(set(first)) == 4 and all(0 <= seed < 2**63 for seed in first)
    torch.manual_seed(3)
    assert draw() == first
    torch.manual_seed(4)
    assert not set(draw()) & set(first)
    torch.random.manual_seed(-1)  # negative seeds are allowed
    assert not set(draw()) & set(first)


def test_drawing_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    draw()
    assert torch.equal(before, torch.get_rng_state())


def test_a_seed_set_for_a_while_does_not_rewind_the_stream():
    torch.manual_seed(3)
    expected = draw(6)
    torch.manual_seed(3)
    got = []
    for _ in range(3):
        got += draw(2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inner = draw(1)
            torch.manual_seed(0)
            assert draw(1) == inner
    assert got == expected


def test_state_continues_the_stream_and_belongs_to_one_seed():
    torch.manual_seed(3)
    draw(2)
    saved, generator = rounding_seeds.state(), torch.get_rng_state()
    rest = draw()
    torch.manual_seed(9)
    draw()
    with pytest.raises(RuntimeError, match=r"manual_seed\(3\)"):
        rounding_seeds.set_state(saved)
    torch.set_rng_state(generator)
    rounding_seeds.set_state(saved)
    assert draw() == rest
    torch.manual_seed(9)
    assert rounding_seeds.state() == {"seed": 9, "drawn": 0}


def test_many_seeds_leave_a_bounded_memory():
    for seed in range(200):
        torch.manual_seed(seed)
        draw(1)
    assert len(rounding_seeds._drawn) <= rounding_seeds._KEEP


def test_threads_never_draw_the_same_seed():
    torch.manual_seed(3)
    drawn: list[int] = []
    threads = [threading.Thread(target=lambda: drawn.extend(draw(50))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(drawn)) == 200
