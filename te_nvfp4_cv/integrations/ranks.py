"""Keep the states of all ranks in a checkpoint that one of them writes.

    states = gathered(own)       a list, one state of each rank in their order; every rank must call it
    own = of_this_rank(states)   what this rank put in, or the first where another number of ranks resumes
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch


def world() -> int:
    """Return the number of ranks, which is 1 without torch.distributed."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def gathered(own: Any) -> list[Any]:
    """Return the states of all ranks, in their order. All ranks must call it together."""
    if world() == 1:
        return [own]
    states: list[Any] = [None] * world()
    torch.distributed.all_gather_object(states, own)
    return states


def of_this_rank(states: Sequence[Any]) -> Any:
    """Return this rank's state, or that of rank 0, with a warning, if another number of ranks saved them."""
    if len(states) != world():
        text = f"The checkpoint has states of {len(states)} ranks, this run has {world()}: each takes those of rank 0,"
        warnings.warn(f"{text} and the run does not go on bit for bit.", UserWarning, stacklevel=3)
        return states[0]
    return states[torch.distributed.get_rank()] if len(states) > 1 else states[0]
