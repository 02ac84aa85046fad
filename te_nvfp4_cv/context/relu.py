"""Calls of torch's ReLU inside a context: in training it saves one bit per element for backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.backend.torch_private import no_graphs_inside
from te_nvfp4_cv.context.state import active_recipe, state
from te_nvfp4_cv.layer.check import transformed
from te_nvfp4_cv.layer.relu import MaskedReLU
from te_nvfp4_cv.ops.layouts import is_dense

FUNCTIONS = {F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_INPLACE = {torch.relu_, Tensor.relu_}


@no_graphs_inside
def run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one call: as a Function of ours where its result is plain torch's, else as torch does."""
    x = args[0] if args else kwargs.get("input")
    inplace = function in _INPLACE or bool(args[1] if len(args) > 1 else kwargs.get("inplace", False))
    current = state()
    if (
        current is None
        or not current.enabled
        or not current.relu_mask
        or active_recipe() is None
        or type(x) is not Tensor
        or not x.requires_grad
        or not torch.is_grad_enabled()
        or not x.is_floating_point()
        or x.is_nested
        or not x.numel()
        or not is_dense(x)
        or (inplace and _torch_may_refuse(x))
        or transformed()
        or (not torch.compiler.is_compiling() and torch.jit.is_tracing())
    ):
        return function(*args, **kwargs)
    return MaskedReLU.apply(x, inplace)


def _torch_may_refuse(x: Tensor) -> bool:
    """Return True if writing to x in place may be refused: torch's relu_ asks before it writes, a Function after."""
    return x.is_leaf or (not torch.compiler.is_compiling() and x._is_view())
