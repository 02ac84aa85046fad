"""Draw the seeds of stochastic rounding: one int64 Philox key per quantized gradient.

On a GPU the seed comes from torch's generator. On a CPU it comes from a private stream, a function of torch's seed and
of how many seeds were drawn since. So data order and dropout are the same with and without stochastic rounding, and
torch.manual_seed restarts both. After torch.random.fork_rng, which restores torch's state, the stream continues where
it was.
Under torch.distributed each rank has a stream of its own, though all are seeded alike: a rank's number is mixed into
its seeds, on a GPU too. Ranks that must round alike (tensor parallelism: they hold the same dy) share a stream. A
single process draws from stream 0.
torch.manual_seed is wrapped (once, at import) for that restart, because its generator does not tell that it was seeded
again with the same number.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend.dispatch import runs_directly
from te_nvfp4_cv.backend.registration import without_autocast

_lock = threading.Lock()
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


def _restart(function: Any) -> Any:
    """Wrap torch.manual_seed, so that it restarts the stream of its seed."""

    @functools.wraps(function)
    def manual_seed(seed: int) -> Any:
        generator = function(seed)
        with _lock:
            _drawn.pop(_torch_seed(), None)
        return generator

    manual_seed._te_nvfp4_cv = True  # type: ignore[attr-defined]
    return manual_seed


if not hasattr(torch.random.manual_seed, "_te_nvfp4_cv"):
    torch.random.manual_seed = _restart(torch.random.manual_seed)
    torch.manual_seed = torch.random.manual_seed


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
        return torch.tensor([_next()], dtype=torch.int64)
    # On a GPU nothing may be read back to the host, and torch's generator is right under CUDA graphs.
    seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=like.device)
    offset = _offset() >> 2
    return seed.bitwise_xor_(offset) if offset else seed
