"""Build the ONNX nodes of one inference layer: standard operators of opset 23 or later, computed in fp32.

    weight, "qdq"        FLOAT4E2M1 [N, K], E4M3 [N, K / 16], fp32 []:  DequantizeLinear(codes, DequantizeLinear(scales,
                         tensor scale), axis=1, block_size=16), since a scale must have the type of the result
    weight, "portable"   uint8 [N, K / 2]: BitwiseAnd, Mul, Gather from the 16 values, times both scales
    x                    channels last, padded to blocks of 16, amax, s_b = e4m3(amax_b S_enc / 6), then
                         QuantizeLinear to FLOAT4E2M1 and DequantizeLinear ("qdq"), or comparisons ("portable", with
                         the codes of the layer, bit for bit)
    layer                Conv, ConvTranspose, or MatMul ("matmul", and linear layers) of the two, plus bias

4over6 of activations has no such form; convert.py refuses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from te_nvfp4_cv import formats
from te_nvfp4_cv.export import matrix
from te_nvfp4_cv.export.manifest import join
from te_nvfp4_cv.export.modules import InferenceLayer
from te_nvfp4_cv.formats import BLOCK

VALUES = formats.decode_e2m1(torch.arange(16)).numpy()  # of the 16 codes


class Nodes:
    """Nodes and initializers under construction. Their names start with the layer's name."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def op(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node. Returns the name of its output."""
        output = f"{self.prefix}/{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def constant(self, name: str, values: Any, dtype: Any = np.float32) -> str:
        """Add an initializer of numbers, once per name. Returns its full name."""
        full = join(self.prefix, name)
        if full not in self.initializers:
            self.initializers[full] = numpy_helper.from_array(np.asarray(values, dtype=dtype), full)
        return full

    def packed(self, name: str, data: Tensor, kind: int, dims: Sequence[int]) -> str:
        """Add an initializer of a type that numpy lacks, from its bytes. Returns its full name."""
        full = join(self.prefix, name)
        # As bytes: numpy has neither E2M1 nor E4M3. ONNX packs two E2M1 to a byte, low nibble first, as we do.
        raw = data.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        self.initializers[full] = helper.make_tensor(full, kind, dims, raw, raw=True)
        return full

    def ints(self, name: str, values: Sequence[int]) -> str:
        """Add an initializer of int64, for sizes and axes. Returns its full name."""
        return self.constant(name, list(values), np.int64)


# ---- weights --------------------------------------------------------------------------------------------------------


def weight_matrix(g: Nodes, layer: InferenceLayer, portable: bool) -> str:
    """Add what dequantizes a layer's weight: fp32 [N, K], with K padded to blocks of 16."""
    data, scale = matrix.to_matrix(layer.weight_data, layer.weight_scale, layer.plan)
    rows, half = data.shape
    # Rounded in the order in which checkpoints.py computes weight_scale_2: both files then have one tensor scale.
    factor = 1.0 / (6.0 * layer.recipe.settings("weight").e4m3_max)
    tensor_scale = g.constant("weight_scale_2", np.float32(float(layer.weight_amax.float() * factor)))
    scales = g.packed("weight_scale", scale, TensorProto.FLOAT8E4M3FN, scale.shape)
    if not portable:
        codes = g.packed("weight", data, TensorProto.FLOAT4E2M1, (rows, 2 * half))
        real_scales = g.op("DequantizeLinear", [scales, tensor_scale])
        return g.op("DequantizeLinear", [codes, real_scales], axis=1, block_size=BLOCK)
    codes = g.packed("weight", data, TensorProto.UINT8, (rows, half))
    # Two codes to a byte: the even column is in the low nibble, so [low, high] pairs restore the order. The high one is
    # divided by 16 as a number: OpenVINO 2026.4 rounds where BitShift drops bits.
    low = g.op("Cast", [g.op("BitwiseAnd", [codes, g.constant("low", 0x0F, np.uint8)])], to=TensorProto.FLOAT)
    high = g.op("Cast", [g.op("BitwiseAnd", [codes, g.constant("high", 0xF0, np.uint8)])], to=TensorProto.FLOAT)
    high = g.op("Mul", [high, g.constant("sixteenth", 1 / 16)])
    one = g.ints("last_axis", [2])
    pairs = g.op("Concat", [g.op("Unsqueeze", [low, one]), g.op("Unsqueeze", [high, one])], axis=2)
    index = g.op("Cast", [pairs], to=TensorProto.INT64)  # what Gather takes
    values = g.op("Gather", [g.constant("e2m1", VALUES), index])  # [N, K / 2, 2]
    blocks = g.op("Reshape", [values, g.ints("blocks", [rows, scale.shape[1], BLOCK])])
    real_scales = g.op("Mul", [g.op("Cast", [scales], to=TensorProto.FLOAT), tensor_scale])
    product = g.op("Mul", [blocks, g.op("Unsqueeze", [real_scales, one])])
    return g.op("Reshape", [product, g.ints("matrix", [rows, 2 * half])])


def kernel_of(g: Nodes, layer: InferenceLayer, rows: str) -> str:
    """Reshape a matrix [N, K] to torch's weight [axis 0, axis 1, *kernel], which is ONNX's, too."""
    geometry = layer.plan.geometry
    n, taps, blocks = matrix.sizes(layer.plan)
    groups, kernel = geometry.groups, list(geometry.kernel)
    channels = matrix.channels(layer.plan)
    w = g.op("Reshape", [rows, g.ints("taps", [n, taps, blocks * BLOCK])])
    if channels % BLOCK:
        # Drop the zeros that filled the last block of each tap.
        w = g.op("Slice", [w, g.ints("from", [0]), g.ints("to", [channels]), g.ints("axis", [2])])
    if not geometry.transposed:
        w = g.op("Transpose", [w], perm=[0, 2, 1])  # [O, C, T]
        return g.op("Reshape", [w, g.ints("shape", [n, channels, *kernel])])
    w = g.op("Reshape", [w, g.ints("by_group", [groups, n // groups, taps, channels])])
    w = g.op("Transpose", [w], perm=[0, 3, 1, 2])  # [G, A, C1, T]
    return g.op("Reshape", [w, g.ints("shape", [groups * channels, n // groups, *kernel])])


# ---- activations ----------------------------------------------------------------------------------------------------


def quantized_input(g: Nodes, layer: InferenceLayer, x: str, rank: int, portable: bool) -> str:
    """Add what quantizes and dequantizes x [..., C]. The result [..., G * Kb * 16] includes the padding of blocks.

    Args:
        rank: number of axes of x.
    """
    geometry, settings = layer.plan.geometry, layer.recipe.settings("input")
    groups, raised = geometry.groups, layer.plan.input_specs[False].pow2
    channels = matrix.channels(layer.plan)
    blocks = -(-channels // BLOCK)
    keep = [0] * (rank - 1)  # Reshape leaves an axis with size 0 as it is
    if channels % BLOCK:
        x = g.op("Reshape", [x, g.ints("x_groups", [*keep, groups, channels])])
        pads = [0] * (rank + 1) + [0] * rank + [blocks * BLOCK - channels]
        # Each group is padded by itself: a block must not hold channels of two groups.
        x = g.op("Pad", [x, g.ints("x_pads", pads)])
        x = g.op("Reshape", [x, g.ints("x_padded", [*keep, groups * blocks * BLOCK])])
    size = g.op("Abs", [x])
    # An amax for each pixel. A kernel of several taps reads several pixels, so row scaling needs a matrix product.
    if settings.row_scaled and as_matmul(layer) and layer.input_amax is None:
        amax = g.op("ReduceMax", [size, g.ints("channel_axis", [-1])], keepdims=1)
    elif layer.input_amax is None:
        amax = g.op("ReduceMax", [size], keepdims=0)
        amax = _raised(g, amax, settings.e4m3_max) if raised else amax
    else:
        given = layer.input_amax.float()
        given = formats.power_of_two_amax(given, settings.e4m3_max) if raised else given
        amax = g.constant("input_amax", np.float32(float(given)))
    zero, one = g.constant("zero", 0.0), g.constant("one", 1.0)
    largest = g.constant("largest", np.float32(6.0 * settings.e4m3_max))
    # ONNX evaluates both sides of Where: the inner one keeps the quotient from a division by 0.
    positive = g.op("Greater", [amax, zero])
    s_enc = g.op("Where", [positive, g.op("Div", [largest, g.op("Where", [positive, amax, one])]), one])
    # For a tiny amax the quotient is infinite; the quantizer limits it in the same way.
    s_enc = g.op("Min", [s_enc, g.constant("float_max", np.finfo(np.float32).max)])
    by_block = [*keep, groups * blocks, BLOCK]
    blocks_of_size = g.op("Reshape", [size, g.ints("x_blocks", by_block)])
    amax_b = g.op("ReduceMax", [blocks_of_size, g.ints("block_axis", [-1])], keepdims=0)
    # S_enc / 6 first, as an fp32 product with the rounded 1/6: TransformerEngine's order, on which bits depend.
    wanted = g.op("Mul", [amax_b, g.op("Mul", [s_enc, g.constant("sixth", np.float32(1) / np.float32(6))])])
    # Limited here, so that nothing depends on how a runtime's cast treats larger values.
    wanted = g.op("Min", [wanted, g.constant("e4m3_max", 448.0)])
    if portable:
        s_b = to_e4m3(g, wanted)
    else:
        s_b = g.op("Cast", [g.op("Cast", [wanted], to=TensorProto.FLOAT8E4M3FN)], to=TensorProto.FLOAT)
    # 1 / S_enc by way of -1: onnxruntime rewrites s * (1 / S) to s / S, which rounds once and not twice.
    s_dec = g.op("Neg", [g.op("Div", [g.constant("minus_one", -1.0), s_enc])])
    scale = g.op("Mul", [s_b, s_dec])
    # A block of zeros has the scale 0, by which the quantizer must not divide.
    safe = g.op("Where", [g.op("Greater", [scale, zero]), scale, one])
    if portable:
        # As the kernels do, x times the reciprocal: next to a tie x / scale would give other codes.
        enc = g.op("Min", [g.op("Div", [one, safe]), g.constant("float_max", np.finfo(np.float32).max)])
        unit, factor = (g.op("Unsqueeze", [s, g.ints("block_axis", [-1])]) for s in (scale, enc))
        v = g.op("Mul", [g.op("Reshape", [x, g.ints("x_blocks", by_block)]), factor])
        q = g.op("Mul", [_to_e2m1(g, v), unit])
        return g.op("Reshape", [q, g.ints("x_padded", [*keep, groups * blocks * BLOCK])])
    codes = g.op("QuantizeLinear", [x, safe], axis=rank - 1, block_size=BLOCK, output_dtype=TensorProto.FLOAT4E2M1)
    return g.op("DequantizeLinear", [codes, scale], axis=rank - 1, block_size=BLOCK)


def _raised(g: Nodes, amax: str, e4m3_max: int) -> str:
    """Add formats.power_of_two_amax of one finite amax; for 0 the lowest, which makes zeros as well."""
    table = [6.0 * e4m3_max * 2.0**k for k in range(formats.MIN_EXPONENT, formats.MAX_EXPONENT + 1)]
    values = g.constant("powers_of_two", table)
    # The number of smaller ones is the place of the first that is not.
    smaller = g.op("Cast", [g.op("Greater", [amax, values])], to=TensorProto.INT64)
    place = g.op("ReduceSum", [smaller, g.ints("only_axis", [0])], keepdims=0)
    return g.op("Gather", [values, g.op("Min", [place, g.constant("last_power", len(table) - 1, np.int64)])])


def _to_e2m1(g: Nodes, v: str) -> str:
    """Add what rounds to the nearest E2M1 value, ties to the even code: round(v / step) * step, a step per binade."""
    a = g.op("Abs", [v])
    half, one, two = (g.constant(name, value) for name, value in (("half", 0.5), ("one", 1.0), ("two", 2.0)))
    above_2, above_4 = (g.op("GreaterOrEqual", [a, g.constant(name, x)]) for name, x in (("two", 2.0), ("four", 4.0)))
    step = g.op("Where", [above_4, two, g.op("Where", [above_2, one, half])])
    # ONNX's Round takes ties to the even integer. In units of the binade's step that is E2M1's even code.
    rounded = g.op("Mul", [g.op("Round", [g.op("Div", [a, step])]), step])
    return g.op("Mul", [g.op("Min", [rounded, g.constant("six", 6.0)]), g.op("Sign", [v])])


def to_e4m3(g: Nodes, v: str) -> str:
    """Add what rounds v, from 0 to 448, to the nearest E4M3 value, ties to even, without a cast to that type.

    Runtimes cast differently near ties (OpenVINO 2026.4 does). Divisions and products by powers of two are exact.
    """
    lows = [2.0**n for n in range(-5, 9)]  # where binades begin, but for the first, in which E4M3 is subnormal, too
    above = g.op("GreaterOrEqual", [g.op("Unsqueeze", [v, g.ints("block_axis", [-1])]), g.constant("binades", lows)])
    binade = g.op("ReduceSum", [g.op("Cast", [above], to=TensorProto.INT64), g.ints("block_axis", [-1])], keepdims=0)
    step = g.op("Gather", [g.constant("steps", [2.0**n for n in range(-9, 6)]), binade])
    return g.op("Mul", [g.op("Round", [g.op("Div", [v, step])]), step])


# ---- layers ---------------------------------------------------------------------------------------------------------


def as_matmul(layer: InferenceLayer) -> bool:
    """Tell whether a layer is a matrix product over pixels: linear, or 1x1 without groups and without padding by zeros.

    Other kinds of padding are applied before x is quantized, so they do not matter.
    """
    g = layer.plan.geometry
    padding: Any = getattr(layer, "padding", 0)
    zeros = getattr(layer, "padding_mode", "zeros") == "zeros"
    padded = zeros and (any(padding) if isinstance(padding, tuple) else padding not in (0, "valid", "same"))
    return isinstance(layer, nn.Linear) or (not g.transposed and g.taps == 1 and g.groups == 1 and not padded)


def build(g: Nodes, layer: Any, x: str, rank: int, form: str) -> str:
    """Add all nodes of a layer. Returns the name of its output.

    Args:
        x: the layer's input, as torch's layer takes it.
        rank: number of axes of x.
        form: "qdq", "matmul" or "portable".
    """
    portable = form == "portable"
    linear = isinstance(layer, nn.Linear)
    x = _shifted(g, layer, x, rank)
    if linear or (form == "matmul" and as_matmul(layer)):
        return _matmul(g, layer, x, rank, portable)
    if form == "matmul":  # other convolutions stay in high precision
        w = g.constant("weight", layer.weight.detach().cpu().numpy())
    else:
        if layer.quantize_x:
            x = _image_last(g, x, rank)
            # Blocks run along channels, which ONNX has second: last for the quantizer, and back for Conv.
            x = _without_padding(g, layer, quantized_input(g, layer, x, rank, portable), rank)
            x = _image_first(g, x, rank)
        w = kernel_of(g, layer, weight_matrix(g, layer, portable))
    bias = _bias(g, layer)
    attributes = dict(
        kernel_shape=list(layer.kernel_size), strides=list(layer.stride), dilations=list(layer.dilation),
        group=layer.groups, pads=_pads(layer),
    )
    if layer.plan.geometry.transposed:
        return g.op("ConvTranspose", [x, w, *bias], output_padding=list(layer.output_padding), **attributes)
    return g.op("Conv", [x, w, *bias], **attributes)


def _pads(layer: Any) -> list[int]:
    """Return the padding of the layer's Conv; that of a shifted layer stands before it, where `_shifted` puts it."""
    return _zeros(layer) if layer.shift is None else [0] * 2 * len(layer.kernel_size)


def _zeros(layer: Any) -> list[int]:
    """Return ONNX's padding: all first sides, then all second sides. Other padding than by zeros is done before."""
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return [0] * 2 * len(layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        # An odd total puts the extra zero at the end, as torch does.
        return [total // 2 for total in totals] + [total - total // 2 for total in totals]
    return [*layer.padding, *layer.padding]


def _shifted(g: Nodes, layer: InferenceLayer, x: str, rank: int) -> str:
    """Pad x with the layer's zeros and subtract its shift, if it has one."""
    if layer.shift is None:
        return x
    if isinstance(layer, nn.Linear):
        return g.op("Sub", [x, g.constant("input_shift", layer.shift[0].cpu().numpy())])
    pads = [0, 0, *_zeros(layer)[: rank - 2], 0, 0, *_zeros(layer)[rank - 2 :]]
    x = g.op("Pad", [x, g.ints("image_pads", pads)]) if any(pads) else x
    return g.op("Sub", [x, g.constant("input_shift", layer.shift[0].cpu().reshape(-1, *(1,) * (rank - 2)).numpy())])


def _bias(g: Nodes, layer: Any) -> list[str]:
    """Return the name of what is added to the layer's result, or nothing."""
    parts = [part.detach().float().cpu() for part in (layer.bias, layer.shift and layer.shift[1]) if part is not None]
    return [g.constant("bias", sum(parts[1:], parts[0]).numpy())] if parts else []


def _image_last(g: Nodes, x: str, rank: int) -> str:
    return g.op("Transpose", [x], perm=[0, *range(2, rank), 1])


def _image_first(g: Nodes, x: str, rank: int) -> str:
    return g.op("Transpose", [x], perm=[0, rank - 1, *range(1, rank - 1)])


def _without_padding(g: Nodes, layer: InferenceLayer, x: str, rank: int) -> str:
    """Take the padding of blocks out again: [..., G * Kb * 16] -> [..., C]."""
    groups, channels = layer.plan.geometry.groups, matrix.channels(layer.plan)
    if not channels % BLOCK:
        return x
    keep = [0] * (rank - 1)
    x = g.op("Reshape", [x, g.ints("x_wide", [*keep, groups, formats.round_up(channels, BLOCK)])])
    x = g.op("Slice", [x, g.ints("from", [0]), g.ints("to", [channels]), g.ints("axis_of_x", [rank])])
    return g.op("Reshape", [x, g.ints("x_narrow", [*keep, groups * channels])])


def _matmul(g: Nodes, layer: Any, x: str, rank: int, portable: bool) -> str:
    conv = not isinstance(layer, nn.Linear)
    channels = matrix.channels(layer.plan)
    x = _image_last(g, x, rank) if conv else x
    w = weight_matrix(g, layer, portable)
    if layer.quantize_x:  # before pixels are left out by the stride: the amax is that of all pixels
        x = quantized_input(g, layer, x, rank, portable)
    elif channels % BLOCK:
        w = g.op("Slice", [w, g.ints("from", [0]), g.ints("to", [channels]), g.ints("axis", [1])])
    strided = [(axis + 1, step) for axis, step in enumerate(layer.stride) if step > 1] if conv else []
    if strided:
        axes, steps = zip(*strided, strict=True)
        ends = [np.iinfo(np.int64).max] * len(axes)  # ONNX's word for "to the end"
        parts = {"begin": [0] * len(axes), "end": ends, "axes": axes, "steps": steps}
        x = g.op("Slice", [x, *(g.ints(name, part) for name, part in parts.items())])
    # A node, not a transposed initializer: blocks of 16 must stay along the last axis of the stored codes.
    y = g.op("MatMul", [x, g.op("Transpose", [w], perm=[1, 0])])
    if bias := _bias(g, layer):
        y = g.op("Add", [y, *bias])
    return _image_first(g, y, rank) if conv else y
