"""Save a model as a packed file and load it again: nv.export.save and nv.export.load.

    save    quantizes every layer that the recipe runs in NVFP4, as its forward does, and writes codes and scales
    load    checks all names and shapes against the model, then turns its layers into InferenceLayers

The loaded model gives the outputs of the saved one, bit for bit, on the same backend. A model that does not fit the
file is refused: everything that is missing, unexpected or of another shape is listed, and nothing is changed. Weights
that are not finite and sharded parameters are refused, too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.errors import check_module, check_path, value_error
from te_nvfp4_cv.export import artifact, attention, foreign
from te_nvfp4_cv.export.computed import keys_of
from te_nvfp4_cv.export.fit import (
    Sorted,
    averaging_counts,
    bias_mark,
    check_fit,
    kernel_of,
    plain_modules,
    plain_names,
    shown,
    sort_layers,
    stay_high,
)
from te_nvfp4_cv.export.folding import FoldedNorm, folded_norms
from te_nvfp4_cv.export.inner import around, install, share_bias
from te_nvfp4_cv.export.layer_tensors import codes_of, entry_of, tensors_of
from te_nvfp4_cv.export.left_high import warn_of_high
from te_nvfp4_cv.export.manifest import PARTS, LayerEntry, Manifest, join, settings_of
from te_nvfp4_cv.export.modules import become, check_modes
from te_nvfp4_cv.export.ranks import gathered, written_once
from te_nvfp4_cv.layer.check import checked_recipe
from te_nvfp4_cv.layer.names import plain_name
from te_nvfp4_cv.nn import learned
from te_nvfp4_cv.nn.walk import like_weight
from te_nvfp4_cv.ops.block_scales import block_of
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.recipe.files import parse_recipe
from te_nvfp4_cv.version import __version__

SHARD_BYTES = 5 * 10**9  # the size at which Hugging Face's tools cut files, too


@dataclass(frozen=True)
class Saved:
    """The result of nv.export.save; print it for a summary.

    Attributes:
        files: the files that were written, beginning with the one to load.
        quantized: names of the layers in NVFP4.
        high: names of the other convolutions and linear layers, with the reason.
        weight_bytes: size of the quantized layers' codes and scales.
        plain_bytes: size of the same layers' weights in fp32.
        total_bytes: size of all files.

    Example:
        >>> import tempfile, torch, te_nvfp4_cv as nv
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = nv.export.save(torch.nn.Conv2d(32, 32, 3), f"{folder}/layer.safetensors")
        >>> saved.plain_bytes, saved.weight_bytes
        (36864, 5188)
    """

    files: tuple[Path, ...]
    quantized: tuple[str, ...]
    high: dict[str, str]
    weight_bytes: int
    plain_bytes: int
    total_bytes: int

    def __str__(self) -> str:
        ratio = f"{self.weight_bytes / self.plain_bytes:.4f} of fp32" if self.plain_bytes else "nothing to pack"
        lines = [f"{self.files[0]}: {self.total_bytes / 1e6:.2f} MB; {len(self.quantized)} layers in 4 bits ({ratio})"]
        return "\n".join(lines + [f"  {name}: high precision: {reason}" for name, reason in self.high.items()])


# ---- save -----------------------------------------------------------------------------------------------------------


def save(model: nn.Module, path: str | os.PathLike[str], recipe: Any = None, shard_bytes: int = SHARD_BYTES) -> Saved:
    """Write a trained model, or one whose layers are InferenceLayers, as a packed file.

    A model that nv.tensor_parallel has shared out is gathered: call this on every rank; the first one writes.

    Args:
        path: where to write; ".safetensors" is added if it is missing. An existing file is replaced as a whole.
        recipe: the recipe that the model was trained with, with its [precision] table. If None, TransformerEngine's
            default recipe is used. Entries of nv.set_precision and recipes of NVFP4 modules take precedence over it,
            as in training.
        shard_bytes: more bytes than this are written as several files and an index.
    Returns:
        A summary: files, layers and sizes.
    Raises:
        TypeError: `model` is no module, or `recipe` is no recipe.
        ValueError: A pattern of the recipe's table matches nothing, a weight is not finite, the state_dict holds
            something that no safetensors file does, or a recipe has activation_shift.
        RuntimeError: The model is sharded, or a file cannot be written.

    Example:
        >>> import tempfile, torch, te_nvfp4_cv as nv
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = nv.export.save(model, f"{folder}/net.safetensors")
        >>> saved.quantized, list(saved.high)
        (('2',), ['0'])
    """
    check_module("nv.export.save", model, "nv.export.save(model, path)")
    target = check_path("nv.export.save", path, "model.safetensors")
    model, group = gathered(model)
    # For its errors only: two tensors of one name would overwrite each other in the file.
    plain_names("nv.export.save", model)
    resolved = checked_recipe(recipe)
    with attention.separated(model, resolved):
        tensors, manifest, sizes = _packed(model, resolved)
    formats = sorted({entry.block_format for entry in manifest.layers.values()}) or ["nvfp4"]
    # Other tools read this part of the metadata; load reads the manifest.
    config = {
        "quant_method": "modelopt", "quant_algo": "+".join(formats).upper(), "group_size": block_of(formats[0]),
        "ignore": sorted(manifest.high),
        "producer": {"name": "te_nvfp4_cv", "version": __version__},
    }
    if not target.name.endswith((artifact.SUFFIX, artifact.INDEX)):
        target = target.with_name(target.name + artifact.SUFFIX)
    files = written_once(group, lambda: artifact.write(target, tensors, manifest, config, shard_bytes))
    size = sum(file.stat().st_size for file in files)
    modules = plain_modules(model)
    names = dict.fromkeys(attention.fused_name(modules, shown(name, manifest.inner)) for name in manifest.layers)
    return Saved(tuple(files), tuple(names), manifest.high, *sizes, size)


def _packed(model: nn.Module, resolved: NVFP4BlockScaling) -> tuple[dict[str, Tensor], Manifest, tuple[int, int]]:
    """Return the tensors of a model's file, its manifest, and the bytes of the layers in NVFP4, packed and in fp32."""
    found = sort_layers(model, resolved)
    quantized, high = found.quantized, found.high
    warn_of_high("nv.export.save", found.quantized, found.high, found.lost)
    tensors = _plain_tensors(model, found)
    entries: dict[str, LayerEntry] = {}
    recipes: dict[str, int] = {}
    packed = plain = 0
    # Most layers share a recipe: the file holds each recipe once, and the entries hold its index.
    for name, (module, own) in quantized.items():
        kernel = found.inner.get(name)
        codes, entry = entry_of(name, module, own, recipes, None if kernel is None else kernel.trained)
        made = tensors_of(name, codes, entry, own)
        packed += sum(t.numel() * t.element_size() for t in made.values())
        plain += 4 * torch.Size(entry.shape).numel()  # fp32
        tensors |= made
        entries[name] = entry
    inner = {plain_name(name): bias_mark(layer.nvfp4_bias, layer.nvfp4_computed) for name, layer in around(model)}
    inner |= {name: bias_mark(kernel.bias, kernel.computed) for name, kernel in found.inner.items()}
    in_nvfp4 = {id(module) for module, _ in quantized.values()}
    others = {name: settings_of(m) for name, m in plain_modules(model).items() if id(m) not in in_nvfp4}
    settings = {name: known for name, known in others.items() if known}
    manifest = Manifest(
        __version__, resolved.to_toml(), tuple(recipes), entries, high, folded_norms(model), inner=inner,
        settings=settings,
    )
    return tensors, manifest, (packed, plain)


def _plain_tensors(model: nn.Module, found: Sorted) -> dict[str, Tensor]:
    """Copy the state_dict, except the weights of quantized layers."""
    # By id: a module that is used in two places has two names in the state_dict, and neither's weight is copied.
    quantized = {id(module) for module, _ in found.quantized.values()}
    inner = {(id(kernel.module), kernel.key) for kernel in found.inner.values()}
    inside = {id(layer) for _, layer in around(model)}
    skipped = averaging_counts(model)
    for name, module in model.named_modules(remove_duplicate=False):
        skipped |= {join(name, key) for owner, key in inner if owner == id(module)}
        if id(module) in quantized:
            keys = {"weight", "weight_data", "weight_scale", "weight_bits", "input_bits", "shift_bits", "lift_bits"}
            keys |= {*learned.NAMES.values()}
            keys |= keys_of(module) | ({"bias"} if id(module) in inside else set())  # that of the module around it
            skipped |= {join(name, key) for key in keys}
    tensors = {}
    for name, value in model.state_dict().items():
        if name in skipped:
            continue
        if not isinstance(value, Tensor) or not artifact.holds(value):
            tensor = isinstance(value, Tensor)
            kind = f"{value.dtype}, {value.layout}, {value.device}" if tensor else type(value).__name__
            raise value_error(
                "nv.export.save: the state_dict holds something that no safetensors file does.",
                got=f"{name!r}: {kind}",
                needs="dense tensors with values, of torch's common dtypes",
                fix="keep it as such a tensor, or out of the state_dict: register_buffer(..., persistent=False)",
            )
        # clone: tied parameters share memory, which safetensors refuses to write.
        tensors[plain_name(name)] = value.detach().clone(memory_format=torch.contiguous_format)
    return tensors


# ---- load -----------------------------------------------------------------------------------------------------------


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    weights: str = "packed",
    activations: str | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    verify: bool = True,
) -> nn.Module:
    """Turn a model of the saved architecture into the NVFP4 inference model of a file, in place.

    Files of ModelOpt and compressed-tensors are read, too, as far as their NVFP4 linear layers go (foreign.py).

    Args:
        path: a file of nv.export.save, or the index of several.
        model: the model as its constructor gives it, on any device. On "meta", the tensors that are not quantized
            are taken from the file as they are.
        weights: "packed" or "cached", as InferenceLayer.set_mode takes it.
        activations: "nvfp4" or "high", as InferenceLayer.set_mode takes it. If None, what the file is meant for: each
            layer runs as it did in the model that was saved. In another tool's file those layers are "high" whose
            config quantizes weights only, which a note says.
        dtype: the dtype of cached weights; fp32 if None.
        backend: where the layers run ("auto", "reference", ...), as nv.nvfp4_autocast takes it.
        verify: compare all checksums first, which reads all bytes.
    Returns:
        The same model, in eval mode, without gradients.
    Raises:
        TypeError: `model` is no module.
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, of another version or of an unknown tool, the model does not fit it, or
            `weights`, `activations`, `dtype` or `backend` has another value. Nothing is changed then.
        RuntimeError: `backend` cannot run here. Nothing is changed then.

    Example:
        >>> import tempfile, torch, te_nvfp4_cv as nv
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = nv.export.save(torch.nn.Conv2d(32, 32, 3), f"{folder}/layer")
        ...     model = nv.export.load(saved.files[0], torch.nn.Conv2d(32, 32, 3), weights="cached")
        >>> type(model).__name__
        'InferenceConv2d'
    """
    check_module("nv.export.load", model, "nv.export.load(path, model)")
    # All choices before the file is read and the model changes.
    dispatch.check_possible(backend)
    check_modes("nv.export.load", weights, activations, dtype)
    opened = artifact.read(path)
    if verify:
        opened.check()
    modules = plain_modules(model)
    high: set[str] = set()  # layers whose activations the file leaves in high precision
    if opened.manifest is None:
        if activations is None:
            high = foreign.weight_only(opened)
        opened = foreign.adopt(opened, modules)
    manifest = opened.manifest
    assert manifest is not None
    high |= {name for name, entry in manifest.layers.items() if entry.activations == "high"}
    with attention.separated_like(manifest.inner, modules):  # an error puts it back
        layers = check_fit(opened, manifest, model)
        recipes = [parse_recipe(text, opened.source) for text in manifest.recipes]
        # Last of the checks: the model changes only after everything that can be refused has been.
        codes = {name: codes_of(opened, name, entry, recipes) for name, entry in manifest.layers.items()}
        norms = {norm: FoldedNorm(modules[name], modules[norm]) for norm, name in manifest.folded.items()}
    meta = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    device = next((t.device for t in model.parameters() if not t.is_meta), torch.device("cpu"))
    kernels = {name: kernel_of(manifest.layers[name], name, mark, modules) for name, mark in manifest.inner.items()}
    install(kernels.values())
    layers |= {name: kernel.layer for name, kernel in kernels.items()}
    full = {plain_name(name): name for name, _ in model.named_modules(remove_duplicate=False)}
    for norm, name in manifest.folded.items():
        layer_module: Any = modules[name]
        if layer_module.bias is None:  # the norm's shift needs a place
            own = device if layer_module.weight.is_meta else layer_module.weight.device
            # Without values: load_state_dict below fills it, like the biases that the model has already.
            layer_module.bias = nn.Parameter(torch.empty_like(opened.tensors[f"{name}.bias"], device=own))
        model.set_submodule(full[norm], norms[norm])
    for name, module in layers.items():
        entry, w = manifest.layers[name], like_weight(module)
        layer = become(module, codes[name], recipes[entry.recipe], backend)
        layer.channels_last = entry.channels_last  # the fresh model may have another memory format
        for key, buffer in layer._buffers.items():
            # Each layer's own device, so that a model that lies on two GPUs stays there.
            layer._buffers[key] = None if buffer is None else buffer.to(device if w.is_meta else w.device)
    packed = {join(name, key) for name in layers for key in PARTS}
    names = plain_names("nv.export.load", model)
    # The mapped tensors are cloned where the model takes them over: the file may be replaced later.
    state = {names[name]: t.clone() if meta else t for name, t in opened.tensors.items() if name not in packed}
    if meta:  # what no file holds needs a value, too
        state = {name: torch.zeros((), dtype=torch.long, device=device) for name in averaging_counts(model)} | state
    # With the versions of the model's modules, as torch saves them beside the tensors: some classes ask for theirs.
    versioned = model.state_dict()
    versioned.clear()
    versioned.update(state)
    # check_fit has compared all names. torch's own method: that of a class may be made for whole states of older forms
    # of the model (Demucs renames their keys), and this one lacks what is packed.
    nn.Module.load_state_dict(model, versioned, strict=False, assign=meta)
    for kernel in kernels.values():  # the model may have other Parameters now
        share_bias(kernel)
    for name, module in layers.items():
        mode = activations or ("high" if name in high else "nvfp4")
        # After all tensors are in place: cached weights are computed here, on the layer's final device.
        module.set_mode(weights, mode, dtype)  # type: ignore[operator]
    stay_high(model, manifest.high)
    return model.eval().requires_grad_(False)
