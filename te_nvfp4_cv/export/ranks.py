"""Export models whose layers nv.tensor_parallel has shared out over ranks: gather them, and write by one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from te_nvfp4_cv.errors import runtime_error

T = TypeVar("T")


def gathered(model: nn.Module) -> tuple[nn.Module, Any]:
    """Return a whole, plain copy of a tensor-parallel model, and its process group; another model and None.

    Every rank must call this.
    """
    # A DTensor, asked for without importing its module, which takes long and may be missing.
    if not any(hasattr(p, "_local_tensor") for p in model.parameters()):
        return model, None
    from te_nvfp4_cv.distributed import tensor_parallel

    group = tensor_parallel.group_of(model)
    return (model, None) if group is None else (tensor_parallel.whole_copy(model), group)


def written_once(group: Any, write: Callable[[], T]) -> T:
    """Call `write` on the first rank of `group`, and return its result on all; without a group, just call it.

    Raises:
        RuntimeError: it failed on the first rank. The other ranks are told.
    """
    if group is None:
        return write()
    import torch.distributed as dist

    told: list[Any] = [None, ""]
    if dist.get_rank(group) == 0:
        try:
            told[0] = write()
        except BaseException as error:
            told[1] = f"{error}"
            dist.broadcast_object_list(told, group=group, group_src=0)
            raise
    dist.broadcast_object_list(told, group=group, group_src=0)
    if told[1]:
        raise runtime_error(
            "nv.export: the first rank could not write the file.",
            got=told[1],
            needs="a file that the first rank can write",
            fix="see its error",
        )
    result: T = told[0]
    return result
