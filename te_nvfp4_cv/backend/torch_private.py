"""Ask torch the questions that its public interface cannot answer.

Private names of torch that several folders need are used here and nowhere else, so that a new version of torch is
checked in one place: transforms, modes, saved-tensor hooks, the running backward pass, and what a CPU can do. A name
that one file alone needs stays in that file: torch.utils.checkpoint's in context/torch_patches.py, those of module
hooks in nn/hooks.py, and those of operator registration in backend/registration.py.
"""

from __future__ import annotations

import torch


def transformed() -> bool:
    """Return True inside a torch.func transform (grad, vmap, jvp) or a forward-mode level.

    The package's autograd functions do not know these. While torch.compile traces, the answer is False.
    """
    if torch.compiler.is_compiling():
        return False
    # A level of forward mode is -1 as long as none is open.
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def function_modes() -> list[torch.overrides.TorchFunctionMode]:
    """Return the function modes of this thread that see torch calls now, the innermost last."""
    return torch.overrides._get_current_function_mode_stack()


def dispatch_modes_are_on() -> bool:
    """Return True if a dispatch mode (FakeTensorMode, a profiler of operators) sees the operators of this thread."""
    return bool(torch._C._len_torch_dispatch_stack())


def saved_tensors_hooks_are_on() -> bool:
    """Return True inside torch.autograd.graph.saved_tensors_hooks, which may read or copy a tensor as it is saved."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def in_backward() -> bool:
    """Return True while autograd runs a backward pass in this thread, so that a forward is a checkpoint's recompute."""
    return torch._C._current_graph_task_id() != -1


def cpu_multiplies_bf16() -> bool:
    """Return True if this CPU has bf16 arithmetic: AVX-512 bf16 or AMX."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
