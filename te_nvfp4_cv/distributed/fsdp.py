"""Quantize weights before FSDP2 gathers them, so that 4 bits a value travel instead of 16 or 32 (nv.fsdp).

    nv.fsdp.quantize_gathers(model, recipe)              before fully_shard
    for block in model.blocks: fully_shard(block)
    fully_shard(model)
    with nv.nvfp4_autocast(recipe): loss = ...           as without FSDP2

Parameters stay in high precision in the shards, the optimizer and the state_dict, whose entries are plain tensors
(DTensors of them) under plain names. So checkpoints move between FSDP2, DDP, one process, and any number of ranks. A
weight that was gathered in 4 bits has 4 bits for every reader: layers outside of an NVFP4 context see dequantized
values, and a warning says so once. To evaluate in high precision, load the full state_dict into a plain model.
In a graph of torch.compile their codes are inputs, with fullgraph=True too. FSDP2 gathers in high precision as before:
weights with 1x16 or 4over6 scales, weights with a GEMM in high precision, and uneven shards. A marked weight
may be on torch's meta device, and stays marked when load_state_dict(assign=True) replaces it. Placements other than
Shard(0), and an integer as reshard_after_forward, raise at the first gather, on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.distributed.fsdp_weight import Form, ShardedWeight
from te_nvfp4_cv.errors import check_module, runtime_error, warn_once
from te_nvfp4_cv.layer import check, grouped
from te_nvfp4_cv.nn.modules import NVFP4GroupedLinear
from te_nvfp4_cv.nn.precision import matches
from te_nvfp4_cv.nn.walk import LAYERS, op_of, with_recipes
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

__all__ = ["quantize_gathers"]
_FORM = "_te_nvfp4_cv_gathered_form"  # on a layer: what its weight is marked with


def quantize_gathers(
    model: nn.Module, recipe: Any = None, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> list[str]:
    """Mark the weights that FSDP2 will gather in NVFP4. Call it before torch.distributed.fsdp.fully_shard.

    Args:
        model: torch's convolution and linear layers in it, and NVFP4 modules, are marked where their weight runs in
            NVFP4 with 16x16 scales. FSDP2 then shards an NVFP4GroupedLinear by experts.
        recipe: the one with which the model trains. Its [precision] table is followed, and so are set_precision's
            entries and the recipe that an NVFP4 module was built with.
        filter_fn: filter_fn(module, name) -> False leaves a layer's weight as FSDP2 gathers it.
    Returns:
        The names of the weights that were marked.
    Raises:
        TypeError: `model` is no module, or `recipe` no recipe.
        ValueError: a pattern of the recipe's table matches nothing.
        RuntimeError: the model is sharded already.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 32, 3))
        >>> nv.fsdp.quantize_gathers(model, nv.NVFP4BlockScaling())  # the first layer is too thin for NVFP4
        ['1.weight']
    """
    check_module("quantize_gathers", model, "quantize_gathers(model, ...)")
    resolved = check.checked_recipe(recipe)
    # A DTensor, asked for without importing its module, which takes long and may be missing.
    if any(hasattr(p, "_local_tensor") for p in model.parameters()):
        raise runtime_error(
            "quantize_gathers: the model is sharded already.",
            got="parameters that are DTensors",
            needs="plain parameters: fully_shard asks them how they are gathered",
            fix="call nv.fsdp.quantize_gathers(model, recipe) before fully_shard",
        )
    table = matches(model, list(resolved.precision))
    marked: list[str] = []
    replaced: dict[int, nn.Parameter] = {}
    for name, module, entry in with_recipes(model, resolved, table):
        layer = isinstance(module, (*LAYERS, NVFP4GroupedLinear))
        weight = module._parameters.get("weight") if layer else None
        if weight is None or (filter_fn is not None and not filter_fn(module, name)):
            continue
        full_name = f"{name}.weight".lstrip(".")  # the model itself may be the layer, with no name
        if id(weight) not in replaced:  # a weight that two layers share stays shared
            if _why_not(module, weight, entry) is not None:
                continue
            assert entry is not None
            replaced[id(weight)] = _marked(weight, full_name, module, entry)
            marked.append(full_name)
        # Not by setattr, whose checks and hooks are for users: the entry changes, the name stays.
        module._parameters["weight"] = replaced[id(weight)]
        module.__dict__[_FORM] = replaced[id(weight)].form  # type: ignore[attr-defined]
        # On the layer, because a part of the model may be saved alone.
        module.register_state_dict_post_hook(_plain_entries)
        module.register_load_state_dict_post_hook(_mark_again)
    return marked


def _marked(weight: nn.Parameter, name: str, module: nn.Module, recipe: NVFP4BlockScaling) -> nn.Parameter:
    """Return the parameter whose weight FSDP2 will ask how it is gathered."""
    # Delayed scales are found by the identity of their owner: it has the whole weight's shape, and no memory.
    owner = torch.empty((), dtype=weight.dtype).expand(weight.shape)
    routed = isinstance(module, NVFP4GroupedLinear)
    groups: Any = module.num_experts if routed else getattr(module, "groups", 1)
    form = Form(name, groups, recipe.settings("weight").pow2, owner, routed)
    return nn.Parameter(ShardedWeight(weight.data.contiguous(), form), weight.requires_grad)


def _why_not(module: nn.Module, weight: Tensor, recipe: NVFP4BlockScaling | None) -> str | None:
    """Return why a weight is gathered in high precision, or None if it is gathered in NVFP4."""
    if recipe is None:
        return "high precision"
    groups = getattr(module, "groups", 1)
    # A meta weight gets its values later, and will be asked for its codes only then.
    like = weight
    if weight.is_meta:
        like = torch.empty((), dtype=weight.dtype, device="cpu").expand(weight.shape)
    if isinstance(module, NVFP4GroupedLinear):
        reason = grouped.why_not(like, like, recipe)
        reason = "a tensor scale for each expert" if recipe.grouped_scale == "expert" else reason
    else:
        reason = check.ineligible(op_of(module), like, like, groups, recipe)
    if reason is not None:
        return reason
    s = recipe.settings("weight")
    if not s.two_d or s.four_over_six is not None:
        return "1x16 or 4over6 scales"
    if recipe.block_format != "nvfp4":
        return f"blocks of {recipe.block_format}"
    if not {"fprop", "dgrad"} <= set(recipe.nvfp4_gemms):
        return "a GEMM on the weight in high precision"
    return None


def _mark_again(module: nn.Module, incompatible_keys: Any) -> None:
    """Mark the weight that load_state_dict(assign=True) has put in the place of a marked one.

    It is a load_state_dict post-hook, and runs before FSDP2's own, which takes the parameter that it finds.
    """
    weight: Any = module._parameters.get("weight")
    local = getattr(weight, "_local_tensor", weight)
    if weight is None or isinstance(local, ShardedWeight):
        return
    form: Form = module.__dict__[_FORM]
    if weight.shape != form.owner.shape or weight.dtype not in check.DTYPES:
        warn_once(
            f"lost {form.name}",
            f"nvfp4: load_state_dict(assign=True) has put a {tuple(weight.shape)} {weight.dtype} weight in place of "
            f"{form.name!r}, {tuple(form.owner.shape)} {form.owner.dtype}: it is gathered in high precision",
        )
        return
    marked: Any = ShardedWeight(local.detach(), form)
    if local is not weight:
        marked = _like(weight, marked)
    module._parameters["weight"] = nn.Parameter(marked, weight.requires_grad)


def _like(whole: Any, local: Tensor) -> Any:
    """Return a DTensor that is sharded as `whole` is, and holds `local`."""
    # Imported here, where a DTensor shows that its module is loaded.
    from torch.distributed.tensor import DTensor

    sizes = {"shape": whole.shape, "stride": whole.stride()}
    return DTensor.from_local(local, whole.device_mesh, whole.placements, run_check=False, **sizes)


def whole_weight(weight: Any) -> Tensor:
    """Return all of a weight that is a DTensor, in high precision. Every rank must call this."""
    local = weight._local_tensor
    whole: Tensor = (_like(weight, local.plain) if isinstance(local, ShardedWeight) else weight).full_tensor()
    return whole


def _plain_entries(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Put the weight into the state_dict as a plain tensor, or a DTensor of one, that shares the parameter's memory.

    It is a state_dict post-hook.
    """
    key = f"{prefix}weight"
    entry: Any = state_dict.get(key)
    if isinstance(entry, ShardedWeight):
        state_dict[key] = entry.plain.detach()
    elif isinstance(getattr(entry, "_local_tensor", None), ShardedWeight):
        state_dict[key] = _like(entry, entry._local_tensor.plain.detach())
