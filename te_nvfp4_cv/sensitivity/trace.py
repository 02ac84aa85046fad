"""Find where the first value that is not finite appears, by hooks on all modules during one forward and backward pass.

    forward    a module's input, parameters and buffers when it starts, its output when it ends, in the order of time
    backward   gradients of outputs and of parameters, in the order of time: from the loss to the input

A container starts before its children and ends after them, so the first finding names the innermost module to blame.
An input that is not finite, without such an output before it, came from outside: from the batch, or from code between
the modules. Every value is read, so this waits for a GPU at every module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.backend.torch_private import is_batched, tree_leaves
from te_nvfp4_cv.layer import deferred
from te_nvfp4_cv.layer.check import torch_func_is_on
from te_nvfp4_cv.sensitivity.layers import named


@dataclass(frozen=True)
class Finding:
    """The place of a value that is not finite.

    `what` says which value it is: input, parameter weight, buffer running_var, output, gradient of ...
    """

    module: str
    what: str

    def __str__(self) -> str:
        return f"{self.what} of {self.module or 'the model'}"


class Trace:
    """The first finding of the forward and of the backward pass."""

    def __init__(self) -> None:
        self.forward: Finding | None = None
        self.backward: Finding | None = None

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Watch the model while the body runs."""
        with ExitStack() as stack:
            for name, module in named(model):
                # Pre-hooks look at weights as well: a bad weight should be named, not the output that it spoils.
                stack.callback(module.register_forward_pre_hook(partial(self._starts, name), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(partial(self._ends, name)).remove)
                for key, parameter in module.named_parameters(recurse=False):
                    if parameter.requires_grad:  # register_hook refuses others
                        hook = partial(self._gradient, name, f"gradient of the parameter {key}")
                        stack.callback(parameter.register_hook(hook).remove)
            yield

    def _starts(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._look(name, "input", (args, kwargs), masks=True)
        for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
            for key, tensor in tensors.items():
                self._look(name, f"{kind} {key}", tensor, masks=kind == "buffer")

    def _look(self, name: str, what: str, value: Any, masks: bool = False) -> None:
        # After the first finding nothing more is read, which would wait for the GPU.
        if self.forward is None and not all(is_finite(leaf, masks) for leaf in tree_leaves(value)):
            self.forward = Finding(name, what)

    def _ends(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._look(name, "output", output)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad and not torch_func_is_on():
                # On the tensor, not the module: full backward hooks of modules refuse in-place changes of outputs.
                leaf.register_hook(partial(self._gradient, name, "gradient of the output"))

    def _gradient(self, name: str, what: str, gradient: Tensor) -> None:
        if self.backward is None and not is_finite(gradient):
            self.backward = Finding(name, what)


def is_finite(value: Any, masks: bool = False) -> bool:
    """Return whether a value is finite, or nothing that could be otherwise.

    `masks` allows -inf, which attention masks, inputs or buffers, hold on purpose.
    """
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return True
    if is_batched(value) or torch_func_is_on():  # torch.vmap, for one, lets nobody ask for values
        return True
    deferred.settle(value)  # an activation that only quantized layers read may not be written yet
    v = value.detach()  # or autograd would record the comparisons
    if v.is_nested:
        v = torch.cat([part.flatten() for part in v.unbind()])
    elif v.layout != torch.strided:
        v = v._values() if v.layout == torch.sparse_coo else v.values()
    if v.is_complex():
        v = torch.view_as_real(v.resolve_conj())
    return bool((v.isfinite() | v.isneginf()).all() if masks else v.isfinite().all())
