"""Launch a kernel without asking Triton again what it has compiled for such arguments.

Triton looks its arguments through at each launch: which are multiples of 16, which are 1, which constants there are. A
training step asks the same again and again. So the compiled kernel is kept here under all that the answer can depend
on, finer than Triton does: the device, each tensor's dtype and whether its address is a multiple of 16, each number,
each constant and option. Known kernels are launched by their own `kernel[grid]`, with addresses in place of tensors;
everything else takes Triton's way: first launches, the interpreter, and launches that nothing may come from (ahead.py).

    start       any launch
    Bound       one that repeats with other tensors: grid, numbers and constants are put together once
    Repeated    the same of a kernel whose tile may be searched for
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from te_nvfp4_cv.backend import tuning

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


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> tuple[Any, list[Any]] | None:
    """Run `kernel[grid](*arguments, **constants)`. Returns what to launch again, a compiled kernel and its constants.

    Args:
        grid: one to three numbers.
        arguments: the kernel's arguments that are no constants, in their order: tensors on the current device, numbers.
        constants: its constants, and options such as num_warps.
    """
    if not KEEPS or type(kernel) is not JITFunction:
        kernel[grid](*arguments, **constants)
        return None
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
        if made is None:
            return None
        # The kernel itself too: its id is in the key.
        _known[key] = found = made, [constants[name] for name in kernel.arg_names if name in constants], kernel
    else:
        found[0][(*grid, 1, 1)[:3]](*values, *found[1])
    return found[:2]


class Bound:
    """A launch of which everything but the tensors is decided. Their dtypes must be the same at each call.

    Args:
        kernel, grid, constants: as `start` takes them.
        numbers: the arguments after the tensors that are no constants.
        views: place and dtype of tensors that the kernel reads as another dtype.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: Sequence[int | float],
        constants: dict[str, Any],
        views: Sequence[tuple[int, torch.dtype]] = (),
    ) -> None:
        self.kernel, self.grid, self.numbers, self.constants, self.views = kernel, grid, numbers, constants, views
        self.whole_grid = (*grid, 1, 1)[:3]
        self.known: dict[tuple[int, ...], tuple[Any, list[Any]]] = {}

    def __call__(self, *tensors: Tensor) -> None:
        """Launch it with these tensors."""
        if not self._again(tensors[0].get_device(), [t.data_ptr() for t in tensors]):
            self._first(list(tensors))

    def at(
        self, device: int, addresses: Sequence[int], dtypes: Sequence[torch.dtype], owners: Sequence[Tensor]
    ) -> None:
        """Launch it with what lies at these addresses, without a tensor for each.

        Args:
            device: its number, as Tensor.get_device gives it.
            addresses: 0 for what the kernel does not read.
            dtypes: of what lies there.
            owners: tensors in whose memory the addresses are. A first launch makes views of these.
        """
        if not self._again(device, addresses):
            self._first([_view(*place, owners) for place in zip(addresses, dtypes, strict=True)])

    def _again(self, device: int, addresses: Sequence[int]) -> bool:
        # What Triton asks of a tensor, its dtype aside: multiples of 16 are loaded in wider pieces.
        found = self.known.get((device, *[address & 15 for address in addresses]))
        if found is None or not KEEPS:
            return False
        found[0][self.whole_grid](*addresses, *self.numbers, *found[1])
        return True

    def _first(self, tensors: list[Tensor]) -> None:
        key = (tensors[0].get_device(), *[t.data_ptr() & 15 for t in tensors])
        for place, dtype in self.views:
            tensors[place] = tensors[place].view(dtype)
        made = start(self.kernel, self.grid, *tensors, *self.numbers, **self.constants)
        if made is not None:
            self.known[key] = made


def _view(address: int, dtype: torch.dtype, owners: Sequence[Tensor]) -> Tensor:
    """Return what lies at an address, in one axis, up to the end of its owner's memory."""
    for owner in owners:
        storage = owner.untyped_storage()
        begin = address - storage.data_ptr()
        if address and 0 <= begin < storage.nbytes():
            size = dtype.itemsize
            count = (storage.nbytes() - begin) // size * size  # an empty view would have no address
            whole = owner.new_empty(0, dtype=torch.uint8).set_(storage, begin, (count,), (1,))
            return whole.view(dtype)
    return owners[0].new_empty(0, dtype=dtype)


class Repeated:
    """Launches of one kernel by calls that are alike: with the tile of the table, or with one that a search found.

    Args:
        name: of the kernel in the tables of backend/tuning.py.
        device: where it runs.
        key: as tuning.config takes it.
        bind: makes the launch for a tile.
    """

    def __init__(
        self, name: str, device: torch.device, key: tuple[int, ...], bind: Callable[[tuning.Config], Bound]
    ) -> None:
        self.name, self.key, self.bind, self.arch = name, key, bind, tuning.arch_of(device)
        self.usual = bind(tuning.static(name, self.arch, key))

    def __call__(self, tensors: Callable[[], Sequence[Tensor]]) -> None:
        """Launch it. A search asks for the tensors again at each of its launches."""
        if self.arch and tuning.autotune_enabled():
            self.bind(tuning.config(self.name, self.arch, self.key, lambda config: self.bind(config)(*tensors())))(
                *tensors()
            )
        else:
            self.usual(*tensors())
