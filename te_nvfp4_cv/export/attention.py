"""Attention over another sequence, whose fused weight is multiplied in parts: packed as torch's separate projections.

    query is key is value    one product with in_proj_weight    packed as a whole
    key is value             one for q, one for k and v         q_proj_weight, k_proj_weight, v_proj_weight; k and v
                                                                with the amax of both, which training uses
    otherwise                three products                     the same, each with its own amax

The weights do not say how a module is called, so the context notes it when it runs (context/bodies.py). torch's
attention knows both forms. Its modules are brought into the separate one here: for as long as nv.export.save takes, and
for good in models of nv.export.load and nv.export.quantize.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.context.bodies import note_parts
from te_nvfp4_cv.export.inner import PREFIX
from te_nvfp4_cv.export.manifest import join
from te_nvfp4_cv.nn.precision import matches
from te_nvfp4_cv.nn.walk import with_recipes
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

FUSED, SEPARATE = "in_proj_weight", ("q_proj_weight", "k_proj_weight", "v_proj_weight")
TILE = 16  # rows: a tile with rows of k and of v could not be cut


def fused_name(modules: Mapping[str, nn.Module], name: str) -> str:
    """Return the name of in_proj_weight for that of one of its parts, as nv.export shows it; else the name itself.

    Args:
        modules: the model's, by name.
    """
    place, _, key = name.rpartition(".")
    if key not in SEPARATE:
        return name
    module: Any = modules.get(place)
    same = isinstance(module, nn.MultiheadAttention) and module.kdim == module.vdim == module.embed_dim
    return join(place, FUSED) if same else name


def note_calls(model: nn.Module, run: Callable[[], Any]) -> None:
    """Run a model that has attentions, and note how they are called, as the context does."""
    fused = [module for module in model.modules() if _is_fused(module)]
    hooks = [module.register_forward_pre_hook(note_parts, with_kwargs=True) for module in fused]
    try:
        if hooks:  # else the images need not be read
            with torch.no_grad():
                run()
    finally:
        for hook in hooks:
            hook.remove()


def separate(model: nn.Module, recipe: NVFP4BlockScaling) -> list[Any]:
    """Bring the attentions that a recipe runs in NVFP4, and that multiply parts, into the form of separate projections.

    Returns:
        The modules that were changed, for `rejoin`. The parts share the memory of the whole.
    """
    changed: list[Any] = []
    module: Any
    for _, module, own in with_recipes(model, recipe, matches(model, list(recipe.precision))):
        how = getattr(module, "nvfp4_parts", "")
        if how and own is not None and "fprop" in own.nvfp4_gemms and _is_fused(module):
            if module.embed_dim % TILE == 0 and type(module.in_proj_weight.data) is Tensor:
                _separate(module, how)
                changed.append(module)
    return changed


@contextmanager
def separated_like(names: Iterable[str], modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Bring those attentions into that form that have it in a file; an error inside of the block undoes that.

    Args:
        names: of the file's layers inside of modules.
        modules: the model's, by name.
    """
    ending = PREFIX + SEPARATE[0]
    places = [name.rpartition(".")[0] for name in names if name.rpartition(".")[2] == ending]
    changed = [modules[place] for place in places if place in modules and _is_fused(modules[place])]
    for module in changed:
        _separate(module, "qkv")
    try:
        yield
    except BaseException:
        rejoin(changed)
        raise


def rejoin(modules: Iterable[Any]) -> None:
    """Give modules that were separated their fused weight back."""
    for module in modules:
        for key in SEPARATE:
            part = module._parameters[key]
            module._parameters[key] = None
        module._parameters[FUSED] = part.nvfp4_whole
        module._qkv_same_embed_dim = True


@contextmanager
def separated(model: nn.Module, recipe: NVFP4BlockScaling) -> Iterator[None]:
    """Separate inside of the block only."""
    changed = separate(model, recipe)
    try:
        yield
    finally:
        rejoin(changed)


def _is_fused(module: Any) -> bool:
    # A subclass with a forward of its own may read the fused weight itself.
    plain = isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
    return plain and module._parameters.get(FUSED) is not None


def _separate(module: Any, how: str) -> None:
    whole = module._parameters[FUSED]
    size = module.embed_dim
    with torch.no_grad():  # cut as torch's attention does: views of the Parameter, by which delayed scales are found
        products = whole.split([size, 2 * size]) if how == "kv" else whole.chunk(3)
    for index, (key, part) in enumerate(zip(SEPARATE, whole.detach().chunk(3), strict=True)):
        made: Any = nn.Parameter(part, requires_grad=whole.requires_grad)
        made.nvfp4_whole = whole
        # What training multiplies: its amax is that of the codes, and it owns delayed scales.
        made.nvfp4_read = products[min(index, len(products) - 1)]
        module._parameters[key] = made
    module._parameters[FUSED] = None
    module._qkv_same_embed_dim = False
