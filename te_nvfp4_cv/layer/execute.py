"""One call of a convolution or linear layer: may it run in NVFP4, are its shapes right, what is its geometry; then it
is executed.

nvfp4_autocast asks `ineligible` and leaves what it names in high precision; nv.functional and the NVFP4 modules raise
instead. `execute` casts as
torch.autocast would, checks, resolves geometry and backend, and hands over to autograd.QuantizedConv.
Observers (coverage, telemetry) are told here of every call of their thread.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.errors import describe, value_error
from te_nvfp4_cv.layer import custom_op, delayed_scaling, forward_backward, weight_transforms
from te_nvfp4_cv.layer import deferred as producers
from te_nvfp4_cv.layer.autograd import QuantizedConv
from te_nvfp4_cv.layer.plan import Plan, Watch
from te_nvfp4_cv.ops.geometry import ConvGeometry, output_size, transposed_output_size
from te_nvfp4_cv.ops.layouts import is_channels_last
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MINIMUM = 16  # channels on either side of a group


@dataclass(frozen=True)
class Call:
    """What an observer is told about one layer's call: its shapes, its recipe, or why it runs in high precision."""

    op: str
    weight: Tensor
    x: Tensor
    geometry: ConvGeometry | None
    recipe: NVFP4BlockScaling | None
    reason: str


@dataclass(frozen=True)
class Seen:
    """What an observer wants of a call: `finished` gets its result, `watch` is shown the operands of an NVFP4 call."""

    finished: Callable[[Tensor], None] | None = None
    watch: Watch | None = None


class Shaped(Protocol):
    """A weight, or what stands for one that is kept otherwise: only its shape is read."""

    @property
    def shape(self) -> torch.Size: ...

    def dim(self) -> int: ...


Observer = Callable[[Call], Seen | None]


class _Local(threading.local):
    """The observers that each thread has entered, the innermost last."""

    def __init__(self) -> None:
        self.observers: list[Observer] = []


_local = _Local()


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Tell `observer` about every convolution and linear call that this thread makes under the context, before it runs.

    It may return a Seen. Of several observers the innermost is told first, the next one only of what that lets pass
    (None): two models that are watched side by side. Other threads' calls are not told, but for those that activation
    checkpointing repeats for this thread (see observers).
    """
    entered = _local.observers
    entered.append(observer)
    try:
        yield
    finally:
        entered.remove(observer)


def observers() -> list[Observer]:
    """Return the list of this thread's observers: the list itself, which grows and shrinks as contexts are entered.

    Activation checkpointing takes it along: on CUDA, autograd repeats a forward pass in a thread of its own, and those
    calls belong to whoever watches the thread that made them first.
    """
    return _local.observers


@contextmanager
def told_to(entered: list[Observer]) -> Iterator[None]:
    """Tell calls under the context to the observers of another thread (its `observers()`) instead of this one's."""
    before, _local.observers = _local.observers, entered
    try:
        yield
    finally:
        _local.observers = before


def observed() -> bool:
    """Return whether anything is told of the calls that this thread makes."""
    return bool(_local.observers)


def reported(call: Call, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """function(*args, **kwargs), with the innermost observer told before and after."""
    return _reported(call, lambda _: function(*args, **kwargs))


def _reported(call: Call, run: Callable[[Watch | None], Tensor]) -> Tensor:
    seen = next((seen for told in reversed(_local.observers) if (seen := told(call)) is not None), None)
    y = run(None if seen is None else seen.watch)
    if seen is not None and seen.finished is not None:
        seen.finished(y)
    return y


# ---- one call --------------------------------------------------


def ineligible(op: str, x: Tensor, w: Tensor, groups: int, recipe: NVFP4BlockScaling) -> str | None:
    """Why a valid torch call does not run in NVFP4, or None. Says nothing about shapes that torch would refuse too."""
    if not isinstance(x, Tensor) or not isinstance(w, Tensor):
        return "an operand is not a tensor"
    for name, tensor in (("input", x), ("weight", w)):
        if tensor.dtype not in DTYPES:
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
    if x.device.type == "meta":
        return "meta tensors hold no values"
    if x.device != w.device:
        return f"input on {x.device}, weight on {w.device}"
    if x.is_sparse or w.is_sparse or x.layout != torch.strided or w.layout != torch.strided:
        return "an operand is not a dense tensor"
    if w.dim() < 2 or groups < 1 or w.shape[0] % groups:
        return None
    transposed = "transpose" in op
    sides = (w.shape[0] // groups, w.shape[1])
    thin = min(sides)
    if thin < MINIMUM:
        names = ("in", "out") if transposed else ("out", "in")
        which = names[0] if sides[0] < MINIMUM else names[1]
        if groups > 1:
            kind = "depthwise" if w.shape[1] == 1 else "thin groups"
            return f"{kind}: {thin} {which}-channel{'s' if thin > 1 else ''} per group, fewer than {MINIMUM}"
        if recipe.thin_layers != "pad":
            plural = "s" if thin > 1 else ""
            fewer = f"thin layer: {thin} {which}-channel{plural}, fewer than {MINIMUM}"
            return f"{fewer} (recipe.thin_layers='high_precision')"
    if not recipe.nvfp4_gemms:
        return "recipe.high_precision_gemms names all three GEMMs"
    return None


def execute(op: str, x: Tensor, *call: Any, **named: Any) -> Tensor:
    """An eligible call: cast as torch.autocast would, check, resolve, run. Arguments: those of _execute."""
    try:
        return _execute(op, x, *call, **named)
    except BaseException:
        producers.settle(x)  # who catches this may read x
        raise


def _execute(
    op: str,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    output_padding: Any,
    recipe: NVFP4BlockScaling,
    backend: str,
    group: Any = None,
) -> Tensor:
    """`group`: the ranks whose amaxes are one."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    producer = producers.claim(x, w.dim() - 2, padding, torch.get_autocast_dtype(device) if autocast else x.dtype)
    if autocast:
        x = x.to(torch.get_autocast_dtype(device))
    elif x.dtype != w.dtype:
        raise value_error(
            f"nvfp4 {op}: input and weight differ in dtype.",
            got=f"x {describe(x)}, weight {describe(w)}",
            needs="one dtype outside of torch.autocast",
            fix="model.to(x.dtype), x.to(w.dtype), or run under torch.autocast",
        )
    x, geometry, unbatched = geometry_of(op, x, w, bias, stride, padding, dilation, groups, output_padding)
    if 0 in x.shape or 0 in geometry.y_shape:  # nothing to quantize: torch's own result, and its gradients
        producers.settle(x)
        y = _plain(op, x, w.to(x.dtype), None if bias is None else bias.to(x.dtype), geometry)
        return y.squeeze(0) if unbatched else y
    chosen = dispatch.resolve(backend, x.device)
    channels_last = is_channels_last(x) or is_channels_last(w)
    plan = Plan(geometry, recipe, chosen, dispatch.compute_dtype(x.dtype, x.device, autocast), channels_last)
    if torch.compiler.is_compiling():  # no producers and no observers inside of a graph
        delayed_scaling.refuse(plan, group)
        w = weight_transforms.apply(w, None, plan)
        y = custom_op.apply(x, w, bias, plan, group)
        return y.squeeze(0) if unbatched else y
    call = Call(op, w, x, geometry, recipe, "")
    codes, scales = forward_backward.codes_of(w, plan), delayed_scaling.of_call(x, w, bias, plan, group)
    if producer is not None and not producer.serves(plan, torch.is_grad_enabled() and w.requires_grad, scales):
        producers.settle(x)
        producer = None
    w = weight_transforms.apply(w, codes, plan)
    if not torch.is_grad_enabled():  # a Function's needs_input_grad does not know: no face is made that nobody keeps
        x, w, bias = x.detach(), w.detach(), None if bias is None else bias.detach()
    y = _reported(call, lambda watch: QuantizedConv.apply(x, w, bias, plan, codes, scales, producer, watch))
    return y.squeeze(0) if unbatched else y


def geometry_of(
    op: str,
    x: Tensor,
    w: Shaped,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    output_padding: Any,
) -> tuple[Tensor, ConvGeometry, bool]:
    """(x with a batch axis and what padding="same" adds on one side, the call's geometry, whether x had no batch axis).

    Raises:
        ValueError: shapes that do not fit.
    """
    rank = w.dim() - 2
    _check_shapes(op, x, w, bias, rank, groups)
    unbatched = rank > 0 and x.dim() == rank + 1
    if unbatched:
        x = x.unsqueeze(0)
    if isinstance(padding, str):
        x, padding = _named_padding(op, x, w, stride, padding, dilation)
    return x, _geometry(op, x, w, stride, padding, dilation, groups, output_padding), unbatched


def _check_shapes(op: str, x: Tensor, w: Shaped, bias: Tensor | None, rank: int, groups: int) -> None:
    expected = 0 if op == "linear" else int(op[-2])
    if rank != expected or (rank and x.dim() not in (rank + 1, rank + 2)) or x.dim() < 1:
        needs = (
            "x [..., C] and weight [O, C]"
            if op == "linear"
            else f"x [B, C, {expected} image axes] and weight [., ., {expected} kernel axes]"
        )
        raise value_error(
            f"nvfp4 {op}: wrong rank.",
            got=f"x {describe(x)}, weight {describe(w)}",
            needs=needs,
            fix="reshape the input",
        )
    transposed = "transpose" in op
    channels = x.shape[-1] if rank == 0 else x.shape[x.dim() - rank - 1]
    wanted = w.shape[0] if transposed else w.shape[1] * groups
    if channels != wanted or groups < 1 or w.shape[0] % groups:
        raise value_error(
            f"nvfp4 {op}: channels do not match.",
            got=f"x {describe(x)}, weight {describe(w)}, groups={groups}: input has {channels} channels",
            needs=f"{wanted} input channels, and groups that divide the weight's first axis",
            fix="check the layer before this one",
        )
    out = w.shape[1] * groups if transposed else w.shape[0]
    if bias is not None and tuple(bias.shape) != (out,):
        raise value_error(
            f"nvfp4 {op}: bias does not match.",
            got=f"bias {describe(bias)}",
            needs=f"({out},)",
            fix="one bias per output channel",
        )
    if bias is not None and bias.device != x.device:
        raise value_error(
            f"nvfp4 {op}: bias is on another device.",
            got=f"x on {x.device}, bias on {bias.device}",
            needs="one device",
            fix="bias.to(x.device), or model.to(device)",
        )


def _as_int(value: Any) -> Any:
    """numpy's and torch's integers as int; other things, bool among them, as something that is no int."""
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value
    try:
        return operator.index(value)
    except TypeError:
        return None


def int_tuple(value: Any, rank: int, op: str, name: str, least: int) -> tuple[int, ...]:
    """An int or a sequence as one int per axis; ValueError for anything else."""
    values = tuple(map(_as_int, value)) if isinstance(value, Sequence) else (_as_int(value),)
    values = values * rank if len(values) == 1 else values
    if len(values) != rank or any(not isinstance(v, (int, torch.SymInt)) or v < least for v in values):
        raise value_error(
            f"nvfp4 {op}: bad {name}.",
            got=repr(value),
            needs=f"an int >= {least}, or {rank} of them",
            fix=f"check {name}",
        )
    return values


def _geometry(
    op: str, x: Tensor, w: Shaped, stride: Any, padding: Any, dilation: Any, groups: int, output_padding: Any
) -> ConvGeometry:
    rank, transposed = w.dim() - 2, "transpose" in op
    stride, dilation = int_tuple(stride, rank, op, "stride", 1), int_tuple(dilation, rank, op, "dilation", 1)
    padding, extra = (
        int_tuple(padding, rank, op, "padding", 0),
        int_tuple(output_padding, rank, op, "output_padding", 0),
    )
    kernel = tuple(w.shape[2:])
    if rank == 0:
        batch = x.numel() // max(x.shape[-1], 1)
        size: tuple[int, ...] = ()
        out: tuple[int, ...] = ()
    else:
        batch, size = x.shape[0], tuple(x.shape[2:])
        rows = list(zip(size, kernel, stride, padding, dilation, strict=True))
        if transposed:
            out = tuple(transposed_output_size(*row, more) for row, more in zip(rows, extra, strict=True))
        else:
            out = tuple(output_size(*row) for row in rows)
        if min(out) < 0 or (min(out) == 0 and min(size) > 0 and not transposed):
            raise value_error(
                f"nvfp4 {op}: the output would be empty.",
                got=f"x {describe(x)}, kernel {kernel}, padding {padding}, dilation {dilation}",
                needs="an image at least as large as the dilated kernel, padding included",
                fix="pad the input or use a smaller kernel",
            )
        if any(more >= max(s, d) for more, s, d in zip(extra, stride, dilation, strict=True) if more):
            raise value_error(
                f"nvfp4 {op}: bad output_padding.",
                got=str(extra),
                needs="less than stride or dilation",
                fix="check output_padding",
            )
    if transposed:
        return ConvGeometry(
            batch, w.shape[1] * groups, w.shape[0], out, size, kernel, stride, padding, dilation, extra, groups, True
        )
    return ConvGeometry(
        batch, w.shape[1] * groups, w.shape[0], size, out, kernel, stride, padding, dilation, extra, groups, False
    )


def _named_padding(
    op: str, x: Tensor, w: Shaped, stride: Any, padding: str, dilation: Any
) -> tuple[Tensor, tuple[int, ...]]:
    """padding="same" / "valid" as numbers; a side that needs one more than the other is padded here."""
    rank = w.dim() - 2
    if padding == "valid":
        return x, (0,) * rank
    if padding != "same" or any(s != 1 for s in int_tuple(stride, rank, op, "stride", 1)):
        raise value_error(
            f"nvfp4 {op}: bad padding.",
            got=f"padding={padding!r}, stride={stride}",
            needs='"valid", or "same" with stride 1',
            fix="give numbers",
        )
    totals = [d * (k - 1) for d, k in zip(int_tuple(dilation, rank, op, "dilation", 1), w.shape[2:], strict=True)]
    if any(total % 2 for total in totals):
        x = F.pad(x, [n for total in reversed(totals) for n in (0, total % 2)])
    return x, tuple(total // 2 for total in totals)


def _plain(op: str, x: Tensor, w: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    if g.rank == 0:
        return F.linear(x, w, bias)
    if g.transposed:
        return getattr(F, op)(x, w, bias, g.stride, g.padding, g.output_padding, g.groups, g.dilation)
    return getattr(F, op)(x, w, bias, g.stride, g.padding, g.dilation, g.groups)
