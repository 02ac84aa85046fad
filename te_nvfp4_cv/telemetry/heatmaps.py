"""Draw pictures of one run's telemetry, layers over sampled steps, each as PNG, as interactive HTML and as JSON.

    OUT/heatmaps/MODEL-RUN/weights/{prequantize,quantized,dequantized}/{mean,std,kurtosis}.{png,html,json}
    OUT/heatmaps/MODEL-RUN/gradients/{mean,std,kurtosis}.*       the weight gradient
    OUT/heatmaps/MODEL-RUN/weights/quantized/usage.*             share of each code, at the last sampled step in NVFP4
    OUT/heatmaps/MODEL-RUN/weights/{correlation,sqnr}.*          curves: raw against dequantized
    OUT/heatmaps/plotly-VERSION.min.js                           what the HTML files load, instead of the network

    prequantize, quantized (-6 .. 6), dequantized = tensors.weight raw, codes, dequantized of records.py

The JSON holds {"title", "model", "run", "unit", "layers", "steps", "values": one list per layer, null where absent}.
That of usage has "codes" too, and its values are their shares. Layers without any value are left out of a picture, not
of its JSON; a picture without any value is not drawn. A run never overwrites another: the second run of a name is drawn
into MODEL-RUN_2.
"""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from te_nvfp4_cv import formats
from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.files import write_atomically
from te_nvfp4_cv.telemetry import drawing
from te_nvfp4_cv.telemetry.drawing import Panel
from te_nvfp4_cv.telemetry.records import Run, cannot_write, dumps, numbered, read
from te_nvfp4_cv.telemetry.templates import fill

PLOTLY_MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")  # = MARKERS
STATISTICS = {"mean": "mean", "std": "standard deviation", "kurtosis": "excess kurtosis"}
# What drawing.limits is told about each: only means and kurtosis have a sign. The ends of kurtosis are kept in a range:
# else the noise of Gaussian layers (0.1) would look like heavy tails (10), or one layer (1000) hide all others.
SCALES: dict[str, dict[str, Any]] = {
    "mean": {"diverging": True},
    "std": {"diverging": False},
    "kurtosis": {"diverging": True, "within": (2.0, 20.0)},
    "usage": {"diverging": False},
}
CODE_VALUES = formats.decode_e2m1(torch.arange(16, dtype=torch.uint8)).tolist()
CODES = [*range(15, 7, -1), *range(8)]  # ordered by value: -6 to -0, 0 to 6
CODE_NAMES = [f"{CODE_VALUES[code]:g}" for code in CODES]


@dataclass(frozen=True)
class Kind:
    """A family of heatmaps: where its numbers are and what they are called."""

    folder: str
    tensor: str
    stage: str
    title: str
    unit: str

    def label(self, statistic: str) -> str:
        """Return the label of the colour bar."""
        unit = "0: Gaussian" if statistic == "kurtosis" else self.unit
        return f"{STATISTICS[statistic]} ({unit})"


KINDS = (
    Kind("weights/prequantize", "weight", "raw", "Weights before quantization", "units of the weight"),
    Kind("weights/quantized", "weight", "codes", "Quantized weights (codes)", "code values, -6 to 6"),
    Kind("weights/dequantized", "weight", "dequantized", "Dequantized weights", "units of the weight"),
    Kind("gradients", "weight_gradient", "raw", "Weight gradients", "units of the gradient"),
)
CURVES = {  # name: (title, label, keys)
    "correlation": ("Weights: correlation of raw and dequantized", "correlation (1: equal)", ("weight", "correlation")),
    "sqnr": ("Weights: signal to quantization noise", "SQNR (dB)", ("weight", "sqnr_db")),
}


def as_run(run_or_path: Run | str | os.PathLike[str]) -> Run:
    """Return a run as it is, or read the file that holds it."""
    return run_or_path if isinstance(run_or_path, Run) else read(run_or_path)


def table(run: Run, layers: Sequence[str], *keys: str) -> np.ndarray:
    """Return one number of every layer (rows) at every sampled step (columns), NaN if it is absent."""
    # None marks absence in JSON, NaN in arrays: matplotlib and numpy's nan-functions leave NaN out.
    values = [[np.nan if value is None else value for value in run.series(layer, *keys)] for layer in layers]
    return np.array(values, float).reshape(len(layers), len(run.steps))  # a run without layers has 0 rows, not 0 axes


def usage(run: Run, layers: Sequence[str]) -> tuple[int | None, np.ndarray]:
    """Return the last sampled step with codes, and each weight's shares of the 16 codes, ordered by the codes' values.

    A layer without codes has NaN; the step is None if no layer ever had codes.
    """
    shares = np.full((len(layers), 16), np.nan)
    # Backward from the end: the last steps of a run may be in high precision, without codes.
    for step, held in reversed(run.steps.items()):
        for row, layer in enumerate(layers):
            codes = held.get(layer, {}).get("tensors", {}).get("weight", {}).get("codes", {})
            counts = np.array([np.nan if count is None else count for count in codes.get("usage", [])], float)
            if len(counts) == 16 and counts.sum() > 0:  # the counts come from a file, and may be damaged
                shares[row] = counts[CODES] / counts.sum()
        if np.isfinite(shares).any():
            return step, shares
    return None, shares


def render(
    run_or_path: Run | str | os.PathLike[str], out: str | os.PathLike[str] = "plots", force: bool = False
) -> list[Path]:
    """Draw pictures of one run: heatmaps of weights and gradients, and curves of the quantization error.

    Args:
        run_or_path: a telemetry file, or what telemetry.read returned for one.
        out: the folder for pictures, which is made if needed; they go into its heatmaps/MODEL-RUN.
        force: replace pictures that are there, as for a run that goes on; otherwise they go into MODEL-RUN_2.
    Returns:
        The files that were written, without plotly's script.
    Raises:
        ValueError: a file that is no telemetry file, a run without sampled steps or without weights, or a folder that
            cannot be written.
        RuntimeError: matplotlib or plotly is not installed.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> files = nv.telemetry.render_heatmaps("runs/telemetry.jsonl", "plots")  # doctest: +SKIP
    """
    # First, so that a missing package leaves no empty folders.
    drawing.need("matplotlib", "plotly", "jinja2")
    run = as_run(run_or_path)
    if not run.steps:
        raise value_error(
            f"telemetry: {run.path} has no sampled step.", got=f"{len(run.scalars)} steps with scalars only",
            needs="at least one sampled step", fix="train with every > 0 (--telemetry-every)",
        )
    try:
        folder = _folder(Path(out) / "heatmaps", f"{run.model}-{run.name}", force)
        pictures = _Pictures(run, folder, _plotly(folder.parent))
        for kind in KINDS:
            for statistic in STATISTICS:
                pictures.heatmap(kind, statistic)
        pictures.usage()
        for name in CURVES:
            pictures.curve(name)
    except OSError as error:
        raise cannot_write(out, error) from error
    if not pictures.written:
        with contextlib.suppress(OSError):  # with `force` it may hold pictures
            folder.rmdir()
        raise value_error(
            f"telemetry: {run.path} has nothing to draw.", got=f"{len(run.steps)} sampled steps without weights",
            needs="a model with convolutions or linear layers", fix="attach telemetry to the model that trains",
        )
    return pictures.written


def _folder(parent: Path, name: str, force: bool) -> Path:
    """Make a new folder of that name, or of name_2, name_3, ... if it is there already and `force` is not given."""
    # Names come from the user and go into a path: no separators, no leading dots, no endless length.
    clean = re.sub(r"[^\w.+=-]+", "_", name, flags=re.ASCII).strip("._ ")[:100] or "run"
    parent.mkdir(parents=True, exist_ok=True)
    names = numbered(clean)
    while True:
        found = parent / next(names)
        with contextlib.suppress(FileExistsError):
            # Makes and checks in one step, so that two runs which draw at once never share a folder.
            found.mkdir(exist_ok=force)
            return found


def _plotly(folder: Path) -> Path:
    """Return plotly's script in that folder; it is written once."""
    from plotly.offline import get_plotlyjs, get_plotlyjs_version

    # With the version in its name: pictures of an older plotly keep the script that they were made for.
    script = folder / f"plotly-{get_plotlyjs_version()}.min.js"
    if not script.is_file():
        write_atomically(script, get_plotlyjs().encode())
    return script


class _Pictures:
    """Write the files of one run."""

    def __init__(self, run: Run, folder: Path, script: Path) -> None:
        self.run, self.folder, self.script = run, folder, script
        self.steps = list(run.steps)
        self.written: list[Path] = []

    def heatmap(self, kind: Kind, statistic: str) -> None:
        values = table(self.run, self.run.layers, "tensors", kind.tensor, kind.stage, statistic)
        title = f"{kind.title}: {STATISTICS[statistic]}"
        axes: dict[str, list[Any]] = {"steps": self.steps}
        self._map(f"{kind.folder}/{statistic}", title, values, kind.label(statistic), SCALES[statistic], axes)

    def usage(self) -> None:
        step, shares = usage(self.run, self.run.layers)
        title = "Quantized weights: use of the 16 codes" + ("" if step is None else f" at step {step}")
        axes: dict[str, list[Any]] = {"steps": [] if step is None else [step], "codes": CODE_NAMES}
        self._map("weights/quantized/usage", title, 100 * shares, "share (%)", SCALES["usage"], axes)

    def _map(
        self, name: str, title: str, values: np.ndarray, label: str, scale: dict[str, Any], axes: dict[str, list[Any]]
    ) -> None:
        """Draw a heatmap over the codes, or else over the steps; `axes` holds what the JSON says of both."""
        if not np.isfinite(values).any():  # a run in high precision has no codes: a picture of nothing helps nobody
            return
        columns, xlabel = (axes["codes"], "code, by its value") if "codes" in axes else (axes["steps"], "step")
        bounds = drawing.limits([values], **scale)
        some = np.isfinite(values).any(axis=1)
        rows, shown = [row for row, known in zip(self.run.layers, some, strict=True) if known], values[some]
        text = f"{title}\n{self._subtitle(len(rows))}"
        picture = drawing.heatmap(Panel(text, columns, shown), rows, bounds, label, xlabel)
        page = plotly_heatmap(rows, columns, shown, bounds, xlabel)
        self._write(name, picture, page, f"{text}\nColours: {label}{bounds.note}", label, values, axes)

    def curve(self, name: str) -> None:
        title, label, keys = CURVES[name]
        layers = self.run.layers
        values = table(self.run, layers, "tensors", *keys)
        if not np.isfinite(values).any():
            return
        text = f"{title}\n{self._subtitle(int(np.isfinite(values).any(axis=1).sum()))}"
        picture = drawing.curves(Panel(text, self.steps, values), layers, label)
        page = plotly_curves(layers, self.steps, values, label)
        self._write(f"weights/{name}", picture, page, text, label, values, {"steps": self.steps})

    def _subtitle(self, shown: int) -> str:
        run = self.run
        group = f" ({run.group})" if run.group else ""
        absent = len(run.layers) - shown
        less = f", {absent} without values left out" if absent else ""
        return f"{run.model}, run {run.name}{group}, {shown} layers{less}"

    def _write(
        self, name: str, picture: Any, page: Any, text: str, unit: str, values: np.ndarray, axes: dict[str, list[Any]]
    ) -> None:
        """Write a matplotlib figure as PNG, a plotly figure as HTML, and the values as JSON."""
        run, path = self.run, self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.written += [path.with_suffix(suffix) for suffix in (".png", ".html", ".json")]
        drawing.image(picture).save(path.with_suffix(".png"))
        # Relative, so that the folder of pictures can be moved or copied as a whole.
        script = Path(os.path.relpath(self.script, path.parent)).as_posix()
        config = {"responsive": True, "displaylogo": False}
        drawn = page.to_html(include_plotlyjs=script, config=config, full_html=False, default_height=page.layout.height)
        title, *lines = text.split("\n")
        made = fill("picture.html", title=title, lines=lines, drawn=drawn)
        path.with_suffix(".html").write_text(made, encoding="utf-8")
        content: dict[str, Any] = {"title": text.partition("\n")[0], "model": run.model, "run": run.name, "unit": unit}
        content |= {"layers": run.layers, **axes, "values": values.tolist()}
        # Through dumps first, which writes null for NaN.
        held = json.dumps(json.loads(dumps(content)), indent=1)
        # JSON's indentation puts each number on a line; a layer's numbers belong on one. No text holds a line's end.
        held = re.sub(r"\[\n\s+((?:[-\w.+]+,?\s+)+)\]", lambda found: f"[{' '.join(found[1].split())}]", held)
        path.with_suffix(".json").write_text(held + "\n", encoding="utf-8")


# ---- plotly ---------------------------------------------------------------------------------------------------------


def plotly_heatmap(
    rows: Sequence[str], columns: Sequence[Any], values: np.ndarray, bounds: drawing.Limits, xlabel: str
) -> Any:
    """Draw an interactive heatmap; pointing at a cell shows layer, column and value."""
    import plotly.express as px

    low, high = bounds.low, bounds.high
    # Above the map, not beside it: beside it a phone has no room. The page names what it shows, because plotly would
    # write the title of such a bar into the bar.
    bar: dict[str, Any] = {"orientation": "h", "thickness": 12, "len": 1.0, "x": 0, "xanchor": "left", "xpad": 0}
    bar |= {"yref": "container", "y": 1, "yanchor": "top", "ypad": 34}
    drawn = values
    # plotly's colour scale is linear, so the values are transformed, and the ticks named by what they stand for.
    if bounds.log:
        low, high = float(np.log10(low)), float(np.log10(high))
        with np.errstate(divide="ignore", invalid="ignore"):
            # Zeros go below the scale, as in the PNG, and absent values stay absent.
            drawn = np.where(values > 0, np.log10(values), np.where(np.isnan(values), np.nan, low - 1))
        exponents = range(int(np.ceil(low)), int(np.floor(high)) + 1)
        bar |= {"tickvals": list(exponents), "ticktext": [f"1e{exponent}" for exponent in exponents]}
    if bounds.linear:
        low, high = float(np.arcsinh(low / bounds.linear)), float(np.arcsinh(high / bounds.linear))
        drawn = np.arcsinh(values / bounds.linear)
        bar |= {"tickvals": [float(np.arcsinh(tick / bounds.linear)) for tick in bounds.ticks]}
        bar |= {"ticktext": [f"{tick:g}" for tick in bounds.ticks]}
    figure = px.imshow(
        drawn.astype(np.float32),  # more digits than a colour shows would only make the file larger
        x=[str(column) for column in columns], y=[html.escape(row) for row in rows],  # plotly reads tags in labels
        zmin=low, zmax=high, aspect="auto",
        color_continuous_scale=drawing.DIVERGING if bounds.diverging else drawing.SEQUENTIAL,
    )  # fmt: skip
    figure.update_traces(
        text=[["absent" if np.isnan(value) else f"{value:.5g}" for value in row] for row in values],
        hoverongaps=True, hovertemplate=f"layer %{{y}}<br>{xlabel.split(',')[0]} %{{x}}<br>%{{text}}<extra></extra>",
    )  # fmt: skip
    _layout(figure, xlabel, max(350, 15 * len(rows) + 210))
    figure.update_layout(margin={"t": 84}, coloraxis={"colorbar": bar})
    figure.update_yaxes(type="category", tickmode="linear", dtick=1, automargin=True)
    figure.update_yaxes(tickfont={"size": 10 if len(rows) > 30 else 12}, showgrid=False)
    figure.update_xaxes(type="category", nticks=24, showgrid=False)
    figure.update_layout(plot_bgcolor=drawing.ABSENT)
    return figure


def plotly_curves(rows: Sequence[str], steps: Sequence[int], values: np.ndarray, label: str) -> Any:
    """Draw interactive curves; the worst layers are in the legend, the others are grey and named when pointed at."""
    import plotly.graph_objects as go

    figure = go.Figure()
    worst = drawing.pick(values)
    named = dict(zip(worst, drawing.COLOURS, strict=False))  # there may be more colours than layers
    symbols = dict(zip(worst, PLOTLY_MARKERS, strict=False))
    present = [index for index in range(len(rows)) if np.isfinite(values[index]).any()]
    # Named curves last: they lie on top of the grey ones.
    for index in [*(index for index in present if index not in named), *named]:
        name = html.escape(rows[index])
        line = {"color": named.get(index, "#c2c2c2"), "width": 2 if index in named else 1}
        figure.add_scatter(
            x=list(steps), y=[None if np.isnan(value) else float(f"{value:.5g}") for value in values[index]],
            name=name, mode="lines+markers" if len(steps) <= 40 else "lines", line=line,
            marker={"size": 7 if index in named else 3, "symbol": symbols.get(index, "circle")},
            connectgaps=True, showlegend=index in named,
            hovertemplate=f"layer {name}<br>step %{{x}}<br>%{{y:.5g}}<extra></extra>",
        )
    _layout(figure, "step", 500)
    figure.update_yaxes(title={"text": label})
    figure.update_layout(plot_bgcolor="white", legend={"orientation": "h", "y": -0.18})
    figure.update_xaxes(gridcolor="#e5e5e5").update_yaxes(gridcolor="#e5e5e5")
    return figure


def _layout(figure: Any, xlabel: str, height: int) -> None:
    # The margin above is for plotly's toolbar, which would cover what is written there.
    figure.update_layout(height=height, margin={"t": 34, "b": 60, "r": 20, "l": 60}, template="none")
    figure.update_xaxes(title={"text": xlabel})
