"""Run a layer's training step by launches that were looked up at an earlier call that was alike.

forward_backward.py has the sequence, for every backend and whoever takes part. On a GPU a small layer in eager mode
takes as long as Python needs to find its kernels and to make its tensors, so the plain case has this short form of the
same steps: the backend "vendor" on Triton's kernels, x and w both with gradients, nothing folded, alone. The bits are
the same (tests/ops/kernels/test_prepared.py). What is not plain takes the long way, one pass or both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend import dispatch, tuning
from te_nvfp4_cv.layer.delayed_scaling import DelayedCallScales
from te_nvfp4_cv.layer.options import Scales
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.conv import vendor
from te_nvfp4_cv.ops.quantize import rounding_seeds
from te_nvfp4_cv.ops.records import DEQUANTIZED

Look = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides


def fits(plan: Plan, x: Tensor, w: Tensor) -> bool:
    """Return True if calls with this plan and such tensors have the short form, apart from who takes part."""
    g = plan.geometry
    return (
        plan.backend == "vendor"
        and plan.operand_form == DEQUANTIZED
        and dispatch.kernels_serve(x.device)
        and not (tuning.arch_of(x.device) and tuning.autotune_enabled())
        and len(plan.gemms) == 3
        and not plan.dequantized_backward
        and not plan.row_scaled
        and not g.routed
        and g.rank in (0, *layouts.CHANNELS_LAST)
        and plan.folds[0].strips == plan.folds[1].strips == 1
        and plan.weight.two_d
        and plan.input.four_over_six is None
        and plan.grad_output.four_over_six is None
        and plan.compute_dtype == x.dtype
        and layouts.is_dense(w)
    )


def measured(scales: Scales) -> bool:
    """Return True if a training step may foresee how its delayed scales move.

    Not in a checkpoint's second pass, in a call that only reads them, or once a CUDA graph moves them.
    """
    state = scales.scales if isinstance(scales, DelayedCallScales) and scales.training and not scales.again else None
    return state is not None and all(state.measured) and not state.in_graphs


class PreparedLayer:
    """One layer's training step on tensors of these shapes, strides and dtypes."""

    def __init__(self, plan: Plan, x: Tensor, w: Tensor, bias: Tensor | None) -> None:
        from te_nvfp4_cv.ops.quantize.triton.step import Parts, Step

        g, folded = plan.geometry, plan.geometry.folded
        n, taps, channels = g.weight_shape
        flat = w.detach().flatten(2) if g.rank else w.detach().unsqueeze(-1)
        carried = {gemm for gemm, yes in plan.weight_carries_scales.items() if yes}
        carried |= {"wgrad"} if plan.input_carries_scales else set()
        settings = (plan.input, plan.grad_output)
        rule = (tuple(s.e4m3_max for s in settings), tuple(s.margin for s in settings)) if plan.delayed else None
        parts = Parts(
            torch.Size(g.x_shape), torch.Size(g.y_shape), x.dtype,
            torch.Size((n, channels, taps)), (flat.stride(0), flat.stride(2), flat.stride(1)), w.dtype,
            (plan.input_specs[True], plan.gradient_specs[True, True]), plan.weight_specs[True],
            plan.alpha_factors, frozenset(carried), rule,
        )  # fmt: skip
        self.step, self.plan, self.carried, self.folded = Step(parts, x.device), plan, carried, folded
        self.dtype, self.device, self.w_dtype = x.dtype, x.device, w.dtype
        self.format = layouts.CHANNELS_LAST.get(g.rank)  # None: rows of a matrix
        self.x, self.y = _first(g.x_shape), _first(g.y_shape)
        self.w = _first((n, *g.kernel, channels))
        # Columns consist of whole blocks of 16 images, or rows.
        self.x_columns, self.y_columns = _first(folded.x_shape), _first(folded.y_shape)
        # As torch has them: a linear layer's rows have any number of axes.
        self.x_shape: tuple[int, ...] = x.shape
        self.y_shape: tuple[int, ...] = self.y[0] if g.rank else (*x.shape[:-1], n)
        self.x_last, self.w_last = layouts.is_channels_last(x), layouts.is_channels_last(w)
        self.bias_dtype = None if bias is None else bias.dtype
        self.seeded = plan.gradient_specs[True, True].stochastic
        self.like: Any = None  # forward_backward.Like of these tensors, for gradients that take the long way

    def _empty(self, look: Look) -> Tensor:
        return torch.empty_strided(*look, dtype=self.dtype, device=self.device)

    def _last(self, x: Tensor, look: Look) -> Tensor:
        """Return x, y or a gradient of them with its channels innermost in memory and without gaps."""
        if self.format is None:
            return x.reshape(look[0]).contiguous()
        return x.contiguous(memory_format=self.format)

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None, scales: Scales | None) -> tuple[Tensor, Tensor]:
        """Return y, and what backward needs in one tensor."""
        state, moves = None, False
        if isinstance(scales, DelayedCallScales):
            state, moves, scales.moves = scales.scales, scales.moves, False
        values = self._empty(self.x), self._empty(self.w)
        saved = self.step.forward(self._last(x, self.x), w, values, state, moves)
        carried = "fprop" in self.carried
        inner = bias if carried else None
        if self.format is None:
            y = vendor.linear(*values, inner, not carried)
        else:
            y = vendor.convolution(*values, inner, self.plan.geometry)
        if not carried:
            y = self.step.scale("fprop", self._placed(y, self.y), self.dtype, (saved, None), bias)
        elif y.dtype is not self.dtype:  # on a CPU, where vendor._safe casts
            y = y.to(self.dtype)
        return self._result(y, self.y, self.y_shape, self.plan.channels_last), saved

    def backward(self, dy: Tensor, saved: Tensor, scales: Scales | None, need_db: bool) -> tuple[Tensor | None, ...]:
        """Return dx, dw and db."""
        state = scales.scales if isinstance(scales, DelayedCallScales) else None
        step, carried, empty, rows = self.step, self.carried, self._empty, self.format is None
        dy = self._last(dy, self.y)
        seed = rounding_seeds.draw_seed(dy) if self.seeded else None
        faces, values = (empty(self.y), empty(self.y_columns)), (empty(self.w), empty(self.x_columns))
        mine = step.backward(dy, saved, faces, values, seed, state)
        if state is not None:
            state.stale = state.foreseen = True
        w_values, x_values = values
        if rows:
            dx = vendor.product(faces[0], w_values, "dgrad" not in carried)
        else:  # which reads no value of x, but its shape
            x_like = x_values if self.x == self.x_columns else x_values[: self.x[0][0]]
            dx = vendor.convolution_backward(faces[0], x_like, w_values, self.plan.geometry, [True, False, False])[0]
        if "dgrad" not in carried:
            dx = step.scale("dgrad", self._placed(dx, self.x), self.dtype, (saved, mine), None)
        elif dx.dtype is not self.dtype:
            dx = dx.to(self.dtype)
        if rows:
            dw = vendor.product(faces[1].t(), x_values, "wgrad" not in carried)
        else:
            dw = vendor.convolution_backward(faces[1], x_values, w_values, self.folded, [False, True, False])[1]
        if "wgrad" not in carried:
            dw = step.scale("wgrad", self._placed(dw, self.w), self.w_dtype, (saved, mine), None)
        dw = self._result(dw.to(self.w_dtype), self.w, self.w[0], self.w_last)
        db = None
        if need_db:
            db = dy.movedim(1, -1).flatten(0, -2).sum(0, dtype=torch.float32).to(self.bias_dtype)
        return self._result(dx, self.x, self.x_shape, self.x_last), dw, db

    def parts(self, saved: Tensor) -> tuple[Tensor, ...]:
        """Return x's columnwise face and its amax, w's codes and their amax, as the long way saves them."""
        columns, x_amax, codes, w_amax = self.step.faces(saved)
        return *columns, x_amax, *codes, w_amax

    def _placed(self, y: Tensor, look: Look) -> Tensor:
        """Return y with its channels innermost in memory, and these strides also along axes of one element."""
        if y.stride() == look[1]:
            return y
        return self._last(y, look).as_strided(*look)

    def _result(self, y: Tensor, look: Look, shape: tuple[int, ...], channels_last: bool) -> Tensor:
        """Return y as layouts.image_first does."""
        y = y if y.stride() == look[1] else self._placed(y, look)
        if self.format is None:
            y = y if y.shape == shape else y.view(shape)
        elif not channels_last:
            y = layouts.contiguous(y)
        return layouts.not_a_view(y) if y._is_view() else y


def _first(shape: tuple[int, ...]) -> Look:
    """Return shape and strides of [B, *image, C] in memory, seen with its channels second; [B, C] stays."""
    y = torch.empty(shape, device="meta").movedim(-1, 1)
    return tuple(y.shape), y.stride()
