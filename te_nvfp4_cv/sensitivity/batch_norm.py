"""Estimate batch-norm statistics again, in the precision that the model runs in from now on.

    with nvfp4_autocast(recipe, enabled=epoch < epochs - k): ...     the last k epochs in high precision
    update_bn(model, loader)                                         statistics of that precision, before evaluation

Statistics gathered under NVFP4 are those of rounded activations. torch.optim.swa_utils.update_bn does the work: it
takes plain means over the batches, whatever `momentum` is. On an error the old statistics, momenta and flags are put
back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn
from torch.optim import swa_utils

from te_nvfp4_cv.backend.torch_private import AnyBatchNorm
from te_nvfp4_cv.errors import check_batches, check_module, value_error


def update_bn(
    model: nn.Module,
    loader: Iterable[Any],
    *contexts: AbstractContextManager[Any],
    device: str | torch.device | None = None,
) -> int:
    """Replace the running statistics of every batch norm by those of one pass over `loader`, without gradients.

    Args:
        model: the model whose batch norms are updated.
        loader: gives tensors, or tuples and lists whose first element is the model's input.
        contexts: entered around the pass, such as nvfp4_autocast(recipe) or torch.autocast(...); contexts that the
            caller has entered act, too. Without any the pass runs in high precision.
        device: where batches are moved to; if None, they stay where they are.
    Returns:
        The number of batches used; 0 for a model without batch norm, whose loader is not read.
    Raises:
        TypeError: `model` is not a module, or `loader` is a tensor or no iterable.
        ValueError: the loader has no batches. The model is then as it was.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16))
        >>> nv.sensitivity.update_bn(model, [torch.randn(4, 3, 8, 8)] * 2, nv.nvfp4_autocast())
        2
    """
    check_module("update_bn", model, "update_bn(model, loader): torch's own takes the loader first")
    check_batches("update_bn", loader)
    norms = [module for module in model.modules() if isinstance(module, AnyBatchNorm)]
    if not norms:
        return 0
    # All buffers: in the pass other modules, such as spectral_norm, may change theirs, too.
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    count = 0

    def counted() -> Iterator[Any]:
        # swa_utils says nothing of a loader without batches, so its batches are counted here.
        nonlocal count
        for item in loader:
            count += 1
            yield item

    try:
        with ExitStack() as stack:
            for norm in norms:  # torch sets momentum to None, and does not put it back when the pass raises
                stack.callback(setattr, norm, "momentum", norm.momentum)
            for module in model.modules():
                stack.callback(setattr, module, "training", module.training)
            for context in contexts:
                stack.enter_context(context)
            swa_utils.update_bn(counted(), model, device)  # type: ignore[arg-type]
        if not count:
            raise value_error(
                "update_bn: the loader has no batches.",
                got="0 batches",
                needs="at least one, because the statistics start from nothing",
                fix="pass a list or DataLoader rather than an iterator that was read before",
            )
    # BaseException: an interrupt in a long pass must not leave half of the statistics, either.
    except BaseException:
        with torch.no_grad():
            for buffer, value in before:
                # In place, because DDP and captured graphs hold on to the buffers themselves.
                buffer.copy_(value)
        raise
    return count
