"""Draw heatmaps of layers over columns, and curves of many layers, with matplotlib; no pyplot, no display.

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
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from te_nvfp4_cv.errors import need_package

DIVERGING, SEQUENTIAL, ABSENT = "RdBu_r", "viridis", "#b5b5b5"
# The colours of Okabe and Ito (2008), which the colour-blind tell apart, and a marker for each, for a print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
NAMED = 6  # how many of many curves are named
SPREAD = 20  # a linear scale would show most values in one colour beyond this
ROW, MIN_ROW, MAX_HEIGHT = 0.30, 0.13, 40.0  # inches
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
        return "" if self.extend == "neither" else "\narrows: values beyond the colours"


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
    """One run's part of a picture: a heatmap of rows and columns, or a curve for each row. NaN marks absent values."""

    heading: str
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


def heatmaps(
    title: str, rows: Sequence[str], panels: Sequence[Panel], bounds: Limits, label: str, xlabel: str = "step"
) -> Any:
    """Draw panels of the same rows side by side, with one colour bar.

    Args:
        title: the title; its first line is set in bold.
        rows: the names of the rows.
        panels: one for each run.
        bounds: the limits of the colours, common to all panels.
        label: the label of the colour bar.
        xlabel: the label of the columns.
    Returns:
        A matplotlib Figure.
    """
    import matplotlib
    from matplotlib.colors import AsinhNorm, LogNorm, Normalize
    from matplotlib.figure import Figure

    if not rows or not panels:
        return _empty(title)
    height, font, every = row_size(len(rows))
    high = max(height * len(rows), 1.4)  # a colour bar needs some height even beside a single row
    cap = 10.0 if len(panels) == 1 else 5.0
    wide = [_width(panel.columns, cap) for panel in panels]
    left = 0.3 + max(len(short(row)) for row in rows) * font * 0.62 / 72  # a letter is about 0.62 of the font's size
    gap = 0.3
    size = (left + sum(wide) + gap * len(panels) + 1.3, high + 1.6)
    figure = Figure(figsize=size)
    colours = matplotlib.colormaps[DIVERGING if bounds.diverging else SEQUENTIAL].with_extremes(bad=ABSENT)
    norm = (LogNorm if bounds.log else Normalize)(bounds.low, bounds.high)
    if bounds.linear:
        norm = AsinhNorm(bounds.linear, bounds.low, bounds.high)
    at, drawn = left, None
    for number, (panel, width) in enumerate(zip(panels, wide, strict=True)):
        axes = figure.add_axes((at / size[0], 0.6 / size[1], width / size[0], high / size[1]))
        at += width + gap
        # A logarithmic scale knows no 0: it is drawn as below the scale, and not in grey, which means absent.
        values = np.where(panel.values <= 0, bounds.low / 10, panel.values) if bounds.log else panel.values
        image = np.ma.masked_invalid(values)
        drawn = axes.imshow(image, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
        ticks = range(0, len(rows), every)
        names = [short(rows[index]) for index in ticks] if number == 0 else [""] * len(ticks)
        axes.set_yticks(ticks, names, fontsize=font, parse_math=False)  # a "$" in a name is no formula
        axes.tick_params(axis="y", length=2, pad=2)
        _column_ticks(axes, [str(column) for column in panel.columns], width)
        axes.set_xlabel(xlabel, fontsize=9)
        if panel.heading:
            axes.set_title(panel.heading, fontsize=9, loc="left", parse_math=False)
    bar_height = min(high, 4.0)
    bar = figure.add_axes(
        ((at - 0.05) / size[0], (0.6 + high - bar_height) / size[1], 0.16 / size[0], bar_height / size[1])
    )
    _bar(figure, drawn, bar, bounds, label)
    _title(figure, title, size, 0.6 + high + (0.35 if any(panel.heading for panel in panels) else 0.12))
    if any(np.isnan(panel.values).any() for panel in panels):
        bottom = 0.08 / size[1]
        figure.text(at / size[0], bottom, "grey: no value", fontsize=8, color="#555555", ha="right")
    return figure


def _bar(figure: Any, drawn: Any, axes: Any, bounds: Limits, label: str) -> None:
    bar = figure.colorbar(drawn, cax=axes, extend=bounds.extend, extendfrac=0.04)
    bar.set_label(label + bounds.note, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    if bounds.linear:
        bar.set_ticks(bounds.ticks, labels=[f"{tick:g}" for tick in bounds.ticks])
        bar.minorticks_off()
    elif not bounds.log:
        bar.formatter.set_powerlimits((-3, 4))
        bar.ax.yaxis.get_offset_text().set(fontsize=8, ha="left")


def _name_width(columns: Sequence[Any]) -> float:
    """Estimate how many inches the longest column name takes, with a gap."""
    return max(len(str(column)) for column in columns) * 0.072 + 0.12


def _width(columns: Sequence[Any], most: float) -> float:
    """Choose the width of a panel in inches; if there are few columns, each has room for its name."""
    each = max(0.32, _name_width(columns)) if len(columns) <= 16 else 0.32
    return float(np.clip(each * len(columns), 2.2, most))


def _column_ticks(axes: Any, names: list[str], width: float) -> None:
    """Show as many column names as fit beside each other."""
    every = int(np.ceil(len(names) * _name_width(names) / width - 1e-9))
    ticks = range(0, len(names), max(1, every))
    axes.set_xticks(ticks, [names[index] for index in ticks], fontsize=8)


def _title(figure: Any, title: str, size: tuple[float, float], bottom: float) -> None:
    """Write the title's lines above `bottom` inches, left-aligned, wrapped to the figure's width."""
    lines: list[tuple[str, bool]] = []
    for index, text in enumerate(title.split("\n")):
        lines += [(line, index == 0) for line in textwrap.wrap(text, max(30, int(size[0] / 0.085)))]
    for line, bold in reversed(lines):
        weight, height = ("bold", 11) if bold else ("normal", 9)
        figure.text(0.01, bottom / size[1], line, fontsize=height, weight=weight, va="bottom", parse_math=False)
        bottom += 0.22 if bold else 0.18


def _empty(title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 1.4))
    figure.text(0.02, 0.2, "no values", fontsize=10, color="#555555")
    _title(figure, title, (5.0, 1.4), 0.7)
    return figure


def curves(
    title: str,
    rows: Sequence[str],
    panels: Sequence[Panel],
    label: str,
    log: bool = False,
    line: tuple[float, str] | None = None,
    highest: bool = False,
) -> Any:
    """Draw a curve for each row and panel, with the panels side by side on one axis of values.

    Args:
        title: the title; its first line is set in bold.
        rows: the names of the rows.
        panels: one for each run.
        label: the label of the values.
        log: draw the values on a logarithmic axis.
        line: the value and the name of a horizontal line.
        highest: name the layers with the highest mean, not those with the lowest.
    Returns:
        A matplotlib Figure.
    """
    from matplotlib.figure import Figure

    panels = [panel for panel in panels if np.isfinite(panel.values).any()]
    if not panels:
        return _empty(title)
    order = "highest" if highest else "lowest"
    width, high, left = (8.0 if len(panels) == 1 else 5.2), 3.4, 0.8
    size = (left + (width + 0.5) * len(panels), high + 3.0)
    figure = Figure(figsize=size)
    first: Any = None
    for number, panel in enumerate(panels):
        place = ((left + number * (width + 0.5)) / size[0], 2.2 / size[1], width / size[0], high / size[1])
        axes = figure.add_axes(place, sharey=first)
        first = first or axes  # the axes of all panels show the same range of values
        named = dict(zip(pick(panel.values, highest), zip(COLOURS, MARKERS, strict=True), strict=False))
        handles = {}
        for index in sorted(range(len(rows)), key=lambda row: row in named):  # named curves last: they lie on top
            there = np.isfinite(panel.values[index])
            if not there.any():
                continue
            x, y = np.asarray(panel.columns)[there], panel.values[index][there]
            if index in named:
                colour, marker = named[index]
                (handles[index],) = axes.plot(x, y, color=colour, lw=1.3, zorder=3, **_marked(len(x), marker, 4.5))
            else:
                axes.plot(x, y, color="#9a9a9a", lw=0.6, alpha=0.7, **_marked(len(x), "o", 1.5))
        if line is not None:
            handles[-1] = axes.axhline(line[0], color="black", lw=1, ls="--")
        if log:
            _log_axis(axes)
        _style(axes, "" if number else label)
        if len(panel.columns) == 1:  # around a single point matplotlib would make up fractions of steps
            axes.set_xticks(panel.columns)
        shown = [row for row in (*named, -1) if row in handles]
        others = int(np.isfinite(panel.values).any(axis=1).sum()) - len(named)
        heading = f"the {len(named)} {order} on average, {order} first; grey: {others} others" if others else ""
        texts = [line[1] if row == -1 and line else short(rows[row]) for row in shown]
        _legend(axes, [handles[row] for row in shown], texts, heading)
        if panel.heading:
            axes.set_title(panel.heading, fontsize=9, loc="left", parse_math=False)
    _title(figure, title, size, 2.2 + high + (0.35 if any(panel.heading for panel in panels) else 0.12))
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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6))
    axes = figure.add_axes((0.14, 0.3, 0.84, 0.6))
    handles = []
    for number, (steps, values) in enumerate(series.values()):
        which, dashes = number % len(COLOURS), ("-", "--", ":")[number // len(COLOURS) % 3]
        width = 1.2 + 1.4 * (len(series) - 1 - number) / max(1, len(series) - 1)  # of equal curves none hides another
        style: dict[str, Any] = {"color": COLOURS[which], "ls": dashes, "lw": width}
        handles += axes.plot(steps, values, **style, **_marked(len(steps), MARKERS[which], 2.4 + width))
    _style(axes, "")
    axes.set_title(title, fontsize=10, loc="left", weight="bold", parse_math=False)
    _legend(axes, handles, [short(run) for run in series])
    return figure


def _style(axes: Any, label: str) -> None:
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e5e5e5", lw=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.get_major_locator().set_params(integer=True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _marked(points: int, marker: str, size: float) -> dict[str, Any]:
    """Return the markers of a curve, as matplotlib's plot takes them; of many points only some have one."""
    return {"marker": marker, "ms": size, "markevery": max(1, points // 20)}


def _legend(axes: Any, handles: list[Any], texts: list[str], heading: str = "") -> None:
    """Write names below the axes, one a line."""
    if not handles:
        return
    below = 0.46 / (axes.get_position().height * axes.figure.get_figheight())  # under the name of the axis
    # The space in front keeps names with a leading underscore: matplotlib leaves those out of a legend.
    box = axes.legend(
        handles, [f" {text}" for text in texts], title=heading or None, fontsize=8, title_fontsize=8, frameon=False,
        loc="upper left", bbox_to_anchor=(-0.02, -below), borderaxespad=0.0, alignment="left",
    )  # fmt: skip
    for text in box.get_texts():
        text.set_parse_math(False)


def pick(values: np.ndarray, highest: bool = False) -> list[int]:
    """Return the rows to name: those with the lowest (or highest) mean, in this order, or all if they are few."""
    # If the colours suffice for all, every curve is named; if not, naming a few leaves the grey ones readable.
    found = [(float(np.nanmean(row)), index) for index, row in enumerate(values) if np.isfinite(row).any()]
    most = len(COLOURS) if len(found) <= len(COLOURS) else NAMED
    return [index for _, index in sorted(found, reverse=highest)[:most]]


def save(figure: Any, target: Path | BinaryIO, dpi: int = 110) -> None:
    """Write a figure as PNG, cut to what is drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_figure(
        target, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.12, facecolor="white"
    )
