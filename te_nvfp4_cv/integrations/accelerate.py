"""Resume an accelerate script in NVFP4 bit for bit.

    accelerator.register_for_checkpointing(NVFP4State(model))

save_state keeps weights, optimizer and random states, and with the random states the position in the stream of
stochastic rounding. What it cannot know are delayed tensor scales: this object holds them, those of every process. Save
after an optimizer step: accelerate does not keep gradients that are still accumulating.
This file does not import accelerate, which asks its objects for state_dict and load_state_dict only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from te_nvfp4_cv.errors import check_module, value_error
from te_nvfp4_cv.integrations.ranks import gathered, of_this_rank
from te_nvfp4_cv.nn.resume import extra_state


class NVFP4State:
    """Hold nv.extra_state of every process, in the form that Accelerator.register_for_checkpointing takes.

    Args:
        model: The model, before or after Accelerator.prepare.
    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> import torch
        >>> from te_nvfp4_cv.integrations.accelerate import NVFP4State
        >>> state = NVFP4State(torch.nn.Conv2d(16, 16, 3))  # for accelerator.register_for_checkpointing(state)
        >>> state.load_state_dict(state.state_dict())
    """

    def __init__(self, model: nn.Module) -> None:
        check_module("NVFP4State", model, "NVFP4State(model)")
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        """Return what a bit-exact resume needs beyond weights, optimizer and random states.

        All processes must call it together, as save_state does. The main process writes it.
        """
        return {"processes": gathered(extra_state(self.model))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state. accelerate has restored torch's random state before.

        Another number of processes takes the scales of the first process: such a run goes on, but not bit for bit.

        Raises:
            ValueError: The state is not one of this class, or it does not fit the model.
        """
        states = state.get("processes") if isinstance(state, Mapping) else None
        if not isinstance(states, list) or not states:
            raise value_error(
                "NVFP4State: this is not what it saved.",
                got=f"{state!r:.120}", needs='{"processes": [nv.extra_state(model), ...]}',
                fix="register the objects in the order in which they were registered when the state was saved",
            )
        extra_state(self.model, load=of_this_rank(states))
