"""Say how the operand of a role is quantized: in TransformerEngine's words (QParams), and resolved (RoleSettings)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from te_nvfp4_cv.recipe.fields import bad_value

# By role: TransformerEngine's name for the quantization of the operand.
QPARAMS = {
    "input": "fp4_quant_fwd_inp",
    "weight": "fp4_quant_fwd_weight",
    "grad_output": "fp4_quant_bwd_grad",
}

MARGINS = {"input": 8, "grad_output": 4, "weight": 1}
"""The factors with which tensor_scale="delayed" multiplies the amax of the step before; a weight has its own amax. A
factor that is too large costs little, and one that is too small clips; but gradients have small blocks that a large
factor rounds to zero."""


@dataclass(frozen=True)
class QParams:
    """The quantization of one operand, with TransformerEngine's fields.

    `power_2_scale` and `amax_epsilon` exist for TransformerEngine's other recipes; NVFP4 does not use them.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> nv.NVFP4BlockScaling().fp4_quant_bwd_grad.stochastic_rounding
        True
        >>> nv.QParams(random_hadamard_transform=True) == nv.NVFP4BlockScaling().fp4_quant_fwd_inp
        True
    """

    power_2_scale: bool = False
    amax_epsilon: float = 0.0
    random_hadamard_transform: bool = False
    stochastic_rounding: bool = False
    fp4_2d_quantization: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "amax_epsilon":
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise bad_value("QParams", field.name, value, "a number")
                object.__setattr__(self, field.name, float(value))  # a frozen dataclass takes no assignment
            elif not isinstance(value, bool):
                raise bad_value("QParams", field.name, value, "True or False")


class RoleSettings(NamedTuple):
    """The settings of the quantizer of one role, resolved as TransformerEngine's make_quantizers does."""

    rht: bool
    stochastic_rounding: bool
    two_d: bool
    four_over_six: str | None
    e4m3_max: int
    row_scaled: bool
    pow2: bool = False
    margin: int = 1
