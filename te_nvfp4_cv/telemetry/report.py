"""Show several runs side by side in one HTML file that holds its pictures, and needs no script and no network.

    write_report(["bf16/telemetry.jsonl", "nvfp4/telemetry.jsonl"], "report.html")

Runs may differ in layers and steps, and need not have sampled any. The heatmaps of one figure have the same rows, those
of all runs, and the same colour limits; what a run lacks is grey. Whatever comes out of the files is escaped. If the
file would grow beyond MOST_BYTES, pictures get fewer colours, and then fewer dots. A file that is there already is
refused, unless `force` is given.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.files import write_atomically
from te_nvfp4_cv.telemetry import drawing
from te_nvfp4_cv.telemetry.drawing import Panel
from te_nvfp4_cv.telemetry.heatmaps import CODE_NAMES, KINDS, SCALES, STATISTICS, as_run, table, usage
from te_nvfp4_cv.telemetry.records import Run, numbered
from te_nvfp4_cv.telemetry.settings import THRESHOLD

MOST_BYTES = 10_000_000
QUALITIES = ((100, False), (100, True), (75, True), (50, True))  # dots per inch, whether to use 256 colours only
BESIDE = 3  # runs beside each other in one picture
OPERANDS = ("weight", "weight_column", "input", "input_column", "grad_output", "grad_output_column")
FIGURES = {
    "sqnr_db": ("SQNR, dB", 1, 1),
    "underflow": ("underflow, %", 100, 2),
    "saturation": ("saturation, %", 100, 3),
}
LOWEST = 3  # SQNRs per run and operand that the table marks
MOST_ALARMS = 500

STYLE = """body{font:14px/1.45 system-ui,sans-serif;color:#222;margin:24px auto;padding:0 24px;max-width:1700px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:19px;margin:36px 0 8px;border-bottom:1px solid #ddd}
nav a{margin-right:14px}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{border:1px solid #ddd;padding:3px 8px;text-align:left;vertical-align:top}th{background:#f4f4f4}
td.n{text-align:right}td.low{background:#fbd9d3}td.none{color:#888}tbody th{font-weight:normal}
figure{margin:14px 0}img{max-width:100%}.row{display:flex;flex-wrap:wrap;gap:12px}.row figure{margin:0}
.scroll{max-height:640px;overflow:auto;display:inline-block;max-width:100%}.scroll thead th{position:sticky;top:0}
pre{margin:4px 0;white-space:pre-wrap;max-width:600px}p.note{color:#666}"""


def write_report(
    paths: Sequence[Run | str | os.PathLike[str]], out: str | os.PathLike[str], force: bool = False
) -> Path:
    """Write a report that shows several runs side by side, as one HTML file.

    Args:
        paths: telemetry files, or what telemetry.read returned for them; the first is shown first.
        out: the HTML file to write.
        force: replace a file that is there.
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
    drawing.need("matplotlib")
    runs = [as_run(path) for path in paths]
    # How large a picture becomes is known only when it has been drawn, so the whole report is drawn again if needed.
    for resolution, palette in QUALITIES:
        text = _Report(runs, resolution, palette).text()
        if len(text) < MOST_BYTES:
            break
    write_atomically(out, text.encode(), fix="free some space, or choose another path")
    return out


def _escape(value: Any) -> str:
    return html.escape(str(value))


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


class _Report:
    """The page: each method but `text` writes one of its sections."""

    def __init__(self, runs: Sequence[Run], resolution: int, palette: bool) -> None:
        self.resolution, self.palette = resolution, palette
        self.runs = list(zip(_labels(runs), runs, strict=True))
        self.layers = _union(run.layers for run in runs)

    def text(self) -> str:
        sections: dict[str, Callable[[], str]] = {
            "Runs": self.headers,
            "Loss and metrics": self.scalars,
            "Alarms": self.alarms,
            "Quantization at the last step": self.operands,
            "Signal to noise": self.noise,
            "Weight codes": self.codes,
            "Gradient to noise": self.gradients,
            "Heatmaps": self.heatmaps,
        }
        ids = {title: title.lower().replace(" ", "-") for title in sections}
        links = "".join(f'<a href="#{ids[title]}">{title}</a>' for title in sections)
        body = "\n".join(f'<h2 id="{ids[title]}">{title}</h2>\n{draw()}' for title, draw in sections.items())
        title = f"Telemetry: {', '.join(label for label, _ in self.runs)}"
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_escape(title)}</title>\n'
            f"<style>{STYLE}</style></head>\n<body><h1>{_escape(title)}</h1>\n<nav>{links}</nav>\n{body}\n"
            "</body></html>\n"
        )

    # ---- text and tables ----

    def headers(self) -> str:
        rows: dict[str, Callable[[Run], str]] = {
            "model": lambda run: _escape(run.model),
            "group": lambda run: _escape(run.group or "–"),
            "recipe": _recipe,
            "backend": lambda run: _escape(run.backend or "–"),
            "layers": _layers,
            "sampled steps": _steps,
            "started": lambda run: _escape(run.started),
            "file": lambda run: _escape(run.path.name),
            "notes": lambda run: "<br>".join(map(_escape, run.notes)) or "none",
        }
        lines = [f"<tr><th></th>{''.join(f'<th>{_escape(label)}</th>' for label, _ in self.runs)}</tr>"]
        for name, cell in rows.items():
            lines.append(f"<tr><th>{name}</th>{''.join(f'<td>{cell(run)}</td>' for _, run in self.runs)}</tr>")
        return f"<table>{''.join(lines)}</table>"

    def scalars(self) -> str:
        names = _union(_union(map(list, run.scalars.values())) for _, run in self.runs)
        pictures = []
        for name in names:
            series: dict[str, tuple[list[int], list[float]]] = {}
            for label, run in self.runs:
                # Runs need not record the same figures, nor every figure at every step.
                found = [(step, held[name]) for step, held in run.scalars.items() if _is_number(held.get(name))]
                if found:
                    series[label] = ([step for step, _ in found], [value for _, value in found])
            if series:
                pictures.append(self._image(drawing.overlay(name, series), name))
        return f'<div class="row">{"".join(pictures)}</div>' if pictures else _note("No run recorded any.")

    def alarms(self) -> str:
        found = [(label, alarm) for label, run in self.runs for alarm in run.alarms]
        if not found:
            return _note("None.")
        rows = "".join(
            f'<tr><td>{_escape(label)}</td><td class="n">{_escape(alarm["step"])}</td>'
            f"<td>{_escape(alarm['layer'])}</td><td>{_escape(alarm['text'])}</td></tr>"
            # A diverged run may raise one for every layer and step.
            for label, alarm in found[:MOST_ALARMS]
        )
        more = _note(f"{len(found) - MOST_ALARMS} more are in the files.") if len(found) > MOST_ALARMS else ""
        head = "<thead><tr><th>run</th><th>step</th><th>layer</th><th>alarm</th></tr></thead>"
        return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>{more}'

    def operands(self) -> str:
        shown = [(label, run, step) for label, run in self.runs if (step := last_step(run)) is not None]
        if not shown:
            return _note("No layer of any run was sampled in NVFP4.")
        width = len(FIGURES)
        first = "".join(f'<th colspan="{width}">{_escape(label)}, step {step}</th>' for label, _, step in shown)
        second = "".join(f"<th>{text}</th>" for _ in shown for text, _, _ in FIGURES.values())
        marked = {(label, name) for label, run, step in shown for name in _lowest(run.steps[step])}
        lines = []
        for layer in self.layers:
            for operand in OPERANDS:
                held = [_operand(run, step, layer, operand) for _, run, step in shown]
                if not any(held):  # an operand that no run has in NVFP4 gets no row
                    continue
                cells = "".join(
                    _cells(values, run.steps[step].get(layer), (label, (layer, operand)) in marked)
                    for values, (label, run, step) in zip(held, shown, strict=True)
                )
                lines.append(f"<tr><th>{_escape(layer)}</th><td>{operand}</td>{cells}</tr>")
        return _note(
            "SQNR: signal to quantization noise. Underflow: share of the values other than 0 whose code is 0. "
            "Saturation: share of the values beyond 6 scales. …_column: the operand along the other axis. "
            f"Marked: the {LOWEST} lowest SQNRs of each operand, where it has more than {2 * LOWEST}."
        ) + (
            f'<div class="scroll"><table><thead><tr><th rowspan="2">layer</th><th rowspan="2">operand</th>{first}</tr>'
            f"<tr>{second}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        )

    # ---- pictures ----

    def noise(self) -> str:
        return "".join(
            self._curves(f"{title}: SQNR", "SQNR (dB)", ("tensors", tensor, "sqnr_db"))
            for tensor, title in (("weight", "Weights"), ("input", "Inputs"), ("grad_output", "Output gradients"))
        ) + self._curves(
            "Weights: correlation of raw and dequantized", "correlation", ("tensors", "weight", "correlation")
        )

    def codes(self) -> str:
        found = [(label, *usage(run, self.layers)) for label, run in self.runs]
        used = [(f"{label}, step {step}", 100 * shares) for label, step, shares in found if step is not None]
        panels = [Panel(heading, CODE_NAMES, shares) for heading, shares in used]
        title = "Weights: use of the 16 codes"
        return (
            self._maps(title, panels, SCALES["usage"], "share (%)", "code, by its value")
            + self._curves("Weights: codes that differ from the sample before", "share", ("flip_rate",), highest=True)
            + self._curves("Weights: codes that went back (oscillation)", "share", ("oscillation",), highest=True)
        )

    def gradients(self) -> str:
        line = (THRESHOLD, "sqrt(3): training stalls below")
        title = "Weight gradient: norm over its quantization noise"
        return self._curves(title, "norm / noise", ("gradient", "ratio"), log=True, line=line)

    def heatmaps(self) -> str:
        pictures = []
        for kind in KINDS:
            for statistic in STATISTICS:
                panels = self._panels(("tensors", kind.tensor, kind.stage, statistic))
                title = f"{kind.title}: {STATISTICS[statistic]}"
                pictures.append(self._maps(title, panels, SCALES[statistic], kind.label(statistic), "step"))
        return "".join(pictures)

    def _panels(self, keys: tuple[str, ...]) -> list[Panel]:
        return [Panel(label, list(run.steps), table(run, self.layers, *keys)) for label, run in self.runs]

    def _maps(self, title: str, panels: list[Panel], scale: dict[str, Any], label: str, xlabel: str) -> str:
        # All runs show the same rows, so that a layer stands at the same height in each of them.
        some = [i for i in range(len(self.layers)) if any(np.isfinite(panel.values[i]).any() for panel in panels)]
        rows = [self.layers[i] for i in some]
        panels = [Panel(panel.heading, panel.columns, panel.values[some]) for panel in panels]
        # Common to all pictures of a figure: equal colours then mean equal values in every run.
        bounds = drawing.limits([panel.values for panel in panels], **scale)
        return self._pictures(title, panels, lambda part: drawing.heatmaps(title, rows, part, bounds, label, xlabel))

    def _curves(self, title: str, label: str, keys: tuple[str, ...], **options: Any) -> str:
        panels = self._panels(keys)
        return self._pictures(title, panels, lambda part: drawing.curves(title, self.layers, part, label, **options))

    def _pictures(self, title: str, panels: list[Panel], draw: Callable[[list[Panel]], Any]) -> str:
        """Draw the panels that hold any value, some beside each other, and name the runs whose panels hold none."""
        without = [panel.heading for panel in panels if not np.isfinite(panel.values).any()]
        panels = [panel for panel in panels if np.isfinite(panel.values).any()]
        if not panels:
            return _note(f"{title}: no run has values.")
        parts = (panels[start : start + BESIDE] for start in range(0, len(panels), BESIDE))
        images = [self._image(draw(part), title) for part in parts]
        return "".join(images) + (_note(f"Without values: {', '.join(without)}.") if without else "")

    def _image(self, figure: Any, title: str) -> str:
        from PIL import Image

        drawn, packed = io.BytesIO(), io.BytesIO()
        drawing.save(figure, drawn, self.resolution)
        picture = Image.open(drawn).convert("RGB")  # without the alpha channel, which nothing uses
        if self.palette:  # of all methods only this one keeps rare colours, such as those of a colour bar
            picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        picture.save(packed, "png", optimize=True)
        data = base64.b64encode(packed.getvalue()).decode("ascii")
        return f'<figure><img alt="{_escape(title)}" src="data:image/png;base64,{data}"></figure>\n'


# ---- cells ----------------------------------------------------------------------------------------------------------


def _note(text: str) -> str:
    return f'<p class="note">{_escape(text)}</p>\n'


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and bool(np.isfinite(value))


def _recipe(run: Run) -> str:
    if not run.recipe:
        return "none: high precision"
    return f"<details><summary>show</summary><pre>{_escape(run.recipe)}</pre></details>"


def _steps(run: Run) -> str:
    if not run.steps:
        return "none"
    steps = list(run.steps)
    return _escape(f"{len(steps)}, from {steps[0]} to {steps[-1]}, every {run.every}")


def _layers(run: Run) -> str:
    """Say how many layers run in which precision, and why those in high precision do."""
    step = last_step(run)
    if step is None:
        return f"{len(run.layers)}, none sampled in NVFP4"
    high = {name: held.get("reason", "") for name, held in run.steps[step].items() if held.get("precision") != "nvfp4"}
    text = f"{len(run.steps[step])}, {len(run.steps[step]) - len(high)} in NVFP4 at step {step}"
    if not high:
        return text
    lines = "<br>".join(f"{_escape(name)}: {_escape(reason or 'no reason recorded')}" for name, reason in high.items())
    return f"{text}<details><summary>in high precision</summary>{lines}</details>"


def _operand(run: Run, step: int, layer: str, operand: str) -> dict[str, Any]:
    """Return what the record says of a quantized operand; {} if there is none."""
    held: dict[str, Any] = run.steps[step].get(layer, {}).get("tensors", {}).get(operand, {})
    return held if any(_is_number(held.get(key)) for key in FIGURES) else {}


def _lowest(layers: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the layers and operands with the lowest SQNRs of every operand."""
    for operand in OPERANDS:
        values = [(held.get("tensors", {}).get(operand, {}).get("sqnr_db"), name) for name, held in layers.items()]
        numbers = sorted((value, name) for value, name in values if _is_number(value))
        if len(numbers) > 2 * LOWEST:
            yield from ((name, operand) for _, name in numbers[:LOWEST])


def _cells(values: dict[str, Any], layer: dict[str, Any] | None, low: bool) -> str:
    if not values:
        text = "absent" if layer is None else "high precision" if layer.get("precision") != "nvfp4" else "–"
        return f'<td class="none" colspan="{len(FIGURES)}">{text}</td>'
    cells = []
    for key, (_, factor, digits) in FIGURES.items():
        value: Any = values.get(key)
        shown = f"{value * factor:.{digits}f}" if _is_number(value) else "–"
        cells.append(f'<td class="n{" low" if low and key == "sqnr_db" else ""}">{shown}</td>')
    return "".join(cells)
