"""Where telemetry's records go."""

from __future__ import annotations

from typing import Any, Protocol


class Sink(Protocol):
    """What a sink does."""

    def start(self, header: dict[str, Any]) -> None: ...

    def step(self, record: dict[str, Any]) -> None: ...

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def alarm(self, record: dict[str, Any]) -> None: ...

    def close(self, summary: dict[str, Any] | None = None) -> None: ...
