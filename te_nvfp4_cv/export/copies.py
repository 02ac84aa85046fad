"""Copy a model before it is changed: quantize and to_onnx leave the caller's model alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.nn.hooks import HookOfRanks, detach


def copy_of(caller: str, model: nn.Module) -> nn.Module:
    """Return a deep copy of a model. Results that a training pass has left in it are copied without their history.

    Some models keep one (the heads of MONAI's DynUNet, the kernel that torch's older weight_norm computes), and
    copy.deepcopy takes none that autograd has recorded.

    Args:
        caller: the function that needs the copy, for the error.
    Raises:
        ValueError: the model holds something that cannot be copied.
    """
    try:
        with _WithoutHistory(), torch.no_grad():  # a ScriptModule's copies of Parameters would have a history
            copied = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise value_error(
            f"{caller}: the model cannot be copied.", got=f"{type(error).__name__}: {error}",
            needs="a model that copy.deepcopy takes",
            fix="remove what the message names from the model, or give its class a __deepcopy__",
        ) from error
    for module in copied.modules():  # nv.spatial_parallel.parallelize: the copy is called with whole images
        detach(module, HookOfRanks)
    return copied


class _WithoutHistory(TorchFunctionMode):
    """Lets copy.deepcopy take tensors that are no leaves of autograd's graph."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: A002
        if function is Tensor.__deepcopy__ and not args[0].is_leaf:
            x, memo = args
            memo[id(x)] = copied = x.detach().clone()
            return copied
        return function(*args, **(kwargs or {}))
