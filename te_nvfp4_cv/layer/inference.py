"""The forward pass of a layer whose weight is stored in NVFP4: eager, under torch.compile and under torch.export.

    run     x is quantized, with its own amax or a calibrated one; y is the layer's fprop, bit for bit, as one operator;
            a gradient that reaches it raises
    plain   x stays as it is; y = x w + bias in x's dtype, w dequantized, by torch's own operators

The weight is stored packed and expanded at each call, or it is stored expanded: for `run` as the integer kernels' bytes
or as code * scale, whichever its backend multiplies, in real units for `plain`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.backend.registration import without_autocast
from te_nvfp4_cv.backend.torch_private import without_function_modes
from te_nvfp4_cv.errors import describe, runtime_error, type_error, value_error
from te_nvfp4_cv.layer import custom_op, forward_backward, gemms, shortfall
from te_nvfp4_cv.layer.check import (
    DTYPES,
    CallShape,
    Sizes,
    lowered,
    planned,
    refuse_jit_trace,
    torch_func_is_on,
)
from te_nvfp4_cv.layer.options import CallOptions
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.layer.transforms import refuse_transforms
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.experts import Experts
from te_nvfp4_cv.ops.geometry import ConvArgs, ConvGeometry
from te_nvfp4_cv.ops.records import Face, WeightCodes
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.recipe.fields import Role

HIGH = "nv.export.load(..., activations='high'), layer.set_mode(activations='high')"
TRACE = "torch.compile or torch.export in its place; nv.export.to_onnx(..., form='portable') where there is no Python"


class StoredWeight(NamedTuple):
    """A weight in NVFP4, with what a call must know of it.

    Attributes:
        face: the packed face that fprop multiplies.
        amax: fp32 [1].
        unpacked: operands.weight_panels (uint8), or code * scale [axis 0, taps, axis 1], or None. A call whose backend
            does not multiply that form expands the face.
        shape: as torch's layer has it.
        channels_last: its memory format, which y takes over as torch's would.
        input_amax: fp32 [1] that x is quantized with; values beyond it saturate. If None, x's amax is used.
    """

    face: Face
    amax: Tensor
    unpacked: Tensor | None
    shape: tuple[int, ...]
    channels_last: bool
    input_amax: Tensor | None


class _Fixed:
    """Gives the amax that calibration has found; see options.Scales."""

    group = None

    def __init__(self, amax: Tensor) -> None:
        # For the rowwise and the columnwise face: operators take both, though inference makes only the first.
        self._amax = amax.expand(2).contiguous()

    def amax(self, role: Role, operand: Tensor) -> Tensor:
        return self._amax

    def knows(self, role: Role) -> bool:
        return True

    def collector(self, role: Role) -> None:
        """Learn nothing: this is inference."""

    def backward_ran(self) -> None:
        """Do nothing: there is no backward pass."""

    def take_move(self) -> None:
        """Return that nothing moves."""


def run(
    op: str,
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    args: ConvArgs,
    recipe: NVFP4BlockScaling,
    backend: str,
    offsets: Tensor | None = None,
) -> Tensor:
    """Run one layer with x quantized; `op` as nv.functional names it; `offsets` of a grouped linear layer.

    Returns:
        y in x's dtype (torch.autocast's where it is on).
    Raises:
        ValueError: x does not fit, or has a dtype that is not quantized.
        RuntimeError: torch.jit.trace or a transform of torch.func is at work.
    """
    # The weight exists as codes only: its shape is known, and no dtype is.
    x, autocast, call = _input(op, x, Sizes(tuple(weight.shape), ""), bias, args)
    if x.dtype not in DTYPES:
        raise value_error(
            f"nvfp4 {op}: a layer whose weight is stored in NVFP4 does not take this dtype.",
            got=f"x {describe(x)}",
            needs="bf16, fp16 or fp32",
            fix=f'x.float(), or for fp64 {HIGH}',
        )
    refuse_transforms(f"an inference layer with quantized activations ({op})", HIGH, x, bias)
    low = lowered(call)
    x = low.input(x)
    # torch.export may not know the sizes yet.
    if not torch.compiler.is_compiling() and low.geometry.rank and x.shape[0] and 0 in x.shape[2:]:
        raise value_error(
            f"nvfp4 {op}: images without pixels.",
            got=f"x {describe(x)}",
            needs="at least one pixel, or a batch without images, as in torch",
            fix="check the layer before this one",
        )
    shortfall.ran(low.geometry)
    backend = dispatch.resolve(backend, x.device, by_layer=True)
    dtype = dispatch.compute_dtype(x.dtype, x.device, autocast)
    channels_last = layouts.is_channels_last(x) or weight.channels_last
    if dispatch.runs_directly(x) and not (torch.is_grad_enabled() and _has_gradient(x, bias)):
        # The same without torch's dispatcher, which costs as much as a small layer.
        y = _run(x, weight, bias, planned(call, recipe, backend, dtype, channels_last), offsets)
    else:
        spec = custom_op.LayerSpec(recipe.key, backend, dtype, channels_last)
        codes = [*weight.face, weight.amax]
        more = (weight.unpacked, bias, weight.input_amax, low.geometry.to_ints(), spec.to_text(), offsets)
        y = shortfall.call_counted(layer, x, codes, *more)
    return y.squeeze(0) if low.unbatched else y


def plain(op: str, x: Tensor, w: Tensor, bias: Tensor | None, args: ConvArgs, channels_last: bool) -> Tensor:
    """Run one layer with x as it is, in x's dtype; in fp32 on a CPU without arithmetic of that dtype.

    Args:
        w: [axis 0, axis 1, *kernel] in real units.
        channels_last: the weight's memory format.
    """
    x, autocast, call = _input(op, x, Sizes.of(w), bias, args)
    low = lowered(call)
    x = low.input(x)
    emulated = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    dtype = dispatch.compute_dtype(x.dtype, x.device, autocast) if emulated else x.dtype
    if not torch.compiler.is_compiling():
        shortfall.ask(low.geometry.macs)
    with without_function_modes():  # a context would count the call as one that it has missed
        # torch.vmap does not know memory formats.
        last = (layouts.is_channels_last(x) or channels_last) and not torch_func_is_on()
        y = gemms.plain_layer(x, w, bias, low.geometry, dtype, last)
    return y.squeeze(0) if low.unbatched else y


def _input(
    op: str, x: Tensor, w: Sizes, bias: Tensor | None, args: ConvArgs
) -> tuple[Tensor, bool, CallShape]:
    """Return x in torch.autocast's dtype where that is on, if it is on, and the call's shapes."""
    if not isinstance(x, Tensor):
        needs, fix = "a tensor, as torch's layers", "torch.from_numpy(x) of an array"
        raise type_error(f"nvfp4 {op}: the input is no tensor.", got=type(x).__name__, needs=needs, fix=fix)
    refuse_jit_trace(f"an inference layer ({op})", TRACE)
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    x = x.to(torch.get_autocast_dtype(device)) if autocast else x
    return x, autocast, CallShape.of(op, x, w, bias, args)


def _has_gradient(x: Tensor, bias: Tensor | None) -> bool:
    return x.requires_grad or (bias is not None and bias.requires_grad)


def _run(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, plan: Plan, offsets: Tensor | None = None
) -> Tensor:
    # An empty batch has no amax. Asked here and not by the caller, because torch.export may leave the batch open.
    if not plan.geometry.batch:
        return layouts.like_image_first(x, plan.geometry.y_shape, x.shape, plan.channels_last)
    options = CallOptions(
        codes=WeightCodes.of_face(plan.weight_faces[0], weight.face, weight.amax),
        unpacked=weight.unpacked,
        scales=None if weight.input_amax is None else _Fixed(weight.input_amax),
        experts=None if offsets is None else Experts(offsets, x.shape[0]),
    )
    y, _ = forward_backward.forward(x, None, bias, plan, False, False, options)
    return y


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::inference_layer", mutates_args=())
def layer(
    x: Tensor,
    codes: list[Tensor],
    unpacked: Tensor | None,
    bias: Tensor | None,
    input_amax: Tensor | None,
    sizes: list[int],
    spec: str,
    offsets: Tensor | None = None,
) -> Tensor:
    """Return y of one layer.

    Args:
        codes: data and scale of the weight's face for fprop, and its amax.
        unpacked: as in StoredWeight; input_amax: likewise.
        sizes: ConvGeometry.to_ints().
        spec: custom_op.LayerSpec.to_text().
        offsets: of a grouped linear layer.
    """
    plan = custom_op.plan_of(sizes, spec)
    shortfall.ran_as_operator(plan.geometry)
    data, scale, amax = codes
    # Its shape and memory format have gone into the plan.
    weight = StoredWeight(Face(data, scale), amax, unpacked, (), False, input_amax)
    return _run(x, weight, bias, plan, offsets)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)


def _no_gradient(ctx: Any, dy: Tensor | None) -> Any:
    if dy is None:
        # A list for a list: torch compares the structure with that of the arguments.
        return tuple([None] * len(n) if isinstance(n, list) else None for n in ctx.needs_input_grad)
    raise runtime_error(
        "nvfp4: a gradient reached a layer whose weight is stored in NVFP4.",
        got="backward() through an inference layer",
        needs="torch.no_grad() around the model, or what it gives detached",
        fix="train the original model under nvfp4_autocast, and save it again",
    )


# torch's error for a missing formula would name the operator, not the mistake.
layer.register_autograd(_no_gradient, setup_context=_setup_context)


@layer.register_fake
def _(x, codes, unpacked, bias, input_amax, sizes, spec, offsets=None):  # type: ignore[no-untyped-def]
    channels_last = custom_op.spec_of(spec).channels_last
    return layouts.like_image_first(x, ConvGeometry.from_ints(sizes).y_shape, x.shape, channels_last)
