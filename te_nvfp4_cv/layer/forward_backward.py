"""One quantized layer, forward and backward.

    forward          x, w, bias -> y, and what backward needs (Saved)
    backward         dy and that -> dx, dw, db
    QuantizedConv    the two as an autograd Function, for eager mode

Eager autograd, the compiled operator (custom_op.py), tensor-parallel layers and inference layers all run this one
sequence: who else takes part in a call (ranks that exchange codes, a watcher, codes made before) comes in as
CallOptions. The steps are operands.py's and gemms.py's. Autocast is off while they run: operands have the dtypes that
the numerics want.

Forward captures everything that backward needs, so backward runs the same inside and outside of the context. It saves
4-bit codes: x's columnwise face, before im2col, and the weight's face for dgrad. Only where the recipe wants a GEMM in
high precision is the operand itself saved. A second differentiation raises. Where no gradient of y comes (None, not
zeros), none goes on, as in torch; but ranks that wait for each other in backward compute with zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.backend.torch_private import is_batched, without_function_modes
from te_nvfp4_cv.errors import message
from te_nvfp4_cv.layer import gemms, operands
from te_nvfp4_cv.layer.options import ALONE, CallOptions
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.layer.transforms import many_gradients
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.conv import grouped
from te_nvfp4_cv.ops.experts import Experts
from te_nvfp4_cv.ops.quantize import amax as amaxes
from te_nvfp4_cv.ops.records import Face, Operand, WeightCodes
from te_nvfp4_cv.recipe.fields import Role

# ---- what backward needs --------------------------------------------------------------------------------------------


class Saved(NamedTuple):
    """Saved tensors of x and of w; None where backward needs nothing, and for scale and amax of an operand itself.

    The order of the fields is that of save_for_backward and of the compiled operator's results; nothing else relies on
    an order.
    """

    x: Tensor | None
    x_scale: Tensor | None
    x_amax: Tensor | None
    w: Tensor | None
    w_scale: Tensor | None
    w_amax: Tensor | None

    def x_face(self) -> Face:
        """Return x's packed face: which one, plan.saves_x says."""
        assert self.x is not None and self.x_scale is not None
        return Face(self.x, self.x_scale)

    def weight_codes(self, plan: Plan) -> WeightCodes:
        """Return the weight's packed face as a record of codes."""
        assert self.w is not None and self.w_scale is not None and self.w_amax is not None
        return WeightCodes.of_face(plan.saves_w, Face(self.w, self.w_scale), self.w_amax)

    def real_weight(self, plan: Plan) -> Tensor:
        """Return the weight in real units: itself, or its codes dequantized."""
        if plan.saves_w != "itself":
            return operands.real_weight(self.weight_codes(plan), plan)
        assert self.w is not None
        return self.w

    def real_input(self, plan: Plan, dtype: torch.dtype, experts: Experts | None = None) -> Tensor:
        """Return x [B, *image, C] in real units: itself, or its rowwise codes dequantized, in `dtype`."""
        if plan.saves_x != "itself":
            assert self.x_amax is not None
            amax = self.x_amax if experts is None or not experts.own_scales else experts.for_rows(self.x_amax)
            return operands.real_input(self.x_face(), amax, plan, dtype)
        assert self.x is not None
        return layouts.image_last(self.x, plan.geometry.x_shape)


def saved_of(
    x: Tensor, x_q: Operand | None, w: Tensor | None, w_q: WeightCodes | None, plan: Plan, need_dx: bool, need_dw: bool
) -> Saved:
    """Choose what backward needs of the operands: x's part for dw, w's part for dx."""
    of_x: tuple[Tensor | None, ...] = (None, None, None)
    of_w: tuple[Tensor | None, ...] = (None, None, None)
    if need_dw:
        if plan.saves_x == "itself":
            of_x = (x, None, None)
        else:
            assert x_q is not None
            of_x = (*x_q.col, x_q.col_amax) if plan.saves_x == "col" else (*x_q.row, x_q.row_amax)
    if need_dx:
        if plan.saves_w == "itself":
            of_w = (w, None, None)
        else:
            assert w_q is not None
            of_w = (*(w_q.row if plan.saves_w == "row" else w_q.col), w_q.amax)
    return Saved(*of_x, *of_w)


class Like(NamedTuple):
    """The look that dx, dw and db must have: shapes, dtypes and memory formats of x, w and bias."""

    x_shape: tuple[int, ...]
    x_dtype: torch.dtype
    x_channels_last: bool
    w_shape: tuple[int, ...]
    w_dtype: torch.dtype
    w_channels_last: bool
    bias_dtype: torch.dtype | None

    @classmethod
    def of(cls, x: Tensor, w: Tensor, bias: Tensor | None) -> Like:
        """Describe the tensors of one call."""
        return cls(
            tuple(x.shape),
            x.dtype,
            layouts.is_channels_last(x),
            tuple(w.shape),
            w.dtype,
            layouts.is_channels_last(w),
            None if bias is None else bias.dtype,
        )


# ---- the two passes -------------------------------------------------------------------------------------------------


class _without_autocast:  # noqa: N801  (a context manager)
    """Turn torch.autocast off inside. torch's own context manager costs 10 microseconds, and models mean more by it."""

    def __init__(self, device: str) -> None:
        self._device, self._on = device, torch.is_autocast_enabled(device)

    def __enter__(self) -> None:
        if self._on:
            torch.set_autocast_enabled(self._device, False)

    def __exit__(self, *error: object) -> None:
        if self._on:
            torch.set_autocast_enabled(self._device, True)


def forward(
    x: Tensor,
    w: Tensor | None,
    bias: Tensor | None,
    plan: Plan,
    need_dx: bool,
    need_dw: bool,
    options: CallOptions = ALONE,
) -> tuple[Tensor, Saved]:
    """Run one quantized layer forward: quantize x and w, multiply them (fprop), and choose what backward needs.

    Args:
        x: as torch.nn.functional takes it, batched.
        w: as torch's layer has it; None where options.codes stand for it.
    Returns:
        The output, laid out as torch would lay it out, and the saved tensors.
    """
    g, ranks, codes, dtype = plan.geometry, options.ranks, options.codes, x.dtype
    unpacked: Tensor | Face | None = options.unpacked
    in_nvfp4 = "fprop" in plan.gemms
    x_q: Operand | None
    # Where no GEMM reads the weight's codes, none are made, and those made before are not saved.
    wants_codes = in_nvfp4 or (need_dx and plan.saves_w != "itself")
    measured = None
    with _without_autocast(x.device.type):
        move = None if options.scales is None else options.scales.take_move()
        # First of all: what moves is read when x is quantized.
        if w is not None and codes is None and ranks is None and wants_codes:
            measured = operands.measure_weight(w, plan, move)
        elif move is not None:
            amaxes.move(*move, clear=True)
        if options.producer is not None:
            x_last = x  # later steps read no value of it
            x_q = options.producer.quantize(plan, need_dw, options.scales)
        else:
            x_last = layouts.image_last(x, g.x_shape if ranks is None else ranks.x_shape)
            how = plan if ranks is None else ranks.input_plan
            x_q = operands.quantize_input(x_last, how, need_dw, options)
        # Begun here and waited for below, so that the weight is quantized while the bytes travel.
        rows = None
        if ranks is not None and x_q is not None:
            rows = ranks.gather_rows(Role.INPUT, x_q.row)
            x_q = ranks.with_columns(Role.INPUT, x_last, x_q, need_dw)
        if not wants_codes:
            codes = None
        elif codes is None and measured is not None:
            assert w is not None
            x_amax = x_q.row_amax if in_nvfp4 and x_q is not None else None
            codes, unpacked = operands.quantize_measured_weight(w, plan, need_dx, measured, x_amax)
        elif codes is None:
            assert w is not None
            amax = None if ranks is None else ranks.weight_amax(w)
            codes = operands.quantize_weight(w, plan, need_dx, amax)
        if options.watch is not None and codes is not None and w is not None:
            options.watch.quantized(Role.WEIGHT, w, codes, None, plan)
        # The ranks' outputs are summed, and the bias must be in the sum once.
        if ranks is not None and not ranks.adds_bias:
            bias = None
        if in_nvfp4:
            assert x_q is not None and codes is not None
            row = x_q.row if rows is None else rows()
            here = plan if ranks is None else ranks.fprop_plan
            y = gemms.fprop(row, x_q.row_amax, codes, bias, here, dtype, unpacked, options.experts)
        else:
            assert w is not None
            y = gemms.plain_fprop(x_last, w, bias, g, options.experts)
        saved = saved_of(x, x_q, w, codes, plan, need_dx, need_dw)
        if ranks is None:
            return layouts.image_first(y, g.y_shape, x.shape, plan.channels_last), saved
        y = ranks.sum_output(y)
        return layouts.image_first(y, ranks.y_shape, ranks.y_torch_shape, plan.channels_last), saved


def backward(
    dy: Tensor,
    saved: Saved,
    plan: Plan,
    like: Like,
    needs: tuple[bool, bool, bool],
    options: CallOptions = ALONE,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Run one quantized layer backward: quantize dy, multiply it with the saved operands (dgrad, wgrad).

    Args:
        needs: which of dx, dw and db are wanted.
    Returns:
        (dx, dw, db), None where not wanted.
    """
    need_dx, need_dw, need_db = needs
    g, ranks, experts = plan.geometry, options.ranks, options.experts
    dx = dw = db = None
    # With create_graph=True grad mode is on here; QuantizedConv.backward deals with that by itself.
    # A backward pass inside of a context runs under its function mode, which is for the calls of others.
    with torch.no_grad(), without_function_modes(), _without_autocast(dy.device.type):
        x_columns = dy_rows = dy_columns = None
        # The last GEMM needs it, so it has the longest time to travel.
        if ranks is not None and need_dw and "wgrad" in plan.gemms:
            x_columns = ranks.gather_columns(Role.INPUT, saved.x_face())
        dy_last = layouts.image_last(dy, g.y_shape if ranks is None else ranks.y_shape)
        how = plan if ranks is None else ranks.gradient_plan
        dy_q = operands.quantize_gradient(dy_last, how, need_dx, need_dw, options)
        # Only now: the scales may move as soon as dy has been quantized with the present ones.
        if options.scales is not None:
            options.scales.backward_ran()
        if ranks is not None and dy_q is not None:  # both gathers start before the first product waits for one
            dy_rows = ranks.gather_rows(Role.GRAD_OUTPUT, dy_q.row) if need_dx else None
            dy_q = ranks.with_columns(Role.GRAD_OUTPUT, dy_last, dy_q, need_dw)
            dy_columns = ranks.gather_columns(Role.GRAD_OUTPUT, dy_q.col) if need_dw else None
        codes = saved.weight_codes(plan) if need_dx and "dgrad" in plan.gemms else None
        weight, x_face = None, saved.x_face() if need_dw and "wgrad" in plan.gemms else None
        if codes is not None and x_face is not None and ranks is None:
            assert dy_q is not None
            weight, x_face = gemms.unpack_for_backward(dy_q, codes, x_face, saved.x_amax, plan)

        def input_gradient() -> Tensor:
            if codes is not None:
                assert dy_q is not None
                row = dy_q.row if dy_rows is None else dy_rows()
                here = plan if ranks is None else ranks.dgrad_plan
                dx = gemms.dgrad(row, dy_q.row_amax, codes, here, like.x_dtype, weight, experts)
            else:
                dx = gemms.plain_dgrad(dy_last, saved.real_weight(plan), plan, like.x_dtype, experts)
            dx = dx if ranks is None else ranks.sum_input_gradient(dx)
            shape = g.x_shape if ranks is None else ranks.x_shape
            return layouts.image_first(dx, shape, like.x_shape, like.x_channels_last)

        if need_dx and (ranks is None or not ranks.wgrad_first):
            dx = input_gradient()
        if need_dw:
            if x_face is not None:
                assert dy_q is not None
                col = dy_q.col if dy_columns is None else dy_columns()
                x_face = x_face if x_columns is None else x_columns()
                here = plan if ranks is None else ranks.wgrad_plan
                dw = gemms.wgrad(col, dy_q.col_amax, x_face, saved.x_amax, here, like.w_dtype, experts)
            else:
                real = saved.real_input(plan, dy.dtype, experts)
                dw = gemms.plain_wgrad(dy_last, real, plan, experts).to(like.w_dtype)
            if options.watch is not None:
                options.watch.weight_gradient(dy_last, dw, plan, experts)
            dw = layouts.kernel_as(dw, g, like.w_shape, like.w_channels_last)
        if need_dx and dx is None:
            dx = input_gradient()
        if need_db:
            # [B, *image, O] -> [O] from dy before quantization, in fp32: a sum needs no GEMM, and so no codes.
            if experts is None:
                total = dy_last.flatten(0, -2).sum(0, dtype=torch.float32)
            else:
                total = grouped.row_sums(dy_last, experts, plan.backend)
            db = (total if ranks is None else ranks.whole_bias_gradient(total)).to(like.bias_dtype)
    return dx, dw, db


# ---- for autograd ---------------------------------------------------------------------------------------------------


class QuantizedConv(torch.autograd.Function):
    """Run x, w, bias -> y for one Plan, with whoever else takes part in the call."""

    # Torch's own method, before context/torch_patches.py changes it: that is for Functions whose forward runs layers.
    apply = torch.autograd.Function.__dict__["apply"]

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, plan: Plan, options: CallOptions
    ) -> Tensor:
        prepared = options.prepared
        # What set_materialize_grads sets: the method is one more call at each layer.
        ctx.materialize_grads = options.ranks is not None or (
            options.scales is not None and options.scales.group is not None
        )
        if prepared is not None:
            with _without_autocast(x.device.type):
                y, together = prepared.forward(x, w, bias, options.scales)
            ctx.save_for_backward(together)
            if prepared.like is None:
                prepared.like = Like.of(x, w, bias)
            ctx.plan, ctx.options, ctx.like = plan, options, prepared.like
            return y
        need_dx, need_dw = ctx.needs_input_grad[:2]
        y, saved = forward(x, w, bias, plan, need_dx, need_dw, options)
        ctx.save_for_backward(*saved)
        if options.codes is not None or options.producer is not None:  # the graph must not hold their memory
            options = options._replace(codes=None, producer=None)
        ctx.plan, ctx.options, ctx.like = plan, options, Like.of(x, w, bias)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dy is None:
            return (None,) * 5
        if is_batched(dy):
            raise many_gradients()
        needs, options, tensors = ctx.needs_input_grad[:3], ctx.options, ctx.saved_tensors
        grads: tuple[Tensor | None, ...]
        if options.prepared is not None:
            if needs[0] and needs[1] and not torch.is_grad_enabled() and dispatch.runs_directly(dy):
                with without_function_modes(), _without_autocast(dy.device.type):
                    grads = options.prepared.backward(dy, *tensors, options.scales, needs[2])
                return (*grads, None, None)
            tensors = options.prepared.parts(*tensors)
        grads = backward(dy, Saved(*tensors), ctx.plan, ctx.like, needs, options)
        # With create_graph=True: dx depends on w, dw on x, all on dy, and they must not look like constants.
        if torch.is_grad_enabled():
            # w, bias and perhaps x: the nodes that accumulate into leaves know their tensor.
            leaves = [node.variable for node, _ in ctx.next_functions if hasattr(node, "variable")]
            anchor = torch.zeros((), device=dy.device, requires_grad=any(needs[:2]))  # where x is no leaf
            grads = tuple(None if g is None else _NoSecondOrder.apply(g, dy, anchor, *leaves) for g in grads)
        return (*grads, None, None)


class _NoSecondOrder(torch.autograd.Function):
    """Pass a gradient on; its backward explains that NVFP4 layers are differentiable once."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *depends_on: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        # A copy, since the node hangs on what is returned: others may hold grad itself, and nobody may write to a view
        # that a Function returns.
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, ddx: Tensor | None) -> Any:  # type: ignore[override]
        if ddx is None:
            return (None,) * len(ctx.needs_input_grad)
        raise RuntimeError(
            message(
                "nvfp4: a gradient of an NVFP4 layer was differentiated again.",
                got="double backward (create_graph=True, a gradient penalty or a Hessian)",
                needs="first derivatives only: rounding has no useful second derivative",
                fix="run that forward pass under nvfp4_autocast(enabled=False)",
            )
        )
