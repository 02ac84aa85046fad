"""A wandb that writes nothing: it remembers what was logged, and fails where it is told to."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class FakeRun:
    def __init__(self, breaks: str = "") -> None:
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.config = SimpleNamespace(update=lambda *_, **__: None)
        self.metrics: list[Any] = []
        self.finished, self.breaks = False, breaks

    def define_metric(self, *names: Any, **options: Any) -> None:
        self.metrics.append((names, options))

    def log(self, values: dict[str, Any]) -> None:
        if self.breaks == "log":
            raise ConnectionError("the network is gone")
        self.logged.append(values)

    def finish(self) -> None:
        if self.breaks == "finish":
            raise ConnectionError("the network is gone")
        self.finished = True


def _image(path: Any, caption: str = "") -> Any:
    if isinstance(path, str):
        open(path, "rb").close()  # wandb reads it at once, too
    return path, caption


def fake_wandb(monkeypatch, runs: dict[str, Any]) -> list[str]:
    """wandb whose init gives runs[mode], or raises it; returns the modes asked for."""
    modes: list[str] = []

    def init(mode: str, **options: Any) -> Any:
        modes.append(mode)
        if "dir" in options:  # as wandb does
            Path(options["dir"], "wandb", f"{mode}-run-1").mkdir(parents=True, exist_ok=True)
        if isinstance(runs[mode], Exception):
            raise runs[mode]
        return runs[mode]

    module = SimpleNamespace(
        init=init, Settings=lambda **o: o, Histogram=lambda np_histogram: np_histogram,
        Image=_image, Table=lambda columns, data: (columns, data),
        Html=lambda path, inject: Path(path).read_text(),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", module)
    return modes
