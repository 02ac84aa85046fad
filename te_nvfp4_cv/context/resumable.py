"""Run generators and coroutines under a context: it is entered when they go on, and left when they pause.

A decorator that enters a context around the call of such a function is left again before the first line of it runs.
And a context that stays open while the function pauses would rule what its caller runs meanwhile.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any


def decorated(context: AbstractContextManager[Any], function: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a function of the same kind whose body runs under `context`; None if one call runs the body.

    Args:
        context: can be entered again and again.
        function: generator function, coroutine function (`async def`) or asynchronous generator function.
    """
    made: Callable[..., Any]
    if inspect.isasyncgenfunction(function):

        async def made(*args: Any, **kwargs: Any) -> Any:
            inner, step = function(*args, **kwargs), "__anext__"
            given: tuple[Any, ...] = ()
            try:
                while True:
                    try:
                        item = await _awaited(context, getattr(inner, step)(*given))
                    except StopAsyncIteration:
                        return
                    try:
                        step, given = "asend", ((yield item),)
                    except Exception as error:
                        step, given = "athrow", (error,)
            finally:
                await _awaited(context, inner.aclose())

    elif inspect.iscoroutinefunction(function):

        async def made(*args: Any, **kwargs: Any) -> Any:
            return await _awaited(context, function(*args, **kwargs))

    elif inspect.isgeneratorfunction(function):

        def made(*args: Any, **kwargs: Any) -> Any:
            return (yield from _resumed(context, function(*args, **kwargs)))

    else:
        return None
    return functools.wraps(function)(made)


@types.coroutine
def _awaited(context: AbstractContextManager[Any], awaitable: Any) -> Generator[Any, Any, Any]:
    return (yield from _resumed(context, awaitable.__await__()))


def _resumed(context: AbstractContextManager[Any], inner: Any) -> Generator[Any, Any, Any]:
    """Pass on what goes into and comes out of a generator, which runs under `context`."""
    step: Callable[[], Any] = functools.partial(next, inner)
    while True:
        try:
            with context:
                item = step()
        except StopIteration as end:
            return end.value
        try:
            sent = yield item
        except GeneratorExit:
            with context:
                inner.close()
            raise
        except BaseException as error:
            # The iterator of an awaitable need not be a generator.
            if not hasattr(inner, "throw"):
                raise
            step = functools.partial(inner.throw, error)
        else:
            step = functools.partial(next, inner) if sent is None else functools.partial(inner.send, sent)
