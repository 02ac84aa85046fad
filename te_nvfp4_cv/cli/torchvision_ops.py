"""Make `import torchvision` work with a CPU-only torch.

The torchvision wheels on PyPI are CUDA builds. With a CPU-only torch their operator library cannot be loaded. The
import then stops with "operator torchvision::nms does not exist", because torchvision registers shape functions for two
operators without checking that they exist. Declaring these two is enough for everything but torchvision.io
(datasets, transforms.v2, models); nms gets a kernel in plain torch. If the library loads, nothing is changed.
torchvision.io stays unusable, so images are read with Pillow. Call ensure_torchvision before anything imports
torchvision or torchmetrics, as the examples do, or after the import has failed, as the command line does.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_declared: torch.library.Library | None = None


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Suppress overlapping boxes: keep the best box, drop all that overlap it, repeat. Returns the indices kept."""
    left = scores.argsort(descending=True, stable=True)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while left.numel():
        best, left = left[0], left[1:]
        kept.append(best)
        top_left = torch.maximum(boxes[best, :2], boxes[left, :2])
        bottom_right = torch.minimum(boxes[best, 2:], boxes[left, 2:])
        overlap = (bottom_right - top_left).clamp(min=0).prod(dim=1)
        left = left[overlap / (area[best] + area[left] - overlap) <= iou_threshold]
    return torch.stack(kept) if kept else left


def transforms_of(name: str) -> Any:
    """Return torchvision's transforms for the weights of the network that a function of that name builds, or None."""
    ensure_torchvision()
    from torchvision.models import get_model_weights

    try:
        return get_model_weights(name).DEFAULT.transforms()
    except (ValueError, AttributeError):  # no such network, or one without weights
        return None


def ensure_torchvision() -> str:
    """Return "native" if torchvision's own operators load, "declared" if this file had to declare them."""
    global _declared
    if _declared is not None:
        return "declared"
    if "torchvision" in sys.modules:
        return "native"
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ImportError("torchvision is not installed: pip install -c constraints.txt '.[train]'")
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
            return "native"
        except OSError:
            pass
    _declared = torch.library.Library("torchvision", "DEF")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.impl("nms", _nms, "CPU")
    from torchvision.ops import boxes

    # torchvision refuses to call nms without its compiled library, although nms is declared above.
    boxes._assert_has_ops = lambda: None
    return "declared"
