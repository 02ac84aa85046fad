"""Read packed checkpoints of other tools as if this library had written them, as far as their NVFP4 linear layers go.

    ModelOpt             weight, weight_scale, weight_scale_2            value = code * weight_scale * weight_scale_2
                         input_scale                                     amax / (6 E) of the activations
    compressed-tensors   weight_packed, weight_scale, weight_global_scale    value = code * weight_scale / global_scale
                         input_global_scale                                  6 E / amax of the activations

Here E = 448. The amax that our kernels need is weight_scale_2 * 2688, or 2688 / global_scale, in fp32. All other
tensors of the file are taken as they are. Its activation scales become static ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.export import matrix
from te_nvfp4_cv.export.artifact import Artifact
from te_nvfp4_cv.export.manifest import LayerEntry, Manifest, join
from te_nvfp4_cv.export.verify.inspection_config import read_config
from te_nvfp4_cv.formats import BLOCK, E2M1_MAX, E4M3_MAX
from te_nvfp4_cv.nn.modules import NVFP4Linear
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

LARGEST = E2M1_MAX * E4M3_MAX  # 2688, the largest value of code times block scale
NAMES = {  # tool: (weight, tensor scale, activation scale, True if these scales are reciprocals)
    "ModelOpt": ("weight", "weight_scale_2", "input_scale", False),
    "compressed-tensors": ("weight_packed", "weight_global_scale", "input_global_scale", True),
}
SCALES = ("k_scale", "v_scale")  # they belong to caches of keys and values, which models here do not have


def adopt(opened: Artifact, modules: Mapping[str, nn.Module]) -> Artifact:
    """Return a file of another tool with the names and the manifest that this library would have written.

    Args:
        modules: the model's modules by name.
    Raises:
        ValueError: The file holds no NVFP4 layer, a layer's tensors do not belong together, or a layer is not linear.
    """
    tensors = {name: t for name, t in opened.tensors.items() if name.rpartition(".")[2] not in SCALES}
    # No tool writes which recipe it used; what inference needs of one follows from the format.
    recipe = NVFP4BlockScaling(disable_2d_quantization=True)  # a scale for each 16 values, no 16x16 tiles
    layers: dict[str, LayerEntry] = {}
    for tool, (weight, tensor_scale, input_scale, _) in NAMES.items():
        # Only NVFP4 layers have a tensor scale of that name, so it marks them better than `weight` does.
        for key in [key for key in opened.tensors if key.rpartition(".")[2] == tensor_scale]:
            name = key.rpartition(".")[0]
            module: Any = modules.get(name)
            if type(module) not in (nn.Linear, NVFP4Linear):
                raise _unfit(opened, name, f"it is {type(module).__name__} in the model", "an nn.Linear of that name")
            keys = (weight, tensor_scale, input_scale, "weight_scale")
            parts = {part: tensors.pop(join(name, part), None) for part in keys}
            layers[name] = _entry(opened, name, parts, module, tool)
            codes, scale = parts[weight], parts["weight_scale"]
            assert codes is not None and scale is not None
            tensors |= {join(name, "weight"): codes, join(name, "weight_scale"): scale}
            # The loader takes the amax from the manifest; check_fit only asks whether this tensor is there.
            tensors[join(name, "weight_scale_2")] = torch.tensor(layers[name].amax / LARGEST)
    if not layers:
        raise value_error(
            f"{opened.source} holds no NVFP4 layer that is known here.",
            got=f"{len(opened.tensors)} tensors, no manifest, no {', '.join(n[1] for n in NAMES.values())}",
            needs="a file of nv.export.save, ModelOpt or compressed-tensors",
            fix="nv.export.save(model, path)",
        )
    manifest = Manifest("another tool", "", (recipe.to_toml(),), layers, {})
    return replace(opened, tensors=tensors, manifest=manifest)


def weight_only(opened: Artifact) -> set[str]:
    """Return the NVFP4 layers whose activations the file's config leaves in high precision, and warn which they are.

    Without a config all activations are in NVFP4: a layer without a scale of them may have a dynamic one.
    """
    config = read_config(opened.config, Path(opened.source).parent)
    marks = {names[1] for names in NAMES.values()}
    layers = [key.rpartition(".")[0] for key in opened.tensors if key.rpartition(".")[2] in marks]
    found = {name for name in layers if config.activations_of(name) == "high"}
    if found:
        warnings.warn(
            f"nv.export.load: {opened.source} quantizes weights only ({len(found)} of {len(layers)} layers): their "
            "activations run in high precision. activations='nvfp4' quantizes them, too",
            UserWarning,
            stacklevel=3,
        )
    return found


def _entry(opened: Artifact, name: str, parts: Mapping[str, Tensor | None], module: nn.Linear, tool: str) -> LayerEntry:
    """Describe one layer of another tool's file. The tools pack two codes to a byte in the same order as we do."""
    weight, tensor_scale, input_scale, reciprocal = NAMES[tool]
    codes, scale = parts[weight], parts["weight_scale"]
    columns = -(-module.in_features // BLOCK) * BLOCK  # rounded up to whole blocks
    needed = (module.out_features, columns // 2), (module.out_features, columns // BLOCK)
    if codes is None or scale is None:
        raise _unfit(opened, name, f"{weight} or weight_scale is missing", "both")
    if codes.dtype != torch.uint8 or scale.dtype != torch.float8_e4m3fn:
        raise _unfit(opened, name, f"codes {codes.dtype}, scales {scale.dtype}", "uint8 and float8_e4m3fn")
    if (tuple(codes.shape), tuple(scale.shape)) != needed:
        raise _unfit(
            opened, name, f"codes {tuple(codes.shape)}, scales {tuple(scale.shape)}", f"{needed[0]}, {needed[1]}"
        )
    return LayerEntry(
        op="linear", shape=(module.out_features, module.in_features), groups=1,
        amax=_amax(opened, name, parts[tensor_scale], reciprocal), e4m3_max=E4M3_MAX, recipe=0, tiles=False,
        channels_last=False, k_order=matrix.K_ORDER,
        input_amax=None if parts[input_scale] is None else _amax(opened, name, parts[input_scale], reciprocal),
    )


def _amax(opened: Artifact, name: str, scale: Tensor | None, reciprocal: bool) -> float:
    """Return the amax that a tensor scale stands for."""
    if scale is None or scale.numel() != 1 or scale.dtype != torch.float32 or not bool(torch.isfinite(scale).all()):
        shown = "nothing" if scale is None else f"{scale.dtype} {tuple(scale.shape)}"
        raise _unfit(opened, name, f"a tensor scale of {shown}", "one finite fp32 number")
    if float(scale) <= 0:
        raise _unfit(opened, name, f"a tensor scale of {float(scale)}", "a positive one")
    # Tensors, not floats: the product has to be rounded to fp32, which the kernels take.
    largest = torch.tensor(LARGEST)
    amax = float(largest / scale.reshape(()) if reciprocal else scale.reshape(()) * largest)
    if not 0.0 < amax < math.inf:
        raise _unfit(opened, name, f"a tensor scale of {float(scale)}", "one whose amax is an fp32 number")
    return amax


def _unfit(opened: Artifact, name: str, got: str, needs: str) -> ValueError:
    return value_error(
        f"{opened.source}: the layer {name!r} cannot be taken over.", got=got, needs=needs,
        fix="export it again; layers other than linear ones: nv.export.quantize(model, images)",
    )
