"""Ask torch the questions that its public interface cannot answer.

Private names of torch that several folders need are used here and nowhere else, so that a new version of torch is
checked in one place. A name that one file alone needs stays in that file; docs/ARCHITECTURE.md lists all of them.

Names that are only passed on stand first, under a name that says what they do. They are torch's own objects and not
functions around them: torch.compile recognizes some of them by identity, and some are called for every layer.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._ops import HigherOrderOperator as HigherOrderOperator  # renamed to themselves: imported for others
from torch._ops import OperatorBase as OperatorBase
from torch._ops import OpOverload as OpOverload
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only

Answer = TypeVar("Answer", bound=Callable[..., Any])
Inlined = TypeVar("Inlined", bound=Callable[..., object])
AnyBatchNorm = torch.nn.modules.batchnorm._BatchNorm  # the base of BatchNorm1d, 2d and 3d, and of SyncBatchNorm
BatchOrInstanceNorm = torch.nn.modules.batchnorm._NormBase  # the base of these and of InstanceNorm1d, 2d and 3d
function_modes = torch.overrides._get_current_function_mode_stack  # () -> the modes of this thread, the innermost last
left_alone = torch._disable_dynamo  # decorates a function that torch.compile does not trace, nor what it calls
classes_override = torch._C._is_torch_function_enabled  # () -> False where a tensor's class has been asked already
without_function_modes = torch._C.DisableTorchFunction  # a context manager: no function mode sees the calls inside
without_subclasses = torch._C.DisableTorchFunctionSubclass  # the same for the overrides of tensor subclasses
without_modes = torch.utils._python_dispatch._disable_current_modes  # for dispatch modes: tensors are real inside
grouped_products = (torch._grouped_mm, torch.ops.aten._grouped_mm)  # rows of tokens times a kernel for each expert
dispatch_modes = torch._C._len_torch_dispatch_stack  # how many are active
graph_task = torch._C._current_graph_task_id  # of the backward pass that runs in this thread; -1 if none does
versions_put_back = torch.autograd._unsafe_preserve_version_counter  # of tensors that get their values back inside
wrapper_subclass = torch.Tensor._make_wrapper_subclass  # makes a tensor of a subclass, which has no memory itself


def saved_tensors_hooks_are_on() -> bool:
    """Return True inside torch.autograd.graph.saved_tensors_hooks, which may read or copy a tensor as it is saved."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_batched(tensor: torch.Tensor) -> bool:
    """Return True for a tensor inside of torch.vmap, or of the older one that autograd uses itself."""
    if torch.compiler.is_compiling():  # Dynamo cannot trace the question
        return False
    return torch._C._functorch.is_legacy_batchedtensor(tensor) or torch._C._functorch.is_batchedtensor(tensor)


def in_backward() -> bool:
    """Return True while autograd runs a backward pass in this thread, so that a forward is a checkpoint's recompute."""
    return graph_task() != -1


def under_checkpoint() -> bool:
    """Return True if the innermost dispatch mode is that of a selective checkpoint."""
    if not dispatch_modes():
        return False
    from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

    mode = torch.utils._python_dispatch._get_current_dispatch_mode()
    return isinstance(mode, (_CachedTorchDispatchMode, _CachingTorchDispatchMode))


def unseen_by_checkpoints(function: Answer) -> Answer:
    """Decorate a function that keeps state: a selective checkpoint neither keeps its results nor counts its operators.

    The checkpoint gives the n-th call of an operator, when it runs the forward again, what the n-th call gave in the
    first one. State is made and moved in the first one only, so later calls would get the results of other ones.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not dispatch_modes():
            return function(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            while under_checkpoint():
                stack.enter_context(torch.utils._python_dispatch._pop_mode_temporarily())
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def not_traced(reason: str) -> Exception:
    """Return what breaks the graph if it is raised where torch.compile asks a tensor for a stand-in to trace with."""
    from torch._subclasses import UnsupportedFakeTensorException  # slow to load

    return UnsupportedFakeTensorException(reason)  # type: ignore[no-untyped-call]


def has_no_values(tensor: torch.Tensor) -> bool:
    """Return True for a tensor on the meta device, and for a fake one, which only says that it is on another."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")  # slow to load; without it, there are none
    return tensor.is_meta or (fake is not None and isinstance(tensor, fake.FakeTensor))


def held_by_a_module(tensor: torch.Tensor) -> bool:
    """Return True, while torch.compile traces, if a module holds the tensor: a Parameter, a buffer, an attribute."""
    # Dynamo writes this on what it reads from modules, because their memory stays where it is.
    return getattr(tensor, "_dynamo_static_input_type", None) is not None


def constant_in_graphs(function: Answer) -> Answer:
    """Decorate a function so that torch.compile runs it once, while it traces, and keeps the answer as a constant.

    torch.compiler.assume_constant_result does the same, and would import Dynamo wherever it is used.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def only_inlined(function: Inlined) -> Inlined:
    """Decorate a function that torch.compile traces as a part of its caller, and never as a graph of its own.

    What the function calls may be a graph: some of it is code of the model.
    """
    return _strategy(function, "DEFAULT")


def no_graphs_inside(function: Inlined) -> Inlined:
    """Decorate a function as only_inlined does; called in eager mode, nothing that it calls is a graph either."""
    return _strategy(function, "SKIP")


def _strategy(function: Inlined, below: str) -> Inlined:
    frames = torch._C._dynamo.eval_frame
    # torch._dynamo has a function for that, and takes a second to import. Where this is missing, a graph is wasted.
    if hasattr(frames, "set_code_exec_strategy"):
        actions = frames._FrameAction
        skip = frames._FrameExecStrategy(actions.SKIP, getattr(actions, below))
        frames.set_code_exec_strategy(function.__code__, skip)  # type: ignore[attr-defined]
    return function


def cpu_multiplies_bf16() -> bool:
    """Return True if this CPU has bf16 arithmetic: AVX-512 bf16 or AMX."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def cpu_has_tiles() -> bool:
    """Return True if this CPU multiplies bf16 matrices in AMX tiles."""
    return bool(torch.cpu._is_amx_tile_supported())
