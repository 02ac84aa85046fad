"""Tells kernels that are constants, such as fixed filter banks, from kernels that a model trains or computes.

torch.autocast casts any kernel, and so does NVFP4: a Parameter, and what is computed from anything, as weight
standardization, weight_norm or a hypernetwork do. A constant stays in high precision: no training makes up for what
rounding takes from it. Autograd cannot tell the two apart, as it records nothing under torch.no_grad and nothing of
frozen Parameters. So it is asked where the kernel comes from, which is the same in training and in evaluation:

    held      a running module has the tensor among its buffers, or as a plain attribute            constant
    taken     moved, cast, copied, reshaped or indexed, from a constant                              constant
    the rest  a Parameter, a tensor in the place of a Parameter (functional_call), computed          not a constant

A plain attribute `weight` of torch's own layers, and any plain attribute of a module with forward pre-hooks, does not
count: there the reparametrizations of torch (weight_norm, spectral_norm, prune) put the kernel that they compute. Hooks
of this package, with which coverage and others look on, and those of FSDP2 compute none, so they change no decision.
Arithmetic makes a kernel computed, also where it reads nothing but buffers.

Eager mode reads which modules run from Python's frames, only for the few calls whose kernel may be a constant, and
remembers copies by identity. torch.compile knows what a module holds, and follows it through the graph by a mark.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.backend.swapping import gives_up
from te_nvfp4_cv.backend.torch_private import held_by_a_module, no_graphs_inside

MARK = "_te_nvfp4_cv_constant"  # on tensors inside a graph of torch.compile
_LOOK_ON = (__name__.partition(".")[0] + ".", "torch.distributed.")  # whose forward pre-hooks compute no kernel
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NAMES = (
    *("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "clone", "contiguous", "detach"),
    *("repeat", "tile", "expand", "expand_as", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten"),
    *("unsqueeze", "squeeze", "transpose", "swapaxes", "permute", "movedim", "t", "flip", "narrow", "select"),
    *("__getitem__", "index_select", "roll", "rot90"),
)
_GETTERS = tuple(getattr(Tensor, name).__get__ for name in ("T", "mT", "data"))
TAKING: frozenset[Any] = frozenset(
    # Not torch.cpu and torch.cuda, which are modules: torch.compile of torch 2.11 cannot look for one in a set.
    [f for owner in (Tensor, torch) for name in _NAMES if callable(f := getattr(owner, name, None))] + [*_GETTERS]
)
"""Functions of torch whose result has the values of their first argument."""

# By id, as tensors compare element by element: a tensor that was taken from another one, and that other one.
_taken: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor]]] = {}


@gives_up
def _forget(tensor: Tensor) -> None:
    for number, entry in list(_taken.items()):
        if any(known() is tensor for known in entry):
            _taken.pop(number, None)


@no_graphs_inside
def take(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return function(*args, **kwargs) of a function in TAKING, and remember what the result was taken from."""
    y = function(*args, **kwargs)
    x = args[0] if args else None
    if not isinstance(x, Tensor) or isinstance(x, nn.Parameter) or x.requires_grad:
        return y
    if torch.compiler.is_dynamo_compiling():
        if _constant_in_graph(x):
            setattr(y, MARK, True)
    # A view has its base's memory, and is found by that. A kernel has two axes or more.
    elif y is not x and type(y) is Tensor and y._base is None and 2 <= y.dim() <= 5:
        number, origin = id(y), _origin(x)
        if origin is not None and not isinstance(x._base, nn.Parameter):
            _taken[number] = (weakref.ref(y, lambda _: _taken.pop(number, None)), weakref.ref(origin))
    return y


def is_constant(w: Tensor) -> bool:
    """Return True if a kernel that is no Parameter is a constant. Its gradient is not asked for: see the caller."""
    if torch.compiler.is_dynamo_compiling():
        return _constant_in_graph(w)
    origin = _origin(w)
    memory = None if origin is None else memory_of(origin)
    if memory is None:
        return False
    return any(memory_of(held) == memory for module in running_modules() for held in _constants_of(module))


def _origin(tensor: Tensor) -> Tensor | None:
    """Return the tensor that this one, or its base, was taken from; itself if from none, None if that one is gone."""
    for candidate in (tensor, tensor._base):
        # The id may belong to another tensor by now.
        if candidate is not None and (entry := _taken.get(id(candidate))) is not None and entry[0]() is candidate:
            return entry[1]()
    return tensor


def _constant_in_graph(w: Tensor) -> bool:
    return bool(getattr(w, MARK, False)) or held_by_a_module(w)


def running_modules() -> Iterator[nn.Module]:
    """Yield the modules that are running in this thread, the innermost first. Not while torch.compile traces."""
    frame, seen = sys._getframe(1), set()
    while frame is not None:
        code = frame.f_code
        # Reading a frame's locals copies them, so it is asked first whether there is a `self` among them.
        if code.co_argcount and code.co_varnames[0] == "self":
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and id(module) not in seen:
                seen.add(id(module))
                yield module
        frame = frame.f_back  # type: ignore[assignment]


def _constants_of(module: nn.Module) -> Iterator[Tensor]:
    yield from (buffer for buffer in module._buffers.values() if buffer is not None)
    if all(_computes_no_kernel(hook) for hook in module._forward_pre_hooks.values()):
        layer = isinstance(module, (nn.Linear, *_CONVOLUTIONS))
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.requires_grad and not (layer and name == "weight"):
                yield value


def _computes_no_kernel(hook: Any) -> bool:
    # A partial has functools' own name for its module; an object has that of its class.
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith(_LOOK_ON)


def memory_of(tensor: Tensor) -> int | None:
    """Return the identity of the memory that a tensor lives in, or None if it has none of its own."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and wrapper tensors have none of their own
        return None
