"""One quantized layer as tensors of a packed file, and back.

    entry_of    a layer's codes, and what the manifest says of them
    tensors_of  the tensors that the file holds of the layer, by name
    codes_of    the codes again, after making sure that the tensors are what the manifest says

Refused: weights that are not finite, recipes that shift a layer's input by the mean of each batch, damaged files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.errors import describe, value_error
from te_nvfp4_cv.export import matrix
from te_nvfp4_cv.export.artifact import Artifact, damaged_layer
from te_nvfp4_cv.export.codes import Codes, quantize_layer
from te_nvfp4_cv.export.manifest import SCALES, SHIFTS, LayerEntry, call_of, join
from te_nvfp4_cv.export.modules import InferenceLayer
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.nn.walk import like_weight, op_of
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.block_scales import block_of
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling


def entry_of(
    name: str, module: Any, recipe: NVFP4BlockScaling, recipes: dict[str, int], trained: Tensor | nn.Module | None
) -> tuple[Codes, LayerEntry]:
    """Return a layer's codes and its entry in the manifest; a recipe that is new gets a number in `recipes`.

    Args:
        trained: what owns the layer's delayed scales, as quantize_layer takes it.
    """
    if isinstance(module, InferenceLayer):
        # Saved again from its codes: to dequantize and quantize once more could change bits.
        codes, shape = module.codes, tuple(module.weight_shape)
        op, channels_last = module.op, module.channels_last
        activations = "nvfp4" if module.quantize_x else "high"
    else:
        if recipe.activation_shift != "none":  # W m needs the weight in high precision, and m is the batch's
            raise value_error(
                f"nv.export.save: the layer {name!r} shifts its input by the mean of each batch.",
                got=f"activation_shift={recipe.activation_shift!r} in its recipe",
                needs="a shift that is part of the file",
                fix="nv.export.quantize(model, images), which finds such shifts",
            )
        w = like_weight(module)
        codes, shape = quantize_layer(module, recipe, trained), tuple(w.shape)
        op, channels_last, activations = op_of(module), layouts.is_channels_last(w), "nvfp4"
    amax = float(codes.amax)  # an fp32 number survives the way through a Python float and JSON bit for bit
    if not torch.isfinite(codes.amax).all():
        raise value_error(
            f"nv.export.save: the weight of {name!r} is not finite.",
            got=f"amax {amax}",
            needs="finite weights",
            fix="load a checkpoint from before the training diverged (te-nvfp4-cv diagnose finds the step)",
        )
    return codes, LayerEntry(
        op=op,
        shape=shape,
        groups=int(getattr(module, "groups", 1)),  # a width that NumPy has computed is no number in JSON
        amax=amax,
        e4m3_max=recipe.settings("weight").e4m3_max,
        recipe=recipes.setdefault(recipe.to_toml(), len(recipes)),
        # A transposed convolution's scales have 4 axes, too, but quantize_layer has spread its tiles already.
        tiles=codes.scale.dim() == 4 and "transpose" not in op,
        channels_last=channels_last,
        k_order=matrix.K_ORDER,
        input_amax=None if codes.input_amax is None else float(codes.input_amax),
        call=call_of(module),
        shifted=codes.shift is not None,
        block_format=recipe.block_format,
        activations=activations,
    )


def tensors_of(name: str, codes: Codes, entry: LayerEntry, recipe: NVFP4BlockScaling) -> dict[str, Tensor]:
    """Return the tensors that the file holds of one quantized layer, by name."""
    data, scale = matrix.to_matrix(codes.data, codes.scale, entry.plan())
    found = {
        "weight": data,
        # The same bytes under their true dtype: other readers decode the scales by it.
        "weight_scale": scale.view(SCALES[entry.block_format][0]),
        "weight_scale_2": (codes.amax.float() * (1.0 / (6.0 * entry.e4m3_max))).reshape(()),
    }
    if codes.input_amax is not None:
        factor = 1.0 / (6.0 * recipe.settings("input").e4m3_max)
        found["input_scale"] = (codes.input_amax.float() * factor).reshape(())
    if codes.shift is not None:
        found |= zip(SHIFTS, codes.shift, strict=True)
    return {join(name, key): value for key, value in found.items()}


def codes_of(opened: Artifact, name: str, entry: LayerEntry, recipes: list[NVFP4BlockScaling]) -> Codes:
    """Return the codes of one layer of a file, in the layout of its kernels.

    Args:
        recipes: the manifest's recipes of single layers, parsed.
    Raises:
        ValueError: The layer's tensors are not what the manifest says.
    """
    data, scale = opened.tensors[join(name, "weight")], opened.tensors[join(name, "weight_scale")]
    plan, (kind, no_numbers) = entry.plan(), SCALES[entry.block_format]
    rows, taps, blocks = matrix.sizes(plan)
    if entry.k_order != matrix.K_ORDER:
        raise damaged_layer(opened, name, f"its matrix is in the order {entry.k_order!r}, not {matrix.K_ORDER!r}")
    if data.dtype != torch.uint8 or tuple(data.shape) != (rows, taps * blocks * 8):
        raise damaged_layer(opened, name, f"weight is {data.dtype} {tuple(data.shape)}")
    if scale.dtype != kind or tuple(scale.shape) != (rows, matrix.scales_of(plan)):
        raise damaged_layer(opened, name, f"weight_scale is {scale.dtype} {tuple(scale.shape)}")
    bits = scale.view(torch.uint8)  # few operators take E4M3
    if any(bool((bits == byte).any()) for byte in no_numbers):
        raise damaged_layer(opened, name, "weight_scale holds NaN")
    if entry.tiles and (entry.transposed or not matrix.has_tiles(bits, plan)):
        block = block_of(entry.block_format)
        raise damaged_layer(opened, name, f"weight_scale differs within a {block}x{block} tile")
    packed, scales = matrix.from_matrix(data, bits, plan)
    if entry.block_format != recipes[entry.recipe].block_format:
        raise damaged_layer(opened, name, f"its blocks are {entry.block_format}'s, not those of its recipe")
    if entry.e4m3_max != recipes[entry.recipe].settings("weight").e4m3_max:
        raise damaged_layer(opened, name, f"its scales reach {entry.e4m3_max}, not those of its recipe")
    shift = _shift_of(opened, name, entry, plan) if entry.shifted else None
    amax = torch.tensor([entry.amax], dtype=torch.float32)
    static = None if entry.input_amax is None else torch.tensor([entry.input_amax], dtype=torch.float32)
    # clone: the tensors are mapped from the file, which may be replaced while the model lives.
    return Codes(packed.clone(), scales.clone(), amax, static, shift)


def _shift_of(opened: Artifact, name: str, entry: LayerEntry, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return what a shifted layer subtracts from x and adds to y."""
    down, up = (opened.tensors[join(name, key)] for key in SHIFTS)
    sizes = {"input_shift": (down, entry.groups * matrix.channels(plan)), "output_shift": (up, entry.shape[0])}
    for key, (t, size) in sizes.items():
        if t.dtype != torch.float32 or tuple(t.shape) != (size,) or not bool(torch.isfinite(t).all()):
            raise damaged_layer(opened, name, f"{key} is {describe(t)}, or not finite")
    return down.clone(), up.clone()
