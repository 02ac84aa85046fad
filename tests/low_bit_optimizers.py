"""Optimizers of other packages with states of 8 and 4 bits, as tests build them; what is not installed is left out.

torchao compiles its step, which takes minutes and proves nothing here: `eagerly` runs it as it is written.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

# Name, and the most that its states may take beside AdamW's two fp32 numbers a parameter.
SHARES = {"AdamW8bit": 0.26, "AdamW4bit": 0.14, "AdamWFp8": 0.26, "bitsandbytes AdamW8bit": 0.26}


def eagerly() -> AbstractContextManager[Any]:
    """Let torch.compile run the code itself."""
    return torch.compiler.set_stance("force_eager")


def build(name: str) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None:
    """The optimizer's constructor, for parameters alone, or None where it is not installed or has no kernels."""
    package = "bitsandbytes" if name.startswith("bitsandbytes") else "torchao"
    if importlib.util.find_spec(package) is None:
        return None
    if package == "torchao":
        import torchao.optim

        made: Any = functools.partial(getattr(torchao.optim, name), lr=1e-2)
        return made  # type: ignore[no-any-return]
    import bitsandbytes.optim

    made = functools.partial(bitsandbytes.optim.AdamW8bit, lr=1e-2)
    probe = torch.nn.Parameter(torch.zeros(4096))
    probe.grad = torch.ones(4096)
    try:
        made([probe]).step()
    except (NotImplementedError, RuntimeError):  # its 8-bit kernels are for GPUs
        return None
    return made  # type: ignore[no-any-return]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what grows with the parameters: no step counts, no tables of the codes' values."""
    total = 0
    for state in optimizer.state.values():
        for key, t in state.items():
            if not isinstance(t, Tensor) or t.numel() <= 1 or key.startswith("qmap"):
                continue
            t = getattr(t, "_local_tensor", t)
            parts = [getattr(t, n) for n in ("codes", "scale")] if hasattr(t, "codes") else [t]
            total += sum(part.numel() * part.element_size() for part in parts)
    return total
