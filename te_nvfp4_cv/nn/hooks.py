"""Put a pair of forward hooks around a module: one that runs before its forward, and one after it.

set_precision and learn_scales keep what they say of a module in such a pair. The hooks are objects, not functions, so
that a module with them can be copied and pickled; both push to a stack and pop from it, so nested modules work.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from te_nvfp4_cv.errors import message


class Hook:
    """A forward hook that survives pickling together with its module."""

    hook_id = -1  # hooks of learn_scales that version 0.1 pickled have no id of their own

    @property
    def __name__(self) -> str:
        """Explain to torch.jit.script, which asks for it, that it cannot have it."""
        raise AttributeError(
            message(
                "nvfp4: torch.jit.script does not take a model with entries of nv.set_precision or nv.learn_scales.",
                got="a module with hooks that act inside of nvfp4_autocast, whose calls no context would see any more",
                needs="torch.compile or torch.export in its place",
                fix="or nv.clear_precision(model) before scripting it, for high precision",
            )
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Torch pickles the tables of hooks with their ids, and counts new ids anew in each process: without this line,
        # the next hook that this process registers could replace the unpickled one.
        RemovableHandle.next_id = max(RemovableHandle.next_id, self.hook_id + 1)


class HookOfRanks(Hook):
    """A forward hook that cuts tensors for ranks, or puts them together. Copies for export go without it."""

    def __deepcopy__(self, memo: Any) -> HookOfRanks:
        return self  # it holds a mesh, of which there are no copies


def attach(module: nn.Module, enter: Hook, leave: Hook, first: bool = False) -> None:
    """Register `enter` before the module's forward and `leave` after it, also if the forward raises.

    Args:
        first: Run `enter` before the hooks that the module has already.
    """
    enter.hook_id = module.register_forward_pre_hook(enter, prepend=first).id  # type: ignore[arg-type]
    leave.hook_id = module.register_forward_hook(leave, always_call=True).id  # type: ignore[arg-type]


def detach(module: nn.Module, *kinds: type[Hook]) -> None:
    """Remove the module's forward hooks of these classes."""
    for table in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in table.items() if isinstance(hook, kinds)]:
            del table[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)  # RemovableHandle.remove would do so, but is not pickled
