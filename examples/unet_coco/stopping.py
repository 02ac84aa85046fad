"""Stop when a terminal, a scheduler or a user asks for it, never in the middle of a step.

    SIGINT    Ctrl-C                                              exit status 130
    SIGTERM   what kill and schedulers send                       exit status 143
    SIGUSR1   what schedulers can send ahead of a time limit      exit status 143

The first signal raises Stopped where the main thread is, or at the end of `deferred()` if it is inside of that. What
must not be cut in two, a step with its bookkeeping or the writing of a checkpoint, runs inside. A second signal during
a deferred part raises a plain KeyboardInterrupt at once, so that a step which hangs can still be ended.

Ranks stop together (SharedStop): a signal to any of them, or to all, raises Stopped on all of them at the same place,
the end of a deferred part or a batch of a validation. torchrun passes on SIGTERM and SIGINT, and SIGUSR1 with
--signals-to-handle; it ends ranks by force after --shutdown-timeout, 30 s.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


class Stopped(KeyboardInterrupt):
    """Say which signal ended the run, and in `done` what is saved, such as "step 12 of 60 of nvfp4"."""

    done = ""

    def __init__(self, number: int, text: str = "") -> None:
        self.number = signal.Signals(number)
        super().__init__(text or self.cause)

    @property
    def cause(self) -> str:
        """Return the signal in a user's words."""
        return "Ctrl-C" if self.number == signal.SIGINT else self.number.name

    @property
    def status(self) -> int:
        """Return the exit status of the process."""
        return STATUS[self.number]


class Stop:
    """Listen to the signals. Without `listening`, a Stop does nothing, and Python's own handling stays."""

    def __init__(self) -> None:
        self.asked = 0  # the signal that came during a deferred part
        self._deferred = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside; other threads than the main one cannot, and leave them as they are."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in STATUS}
        try:
            yield
        finally:
            for number, handler in before.items():
                if handler is not None:  # None: one that C code has set, which Python cannot set again
                    signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a signal wait until the end of this part, where Stopped is raised unless the part itself failed."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if not self._deferred:
            self.look()

    def look(self) -> None:
        """Raise Stopped if a signal has come during a deferred part."""
        if self.asked:
            number, self.asked = self.asked, 0
            raise Stopped(number)

    def between(self, batches: Iterable[T]) -> Iterable[T]:
        """Return batches of a part that may be cut, for a single process as they are: signals stop it anywhere."""
        return batches

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferred:
            raise Stopped(number)
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number


class SharedStop(Stop):
    """Stop all ranks at the same place when a signal has come to any of them.

    Each look asks all ranks (the maximum of one number, by gloo) and reads the answer to the look before. So no rank
    waits for another one, and all stop one look after the signal. Every rank must look equally often.

    Args:
        timeout: How long a rank waits for another one's answer.
    """

    def __init__(self, timeout: timedelta) -> None:
        super().__init__()
        # A group of its own: these exchanges must not come between those of the model.
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._answer: tuple[dist.Work, Tensor] | None = None
        self._stopped = False

    def look(self) -> None:
        """Raise Stopped if a signal had come to any rank at the look before."""
        if self._stopped:  # all ranks are; what is left is to save
            return
        if self._answer is not None:
            work, number = self._answer
            work.wait()
            self._answer = None
            if number.item():
                self._stopped = True
                raise Stopped(int(number))
        number = torch.tensor(self.asked)
        work = dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._answer = work, number

    def between(self, batches: Iterable[T]) -> Iterable[T]:
        """Yield the batches, and look after each."""
        for batch in batches:
            yield batch
            self.look()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Never raises: torchrun and a scheduler may both send the signal.
        self.asked = max(self.asked, number)
