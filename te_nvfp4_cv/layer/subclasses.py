"""Let tensors of somebody's subclass through a layer as torch does: the output is of the subclass, with its metadata.

A subclass of Tensor with memory of its own (monai's MetaTensor, fastai's TensorImage) overrides torch's functions by a
class method, __torch_function__. Most call the function again with overriding off, and make the result one of theirs.
So a function mode, which is asked first, hands the call on to the class and takes the function that the class calls.
There the tensor still is of the subclass; the layer computes with the plain tensor of the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from te_nvfp4_cv.backend.torch_private import classes_override, only_inlined
from te_nvfp4_cv.errors import runtime_error

PLAIN = (Tensor, Parameter)  # a weight of another class may bring codes along


def overridden(types: tuple[type, ...]) -> bool:
    """Return True if a call with tensors of these classes belongs to one of them."""
    # FSDP2's weight is of this package: it brings codes, and gives torch's functions no other meaning.
    return any(kind not in PLAIN and not hasattr(kind, "codes_for") for kind in types) and classes_override()


@only_inlined
def by_their_class(function: Callable[..., Any], types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call a torch function as torch would for tensors of these classes: the first class that takes the call has it.

    Args:
        types: classes of arguments that override functions, in torch's order.
    Returns:
        The result, or NotImplemented if no class takes the call.
    """
    for kind in types:
        for tensor in (*args, *kwargs.values()):
            if type(tensor) is kind:
                # Asked of the tensor: in old code it is a plain method.
                y = tensor.__torch_function__(function, types, args, kwargs)
                if y is not NotImplemented:
                    return y
                break
    return NotImplemented


def without_class(x: Tensor) -> Tensor:
    """Return a tensor of a subclass as a plain one of the same memory. One without memory of its own stays as it is.

    Raises:
        RuntimeError: a DTensor, of which torch's plans make the input of a layer.
    """
    kind = type(x)
    if hasattr(x, "_local_tensor"):  # asked for without importing the module of DTensors, which takes long
        raise runtime_error(
            "nvfp4: a layer of torch's tensor parallelism cannot run in NVFP4.",
            got=f"an input that is a {kind.__name__}, {getattr(x, 'placements', '')}",
            needs="a layer that this package has shared out, which knows what crosses ranks",
            fix="nv.tensor_parallel.ColwiseParallel and RowwiseParallel in the plan, in place of torch's, or "
            "nv.set_precision(model, {name: None}) for the layer",
        )
    own_memory = kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    return x.as_subclass(Tensor) if own_memory and kind not in PLAIN else x
