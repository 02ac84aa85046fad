"""NVFP4 convolutions and linear layers as functions, with torch.nn.functional's arguments; and im2col on packed codes.

    conv2d(x, w, bias, stride, padding, dilation, groups, recipe=..., backend="auto")       also conv1d, conv3d
    conv_transpose2d(x, w, bias, stride, padding, output_padding, groups, dilation, ...)    also 1d, 3d
    linear(x, w, bias, ...)
    im2col(t, kernel_size, ...)   the NVFP4Tensor of the im2col matrix, from packed codes: quantize(im2col(x)) == im2col(quantize(x))

A call is checked once, its geometry resolved, its backend chosen, and handed to autograd.QuantizedConv. What NVFP4 cannot do (fp64 and integer
inputs, groups thinner than 16 channels, other kernels than 1-D to 3-D) raises here; under nvfp4_autocast the same call runs in high precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.autograd import Plan, QuantizedConv, is_channels_last, row_scaling_applies
from te_nvfp4_cv.checks import describe, type_error, value_error
from te_nvfp4_cv.ops import dispatch
from te_nvfp4_cv.ops.conv.reference import gather
from te_nvfp4_cv.ops.geometry import ConvGeometry, output_size, pixel_map, transposed_output_size
from te_nvfp4_cv.recipe import NVFP4BlockScaling, as_recipe
from te_nvfp4_cv.tensor import NVFP4Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MINIMUM = 16  # channels on either side of a group
AXES = {1: "conv1d", 2: "conv2d", 3: "conv3d"}


@dataclass(frozen=True)
class Call:
    """What an observer is told about one layer's call: its shapes, its recipe, or why it runs in high precision."""

    op: str
    weight: Tensor
    x: Tensor
    geometry: ConvGeometry | None
    recipe: NVFP4BlockScaling | None
    reason: str


_observers: list[Callable[[Call], None]] = []


@contextmanager
def observe(observer: Callable[[Call], None]) -> Iterator[None]:
    """Tell `observer` about every convolution and linear call under the context; one slot, for coverage and telemetry."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def report(call: Call) -> None:
    """Tell the innermost observer, if there is one."""
    if _observers:
        _observers[-1](call)


# ---- the calls ------------------------------------------------------------------------------------------------------


def conv1d(
    x: Tensor, w: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1, *, recipe: Any = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """F.conv1d with its three GEMMs in NVFP4; see conv2d."""
    return run("conv1d", x, w, bias, stride, padding, dilation, groups, 0, recipe=recipe, backend=backend)


def conv2d(
    x: Tensor, w: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1, *, recipe: Any = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """F.conv2d with its three GEMMs in NVFP4.

    Args:
        x: [B, C, H, W] (or [C, H, W]) bf16, fp16 or fp32, any strides.
        w: [O, C / groups, R, S]; quantized as it is stored.
        padding: an int, one per axis, "same" or "valid".
        recipe: NVFP4BlockScaling, TransformerEngine's, or None for the default.
        backend: "auto", "reference" or "vendor".
    Returns:
        [B, O, P, Q] in x's dtype (torch.autocast's where it is on).
    Raises:
        ValueError: shapes, dtypes or groups that NVFP4 cannot take; RuntimeError: a backend that cannot run here.
    """
    return run("conv2d", x, w, bias, stride, padding, dilation, groups, 0, recipe=recipe, backend=backend)


def conv3d(
    x: Tensor, w: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1, *, recipe: Any = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """F.conv3d with its three GEMMs in NVFP4; see conv2d."""
    return run("conv3d", x, w, bias, stride, padding, dilation, groups, 0, recipe=recipe, backend=backend)


def conv_transpose1d(
    x: Tensor, w: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1, *,
    recipe: Any = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """F.conv_transpose1d in NVFP4; see conv_transpose2d."""
    return run("conv_transpose1d", x, w, bias, stride, padding, dilation, groups, output_padding, recipe=recipe, backend=backend)


def conv_transpose2d(
    x: Tensor, w: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1, *,
    recipe: Any = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """F.conv_transpose2d in NVFP4: x [B, C, P, Q], w [C, O / groups, R, S]; fprop and dgrad of conv2d exchanged."""
    return run("conv_transpose2d", x, w, bias, stride, padding, dilation, groups, output_padding, recipe=recipe, backend=backend)


def conv_transpose3d(
    x: Tensor, w: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1, *,
    recipe: Any = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """F.conv_transpose3d in NVFP4; see conv_transpose2d."""
    return run("conv_transpose3d", x, w, bias, stride, padding, dilation, groups, output_padding, recipe=recipe, backend=backend)


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None, *, recipe: Any = None, backend: str = "auto") -> Tensor:
    """F.linear with its three GEMMs in NVFP4: x [..., C], w [O, C]; wgrad's blocks are 16 consecutive rows of x."""
    return run("linear", x, w, bias, 1, 0, 1, 1, 0, recipe=recipe, backend=backend)


def run(
    op: str, x: Tensor, w: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int, output_padding: Any, *, recipe: Any,
    backend: str,
) -> Tensor:  # fmt: skip
    """One explicit call; raises where nvfp4_autocast would fall back to high precision."""
    recipe = as_recipe(recipe)
    recipe.validate_for_use()
    reason = ineligible(op, x, w, groups, recipe)
    if reason is not None:
        raise value_error(
            f"nvfp4 {op}: this call cannot run in NVFP4: {reason}.", got=f"x {describe(x)}, weight {describe(w)}, groups={groups}",
            needs=f"bf16, fp16 or fp32 on one device; at least {MINIMUM} channels per group on both sides (or thin_layers='pad' with groups=1)",
            fix=f"leave this call in high precision: torch.nn.functional.{op}",
        )  # fmt: skip
    return execute(op, x, w, bias, stride, padding, dilation, groups, output_padding, recipe, backend)


def ineligible(op: str, x: Tensor, w: Tensor, groups: int, recipe: NVFP4BlockScaling) -> str | None:
    """Why a valid torch call does not run in NVFP4, or None. Says nothing about shapes that torch would refuse too."""
    if not isinstance(x, Tensor) or not isinstance(w, Tensor):
        return "an operand is not a tensor"
    for name, tensor in (("input", x), ("weight", w)):
        if tensor.dtype not in DTYPES:
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
    if x.device != w.device:
        return f"input on {x.device}, weight on {w.device}"
    if x.is_sparse or w.is_sparse or x.layout != torch.strided or w.layout != torch.strided:
        return "an operand is not a dense tensor"
    if w.dim() < 2 or groups < 1 or w.shape[0] % groups:
        return None
    transposed = "transpose" in op
    sides = (w.shape[0] // groups, w.shape[1])
    thin = min(sides)
    if thin < MINIMUM:
        names = ("in", "out") if transposed else ("out", "in")
        which = names[0] if sides[0] < MINIMUM else names[1]
        if groups > 1:
            kind = "depthwise" if w.shape[1] == 1 else "thin groups"
            return f"{kind}: {thin} {which}-channel{'s' if thin > 1 else ''} per group, fewer than {MINIMUM}"
        if recipe.thin_layers != "pad":
            return f"thin layer: {thin} {which}-channel{'s' if thin > 1 else ''}, fewer than {MINIMUM} (recipe.thin_layers='high_precision')"
    if not recipe.nvfp4_gemms:
        return "recipe.high_precision_gemms names all three GEMMs"
    return None


def execute(
    op: str, x: Tensor, w: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int, output_padding: Any,
    recipe: NVFP4BlockScaling, backend: str,
) -> Tensor:  # fmt: skip
    """An eligible call: cast as torch.autocast would, check, resolve, run."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    if autocast:
        x = x.to(torch.get_autocast_dtype(device))
    elif x.dtype != w.dtype:
        raise value_error(
            f"nvfp4 {op}: input and weight differ in dtype.", got=f"x {describe(x)}, weight {describe(w)}", needs="one dtype outside of torch.autocast",
            fix="model.to(x.dtype), x.to(w.dtype), or run under torch.autocast",
        )  # fmt: skip
    rank = w.dim() - 2
    _check_shapes(op, x, w, bias, rank, groups)
    unbatched = rank > 0 and x.dim() == rank + 1
    if unbatched:
        x = x.unsqueeze(0)
    if isinstance(padding, str):
        x, padding = _named_padding(op, x, w, stride, padding, dilation)
    geometry = _geometry(op, x, w, stride, padding, dilation, groups, output_padding)
    if 0 in x.shape or 0 in geometry.y_shape:  # nothing to quantize: torch's own result, and its gradients
        y = _plain(op, x, w.to(x.dtype), None if bias is None else bias.to(x.dtype), geometry)
        return y.squeeze(0) if unbatched else y
    chosen = dispatch.resolve(backend, x.device)
    channels_last = is_channels_last(x) or is_channels_last(w)
    plan = Plan(geometry, recipe, chosen, dispatch.compute_dtype(x.dtype, x.device, autocast), channels_last)
    report(Call(op, w, x, geometry, recipe, ""))
    y = QuantizedConv.apply(x, w, bias, plan, frozen_weight(w, plan))
    return y.squeeze(0) if unbatched else y


def _check_shapes(op: str, x: Tensor, w: Tensor, bias: Tensor | None, rank: int, groups: int) -> None:
    expected = 0 if op == "linear" else int(op[-2])
    if rank != expected or (rank and x.dim() not in (rank + 1, rank + 2)) or x.dim() < 1:
        needs = "x [..., C] and weight [O, C]" if op == "linear" else f"x [B, C, {expected} image axes] and weight [., ., {expected} kernel axes]"
        raise value_error(f"nvfp4 {op}: wrong rank.", got=f"x {describe(x)}, weight {describe(w)}", needs=needs, fix="reshape the input")
    transposed = "transpose" in op
    channels = x.shape[-1] if rank == 0 else x.shape[x.dim() - rank - 1]
    wanted = w.shape[0] if transposed else w.shape[1] * groups
    if channels != wanted or groups < 1 or w.shape[0] % groups:
        raise value_error(
            f"nvfp4 {op}: channels do not match.", got=f"x {describe(x)}, weight {describe(w)}, groups={groups}: input has {channels} channels",
            needs=f"{wanted} input channels, and groups that divide the weight's first axis", fix="check the layer before this one",
        )  # fmt: skip
    out = w.shape[1] * groups if transposed else w.shape[0]
    if bias is not None and tuple(bias.shape) != (out,):
        raise value_error(f"nvfp4 {op}: bias does not match.", got=f"bias {describe(bias)}", needs=f"({out},)", fix="one bias per output channel")


def _tuple(value: Any, rank: int, op: str, name: str, least: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    values = values * rank if len(values) == 1 else values
    if len(values) != rank or any(isinstance(v, bool) or not isinstance(v, (int, torch.SymInt)) or v < least for v in values):
        raise value_error(f"nvfp4 {op}: bad {name}.", got=repr(value), needs=f"an int >= {least}, or {rank} of them", fix=f"check {name}")
    return values


def _geometry(op: str, x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, output_padding: Any) -> ConvGeometry:
    rank, transposed = w.dim() - 2, "transpose" in op
    stride, dilation = _tuple(stride, rank, op, "stride", 1), _tuple(dilation, rank, op, "dilation", 1)
    padding, extra = _tuple(padding, rank, op, "padding", 0), _tuple(output_padding, rank, op, "output_padding", 0)
    kernel = tuple(w.shape[2:])
    if rank == 0:
        batch, size, out = x.numel() // max(x.shape[-1], 1), (), ()
    else:
        batch, size = x.shape[0], tuple(x.shape[2:])
        rows = zip(size, kernel, stride, padding, dilation, strict=True)
        if transposed:
            out = tuple(transposed_output_size(*row, more) for row, more in zip(rows, extra, strict=True))
        else:
            out = tuple(output_size(*row) for row in rows)
        if min(out) < 0 or (min(out) == 0 and min(size) > 0):
            raise value_error(
                f"nvfp4 {op}: the output would be empty.", got=f"x {describe(x)}, kernel {kernel}, padding {padding}, dilation {dilation}",
                needs="an image at least as large as the dilated kernel, padding included", fix="pad the input or use a smaller kernel",
            )  # fmt: skip
        if any(more >= max(s, d) for more, s, d in zip(extra, stride, dilation, strict=True) if more):
            raise value_error(f"nvfp4 {op}: bad output_padding.", got=str(extra), needs="less than stride or dilation", fix="check output_padding")
    if transposed:
        return ConvGeometry(batch, w.shape[1] * groups, w.shape[0], out, size, kernel, stride, padding, dilation, extra, groups, True)
    return ConvGeometry(batch, w.shape[1] * groups, w.shape[0], size, out, kernel, stride, padding, dilation, extra, groups, False)


def _named_padding(op: str, x: Tensor, w: Tensor, stride: Any, padding: str, dilation: Any) -> tuple[Tensor, tuple[int, ...]]:
    """padding="same" / "valid" as numbers; a side that needs one more than the other is padded here."""
    rank = w.dim() - 2
    if padding == "valid":
        return x, (0,) * rank
    if padding != "same" or any(s != 1 for s in _tuple(stride, rank, op, "stride", 1)):
        raise value_error(
            f"nvfp4 {op}: bad padding.", got=f"padding={padding!r}, stride={stride}", needs='"valid", or "same" with stride 1', fix="give numbers"
        )
    totals = [d * (k - 1) for d, k in zip(_tuple(dilation, rank, op, "dilation", 1), w.shape[2:], strict=True)]
    if any(total % 2 for total in totals):
        x = F.pad(x, [n for total in reversed(totals) for n in (0, total % 2)])
    return x, tuple(total // 2 for total in totals)


def _plain(op: str, x: Tensor, w: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    if g.rank == 0:
        return F.linear(x, w, bias)
    if g.transposed:
        return getattr(F, op)(x, w, bias, g.stride, g.padding, g.output_padding, g.groups, g.dilation)
    return getattr(F, op)(x, w, bias, g.stride, g.padding, g.dilation, g.groups)


# ---- weights quantized once, for gradient accumulation --------------------------------------------------------------

_frozen: dict[int, Any] = {}


def frozen_weight(w: Tensor, plan: Plan) -> tuple[Tensor, ...] | None:
    """The codes that an enclosing nv.frozen_weights holds for `w`, or None."""
    entry = _frozen.get(id(w)) if _frozen else None
    return None if entry is None else entry.codes(w, plan)


# ---- im2col on codes ------------------------------------------------------------------------------------------------


def im2col(t: NVFP4Tensor, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> NVFP4Tensor:
    """The NVFP4Tensor of the im2col matrix of an image, from its packed codes: nothing is dequantized.

    Args:
        t: logical shape [*image, B, C] with one to three image axes, C a multiple of 16; B too where it has a columnwise face.
    Returns:
        NVFP4Tensor of shape [*output image, B, taps * C], K in the order (tap, channel): bit for bit what quantizing the im2col matrix gives
        with the same amax.
    Raises:
        TypeError: not an NVFP4Tensor; ValueError: a shape or layout that cannot be lowered.
    """
    if not isinstance(t, NVFP4Tensor):
        raise type_error("nvfp4 im2col: not quantized.", got=describe(t), needs="an NVFP4Tensor", fix="t = NVFP4Quantizer()(x), x of shape [H, W, B, C]")
    rank = t.dim() - 2
    columnwise = t.columnwise_data is not None
    if rank not in AXES or t.shape[-1] % MINIMUM or (columnwise and t.shape[-2] % MINIMUM) or t.row_scaled:
        raise value_error(
            "nvfp4 im2col: this tensor cannot be lowered.", got=f"{describe(t)}, row-scaled: {t.row_scaled}",
            needs="[*image, B, C] with 1 to 3 image axes, C (and B, with a columnwise face) a multiple of 16, one amax",
            fix="pad channels and images with zeros before quantizing",
        )  # fmt: skip
    image, batch, channels = tuple(t.shape[:-2]), t.shape[-2], t.shape[-1]
    kernel = _tuple(kernel_size, rank, "im2col", "kernel_size", 1)
    numbers = [_tuple(v, rank, "im2col", n, least) for v, n, least in ((stride, "stride", 1), (padding, "padding", 0), (dilation, "dilation", 1))]
    out = tuple(output_size(*row) for row in zip(image, kernel, *numbers, strict=True))
    if min(out) < 1:
        raise value_error("nvfp4 im2col: the kernel is larger than the image.", got=f"image {image}, kernel {kernel}", needs="at least one window", fix="pad")
    geometry = ConvGeometry(batch, channels, channels, image, out, kernel, *numbers, (0,) * rank, 1, False)
    pixels = pixel_map(geometry, True)
    faces: dict[str, Tensor | None] = {}
    if t.rowwise_data is not None:
        for name, part in (("rowwise_data", t.rowwise_data), ("rowwise_scale_inv", t.rowwise_scale_inv.view(torch.uint8))):
            columns = gather(part.reshape(-1, batch, part.shape[-1]), pixels).transpose(1, 2)  # [pixels, B, taps, k]
            faces[name] = columns.reshape(*out, batch, -1) if name == "rowwise_data" else columns.reshape(-1, columns.shape[2] * columns.shape[3])
    if columnwise:
        data, scale = t.columnwise_te()
        for name, part in (("columnwise_data", data), ("columnwise_scale_inv", scale.view(torch.uint8))):
            flat = part.reshape(channels, -1, part.shape[1] // (part.shape[1] and _product(image))).transpose(0, 1)  # [pixels, C, k]
            faces[name] = gather(flat, pixels).permute(1, 2, 0, 3).reshape(geometry.taps * channels, -1)
    for name in ("rowwise_scale_inv", "columnwise_scale_inv"):
        if name in faces:
            faces[name] = faces[name].contiguous().view(torch.float8_e4m3fn)  # type: ignore[union-attr]
    return NVFP4Tensor(
        shape=(*out, batch, geometry.taps * channels), dtype=t.dtype, amax_rowwise=t.amax_rowwise, amax_columnwise=t.amax_columnwise,
        quantizer=t.quantizer, nvfp4_use_4over6=t.four_over_six, nvfp4_e4m3_max=t.e4m3_max, columnwise_rht=t.columnwise_rht,
        with_random_sign_mask=t._with_random_sign_mask, **faces,
    )  # type: ignore[arg-type]  # fmt: skip


def _product(values: Sequence[int]) -> int:
    out = 1
    for value in values:
        out *= value
    return out


__all__ = [
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "im2col", "linear", "observe", "row_scaling_applies",
]  # fmt: skip
