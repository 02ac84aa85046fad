"""Report what quantization changes: each layer by itself, and the model's outputs.

    SQNR of a layer     10 log10(sum (y - mean of y's channel)^2 / sum (y_q - y)^2), both layers on the same input
    SQNR of outputs     likewise, with the mean over the images: what tells one image from another
    cosine              between an image's output and what it should be, as the mean over the images

A mean that all images share counts as no signal: it would hide that nothing else is left.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend.torch_private import tree_leaves
from te_nvfp4_cv.report.text import aligned, number, plain

BOUND_DB = 3.0  # warned of below: the error has half of the signal's power
WORST = 4  # layers that the warning names


class Errors:
    """Sums over all values of each output channel of a layer, in fp64: of the error, of its square, of y, of y^2."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor = torch.zeros(())  # [4, O] from the first call of add

    def add(self, error: Tensor, y: Tensor) -> None:
        """Add values [count, O]."""
        error, y = error.double(), y.double()
        sums = torch.stack([error.sum(0), error.square().sum(0), y.sum(0), y.square().sum(0)])
        self.sums, self.count = self.sums.to(sums.device) + sums, self.count + len(y)

    @property
    def mean(self) -> Tensor:
        """Return the mean error of each channel, fp64 [O]."""
        return self.sums[0] / self.count

    def sqnr_db(self, correction: Tensor | None = None) -> float:
        """Return the SQNR, after a correction [O] was subtracted from the result; NaN without any signal."""
        error, square, y, power = self.sums
        if correction is not None:
            square = square - 2 * correction * error + self.count * correction.square()
        signal = float((power - y.square() / self.count).sum())
        # One value for each channel has no deviation.
        return decibels(signal if self.count > 1 else float(power.sum()), float(square.sum()))


def decibels(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise); infinite without noise, NaN without a signal."""
    if not signal > 0 or math.isnan(noise):
        return math.nan
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


@dataclass(frozen=True)
class LayerDrift:
    """The drift of one layer.

    Attributes:
        name: as in model.named_modules().
        sqnr_db: of the layer in NVFP4, on the input that it has in high precision.
        flops: its share of the FLOPs of the layers that can run in NVFP4.
        how: "nvfp4"; "shifted", if the mean of x is subtracted before it is quantized; "unfolded", if the batch norm
            behind the layer is not folded into it, because the outputs are better so; "high", if auto_high has left
            the layer in high precision.
    """

    name: str
    sqnr_db: float
    flops: float
    how: str


@dataclass(frozen=True)
class Drift:
    """What quantization changes: the attribute `nvfp4_drift` of the model that nv.export.quantize returns.

    Attributes:
        layers: the layers that ran, the worst first.
        sqnr_db: of the model's outputs; NaN if they cannot be compared.
        cosine: between an image's output and what it should be, as the mean over the images.
        images: how many images were compared.
        held_back: the images took no part in calibration. Eight batches or more are needed for that.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> model = nv.export.quantize(torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3)), [torch.randn(2, 32, 8, 8)])
        >>> drift = model.nvfp4_drift
        >>> drift.cosine > 0.95, [row.name for row in drift.layers]
        (True, ['0'])
    """

    layers: list[LayerDrift]
    sqnr_db: float
    cosine: float
    images: int
    held_back: bool
    high: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dicts, lists, strings and numbers; null for what is not finite."""
        return dict(plain(asdict(self)))

    def __str__(self) -> str:
        rows = [(row.name or "(the model)", number(row.sqnr_db, ".1f"), f"{row.flops:.1%}", row.how, "")
                for row in self.layers]
        lines = aligned([("layer", "SQNR, dB", "FLOPs", "runs", ""), *rows])
        which = "held back from calibration" if self.held_back else "of the calibration"
        found = f"SQNR {self.sqnr_db:.1f} dB, cosine {self.cosine:.4f}"
        lines.append(
            f"outputs: {'nothing that can be compared' if math.isnan(self.sqnr_db) else found}; "
            f"{self.images} images {which}"
        )
        return "\n".join(lines)

    def warn(self) -> None:
        """Warn if the outputs have little to do with those in high precision."""
        if not self.sqnr_db < BOUND_DB:
            return
        worst = ", ".join(f"{row.name} ({row.sqnr_db:.1f} dB)" for row in self.layers[:WORST] if row.how != "high")
        warnings.warn(
            f"nv.export.quantize: the outputs change much: SQNR {self.sqnr_db:.1f} dB, cosine {self.cosine:.3f} on "
            f"{self.images} images. The worst layers: {worst}. Leave the worst ones in high precision "
            "(auto_high=0.1, --auto-high 0.1), or quantize weights only (activations='high')",
            UserWarning,
            stacklevel=4,  # the line that called nv.export.quantize, outside of its decorator
        )


def tensors_of(outputs: Any) -> Iterator[Tensor]:
    """Yield the tensors in a model's outputs, those in dataclasses (which pytree does not open), too."""
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors_of([getattr(leaf, f.name) for f in fields(leaf)])


def kept(outputs: object) -> list[Tensor]:
    """Return copies of the tensors in a model's outputs."""
    return [t.detach().clone() for t in tensors_of(outputs)]  # a model may return a buffer that it writes anew


def compare(found: Iterable[Tensor], expected: Iterable[Tensor]) -> tuple[float, float, int]:
    """Return SQNR in dB, mean cosine and the number of images of outputs, NaN if nothing can be compared."""
    signal = noise = 0.0
    cosines: list[Tensor] = []
    images = 0
    for ours, truth in zip(found, expected, strict=False):
        if ours.shape != truth.shape or not truth.numel() or not truth.dim() or not truth.is_floating_point():
            continue
        q, y = (t.detach().double().reshape(len(truth), -1) for t in (ours, truth))
        finite = torch.isfinite(y) & torch.isfinite(q)
        q, y = q.where(finite, 0.0), y.where(finite, 0.0)
        noise += float((q - y).square().sum())
        signal += float((y - y.mean(0) if len(y) > 1 else y).square().sum())
        cosines.append(torch.cosine_similarity(q, y))
        images = max(images, len(y))
    return decibels(signal, noise), float(torch.cat(cosines).mean()) if cosines else math.nan, images
