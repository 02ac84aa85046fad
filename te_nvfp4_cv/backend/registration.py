"""How this package's custom operators behave under torch.autocast: they run with it off, and nothing is cast.

An operator's arguments have the dtypes that its numerics want: fp32 amaxes and scales beside bf16 activations, weights
as they are stored. torch.library.register_autocast would cast them all to one dtype; without a registration, torch
calls inside of an operator would still be autocast.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

Op = TypeVar("Op", bound=torch.library.CustomOpDef)
_library = torch.library.Library("te_nvfp4_cv", "FRAGMENT")


def without_autocast(op: Op) -> Op:
    """Register, for a CPU and for CUDA, that the operator runs with autocast off; decorates a custom operator."""
    overload = op._opoverload
    for name in ("AutocastCPU", "AutocastCUDA"):
        key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))

        def kernel(_: Any, *args: Any, _key: Any = key, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_key):
                return overload(*args, **kwargs)

        _library.impl(overload, kernel, name, with_keyset=True)
    return op
