"""Draw the seeds of stochastic rounding: one int64 Philox key per quantized gradient.

On a GPU the seed comes from torch's generator. On a CPU it comes from a private stream, a function of torch's seed and
of how many seeds were drawn since: its position. So data order and dropout are the same with and without stochastic
rounding. The position goes where torch's own goes:

    torch.manual_seed                           restarts the stream, also with the seed that torch has already
    torch.get_rng_state                         returns a state that holds the position
    torch.set_rng_state, torch.random.fork_rng  bring the stream to the position of the state that they restore
    any of these while a backward pass runs     leaves the stream where it is

The last line is for functions that recompute their forward in backward, under the random state of the first one. Seeds
are drawn in backward: a stream that went back with that state would round every layer and every step alike.
A saved state has eight bytes that torch writes as zero and does not read. The position is there, so it survives a copy,
a file and another process. The methods of torch.default_generator are those of a C++ object and cannot be wrapped: a
state from its get_state has no position, and the stream of its seed goes on where it was.
Under torch.distributed each rank has a stream of its own, though all are seeded alike: a rank's number is mixed into
its seeds, on a GPU too. Ranks that must round alike (tensor parallelism: they hold the same dy) share a stream. A
single process draws from stream 0.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend.dispatch import runs_directly
from te_nvfp4_cv.backend.registration import without_autocast
from te_nvfp4_cv.backend.torch_private import in_backward

_lock = threading.RLock()  # torch.compile saves the random state while it traces what a thread runs that holds the lock
_shared_stream: int | None = None
_drawn: dict[int, int] = {}  # torch's seed -> how many were drawn from its stream; the _KEEP seeds used last
_KEEP = 64
_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """Apply splitmix64's finalizer, so that neighbouring counters give unrelated keys."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def share_stream(stream: int | None) -> None:
    """Make this process draw from the stream of that number: the same on ranks that must round alike.

    Args:
        stream: the first rank of those that share it, as tensor_parallel does. If None, this process draws from the
            stream of its rank again.
    """
    global _shared_stream
    _shared_stream = stream


def stream() -> int:
    """Return the number of this process's stream: that of share_stream, else its rank in torch.distributed, else 0."""
    if _shared_stream is not None:
        return _shared_stream
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0


def _offset() -> int:
    """Return the bits that distinguish this stream's keys from those of stream 0; 0 for stream 0."""
    number = stream()
    return _mix(number) if number else 0


def _torch_seed() -> int:
    return torch.initial_seed() & _MASK


def _next() -> int:
    """Draw from the CPU's stream: a positive number of 63 bits."""
    with _lock:
        seed = _torch_seed()
        drawn = _drawn.pop(seed, 0) + 1
        _drawn[seed] = drawn  # popped and set again: the dict's order is that of the last use
        if len(_drawn) > _KEEP:
            del _drawn[next(iter(_drawn))]
        return _mix((_mix(seed) ^ _offset()) + drawn) >> 1  # 63 bits: an int64 tensor holds it without a sign


def state() -> dict[str, int]:
    """Return the place in the stream, for a bit-exact resume: torch's seed and the number of seeds drawn since."""
    with _lock:
        seed = _torch_seed()
        return {"seed": seed, "drawn": _drawn.get(seed, 0)}


def set_state(saved: dict[str, int]) -> None:
    """Continue a stream at the place that `state` described.

    Raises:
        RuntimeError: torch has another seed now than it had then.
    """
    with _lock:
        if saved["drawn"] and saved["seed"] != _torch_seed():
            raise RuntimeError(
                "nvfp4: the saved stochastic-rounding stream is of another seed.\n"
                f"  got:   torch.initial_seed() == {torch.initial_seed()}\n"
                f"  needs: torch.manual_seed({saved['seed']})\n"
                "  fix:   seed torch (or restore its state by torch.set_rng_state) before loading"
            )
        _drawn[saved["seed"]] = saved["drawn"]


# ---- with torch's random state ---------------------------------------------------------------------------------------

_STATE_BYTES = 5056  # of a saved state of torch's CPU generator
_PLACE = 5016  # the first number of a pair of normal ones, in states that torch saved long ago
_MARK = 0x4E56 << 48  # above the position: states that came past the functions below have a zero there


def _position_of(saved: Tensor) -> ctypes.c_uint64 | None:
    """Return the eight bytes of a saved state that hold the position, or None if it is too old to have them."""
    # By address: a dispatch mode (fake tensors) may be on, and would look at an operation of torch.
    return ctypes.c_uint64.from_address(saved.data_ptr() + _PLACE) if saved.numel() == _STATE_BYTES else None


def _with_position(get_rng_state: Any) -> Any:
    @functools.wraps(get_rng_state)
    def wrapped() -> Tensor:
        saved: Tensor = get_rng_state()
        place = _position_of(saved)
        if place is not None:
            place.value = _MARK | state()["drawn"]
        return saved

    return wrapped


def _to_position(set_rng_state: Any) -> Any:
    @functools.wraps(set_rng_state)
    def wrapped(new_state: Tensor) -> None:
        set_rng_state(new_state)  # raises for what is no state
        place = _position_of(new_state)
        if place is not None and place.value & (0xFFFF << 48) == _MARK and not in_backward():
            with _lock:
                _drawn[_torch_seed()] = place.value ^ _MARK

    return wrapped


def _restarting(seed_all: Any) -> Any:
    @functools.wraps(seed_all)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        generator = seed_all(*args, **kwargs)
        if not in_backward():
            with _lock:
                _drawn.pop(_torch_seed(), None)
        return generator

    return wrapped


def _wrap_torch() -> None:
    """Let torch's functions that seed, save and restore its CPU generator do the same to the stream. Acts once."""
    if hasattr(torch.random.get_rng_state, "__wrapped__"):
        return
    # Below torch.manual_seed, which torch.jit.script and torch.compile know by identity.
    torch.random._manual_seed_impl = _restarting(torch.random._manual_seed_impl)
    torch.get_rng_state = torch.random.get_rng_state = _with_position(torch.random.get_rng_state)
    torch.set_rng_state = torch.random.set_rng_state = _to_position(torch.random.set_rng_state)


_wrap_torch()


# ---- the draw --------------------------------------------------------------------------------------------------------


def draw_seed(like: Tensor) -> Tensor:
    """Return a fresh seed, int64 [1], on the device of `like`."""
    return _draw(like) if runs_directly(like) else draw_seed_op(like)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::draw_seed", mutates_args=())
def draw_seed_op(like: Tensor) -> Tensor:
    """Call _draw behind torch's dispatcher."""
    return _draw(like)


@draw_seed_op.register_fake
def _(like):  # type: ignore[no-untyped-def]
    return like.new_empty(1, dtype=torch.int64)


def _draw(like: Tensor) -> Tensor:
    if like.device.type == "cpu":
        return torch.tensor([_next()], dtype=torch.int64, device=like.device)
    # On a GPU nothing may be read back to the host, and torch's generator is right under CUDA graphs.
    seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=like.device)
    offset = _offset() >> 2
    return seed.bitwise_xor_(offset) if offset else seed
