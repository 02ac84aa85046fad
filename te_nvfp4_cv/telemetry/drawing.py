"""Draw a heatmap of layers over columns, or curves of many layers, with matplotlib; no pyplot, no display.

    limits      2nd to 98th percentile of the values, or their whole range if that is scarcely wider
    diverging   symmetric about 0; asinh(v / linear) if the limits are beyond SPREAD times the median of |v|
    sequential  logarithmic if the limits are more than 2 decades apart
    absent      NaN is grey, a colour that no scale contains
    sizes       figures grow with their rows; labels shrink to MIN_FONT, below which only every k-th row is named
    curves      the few worst layers are drawn in colour, with a marker each, and named; all other layers are thin, grey
    kurtosis    0 is the Gaussian; the colours end between 2 and 20 on both sides, so that noise about 0 stays pale

matplotlib is imported when something is drawn; without it a RuntimeError says how to get it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from te_nvfp4_cv.errors import need_package

DIVERGING, SEQUENTIAL, ABSENT = "RdBu_r", "viridis", "#b5b5b5"
# The colours of Okabe and Ito (2008), which the colour-blind tell apart, and a marker for each, for a print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
NAMED = 6  # how many of many curves are named
SPREAD = 20  # a linear scale would show most values in one colour beyond this
ROW, MIN_ROW, MAX_HEIGHT = 0.24, 0.13, 40.0  # inches
MAX_FONT, MIN_FONT = 9.0, 7.5
MAX_NAME = 56  # characters of a layer's name in a picture


def need(*packages: str) -> None:
    """Check that the packages which draw are installed.

    Raises:
        RuntimeError: one of them is not.
    """
    fix = f"pip install {' '.join(packages)}, or pip install te_nvfp4_cv[telemetry]"
    for package in packages:
        need_package(package, f"telemetry: {package} is not installed.", needs=" and ".join(packages), fix=fix)


@dataclass(frozen=True)
class Limits:
    """The values at which a colour scale begins and ends.

    Attributes:
        low: the value of the first colour.
        high: the value of the last colour.
        diverging: whether the scale is symmetric about 0.
        log: whether the scale is logarithmic.
        linear: up to which value an asinh scale is about linear; 0 for other scales.
        extend: the side on which values lie beyond, as matplotlib names it.
    """

    low: float
    high: float
    diverging: bool
    log: bool = False
    linear: float = 0.0
    extend: str = "neither"

    @property
    def ticks(self) -> list[float]:
        """Return the ticks of an asinh scale: 0, and powers of 10 on both sides."""
        last = int(np.floor(np.log10(self.high)))
        first = max(int(np.ceil(np.log10(self.linear))), last - 3)
        powers = [10.0**power for power in range(min(first, last), last + 1)]
        return [*(-power for power in reversed(powers)), 0.0, *powers]

    @property
    def note(self) -> str:
        """Return what the label of the colour bar adds about values beyond."""
        return "" if self.extend == "neither" else "; arrows: values beyond the colours"


def limits(values: Sequence[np.ndarray], diverging: bool, within: tuple[float, float] | None = None) -> Limits:
    """Find common limits of several arrays; NaN does not count.

    Args:
        values: the arrays.
        diverging: whether the scale is symmetric about 0.
        within: of a diverging scale, the least and the largest end; its colours are then linear in the values.
    """
    found = np.concatenate([np.asarray(v, float).ravel() for v in values]) if len(values) else np.zeros(0)
    found = found[np.isfinite(found)]
    if diverging:
        most = np.abs(found).max(initial=0.0)
        ends = np.abs(np.percentile(found, (2, 98))) if len(found) else np.zeros(2)
        # Cutting at the percentiles would hide values for nothing if the whole range is scarcely wider.
        high = float(most if most <= 1.25 * ends.max() or not ends.max() else ends.max()) or 1.0
        if within is not None:
            high = float(np.clip(high, *within))
            return Limits(-high, high, True, extend=_extend(found, -high, high))
        median = float(np.median(np.abs(found[found != 0]))) if most else high
        return Limits(-high, high, True, False, median if high > SPREAD * median else 0.0, _extend(found, -high, high))
    positive = found[found > 0]  # zeros have no logarithm; they are drawn as below the scale
    log = len(positive) > 0 and np.divide(*np.percentile(positive, (98, 2))) > 100
    low, high = _ends(np.log10(positive) if log else found)
    if log:
        low, high = 10.0**low, 10.0**high
    return Limits(low, high, False, bool(log), extend=_extend(found, low, high))


def _ends(values: np.ndarray) -> tuple[float, float]:
    """Return both ends of a sequential scale; of equal values, a range around them."""
    if not len(values):
        return 0.0, 1.0
    low, high = (float(end) for end in np.percentile(values, (2, 98)))
    least, most = float(values.min()), float(values.max())
    if most - least <= 1.25 * (high - low) or high == low:
        low, high = least, most
    if low == high:
        low, high = low - (0.5 * abs(low) or 0.5), high + (0.5 * abs(high) or 0.5)
    return low, high


def _extend(values: np.ndarray, low: float, high: float) -> str:
    slack = 1e-9 * (high - low)  # 10 ** log10(v) is not quite v
    below, above = bool((values < low - slack).any()), bool((values > high + slack).any())
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]


@dataclass(frozen=True)
class Panel:
    """What a picture shows of one run: a row of cells, or a curve, for each layer. NaN marks absent values."""

    title: str  # the first line is set in bold
    columns: Sequence[Any]
    values: np.ndarray


def short(name: str, most: int = MAX_NAME) -> str:
    """Shorten a name to at most `most` characters, mostly in its middle: the end tells layers apart."""
    keep = most // 3
    return name if len(name) <= most else f"{name[:keep]}…{name[len(name) - (most - keep - 1) :]}"


def row_size(rows: int) -> tuple[float, float, int]:
    """Choose the height of a row in inches, the font's size, and from how many rows to name one."""
    height = min(max(MIN_ROW, min(ROW, 9.0 / max(1, rows))), MAX_HEIGHT / max(1, rows))
    every = int(np.ceil(MIN_ROW / height - 1e-9))
    return height, float(np.clip(every * height * 72 * 0.8, MIN_FONT, MAX_FONT)), every


def heatmap(
    panel: Panel, rows: Sequence[str], bounds: Limits, label: str, xlabel: str = "step", wide: float | None = None
) -> Any:
    """Draw a heatmap below its colour bar.

    Args:
        panel: the title, the names of the columns, and the values [rows, columns].
        rows: the names of the rows.
        bounds: the limits of the colours.
        label: the label of the colour bar.
        xlabel: the label of the columns.
        wide: the picture's width in inches; if None, each column gets room for its name as far as that is possible.
    Returns:
        A matplotlib Figure.
    """
    import matplotlib
    from matplotlib.colors import AsinhNorm, LogNorm, Normalize

    height, font, every = row_size(len(rows))
    names = [short(row) for row in rows]
    columns = [str(column) for column in panel.columns]
    # A letter is about 0.62 of its size wide, and a number's digit 0.072 inches at size 8.
    left, name = 0.3 + max(map(len, names)) * font * 0.62 / 72, max(map(len, columns)) * 0.072 + 0.12
    if wide is None:
        wide = left + float(np.clip((max(0.32, name) if len(columns) <= 16 else 0.32) * len(columns), 3.4, 10.0))
    high = height * len(rows) + 1.7
    figure, axes = _figure(panel.title, wide, high)
    colours = matplotlib.colormaps[DIVERGING if bounds.diverging else SEQUENTIAL].with_extremes(bad=ABSENT)
    norm = (LogNorm if bounds.log else Normalize)(bounds.low, bounds.high)
    if bounds.linear:
        norm = AsinhNorm(bounds.linear, bounds.low, bounds.high)
    # A logarithmic scale knows no 0: it is drawn as below the scale, and not in grey, which means absent.
    values = np.where(panel.values <= 0, bounds.low / 10, panel.values) if bounds.log else panel.values
    drawn = axes.imshow(
        np.ma.masked_invalid(values), cmap=colours, norm=norm, aspect="auto", interpolation="nearest"
    )
    axes.set_yticks(range(0, len(rows), every), names[::every], fontsize=font, parse_math=False)  # "$" is no formula
    axes.tick_params(axis="y", length=2, pad=2)
    apart = max(1, int(np.ceil(len(columns) * name / max(wide - left, 1.0) - 1e-9)))  # as many names as fit
    axes.set_xticks(range(0, len(columns), apart), columns[::apart], fontsize=8)
    axes.set_xlabel(xlabel + (" (grey: no value)" if np.isnan(panel.values).any() else ""), fontsize=9)
    bar = figure.colorbar(
        drawn, ax=axes, location="top", fraction=0.12 / high, pad=0.12 / high, aspect=wide / 0.12,
        extend=bounds.extend, extendfrac=0.03,
    )  # fmt: skip
    _style_bar(bar, bounds, label)
    return figure


def _figure(title: str, wide: float, high: float) -> tuple[Any, Any]:
    """Return a figure of that size in inches with one axes below its title, whose lines are wrapped to the width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide, high), layout="constrained")
    axes = figure.subplots()
    first, _, rest = title.partition("\n")
    first, rest = (textwrap.fill(text, max(30, int(wide / 0.085))) for text in (first, rest))
    if first:
        figure.suptitle(first, x=0.01, ha="left", fontsize=11, weight="bold", parse_math=False)
    if rest:
        axes.set_title(rest, loc="left", fontsize=9, parse_math=False)
    return figure, axes


def _style_bar(bar: Any, bounds: Limits, label: str) -> None:
    bar.set_label(label + bounds.note, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    if bounds.linear:
        bar.set_ticks(bounds.ticks, labels=[f"{tick:g}".replace("e-0", "e-") for tick in bounds.ticks])
        bar.minorticks_off()
    elif not bounds.log:
        bar.formatter.set_powerlimits((-3, 4))
        bar.ax.xaxis.get_offset_text().set(fontsize=8)


def curves(
    panel: Panel,
    rows: Sequence[str],
    label: str,
    log: bool = False,
    line: tuple[float, str] | None = None,
    highest: bool = False,
    ends: Sequence[float] = (),
) -> Any:
    """Draw a curve for each row.

    Args:
        panel: the title, the steps, and the values [rows, steps].
        rows: the names of the rows.
        label: the label of the values.
        log: draw the values on a logarithmic axis.
        line: the value and the name of a horizontal line.
        highest: name the layers with the highest mean, not those with the lowest.
        ends: values that the axis must show as well, so that pictures of several runs have the same axis.
    Returns:
        A matplotlib Figure.
    """
    figure, axes = _figure(panel.title, 5.6, 4.6)
    there = np.isfinite(panel.values)
    named = dict(zip(pick(panel.values, highest), zip(COLOURS, MARKERS, strict=True), strict=False))
    handles = {}
    for index in sorted(range(len(rows)), key=lambda row: row in named):  # named curves last: they lie on top
        if not there[index].any():
            continue
        x, y = np.asarray(panel.columns)[there[index]], panel.values[index][there[index]]
        if index in named:
            colour, marker = named[index]
            (handles[index],) = axes.plot(x, y, color=colour, lw=1.3, zorder=3, **_marked(len(x), marker, 4.5))
        else:
            axes.plot(x, y, color="#9a9a9a", lw=0.6, alpha=0.7, **_marked(len(x), "o", 1.5))
    if line is not None:
        handles[-1] = axes.axhline(line[0], color="black", lw=1, ls="--")
    for end in ends:
        axes.update_datalim([(panel.columns[0], end)])
    if log:
        _log_axis(axes)
    _style(axes, label, panel.columns)
    shown = [row for row in (*named, -1) if row in handles]
    others = int(there.any(axis=1).sum()) - len(named)
    order = "highest" if highest else "lowest"
    heading = f"the {len(named)} {order} on average, {order} first; grey: {others} others" if others else ""
    texts = [line[1] if row == -1 and line else short(rows[row]) for row in shown]
    _legend(figure, [handles[row] for row in shown], texts, heading)
    return figure


def _log_axis(axes: Any) -> None:
    """Make the axis of values logarithmic, with plain numbers: 1, 2 and 5 of each decade if there are few decades."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log", nonpositive="clip")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 3000 else (1.0,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def overlay(title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Any:
    """Draw one figure of several runs, {run: (steps, values)}, on one axis of steps; colours go by the runs' order."""
    figure, axes = _figure(title, 5.2, 3.6)
    handles = []
    for number, (steps, values) in enumerate(series.values()):
        which, dashes = number % len(COLOURS), ("-", "--", ":")[number // len(COLOURS) % 3]
        width = 1.2 + 1.4 * (len(series) - 1 - number) / max(1, len(series) - 1)  # of equal curves none hides another
        style: dict[str, Any] = {"color": COLOURS[which], "ls": dashes, "lw": width}
        handles += axes.plot(steps, values, **style, **_marked(len(steps), MARKERS[which], 2.4 + width))
    _style(axes, "", [step for steps, _ in series.values() for step in steps])
    _legend(figure, handles, [short(run) for run in series])
    return figure


def _style(axes: Any, label: str, steps: Sequence[Any]) -> None:
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e5e5e5", lw=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.get_major_locator().set_params(integer=True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(set(steps)) == 1:  # around a single point matplotlib would make up fractions of steps
        axes.set_xticks(steps[:1])


def _marked(points: int, marker: str, size: float) -> dict[str, Any]:
    """Return the markers of a curve, as matplotlib's plot takes them; of many points only some have one."""
    return {"marker": marker, "ms": size, "markevery": max(1, points // 20)}


def _legend(figure: Any, handles: list[Any], texts: list[str], heading: str = "") -> None:
    """Write names below the axes, in as many columns as fit."""
    if not handles:
        return
    # The space in front keeps names with a leading underscore: matplotlib leaves those out of a legend.
    box = figure.legend(
        handles, [f" {text}" for text in texts], title=heading or None, fontsize=8, title_fontsize=8, frameon=False,
        loc="outside lower left", alignment="left",
        ncols=max(1, int(figure.get_figwidth() / (0.6 + 0.075 * max(map(len, texts))))),
    )  # fmt: skip
    for text in box.get_texts():
        text.set_parse_math(False)


def pick(values: np.ndarray, highest: bool = False) -> list[int]:
    """Return the rows to name: those with the lowest (or highest) mean, in this order, or all if they are few."""
    # If the colours suffice for all, every curve is named; if not, naming a few leaves the grey ones readable.
    found = [(float(np.nanmean(row)), index) for index, row in enumerate(values) if np.isfinite(row).any()]
    most = len(COLOURS) if len(found) <= len(COLOURS) else NAMED
    return [index for _, index in sorted(found, reverse=highest)[:most]]


def image(figure: Any, dpi: int = 110) -> Any:
    """Return a figure as a picture of PIL, drawn once: matplotlib's savefig would lay it out and draw it twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
