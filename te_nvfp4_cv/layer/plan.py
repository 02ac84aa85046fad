"""One call of a quantized layer, checked: its shapes, its recipe, where it runs; and who takes part in it.

    forward    x -> both faces in one pass; w -> codes; y = fprop; keep x's packed columnwise face and w's packed codes
    backward   dy -> both faces in one pass (stochastic rounding); dx = dgrad; dw = wgrad

Which GEMMs run in NVFP4 is the recipe's; the others run on the high-precision operands, which are then kept.
faces.py quantizes and keeps, multiply.py multiplies, layer.py strings them together; none of them knows of autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from te_nvfp4_cv.ops.geometry import ConvGeometry, Fold, reads_everywhere
from te_nvfp4_cv.ops.quantize.operand import DEQUANTIZED, PACKED
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling


@dataclass(frozen=True)
class Plan:
    """One call, checked: its shapes, its recipe, where it runs, and the dtype of dequantized operands."""

    geometry: ConvGeometry
    recipe: NVFP4BlockScaling
    backend: str
    compute_dtype: torch.dtype
    channels_last: bool

    @property
    def shape(self) -> list[int]:
        return self.geometry.to_ints()

    @property
    def folds(self) -> tuple[Fold, Fold]:
        """(x side, dy side)."""
        a, b = self.geometry.folds()
        return (b, a) if self.geometry.transposed else (a, b)

    @property
    def operand_form(self) -> int:
        """Form in which this backend multiplies."""
        return DEQUANTIZED if self.backend == "vendor" else PACKED

    @property
    def gemms(self) -> tuple[str, ...]:
        return self.recipe.nvfp4_gemms

    @property
    def delayed(self) -> bool:
        """Whether tensor scales are powers of two, those of activations and gradients from an earlier step."""
        return self.recipe.tensor_scale == "delayed"

    @property
    def row_scaled(self) -> bool:
        """Row-scaled activations apply to linear layers and 1x1 convolutions."""
        return self.recipe.settings("input").row_scaled and row_scaling_applies(self.geometry)

    @property
    def weight_faces(self) -> tuple[str, str]:
        """(face for fprop, face for dgrad): 16x16 scales make both the same numbers, kept rowwise."""
        if self.recipe.settings("weight").two_d:
            return "row", "row"
        return ("col", "row") if self.geometry.transposed else ("row", "col")

    def weight_carries_scales(self, gemm: str) -> bool:
        """Whether fprop's or dgrad's alpha, a power of two, goes into the dequantized weight: no pass over the result.

        Not where some output reads no operand at all: a NaN in the weight could not reach it.
        """
        to_b = (gemm == "fprop") != self.geometry.transposed
        return self.delayed and self.operand_form == DEQUANTIZED and reads_everywhere(self.geometry, to_b)


def weight_plan(shape: torch.Size, groups: int, transposed: bool, recipe: NVFP4BlockScaling, backend: str) -> Plan:
    """A plan of which only the weight's part is used: images of one pixel. shape: [axis 0, axis 1, *kernel]."""
    rank = len(shape) - 2
    ones, zeros = (1,) * rank, (0,) * rank
    geometry = ConvGeometry(
        batch=1,
        channels_a=shape[1] * groups,
        channels_b=shape[0],
        a_size=ones,
        b_size=ones,
        kernel=tuple(shape[2:]),
        stride=ones,
        padding=zeros,
        dilation=ones,
        output_padding=zeros,
        groups=groups,
        transposed=transposed,
    )
    return Plan(geometry, recipe, backend, torch.float32, False)


def row_scaling_applies(g: ConvGeometry) -> bool:
    """Whether every output row reads one input row."""
    return not g.transposed and g.taps == 1 and g.groups == 1 and not any(g.padding)


class Scales(Protocol):
    """What gives amaxes that are not the operand's own (scaling.py). role 0 is x, 1 is dy."""

    def amax(self, role: int, operand: Tensor) -> Tensor:
        """fp32 [2], as operands.quantize_operand takes it."""
        ...

    def collect(self, role: int, observed: Tensor) -> None:
        """What that call observed."""
        ...


class Watch(Protocol):
    """Who looks on while one call is quantized (telemetry). It must not change what it sees."""

    def quantized(self, role: str, operand: Tensor, faces: tuple[Tensor, ...], seed: Tensor | None, plan: Plan) -> None:
        """`operand`, in the layout of operands.py, has become `faces`; `seed` rounded it, if it was rounded so."""
        ...

    def weight_gradient(self, dy: Tensor, dw: Tensor, plan: Plan) -> None:
        """dy [B, *image, O] has led to dw [axis 0, taps, axis 1]."""
        ...
