"""What a run tells while it trains: a progress bar, lines, and telemetry.

Without tqdm installed the run goes on with lines, and says so once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn

from te_nvfp4_cv import telemetry
from te_nvfp4_cv.telemetry import Telemetry

from .options import Settings

_told: set[str] = set()


def tell_once(text: str) -> None:
    """Print `text` the first time it comes up."""
    if text not in _told:
        _told.add(text)
        print(text, flush=True)


class Progress:
    """A tqdm bar on a terminal; only lines elsewhere, and on ranks but the first."""

    def __init__(self, name: str, total: int, done: int, rank: int = 0) -> None:
        self.name = name
        self._bar: Any = None
        if rank:
            return
        try:
            from tqdm import tqdm
        except ImportError:
            tell_once("tqdm is not installed: lines instead of a progress bar (pip install tqdm)")
            return
        self._bar = tqdm(total=total, initial=done, desc=name, unit="step", disable=None, leave=False, file=sys.stderr)

    def step(self, **figures: str) -> None:
        """One step further; figures stand beside the bar."""
        if self._bar is not None:
            self._bar.update()
            if figures:
                self._bar.set_postfix(figures)

    def line(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._bar is not None and not self._bar.disable:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def start_telemetry(
    model: nn.Module, settings: Settings, precision: str, recipe: Any, folder: Path, rank: int
) -> Telemetry:
    """Telemetry of one precision's run: JSON lines in its folder, W&B and TensorBoard where they are asked for.

    Args:
        folder: of this precision, in the run's folder, whose name is the W&B group.
        rank: only rank 0 writes.
    """
    group = settings.out.name
    sinks: list[telemetry.Sink] = []
    if rank == 0:
        path = folder / "telemetry.jsonl"
        if settings.resume and path.is_file():
            sinks.append(telemetry.JSONL(path, resume=True))
        else:
            sinks.append(telemetry.JSONL(telemetry.fresh_path(path)))
        if settings.wandb:
            config = {**{key: str(value) for key, value in vars(settings).items()}, "precision": precision}
            sinks.append(telemetry.WandB("te_nvfp4_cv_unet_coco", group, precision, settings.out, config))
        if settings.tensorboard:
            sinks.append(telemetry.TensorBoard(settings.out / "tensorboard" / precision))
    return telemetry.attach(
        model, every=settings.telemetry_every, sinks=sinks, name=precision, group=group, recipe=recipe
    )
