"""The quantized layer as one operator, for torch.compile: te_nvfp4_cv::layer, and ::layer_backward behind it.

    layer            x, w, bias -> y and what backward needs: the six tensors of Saved
    layer_backward   dy and those -> dx, dw, db; draws the seed of stochastic rounding

A graph holds one node for each layer and pass. Nothing of geometry, recipe or random numbers is traced, so none of it
can break a graph, be merged with another layer's, or be compiled to something else than what eager mode runs. The
shapes of codes depend on sizes in ways that have no formula. So where torch.compile leaves a size open (mark_dynamic,
or the second image size that a graph meets), x and w themselves are saved, and backward quantizes them again, to the
same codes. execute.py refuses delayed tensor scales before.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from te_nvfp4_cv.backend.registration import without_autocast
from te_nvfp4_cv.layer import forward_backward, operands, shared_amax, shortfall, weight_codes
from te_nvfp4_cv.layer.forward_backward import Like, Saved, saved_of
from te_nvfp4_cv.layer.options import CallOptions
from te_nvfp4_cv.layer.plan import Plan, plan_for
from te_nvfp4_cv.layer.subclasses import without_class
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.experts import Experts
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.records import Face, WeightCodes
from te_nvfp4_cv.recipe.block_scaling import recipe_of_key


def _word(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch.": an operator takes tensors, numbers and texts, but no dtypes."""
    return str(dtype).removeprefix("torch.")


class LayerSpec(NamedTuple):
    """The settings of a layer's operator besides tensors and sizes; they cross the operator's boundary as one text.

    Attributes:
        recipe: NVFP4BlockScaling.key.
        backend: resolved.
        compute_dtype: of dequantized operands.
        channels_last: y's memory format.
        need_dx: backward will compute dx; need_dw, need_db: likewise.
        group: name of the process group whose ranks share amaxes in training, or "".
        like: dtypes and memory formats of x, w and bias, for backward.
        again: backward gets x and w and quantizes them again, because a size is open.
    """

    recipe: str
    backend: str
    compute_dtype: torch.dtype
    channels_last: bool
    need_dx: bool = False
    need_dw: bool = False
    need_db: bool = False
    group: str = ""
    like: str = ""
    again: bool = False

    def to_text(self) -> str:
        """Encode the spec."""
        needs = f"{int(self.channels_last)}{int(self.need_dx)}{int(self.need_dw)}{int(self.need_db)}{int(self.again)}"
        return f"{self.recipe}\n{self.backend}\n{_word(self.compute_dtype)}\n{needs}\n{self.group}\n{self.like}"


# A graph's node passes the same text at each step, so it is decoded once.
@functools.lru_cache(maxsize=1024)
def spec_of(text: str) -> LayerSpec:
    """Decode what LayerSpec.to_text gave."""
    recipe, backend, dtype, flags, group, like = text.split("\n")
    channels_last, need_dx, need_dw, need_db, again = (flag == "1" for flag in flags)
    needs = (need_dx, need_dw, need_db)
    return LayerSpec(recipe, backend, getattr(torch, dtype), channels_last, *needs, group, like, again)


@functools.lru_cache(maxsize=4096)
def _plan(sizes: tuple[int, ...], text: str) -> Plan:
    spec = spec_of(text)
    return plan_for(
        ConvGeometry.from_ints(sizes), recipe_of_key(spec.recipe), spec.backend, spec.compute_dtype, spec.channels_last
    )


def plan_of(sizes: Any, text: str) -> Plan:
    """Return the Plan of an operator's call; traced sizes become those of the trace."""
    return _plan(tuple(int(n) for n in sizes), text)


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::layer", mutates_args=())
def layer(
    x: Tensor, w: Tensor, bias: Tensor | None, sizes: list[int], spec: str, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run one layer's forward.

    Args:
        x: as torch.nn.functional takes it, in the dtype of autocast where that is on; w, bias: likewise.
        sizes: ConvGeometry.to_ints().
        spec: LayerSpec.to_text().
        offsets: of a grouped linear layer, as for grouped.execute.
    Returns:
        y, and the tensors of Saved, empty where there is nothing to save and where it is an operand itself.
    """
    plan, s = plan_of(sizes, spec), spec_of(spec)
    shortfall.ran_as_operator(plan.geometry)
    # Codes made before are looked up when the node runs, not when it is traced: each step may have new ones.
    made_before = weight_codes.codes_of(w, plan)
    options = _options(plan, s, x, offsets)._replace(codes=made_before)
    x = without_class(x)
    need_dx, need_dw = s.need_dx and not s.again, s.need_dw and not s.again
    y, saved = forward_backward.forward(x, w, bias, plan, need_dx, need_dw, options)
    if made_before is not None and need_dx and plan.saves_w != "itself":
        # Copied, because inductor writes other values into an operator's results once the graph has read them (where a
        # checkpoint runs forward again in backward), and these codes are for the next micro-batch too.
        saved = saved._replace(w=_copy(saved.w), w_scale=_copy(saved.w_scale), w_amax=_copy(saved.w_amax))
    return y, *_outputs(saved, plan, x)  # type: ignore[return-value]


def _copy(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.clone()


def layer_of_gathered(
    x: Tensor, w: Any, bias: Tensor | None, sizes: list[int], spec: str, offsets: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Run `layer` with a weight that FSDP2 has gathered in 4 bits: in the graph, its codes take its place."""
    s = spec_of(spec)
    y, *saved = layer_of_codes(x, w.parts, bias, sizes, spec, offsets)
    if not s.again:
        codes, plan = w.codes_for(plan_of(sizes, spec)), plan_of(sizes, spec)
        # What an operator is given it may not return.
        if s.need_dx and plan.saves_w != "itself":
            saved[3:] = saved_of(x, None, None, codes, plan, True, False)[3:]
    return y, *saved


def backward_of_gathered(dy: Tensor, saved: list[Any], *rest: Any) -> tuple[Tensor, ...]:
    """Run `layer_backward` where such a weight itself was saved."""
    w = saved[3]
    found: tuple[Tensor, ...] = layer_backward(dy, [*saved[:3], *w.parts], *rest)
    return found


@without_autocast
@torch.library.custom_op("te_nvfp4_cv::layer_of_codes", mutates_args=())
def layer_of_codes(
    x: Tensor, codes: list[Tensor], bias: Tensor | None, sizes: list[int], spec: str, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run one layer's forward as `layer` does.

    Args:
        codes: of the weight: rowwise codes, their scales, the amax.
    """
    plan, s = plan_of(sizes, spec), spec_of(spec)
    shortfall.ran_as_operator(plan.geometry)
    options = _options(plan, s, x, offsets)._replace(codes=_codes(*codes))
    need_dw = s.need_dw and not s.again
    y, saved = forward_backward.forward(without_class(x), None, bias, plan, False, need_dw, options)
    return y, *_outputs(saved, plan, x)  # type: ignore[return-value]


@layer_of_codes.register_fake
def _(x, codes, bias, sizes, spec, offsets=None):  # type: ignore[no-untyped-def]
    return _fake(x, None, sizes, spec_of(spec)._replace(need_dx=False).to_text(), offsets)


def _codes(data: Tensor, scale: Tensor, amax: Tensor) -> WeightCodes:
    return WeightCodes.of_face("row", Face(data, scale), amax)


def _options(plan: Plan, spec: LayerSpec, like: Tensor, offsets: Tensor | None) -> CallOptions:
    """Return who else takes part in a forward call."""
    experts, scales = _experts(offsets, like, plan), _scales(plan, spec, spec.need_dx or spec.need_dw)
    if scales is not None:
        scales.experts = experts
    return CallOptions(scales=scales, experts=experts)


def _experts(offsets: Tensor | None, like: Tensor, plan: Plan) -> Experts | None:
    return None if offsets is None else Experts(offsets, like.shape[0], plan.expert_scales)


def _quantized_again(saved: Saved, plan: Plan, spec: LayerSpec, options: CallOptions) -> Saved:
    """Return what forward would have saved, from x and w: nothing of theirs is random."""
    x, w, x_q, codes = saved.x, saved.w, None, None
    if spec.need_dw:
        assert x is not None
        x_last = layouts.image_last(x, plan.geometry.x_shape)
        x_q = operands.quantize_input(x_last, plan, True, options)
    if spec.need_dx and plan.saves_w != "itself":
        assert w is not None
        assert saved.w_scale is not None and saved.w_amax is not None
        if saved.w_scale.numel():  # w are the codes that FSDP2 has gathered
            codes = _codes(w, saved.w_scale, saved.w_amax)
        else:
            codes = weight_codes.codes_of(w, plan) or operands.quantize_weight(w, plan, True)
    return saved_of(x, x_q, w, codes, plan, spec.need_dx, spec.need_dw)  # type: ignore[arg-type]


def _outputs(saved: Saved, plan: Plan, like: Tensor) -> list[Tensor]:
    """Return the saved tensors that are not operands themselves: an operator may not give back what it was given."""
    x = None if plan.saves_x == "itself" else saved.x
    w = None if plan.saves_w == "itself" else saved.w
    parts = saved._replace(x=x, w=w)
    # An operator's results are tensors, an empty one for None, each with memory of its own: amaxes come as views.
    made = [like.new_empty(0, dtype=torch.uint8) if part is None else part for part in parts]
    return [part.clone() if part.storage_offset() else part for part in made]


def _scales(plan: Plan, spec: LayerSpec, training: bool) -> shared_amax.CallScales | None:
    if not spec.group:
        return None
    # A process group cannot cross the boundary either; torch finds it again by its name.
    found = torch.distributed.distributed_c10d._resolve_process_group(spec.group)  # type: ignore[arg-type]
    return shared_amax.CallScales(plan, found, training)


@layer.register_fake
def _(x, w, bias, sizes, spec, offsets=None):  # type: ignore[no-untyped-def]
    return _fake(x, w, sizes, spec, offsets)


def _fake(x: Tensor, w: Any, sizes: list[int], spec: str, offsets: Tensor | None) -> tuple[Tensor, ...]:
    """Return what `layer` would, on fake tensors."""
    s = spec_of(spec)
    if s.again:
        g = ConvGeometry.from_ints(sizes)
        y = layouts.like_image_first(x, g.y_shape, x.shape, s.channels_last)
        return y, *(x.new_empty(0, dtype=torch.uint8) for _ in range(6))
    plan = plan_of(sizes, spec)
    x_last = layouts.image_last(x, plan.geometry.x_shape)
    # The real steps, on fake tensors: the fakes of the inner operators know the shapes, which are so stated once.
    experts = None if offsets is None else Experts.of_sizes(offsets, x.shape[0], plan.expert_scales)
    x_q = operands.quantize_input(x_last, plan, s.need_dw, CallOptions(experts=experts))
    saves_codes = s.need_dx and plan.saves_w != "itself"
    w_q = operands.quantize_weight(w, plan, True) if saves_codes else None
    saved = saved_of(x, x_q, w, w_q, plan, s.need_dx, s.need_dw)
    y = layouts.like_image_first(x, plan.geometry.y_shape, x.shape, s.channels_last)
    return y, *_outputs(saved, plan, x)


@without_autocast
# The tag: a call draws a seed for stochastic rounding, so torch.compile must neither merge calls nor repeat one.
@torch.library.custom_op("te_nvfp4_cv::layer_backward", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def layer_backward(
    dy: Tensor,
    saved: list[Tensor],
    sizes: list[int],
    like_sizes: list[int],
    spec: str,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dw, db) of one layer, empty where not needed.

    Args:
        saved: the tensors of Saved, with the operands themselves where they are saved.
        like_sizes: number of axes of x, then the shapes of x and w.
        sizes: as for `layer`; spec: as for `layer`, with `like` filled in; offsets: as for `layer`.
    """
    plan, s = plan_of(sizes, spec), spec_of(spec)
    needs, scales = (s.need_dx, s.need_dw, s.need_db), _scales(plan, s, True)
    experts, parts = _experts(offsets, dy, plan), Saved(*saved)
    if scales is not None:
        scales.experts = experts
    options = CallOptions(scales=scales, experts=experts)
    if s.again:
        parts = _quantized_again(parts, plan, s, options)
    grads = forward_backward.backward(dy, parts, plan, _like(like_sizes, s.like), needs, options)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)  # type: ignore[return-value]


@layer_backward.register_fake
def _(dy, saved, sizes, like_sizes, spec, offsets=None):  # type: ignore[no-untyped-def]
    s = spec_of(spec)
    g = ConvGeometry.from_ints(sizes if s.again else [int(n) for n in sizes])
    like = _like(like_sizes, s.like)
    dx, dw, db = (dy.new_empty(0) for _ in range(3))
    if s.need_dx:
        dx = layouts.like_image_first(dy, g.x_shape, like.x_shape, like.x_channels_last).to(like.x_dtype)
    if s.need_dw:
        dw = layouts.kernel_as(dy.new_empty(g.weight_shape, dtype=like.w_dtype), g, like.w_shape, like.w_channels_last)
    if s.need_db:
        channels = dy.shape[-1] if g.rank == 0 else dy.shape[1]
        db = dy.new_empty((g.groups, channels) if g.routed else channels, dtype=like.bias_dtype)
    return dx, dw, db


def _like_text(like: Like) -> str:
    bias = "" if like.bias_dtype is None else _word(like.bias_dtype)
    flags = f"{int(like.x_channels_last)}{int(like.w_channels_last)}"
    return f"{_word(like.x_dtype)},{_word(like.w_dtype)},{bias},{flags}"


def _like(sizes: Any, text: str) -> Like:
    axes, *shapes = sizes
    x_dtype, w_dtype, bias_dtype, flags = text.split(",")
    return Like(
        tuple(shapes[:axes]),
        getattr(torch, x_dtype),
        flags[0] == "1",
        tuple(shapes[axes:]),
        getattr(torch, w_dtype),
        flags[1] == "1",
        getattr(torch, bias_dtype) if bias_dtype else None,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w, bias, sizes, text, offsets = inputs
    spec, saved = spec_of(text), Saved(*output[1:])
    # Put back what the operator could not return because it is one of its arguments.
    if spec.need_dw and (spec.again or plan_of(sizes, text).saves_x == "itself"):
        saved = saved._replace(x=x)
    if spec.need_dx and (spec.again or plan_of(sizes, text).saves_w == "itself"):
        saved = saved._replace(w=w)
    ctx.save_for_backward(*saved, offsets)
    like = Like.of(x, w, bias)
    ctx.sizes, ctx.spec, ctx.like_sizes = sizes, spec._replace(like=_like_text(like)), [x.dim(), *x.shape, *w.shape]
    # Codes have no gradient. Without the next two lines autograd would make zeros for each of them.
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 6
    # Forward saves nothing for db, so this is asked only here.
    spec = ctx.spec._replace(need_db=ctx.needs_input_grad[2])
    *saved, offsets = ctx.saved_tensors
    grads = layer_backward(dy, saved, ctx.sizes, ctx.like_sizes, spec.to_text(), offsets)
    needs = (spec.need_dx, spec.need_dw, spec.need_db)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None


layer.register_autograd(_backward, setup_context=_setup_context)


def apply(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    spec: LayerSpec,
    group: Any,
    offsets: Tensor | None = None,
) -> Tensor:
    """Return y of one call that torch.compile traces; `spec` without needs and group, which are filled in here."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # takes long to import, and only graphs need it

    # Asked here, while the call is traced: where the operator's code runs, grad mode is no longer the caller's.
    grad = torch.is_grad_enabled()
    name = "" if group is None else group.group_name
    again = not all(has_static_value(size) for size in x.shape)
    spec = spec._replace(need_dx=grad and x.requires_grad, need_dw=grad and w.requires_grad, group=name, again=again)
    found = shortfall.call_counted(layer, x, w, bias, geometry.to_ints(), spec.to_text(), offsets)
    y: Tensor = found[0]
    return y
