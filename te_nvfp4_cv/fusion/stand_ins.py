"""Stand in for tensors while torch.fx runs a forward, and refuse what the model's code asks and no graph records.

Torch's own stand-ins answer some questions without a word: whether they are a list, equal to a key of a dictionary,
None. The answer would be frozen in the graph.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

TRACING = ("torch", "te_nvfp4_cv", "inspect", "typing", "abc")  # questions from here are not the model's
IN_PLACE_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
OPTIONAL = ("grad", "grad_fn", "_base")  # attributes of a tensor that may be None


class Untraceable(Exception):
    """Raised with the reason why a forward cannot be traced."""


def _asked_by_the_model() -> bool:
    caller: str = sys._getframe(2).f_globals.get("__name__", "")
    return caller.split(".")[0] not in TRACING


class _Watched(fx.Proxy):
    @property
    def __class__(self) -> type:  # type: ignore[override]
        # isinstance reads __class__, also inside torch, whose questions must not count.
        if _asked_by_the_model():
            self.tracer.asked(self.node)  # type: ignore[attr-defined]
        return StandIn

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise Untraceable("its forward changes the class of a tensor")

    def __hash__(self) -> int:
        if _asked_by_the_model():
            raise Untraceable("its forward looks an argument up in a set or dictionary")
        return object.__hash__(self)

    def __getattr__(self, name: str) -> Any:
        if _asked_by_the_model():
            if type(self) is StandIn and not hasattr(torch.Tensor, name):
                raise Untraceable(f"its forward asks a tensor for {name!r}")
            if name in OPTIONAL:
                raise Untraceable(f"its forward reads {name!r} of a tensor")
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if _asked_by_the_model():
            raise Untraceable(f"its forward sets {name!r} of a tensor")
        super().__setattr__(name, value)


class StandIn(_Watched):
    """A stand-in for a tensor, or for what a call in the graph returns."""


class _Attribute(_Watched, fx.proxy.Attribute):
    """A stand-in for an attribute of a tensor, such as its dtype."""


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Keep x += y in the graph as it is. Torch.fx alone records x = x + y, which leaves other names of x unchanged."""

    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in IN_PLACE_OPERATORS:
    setattr(_Watched, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))
