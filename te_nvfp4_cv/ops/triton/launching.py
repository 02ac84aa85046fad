"""Launch a kernel without asking Triton again what it has compiled for such arguments.

Triton looks its arguments through at each launch: which are multiples of 16, which are 1, which constants there are. A
training step asks the same again and again. So the compiled kernel is kept here under all that the answer can depend
on, finer than Triton does: the device, each tensor's dtype and whether its address is a multiple of 16, each number,
each constant and option. Known kernels are launched by their own `kernel[grid]`, with addresses in place of tensors;
everything else takes Triton's way: first launches, the interpreter, and launches that nothing may come from (ahead.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from triton.runtime.jit import JITFunction

MOST = 8192  # kept; networks have a few hundred, but sizes that vary from call to call would go on
KEEPS = True  # ahead.py turns it off: what it compiles is not launched

_known: dict[tuple[Any, ...], Any] = {}
_log = logging.getLogger("te_nvfp4_cv")


class Compilations:
    """Tells of the first compilations, once in EVERY seconds: a minute without a word looks like a fault."""

    LONG = 0.3  # seconds; what is shorter came from Triton's cache
    EVERY = 10.0

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self.count, self.spent, self.told = clock, 0, 0.0, -self.EVERY

    def add(self, seconds: float) -> None:
        """Take note of a first launch."""
        if seconds < self.LONG:
            return
        self.count, self.spent = self.count + 1, self.spent + seconds
        if self.clock() - self.told >= self.EVERY:
            self.told = self.clock()
            # A warning, not an info: without logging set up Python shows only these.
            _log.warning(
                "te_nvfp4_cv: compiling GPU kernels, %d so far in %.0f s (once per machine; te-nvfp4-cv warm does so "
                "beforehand)", self.count, self.spent,
            )  # fmt: skip


_compilations = Compilations()


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `kernel[grid](*arguments, **constants)`.

    Args:
        grid: one to three numbers.
        arguments: the kernel's arguments that are no constants, in their order: tensors on the current device, numbers.
        constants: its constants, and options such as num_warps.
    """
    if not KEEPS or type(kernel) is not JITFunction:
        kernel[grid](*arguments, **constants)
        return
    # In comprehensions, because this runs before each kernel. A kernel's own hash would be computed from its source.
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    kinds = [a if a is v else (a.dtype, v % 16 == 0) for a, v in zip(arguments, values, strict=True)]
    key = (id(kernel), arguments[0].get_device(), *kinds, *constants.items())
    found = _known.get(key)
    if found is None:
        began = time.perf_counter()
        made = kernel[grid](*arguments, **constants)
        _compilations.add(time.perf_counter() - began)
        if len(_known) >= MOST:
            _known.clear()
        if made is not None:
            _known[key] = made, [constants[name] for name in kernel.arg_names if name in constants], kernel
        return
    compiled, named, _ = found
    compiled[(*grid, 1, 1)[:3]](*values, *named)
