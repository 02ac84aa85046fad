"""update_bn: batch-norm statistics estimated anew in the precision that the model runs in from now on.

    with nvfp4_autocast(recipe, enabled=epoch < epochs - k): ...     the last k epochs in high precision
    update_bn(model, loader)                                         statistics of that precision, before evaluation

Statistics gathered under NVFP4 are those of rounded activations. torch.optim.swa_utils.update_bn does the work: plain
means over the batches, whatever `momentum` is. On an error the old statistics, momenta and flags are put back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import swa_utils

from te_nvfp4_cv.errors import check_module, value_error


def update_bn(
    model: nn.Module,
    loader: Iterable[Any],
    *contexts: AbstractContextManager[Any],
    device: str | torch.device | None = None,
) -> int:
    """One pass over `loader`, without gradients, that replaces the running statistics of every batch norm.

    Args:
        loader: of tensors, or of tuples and lists whose first element is the model's input.
        contexts: entered around the pass: nvfp4_autocast(recipe), torch.autocast(...); none: high precision.
        device: where batches are moved to; None leaves them.
    Returns:
        The number of batches used; 0 for a model without batch norm, whose loader is not read.
    Raises:
        TypeError: no module; ValueError: a loader without batches. The model is as it was then.
    """
    check_module("update_bn", model, "update_bn(model, loader): torch's own takes the loader first")
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return 0
    momenta = [(norm, norm.momentum) for norm in norms]
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    flags = [(module, module.training) for module in model.modules()]
    counter = _Counted(loader)
    try:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            swa_utils.update_bn(counter, model, device)  # type: ignore[arg-type]
        if not counter.count:
            raise value_error(
                "update_bn: the loader has no batches.",
                got="0 batches",
                needs="at least one: the statistics start from nothing",
                fix="a list or DataLoader rather than an iterator that was read before",
            )
    except BaseException:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        raise
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
        for module, training in flags:
            module.training = training
    return counter.count


class _Counted:
    """An iterable that counts what it gave."""

    def __init__(self, source: Iterable[Any]) -> None:
        self.source, self.count = source, 0

    def __iter__(self) -> Iterator[Any]:
        for item in self.source:
            self.count += 1
            yield item
