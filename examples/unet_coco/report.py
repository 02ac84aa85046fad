"""Write the results of a comparison: summary.json, table.md, table.csv, curves.png, predictions.png, history.json.

    summary.json   {precision: {train_loss, val_loss, SCORES, MAIN_hp, step_ms, saved_bytes, nvfp4_flops_share
                    [, test_SCORES]}}
    history.json   {precision: {"curve": [{step, loss, lr}], "epochs": [{epoch, step, train_loss, val_loss, SCORES}]}}

SCORES and MAIN depend on the task: for semantic segmentation SCORES are dice and miou, MAIN is miou. Every file is
replaced completely or not at all. Without matplotlib there are no curves, and a message says so.
"""

from __future__ import annotations

import colorsys
import functools
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from te_nvfp4_cv.files import write_atomically

from .tracking import Rows, tell_once

History = Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]
BEFORE = (("train_loss", "train loss", "{:.4f}", 1.0), ("val_loss", "val loss", "{:.4f}", 1.0))
AFTER = (
    ("step_ms", "step, ms", "{:.0f}", 1.0),
    ("saved_bytes", "saved for backward, MB", "{:.1f}", 1e-6),
    ("nvfp4_flops_share", "FLOPs in NVFP4, %", "{:.1f}", 100.0),
)


def _columns(rows: Rows, titles: Mapping[str, str]) -> list[tuple[str, str, str, float]]:
    """Return (key, title, format, factor) of every column that a row has, with the task's scores in the middle."""
    fixed = {key for key, *_ in (*BEFORE, *AFTER)}
    scores = dict.fromkeys(key for row in rows.values() for key in row if key not in fixed)
    between = [(key, _title(key, titles), "{:.3f}", 1.0) for key in scores]
    return [column for column in (*BEFORE, *between, *AFTER) if any(column[0] in row for row in rows.values())]


def _title(key: str, titles: Mapping[str, str]) -> str:
    if key.endswith("_hp"):
        return f"{_title(key.removesuffix('_hp'), titles)}, weights in fp32"
    if key.startswith("test_"):
        return f"test {_title(key.removeprefix('test_'), titles)}"
    return titles.get(key, key)


def write_summary(folder: Path, rows: Rows, titles: Mapping[str, str]) -> None:
    """Write summary.json, table.md and table.csv; `titles` are the names of the task's scores."""
    write_atomically(folder / "summary.json", (json.dumps(rows, indent=2) + "\n").encode())
    write_atomically(folder / "table.md", (markdown_table(rows, titles) + "\n").encode())
    keys = [key for key, *_ in _columns(rows, titles)]
    lines = [",".join(["precision", *keys])]
    lines += [",".join([name, *(str(row.get(key, "")) for key in keys)]) for name, row in rows.items()]
    write_atomically(folder / "table.csv", ("\n".join(lines) + "\n").encode())


def markdown_table(rows: Rows, titles: Mapping[str, str] = MappingProxyType({})) -> str:
    """Format the final table, with one line per precision."""
    shown = _columns(rows, titles)
    cells = [["precision", *(title for _, title, _, _ in shown)]]
    for name, row in rows.items():
        cells.append([name, *(form.format(row[key] * factor) if key in row else "" for key, _, form, factor in shown)])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "| "
        + " | ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in cells
    ]
    rule = "|" + "|".join(("-" * (w + 1) + ":") if i else "-" * (w + 2) for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def write_history(folder: Path, history: History, main: str, title: str) -> None:
    """Write history.json and, with matplotlib, curves.png with the losses and the main score by step."""
    write_atomically(folder / "history.json", (json.dumps(history, indent=1) + "\n").encode())
    try:
        import matplotlib
    except ImportError:
        tell_once(
            "matplotlib is not installed: no curves.png (pip install matplotlib); the figures are in history.json"
        )
        return
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = (
        ("training loss", "curve", "loss"),
        ("validation loss", "epochs", "val_loss"),
        (f"validation {title}", "epochs", main),
    )
    for axes, (title, kind, key) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, tracks in history.items():
            track = tracks[kind]
            axes.plot(
                [row["step"] for row in track],
                [row[key] for row in track],
                label=name,
                marker="." if len(track) < 40 else None,
            )
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if history:
            axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(folder / "curves.png", buffer.getvalue())


def palette(count: int) -> np.ndarray:
    """Return colours [256, 3] uint8: class 0 dark, other classes spread over the hues, numbers beyond them white."""
    colours = np.full((256, 3), 255, np.uint8)
    colours[0] = (40, 40, 40)
    for i in range(1, count):
        rgb = colorsys.hsv_to_rgb((i * 0.381966) % 1.0, 0.75 if i % 2 else 0.5, 0.95)
        colours[i] = [round(255 * v) for v in rgb]
    return colours


def hatching(height: int, width: int) -> np.ndarray:
    """Return diagonal stripes [H, W, 3] uint8 in white and grey, which no class has: they mark ignored pixels."""
    stripes = (np.arange(height)[:, None] + np.arange(width)) % 6 < 3
    return np.where(stripes[..., None], 255, 150).astype(np.uint8).repeat(3, 2)


def enlargement(height: int) -> int:
    """Return how many times larger than the model's images the sheet shows them."""
    return max(1, round(160 / height))


def font(text: str = "") -> Any:
    """Return the font of a text in pictures: Pillow's own, which has few letters beyond ASCII, or matplotlib's."""
    return _font(text.isascii())


@functools.cache
def _font(plain: bool) -> Any:
    if not plain:
        try:
            import matplotlib

            return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 12)
        except (ImportError, OSError):  # an incomplete matplotlib, or a Pillow without FreeType
            pass
    return ImageFont.load_default(12)


def write_pictures(
    path: Path, columns: Mapping[str, Sequence[np.ndarray]], classes: Sequence[str], ignored: bool = False
) -> None:
    """Write a sheet with one row per image, from columns of pictures [H, W, 3] uint8.

    Below them a legend shows the colours of the classes.

    Args:
        columns: The pictures by the titles of their columns; those of the first have the size of the model's images.
        ignored: Whether the legend shows what the hatching means.
    """
    photos = next(iter(columns.values()))
    factor = enlargement(photos[0].shape[0])
    count, h, w = len(photos), photos[0].shape[0] * factor, photos[0].shape[1] * factor
    wide, below = len(columns) * (w + 6) + 6, 20 + count * (h + 6)
    names = [*classes, *(["ignored"] if ignored else [])]
    places, bottom = _places(names, wide)
    sheet = Image.new("RGB", (wide, below + bottom), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    colours = palette(len(classes))
    for number, (name, (x, y)) in enumerate(zip(names, places, strict=True)):
        square = hatching(12, 12) if number == len(classes) else np.broadcast_to(colours[number], (12, 12, 3))
        sheet.paste(Image.fromarray(np.ascontiguousarray(square)), (x, below + y))
        pen.text((x + 17, below + y + 6), name, (0, 0, 0), font(name), "lm")
    for i, (title, tiles) in enumerate(columns.items()):
        x = 6 + i * (w + 6)
        pen.text((x, 10), title, (0, 0, 0), font(title), "lm")
        for j, tile in enumerate(tiles):
            sheet.paste(Image.fromarray(tile).resize((w, h), Image.Resampling.NEAREST), (x, 20 + j * (h + 6)))
    buffer = io.BytesIO()
    sheet.save(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _places(names: Sequence[str], wide: int) -> tuple[list[tuple[int, int]], int]:
    """Return where each entry of the legend begins, line after line, and the height of the legend."""
    places, x, y = [], 6, 4
    for name in names:
        length = 30 + round(font(name).getlength(name))
        if x > 6 and x + length > wide:
            x, y = 6, y + 18
        places.append((x, y))
        x += length
    return places, y + 18
