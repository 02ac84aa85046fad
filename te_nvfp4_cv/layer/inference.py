"""The forward pass of a layer whose weight is kept in NVFP4: eager, under torch.compile and torch.export.

    run     x is quantized, with its own amax or a calibrated one; y = the layer's fprop, bit for bit, as one operator;
            a gradient that reaches it raises
    plain   x stays as it is; y = x w + bias in x's dtype, w dequantized: torch's own operators

The weight is kept packed and dequantized at each call, or dequantized once: code * scale for `run`, real units for
`plain`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.backend.registration import without_autocast
from te_nvfp4_cv.errors import runtime_error
from te_nvfp4_cv.layer import gemms, operands
from te_nvfp4_cv.layer import geometry as geometries
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, recipe_of_key


@dataclass(frozen=True)
class Shape:
    """The shape of a weight that is not there as torch's tensor."""

    shape: torch.Size

    def dim(self) -> int:
        """Number of axes."""
        return len(self.shape)


class _Fixed:
    """Tensor scales that calibration has found: plan.Scales of x."""

    def __init__(self, amax: Tensor) -> None:
        self._amax = amax.expand(2).contiguous()

    def amax(self, role: int, operand: Tensor) -> Tensor:
        return self._amax

    def collect(self, role: int, observed: Tensor) -> None:
        """Nothing is learned in inference."""


def run(
    op: str,
    x: Tensor,
    codes: tuple[Tensor, ...],
    unpacked: Tensor | None,
    bias: Tensor | None,
    shape: torch.Size,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    output_padding: Any,
    *,
    recipe: NVFP4BlockScaling,
    backend: str,
    input_amax: Tensor | None,
    channels_last: bool,
) -> Tensor:
    """One layer with x quantized.

    Args:
        op: as nv.functional names it.
        codes: (data, scale, amax) of the weight's face for fprop, as faces.quantize_weight packs it.
        unpacked: [axis 0, taps, axis 1] code * scale, or None.
        shape: of the weight, as torch's layer has it.
        input_amax: fp32 [1] that x is quantized with; values beyond it saturate. None: x's own.
        channels_last: the weight's memory format, which y takes over as torch's would.
    Returns:
        y in x's dtype (torch.autocast's where it is on).
    Raises:
        ValueError: x does not fit.
    """
    x, autocast = _autocast(x)
    weight = Shape(shape)
    x, geometry, unbatched = geometries.geometry_of(
        op, x, weight, bias, stride, padding, dilation, groups, output_padding
    )
    data, scale, amax = codes
    y = layer(
        x,
        data,
        scale,
        amax,
        unpacked,
        bias,
        input_amax,
        geometry.to_ints(),
        recipe.key,
        dispatch.resolve(backend, x.device),
        dispatch.compute_dtype(x.dtype, x.device, autocast),
        layouts.is_channels_last(x) or channels_last,
    )
    return y.squeeze(0) if unbatched else y


def plain(
    op: str,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    output_padding: Any,
    *,
    channels_last: bool,
) -> Tensor:
    """One layer with x as it is, in x's dtype; in fp32 on a CPU without arithmetic of that dtype.

    Args:
        w: [axis 0, axis 1, *kernel] in real units; others as `run`.
    """
    x, autocast = _autocast(x)
    x, geometry, unbatched = geometries.geometry_of(op, x, w, bias, stride, padding, dilation, groups, output_padding)
    emulated = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    dtype = dispatch.compute_dtype(x.dtype, x.device, autocast) if emulated else x.dtype
    y = gemms.plain_layer(x, w, bias, geometry, dtype, layouts.is_channels_last(x) or channels_last)
    return y.squeeze(0) if unbatched else y


def _autocast(x: Tensor) -> tuple[Tensor, bool]:
    """(x in torch.autocast's dtype where that is on, whether it is)."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, False
    return x.to(torch.get_autocast_dtype(device)), True


def as_faces(data: Tensor, scale: Tensor, amax: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """The tuple of faces.quantize_weight with the face for fprop alone."""
    empty = data.new_empty(0)
    pairs = (data, scale, empty, empty) if plan.weight_faces[0] == "row" else (empty, empty, data, scale)
    return (*pairs, amax)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::inference_layer", mutates_args=())
def layer(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    amax: Tensor,
    unpacked: Tensor | None,
    bias: Tensor | None,
    input_amax: Tensor | None,
    shape: list[int],
    recipe: str,
    backend: str,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """y of one layer; arguments as `run`, the geometry as ConvGeometry.to_ints(), the recipe as its key."""
    plan = Plan(ConvGeometry.from_ints(shape), recipe_of_key(recipe), backend, dtype, channels_last)
    g = plan.geometry
    if not g.batch:
        return layouts.like_image_first(x, g.y_shape, x.shape, channels_last)
    w_q = as_faces(data, scale, amax, plan)
    x_last = layouts.image_last(x, g.x_shape)
    x_q = operands.quantize_input(x_last, plan, False, None if input_amax is None else _Fixed(input_amax))
    y = gemms.fprop(x_last, x_q, None, w_q, bias, plan, unpacked)
    return layouts.image_first(y, g.y_shape, x.shape, channels_last)


def _no_gradient(ctx: Any, *_: Any) -> Any:
    raise runtime_error(
        "nvfp4: a gradient reached a layer whose weight is kept in NVFP4.",
        got="backward() through an inference layer",
        needs="torch.no_grad() around the model, or what it gives detached",
        fix="train the original model under nvfp4_autocast, and save it again",
    )


layer.register_autograd(_no_gradient)


@layer.register_fake
def _(  # type: ignore[no-untyped-def]
    x, data, scale, amax, unpacked, bias, input_amax, shape, recipe, backend, dtype, channels_last
):
    return layouts.like_image_first(x, ConvGeometry.from_ints(shape).y_shape, x.shape, channels_last)
