"""Let torch.utils.swap_tensors exchange tensors about which this package remembers something.

With torch.__future__.set_swap_module_params_on_conversion(True), model.to() exchanges what a Parameter is for a new
tensor, and the Python object stays. It refuses a tensor with weak references, because they would follow the object.
That is what tables by identity want. So swap_tensors is wrapped: each table gives a tensor up for the exchange.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Drops every weak reference to a tensor, and returns what puts back what is worth it, or None.
GiveUp = Callable[[Tensor], Callable[[], None] | None]

_tables: list[GiveUp] = []


def gives_up(table: GiveUp) -> GiveUp:
    """Decorate a function that is to be called with each tensor before it is exchanged."""
    _tables.append(table)
    return table


def _wrap(swap_tensors: Any) -> Any:
    @functools.wraps(swap_tensors)
    def wrapped(t1: Tensor, t2: Tensor) -> None:
        put_back = [restore for table in _tables for t in (t1, t2) if (restore := table(t)) is not None]
        try:
            swap_tensors(t1, t2)
        finally:
            for restore in put_back:
                restore()

    return wrapped


if not hasattr(torch.utils.swap_tensors, "__wrapped__"):
    torch.utils.swap_tensors = _wrap(torch.utils.swap_tensors)
