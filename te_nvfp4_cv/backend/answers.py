"""A property that is computed once and kept in its object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

import torch

T = TypeVar("T")


class answer(Generic[T]):  # noqa: N801  (a decorator, named as property is)
    """Decorate a method that takes no arguments: it runs at the first question, and its result answers all later ones.

    functools.cached_property would do, but before Python 3.12 it takes a lock, which torch.compile cannot trace. While
    torch.compile traces, nothing is kept: the object may hold traced sizes.
    """

    def __init__(self, function: Callable[[Any], T]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> answer[T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        value = self.function(instance)
        if not torch.compiler.is_compiling():
            instance.__dict__[self.function.__name__] = value  # found before this descriptor from now on
        return value
