"""The stream of seeds of stochastic rounding: a function of torch's seed, apart from torch's generator."""

from __future__ import annotations

import threading
from typing import ClassVar

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
    torch.manual_seed(3)
    expected = torch.randn(5), torch.rand(1000), torch.randn(3, dtype=torch.float64)
    torch.manual_seed(3)
    draw()
    torch.set_rng_state(torch.get_rng_state())  # a state with a position is the same state for torch
    draw()
    assert all(map(torch.equal, expected, (torch.randn(5), torch.rand(1000), torch.randn(3, dtype=torch.float64))))


@pytest.mark.parametrize("inner_seed", [0, 3])
def test_a_seed_set_for_a_while_does_not_rewind_the_stream(inner_seed):
    torch.manual_seed(3)
    expected = draw(6)
    torch.manual_seed(3)
    got = []
    for _ in range(3):
        got += draw(2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(inner_seed)
            inner = draw(1)
            torch.manual_seed(inner_seed)
            assert draw(1) == inner
    assert got == expected


@pytest.mark.parametrize("carry", ["itself", "copy", "file", "numbers"])
def test_a_saved_state_carries_the_position(carry, tmp_path):
    torch.manual_seed(3)
    draw(2)
    saved = torch.get_rng_state()
    expected = draw()
    if carry == "copy":
        saved = saved.clone()
    elif carry == "file":
        torch.save(saved, tmp_path / "state.pt")
        saved = torch.load(tmp_path / "state.pt", weights_only=True)
    elif carry == "numbers":
        saved = torch.tensor(saved.tolist(), dtype=torch.uint8)
    torch.manual_seed(9)
    draw(3)
    torch.set_rng_state(saved)
    assert draw() == expected
    torch.random.set_rng_state(saved)
    assert draw() == expected


def test_forks_nest_and_states_are_told_apart_where_torch_has_not_moved():
    torch.manual_seed(3)
    expected = draw(9)
    torch.manual_seed(3)
    first = torch.get_rng_state()
    got = draw(3)
    with torch.random.fork_rng(devices=[]):
        draw(5)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
        assert draw(1) == expected[8:9]
    assert got + draw(6) == expected
    torch.set_rng_state(first)
    assert draw(9) == expected


def test_a_state_without_a_position_leaves_the_stream_where_it_is():
    torch.manual_seed(3)
    expected = draw(6)
    torch.manual_seed(3)
    got = draw(3)
    for set_state in (torch.set_rng_state, torch.default_generator.set_state):
        state = torch.default_generator.get_state()  # as torch without this library saves it
        torch.manual_seed(0)
        draw(2)
        set_state(state)
    assert got + draw(3) == expected
    with pytest.raises(RuntimeError):
        torch.set_rng_state(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(TypeError):
        torch.set_rng_state([1, 2])


class Recomputes(torch.autograd.Function):
    """Draws its noise in backward, under the random state of the forward, as functions that recompute do."""

    drawn: ClassVar[list[int]] = []

    @staticmethod
    def forward(ctx, x, seed):
        ctx.state, ctx.seed = torch.get_rng_state(), seed
        return x * 2

    @staticmethod
    def backward(ctx, g):
        with torch.random.fork_rng(devices=[]):
            if ctx.seed is None:
                torch.set_rng_state(ctx.state)
            else:
                torch.manual_seed(ctx.seed)
            Recomputes.drawn += draw(2)
        return g * 2, None


@pytest.mark.parametrize("seed", [None, 3])
def test_functions_that_recompute_in_backward_draw_new_seeds_at_each_layer_and_step(seed):
    torch.manual_seed(3)
    Recomputes.drawn.clear()
    for _ in range(2):
        x = torch.ones(1, requires_grad=True)
        Recomputes.apply(Recomputes.apply(x, seed), seed).backward()
    found = list(Recomputes.drawn)
    torch.manual_seed(3)
    assert found == draw(8)


def test_torch_script_and_torch_compile_know_the_functions_still():
    def seeded(x):
        torch.manual_seed(0)
        return x + torch.rand(3)

    def forked(x):
        state = torch.get_rng_state()
        y = x + torch.rand(3)
        torch.set_rng_state(state)
        return y

    x = torch.zeros(3)
    assert torch.equal(torch.jit.script(seeded)(x), seeded(x))
    torch._dynamo.reset()
    draw(2)
    for function in (seeded, forked):
        assert torch.equal(torch.compile(function, backend="eager")(x), function(x))
    torch._dynamo.reset()


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
