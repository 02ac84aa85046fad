"""Layers that several test files call: shapes, operands, one forward and backward, and what autograd keeps of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv import functional as NF
from te_nvfp4_cv.backend import native
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from tests.helpers import values

BACKENDS = ("reference", "vendor", *(["integer"] if native.load() is not None else []))
NO_SR = NVFP4BlockScaling(disable_stochastic_rounding=True)
LAYERS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {  # op, x, w, arguments
    "conv1d": ("conv1d", (3, 16, 9), (24, 16, 3), dict(stride=2, padding=1)),
    "conv2d": ("conv2d", (3, 16, 6, 5), (24, 16, 3, 3), dict(padding=1)),
    "conv2d 1x1": ("conv2d", (16, 32, 4, 4), (16, 32, 1, 1), dict(stride=2)),
    "conv2d 7x7": ("conv2d", (1, 16, 9, 11), (16, 16, 7, 7), dict(stride=2, padding=3)),
    "conv2d groups": ("conv2d", (2, 32, 5, 6), (48, 16, 3, 2), dict(dilation=(2, 1), groups=2)),
    "conv2d same": ("conv2d", (2, 16, 5, 6), (16, 16, 2, 3), dict(padding="same", dilation=(1, 2))),
    "conv2d same odd": ("conv2d", (2, 16, 5, 6), (16, 16, 4, 2), dict(padding="same")),
    "conv2d valid": ("conv2d", (2, 16, 5, 6), (16, 16, 3, 3), dict(padding="valid", stride=(2, 1))),
    "conv3d": ("conv3d", (2, 16, 3, 4, 5), (16, 16, 1, 3, 2), dict(padding=(0, 1, 0), stride=(1, 2, 1))),
    "conv_transpose1d": ("conv_transpose1d", (2, 16, 6), (16, 24, 3), dict(stride=2, output_padding=1)),
    "conv_transpose2d": ("conv_transpose2d", (3, 24, 4, 3), (24, 16, 2, 2), dict(stride=2)),
    "conv_transpose2d groups": (
        "conv_transpose2d",
        (2, 32, 3, 4),
        (32, 24, 3, 3),
        dict(stride=(1, 2), padding=1, output_padding=(0, 1), groups=2, dilation=(2, 1)),
    ),
    "conv_transpose3d": ("conv_transpose3d", (2, 16, 2, 3, 2), (16, 16, 2, 2, 2), dict(stride=(2, 1, 2))),
    "linear": ("linear", (2, 5, 32), (24, 32), {}),
    "linear vector": ("linear", (32,), (24, 32), {}),
    "linear matrix": ("linear", (16, 40), (16, 40), {}),
}


def tensors(layer: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, w, bias, leaves that require grad."""
    op, x, w, arguments = LAYERS[layer]
    out = w[1] * arguments.get("groups", 1) if "transpose" in op else w[0]
    return tuple(values(s, "normal", dtype, i).requires_grad_() for i, s in enumerate((x, w, (out,))))  # type: ignore[return-value]


def step(layer: str, x: Tensor, w: Tensor, bias: Tensor | None, namespace: Any = NF, **options: Any) -> list[Tensor]:
    """y, dx, dw, db (those that exist) of one forward and backward, SR seeded."""
    op, arguments = LAYERS[layer][0], LAYERS[layer][3]
    torch.manual_seed(11)
    y = getattr(namespace, op)(x, w, bias, **arguments, **options)
    inputs = [t for t in (x, w, bias) if t is not None and t.requires_grad]
    return [y, *torch.autograd.grad(y, inputs, values(y.shape, "normal", y.dtype, 7))]


def saved_by(run: Callable[[], Any]) -> list[Tensor]:
    """The tensors that autograd keeps while `run` builds its graph; run's result is kept alive by the caller."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run()
    return kept
