"""TransformerEngine's own NVFP4 in Python, as recipes to compare with; import it where the stand-in is installed.

Its reference divides: alpha = f32(f32(amax_a amax_b) / (36 E_a E_b)). Its kernels, and this package, multiply by
f32(1 / (36 E_a E_b)), which differs in the last bit for about a third of all amaxes. KernelAlpha is the reference with
that one rounding of the kernels.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformer_engine.common.recipe import CustomRecipe
from transformer_engine.pytorch.custom_recipes.reference_nvfp4 import NVFP4QuantizerRef
from transformer_engine.pytorch.custom_recipes.reference_utils import Fp4Formats

_divide = torch.div


def _multiply_by_reciprocal(value: Tensor, divisor: Any, **options: Any) -> Tensor:
    return value * (1.0 / divisor) if isinstance(divisor, float) and not options else _divide(value, divisor, **options)


class KernelAlpha(NVFP4QuantizerRef):
    """The reference quantizer; its GEMM rounds alpha as the kernels do."""

    def qgemm(self, *args: Any, **kwargs: Any) -> Tensor:
        with mock.patch.object(torch, "div", _multiply_by_reciprocal):
            return super().qgemm(*args, **kwargs)


def quantizer(
    tensor: str, rht: bool = True, two_d: bool = True, cls: type = NVFP4QuantizerRef, **options: Any
) -> NVFP4QuantizerRef:
    """The reference quantizer of a role."""
    weight = tensor == "weight"
    tile = (16, 16) if weight and two_d else (1, 16)
    return cls(dtype=Fp4Formats.E2M1, quant_tile_shape=tile, with_rht=rht and not weight, **options)


def recipe(rht: bool = True, two_d: bool = True, cls: type = KernelAlpha) -> CustomRecipe:
    """A CustomRecipe of reference quantizers, SR off."""

    def factory(role: Any) -> NVFP4QuantizerRef:
        return quantizer(getattr(role, "tensor_type", ""), rht, two_d, cls)

    return CustomRecipe(qfactory=factory)
