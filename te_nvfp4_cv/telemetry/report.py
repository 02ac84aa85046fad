"""Show several runs side by side in one HTML file that holds its pictures, and needs no script and no network.

    write_report(["bf16/telemetry.jsonl", "nvfp4/telemetry.jsonl"], "report.html")

Runs may differ in layers and steps, and need not have sampled any. The heatmaps of one figure have the same rows, those
of all runs, and the same colour limits; what a run lacks is grey. Whatever comes out of the files is escaped. If the
file would grow beyond MOST_BYTES, pictures get fewer colours, and then fewer dots. A file that is there already is
refused, unless `force` is given.
"""

from __future__ import annotations

import base64
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.files import write_atomically
from te_nvfp4_cv.telemetry import drawing
from te_nvfp4_cv.telemetry.drawing import Panel
from te_nvfp4_cv.telemetry.heatmaps import CODE_NAMES, KINDS, SCALES, STATISTICS, as_run, table, usage
from te_nvfp4_cv.telemetry.records import FORMAT, VERSION, Run, numbered
from te_nvfp4_cv.telemetry.settings import THRESHOLD
from te_nvfp4_cv.telemetry.sinks import Sink
from te_nvfp4_cv.telemetry.templates import fill

MOST_BYTES = 10_000_000
QUALITIES = ((130, False), (130, True), (90, True), (60, True))  # dots per inch, whether to use 256 colours only
WIDE = 5.6  # inches of a heatmap: narrow enough for a phone to show its labels
OPERANDS = ("weight", "weight_column", "input", "input_column", "grad_output", "grad_output_column")
FIGURES = {
    "sqnr_db": ("SQNR, dB", 1, 1),
    "underflow": ("underflow, %", 100, 2),
    "saturation": ("saturation, %", 100, 3),
}
SHARED = ("model", "recipe", "backend")  # what a sink is told of all runs together
LOWEST = 3  # SQNRs per run and operand that the table marks
MOST_ALARMS = 500


def write_report(
    paths: Sequence[Run | str | os.PathLike[str]],
    out: str | os.PathLike[str],
    force: bool = False,
    sinks: Sequence[Sink] = (),
) -> Path:
    """Write a report that shows several runs side by side, as one HTML file.

    Args:
        paths: telemetry files, or what telemetry.read returned for them; the first is shown first.
        out: the HTML file to write.
        force: replace a file that is there.
        sinks: where the page goes, too, and each of its figures as one picture with the runs beside each other, in
            the same colours: WandB or TensorBoard. They begin here and stay open for what you add; close them.
    Returns:
        The path of the HTML file.
    Raises:
        ValueError: no run, a file that is no telemetry file, or an `out` that is there already or cannot be written.
        RuntimeError: matplotlib is not installed.

    Example:
        >>> import tempfile, torch, te_nvfp4_cv as nv
        >>> folder = tempfile.mkdtemp()
        >>> watch = nv.telemetry.attach(torch.nn.Linear(32, 16), sinks=[nv.telemetry.JSONL(f"{folder}/bf16.jsonl")])
        >>> watch.scalars(0, {"train/loss": 0.5})
        >>> nv.telemetry.write_report([f"{folder}/bf16.jsonl"], f"{folder}/report.html").name
        'report.html'
    """
    out = Path(out)
    paths = [paths] if isinstance(paths, (str, os.PathLike, Run)) else list(paths)
    if not paths:
        raise value_error(
            "telemetry: a report of no run.", got="no paths", needs="at least one telemetry file", fix="give one"
        )
    if out.is_dir() or (out.exists() and not force):
        raise value_error(
            f"telemetry: {out} is there already.",
            got="a folder" if out.is_dir() else "a file",
            needs="a new file",
            fix="another name" if out.is_dir() else "another name, or force=True (--force) to replace it",
        )
    drawing.need("matplotlib", "jinja2")
    runs = [as_run(path) for path in paths]
    # How large a picture becomes is known only when it has been drawn, so the whole report is drawn again if needed.
    for resolution, palette in QUALITIES:
        report = _Report(runs, resolution, palette)
        text = report.text()
        if len(text) < MOST_BYTES:
            break
    write_atomically(out, text.encode(), fix="free some space, or choose another path")
    for sink in sinks:
        _send(report, out, sink)
    return out


def _send(report: _Report, page: Path, sink: Sink) -> None:
    """Begin the sink as a run that compares others, and send it what the page shows."""
    from PIL import Image

    runs = [run for _, run in report.runs]
    about = {key: ", ".join(filter(None, _union([getattr(run, key)] for run in runs))) for key in SHARED}
    started = max(run.started for run in runs)
    sink.start({
        "kind": "run", "format": FORMAT, "version": VERSION, "name": "comparison", "group": runs[0].group, **about,
        "every": 0, "started": started, "layers": [],
    })  # fmt: skip
    last = max((step for run in runs for step in (*run.steps, *run.scalars)), default=0)
    sink.page("report", page, last)
    with tempfile.TemporaryDirectory() as folder:
        for section, groups in report.pictures.items():
            for group in groups:
                pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for _, data in group.images]
                sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
                for place, picture in enumerate(pictures):
                    sheet.paste(picture, (sum(p.width for p in pictures[:place]), 0))
                sheet.save(Path(folder, "figure.png"))
                sink.image(f"{section}/{group.title}", Path(folder, "figure.png"), last)


def _labels(runs: Sequence[Run]) -> list[str]:
    """Return the runs' names, with a number behind a name that came before."""
    labels: list[str] = []
    for run in runs:
        # Names are the user's: two runs may be "nvfp4", and one of them "nvfp4 (2)".
        names = numbered(run.name or "run", "{} ({})")
        labels.append(next(name for name in names if name not in labels))
    return labels


def _union(lists: Iterable[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in lists for name in names))  # a set would lose the order


def last_step(run: Run) -> int | None:
    """Return the last sampled step in which any layer ran in NVFP4, or None."""
    for step, layers in reversed(run.steps.items()):
        if any(layer.get("precision") == "nvfp4" for layer in layers.values()):
            return step
    return None


@dataclass
class Group:
    """One figure of all runs: a picture of each that has values, and the names of the runs that have none."""

    title: str
    images: list[tuple[str, str]]  # (what it shows, the PNG in base64)
    without: list[str]


class Cell(NamedTuple):
    """What the table says of one operand of a layer: its figures, or a text in place of them."""

    values: list[str]
    low: bool
    text: str


@dataclass
class Table:
    """The operands of one run at its last step in NVFP4."""

    label: str
    step: int
    operands: list[str]
    rows: dict[str, list[Cell]]


class _Report:
    """The page: each method but `text` makes what one of its sections shows."""

    def __init__(self, runs: Sequence[Run], resolution: int, palette: bool) -> None:
        self.resolution, self.palette = resolution, palette
        self.runs = list(zip(_labels(runs), runs, strict=True))
        self.layers = _union(run.layers for run in runs)
        drawn = {
            "Signal to noise": self.noise(),
            "Weight codes": self.codes(),
            "Gradient to noise": self.gradients(),
            "Heatmaps": self.heatmaps(),
        }
        self.pictures = {name: [group for group in groups if group.images] for name, groups in drawn.items()}

    def text(self) -> str:
        labels = [label for label, _ in self.runs]
        alarms = [(label, alarm) for label, run in self.runs for alarm in run.alarms]
        return fill(
            "report.html",
            title=f"Telemetry: {', '.join(labels)}",
            labels=labels,
            about={name: [cell(run) for _, run in self.runs] for name, cell in ABOUT.items()},
            scalars=self.scalars(),
            alarms=alarms[:MOST_ALARMS],  # a diverged run may raise one for every layer and step
            more_alarms=max(0, len(alarms) - MOST_ALARMS),
            tables=[_table(label, run, step) for label, run in self.runs if (step := last_step(run)) is not None],
            figures=[text for text, _, _ in FIGURES.values()],
            lowest=LOWEST,
            pictures=self.pictures,
        )

    def scalars(self) -> Group:
        names = _union(_union(map(list, run.scalars.values())) for _, run in self.runs)
        group = Group("", [], [])
        for name in names:
            series: dict[str, tuple[list[int], list[float]]] = {}
            for label, run in self.runs:
                # Runs need not record the same figures, nor every figure at every step.
                found = [(step, held[name]) for step, held in run.scalars.items() if _is_number(held.get(name))]
                if found:
                    series[label] = ([step for step, _ in found], [value for _, value in found])
            if series:
                group.images.append((name, self._image(drawing.overlay(name, series))))
        return group

    def noise(self) -> list[Group]:
        return [
            *(
                self._curves(f"{title}: SQNR", "SQNR (dB)", ("tensors", tensor, "sqnr_db"))
                for tensor, title in (("weight", "Weights"), ("input", "Inputs"), ("grad_output", "Output gradients"))
            ),
            self._curves(
                "Weights: correlation of raw and dequantized", "correlation", ("tensors", "weight", "correlation")
            ),
        ]

    def codes(self) -> list[Group]:
        found = {label: usage(run, self.layers) for label, run in self.runs}
        panels = {
            label: Panel(label if step is None else f"{label}, step {step}", CODE_NAMES, 100 * shares)
            for label, (step, shares) in found.items()
        }
        title = "Weights: use of the 16 codes"
        return [
            self._maps(title, panels, SCALES["usage"], "share (%)", "code, by its value"),
            self._curves("Weights: codes that differ from the sample before", "share", ("flip_rate",), highest=True),
            self._curves("Weights: codes that went back (oscillation)", "share", ("oscillation",), highest=True),
        ]

    def gradients(self) -> list[Group]:
        line = (THRESHOLD, "sqrt(3): stalls below")
        title = "Weight gradient: norm over its quantization noise"
        return [self._curves(title, "norm / noise", ("gradient", "ratio"), log=True, line=line)]

    def heatmaps(self) -> list[Group]:
        groups = []
        for kind in KINDS:
            for statistic in STATISTICS:
                panels = self._panels(("tensors", kind.tensor, kind.stage, statistic))
                title = f"{kind.title}: {STATISTICS[statistic]}"
                groups.append(self._maps(title, panels, SCALES[statistic], kind.label(statistic), "step"))
        return groups

    def _panels(self, keys: tuple[str, ...]) -> dict[str, Panel]:
        return {label: Panel(label, list(run.steps), table(run, self.layers, *keys)) for label, run in self.runs}

    def _maps(self, title: str, panels: dict[str, Panel], scale: dict[str, Any], label: str, xlabel: str) -> Group:
        # All runs show the same rows, so that a layer stands at the same height in each of them.
        some = [i for i in range(len(self.layers)) if any(np.isfinite(p.values[i]).any() for p in panels.values())]
        rows = [self.layers[i] for i in some]
        # Common to all pictures of a figure: equal colours then mean equal values in every run.
        bounds = drawing.limits([panel.values[some] for panel in panels.values()], **scale)

        def draw(panel: Panel) -> Any:
            return drawing.heatmap(replace(panel, values=panel.values[some]), rows, bounds, label, xlabel, WIDE)

        return self._group(title, panels, draw)

    def _curves(self, title: str, label: str, keys: tuple[str, ...], **options: Any) -> Group:
        panels = self._panels(keys)
        found = np.concatenate([panel.values[np.isfinite(panel.values)] for panel in panels.values()])
        ends = (found.min(), found.max()) if len(found) else ()
        return self._group(title, panels, lambda panel: drawing.curves(panel, self.layers, label, ends=ends, **options))

    def _group(self, title: str, panels: dict[str, Panel], draw: Callable[[Panel], Any]) -> Group:
        """Draw the panels that hold any value."""
        group = Group(title, [], [])
        for label, panel in panels.items():
            if np.isfinite(panel.values).any():
                group.images.append((f"{title}: {label}", self._image(draw(panel))))
            else:
                group.without.append(label)
        return group

    def _image(self, figure: Any) -> str:
        from PIL import Image

        picture, packed = drawing.image(figure, self.resolution), io.BytesIO()
        if self.palette:  # of all methods only this one keeps rare colours, such as those of a colour bar
            picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        picture.save(packed, "png", optimize=True)
        return base64.b64encode(packed.getvalue()).decode("ascii")


# ---- what the tables say --------------------------------------------------------------------------------------------


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and bool(np.isfinite(value))


class About(NamedTuple):
    """A cell of the table of runs: a text, and what unfolds below a summary."""

    text: str
    summary: str = ""
    more: str = ""


def _steps(run: Run) -> About:
    steps = list(run.steps)
    return About(f"{len(steps)}, from {steps[0]} to {steps[-1]}, every {run.every}" if steps else "none")


def _layers(run: Run) -> About:
    """Say how many layers run in which precision, and why those in high precision do."""
    step = last_step(run)
    if step is None:
        return About(f"{len(run.layers)}, none sampled in NVFP4")
    others = {name: held for name, held in run.steps[step].items() if held.get("precision") != "nvfp4"}
    text = f"{len(run.steps[step])}, {len(run.steps[step]) - len(others)} in NVFP4 at step {step}"
    lines = [f"{name}: {held.get('reason') or 'no reason recorded'}" for name, held in others.items()]
    unseen = any(held.get("precision") == "unseen" for held in others.values())
    return About(text, "in high precision, or not seen" if unseen else "in high precision", "\n".join(lines))


def _recipe(run: Run) -> About:
    """Say which recipe a run had, as far as whoever attached telemetry gave it."""
    if run.recipe.strip():
        return About("", "show", run.recipe)
    if run.recipe:  # as TOML, a recipe is the fields in which it differs from the default one
        return About("the default")
    return About("none: high precision" if last_step(run) is None else "not recorded")


ABOUT: dict[str, Callable[[Run], About]] = {
    "model": lambda run: About(run.model),
    "group": lambda run: About(run.group or "–"),
    "recipe": _recipe,
    "backend": lambda run: About(run.backend or "–"),
    "layers": _layers,
    "sampled steps": _steps,
    "started": lambda run: About(run.started),
    "file": lambda run: About(run.path.name),
    "notes": lambda run: About("; ".join(run.notes) or "none"),
}


def _table(label: str, run: Run, step: int) -> Table:
    """Make the table of a run; operands that no layer has in NVFP4 have no column."""
    held = run.steps[step]
    found = {(layer, operand) for layer in held for operand in OPERANDS if _operand(held[layer], operand)}
    operands = [operand for operand in OPERANDS if any((layer, operand) in found for layer in held)]
    marked = set(_lowest(held))
    rows = {}
    for layer, values in held.items():
        text = {"nvfp4": "–", "unseen": "not seen"}.get(values.get("precision", ""), "high precision")
        rows[layer] = [
            Cell(_figures(_operand(values, operand)), (layer, operand) in marked, text) for operand in operands
        ]
    return Table(label, step, operands, rows)


def _operand(layer: dict[str, Any], operand: str) -> dict[str, Any]:
    """Return what the record says of a quantized operand; {} if there is none."""
    held: dict[str, Any] = layer.get("tensors", {}).get(operand, {})
    return held if any(_is_number(held.get(key)) for key in FIGURES) else {}


def _lowest(layers: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the layers and operands with the lowest SQNRs of every operand."""
    for operand in OPERANDS:
        values = [(held.get("tensors", {}).get(operand, {}).get("sqnr_db"), name) for name, held in layers.items()]
        numbers = sorted((value, name) for value, name in values if _is_number(value))
        if len(numbers) > 2 * LOWEST:
            yield from ((name, operand) for _, name in numbers[:LOWEST])


def _figures(held: dict[str, Any]) -> list[str]:
    """Return the figures of an operand as text, [] of an operand that was not quantized."""
    if not held:
        return []
    known = ((held.get(key), factor, digits) for key, (_, factor, digits) in FIGURES.items())
    return [f"{value * factor:.{digits}f}" if _is_number(value) else "–" for value, factor, digits in known]
