"""Draw objects into pictures, as boxes or as masks with their borders, in the colours of their classes.

A true box bears the name of its class, a predicted one its score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from .data import denormalize
from .objects import as_numpy
from .report import enlargement, font, palette

SHOWN = 0.3  # predictions with a lower score are not drawn


def draw_objects(images: Tensor, objects: list[dict[str, Tensor]], names: Sequence[str]) -> list[np.ndarray]:
    """Draw one picture [H, W, 3] uint8 per image, with the objects that score SHOWN or more, the best on top.

    Pictures with boxes are enlarged as on the sheet (report.py), so that texts are as sharp there.

    Args:
        names: The classes, by which objects are labelled.
    """
    photos = denormalize(images).permute(0, 2, 3, 1).cpu().numpy()
    return [_draw(photo, as_numpy(found), names) for photo, found in zip(photos, objects, strict=True)]


def _draw(photo: np.ndarray, found: dict[str, Any], names: Sequence[str]) -> np.ndarray:
    colours = palette(len(names))
    scores = found.get("scores", np.ones(len(found["labels"])))
    order = [i for i in np.argsort(scores, kind="stable") if scores[i] >= SHOWN]
    if "masks" not in found:
        texts = [f"{scores[i]:.2f}" if "scores" in found else names[found["labels"][i]] for i in order]
        pairs = [(found["boxes"][i], tuple(colours[found["labels"][i]].tolist())) for i in order]
        return _draw_boxes(photo, pairs, texts)
    drawn = photo.copy()
    for i in order:
        mask, colour = found["masks"][i], colours[found["labels"][i]]
        drawn[mask] = photo[mask] // 2 + colour // 2
        drawn[mask & ~_inner(mask)] = colour
    return drawn


def _draw_boxes(photo: np.ndarray, boxes: list[tuple[np.ndarray, tuple[int, ...]]], texts: list[str]) -> np.ndarray:
    """Draw boxes in their colours, then their texts, which no other box covers."""
    factor = enlargement(photo.shape[0])
    wide, high = photo.shape[1] * factor, photo.shape[0] * factor
    picture = Image.fromarray(photo).resize((wide, high), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    corners = [(factor * box).round().tolist() for box, _ in boxes]
    for (x0, y0, x1, y1), (_, colour) in zip(corners, boxes, strict=True):
        pen.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour, width=2)
    for (x0, y0, _, _), (_, colour), text in zip(corners, boxes, texts, strict=True):
        left, top, right, bottom = pen.textbbox((0, 0), text, font(text))
        across, down = right - left + 4, bottom - top + 4
        x, y = max(0, min(x0, wide - across)), max(0, min(y0, high - down))  # inside the picture, if it fits
        pen.rectangle((x, y, x + across, y + down), fill=colour)
        pen.text((x + 2 - left, y + 2 - top), text, (0, 0, 0), font(text))
    return np.asarray(picture)


def _inner(mask: np.ndarray) -> np.ndarray:
    """Return the pixels whose four neighbours belong to the mask too."""
    padded = np.pad(mask, 1)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
