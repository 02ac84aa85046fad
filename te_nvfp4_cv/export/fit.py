"""Compare a model with a file: which layers go into it in NVFP4, and whether the model is the one that was saved.

`sort_layers` serves nv.export.save and nv.export.quantize, `check_fit` serves nv.export.load. Nothing here changes a
model. Names are compared without the parts that wrappers add (DistributedDataParallel, torch.compile).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from te_nvfp4_cv.errors import runtime_error, value_error
from te_nvfp4_cv.export.artifact import PARTS, Artifact, LayerEntry, Manifest, damaged, join
from te_nvfp4_cv.export.folding import NORMS
from te_nvfp4_cv.layer import check
from te_nvfp4_cv.nn.base import OPS, is_plain_layer
from te_nvfp4_cv.nn.names import plain_name
from te_nvfp4_cv.nn.precision import matches
from te_nvfp4_cv.nn.walk import LAYERS, op_of, with_recipes
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

CALL = ("stride", "padding", "dilation", "output_padding", "padding_mode")


# ---- a model's layers -----------------------------------------------------------------------------------------------


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return modules by name without the parts that wrappers add; a shared module occurs under each of its names."""
    return {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}


def plain_names(where: str, model: nn.Module) -> dict[str, str]:
    """Return names in the state_dict by name without the parts that wrappers add.

    Raises:
        ValueError: Two tensors would have the same name.
    """
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
    """Return how a layer is called (stride, padding, ...), for the manifest; an empty dict for a linear layer.

    "same" and "valid" become numbers where they can, so that a model that says the same in numbers fits the file.
    """
    found: dict[str, Any] = {}
    for name in CALL:
        value: Any = getattr(module, name, None)
        if isinstance(value, (int, tuple, list)):
            values = (value,) if isinstance(value, int) else tuple(value)
            # Some models set stride=2 after construction, where torch itself stores (2, 2): both must compare equal.
            rank = len(module.kernel_size) if len(values) == 1 else 1  # type: ignore[arg-type]
            found[name] = [int(n) for n in values * rank]
        elif value is not None:
            found[name] = value
    if found.get("padding") == "valid":
        found["padding"] = [0] * len(found["dilation"])
    elif found.get("padding") == "same":
        kernel: Any = module.kernel_size
        totals = [d * (k - 1) for d, k in zip(found["dilation"], kernel, strict=True)]
        # An odd total puts one more zero at the end than at the start, which no number per axis can say.
        found["padding"] = "same" if any(total % 2 for total in totals) else [total // 2 for total in totals]
    return found


def sort_layers(
    model: nn.Module, recipe: NVFP4BlockScaling
) -> tuple[dict[str, tuple[nn.Module, NVFP4BlockScaling]], dict[str, str]]:
    """Sort a model's convolutions and linear layers into those that a recipe runs in NVFP4 and the rest.

    Returns:
        By name, each layer in NVFP4 with its recipe; and by name, the reason why each other layer is not in NVFP4.
    """
    table = matches(model, list(recipe.precision))
    quantized: dict[str, tuple[nn.Module, NVFP4BlockScaling]] = {}
    high: dict[str, str] = {}
    for name, module, own in with_recipes(model, recipe, table):
        # First, since an InferenceLayer is an instance of torch's layer, too. It knows its own recipe.
        if hasattr(type(module), "nvfp4_weight"):  # an InferenceLayer
            quantized[name] = (module, module.recipe)  # type: ignore[assignment]
        elif isinstance(module, LAYERS):
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
        return "its weight is computed"  # by a parametrization: the computed weight is no part of the state_dict
    if "fprop" not in recipe.nvfp4_gemms:
        return "the recipe runs fprop in high precision"
    w = module.weight
    # DTensor has to_local; other tensor subclasses hide behind Parameter, but not behind its data.
    if hasattr(w, "to_local") or type(w.data) is not Tensor:
        raise runtime_error(
            "nv.export.save: the model is sharded.",
            got=f"{type(w.data).__name__} as a weight",
            needs="plain tensors",
            fix="gather the state_dict (torch.distributed.checkpoint.state_dict, full_state_dict=True) into a model",
        )
    return check.ineligible(op_of(module), w, w, getattr(module, "groups", 1), recipe)


# ---- a file's layers ------------------------------------------------------------------------------------------------


def damaged_layer(opened: Artifact, name: str, why: str) -> ValueError:
    """Return the error for a layer whose tensors are not what the manifest says."""
    return damaged(opened.source, f"layer {name!r}: {why}")


def check_fit(opened: Artifact, manifest: Manifest, model: nn.Module) -> dict[str, nn.Module]:
    """Check that a model is the one that a file was saved from.

    Returns:
        The model's layers that the file holds in NVFP4, by name.
    Raises:
        ValueError: Names, shapes, kinds or calls differ (all of them are listed), or the file is damaged.
    """
    plain_names("nv.export.load", model)  # raises if two tensors would have one name
    _check_buffers(model)
    modules = plain_modules(model)
    # Shapes only: nothing of the model is read or moved before the comparison is over.
    state = {plain_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    expected: dict[str, tuple[int, ...]] = {name: tuple(t.shape) for name, t in opened.tensors.items()}
    for name, entry in manifest.layers.items():
        for key in PARTS:
            # The file's four tensors of a layer become torch's one weight. Only a static scale may be absent.
            if expected.pop(join(name, key), None) is None and key != "input_scale":
                raise damaged_layer(opened, name, f"{join(name, key)} is missing")
        expected[join(name, "weight")] = entry.shape  # torch's, which the model must have

    quantized = {id(modules[name]) for name in manifest.layers if name in modules}
    # A module that is used in two places has two names in the state_dict, and one in the file.
    aliases = {f"{name}.weight" for name, module in modules.items() if id(module) in quantized}
    norms = tuple(f"{name}." for name in manifest.folded)
    biases = {f"{name}.bias" for name in manifest.folded.values()}  # the norm's shift: the model's layer may have none
    missing = [name for name in state if name not in expected and name not in aliases and not name.startswith(norms)]
    unexpected = [name for name in expected if name not in state and name not in biases]
    unexpected += [name for name in manifest.folded if name not in modules]
    unlike = [
        text for name, entry in manifest.layers.items() if name in modules
        for text in _differences(name, modules[name], entry)
    ]
    unlike += [
        f"{name}: {state[name]}, in the file {shape}" for name, shape in expected.items()
        if name in state and state[name] != shape
    ]
    if missing or unexpected or unlike:
        parts = (("not in the file", missing), ("not in the model", unexpected), ("of another shape or kind", unlike))
        raise value_error(
            f"nv.export.load: the model is not the one that {opened.source} was saved from.",
            # All differences at once: a wrong width shows in every layer, and one line of many would mislead.
            got="; ".join(f"{what}: {_listed(names)}" for what, names in parts if names),
            needs="the same architecture, before it was converted",
            fix="build the model as it was built for training (classes, width, inputs)",
        )
    for norm, name in manifest.folded.items():
        module: Any = modules[norm]
        foldable = isinstance(module, NORMS) and isinstance(modules.get(name), LAYERS)
        bias = opened.tensors.get(f"{name}.bias")
        if not foldable or bias is None or tuple(bias.shape) != (module.num_features,):
            raise damaged(opened.source, f"{norm!r} is said to be folded into {name!r}")
    return {name: modules[name] for name in manifest.layers}


def _check_buffers(model: nn.Module) -> None:
    """Refuse a model on the meta device whose buffers outside of the state_dict would stay without values."""
    lost = [
        join(name, key)
        for name, module in model.named_modules()
        # torch tells non-persistent buffers apart in this private set only.
        for key in module._non_persistent_buffers_set
        if (buffer := module._buffers.get(key)) is not None and buffer.is_meta
    ]
    if lost:
        raise value_error(
            "nv.export.load: buffers on the meta device are in no file.", got=_listed(lost),
            needs="a model whose buffers outside of the state_dict have values", fix="build it on the CPU",
        )


def _differences(name: str, module: nn.Module, entry: LayerEntry) -> list[str]:
    """List how a layer of the model differs from the one that the file describes."""
    kind = next((op for plain, op in OPS.items() if isinstance(module, plain)), None)
    groups = getattr(module, "groups", 1)
    if kind and not is_plain_layer(module):
        return [f"{name}: {type(module).__qualname__}, a subclass of torch's layer, in the file {entry.op}"]
    if kind != entry.op or groups != entry.groups:
        return [f"{name}: {type(module).__name__} (groups={groups}), in the file {entry.op} (groups={entry.groups})"]
    own = call_of(module)
    return [
        f"{name}: {key} {own[key]}, in the file {entry.call[key]}"
        # Only what both name: another tool's file says nothing of padding_mode, for example.
        for key in sorted(entry.call.keys() & own.keys())
        if entry.call[key] != own[key]
    ]


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
