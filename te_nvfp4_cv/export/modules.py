"""Layers whose weight stays in NVFP4: what a model is made of once it is to be used and not trained.

    InferenceConv1d .. 3d, InferenceConvTranspose1d .. 3d, InferenceLinear

They are torch's layers without the Parameter `weight`: codes and scales are buffers of integers, which model.half() and
model.to(dtype) leave alone. `weight` is computed from them when it is read. Two things are chosen per layer, at any
time (`set_mode`):

    weights       "packed": dequantized at each call; "cached": once, and then as large as a plain layer's
    activations   "nvfp4": x is quantized, as in training; "high": it is not

A static scale (`input_amax`, found by calibration) makes the codes of an image independent of the batch it comes in;
without one x is quantized with its own amax. A gradient that reaches a layer with quantized activations raises; with
"high" it passes on to x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.export import matrix
from te_nvfp4_cv.layer import delayed_scaling, inference, operands
from te_nvfp4_cv.layer.plan import Plan, weight_plan
from te_nvfp4_cv.nn import learned
from te_nvfp4_cv.nn.modules import NVFP4_CLASSES
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.geometry import ConvArgs
from te_nvfp4_cv.ops.records import Face, WeightCodes
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.tensor.nvfp4_tensor import NVFP4Tensor

WEIGHTS = ("packed", "cached")
ACTIVATIONS = ("nvfp4", "high")
FORWARD = (  # the fields of a recipe that inference depends on
    *("nvfp4_4over6", "nvfp4_4over6_err_mode", "nvfp4_4over6_e4m3_use_256", "row_scaled_activation", "tensor_scale"),
    *("thin_layers", "disable_2d_quantization"),
)


def forward_recipe(recipe: NVFP4BlockScaling, transposed: bool, static: bool) -> NVFP4BlockScaling:
    """What of a recipe the forward pass depends on: x rounds to nearest, nothing is rotated. The weight of a transposed
    convolution has one scale per 16 values of an output channel, which 16x16 tiles are too. Delayed scales without a
    trained one (`static`) are the tensor's own.
    """
    fields = {field: getattr(recipe, field) for field in FORWARD}
    if transposed:
        fields["disable_2d_quantization"] = True
    if not static:
        fields["tensor_scale"] = "current"
    return NVFP4BlockScaling(**fields, disable_rht=True, backward_override="high_precision", name="")


@dataclass(frozen=True)
class Codes:
    """A weight in NVFP4 as fprop's GEMM takes it (matrix.py gives the two layouts): uint8, uint8, fp32 [1].

    `input_amax`: fp32 [1] of the activations, where delayed scaling has found one in training.
    """

    data: Tensor
    scale: Tensor
    amax: Tensor
    input_amax: Tensor | None = None


def quantize_layer(module: nn.Module, recipe: NVFP4BlockScaling, backend: str = "auto") -> Codes:
    """The codes with which a layer's forward runs under `recipe`, bit for bit."""
    transposed, groups = is_transposed(module), getattr(module, "groups", 1)
    w: Any = module.weight
    plan = weight_plan(w.shape, groups, transposed, recipe, dispatch.resolve(backend, w.device))
    as_quantized = learned.as_quantized(module, plan)
    codes = operands.quantize_weight(as_quantized, plan, for_dgrad=False)
    input_amax = delayed_scaling.trained_amax(w, recipe) if plan.delayed else None
    face = codes.face(plan.weight_faces[0])
    if transposed and plan.weight_faces[0] == "row":
        face = Face(*matrix.transposed_tiles(*face, w.shape[1], groups))
    return Codes(*face, codes.amax, input_amax)


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer is a transposed convolution."""
    return bool(getattr(module, "transposed", False))


class InferenceLayer(nn.Module):
    """What these layers share; `become` makes one of a torch layer.

    Attributes:
        recipe: forward_recipe of the one it was quantized with.
        weight_shape: torch's shape of the weight, [axis 0, axis 1, *kernel].
    """

    op: ClassVar[str]
    plain: ClassVar[type[nn.Module]]
    recipe: NVFP4BlockScaling
    weight_shape: torch.Size
    backend: str
    quantize_x: bool
    channels_last: bool
    weight_data: Tensor
    weight_scale: Tensor
    weight_bits: Tensor
    input_bits: Tensor | None
    unpacked: Tensor | None

    # ---- what it holds ----------------------------------------------------------------------------------------------

    @property
    def weight_amax(self) -> Tensor:
        """fp32 [1]."""
        return self.weight_bits.view(torch.float32)

    @property
    def input_amax(self) -> Tensor | None:
        """fp32 [1] that x is quantized with, or None: x's own amax."""
        return None if self.input_bits is None else self.input_bits.view(torch.float32)

    @property
    def codes(self) -> Codes:
        """The weight as fprop takes it."""
        return Codes(self.weight_data, self.weight_scale, self.weight_amax)

    @property
    def plan(self) -> Plan:
        """The weight's part of a Plan."""
        groups = getattr(self, "groups", 1)
        return weight_plan(
            self.weight_shape,
            groups,
            is_transposed(self),
            self.recipe,
            dispatch.resolve(self.backend, self.weight_data.device),
        )

    @property
    def weight(self) -> Tensor:
        """fp32 [axis 0, axis 1, *kernel]: the dequantized weight, computed anew each time."""
        return operands.real_weight(self._weight_codes(), self.plan)

    @property
    def nvfp4_weight(self) -> NVFP4Tensor:
        """The weight as the matrix [output channels, taps * channels] that the GEMM contracts over its last axis."""
        data, scale = matrix.to_matrix(self.codes.data, self.codes.scale, self.plan)
        return NVFP4Tensor(
            shape=(data.shape[0], data.shape[1] * 2),
            dtype=torch.float32,
            rowwise_data=data,
            rowwise_scale_inv=scale.view(torch.float8_e4m3fn),
            amax_rowwise=self.weight_amax,
            nvfp4_use_4over6=self.recipe.settings("weight").four_over_six is not None,
            nvfp4_e4m3_max=self.recipe.settings("weight").e4m3_max,
        )

    def _weight_codes(self) -> WeightCodes:
        face = Face(self.weight_data, self.weight_scale)
        return WeightCodes.of_face(self.plan.weight_faces[0], face, self.weight_amax)

    def set_mode(
        self, weights: str | None = None, activations: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Choose how this layer runs; None leaves a choice as it is.

        Args:
            weights: "packed" or "cached"; dtype: of cached weights, and of the model's activations; default: fp32, or
                as it was.
            activations: "nvfp4" or "high".
        Raises:
            ValueError: another word.
        """
        for name, value, allowed in (("weights", weights, WEIGHTS), ("activations", activations, ACTIVATIONS)):
            if value is not None and value not in allowed:
                raise value_error(
                    f"nv.export: unknown {name}.",
                    got=repr(value),
                    needs=" or ".join(map(repr, allowed)),
                    fix=f"{name}={allowed[0]!r}",
                )
        cached = self.unpacked is not None if weights is None else weights == "cached"
        before = torch.float32 if self.unpacked is None else self.unpacked.dtype
        self.quantize_x = self.quantize_x if activations is None else activations == "nvfp4"
        self.unpacked = None
        if cached:
            self.unpacked = self._unpack().to(dtype or before)

    def _unpack(self) -> Tensor:
        if not self.quantize_x:
            w = self.weight
            rank = w.dim() - 2
            return w.contiguous(memory_format=layouts.CHANNELS_LAST[rank]) if self.channels_last else w.contiguous()
        return operands.weight_values(self._weight_codes(), self.plan)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        shapes, device = (self.weight_data.shape, self.weight_scale.shape), self.weight_data.device
        self.weight_data, self.weight_scale = self.weight_data.flatten(), self.weight_scale.flatten()  # of no format
        try:
            super()._apply(fn, recurse)
        finally:  # fn may fail: no memory, no such device
            self.weight_data, self.weight_scale = self.weight_data.view(shapes[0]), self.weight_scale.view(shapes[1])
        if (rank := len(self.weight_shape) - 2) in layouts.CHANNELS_LAST:  # model.to(memory_format=...)
            like = torch.empty((2,) * (rank + 2), dtype=torch.uint8, device=device)
            layout = layouts.CHANNELS_LAST[rank] if self.channels_last else torch.contiguous_format
            self.channels_last = layouts.is_channels_last(fn(like.contiguous(memory_format=layout)))
        if self.unpacked is not None:
            self.unpacked = fn(self.unpacked)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.set_mode()  # what is cached is made anew

    def _run(self, x: Tensor, args: ConvArgs) -> Tensor:
        bias: Any = self.bias
        if not self.quantize_x:
            w = self.weight if self.unpacked is None else self.unpacked
            return inference.plain(self.op, x, w, bias, args, self.channels_last)
        face = Face(self.weight_data, self.weight_scale)
        stored = inference.StoredWeight(
            face, self.weight_amax, self.unpacked, self.weight_shape, self.channels_last, self.input_amax
        )
        return inference.run(self.op, x, stored, bias, args, self.recipe, self.backend)

    def extra_repr(self) -> str:
        """The plain module's, then how it runs."""
        weights = "packed" if self.unpacked is None else "cached"
        activations = "nvfp4" if self.quantize_x else "high"
        return f"{super().extra_repr()}, weights={weights!r}, activations={activations!r}"


class _Conv(InferenceLayer):
    def forward(self, input: Tensor) -> Tensor:
        """As the plain module's."""
        args = ConvArgs.of(self)
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)  # type: ignore
            args = args._replace(padding=0)
        return self._run(input, args)


class _ConvTranspose(InferenceLayer):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As the plain module's."""
        rank = len(self.kernel_size)  # type: ignore[arg-type]
        more = self._output_padding(  # type: ignore[operator]
            input, output_size, self.stride, self.padding, self.kernel_size, rank, self.dilation
        )
        return self._run(input, ConvArgs.of(self)._replace(output_padding=more))


class _Linear(InferenceLayer):
    def forward(self, input: Tensor) -> Tensor:
        """As the plain module's."""
        return self._run(input, ConvArgs())


def _inference_class(plain: type[nn.Module], op: str) -> type[InferenceLayer]:
    base = _Linear if op == "linear" else _ConvTranspose if "transpose" in op else _Conv
    doc = f"nn.{plain.__name__} whose weight stays in NVFP4."
    return type(f"Inference{plain.__name__}", (base, plain), {"__doc__": doc, "op": op, "plain": plain})


CLASSES: dict[type[nn.Module], type[InferenceLayer]] = {
    plain: _inference_class(plain, ours.op) for plain, ours in NVFP4_CLASSES.items()
}
globals().update({made.__name__: made for made in CLASSES.values()})


def per_axis(module: Any, value: Any) -> tuple[int, ...]:
    """A convolution's stride or padding as one number per axis; it may have been set to a single one."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return tuple(int(n) for n in (values * len(module.kernel_size) if len(values) == 1 else values))


def become(module: nn.Module, codes: Codes, recipe: NVFP4BlockScaling, backend: str = "auto") -> InferenceLayer:
    """Turn a torch layer, or one of modules.py, into an InferenceLayer, in place: its class and its weight change.

    Args:
        recipe: the one it was quantized with.
    """
    plain = next(kind for kind in CLASSES if isinstance(module, kind))
    w: Any = module.weight
    weight_shape, channels_last = w.shape, layouts.is_channels_last(w)
    learned.forget(module)
    del module._parameters["weight"]
    module.__class__ = CLASSES[plain]
    layer: Any = module
    static = codes.input_amax is not None
    for name in ("stride", "padding", "dilation", "output_padding"):
        if isinstance(getattr(layer, name, None), int):
            setattr(layer, name, per_axis(layer, getattr(layer, name)))
    layer.weight_shape, layer.channels_last = weight_shape, channels_last
    layer.recipe, layer.backend = forward_recipe(recipe, is_transposed(module), static), backend
    layer.quantize_x, layer.unpacked = True, None
    for name, value in (("weight_data", codes.data), ("weight_scale", codes.scale)):
        layer.register_buffer(name, value.detach())
    layer.register_buffer("weight_bits", _bits(codes.amax))
    layer.register_buffer("input_bits", _bits(codes.input_amax))
    return layer


def _bits(amax: Tensor | None) -> Tensor | None:
    """fp32 [1] as int32, which no cast of a model reaches."""
    return None if amax is None else amax.detach().float().reshape(1).contiguous().view(torch.int32).clone()
