"""Compare a model with a file: which layers go into it in NVFP4, and whether the model is the one that was saved.

`sort_layers` serves nv.export.save and nv.export.quantize, `check_fit` nv.export.load. Only `stay_high` changes the
model. Names are compared without what wrappers add (DistributedDataParallel, torch.compile, AveragedModel).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from te_nvfp4_cv.errors import runtime_error, value_error
from te_nvfp4_cv.export.artifact import Artifact, damaged_layer
from te_nvfp4_cv.export.computed import is_computed, keys_of
from te_nvfp4_cv.export.folding import NORMS
from te_nvfp4_cv.export.inner import PREFIX, Inner, Kernel, NotPacked, find, has_own_forward, layer_of
from te_nvfp4_cv.export.left_high import BY_RECIPE
from te_nvfp4_cv.export.loadable import check_loadable, listed, other_numbers
from te_nvfp4_cv.export.manifest import PARTS, SHIFTS, LayerEntry, Manifest, call_of, damaged, join, settings_of
from te_nvfp4_cv.layer import check, grouped
from te_nvfp4_cv.layer.names import plain_name
from te_nvfp4_cv.nn.base import OPS, NVFP4Module
from te_nvfp4_cv.nn.modules import NVFP4GroupedLinear
from te_nvfp4_cv.nn.precision import give_entries, matches
from te_nvfp4_cv.nn.walk import LAYERS, like_weight, named_modules, op_of, torch_class, with_recipes
from te_nvfp4_cv.ops.geometry import ConvArgs
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

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


def averaging_counts(model: nn.Module) -> set[str]:
    """Return the names in the state_dict of what AveragedModel counts: like other wrappers it is not in a file."""
    wrappers = (name for name, module in model.named_modules() if isinstance(module, AveragedModel))
    return {join(name, "n_averaged") for name in wrappers}


class Sorted(NamedTuple):
    """A model's kernels.

    Attributes:
        quantized: by name, each layer in NVFP4 with its recipe; a layer that `install` would put into a module, too.
        high: by name, why each other layer is not in NVFP4, or not in a file.
        inner: the kernels of modules with a forward of their own, by their names in `quantized`.
        lost: the names in `high` that train in NVFP4 all the same, each with the number of its weights.
    """

    quantized: dict[str, tuple[nn.Module, NVFP4BlockScaling]]
    high: dict[str, str]
    inner: dict[str, Kernel]
    lost: dict[str, int]


def shown(name: str, inside: Container[str]) -> str:
    """Return a layer's name as nv.coverage shows it: a layer inside of a module has the name of its Parameter.

    Args:
        inside: the names of such layers. A name alone does not tell: a user's own layer may be called packed_conv.
    """
    return shown_parameter(parameter_name(name)) if name in inside else name


def shown_parameter(name: str) -> str:
    """Return a Parameter's name as nv.coverage shows it: that of its module, unless it is no `weight`."""
    return name.rpartition(".")[0] if name.rpartition(".")[2] == "weight" else name


def parameter_name(name: str) -> str:
    """Return the name of the Parameter that a layer inside of a module stands for."""
    place, _, last = name.rpartition(".")
    return join(place, last.removeprefix(PREFIX))


def sort_layers(model: nn.Module, recipe: NVFP4BlockScaling) -> Sorted:
    """Sort a model's convolutions, linear layers and attentions into what a recipe runs in NVFP4 and the rest."""
    table = matches(model, list(recipe.precision))
    found = Sorted({}, {}, {}, {})
    names = {module: name for name, module in named_modules(model)}
    for name, module, own in with_recipes(model, recipe, table):
        if isinstance(module, Inner):  # the layers inside come by themselves
            continue
        # First, since an InferenceLayer is an instance of torch's layer, too. It knows its own recipe.
        if hasattr(type(module), "nvfp4_weight"):  # an InferenceLayer
            found.quantized[name] = (module, module.recipe)  # type: ignore[assignment]
        elif isinstance(module, LAYERS) and torch_class(module) is not None:
            reason = _why_high(module, own)
            if reason is None:
                assert own is not None
                found.quantized[name] = (module, own)
            else:
                found.high[name] = reason
        elif type(module) is NVFP4GroupedLinear:
            _refuse_shards(module.weight)
            reason = _why_not(own) or grouped.why_not(module.weight, module.weight, own)  # type: ignore[arg-type]
            if reason is None and own is not None and own.grouped_scale == "expert":
                reason = "grouped_scale='expert': a file has one tensor scale for a weight"
            if reason is None:
                assert own is not None
                found.quantized[name] = (module, own)
            else:
                found.high[name] = reason
        elif has_own_forward(module):
            _sort_inner(found, names, module, own)
        elif isinstance(module, NVFP4Module):
            found.high[name] = f"{type(module).__name__}: a subclass of an NVFP4 module"
        elif own is not None and not isinstance(module, LAYERS):
            _list_loose(found, name, module)
    return found


def _list_loose(found: Sorted, name: str, module: nn.Module) -> None:
    """List Parameters of a user's module that may be kernels: nothing here says how it multiplies them."""
    if type(module).__module__.startswith("torch.nn."):  # embeddings, norms, recurrent layers
        return
    for key, parameter in module._parameters.items():
        if parameter is None or not 2 <= parameter.dim() <= 5 or check.is_thin(parameter, 1):
            continue
        where = shown_parameter(join(name, key))
        found.high[where] = f"a Parameter of {type(module).__name__}, which is no layer of torch"
        # A matrix may be a table of embeddings or queries. With more axes it is a kernel, most likely.
        if parameter.dim() > 2:
            found.lost[where] = parameter.numel()


def bias_mark(bias: str, computed: bool) -> str:
    """Return what the manifest says of a layer inside of a module; see Manifest.inner."""
    return ("=" if computed else "") + bias


def kernel_of(entry: LayerEntry, name: str, mark: str, modules: Mapping[str, nn.Module]) -> Kernel:
    """Return the kernel that a file describes, for `install`; its layer has no values yet."""
    place, _, key = parameter_name(name).rpartition(".")
    module = modules[place]
    attention = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    owner = modules[place.rpartition(".")[0]] if attention else module
    like = module._parameters[key]
    assert like is not None
    args = ConvArgs(**{k: v for k, v in entry.call.items() if k != "padding_mode"}, groups=entry.groups)
    layer = layer_of(entry.op, like.detach().new_empty(()).expand(entry.shape), args)
    return Kernel(module, key, layer, mark.removeprefix("="), owner, mark.startswith("="))


def multiplies_itself(module: nn.Module) -> bool:
    """Return True for a module with kernels that `install` can replace."""
    attention = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return attention or (has_own_forward(module) and torch_class(module) is None)


def _sort_inner(
    found: Sorted, names: Mapping[nn.Module, str], module: nn.Module, recipe: NVFP4BlockScaling | None
) -> None:
    """Sort the kernels of a module that has a forward of its own."""
    places = [(child, key) for child in (module, *module.children()) for key, p in child._parameters.items()
              if p is not None and p.dim() >= 2]
    reason = _why_not(recipe)
    kernels: list[Kernel] | NotPacked = NotPacked(reason or "", False)
    if reason is None:
        assert recipe is not None
        for child, key in places:
            _refuse_shards(child._parameters[key])
        kernels = find(module, recipe)
    if isinstance(kernels, NotPacked):
        # A subclass is one layer, however many Parameters it has.
        own = places if isinstance(module, nn.MultiheadAttention) else [(module, "weight")]
        for child, key in own:
            name = shown_parameter(join(names[child], key))
            found.high[name] = f"{type(module).__name__}: {kernels.reason}" if kernels.trains else kernels.reason
            if kernels.trains:
                found.lost[name] = getattr(child._parameters.get(key), "numel", int)()
        return
    assert recipe is not None
    for kernel in kernels:
        name = join(names[kernel.module], PREFIX + kernel.key)
        found.quantized[name], found.inner[name] = (kernel.layer, recipe), kernel


def _why_not(recipe: NVFP4BlockScaling | None) -> str | None:
    if recipe is None:
        return BY_RECIPE[0]
    return None if "fprop" in recipe.nvfp4_gemms else BY_RECIPE[1]


def stay_high(model: nn.Module, high: Mapping[str, str]) -> None:
    """Give the layers that a recipe has left in high precision an entry of set_precision that says so.

    Without it nv.export.save would quantize them, if it is not given that recipe again.

    Args:
        high: the layers in high precision, with the reason, as sort_layers lists them.
    """
    modules = plain_modules(model)
    names = (name for name, reason in high.items() if reason in BY_RECIPE)
    # Attention's Parameters are listed by their own names.
    places = {name if name in modules else name.rpartition(".")[0] for name in names} & modules.keys()
    give_entries(model, {modules[name]: None for name in places})


def _why_high(module: Any, recipe: NVFP4BlockScaling | None) -> str | None:
    reason = _why_not(recipe)
    if reason is not None:
        return reason
    assert recipe is not None
    computed = is_computed(module)
    if computed and recipe.kernels == "parameters":
        return "its weight is computed (recipe.kernels='parameters')"
    if any(key != "weight" for key in getattr(module, "parametrizations", ())):
        return "its weight is computed, and its bias, too" if computed else "its bias is computed"
    if computed:
        w: Any = like_weight(module)
    else:
        w = module._parameters.get("weight")
        if w is None:
            return "its weight is no Parameter, and nothing of torch's computes it"
    _refuse_shards(w)
    return check.ineligible(op_of(module), w, w, getattr(module, "groups", 1), recipe)


def _refuse_shards(w: Any) -> None:
    # DTensor has to_local; other tensor subclasses hide behind Parameter, but not behind its data.
    if hasattr(w, "to_local") or type(w.data) is not Tensor:
        raise runtime_error(
            "nv.export.save: the model is sharded.",
            got=f"{type(w.data).__name__} as a weight",
            needs="plain tensors",
            fix="gather the state_dict (torch.distributed.checkpoint.state_dict, full_state_dict=True) into a model",
        )


# ---- a file's layers ------------------------------------------------------------------------------------------------


def check_fit(opened: Artifact, manifest: Manifest, model: nn.Module) -> dict[str, nn.Module]:
    """Check that a model is the one that a file was saved from.

    Returns:
        The model's layers that the file holds in NVFP4, by name.
    Raises:
        ValueError: Names, shapes, kinds or calls differ (all of them are listed), or the file is damaged.
    """
    plain_names("nv.export.load", model)  # raises if two tensors would have one name
    check_loadable(model)
    modules = plain_modules(model)
    # Shapes only: nothing of the model is read or moved before the comparison is over.
    held = model.state_dict()
    state = {plain_name(name): tuple(getattr(value, "shape", ())) for name, value in held.items()}
    counts = {plain_name(name) for name in averaging_counts(model)}
    expected: dict[str, tuple[int, ...]] = {name: tuple(t.shape) for name, t in opened.tensors.items()}
    packed = {join(name, key) for name in manifest.layers for key in PARTS}
    for name, entry in manifest.layers.items():
        for key in PARTS:
            # The file's tensors of a layer become torch's one weight. Only a static scale and a shift may be absent.
            optional = key == "input_scale" or (key in SHIFTS and not entry.shifted)
            if expected.pop(join(name, key), None) is None and not optional:
                raise damaged_layer(opened, name, f"{join(name, key)} is missing")
        # Torch's, which the model must have; a layer inside of a module has the name of its Parameter.
        expected[parameter_name(name) if name in manifest.inner else join(name, "weight")] = entry.shape

    quantized = {id(modules[name]) for name in manifest.layers if name in modules}
    places = [parameter_name(name).rpartition(".") for name in manifest.inner]
    inner = {(id(modules.get(place)), key) for place, _, key in places}
    aliases: set[str] = set()
    for name, module in modules.items():
        # A module that is used in two places has two names in the state_dict, and one in the file.
        if id(module) in quantized:
            aliases.add(join(name, "weight"))
            # A computed weight has no name there, and what it is computed from is not in the file.
            for key in keys_of(module):
                del state[join(name, key)]
                state[join(name, "weight")] = tuple(like_weight(module).shape)
        aliases |= {join(name, key) for owner, key in inner if owner == id(module)}
    norms = tuple(f"{name}." for name in manifest.folded)
    biases = {f"{name}.bias" for name in manifest.folded.values()}  # the norm's shift: the model's layer may have none
    known = expected.keys() | aliases | counts
    missing = [name for name in state if name not in known and not name.startswith(norms)]
    unexpected = [name for name in expected if name not in state and name not in biases]
    unexpected += [name for name in manifest.folded if name not in modules]
    unlike = [
        text for name, entry in manifest.layers.items() if name in modules
        for text in _differences(name, modules[name], entry)
    ]
    unlike += [
        text for name, own in manifest.settings.items() if name in modules
        for text in _other_settings(name, settings_of(modules[name]), own)
    ]
    unlike += [
        f"{name}: {type(modules[place]).__name__}, in the file a layer with a forward of its own"
        for name in manifest.inner
        if (place := name.rpartition(".")[0]) in modules and not multiplies_itself(modules[place])
    ]
    unlike += [
        f"{name}: {state[name]}, in the file {shape}" for name, shape in expected.items()
        if name in state and state[name] != shape
    ]
    unlike += other_numbers({name: t for name, t in opened.tensors.items() if name not in packed}, held)
    if missing or unexpected or unlike:
        parts = (("not in the file", missing), ("not in the model", unexpected), ("of another shape or kind", unlike))
        raise value_error(
            f"nv.export.load: the model is not the one that {opened.source} was saved from.",
            # All differences at once: a wrong width shows in every layer, and one line of many would mislead.
            got="; ".join(f"{what}: {listed(names)}" for what, names in parts if names),
            needs="the same architecture, before it was converted",
            fix="build the model as it was built for training (classes, width, inputs)",
        )
    for norm, name in manifest.folded.items():
        folded: Any = modules[norm]
        foldable = isinstance(folded, NORMS) and isinstance(modules.get(name), LAYERS)
        bias = opened.tensors.get(f"{name}.bias")
        if not foldable or bias is None or tuple(bias.shape) != (folded.num_features,):
            raise damaged(opened.source, f"{norm!r} is said to be folded into {name!r}")
    return {name: modules[name] for name in manifest.layers if name not in manifest.inner}


def _differences(name: str, module: nn.Module, entry: LayerEntry) -> list[str]:
    """List how a layer of the model differs from the one that the file describes."""
    kind = next((op for plain, op in OPS.items() if isinstance(module, plain)), None)
    if type(module) is NVFP4GroupedLinear:
        kind = grouped.OP
    groups = getattr(module, "groups", 1)
    if kind and kind != grouped.OP and torch_class(module) is None:
        return [f"{name}: {type(module).__qualname__}, a subclass of torch's layer, in the file {entry.op}"]
    if kind != entry.op or groups != entry.groups:
        return [f"{name}: {type(module).__name__} (groups={groups}), in the file {entry.op} (groups={entry.groups})"]
    return _other_settings(name, call_of(module), entry.call)


def _other_settings(name: str, own: Mapping[str, Any], in_file: Mapping[str, Any]) -> list[str]:
    """List settings of a module that differ from those in the file."""
    return [
        f"{name}: {key} {own[key]}, in the file {in_file[key]}"
        # Only what both name: another tool's file says nothing of padding_mode, for example.
        for key in sorted(in_file.keys() & own.keys())
        if in_file[key] != own[key]
    ]
