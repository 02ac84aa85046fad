"""What a run tells while it trains: a progress bar, lines, and a W&B log.

W&B is offline unless WANDB_MODE says otherwise, so that no key and no network are needed. Without wandb or tqdm
installed the run goes on without them, and says so once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

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


class WandbLog:
    """One W&B run per precision, all in one group, so that the same keys lie over each other."""

    def __init__(self, enabled: bool, folder: Path, group: str, name: str, config: dict[str, Any]) -> None:
        self._run: Any = None
        if not enabled:
            return
        os.environ.setdefault("WANDB_MODE", "offline")
        try:
            import wandb
        except ImportError:
            tell_once("wandb is not installed: no W&B log (pip install wandb; everything else is written all the same)")
            return
        try:
            self._run = wandb.init(
                project="te_nvfp4_cv_unet_coco",
                group=group,
                name=name,
                dir=str(folder),
                config=config,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:  # a log must never cost a training run
            tell_once(f"W&B could not start, so there is no W&B log: {error}")

    def log(self, figures: dict[str, float], step: int) -> None:
        if self._run is not None:
            self._run.log(figures, step=step)

    def picture(self, path: Path, step: int) -> None:
        """Add an image file."""
        if self._run is not None:
            import wandb

            self._run.log({"predictions": wandb.Image(str(path))}, step=step)

    def close(self, summary: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.summary.update(summary)
            self._run.finish()
