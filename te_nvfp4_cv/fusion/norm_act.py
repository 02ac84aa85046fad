"""Normalize, add a residual and activate in one autograd node, which saves its input and one bit per element of ReLU.

    batch_norm_act(z, running_mean, running_var, weight, bias, ...)     BatchNorm [+ residual] + ReLU, BatchNorm + SiLU
    group_norm_act(z, groups, weight, bias, ...)                        GroupNorm [+ residual] + ReLU, GroupNorm + SiLU

In SiLU's place may be Hardswish, ReLU6, GELU or LeakyReLU: functions of the norm's output without parameters, which
backward recomputes from z. That saves one full activation in memory, and on a GPU its way there and back. PReLU is not
served, as its slope's gradient needs a sum of its own, and neither are activations that rarely follow these norms.

Torch's modules save more: z for the norm, the norm's output for SiLU, and the activation for ReLU and for the next
convolution. On a CPU the values have torch's bits. The kernels compute in fp32 and round once, whereas torch rounds the
norm's output (and the sum with the residual) to z's dtype before it activates. The result has z's dtype, also where
torch.autocast would run group norm in fp32. A second differentiation goes through torch's own operators.
Refused: what F.batch_norm and F.group_norm refuse, with their errors; a residual of another shape; and a residual with
another activation than ReLU, whose derivative would need the sum.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.errors import describe, value_error
from te_nvfp4_cv.layer import deferred
from te_nvfp4_cv.ops.layouts import is_dense
from te_nvfp4_cv.ops.norm import operators, reference
from te_nvfp4_cv.ops.norm.spec import ACTIVATIONS, NormSpec, Pair, norm_of, split


def batch_norm_act(
    z: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str = "relu",
    backend: str = "auto",
) -> Tensor:
    """Return act(F.batch_norm(z, ...) + residual), with the arguments of F.batch_norm.

    Args:
        z: [B, C, *image] or [B, C], floating, any strides.
        training: Normalize with the batch's statistics, and update the running ones if they are given.
        residual: A tensor of z's shape, with activation "relu" only.
        activation: One of ACTIVATIONS in ops/norm/spec.py; "leaky_relu:0.2" gives the slope.
        backend: "auto" (kernels on a GPU, ATen on a CPU), "reference" (ATen) or "triton".
    Returns:
        A tensor of z's shape and memory format, in z's dtype promoted with the residual's.
    Raises:
        ValueError: The activation is unknown, the residual does not fit, or the batch has one value per channel.
    """
    _check(z, residual, activation)
    if training:
        F._verify_batch_size(z.size())  # type: ignore[attr-defined]
    settings = NormSpec(0, activation, training, momentum, eps)
    return _run(z, residual, (weight, bias), (running_mean, running_var), settings, backend)


def group_norm_act(
    z: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """Return act(F.group_norm(z, groups, weight, bias, eps) + residual), as batch_norm_act does for batch norm.

    Raises:
        ValueError: The groups do not divide the channels, or batch_norm_act would refuse the arguments.
    """
    _check(z, residual, activation)
    if z.dim() < 2 or z.shape[1] % groups:
        raise value_error(
            "group_norm_act: the groups do not divide the channels.",
            got=f"z {describe(z)}, groups={groups}",
            needs="z [B, C, ...] with C a multiple of groups",
            fix="check the layer before this one",
        )
    F._verify_batch_size([z.shape[0] * z.shape[1] // groups, groups, *z.shape[2:]])  # type: ignore[attr-defined]
    settings = NormSpec(groups, activation, eps=eps)
    return _run(z, residual, (weight, bias), (None, None), settings, backend)


def _check(z: Tensor, residual: Tensor | None, activation: str) -> None:
    check_activation("norm_act", activation)
    if residual is not None and (residual.shape != z.shape or activation != "relu"):
        raise value_error(
            "norm_act: this residual cannot be added here.",
            got=f"z {describe(z)}, residual {describe(residual)}, activation {activation!r}",
            needs="a residual of z's shape, with activation='relu'",
            fix="add it outside",
        )


def check_activation(caller: str, activation: str) -> None:
    """Refuse an activation that the operators do not serve.

    Raises:
        ValueError: There is no such activation.
    """
    try:
        split(activation)
    except ValueError as error:
        raise value_error(
            f"{caller}: unknown activation.",
            got=repr(activation),
            needs=" or ".join(map(repr, ACTIVATIONS)),
            fix="use torch's modules, or activation='relu'",
        ) from error


def _run(z: Tensor, residual: Tensor | None, affine: Pair, running: Pair, settings: NormSpec, backend: str) -> Tensor:
    weight, bias = affine
    if (weight is None) != (bias is None):  # torch allows one without the other; the operators take both or none
        like = bias if weight is None else weight
        assert like is not None
        weight = like.new_ones(z.shape[1]) if weight is None else weight
        bias = like.new_zeros(z.shape[1]) if bias is None else bias
    for name, tensor in (("weight", weight), ("bias", bias), ("running_mean", running[0])):
        if tensor is not None and tensor.shape != (z.shape[1],):
            raise value_error(
                f"norm_act: {name} does not match.",
                got=f"z {describe(z)}, {name} {describe(tensor)}",
                needs=f"{name} of shape ({z.shape[1]},): one value per channel",
                fix="check the layer before this one",
            )
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (z, residual, weight, bias))
    settings = replace(settings, need_mask=keep, backend=operators.backend_for(z, backend))
    z = dense(z)
    # GELU's error function is too long to be computed twice: once for the amax, and again for the codes.
    if settings.activation == "gelu" or not deferred.wanted(z, residual, settings.backend):
        return NormAct.apply(z, residual, weight, bias, *running, settings, None)
    residual = residual if residual is None or residual.stride() == z.stride() else torch.empty_like(z).copy_(residual)
    r, w, b = (None if t is None else t.detach() for t in (residual, weight, bias))
    producer = deferred.Producer(z.detach(), r, w, b, settings.groups, settings.activation)
    y = NormAct.apply(z, residual, weight, bias, *running, settings, producer)
    return deferred.attach(y, producer)


def dense(z: Tensor) -> Tensor:
    """Return z itself if its memory is contiguous or channels_last, or else a contiguous copy."""
    return z if is_dense(z) else z.contiguous()


class NormAct(torch.autograd.Function):
    """Normalize, add and activate by the operators of ops/norm. With a producer y is left unwritten."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        s: NormSpec,
        producer: deferred.Producer | None,
    ) -> Tensor:
        ctx.materialize_grads = False  # as layer/forward_backward.py says
        written = s.batch_stats and torch.compiler.is_compiling()
        if running_mean is not None and running_var is not None and not written:
            # .data hides from autograd that the operator may write them. Torch's own norm counts no change either, and
            # saves them for its backward, which may belong to an unfused call of the same norm in the same step.
            running_mean, running_var = running_mean.data, running_var.data
        if producer is not None:
            mean, rstd = operators.norm_statistics(z, running_mean, running_var, s.encode())
            mask = z.new_empty(s.mask_bytes(z), dtype=torch.uint8)
            producer.mean, producer.rstd, producer.mask = mean, rstd, mask
            y = deferred.empty_like(z)
        else:
            y, mean, rstd, mask = operators.norm_forward(
                z, residual, weight, bias, running_mean, running_var, s.encode()
            )
        ctx.save_for_backward(z, weight, bias, mean, rstd, mask)
        ctx.settings, ctx.strides = s, y.stride()
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dy is None:
            return (None,) * 8
        saved = z, weight, bias, mean, rstd, mask = ctx.saved_tensors
        s: NormSpec = ctx.settings
        if torch.is_grad_enabled() and (dy.requires_grad or z.requires_grad):
            return (*_differentiable(ctx, dy, saved), *[None] * 4)
        if dy.stride() != ctx.strides:  # the mask's bits lie in y's memory order
            dy = torch.empty_strided(dy.shape, ctx.strides, dtype=dy.dtype, device=dy.device).copy_(dy)
        need = ctx.needs_input_grad
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            norm, spec = norm_of(mean, rstd, weight, bias), replace(s, need_dresidual=need[1]).encode()
            dz, dresidual, dweight, dbias = operators.norm_backward(dy, z, norm, mask, spec)
        return (
            dz if need[0] else None,
            dresidual.to(ctx.residual_dtype) if need[1] else None,
            dweight.to(weight.dtype) if need[2] else None,
            dbias.to(bias.dtype) if need[3] else None,
            *[None] * 4,  # running statistics, settings, producer
        )


def _differentiable(ctx: Any, dy: Tensor, saved: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """Return the four gradients by torch's own norm, recomputed, so that they can be differentiated again."""
    z, weight, bias, mean, rstd, mask = saved  # checkpointing lets a backward read ctx.saved_tensors once only
    s: NormSpec = ctx.settings
    need = [ctx.needs_input_grad[index] for index in (0, 2, 3)]  # z, weight, bias
    dtype = dy.dtype
    with torch.enable_grad(), torch.autocast(dy.device.type, enabled=False):
        if s.groups:
            u = F.group_norm(z, s.groups, weight, bias, s.eps)
        elif s.batch_stats:
            u = F.batch_norm(z, None, None, weight, bias, True, 0.0, s.eps)
        else:
            variance = (rstd.square().reciprocal() - s.eps).clamp(min=0.0)  # what the running variance was
            u = F.batch_norm(z, mean, variance, weight, bias, False, 0.0, s.eps)
        if s.activation != "relu":
            y, g = reference.activate(u, s.activation), dy
        else:
            bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
            passed = torch.empty_strided(dy.shape, ctx.strides, dtype=dtype, device=dy.device)
            passed.as_strided((dy.numel(),), (1,)).copy_(bits.view(-1)[: dy.numel()])
            y, g = u.to(dtype), dy * passed
        inputs = [t for t, needed in zip((z, weight, bias), need, strict=True) if needed]
        found = iter(torch.autograd.grad(y, inputs, g, create_graph=True) if inputs else ())
    dz, dweight, dbias = (next(found) if needed else None for needed in need)
    return dz, g.to(ctx.residual_dtype) if ctx.needs_input_grad[1] else None, dweight, dbias
