"""Estimate what a training step keeps in memory: weights, gradients, optimizer states, and what autograd saves.

    saved for backward    measured on the model: under torch.autocast in bf16 with 2 and 4 images, and in NVFP4 with 16
                          and 32, whose blocks are full; the part that grows with the batch is scaled to it
    optimizer states      counted: bytes a parameter by the optimizer's rule

Temporary tensors, the largest of which lives for one layer, and the allocator's gaps come on top.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.backend.torch_private import tree_map_only
from te_nvfp4_cv.context.context_manager import nvfp4_autocast
from te_nvfp4_cv.errors import check_module, check_trainable, value_error
from te_nvfp4_cv.layer import delayed_scaling
from te_nvfp4_cv.layer.constants import memory_of
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, as_recipe
from te_nvfp4_cv.report.forward_pass import untouched
from te_nvfp4_cv.report.text import aligned

SMALL = 4096  # parameters with fewer elements keep two fp32 states
OPTIMIZERS: dict[str, tuple[float, int]] = {
    # Bytes a parameter, and elements that share a scale of each of two quantized states, or 0.
    "sgd": (4.0, 0),  # its momentum
    "adamw": (8.0, 0),
    "adamw8bit": (2.0, 256),  # torchao's and bitsandbytes'
    "adamwfp8": (2.0, 256),
    "adamw4bit": (1.0, 128),
}


@dataclass(frozen=True)
class Memory:
    """The parts of a training step's memory, in bytes.

    Attributes:
        batch: images in the step.
        optimizer: a key of OPTIMIZERS.
        parameters: as the model holds them.
        gradients: of the parameters that train, in their dtypes.
        buffers: as the model holds them.
        states: of the optimizer.
        saved_bf16: what autograd saves for backward in bf16.
        saved_nvfp4: the same in NVFP4.
    """

    batch: int
    optimizer: str
    parameters: int
    gradients: int
    buffers: int
    states: int
    saved_bf16: int
    saved_nvfp4: int

    def total(self, saved: int) -> int:
        """Add up all parts, with one of the two numbers of saved bytes."""
        return self.parameters + self.gradients + self.buffers + self.states + saved

    def to_dict(self) -> dict[str, Any]:
        """Return the parts and both sums as plain data."""
        sums = {"total_bf16": self.total(self.saved_bf16), "total_nvfp4": self.total(self.saved_nvfp4)}
        return {"estimate": True, **asdict(self), **sums}

    def __str__(self) -> str:
        rows = [("part", "bf16, MB", "nvfp4, MB")]
        both = {
            "parameters": self.parameters, "buffers": self.buffers, "gradients": self.gradients,
            f"optimizer states ({self.optimizer})": self.states,
        }  # fmt: skip
        parts = [(name, size, size) for name, size in both.items()]
        parts.append(("saved for backward", self.saved_bf16, self.saved_nvfp4))
        parts.append(("all", self.total(self.saved_bf16), self.total(self.saved_nvfp4)))
        rows += [(name, f"{a / 1e6:.1f}", f"{b / 1e6:.1f}") for name, a, b in parts]
        head = f"memory of a training step, batch {self.batch} (estimate; temporary tensors come on top):"
        return "\n".join([head, *aligned(rows, left=1)])


class _Saved:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # with its history a result would hold the node that holds it


def saved_bytes(model: nn.Module, inputs: Any, recipe: NVFP4BlockScaling | None) -> int:
    """Count the bytes that autograd saves in model(*inputs) under torch.autocast in bf16, each storage once.

    Parameters, buffers and inputs do not count.

    Args:
        recipe: if None, nothing runs in NVFP4.
    """
    kept: list[weakref.ref[_Saved]] = []

    def pack(tensor: Tensor) -> _Saved:
        held = _Saved(tensor)
        # A weak reference, so that tensors which autograd drops again in the forward pass do not count.
        kept.append(weakref.ref(held))
        return held

    leaves = [x for x in inputs if isinstance(x, Tensor)]
    device = next(iter(leaves), torch.empty(0)).device.type
    with ExitStack() as stack:
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor))
        stack.enter_context(torch.autocast(device, torch.bfloat16))
        if recipe is not None:
            stack.enter_context(nvfp4_autocast(recipe))
        output = model(*inputs)
    tensors = [held.tensor for held in (reference() for reference in kept) if held is not None]
    known = {None, *map(memory_of, (*leaves, *model.parameters(), *model.buffers()))}
    storages = {memory_of(t): t.untyped_storage().nbytes() for t in tensors if memory_of(t) is not None}
    del output
    return sum(size for key, size in storages.items() if key not in known)


def state_bytes(model: nn.Module, optimizer: str) -> int:
    """Count the bytes of an optimizer's states for the model's trainable parameters."""
    size, block = OPTIMIZERS[optimizer]
    total = 0.0
    for p in model.parameters():
        if p.requires_grad:
            quantized = block and p.numel() >= SMALL and not p.numel() % block
            total += p.numel() * (size + 8 / block if quantized else 8.0 if block else size)
    return round(total)


def estimate_memory(
    model: nn.Module, *inputs: Any, batch: int = 32, recipe: Any = None, optimizer: str = "adamw"
) -> Memory:
    """Estimate the memory of a training step. The model is left unchanged; it runs forward four times here.

    Args:
        inputs: arguments of the model, tensors with one image each.
        batch: images in a step, a multiple of 16 for a good estimate.
        recipe: a recipe, or its name or path; if None, the default recipe.
        optimizer: a key of OPTIMIZERS.
    Raises:
        TypeError: `model` is not a module.
        ValueError: another optimizer, or no image.
    """
    check_module("project", model, "project(model, *inputs)")
    check_trainable("project", model)
    if optimizer not in OPTIMIZERS or batch < 1:
        raise value_error(
            "project: an argument is out of range.",
            got=f"optimizer={optimizer!r}, batch={batch}",
            needs=f"one of {', '.join(OPTIMIZERS)}; batch >= 1",
            fix="--optimizer adamw --batch 32",
        )
    resolved = as_recipe(recipe)

    def images(count: int) -> Any:
        return tree_map_only(Tensor, lambda x: x.repeat_interleave(count, 0), inputs)

    # Two sizes tell what grows with the batch from what does not, such as weights in 4 bits or cast to bf16.
    def grown(few: int, recipe: NVFP4BlockScaling | None) -> int:
        less, more = (saved_bytes(model, images(count), recipe) for count in (few, 2 * few))
        return round(less + (batch - few) * (more - less) / few)

    with untouched(model), torch.enable_grad(), delayed_scaling.reading_only():
        model.train()  # `untouched` puts the flags back
        saved_bf16, saved_nvfp4 = grown(2, None), grown(16, resolved)
    held = (model.parameters(), (p for p in model.parameters() if p.requires_grad), model.buffers())
    parameters, gradients, buffers = (sum(t.numel() * t.element_size() for t in tensors) for tensors in held)
    states = state_bytes(model, optimizer)
    return Memory(batch, optimizer, parameters, gradients, buffers, states, saved_bf16, saved_nvfp4)
