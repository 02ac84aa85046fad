"""Keep torch.autocast out of this package's custom operators: they run with it off, and nothing is cast.

The arguments of an operator have the dtypes that its numerics need: fp32 amaxes and scales beside bf16 activations, and
weights as they are stored. torch.library.register_autocast would cast all of them to one dtype. Without any
registration, the torch calls inside an operator would still be autocast.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

Op = TypeVar("Op", bound=torch.library.CustomOpDef)
_library = torch.library.Library("te_nvfp4_cv", "FRAGMENT")


def without_autocast(op: Op) -> Op:
    """Decorate a custom operator so that it runs with autocast off, on CPU and CUDA tensors."""
    overload = op._opoverload
    for name in ("AutocastCPU", "AutocastCUDA"):
        key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))

        # _key is a default argument because the loop rebinds `key` before the kernel runs.
        def kernel(_: Any, *args: Any, _key: Any = key, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_key):
                return overload(*args, **kwargs)

        _library.impl(overload, kernel, name, with_keyset=True)
    return op
