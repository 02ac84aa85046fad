"""Hold how far a run has come; engine.py moves it, and every checkpoint contains it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Position:
    """Record how far a run has come and its figures so far. It is saved with every checkpoint."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    losses: list[float] = field(default_factory=list)  # of the current epoch
    last_epoch_loss: float = math.nan
    curve: list[dict[str, float]] = field(default_factory=list)  # one row every log_every steps
    epochs: list[dict[str, float]] = field(default_factory=list)  # one row per validated epoch
    step_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)  # steps that compile and allocate: used if there are no others
    telemetry: str = "telemetry.jsonl"  # the file that this run writes
