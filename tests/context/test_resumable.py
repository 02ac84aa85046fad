"""`@nv.nvfp4_autocast()` on generator and async functions: the body runs under the context, its caller does not."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator

import pytest
import torch.nn as nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.context import function_mode
from tests.helpers import same_bits, values
from tests.networks import NO_SR


def on() -> bool:
    return nv.active_recipe() == NO_SR


@nv.nvfp4_autocast(NO_SR)
def numbers(count: int) -> Iterator[object]:
    """Yield, and answer what is sent."""
    assert on()
    got = []
    try:
        for number in range(count):
            try:
                got.append((yield number))
            except KeyError as error:
                got.append(error.args[0])
            assert on()
        return got
    finally:
        assert on()


def test_a_generator_runs_under_the_context_and_its_caller_does_not():
    running = numbers(4)
    assert inspect.isgeneratorfunction(numbers) and numbers.__doc__ == "Yield, and answer what is sent."
    assert next(running) == 0 and not on()
    assert running.send("sent") == 1 and running.throw(KeyError("thrown")) == 2 and next(running) == 3
    with pytest.raises(StopIteration) as end:
        running.send("last")
    assert end.value.value == ["sent", "thrown", None, "last"] and not function_mode.mode_is_on()
    early = numbers(2)
    next(early)
    early.close()
    with pytest.raises(ValueError, match="mine"):
        failing = numbers(2)
        next(failing)
        failing.throw(ValueError("mine"))
    assert list(numbers(3)) == [0, 1, 2] and not on() and not function_mode.mode_is_on()


def test_layers_in_a_generator_run_in_nvfp4():
    conv, x = nn.Conv2d(16, 16, 3), values((4, 16, 8, 8))

    @nv.nvfp4_autocast(NO_SR)
    def batches() -> Iterator[object]:
        yield conv(x)
        yield conv(x)

    with nv.nvfp4_autocast(NO_SR):
        expected = conv(x)
    for y in batches():
        assert same_bits(y, expected) and not same_bits(conv(x), expected)


@nv.nvfp4_autocast(NO_SR)
async def answer(turns: int) -> int:
    for _ in range(turns):
        assert on()
        await asyncio.sleep(0)
    assert on()
    return turns


@nv.nvfp4_autocast(NO_SR)
async def stream(count: int) -> AsyncIterator[object]:
    try:
        for number in range(count):
            await asyncio.sleep(0)
            assert on()
            try:
                yield number
            except KeyError:
                yield "thrown"
            assert on()
    finally:
        assert on()


def test_coroutines_do_not_rule_each_other():
    seen = []

    async def other() -> None:
        for _ in range(6):
            seen.append(on())
            await asyncio.sleep(0)

    async def all_of_them() -> list[object]:
        return await asyncio.gather(answer(3), other(), answer(2))

    assert inspect.iscoroutinefunction(answer) and inspect.isasyncgenfunction(stream)
    assert asyncio.run(all_of_them()) == [3, None, 2] and seen == [False] * 6

    async def failing() -> None:
        task = asyncio.ensure_future(answer(1000))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not on()

    asyncio.run(failing())
    assert not function_mode.mode_is_on()


def test_asynchronous_generators():
    async def run() -> list[object]:
        found: list[object] = []
        async for item in stream(3):
            assert not on()
            found.append(item)
        running = stream(3)
        found.append(await anext(running))
        found.append(await running.athrow(KeyError("mine")))
        await running.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(running)
        return found

    assert asyncio.run(run()) == [0, 1, 2, 0, "thrown"]
    assert not on() and not function_mode.mode_is_on()


def test_plain_functions_and_lambdas_as_before():
    run = nv.nvfp4_autocast(NO_SR)(on)
    assert run() and not on() and run.__name__ == "on"
