"""A Plan is one call of a quantized layer with everything decided: its shapes, its recipe, where it runs.

    forward    x -> both faces in one pass; w -> codes; y = fprop; save x's columnwise face and w's codes, packed
    backward   dy -> both faces in one pass (stochastic rounding); dx = dgrad; dw = wgrad

Which GEMMs run in NVFP4 is the recipe's choice; the others run on the high-precision operands, which are then saved.
A Plan holds its answers: each is computed when it is first asked for and kept in the object, and equal calls share one
object (check.py). So a layer that runs again asks the recipe and the geometry nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.backend.answers import answer
from te_nvfp4_cv.backend.torch_private import cpu_has_tiles
from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.formats import alpha_factor
from te_nvfp4_cv.ops.block_scales import FORMATS, backend_of
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.records import DEQUANTIZED, NONE, PACKED, RECORDS, Fold, OperandSpec, WeightLayout, WeightSpec
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, RoleSettings
from te_nvfp4_cv.recipe.fields import Role

# Measured by examples/benchmarks/cpu_conv.py --bf16: with 144 pixels of 512 channels the integer kernels are 1.3 to 2.7
# times as fast as oneDNN on AMX tiles, with 576 pixels of 256 channels about as fast, and with more pixels slower.
PIXELS_FOR_TILES = 512


# Frozen, because many calls share one object; cached_property writes to __dict__, past the frozen __setattr__.
@dataclass(frozen=True)
class Plan:
    """One call, checked. `compute_dtype` is that of dequantized operands, `channels_last` y's memory format."""

    geometry: ConvGeometry
    recipe: NVFP4BlockScaling
    backend: str
    compute_dtype: torch.dtype
    channels_last: bool

    # ---- what the recipe says

    @answer
    def input(self) -> RoleSettings:
        """The settings of x."""
        return self.recipe.settings(Role.INPUT)

    @answer
    def weight(self) -> RoleSettings:
        """The settings of w."""
        return self.recipe.settings(Role.WEIGHT)

    @answer
    def grad_output(self) -> RoleSettings:
        """The settings of dy."""
        return self.recipe.settings(Role.GRAD_OUTPUT)

    @answer
    def gemms(self) -> tuple[str, ...]:
        """The GEMMs that run in NVFP4: any of "fprop", "dgrad", "wgrad"."""
        return self.recipe.nvfp4_gemms

    @answer
    def dequantized_backward(self) -> bool:
        """True if backward runs in high precision on the dequantized operands of fprop."""
        return self.recipe.backward_override == "dequantized"

    @answer
    def delayed(self) -> bool:
        """True if the tensor scales of activations and gradients come from an earlier step."""
        return self.recipe.tensor_scale == "delayed"

    @answer
    def expert_scales(self) -> bool:
        """True if each expert's rows and weight have a tensor scale of their own: grouped linear layers only."""
        return self.geometry.routed and self.recipe.grouped_scale == "expert"

    @answer
    def row_scaled(self) -> bool:
        """True if x has one scale per row: linear layers and 1x1 convolutions, where an output row reads one row."""
        return self.input.row_scaled and row_scaling_applies(self.geometry)

    @answer
    def weight_faces(self) -> tuple[str, str]:
        """The quantized copies of the weight that fprop and dgrad multiply, "row" or "col" each.

        With 16x16 blocks one copy serves both, because a square block has the same scale read either way.
        """
        if self.weight.two_d:
            return "row", "row"
        # A face's blocks lie along the axis that its GEMM contracts: for fprop the input channels, which are the first
        # axis of a transposed convolution's weight and the second of the others.
        return ("col", "row") if self.geometry.transposed else ("row", "col")

    # ---- how operands are quantized

    @answer
    def folds(self) -> tuple[Fold, Fold]:
        """The folds (x, dy) that lay the columnwise faces out in images."""
        # The geometry calls its sides after a plain convolution, where x is a and dy is b.
        a, b = self.geometry.folds
        return (b, a) if self.geometry.transposed else (a, b)

    @answer
    def operand_form(self) -> int:
        """The form in which this backend multiplies what lives for one call."""
        if self.backend.endswith("integer"):  # of whatever format
            return RECORDS
        return DEQUANTIZED if self.backend in ("vendor", *FORMATS) else PACKED

    @answer
    def input_specs(self) -> tuple[OperandSpec, OperandSpec]:
        """The specs of x: without and with a columnwise face for wgrad."""
        return self._input_spec(False), self._input_spec(True)

    def _input_spec(self, need_dw: bool) -> OperandSpec:
        row = NONE if "fprop" not in self.gemms else self.operand_form
        if row != NONE and need_dw and self.dequantized_backward:
            row = PACKED  # backward dequantizes what fprop multiplied
        # This face is saved until backward, so it is in 4 bits whatever the backend multiplies.
        col = PACKED if need_dw and "wgrad" in self.gemms else NONE
        return self.operand_spec(self.input, self.folds[0], row, col, self.row_scaled)

    @answer
    def gradient_specs(self) -> dict[tuple[bool, bool], OperandSpec]:
        """The specs of dy, by (dx is needed, dw is needed). Both faces are used at once, so neither is packed first."""
        specs = {}
        for need_dx in (False, True):
            for need_dw in (False, True):
                row = self.operand_form if need_dx and "dgrad" in self.gemms else NONE
                col = self.operand_form if need_dw and "wgrad" in self.gemms else NONE
                specs[need_dx, need_dw] = self.operand_spec(self.grad_output, self.folds[1], row, col)
        return specs

    def operand_spec(self, s: RoleSettings, fold: Fold, row: int, col: int, row_scaled: bool = False) -> OperandSpec:
        """Return the spec of x or dy with settings `s`, its faces in the forms `row` and `col`."""
        more = (s.rht, s.stochastic_rounding, s.four_over_six, s.e4m3_max, row_scaled)
        # Delayed scales come as powers of two.
        return OperandSpec(self.geometry.row_groups, fold, row, col, *more, pow2=s.pow2 and not self.delayed)

    @answer
    def weight_specs(self) -> tuple[WeightSpec, WeightSpec]:
        """The specs of w: with fprop's face alone, and with dgrad's too."""
        # Sets, because the two faces may be the same one.
        return self._weight_spec({self.weight_faces[0]}), self._weight_spec(set(self.weight_faces))

    def _weight_spec(self, faces: set[str]) -> WeightSpec:
        s = self.weight
        # Always packed, to be saved; gemms.py dequantizes it before a GEMM that wants values.
        row, col = (PACKED if face in faces else NONE for face in ("row", "col"))
        return WeightSpec(self.geometry.groups, row, col, s.two_d, s.four_over_six, s.e4m3_max, s.pow2)

    @answer
    def measured_weight_specs(self) -> tuple[WeightSpec, WeightSpec]:
        """The weight_specs for an amax that has been raised where the recipe wants powers of two."""
        plain, both = self.weight_specs
        return plain._replace(pow2=False), both._replace(pow2=False)

    @answer
    def weight_layouts(self) -> dict[str, WeightLayout]:
        """The sizes of either face of w, by "row" and "col"."""
        n, _, channels = self.geometry.weight_shape
        groups = self.geometry.groups
        return {face: WeightLayout(n, channels, groups, face == "col") for face in ("row", "col")}

    # ---- tensor scales

    @answer
    def alpha_factors(self) -> dict[str, float]:
        """The factor of the two amaxes in alpha, for each GEMM; see formats.alpha."""
        x, w, dy = self.input.e4m3_max, self.weight.e4m3_max, self.grad_output.e4m3_max
        return {"fprop": alpha_factor(x, w), "dgrad": alpha_factor(dy, w), "wgrad": alpha_factor(dy, x)}

    @answer
    def weight_carries_scales(self) -> dict[str, bool]:
        """True, by GEMM, if alpha goes into the dequantized weight, which saves a pass over the result.

        It must be a power of two to stay exact. And every output must read some operand: else a NaN in the weight
        could not reach it.
        """
        wanted = self.weight.pow2 and self.operand_form == DEQUANTIZED and not self.expert_scales
        to_b = {"fprop": not self.geometry.transposed, "dgrad": self.geometry.transposed}
        return {gemm: wanted and self.geometry.reads_everywhere(side) for gemm, side in to_b.items()}

    @answer
    def input_carries_scales(self) -> bool:
        """True if wgrad's alpha goes into the dequantized x: as above, and where the bf16 result is final."""
        g = self.geometry
        return self.weight.pow2 and self.operand_form == DEQUANTIZED and g.rank > 0 and not g.touches_only_padding

    # ---- what backward needs

    @answer
    def saves_x(self) -> str:
        """The part of x that wgrad needs: its "col" or "row" face, or x "itself"."""
        if "wgrad" in self.gemms:
            return "col"
        return "row" if self.dequantized_backward else "itself"

    @answer
    def saves_w(self) -> str:
        """The part of w that dgrad needs: its "col" or "row" face, or w "itself"."""
        if "dgrad" in self.gemms:
            return self.weight_faces[1]
        return self.weight_faces[0] if self.dequantized_backward else "itself"


def weight_plan(
    shape: torch.Size,
    groups: int,
    transposed: bool,
    recipe: NVFP4BlockScaling,
    backend: str,
    routed: bool = False,
) -> Plan:
    """Return a plan of which only the weight's part is used, for images of one pixel.

    Args:
        shape: the weight's, [axis 0, axis 1, *kernel]; [E, O, C] if `routed`: of a grouped linear layer.
    """
    if routed:
        shape = torch.Size((shape[0] * shape[1], shape[2]))
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
        routed=routed,
    )
    if recipe.block_format != "nvfp4":
        backend = backend_of(recipe.block_format, backend)
    # The last two decide nothing about a weight's codes.
    return Plan(geometry, recipe, backend, torch.float32, False)


def plan_for(
    geometry: ConvGeometry, recipe: NVFP4BlockScaling, backend: str, compute_dtype: torch.dtype, channels_last: bool
) -> Plan:
    """Return the Plan of a layer's call.

    Args:
        backend: as dispatch.resolve gave it for a layer. BY_LAYER becomes "integer" or "vendor" here.
    Raises:
        ValueError: the integer backend was asked for by name, and the call has row-scaled activations; or a backend of
            GPUs was, and the recipe's blocks are not NVFP4's.
    """
    by_layer = backend == dispatch.BY_LAYER
    if recipe.block_format != "nvfp4":
        if backend != "integer" and dispatch.was_named(backend):
            raise value_error(
                f"nvfp4: backend {backend!r} has NVFP4's blocks only.",
                got=f"recipe.block_format={recipe.block_format!r}",
                needs="a backend of CPUs, or plain torch, which quantizes other formats on any device",
                fix="backend='auto'",
            )
        if by_layer:
            backend = "vendor" if prefers_vendor(geometry, compute_dtype) else "integer"
        return Plan(geometry, recipe, backend_of(recipe.block_format, backend), compute_dtype, channels_last)
    plan = Plan(geometry, recipe, "integer" if by_layer else backend, compute_dtype, channels_last)
    if by_layer and (plan.row_scaled or prefers_vendor(geometry, compute_dtype)):
        return replace(plan, backend="vendor")
    if plan.backend != "integer" or not plan.row_scaled:
        return plan
    raise value_error(
        "nvfp4: backend 'integer' has no row-scaled activations.",
        got="recipe.row_scaled_activation, in a linear layer or 1x1 convolution",
        needs="one tensor scale of x",
        fix="backend='auto', which runs this layer on 'vendor'",
    )


def prefers_vendor(geometry: ConvGeometry, compute_dtype: torch.dtype) -> bool:
    """Return True if oneDNN is expected to be faster than the integer kernels.

    It is where it multiplies bf16 on AMX tiles, and there are pixels enough to fill them.
    """
    pixels = geometry.batch * math.prod(geometry.b_size)
    return compute_dtype == torch.bfloat16 and cpu_has_tiles() and pixels > PIXELS_FOR_TILES


def row_scaling_applies(g: ConvGeometry) -> bool:
    """Return True if every output row reads one input row."""
    return not g.transposed and g.taps == 1 and g.groups == 1 and not any(g.padding) and not g.routed
