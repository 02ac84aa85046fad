"""Does a model fit an artefact? What nv.export.load asks before it changes anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.export import artifact, matrix
from te_nvfp4_cv.export.artifact import Artifact, LayerEntry, Manifest
from te_nvfp4_cv.export.modules import CLASSES, Codes, InferenceLayer, per_axis
from te_nvfp4_cv.export.ptq.folding import NORMS
from te_nvfp4_cv.layer.plan import Plan, weight_plan
from te_nvfp4_cv.nn.modules import NVFP4_CLASSES
from te_nvfp4_cv.nn.names import plain_name
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

CALL = ("stride", "padding", "dilation", "output_padding", "padding_mode")


def is_plain_layer(module: nn.Module) -> bool:
    """Whether a layer's forward is torch's own: its class is, or one of modules.py, and no subclass."""
    return type(module) in NVFP4_CLASSES or type(module) in NVFP4_CLASSES.values()


def plain_names(where: str, model: nn.Module) -> dict[str, str]:
    """{plain name: name in the state_dict}; ValueError where two of them would be one."""
    names: dict[str, str] = {}
    for name in model.state_dict():
        other = names.setdefault(plain_name(name), name)
        if other != name:
            raise value_error(
                f"{where}: two tensors of the model have one name.",
                got=f"{other!r} and {name!r}: a part `module` is taken for a wrapper's (DistributedDataParallel)",
                needs="names that differ otherwise",
                fix="call the attribute something else than `module`",
            )
    return names


def call_of(module: nn.Module) -> dict[str, Any]:
    """How a layer is called, for the manifest; {} of a linear one. "same" and "valid" are numbers where they can be."""
    found: dict[str, Any] = {}
    for name in CALL:
        value: Any = getattr(module, name, None)
        if isinstance(value, (int, tuple, list)):
            found[name] = list(per_axis(module, value))
        elif value is not None:
            found[name] = value
    if found.get("padding") == "valid":
        found["padding"] = [0] * len(found["dilation"])
    elif found.get("padding") == "same":
        kernel: Any = module.kernel_size
        totals = [d * (k - 1) for d, k in zip(found["dilation"], kernel, strict=True)]
        found["padding"] = "same" if any(total % 2 for total in totals) else [total // 2 for total in totals]
    return found


def entry_plan(entry: LayerEntry, recipe: NVFP4BlockScaling) -> Plan:
    """The weight's part of a plan, of a layer as the manifest describes it."""
    return weight_plan(torch.Size(entry.shape), entry.groups, entry.transposed, recipe, "reference")


def check_fit(opened: Artifact, manifest: Manifest, model: nn.Module) -> dict[str, nn.Module]:
    """The model's layers that the artefact holds in NVFP4, by name."""
    plain_names("nv.export.load", model)
    lost_buffers = [
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        for key in module._non_persistent_buffers_set
        if (buffer := module._buffers.get(key)) is not None and buffer.is_meta
    ]
    if lost_buffers:
        raise value_error(
            "nv.export.load: buffers on the meta device are in no file.",
            got=_listed(lost_buffers),
            needs="a model whose buffers outside of the state_dict have values",
            fix="build it on the CPU",
        )
    modules: dict[str, Any] = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    state = {plain_name(name): value for name, value in model.state_dict().items()}
    expected: dict[str, tuple[int, ...]] = {name: tuple(t.shape) for name, t in opened.tensors.items()}
    missing, shapes = [], []
    for name, entry in manifest.layers.items():
        prefix = f"{name}." if name else ""
        for key in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
            if expected.pop(prefix + key, None) is None and key != "input_scale":
                raise damaged_layer(opened, name, f"{prefix + key} is missing")
        expected[f"{prefix}weight"] = entry.shape
        module = modules.get(name)
        if module is None:
            continue
        kind = next((ours.op for plain, ours in NVFP4_CLASSES.items() if isinstance(module, plain)), None)
        groups = getattr(module, "groups", 1)
        if isinstance(module, InferenceLayer) or (kind and not is_plain_layer(module)):
            shapes.append(f"{name}: {type(module).__qualname__}, a subclass of torch's layer, in the file {entry.op}")
        elif kind != entry.op or groups != entry.groups:
            shapes.append(
                f"{name}: {type(module).__name__} (groups={groups}), in the file {entry.op} (groups={entry.groups})"
            )
        else:
            own = call_of(module)
            differing = [key for key in entry.call.keys() & own.keys() if entry.call[key] != own[key]]
            shapes += [f"{name}: {key} {own[key]}, in the file {entry.call[key]}" for key in sorted(differing)]
    quantized = {id(modules[name]) for name in manifest.layers if name in modules}
    aliases = {f"{name}.weight" for name, module in modules.items() if id(module) in quantized}  # of shared modules
    norms = tuple(f"{name}." for name in manifest.folded)
    biases = {f"{name}.bias" for name in manifest.folded.values()}
    missing = [name for name in state if name not in expected and name not in aliases and not name.startswith(norms)]
    unexpected = [name for name in expected if name not in state and name not in biases]
    unexpected += [name for name in manifest.folded if name not in modules]
    shapes += [
        f"{name}: {tuple(state[name].shape)}, in the file {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if missing or unexpected or shapes:
        parts = (("not in the file", missing), ("not in the model", unexpected), ("of another shape or kind", shapes))
        raise value_error(
            f"nv.export.load: the model is not the one that {opened.source} was saved from.",
            got="; ".join(f"{what}: {_listed(names)}" for what, names in parts if names),
            needs="the same architecture, before it was converted",
            fix="build the model as it was built for training (classes, width, inputs)",
        )
    for norm, name in manifest.folded.items():
        layer = modules.get(name)
        foldable = isinstance(modules[norm], NORMS) and isinstance(layer, tuple(CLASSES))
        bias = opened.tensors.get(f"{name}.bias")
        if not foldable or bias is None or tuple(bias.shape) != (modules[norm].num_features,):
            raise artifact.damaged(opened.source, f"{norm!r} is said to be folded into {name!r}")
    return {name: modules[name] for name in manifest.layers}


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def damaged_layer(opened: Artifact, name: str, why: str) -> ValueError:
    """The error for a layer whose tensors are not what the manifest says."""
    return artifact.damaged(opened.source, f"layer {name!r}: {why}")


def codes_of(opened: Artifact, name: str, entry: LayerEntry, recipes: list[NVFP4BlockScaling]) -> Codes:
    """The codes of one layer, as its kernels take them; ValueError where its tensors do not fit the manifest."""
    prefix = f"{name}." if name else ""
    data, scale = opened.tensors[f"{prefix}weight"], opened.tensors[f"{prefix}weight_scale"]
    plan = entry_plan(entry, NVFP4BlockScaling(disable_2d_quantization=not entry.tiles))
    rows, taps, blocks = matrix.sizes(plan)
    if entry.k_order != matrix.K_ORDER:
        raise damaged_layer(opened, name, f"its matrix is in the order {entry.k_order!r}, not {matrix.K_ORDER!r}")
    if data.dtype != torch.uint8 or tuple(data.shape) != (rows, taps * blocks * 8):
        raise damaged_layer(opened, name, f"weight is {data.dtype} {tuple(data.shape)}")
    if scale.dtype != torch.float8_e4m3fn or tuple(scale.shape) != (rows, taps * blocks):
        raise damaged_layer(opened, name, f"weight_scale is {scale.dtype} {tuple(scale.shape)}")
    bits = scale.view(torch.uint8)
    if bool(((bits & 0x7F) == 0x7F).any()):
        raise damaged_layer(opened, name, "weight_scale holds NaN")
    if entry.tiles and (entry.transposed or not matrix.has_tiles(bits, plan)):
        raise damaged_layer(opened, name, "weight_scale differs within a 16x16 tile")
    packed, scales = matrix.from_matrix(data, bits, plan)
    if entry.e4m3_max != recipes[entry.recipe].settings("weight").e4m3_max:
        raise damaged_layer(opened, name, f"its scales reach {entry.e4m3_max}, not those of its recipe")
    amax = torch.tensor([entry.amax], dtype=torch.float32)
    static = None if entry.input_amax is None else torch.tensor([entry.input_amax], dtype=torch.float32)
    return Codes(packed.clone(), scales.clone(), amax, static)
