"""Draw objects into pictures, as boxes or as masks with their borders, in the colours of their classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from .data import denormalize
from .objects import as_numpy
from .report import palette

SHOWN = 0.3  # predictions with a lower score are not drawn


def draw_objects(images: Tensor, objects: list[dict[str, Tensor]], classes: int) -> list[np.ndarray]:
    """Draw one picture [H, W, 3] uint8 per image, with the objects that score SHOWN or more, the best on top."""
    photos = denormalize(images).permute(0, 2, 3, 1).cpu().numpy()
    colours = palette(classes)
    return [_draw(photo, as_numpy(found), colours) for photo, found in zip(photos, objects, strict=True)]


def _draw(photo: np.ndarray, found: dict[str, Any], colours: np.ndarray) -> np.ndarray:
    scores = found.get("scores", np.ones(len(found["labels"])))
    order = [i for i in np.argsort(scores, kind="stable") if scores[i] >= SHOWN]
    if "masks" not in found:
        picture = Image.fromarray(photo)
        pen = ImageDraw.Draw(picture)
        for i in order:
            x0, y0, x1, y1 = found["boxes"][i].round().tolist()
            pen.rectangle(
                (x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=tuple(colours[found["labels"][i]].tolist())
            )
        return np.asarray(picture)
    drawn = photo.copy()
    for i in order:
        mask, colour = found["masks"][i], colours[found["labels"][i]]
        drawn[mask] = photo[mask] // 2 + colour // 2
        drawn[mask & ~_inner(mask)] = colour
    return drawn


def _inner(mask: np.ndarray) -> np.ndarray:
    """Return the pixels whose four neighbours belong to the mask too."""
    padded = np.pad(mask, 1)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
