"""Train one model on several ranks with DDP or FSDP2, and save its state like that of one process.

    ddp    DistributedDataParallel: every rank holds the whole model, gradients are averaged
    fsdp   fully_shard on stem, down.i, up.i and the root; weights of NVFP4 layers are gathered in 4 bits

State is saved and loaded in one form, however the model is wrapped: full plain tensors, plain names, and the
optimizer's entries numbered in the order of its groups. So a checkpoint can move between one process, DDP, FSDP2 and
any number of ranks. FSDP2 is refused with fp16, whose GradScaler would see the overflows of one shard only, and for
models other than the UNet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from te_nvfp4_cv.errors import value_error

from .precision import Precision
from .ranks import Ranks
from .unet import UNet


def wrap(
    model: nn.Module, precision: Precision, ranks: Ranks, device: torch.device, deterministic: bool = False
) -> nn.Module:
    """Return what to call in training: the model itself, a DDP of it, or the model sharded in place.

    Args:
        deterministic: Make more than two ranks add in an order that does not depend on when training was resumed.
    """
    if ranks.parallel == "ddp":
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            find_unused_parameters=deterministic and ranks.world > 2,  # DDP must not regroup after the first step
        )
    if ranks.parallel == "fsdp":
        if not isinstance(model, UNet):
            raise value_error(
                f"a {type(model).__name__} cannot train with --parallel fsdp.",
                got="a model without the blocks that are sharded one by one: stem, down.i, up.i",
                needs="a UNet (--task semantic or instance)",
                fix="--parallel ddp",
            )
        if precision.dtype == torch.float16:
            raise value_error(
                "fp16 cannot train with --parallel fsdp.",
                got=f"precision {precision.name!r}, activations in fp16",
                needs="a precision without a GradScaler, which would see the overflows of one shard only",
                fix="--parallel ddp, or bf16: --precisions bf16, or --compute bf16 for a recipe",
            )
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 divides rows
        if precision.recipe is not None:
            from te_nvfp4_cv import fsdp

            fsdp.quantize_gathers(model, precision.recipe)
        mesh = init_device_mesh(device.type, (ranks.world,))
        for block in (model.stem, *model.down, *model.up):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def whole_model(model: nn.Module, make: Callable[[], nn.Module], ranks: Ranks) -> nn.Module:
    """Return the model to evaluate: `model`, or if it is sharded, a plain copy from `make` with the full weights."""
    if ranks.parallel != "fsdp":
        return model
    whole = make()
    whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    return whole


def whole_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state of the model and the state of the optimizer, of a sharded model on rank 0 only.

    All ranks must call this.
    """
    if ranks.parallel != "fsdp":
        return model.state_dict(), optimizer.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    named: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    if ranks.rank:
        return {}, {}
    numbers = {name: number for number, name in enumerate(_names(model, optimizer))}
    state = {numbers[name]: entry for name, entry in named["state"].items()}
    return weights, {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def load_whole_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Any], moments: dict[str, Any], ranks: Ranks
) -> None:
    """Load what `whole_state` returned, on every rank."""
    parameters, names = dict(model.named_parameters()), _names(model, optimizer)
    if ranks.parallel != "fsdp":
        model.load_state_dict(weights)
        state = {number: _laid_out(entry, parameters[names[number]]) for number, entry in moments["state"].items()}
        optimizer.load_state_dict({**moments, "state": state})
        return
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, {name: w.contiguous() for name, w in weights.items()}, options=options)
    named: dict[str, Any] = {
        "state": {
            names[number]: {key: v.contiguous() if isinstance(v, Tensor) else v for key, v in entry.items()}
            for number, entry in moments["state"].items()
        },
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in moments["param_groups"]
        ],
    }
    set_optimizer_state_dict(model, optimizer, named, options=options)
    for group, saved in zip(optimizer.param_groups, moments["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})  # tuples come back as lists


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of the optimizer's parameters, in the order of its groups, not of the model."""
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    return [named[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _laid_out(entry: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Give an optimizer's tensors the strides of their parameter, because the fused step follows memory order."""
    if parameter.shape == (1,):  # a learned scale, which had no axes in earlier versions
        entry = {key: v.reshape(1) if key != "step" and isinstance(v, Tensor) else v for key, v in entry.items()}
    return {
        key: torch.empty_like(parameter, dtype=v.dtype, device=v.device, requires_grad=False).copy_(v)
        if isinstance(v, Tensor) and v.shape == parameter.shape and v.stride() != parameter.stride()
        else v
        for key, v in entry.items()
    }
