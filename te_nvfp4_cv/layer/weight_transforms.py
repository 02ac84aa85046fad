"""Clip or scale a weight before it is quantized, by the parameter that nn/learned.py has given its module.

    clip    w' = clamp(w, -c A, c A)             A = amax of w, c in (0, 1]
            dc = sum over |w| >= c A of g sign(w) A
    scale   w' = clamp(w, -m A_b, m A_b)         A_b = amax of w's block: 16x16 of a tap; without 2D 1x16
            dm = [sum over |w| >= m A_b of g sign(w) A_b + sum over the others of g (q - w) / m] / sqrt(6 N)
    dw = g in both (straight through), g = the gradient at w', q = the dequantized w', N = elements of w

"scale" is a multiplier of the block scales (those of fprop's face): the block's amax becomes m A_b, so its scale in
real units becomes m A_b / 6, and what is larger saturates at 6 of it. The second sum is LSQ's: with s = m A_b / 6 a
value that does not saturate moves by (q - w) / s per ds. At c = 1 and m = 1 nothing is clipped: the same bits.

The parameter rules while its module runs, for that module's own weight: a stack per thread, pushed and popped by the
module's hooks. Refused: torch.compile, weights that FSDP2 gathers in 4 bits or nv.frozen_weights holds.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.backend.dispatch import is_traced
from te_nvfp4_cv.errors import runtime_error
from te_nvfp4_cv.layer import operands
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.geometry import BLOCK

CLIP, SCALE = "clip", "scale"
LEAST = 2.0**-6  # what c and m are clamped to from below


class Local(threading.local):
    def __init__(self) -> None:
        self.running: list[tuple[Any, str, Tensor]] = []  # (module, kind, parameter), the innermost last


local = Local()


def push(module: Any, kind: str, parameter: Tensor) -> None:
    """Remember that `module` starts its forward."""
    local.running.append((module, kind, parameter))


def pop(module: Any) -> None:
    """Forget `module`, whose forward ended, and the entries that an exception left above it."""
    running = local.running
    for index in range(len(running) - 1, -1, -1):
        if running[index][0] is module:
            del running[index:]
            return


def apply(w: Tensor, codes: object, plan: Plan) -> Tensor:
    """Return w as it is quantized: unchanged, but for a weight with a learned parameter whose module is running.

    Args:
        codes: those that the call would use in place of quantizing w, or None.
    Raises:
        RuntimeError: codes that were made before.
    """
    learned = refuse(w, codes)
    if learned is None:
        return w
    kind, parameter = learned
    result: Tensor = _Learned.apply(w, parameter, kind, plan)
    return result


def refuse(w: Tensor, codes: object) -> tuple[str, Tensor] | None:
    """Return (kind, parameter) of the running module if w is its weight, else None.

    Raises:
        RuntimeError: there is a parameter, but the codes were made before, or torch.compile traces the call.
    """
    running = local.running
    # By identity: a module may call functions with other weights while it runs.
    if not running or running[-1][0]._parameters.get("weight") is not w:
        return None
    compiling = is_traced()
    if codes is not None or compiling:
        raise runtime_error(
            "nvfp4: a learned weight scale does not work here.",
            got="torch.compile"
            if compiling
            else "a weight whose codes were made before (frozen_weights, FSDP2's gathers)",
            needs="a weight that is quantized where the layer is called",
            fix="leave torch.compile, frozen_weights or fsdp.quantize_gathers out, or learn_scales",
        )
    return running[-1][1:]


def clipped(w: Tensor, parameter: Tensor, kind: str, plan: Plan) -> Tensor:
    """Return w' of the table above."""
    bound = _limit(w, kind, plan) * parameter.clamp(LEAST, 1.0).to(w.dtype)
    return torch.minimum(torch.maximum(w, -bound), bound)


class _Learned(torch.autograd.Function):
    """Compute w' from w and the parameter, and the gradients of both."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, parameter: Tensor, kind: str, plan: Plan) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(w, parameter)
        ctx.kind, ctx.plan = kind, plan
        return clipped(w, parameter, kind, plan)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if g is None:
            return None, None, None, None
        w, parameter = ctx.saved_tensors
        # The parameter is frozen: w's gradient passes straight through, and no sums are needed.
        if not ctx.needs_input_grad[1]:
            return g, None, None, None
        limit = _limit(w, ctx.kind, ctx.plan)
        factor = parameter.clamp(LEAST, 1.0).to(w.dtype)
        bound = limit * factor
        beyond = w.abs() >= bound
        slope = torch.where(beyond, w.sign() * limit, torch.zeros_like(w)).float()
        if ctx.kind == SCALE:
            kept = torch.minimum(torch.maximum(w, -bound), bound)
            # Quantized anew rather than saved: one more pass over a weight, instead of a copy of it until backward. The
            # last factor is LSQ's 1 / sqrt(N Q) with Q = 6, the largest code.
            q = operands.dequantized_weight(kept, ctx.plan)
            slope = torch.where(beyond, slope, (q - kept.float()) / factor.float()) / (6 * w.numel()) ** 0.5
        return g, (g.float() * slope).sum().to(parameter.dtype).reshape(parameter.shape), None, None


def _limit(w: Tensor, kind: str, plan: Plan) -> Tensor:
    """Return the amax that the parameter multiplies, broadcastable to w."""
    # The amax counts as a constant: no gradient flows to the element that happens to be the largest.
    w = w.detach().abs()
    return w.amax() if kind == CLIP else block_amax(w, plan)


def block_amax(w: Tensor, plan: Plan) -> Tensor:
    """Return, for each element of w >= 0 [axis 0, axis 1, *kernel], the amax of its block in fprop's face."""
    kernel = w.reshape(plan.geometry.groups, w.shape[0] // plan.geometry.groups, w.shape[1], -1)
    rows, columns = kernel.shape[1:3]
    # Zeros do not change the amax of magnitudes.
    padded = F.pad(kernel, (0, 0, 0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles = padded.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))  # [groups, tiles, 16, tiles, 16, taps]
    if plan.weight.two_d:
        axes: tuple[int, ...] = (2, 4)
    else:
        # 1x16 blocks lie along the axis that fprop contracts.
        axes = (4,) if plan.weight_faces[0] == "row" else (2,)
    amax = tiles.amax(axes, keepdim=True).expand_as(tiles)
    return amax.flatten(3, 4).flatten(1, 2)[:, :rows, :columns].reshape(w.shape)
