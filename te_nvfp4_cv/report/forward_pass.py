"""Run a model once to look at it: leave it as it was, know which module is running, and count multiplications.

coverage, project and everything in sensitivity/ run somebody's model for their own purpose. Nothing of that may remain:
a report that shifts the random state or a batch norm's statistics would change the training run that it describes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from te_nvfp4_cv.backend.torch_private import has_no_values, versions_put_back
from te_nvfp4_cv.context import state
from te_nvfp4_cv.ops.quantize import rounding_seeds
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, as_recipe


def recipe_in_force(recipe: Any) -> NVFP4BlockScaling:
    """Return the recipe as an object; if None, that of the enclosing enabled context, and without one the default."""
    current = state.state()
    if recipe is None and current is not None and current.enabled:
        return current.recipe
    return as_recipe(recipe)


def gemm_flops(op: str, x: Tensor, kernel: Sequence[int], y: Tensor) -> int:
    """Count the FLOPs of one of the three GEMMs of a call with the result y; all three have the same number.

    Args:
        op: the operator, as nv.functional names it.
        kernel: the shape of the weight.
    """
    # Every element of a convolution's output, or of a transposed one's input, meets one window of the weight.
    source = x if "transpose" in op else y
    grouped = op.startswith("grouped") and len(kernel) == 3  # [E, O, C]: a row meets one expert's kernel
    return 2 * source.numel() * math.prod(kernel[2:] if grouped else kernel[1:])


def _ignore(module: nn.Module, *arguments: Any) -> None:
    """Do nothing when a module starts or ends."""


@contextmanager
def running(
    modules: Iterable[nn.Module],
    enter: Callable[[nn.Module, Any, Any], None] = _ignore,
    leave: Callable[[nn.Module, Any], None] = _ignore,
) -> Iterator[list[nn.Module]]:
    """Keep a list of the modules that are running, the innermost last, and call `enter` and `leave` around each.

    Args:
        modules: those to put hooks on; ScriptModules take no such hooks.
        enter: called as enter(module, positional arguments, keyword arguments) when a module starts, after it was put
            on the list.
        leave: called as leave(module, positional arguments) when it ends, with an exception too.
    """
    stack: list[nn.Module] = []

    def starts(module: nn.Module, args: Any, kwargs: Any) -> None:
        stack.append(module)
        enter(module, args, kwargs)

    def ends(module: nn.Module, args: Any, output: Any) -> None:
        # A module whose pre-hooks raised ends without having started, and one above this one may never have ended.
        if module in stack:
            del stack[len(stack) - 1 - stack[::-1].index(module) :]
        leave(module, args)

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(starts, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(ends, always_call=True).remove)
        yield stack


def _version(buffer: Tensor) -> int | None:
    return None if buffer.is_inference() else buffer._version  # torch does not count changes of inference tensors


@contextmanager
def unwritten(model: nn.Module) -> Iterator[None]:
    """Put the values of the model's buffers back when the body ends, and their versions.

    A training step may be waiting for its backward pass: autograd would refuse a graph that saved a buffer, as that of
    a batch norm has, though its values are those that were saved.
    """
    buffers = [(b, _version(b), b.detach().clone()) for b in model.buffers()]
    with versions_put_back(tuple(b for b, version, _ in buffers if version is not None)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, version, value in buffers:
                    # There are no values to compare and put back on the meta device, and in fake tensors.
                    if not has_no_values(buffer) and (_version(buffer) != version or not torch.equal(buffer, value)):
                        buffer.copy_(value)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put random states, buffers and training flags back when the body ends, with an exception too.

    The body runs eagerly and outside of a caller's inference_mode: inside a compiled graph neither hooks nor observers
    would act, and no backward pass may use a tensor that was made in inference_mode.
    """
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    python, numpy_state, stream = random.getstate(), numpy.random.get_state(), rounding_seeds.state()
    plain = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]  # their attributes are in C++
    # The dict too: a module may have put another tensor in a buffer's place.
    before = [(m, m.training, dict(m._buffers)) for m in plain]
    eager = torch.compiler.set_stance("force_eager")
    try:
        with unwritten(model), torch.random.fork_rng(devices), eager, torch.inference_mode(False):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numpy_state)
        rounding_seeds.set_state(stream)
        for module, training, own in before:
            module.training = training
            module._buffers.update(own)
