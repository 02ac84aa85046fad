"""What a comparison leaves in DIR: summary.json, table.md, table.csv, curves.png, predictions.png and history.json.

    summary.json   {precision: {train_loss, val_loss, dice, miou, miou_hp, step_ms, saved_bytes, nvfp4_flops_share
                    [, test_dice, test_miou]}}
    history.json   {precision: {"curve": [{step, loss, lr}],
                    "epochs": [{epoch, step, train_loss, val_loss, dice, miou}]}}

Every file is replaced whole or not at all. Without matplotlib there are no curves, and a line says so.
"""

from __future__ import annotations

import colorsys
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .checkpoint import write_atomically
from .data import denormalize
from .losses import IGNORE
from .tracking import tell_once

Rows = Mapping[str, Mapping[str, float | int]]
COLUMNS = (
    ("train_loss", "train loss", "{:.4f}", 1.0),
    ("val_loss", "val loss", "{:.4f}", 1.0),
    ("dice", "Dice", "{:.3f}", 1.0),
    ("miou", "mIoU", "{:.3f}", 1.0),
    ("miou_hp", "mIoU, weights in fp32", "{:.3f}", 1.0),
    ("test_dice", "test Dice", "{:.3f}", 1.0),
    ("test_miou", "test mIoU", "{:.3f}", 1.0),
    ("step_ms", "step, ms", "{:.0f}", 1.0),
    ("saved_bytes", "kept for backward, MB", "{:.1f}", 1e-6),
    ("nvfp4_flops_share", "FLOPs in NVFP4, %", "{:.1f}", 100.0),
)


def write_summary(folder: Path, rows: Rows) -> None:
    """summary.json, table.md and table.csv."""
    write_atomically(folder / "summary.json", (json.dumps(rows, indent=2) + "\n").encode())
    write_atomically(folder / "table.md", (markdown_table(rows) + "\n").encode())
    keys = [key for key, *_ in COLUMNS if any(key in row for row in rows.values())]
    lines = [",".join(["precision", *keys])]
    lines += [",".join([name, *(str(row.get(key, "")) for key in keys)]) for name, row in rows.items()]
    write_atomically(folder / "table.csv", ("\n".join(lines) + "\n").encode())


def markdown_table(rows: Rows) -> str:
    """The final table: one line per precision."""
    shown = [column for column in COLUMNS if any(column[0] in row for row in rows.values())]
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


def write_history(folder: Path, history: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> None:
    """history.json and, with matplotlib, curves.png: training loss by step, validation loss and mIoU by step."""
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
        ("validation mIoU", "epochs", "miou"),
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
    """[256, 3] uint8: class 0 dark, the others spread over the hues, ignore white."""
    colours = np.full((256, 3), 255, np.uint8)
    colours[0] = (40, 40, 40)
    for i in range(1, count):
        rgb = colorsys.hsv_to_rgb((i * 0.381966) % 1.0, 0.75 if i % 2 else 0.5, 0.95)
        colours[i] = [round(255 * v) for v in rgb]
    return colours


def write_pictures(
    path: Path, images: Tensor, masks: Tensor, predictions: Mapping[str, Tensor], num_classes: int
) -> None:
    """A sheet: one row per image; the columns are image, truth and each precision's prediction; ignored pixels white.

    Args:
        images: [B, 3, H, W], normalised.
        masks: [B, H, W] class ids and the ignore index.
        predictions: per precision [B, H, W] class ids.
    """
    colours = palette(num_classes)
    photos = denormalize(images).permute(0, 2, 3, 1).cpu().numpy()
    columns = {"image": photos, "truth": colours[masks.cpu().numpy()]}
    for name, predicted in predictions.items():
        shown = torch.where(masks.cpu() == IGNORE, IGNORE, predicted.cpu())
        columns[name] = colours[shown.numpy()]
    factor = max(1, round(160 / photos.shape[1]))
    count, h, w = len(photos), photos.shape[1] * factor, photos.shape[2] * factor
    sheet = Image.new("RGB", (len(columns) * (w + 6) + 6, 20 + count * (h + 6)), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for i, (title, tiles) in enumerate(columns.items()):
        x = 6 + i * (w + 6)
        pen.text((x, 4), title, fill=(0, 0, 0))
        for j, tile in enumerate(tiles):
            sheet.paste(Image.fromarray(tile).resize((w, h), Image.Resampling.NEAREST), (x, 20 + j * (h + 6)))
    buffer = io.BytesIO()
    sheet.save(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def predict(model: torch.nn.Module, images: Tensor, context: Any) -> Tensor:
    """Class ids [B, H, W] on the CPU, each forward inside `context()`."""
    was_training = model.training
    model.eval()
    with torch.no_grad(), context():
        predicted = model(images).argmax(dim=1).cpu()
    model.train(was_training)
    return predicted
