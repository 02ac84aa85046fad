"""nv.export.save and nv.export.load: a model to a packed artefact, and back into an unmodified architecture.

    save    quantizes every layer that the recipe runs in NVFP4, as its forward does, and writes codes and scales
    load    checks all names and shapes against the model, then turns its layers into InferenceLayers

The loaded model gives the outputs of the saved one, bit for bit, on the same backend. Refused: a model that does not
fit (all that is missing, unexpected or of another shape is listed, and nothing is changed), weights that are not
finite, sharded parameters.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from te_nvfp4_cv.errors import check_module, runtime_error, value_error
from te_nvfp4_cv.export import artifact, foreign, matrix
from te_nvfp4_cv.export.artifact import LayerEntry, Manifest
from te_nvfp4_cv.export.fit import call_of, check_fit, codes_of, entry_plan, is_plain_layer, plain_names
from te_nvfp4_cv.export.modules import CLASSES, Codes, InferenceLayer, become, quantize_layer
from te_nvfp4_cv.export.ptq.folding import FoldedNorm, folded_norms, put
from te_nvfp4_cv.layer import eligible
from te_nvfp4_cv.nn import learned
from te_nvfp4_cv.nn.names import plain_name
from te_nvfp4_cv.nn.precision import matches
from te_nvfp4_cv.nn.walk import op_of, with_recipes
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, as_recipe
from te_nvfp4_cv.recipe.files import parse_recipe
from te_nvfp4_cv.version import __version__

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Saved:
    """What `save` wrote.

    Attributes:
        files: the one to load first.
        quantized: names of the layers in NVFP4; high: of the others, with the reason.
        weight_bytes: of the quantized layers' codes and scales; plain_bytes: of their weights in fp32.
        total_bytes: of all files.
    """

    files: tuple[Path, ...]
    quantized: tuple[str, ...]
    high: dict[str, str]
    weight_bytes: int
    plain_bytes: int
    total_bytes: int

    def __str__(self) -> str:
        ratio = f"{self.weight_bytes / self.plain_bytes:.4f} of fp32" if self.plain_bytes else "nothing to pack"
        lines = [f"{self.files[0]}: {self.total_bytes / 1e6:.2f} MB; {len(self.quantized)} layers in NVFP4 ({ratio})"]
        return "\n".join(lines + [f"  {name}: high precision: {reason}" for name, reason in self.high.items()])


# ---- save -----------------------------------------------------------------------------------------------------------


def save(model: nn.Module, path: str | os.PathLike[str], recipe: Any = None, shard_bytes: int = SHARD_BYTES) -> Saved:
    """Write a trained model, or one whose layers are InferenceLayers, as a packed artefact.

    Args:
        path: of the file; ".safetensors" is added where it is missing. A file that is there is replaced as a whole.
        recipe: the one that the model was trained with, its [precision] table included; None: TransformerEngine's
            default. Entries of nv.set_precision and recipes of NVFP4 modules rule over it, as in training.
        shard_bytes: more bytes than this are written as several files and an index.
    Raises:
        TypeError: no module, no recipe; ValueError: a pattern of the recipe's table that matches nothing, a weight that
            is not finite, a state_dict with something other than tensors; RuntimeError: a sharded model, a file that
            cannot be written.
    """
    check_module("nv.export.save", model, "nv.export.save(model, path)")
    target = Path(path)
    if not target.name:
        raise value_error(
            "nv.export.save: the path names no file.", got=repr(str(path)), needs="a file", fix="model.safetensors"
        )
    plain_names("nv.export.save", model)
    resolved = as_recipe(recipe)
    resolved.validate_for_use()
    quantized, high = sort_layers(model, resolved)
    tensors = _plain_tensors(model, {id(module) for module, _ in quantized.values()})
    entries: dict[str, LayerEntry] = {}
    recipes: list[str] = []
    packed = plain = 0
    for name, (module, own) in quantized.items():
        codes, entry = _entry(name, module, own, recipes)
        made = _layer_tensors(name, codes, entry, own)
        packed += sum(t.numel() * t.element_size() for t in made.values())
        plain += 4 * torch.Size(entry.shape).numel()
        tensors |= made
        entries[name] = entry
    folded = folded_norms(model, plain_name)
    manifest = Manifest(__version__, resolved.to_toml(), tuple(recipes), entries, high, folded)
    config = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
        "ignore": sorted(high),
        "producer": {"name": "te_nvfp4_cv", "version": __version__},
    }
    if not target.name.endswith((artifact.SUFFIX, artifact.INDEX)):
        target = target.with_name(target.name + artifact.SUFFIX)
    files = artifact.write(target, tensors, manifest, config, shard_bytes)
    size = sum(file.stat().st_size for file in files)
    return Saved(tuple(files), tuple(quantized), high, packed, plain, size)


def sort_layers(
    model: nn.Module, recipe: NVFP4BlockScaling
) -> tuple[dict[str, tuple[nn.Module, NVFP4BlockScaling]], dict[str, str]]:
    """({name: (layer that is quantized, its recipe)}, {name: why another layer is not})."""
    table = matches(model, list(recipe.precision))
    quantized: dict[str, tuple[nn.Module, NVFP4BlockScaling]] = {}
    high: dict[str, str] = {}
    for name, module, own in with_recipes(model, recipe, table):
        if isinstance(module, InferenceLayer):
            quantized[name] = (module, module.recipe)
        elif isinstance(module, tuple(CLASSES)):
            reason = _why_high(module, own)
            if reason is None:
                assert own is not None
                quantized[name] = (module, own)
            else:
                high[name] = reason
    return quantized, high


def _why_high(module: Any, recipe: NVFP4BlockScaling | None) -> str | None:
    if recipe is None:
        return "the precision table says so"
    if not is_plain_layer(module):
        return f"{type(module).__name__}: a subclass of torch's layer"
    if "weight" not in module._parameters:
        return "its weight is computed"
    if "fprop" not in recipe.nvfp4_gemms:
        return "the recipe runs fprop in high precision"
    w = module.weight
    if hasattr(w, "to_local") or type(w.data) is not Tensor:
        raise runtime_error(
            "nv.export.save: the model is sharded.",
            got=f"{type(w.data).__name__} as a weight",
            needs="plain tensors",
            fix="gather the state_dict (torch.distributed.checkpoint.state_dict, full_state_dict=True) into a model",
        )
    return eligible.ineligible(op_of(module), w, w, getattr(module, "groups", 1), recipe)


def _plain_tensors(model: nn.Module, quantized: set[int]) -> dict[str, Tensor]:
    """The state_dict without what quantized layers hold of their weights."""
    skipped = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in quantized:
            own = ("weight", "weight_data", "weight_scale", "weight_bits", "input_bits", *learned.NAMES.values())
            skipped |= {f"{name}.{key}".lstrip(".") for key in own}
    tensors = {}
    for name, value in model.state_dict().items():
        if name in skipped:
            continue
        if not isinstance(value, Tensor):
            raise value_error(
                "nv.export.save: the state_dict holds something other than tensors.",
                got=f"{name!r}: {type(value).__name__}",
                needs="tensors",
                fix="keep it as a buffer",
            )
        tensors[plain_name(name)] = value.detach().clone(memory_format=torch.contiguous_format)
    return tensors


def _entry(name: str, module: Any, recipe: NVFP4BlockScaling, recipes: list[str]) -> tuple[Codes, LayerEntry]:
    if isinstance(module, InferenceLayer):
        codes = Codes(module.weight_data, module.weight_scale, module.weight_amax, module.input_amax)
        shape, op, channels_last = tuple(module.weight_shape), module.op, module.channels_last
    else:
        codes, shape = quantize_layer(module, recipe), tuple(module.weight.shape)
        op, channels_last = op_of(module), layouts.is_channels_last(module.weight)
    amax = float(codes.amax)
    if not torch.isfinite(codes.amax).all():
        raise value_error(
            f"nv.export.save: the weight of {name!r} is not finite.",
            got=f"amax {amax}",
            needs="finite weights",
            fix="load a checkpoint from before the training diverged (te-nvfp4-cv diagnose finds the step)",
        )
    text = recipe.to_toml()
    if text not in recipes:
        recipes.append(text)
    return codes, LayerEntry(
        op=op,
        shape=shape,
        groups=getattr(module, "groups", 1),
        amax=amax,
        e4m3_max=recipe.settings("weight").e4m3_max,
        recipe=recipes.index(text),
        tiles=codes.scale.dim() == 4 and "transpose" not in op,
        channels_last=channels_last,
        k_order=matrix.K_ORDER,
        input_amax=None if codes.input_amax is None else float(codes.input_amax),
        call=call_of(module),
    )


def _layer_tensors(name: str, codes: Codes, entry: LayerEntry, recipe: NVFP4BlockScaling) -> dict[str, Tensor]:
    form = NVFP4BlockScaling(disable_2d_quantization=not entry.tiles)
    data, scale = matrix.to_matrix(codes.data, codes.scale, entry_plan(entry, form))
    found = {
        "weight": data,
        "weight_scale": scale.view(torch.float8_e4m3fn),
        "weight_scale_2": (codes.amax.float() * (1.0 / (6.0 * entry.e4m3_max))).reshape(()),
    }
    if codes.input_amax is not None:
        factor = 1.0 / (6.0 * recipe.settings("input").e4m3_max)
        found["input_scale"] = (codes.input_amax.float() * factor).reshape(())
    prefix = f"{name}." if name else ""
    return {prefix + key: value for key, value in found.items()}


# ---- load -----------------------------------------------------------------------------------------------------------


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    weights: str = "packed",
    activations: str = "nvfp4",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    verify: bool = True,
) -> nn.Module:
    """Make a model of the saved architecture an NVFP4 inference model, in place: eval mode, no gradients.

    Files of ModelOpt and compressed-tensors are read, too: their NVFP4 linear layers (foreign.py).

    Args:
        model: as its constructor gives it, on any device ("meta" too: then its other tensors are the file's).
        weights, activations: how its layers run, as InferenceLayer.set_mode takes them; dtype: of cached weights.
        verify: compare all checksums first, which reads all bytes.
    Returns:
        The model.
    Raises:
        FileNotFoundError; ValueError: a damaged or foreign file, one of another version, a model that does not fit.
            Nothing is changed then.
    """
    check_module("nv.export.load", model, "nv.export.load(path, model)")
    opened = artifact.read(path)
    if verify:
        opened.check()
    if opened.manifest is None:
        opened = foreign.adopt(opened, model)
    manifest = opened.manifest
    assert manifest is not None
    layers = check_fit(opened, manifest, model)
    recipes = [parse_recipe(text, opened.source) for text in manifest.recipes]
    codes = {name: codes_of(opened, name, manifest.layers[name], recipes) for name in layers}
    meta = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    device = next((t.device for t in model.parameters() if not t.is_meta), torch.device("cpu"))
    modules = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    full = {plain_name(name): name for name, _ in model.named_modules(remove_duplicate=False)}
    for norm, name in manifest.folded.items():
        layer_module: Any = modules[name]
        own = device if layer_module.weight.is_meta else layer_module.weight.device
        if layer_module.bias is None:
            layer_module.bias = nn.Parameter(torch.empty_like(opened.tensors[f"{name}.bias"], device=own))
        put(model, full[norm], FoldedNorm(layer_module))
    for name, module in layers.items():
        entry, w = manifest.layers[name], cast(Tensor, module.weight)
        layer = become(module, codes[name], recipes[entry.recipe], backend)
        layer.channels_last = entry.channels_last
        for key, buffer in layer._buffers.items():
            layer._buffers[key] = None if buffer is None else buffer.to(device if w.is_meta else w.device)
    parts = {"weight", "weight_scale", "weight_scale_2", "input_scale"}
    packed = {f"{name}.{key}".lstrip(".") for name in layers for key in parts}
    rest = {name: t for name, t in opened.tensors.items() if name not in packed}
    names = plain_names("nv.export.load", model)
    state = {names[name]: t.clone() if meta else t for name, t in rest.items()}
    model.load_state_dict(state, strict=False, assign=meta)
    for module in layers.values():
        module.set_mode(weights, activations, dtype)  # type: ignore[operator]
    return model.eval().requires_grad_(False)
