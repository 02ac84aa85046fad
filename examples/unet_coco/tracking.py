"""Report the progress of a run: a progress bar, lines of text, and telemetry.

If tqdm is not installed, the run prints lines instead of a bar, and says so once.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import nn

from te_nvfp4_cv import telemetry
from te_nvfp4_cv.telemetry import Telemetry

from .command_line import SAMPLES
from .options import Settings
from .precision import Precision

PROJECT = "te_nvfp4_cv_unet_coco"  # in W&B
LONG = 5  # seconds without a line, after which a user wonders

Rows = Mapping[str, Mapping[str, float | int]]  # what summary.json holds

_told: set[str] = set()


def tell_once(text: str) -> None:
    """Print `text`, but only the first time it is passed."""
    if text not in _told:
        _told.add(text)
        print(text, flush=True)


class Progress:
    """Show a tqdm bar on a terminal, and only lines elsewhere. Only the first rank shows a bar."""

    def __init__(self, name: str, total: int, done: int, rank: int = 0) -> None:
        self.name, self.total = name, total
        self._begun = self._before = time.monotonic(), done  # the clock at a number of steps
        self._took = math.inf  # seconds of the last phase
        self._bar: Any = None
        if rank:
            return
        try:
            from tqdm import tqdm
        except ImportError:
            tell_once("tqdm is not installed: lines instead of a progress bar (pip install tqdm)")
            return
        # disable=None shows no bar if stderr is not a terminal.
        self._bar = tqdm(total=total, initial=done, desc=name, unit="step", disable=None, leave=False, file=sys.stderr)

    def step(self, step: int, images: int, figures: Mapping[str, float]) -> None:
        """Show that `step` steps of so many images are done. With figures, the loss and the rate, print a line, too."""
        if self._bar is not None:
            self._bar.update()
        if not figures:
            return
        now = time.monotonic()
        rate = (step - self._before[1]) * images / max(now - self._before[0], 1e-9)
        left = (self.total - step) * (now - self._begun[0]) / max(step - self._begun[1], 1)
        self._before = now, step
        shown = {"loss": f"{figures['loss']:.4f}", "lr": f"{figures['lr']:.2e}", "images/s": f"{rate:.3g}"}
        if self._bar is not None:
            self._bar.set_postfix(shown)  # tqdm adds the time that is left
        self.line(
            f"{self.name:>8}  step {step:>6}/{self.total}  loss {shown['loss']}  lr {shown['lr']}  "
            f"{shown['images/s']} images/s  {timedelta(seconds=round(left))} left"
        )

    @contextlib.contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Say what happens while no step is taken: beside the bar, or as a line if it took long the last time."""
        begun = time.monotonic()
        if self._bar is not None and not self._bar.disable:
            self._bar.set_description(f"{self.name}: {text}")
        elif self._took > LONG:
            self.line(f"{self.name:>8}  {text} ...")
        try:
            yield
        finally:
            self._took = time.monotonic() - begun
            # the time that is left and the images per second are those of steps
            self._begun = self._begun[0] + self._took, self._begun[1]
            self._before = self._before[0] + self._took, self._before[1]
            if self._bar is not None:
                self._bar.set_description(self.name)

    def line(self, text: str) -> None:
        """Print a line that stays, above the bar."""
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
    backend: str,
    folder: Path,
    rank: int,
    steps: int,
    goes_on: tuple[str, int] | None = None,
) -> tuple[Telemetry, Path]:
    """Start the telemetry of one precision's run, and return it with the name of its file.

    It writes JSON lines in the precision's folder, and to W&B and TensorBoard if they are turned on.

    Args:
        backend: What NVFP4 layers run on, in words (backends.in_words).
        folder: The folder of this precision, in the run's folder, whose name is the W&B group.
        rank: Only rank 0 writes.
        steps: The number of steps of the run; the last one is sampled, too.
        goes_on: The checkpoint's (file, step), to continue from there. If None, a new file is started.
    """
    group, name = settings.out.resolve().name, precision.name
    sinks: list[telemetry.Sink] = []
    path = folder / goes_on[0] if goes_on else telemetry.fresh_path(folder / "telemetry.jsonl")
    if rank == 0:
        sinks.append(telemetry.JSONL(path, resume=goes_on is not None))
        if settings.wandb:
            config = {key: str(value) for key, value in vars(settings).items()}
            config |= {"precision": name, "backend": backend}  # what --backend came to
            about_it = {"group": group, "name": name, "config": config}
            sinks.append(telemetry.WandB(project=PROJECT, folder=settings.out, **about_it))
        if settings.tensorboard:
            again = (goes_on[1] if goes_on else 0) if settings.resume else None
            sinks.append(telemetry.TensorBoard(settings.out / "tensorboard" / name, purge_step=again))
    about = {"name": name, "group": group, "recipe": precision.recipe, "backend": backend}
    every = settings.telemetry_every
    if every is None:
        every = max(1, steps // (SAMPLES - 1))
    watch = telemetry.attach(model, every=every, sinks=sinks, last=steps - 1, **about)
    return watch, path


def show_telemetry(out: Path, files: Sequence[Path], wandb: bool, rows: Rows) -> list[Path]:
    """Draw what telemetry sampled: OUT/plots with one folder per precision, and OUT/report.html with all side by side.

    Args:
        wandb: Whether to send the report and the results to W&B, as a run `comparison` beside those of the precisions.
        rows: The content of summary.json.
    Returns:
        The paths that were written, of the report and of the folder of plots; none if no step was sampled.
    """
    drawn: list[Path] = []

    def draw(what: str, act: Callable[[], Path]) -> None:
        try:
            drawn.append(act())
        except (ValueError, RuntimeError, OSError) as error:  # a failed plot must not end a finished run
            tell_once(f"telemetry: no {what}: {error}")

    def heatmaps() -> Path:
        for run in sampled:
            telemetry.render_heatmaps(run, out / "plots", force=True)  # OUT is this run's: a resume draws it again
        return out / "plots"

    try:
        runs = [telemetry.read(path) for path in files]
    except ValueError as error:
        tell_once(f"telemetry was not drawn: {error}")
        return []
    sampled = [run for run in runs if run.steps]
    if sampled:
        print("drawing what telemetry recorded: a report, and heatmaps of each precision ...", flush=True)
        group = out.resolve().name
        sinks = [telemetry.WandB(project=PROJECT, folder=out, group=group, name="comparison")] if wandb else []
        draw("report", lambda: telemetry.write_report(runs, out / "report.html", force=True, sinks=sinks))
        for sink in sinks:
            _send_results(sink, out, rows)
        draw("heatmaps", heatmaps)
    return drawn


def _send_results(sink: telemetry.Sink, out: Path, rows: Rows) -> None:
    """Send what is known when all precisions have trained, and end the sink."""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    results = [[name, *(row.get(key) for key in keys)] for name, row in rows.items()]
    sink.table("results", ["precision", *keys], results, 0)
    for name in ("curves", "predictions"):
        if (out / f"{name}.png").is_file():
            sink.image(name, out / f"{name}.png", 0)
    sink.close({f"{name}/{key}": value for name, row in rows.items() for key, value in row.items()})
