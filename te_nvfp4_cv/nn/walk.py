"""Find the convolutions and linear layers of a model, and say which recipe rules each.

Names are those of model.named_modules() without the parts that wrappers add, a shared module is found once, under its
first name, and nothing looks into ScriptModules, whose calls no context sees. What a layer's arguments mean to an
operator is said here, too: its name in nv.functional, its weight, its padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_nvfp4_cv.layer.names import plain_name
from te_nvfp4_cv.nn.base import NVFP4_CLASSES, OPS, NVFP4Module
from te_nvfp4_cv.nn.precision import entries_of
from te_nvfp4_cv.ops.geometry import ConvArgs
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

LAYERS = tuple(OPS)

Entry = NVFP4BlockScaling | None  # None: high precision


# ---- one layer ------------------------------------------------------------------------------------------------------


def op_of(module: nn.Module) -> str:
    """Return the name of a layer's operator in nv.functional, such as "conv2d"."""
    found = next((op for kind, op in OPS.items() if isinstance(module, kind)), None)
    return module.op if found is None else found  # type: ignore[return-value]


def own_weight(module: nn.Module) -> Tensor | None:
    """Return a layer's weight, or None if it is computed (parametrizations): reading it would run that code."""
    found: Tensor | None = module._parameters.get("weight", vars(module).get("weight"))
    return found


def torch_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class in OPS whose forward a layer has, or None if its class is somebody's subclass.

    A parametrized layer has torch's forward, though torch has given it a class of its own; so has one of modules.py.
    """
    cls = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        cls = cls.__bases__[0]
    plain: dict[type[nn.Module], type[nn.Module]] = {made: kind for kind, made in NVFP4_CLASSES.items()}
    cls = plain.get(cls, cls)
    return cls if cls in OPS else None


def like_weight(module: Any) -> Tensor:
    """Return a tensor with the shape, dtype and device of a layer's kernel, without computing the kernel.

    Torch computes it anew when it is read, and spectral_norm changes its buffers then.
    """
    own = own_weight(module)
    if own is not None:
        return own
    if isinstance(module, nn.Linear):
        shape: tuple[int, ...] = (module.out_features, module.in_features)
    else:
        first, second = module.out_channels, module.in_channels
        first, second = (second, first) if module.transposed else (first, second)
        shape = (first, second // module.groups, *module.kernel_size)
    like = next(module.parameters(), torch.empty(()))
    # One element in memory, whatever the shape.
    return like.detach().new_empty(()).expand(shape)


def padded(module: Any, x: Tensor) -> tuple[Tensor, ConvArgs]:
    """Return a layer's input and the arguments of its operator, for any padding mode.

    Operators pad with zeros only. For a convolution's other padding modes the input is padded here, before it is
    quantized, and the operator pads nothing.
    """
    args = ConvArgs.of(module)
    if getattr(module, "padding_mode", "zeros") == "zeros":  # linear layers have none
        return x, args
    return F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), args._replace(padding=0)


def for_output_size(module: Any, x: Tensor, output_size: list[int] | None) -> ConvArgs:
    """Return the arguments of a transposed convolution's operator for the output size that the caller asks for.

    Raises:
        ValueError: No output padding gives that size.
    """
    m = module
    more = m._output_padding(x, output_size, m.stride, m.padding, m.kernel_size, len(m.kernel_size), m.dilation)
    return ConvArgs.of(module)._replace(output_padding=more)


# ---- all modules of a model -----------------------------------------------------------------------------------------


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module of the model with its name; of a ScriptModule the module itself, but nothing inside."""
    for name, module, _ in _walk(model, "", None, lambda module, entry: entry, set()):
        yield name, module


def named_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield each convolution and linear layer of the model with its name."""
    return ((name, module) for name, module in named_modules(model) if isinstance(module, LAYERS))


def with_entries(
    model: nn.Module, entry: Any, table: Mapping[nn.Module, Entry]
) -> Iterator[tuple[str, nn.Module, Any]]:
    """Yield each module with its name and the entry of `table` that rules it, which may be that of a module around it.

    Args:
        entry: What rules outside of all entries.
        table: The entries that set_precision would make. Those that it has made already do not count here.
    """
    return _walk(model, "", entry, table.get, set())


def with_recipes(
    model: nn.Module, recipe: Entry, table: Mapping[nn.Module, Entry] | None = None
) -> Iterator[tuple[str, nn.Module, Entry]]:
    """Yield each module with its name and the recipe that a context would give it, or None for high precision.

    Args:
        recipe: The context's recipe.
        table: Entries that set_precision would make, beside those that it has made.
    """
    asked = table or {}

    def entry_of(module: nn.Module, entry: Entry) -> Entry:
        return next(iter(entries_of(module)), asked.get(module, entry))

    for name, module, entry in _walk(model, "", recipe, entry_of, set()):
        own = module.recipe if isinstance(module, NVFP4Module) else None
        yield name, module, entry if own is None or entry is None else own


def _walk(
    module: nn.Module, name: str, entry: Any, entry_of: Callable[[nn.Module, Any], Any], seen: set[nn.Module]
) -> Iterator[tuple[str, nn.Module, Any]]:
    if module in seen:
        return
    seen.add(module)
    entry = entry_of(module, entry)
    yield name, module, entry
    if isinstance(module, torch.jit.ScriptModule):
        return
    for child_name, child in module.named_children():
        yield from _walk(child, plain_name(f"{name}.{child_name}".strip(".")), entry, entry_of, seen)
