"""Refuses what torch.func, torch.vmap and forward-mode differentiation ask of layers that run in NVFP4 by name.

A context leaves such calls in high precision (`check.transformed`). A call that asks for NVFP4 raises, in place of
torch's error about a setup_context, or of a tangent that is lost without a word.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd import forward_ad

from te_nvfp4_cv.errors import runtime_error
from te_nvfp4_cv.layer.check import torch_func_is_on, transformed

PLAIN_MODEL = "plain torch layers, which a context leaves in high precision there, or nvfp4_autocast(enabled=False)"


def refuse_transforms(what: str, fix: str, *operands: Tensor | None) -> None:
    """Refuse a call inside of a transform of torch.func, or with an operand that carries a tangent.

    Raises:
        RuntimeError: it is one.
    """
    if not transformed():
        return
    # Forward mode may be on for something else: operands without a tangent are a plain call.
    if not torch_func_is_on() and all(t is None or forward_ad.unpack_dual(t).tangent is None for t in operands):
        return
    raise runtime_error(
        f"nvfp4: torch.vmap, transforms of torch.func and forward-mode differentiation do not take {what}.",
        got="a call in NVFP4 inside of one",
        needs="a plain call: an operand is quantized with one scale, and has a backward pass only",
        fix=fix,
    )


def many_gradients() -> RuntimeError:
    """Return the error for the gradients of torch.vmap, which are many in one tensor."""
    return runtime_error(
        "nvfp4: many backward passes in one (torch.vmap) do not work through an NVFP4 layer.",
        got="autograd.grad(is_grads_batched=True), jacobian(vectorize=True), or torch.vmap of a backward pass",
        needs="one gradient of the output at a time: it is quantized with one scale",
        fix="is_grads_batched=False or vectorize=False, or run that forward pass under nvfp4_autocast(enabled=False)",
    )
