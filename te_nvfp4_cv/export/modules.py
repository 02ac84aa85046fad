"""Provide layers whose weight stays in NVFP4, for models that are used and not trained any more.

    InferenceConv1d .. 3d, InferenceConvTranspose1d .. 3d, InferenceLinear; experts.py: InferenceGroupedLinear

They are torch's layers without the Parameter `weight`. Codes and scales are buffers of integers, which model.half() and
model.to(dtype) do not convert; `weight` is computed from them when it is read. Two choices are made per layer, at any
time, with `set_mode`:

    weights       "packed": expanded at each call; "cached": expanded once and kept beside the codes
    activations   "nvfp4": x is quantized, as in training; "high": x stays in high precision

A cached weight has the form that the layer multiplies: bytes for the integer backend (0.375 of fp32's size), values in
the dtype of the activations for every other one and for "high" (as large as a plain layer's weight).

A static scale (`input_amax`, found by calibration) makes the codes of an image independent of the other images of its
batch. Without one, x is quantized with the amax of the whole batch. If a gradient reaches a layer with quantized
activations, an error is raised; with "high" the gradient passes on to x.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.errors import check_choice, no_script, value_error
from te_nvfp4_cv.export import matrix
from te_nvfp4_cv.export.codes import Codes, is_transposed
from te_nvfp4_cv.export.computed import settle
from te_nvfp4_cv.export.packed_weight import PackedWeight
from te_nvfp4_cv.layer import grouped, inference, operands
from te_nvfp4_cv.layer.check import DTYPES
from te_nvfp4_cv.layer.plan import Plan, plan_for, weight_plan
from te_nvfp4_cv.nn import learned
from te_nvfp4_cv.nn.base import OPS
from te_nvfp4_cv.nn.walk import for_output_size, padded
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.geometry import ConvArgs
from te_nvfp4_cv.ops.records import Face, WeightCodes
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.recipe.fields import check_nvfp4
from te_nvfp4_cv.tensor.nvfp4_tensor import NVFP4Tensor

WEIGHTS = ("packed", "cached")
ACTIVATIONS = ("nvfp4", "high")
FORWARD = (  # the fields of a recipe that inference depends on
    *("nvfp4_4over6", "nvfp4_4over6_err_mode", "nvfp4_4over6_e4m3_use_256", "row_scaled_activation", "tensor_scale"),
    *("thin_layers", "disable_2d_quantization", "block_format"),
)


def check_modes(where: str, weights: str | None, activations: str | None, dtype: torch.dtype | None) -> None:
    """Check the arguments of InferenceLayer.set_mode for the function that the user has called."""
    for name, value, allowed in (("weights", weights, WEIGHTS), ("activations", activations, ACTIVATIONS)):
        if value is not None:
            check_choice(where, name, value, allowed)
    if dtype not in (None, torch.float64, *DTYPES):
        needs = "that of activations: torch.bfloat16, float16, float32 or float64"
        raise value_error(f"{where}: bad dtype.", got=repr(dtype), needs=needs, fix="dtype=torch.bfloat16")


def forward_recipe(recipe: NVFP4BlockScaling, transposed: bool, static: bool) -> NVFP4BlockScaling:
    """Reduce a recipe to the part that the forward pass depends on: x rounds to nearest, and nothing is rotated.

    Args:
        transposed: the layer is a transposed convolution. Its codes have one scale per 16 values of an output channel,
            whether they were quantized in 16x16 tiles or not.
        static: the layer has a trained or calibrated activation scale. Without one, delayed scaling becomes current
            scaling: nothing is left that could update a delayed scale.
    """
    fields = {field: getattr(recipe, field) for field in FORWARD}
    if transposed:
        # Its tiles were spread to single rows (formats.transpose_kernel), so the plan must expect 1x16.
        fields["disable_2d_quantization"] = True
    if not static and recipe.tensor_scale == "delayed":
        fields["tensor_scale"] = "current"
    # Without its name and backward fields, layers that differ there only share a plan in the cache.
    return NVFP4BlockScaling(**fields, disable_rht=True, backward_override="high_precision", name="")


class InferenceLayer(nn.Module):
    """Base class of the layers that nv.export.load and nv.export.quantize put into a model.

    Attributes:
        op: the operator, as nv.functional names it.
        plain: torch's class of the same layer.
        recipe: the part of the layer's recipe that the forward pass depends on.
        weight_shape: torch's shape of the weight, [axis 0, axis 1, *kernel].
        backend: where the layer runs, as nv.nvfp4_autocast takes it.
        quantize_x: activations are "nvfp4".
        channels_last: the memory format of the weight that the layer had, which its output follows.
        unpacked: the cached weight, or None.
        dtype: the dtype of the activations that the cached weight was made for.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> model = nv.export.quantize(torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3)), [torch.randn(2, 32, 8, 8)])
        >>> for layer in model.modules():
        ...     if isinstance(layer, nv.export.InferenceLayer):
        ...         layer.set_mode(activations="high")
        >>> model[0].weight.shape, model[0].nvfp4_weight.shape
        (torch.Size([32, 32, 3, 3]), torch.Size([32, 288]))
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
    dtype: torch.dtype = torch.float32  # a default for layers that were pickled before there was one

    # ---- what it holds ----------------------------------------------------------------------------------------------

    @property
    def weight_amax(self) -> Tensor:
        """Return the amax of the weight, fp32 [1]."""
        return self.weight_bits.view(torch.float32)

    @property
    def input_amax(self) -> Tensor | None:
        """Return the amax that x is quantized with, fp32 [1]. If it is None, the amax of x is used."""
        return None if self.input_bits is None else self.input_bits.view(torch.float32)

    @property
    def shift(self) -> tuple[Tensor, Tensor] | None:
        """Return what is subtracted from x and added to y, fp32 [C] and [O], or None: y = W (x - shift) + W shift."""
        # Not attributes: models that were pickled before there was a shift have no such buffers.
        down, up = self._buffers.get("shift_bits"), self._buffers.get("lift_bits")
        return None if down is None or up is None else (down.view(torch.float32), up.view(torch.float32))

    @property
    def codes(self) -> Codes:
        """Return the weight in the layout that fprop takes, the static activation scale, and the shift."""
        return Codes(self.weight_data, self.weight_scale, self.weight_amax, self.input_amax, self.shift)

    @property
    def plan(self) -> Plan:
        """Return the weight's part of the layer's plan."""
        groups, backend = getattr(self, "groups", 1), dispatch.resolve(self.backend, self.weight_data.device)
        return weight_plan(self.weight_shape, groups, is_transposed(self), self.recipe, backend, self.op == grouped.OP)

    @property
    def weight(self) -> Tensor:
        """Return the dequantized weight, fp32 [axis 0, axis 1, *kernel]; each read computes it anew.

        torch.nn.functional's layer functions run this layer if they are given it (packed_weight.py).
        """
        return PackedWeight.of(self._real_weight(), self)

    @property
    def nvfp4_weight(self) -> NVFP4Tensor:
        """Return the matrix [output channels, taps * channels] that the GEMM contracts over its last axis.

        Raises:
            ValueError: The layer has another block format than NVFP4.
        """
        needs, fix = "NVFP4, which the class stands for", "layer.weight, which is dequantized"
        check_nvfp4("InferenceLayer.nvfp4_weight", self.recipe.block_format, needs, fix)
        data, scale = matrix.to_matrix(self.weight_data, self.weight_scale, self.plan)
        return NVFP4Tensor(
            shape=(data.shape[0], data.shape[1] * 2),
            dtype=torch.float32,
            rowwise_data=data,
            # Stored as uint8, since model.to(dtype) would convert E4M3 buffers.
            rowwise_scale_inv=scale.view(torch.float8_e4m3fn),
            amax_rowwise=self.weight_amax,
            nvfp4_use_4over6=self.recipe.settings("weight").four_over_six is not None,
            nvfp4_e4m3_max=self.recipe.settings("weight").e4m3_max,
        )

    def marked_weight(self) -> Tensor:
        """Return the dequantized weight with a mark that says whose it is, for a trace; see inner.py."""
        w = self._real_weight()
        w.packed_layer = self  # type: ignore[attr-defined]
        return w

    def _real_weight(self) -> Tensor:
        return operands.real_weight(self._weight_codes(), self.plan)

    def _weight_codes(self) -> WeightCodes:
        face = Face(self.weight_data, self.weight_scale)
        return WeightCodes.of_face(self.plan.weight_faces[0], face, self.weight_amax)

    def set_mode(
        self, weights: str | None = None, activations: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Choose how this layer runs. None leaves a choice as it is.

        Args:
            weights: "packed" or "cached".
            activations: "nvfp4" or "high".
            dtype: the dtype of the model's activations, which decides the form of cached weights. If None, that of the
                weights that are cached now is used, or fp32.
        Raises:
            ValueError: `weights` or `activations` is another word, or `dtype` is not that of activations.
        """
        check_modes("nv.export", weights, activations, dtype)
        # Another mode of activations multiplies another form of the weight, so the cache is rebuilt in any case.
        cached = self.unpacked is not None if weights is None else weights == "cached"
        before = torch.float32 if self.unpacked is None else self.dtype
        self.quantize_x = self.quantize_x if activations is None else activations == "nvfp4"
        # Freed first: two unpacked copies at once could be more than the memory holds.
        self.unpacked, self.dtype = None, dtype or before
        if cached:
            self.unpacked = self._unpack()

    def _unpack(self) -> Tensor:
        """Expand the weight to the form that the layer's mode multiplies."""
        if not self.quantize_x:
            w = self._real_weight()
            rank = w.dim() - 2
            w = w.contiguous(memory_format=layouts.CHANNELS_LAST[rank]) if self.channels_last else w.contiguous()
            return w.to(self.dtype)
        if self._wants_bytes():
            return operands.weight_panels(self._weight_codes(), self.plan)
        # Codes times block scales, still without the tensor scale: the GEMM applies that to its result, as in training.
        return operands.weight_values(self._weight_codes(), self.plan).to(self._values_dtype)

    @property
    def _values_dtype(self) -> torch.dtype:
        # fp16 holds NVFP4's values, which the tensor scale keeps in range; other formats have none.
        wide = self.dtype == torch.float16 and self.recipe.block_format != "nvfp4"
        return torch.float32 if wide else self.dtype

    def _is_bytes(self) -> bool:
        return self.unpacked is not None and self.unpacked.dtype == torch.uint8

    def _wants_bytes(self) -> bool:
        """Tell whether calls with activations of `dtype` will run on the integer backend."""
        device, plan = self.weight_data.device, self.plan
        backend = dispatch.resolve(self.backend, device, by_layer=True)
        if backend == dispatch.BY_LAYER:
            compute_dtype = dispatch.compute_dtype(self.dtype, device, autocast=False)
            backend = plan_for(plan.geometry, self.recipe, backend, compute_dtype, self.channels_last).backend
        return backend.endswith("integer")  # of whatever block format

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # model.to(memory_format=...) would change the strides of codes with 4 or 5 axes; flat ones have one layout.
        shapes, device = (self.weight_data.shape, self.weight_scale.shape), self.weight_data.device
        self.weight_data, self.weight_scale = self.weight_data.flatten(), self.weight_scale.flatten()
        try:
            super()._apply(fn, recurse)
        finally:  # fn may fail: no memory, no such device
            self.weight_data, self.weight_scale = self.weight_data.view(shapes[0]), self.weight_scale.view(shapes[1])
        # There is no plain weight that takes the memory format, so fn is asked what it would do to one.
        if (rank := len(self.weight_shape) - 2) in layouts.CHANNELS_LAST:
            like = torch.empty((2,) * (rank + 2), dtype=torch.uint8, device=device)
            layout = layouts.CHANNELS_LAST[rank] if self.channels_last else torch.contiguous_format
            self.channels_last = layouts.is_channels_last(fn(like.contiguous(memory_format=layout)))
        if self.unpacked is not None:
            self.unpacked = fn(self.unpacked)
            # Bytes do not show what fn makes of floating-point tensors, so it is asked.
            self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
            # The bytes are a CPU's, and another dtype may run on another backend. There is nothing to expand on "meta",
            # where no backend runs that could be asked.
            if self.quantize_x and self.weight_data.device.type != "meta":
                if self._is_bytes() != self._wants_bytes() or self._values_dtype != self.dtype:
                    self.set_mode()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # The bytes are in the layout of the kernels that wrote them, which another version may not share.
        if self._is_bytes() and type(self.weight_data) is Tensor and self.weight_data.device.type != "meta":
            self.set_mode()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.set_mode()  # cached weights are those of the old codes

    def __prepare_scriptable__(self) -> None:
        raise no_script(self, "Python at each call", "torch.export, or nv.export.to_onnx(form='portable')")

    def _run(self, x: Tensor, args: ConvArgs) -> Tensor:
        bias: Any = self.bias
        return self.multiply(x, bias, args)

    def multiply(self, x: Tensor, bias: Tensor | None, args: ConvArgs) -> Tensor:
        """Run the layer's operator on x as torch's function takes it, with any bias."""
        if (shift := self.shift) is not None:
            x, args = self.shifted(x, args, shift[0])
            bias = shift[1].to(x.dtype) if bias is None else bias + shift[1].to(bias.dtype)
        if not self.quantize_x:
            w = self._real_weight() if self.unpacked is None else self.unpacked
            return inference.plain(self.op, x, w, bias, args, self.channels_last)
        return inference.run(self.op, x, self.stored(), bias, args, self.recipe, self.backend)

    def stored(self) -> inference.StoredWeight:
        """Return the weight as a call takes it."""
        face = Face(self.weight_data, self.weight_scale)
        return inference.StoredWeight(
            face, self.weight_amax, self.unpacked, self.weight_shape, self.channels_last, self.input_amax
        )

    def shifted(self, x: Tensor, args: ConvArgs, shift: Tensor) -> tuple[Tensor, ConvArgs]:
        """Subtract the shift from x, which is padded with zeros first: the padding is shifted, too."""
        rank = len(self.weight_shape) - 2
        if pads := zero_pads(self, args.padding):
            x, args = F.pad(x, pads), args._replace(padding=0)
        # In fp32: the difference of two bf16 numbers is exact there.
        return (x - shift.reshape(-1, *(1,) * rank)).to(x.dtype), args

    def extra_repr(self) -> str:
        """Return the text of torch's layer, and how this one runs."""
        weights = "packed" if self.unpacked is None else "cached"
        activations = "nvfp4" if self.quantize_x else "high"
        shifted = "" if self.shift is None else ", shifted"
        return f"{super().extra_repr()}, weights={weights!r}, activations={activations!r}{shifted}"


def zero_pads(layer: Any, padding: Any) -> list[int]:
    """Return a convolution's padding by zeros as F.pad takes it, or an empty list if there is none."""
    if isinstance(layer, nn.Linear) or padding == "valid":
        return []
    if padding == "same":
        return list(layer._reversed_padding_repeated_twice)
    sizes = [padding] * len(layer.kernel_size) if isinstance(padding, int) else list(padding)
    return [size for size in reversed(sizes) for _ in range(2)] if any(sizes) else []


class _Conv(InferenceLayer):
    def forward(self, input: Tensor) -> Tensor:
        """Run the layer, with the arguments of torch's own."""
        return self._run(*padded(self, input))


class _ConvTranspose(InferenceLayer):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Run the layer, with the arguments of torch's own."""
        return self._run(input, for_output_size(self, input, output_size))


class _Linear(InferenceLayer):
    def forward(self, input: Tensor) -> Tensor:
        """Run the layer, with the arguments of torch's own."""
        return self._run(input, ConvArgs())


def _inference_class(plain: type[nn.Module], op: str) -> type[InferenceLayer]:
    base = _Linear if op == "linear" else _ConvTranspose if "transpose" in op else _Conv
    doc = f"nn.{plain.__name__} whose weight stays in NVFP4."
    return type(f"Inference{plain.__name__}", (base, plain), {"__doc__": doc, "op": op, "plain": plain})


CLASSES: dict[type[nn.Module], type[InferenceLayer]] = {
    plain: _inference_class(plain, op) for plain, op in OPS.items()
}
# Pickles and `from ... import InferenceConv2d` find a class by its name in this file.
globals().update({made.__name__: made for made in CLASSES.values()})


def become(module: nn.Module, codes: Codes, recipe: NVFP4BlockScaling, backend: str = "auto") -> InferenceLayer:
    """Turn a torch layer, or one of nn/modules.py, into an InferenceLayer, in place: its class and weight change.

    Args:
        codes: the layer's codes, of quantize_layer or of a file.
        recipe: the recipe that the layer was quantized with.
        backend: where the layer will run.
    """
    settle(module)
    plain = next(kind for kind in CLASSES if isinstance(module, kind))
    w: Any = module.weight
    weight_shape, channels_last = w.shape, layouts.is_channels_last(w)
    learned.forget(module)  # the codes contain its multiplier or clipping already
    del module._parameters["weight"]
    # The object stays the same: a model may hold it in lists or attributes that named_modules does not show.
    module.__class__ = CLASSES[plain]
    layer: Any = module
    static = codes.input_amax is not None
    for name in ("stride", "padding", "dilation", "output_padding"):
        if isinstance(value := getattr(layer, name, None), int):  # some models set a single number
            setattr(layer, name, (int(value),) * len(layer.kernel_size))
    layer.weight_shape, layer.channels_last = weight_shape, channels_last
    layer.recipe, layer.backend = forward_recipe(recipe, is_transposed(module), static), backend
    layer.quantize_x, layer.unpacked = True, None
    for name, value in (("weight_data", codes.data), ("weight_scale", codes.scale)):
        # Buffers follow model.to(device) and are in the state_dict; optimizers do not see them.
        layer.register_buffer(name, value.detach())
    layer.register_buffer("weight_bits", _bits(codes.amax))
    layer.register_buffer("input_bits", _bits(codes.input_amax))
    if codes.shift is not None:
        layer.register_buffer("shift_bits", _bits(codes.shift[0]))
        layer.register_buffer("lift_bits", _bits(codes.shift[1]))
    return layer


def _bits(values: Tensor | None) -> Tensor | None:
    """Return fp32 values [n] as int32 bits: model.half() would convert a floating-point buffer."""
    return None if values is None else values.detach().float().reshape(-1).contiguous().view(torch.int32).clone()
