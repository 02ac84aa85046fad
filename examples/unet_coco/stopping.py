"""Stop when a terminal, a scheduler or a user asks for it, never in the middle of a step.

    SIGINT    Ctrl-C                                              exit status 130
    SIGTERM   what kill and schedulers send                       exit status 143
    SIGUSR1   what schedulers can send ahead of a time limit      exit status 143

The first signal raises Stopped where the main thread is, or at the end of `deferred()` if it is inside of that. What
must not be cut in two, a step with its bookkeeping or the writing of a checkpoint, runs inside. A second signal during
a deferred part raises a plain KeyboardInterrupt at once, so that a step which hangs can still be ended.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

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
        if self.asked and not self._deferred:
            number, self.asked = self.asked, 0
            raise Stopped(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferred:
            raise Stopped(number)
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
