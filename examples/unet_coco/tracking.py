"""What a run tells while it trains: a progress bar, lines, and telemetry.

Without tqdm installed the run goes on with lines, and says so once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from te_nvfp4_cv import telemetry
from te_nvfp4_cv.telemetry import Telemetry

from .options import Settings
from .precision import Precision

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
    model: nn.Module,
    settings: Settings,
    precision: Precision,
    folder: Path,
    rank: int,
    goes_on: tuple[str, int] | None = None,
) -> tuple[Telemetry, Path]:
    """Telemetry of one precision's run and its file: JSON lines in its folder; W&B and TensorBoard where asked for.

    Args:
        folder: of this precision, in the run's folder, whose name is the W&B group.
        rank: only rank 0 writes.
        goes_on: the checkpoint's (file, step), to go on from there; None: a new file.
    """
    group, name = settings.out.name, precision.name
    sinks: list[telemetry.Sink] = []
    path = folder / goes_on[0] if goes_on else telemetry.fresh_path(folder / "telemetry.jsonl")
    if rank == 0:
        sinks.append(telemetry.JSONL(path, resume=goes_on is not None))
        if settings.wandb:
            config = {**{key: str(value) for key, value in vars(settings).items()}, "precision": name}
            sinks.append(telemetry.WandB("te_nvfp4_cv_unet_coco", group, name, settings.out, config))
        if settings.tensorboard:
            again = (goes_on[1] if goes_on else 0) if settings.resume else None
            sinks.append(telemetry.TensorBoard(settings.out / "tensorboard" / name, purge_step=again))
    watch = telemetry.attach(
        model, every=settings.telemetry_every, sinks=sinks, name=name, group=group, recipe=precision.recipe
    )
    return watch, path


def show_telemetry(out: Path, files: Sequence[Path]) -> list[Path]:
    """Draw what telemetry sampled: OUT/plots, one folder per precision, and OUT/report.html with all beside each other.

    Returns:
        Of the report and the folder of the plots what was written; nothing where no step was sampled.
    """
    drawn: list[Path] = []

    def draw(what: str, act: Callable[[], Path]) -> None:
        try:
            drawn.append(act())
        except (ValueError, RuntimeError, OSError) as error:  # pictures must not cost a finished run
            tell_once(f"telemetry: no {what}: {error}")

    def heatmaps() -> Path:
        for run in sampled:
            telemetry.render_heatmaps(run, out / "plots")
        return out / "plots"

    try:
        runs = [telemetry.read(path) for path in files]
    except ValueError as error:
        tell_once(f"telemetry was not drawn: {error}")
        return []
    sampled = [run for run in runs if run.steps]
    if sampled:
        draw("report", lambda: telemetry.write_report(runs, telemetry.fresh_path(out / "report.html")))
        draw("heatmaps", heatmaps)
    return drawn
