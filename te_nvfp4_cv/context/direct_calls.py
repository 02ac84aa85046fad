"""Know the calls of torch that multiply by weights beside the layers that NVFP4 takes, so that none of them is silent.

    torch.convolution                   below the layers: what programs are decomposed to
    torch.matmul, addmm, einsum, ...    products with a Parameter or a view of one; those of attention have none
    torch.ops.aten.addmm, ...           the same by these names, as exported and decomposed programs call them
    conv_tbc, bilinear, lstm, ...       layers that NVFP4 does not know
    convolution_backward                gradients that an autograd Function writes out, as torch.nn.grad does

They run in high precision. nv.coverage lists them, and a context counts them among what it has missed (shortfall.py).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from te_nvfp4_cv.backend.torch_private import no_graphs_inside
from te_nvfp4_cv.context.state import active_recipe
from te_nvfp4_cv.errors import warn_once
from te_nvfp4_cv.layer import shortfall
from te_nvfp4_cv.layer.check import MINIMUM


class DirectCall(NamedTuple):
    """One of these calls."""

    name: str  # torch's name of the function
    weight: Tensor
    channels: int  # the smaller number of channels of a group, on either side
    count: Callable[[Any], int]  # multiply-adds, of the result

    def macs(self, y: Any) -> int:
        """Return the multiply-adds of the call, whose result is y; 0 if they cannot be counted."""
        try:
            return self.count(y)
        except Exception as error:
            _uncounted(self.name, error)
            return 0

    @property
    def reason(self) -> str:
        """Say why the call is in high precision."""
        return f"torch.{self.name} called directly"


def direct_call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DirectCall | None:
    """Return what a call of a function in DIRECT multiplies, or None if no weight is among its tensors.

    It only counts: arguments that it does not understand are torch's to judge.
    """
    name = getattr(function, "__name__", "").partition(".")[0].strip("_")  # without the overload's name
    try:
        return DIRECT[function](name, args, kwargs)
    except Exception as error:
        _uncounted(name, error)
        return None


def _uncounted(name: str, error: Exception) -> None:
    """Say that a call is in no report."""
    warn_once(
        f"uncounted {name}",
        f"nvfp4: a direct call of torch.{name} could not be counted ({type(error).__name__}: {error}). It runs as in "
        "torch; nv.coverage and the warning about high precision leave it out",
    )


@no_graphs_inside
def run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return function(*args, **kwargs) of a function in DIRECT, and count the call as missed."""
    y = function(*args, **kwargs)
    recipe = None if torch.compiler.is_compiling() else active_recipe()
    if recipe is None or not recipe.nvfp4_gemms:
        return y
    call = direct_call(function, args, kwargs)
    if call is not None and call.channels >= MINIMUM and not call.weight.is_meta and not _in_a_graph():
        shortfall.add(call.reason, call.macs(y))
    return y


_AOT = os.path.join("", "_aot_autograd", "")


def _in_a_graph() -> bool:
    """Return True if AOTAutograd, on which most backends of torch.compile build, makes or runs a graph.

    What runs there in high precision was decided when the graph was traced.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and _AOT not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


# ---- what each kind multiplies --------------------------------------------------------------------------------------


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    named = [value for name, value in kwargs.items() if name != "out"]  # a result is no operand
    for value in (*args, *named):
        yield from (t for t in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(t, Tensor))


def _is_weight(tensor: Tensor) -> bool:
    parameter = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
    return parameter and tensor.dim() > 1


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")


def _convolution(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DirectCall:
    given = {**dict(zip(_CONVOLUTION, args, strict=False)), **kwargs}
    x, w, transposed = given["input"], given["weight"], given["transposed"]
    each = w.shape[1:].numel()  # of an output's elements, or of an input's of a transposed convolution
    channels = min(w.shape[0] // given["groups"], w.shape[1])
    return DirectCall(name, w, channels, lambda y: (x if transposed else y).numel() * each)


def _backward(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DirectCall:
    dy, x, w = list(_tensors(args, kwargs))[:3]
    groups = kwargs.get("groups", args[9] if len(args) > 9 else 1)
    transposed = kwargs.get("transposed", args[7] if len(args) > 7 else False)
    each = (x if transposed else dy).numel() * w.shape[1:].numel()
    channels = min(w.shape[0] // groups, w.shape[1])
    return DirectCall(name, w, channels, lambda y: each * sum(g is not None for g in y[:2]))  # the third is no product


def _weight_and_others(operands: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    """Return the last weight and the other operands, among which the same tensor may be once more."""
    at = [i for i, t in enumerate(operands) if _is_weight(t)]
    return (operands[at[-1]], operands[: at[-1]] + operands[at[-1] + 1 :]) if at else (None, operands)


def _factors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors of a product in the order of torch. Of names the order is the caller's; sorted, it is that."""
    names = sorted(kwargs, key=lambda name: (name not in ("input", "self"), name))
    return list(_tensors(args, {name: kwargs[name] for name in names}))


def _product(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DirectCall | None:
    operands = _factors(args, kwargs)[-2:]  # what addmm adds stands before the two
    w, others = _weight_and_others(operands)
    if w is None or not others or others[0].dim() == 0:  # inner: a number times a weight is no product
        return None
    summed = w.shape[-1] if name == "inner" or w is operands[0] else w.shape[-2]
    summed *= w.shape[0] if name == "addbmm" else 1
    return DirectCall(name, w, min(w.shape[-2:]), lambda y: y.numel() * summed)


def _sum(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DirectCall | None:
    operands = _factors(args, kwargs)
    if not any(map(_is_weight, operands)):
        return None
    if name == "einsum":
        axes, result = _axes_of_einsum(args or (kwargs["equation"],), operands)
    elif name == "tensordot":
        operands = operands[:2]  # its dims may be a tensor, too
        axes, result = _axes_of_tensordot(operands, *args[2:], **kwargs)
    else:  # a chain: each matrix shares an axis with the one before; the outer two may be vectors
        axes = [[at, at + 1] for at in range(len(operands))]
        axes[0], axes[-1] = axes[0][-operands[0].dim() :], axes[-1][: operands[-1].dim()]
        result = [0, len(operands)]
    sizes: dict[Any, int] = {}
    for own, t in zip(axes, operands, strict=True):
        sizes |= {axis: sizes.get(axis, 1) if size == 1 else size for axis, size in zip(own, t.shape, strict=True)}
    for own, t in zip(axes, operands, strict=True):  # of size 1, an operand is repeated along an axis of the others
        own[:] = [axis for axis, size in zip(own, t.shape, strict=True) if size == sizes[axis]]
    # torch sums an operand over axes that nothing else has before it multiplies.
    axes = [[axis for axis in own if axis in result or sum(axis in other for other in axes) > 1] for own in axes]
    macs, done = 0, set(axes[0])
    for at, own in enumerate(axes[1:], 2):  # from left to right; multi_dot may find less
        both = done.union(own)
        done = both & set(result).union(*axes[at:])
        macs += math.prod(sizes[axis] for axis in both) if done != both else 0  # else elements are scaled
    for at in reversed(range(len(axes))):
        others, channels = axes[:at] + axes[at + 1 :], 0
        for other in others:
            summed = [axis for axis in axes[at] if axis in other and axis not in result]
            kept = [axis for axis in axes[at] if axis not in other]
            if summed and kept:  # else it is no product of matrices: elements are scaled, or summed up
                channels = max(channels, min(math.prod(sizes[axis] for axis in side) for side in (summed, kept)))
        if channels and _is_weight(operands[at]):
            return DirectCall(name, operands[at], channels, lambda y: macs)
    return None


_Axes = tuple[list[list[Any]], list[Any]]  # names of each operand's axes, and of the result's


def _axes_of_einsum(args: tuple[Any, ...], operands: list[Tensor]) -> _Axes:
    """Name the axes of torch.einsum, whose equation is a text or lists of numbers beside the operands."""
    axes: list[list[Any]]
    result: list[Any] | None
    if isinstance(args[0], str):
        left, arrow, right = args[0].replace(" ", "").replace("...", "\0").partition("->")
        axes, result = [list(own) for own in left.split(",")], list(right) if arrow else None
        rest: Any = "\0"
    else:
        axes = [list(own) for own in args if not isinstance(own, Tensor)]
        result = axes.pop() if len(axes) > len(operands) else None
        rest = Ellipsis
    more: dict[Any, None] = {}  # what "..." stands for, counted from its last axis
    for own, t in zip(axes, operands, strict=True):
        if rest in own:
            named = [(rest, t.dim() - len(own) - at) for at in range(t.dim() - len(own) + 1)]
            own[own.index(rest) : own.index(rest) + 1] = named
            more |= dict.fromkeys(named)
    if result is None:
        every = [axis for own in axes for axis in own]
        return axes, [*more, *(axis for axis in every if every.count(axis) == 1 and axis not in more)]
    return axes, [*(axis for axis in result if axis != rest), *(more if rest in result else ())]


def _axes_of_tensordot(
    operands: list[Tensor], dims_self: Any = 2, dims_other: Any = None, dims: Any = None, **_: Any
) -> _Axes:
    """Name the axes of torch.tensordot, where one number means the last axes of a and the first of b."""
    (a, b), dims = operands, dims_self if dims is None else dims
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    if isinstance(dims, int):
        dims = [range(a.dim() - dims, a.dim()), range(dims)]
    of_a, of_b = dims if dims_other is None else (dims, dims_other)
    axes = list(range(a.dim())), list(range(a.dim(), a.dim() + b.dim()))
    for one, other in zip(of_a, of_b, strict=True):
        axes[1][other] = axes[0][one]
    return list(axes), sorted(set(axes[0]) ^ set(axes[1]))


def _other_layer(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DirectCall | None:
    """Read conv_tbc, whose weight is [taps, in, out], and bilinear, whose weight is [out, in, in]."""
    weights = [t for t in _tensors(args, kwargs) if _is_weight(t) and t.dim() == 3]
    if not weights:
        return None
    w = weights[-1]
    out = w.shape[2] if name == "conv_tbc" else w.shape[0]
    return DirectCall(name, w, min(w.shape[1:]), lambda y: y.numel() * (w.numel() // max(out, 1)))


def _recurrent(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DirectCall | None:
    tensors = list(_tensors(args, kwargs))
    weights = [t for t in tensors if _is_weight(t)]
    if not weights:
        return None
    rows = tensors[0].numel() // max(tensors[0].shape[-1], 1)
    macs = rows * sum(w.numel() for w in weights)
    return DirectCall(name, weights[0], min(weights[0].shape), lambda y: macs)


_aten = torch.ops.aten
_Reader = Callable[[str, tuple[Any, ...], dict[str, Any]], DirectCall | None]


def _of_aten(*names: str) -> tuple[Any, ...]:
    """Return ATen's operators of these names, and their overloads that return a result."""
    found: list[Any] = []
    for name in names:
        packet = getattr(_aten, name)
        found += [packet, *(getattr(packet, kind) for kind in packet.overloads() if not kind.endswith("out"))]
    return tuple(found)


GRADIENTS = frozenset(_of_aten("convolution_backward"))
_CONVOLUTIONS = (torch.convolution, torch._convolution, *_of_aten("convolution"))
_PRODUCTS = ("matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "inner")
_METHODS = (*_PRODUCTS, "__matmul__", "addmm_", "baddbmm_", "addbmm_", "addmv_")
_SUMS = (torch.einsum, torch.tensordot, torch.chain_matmul, torch.linalg.multi_dot)
_CELLS = ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu", *_CELLS)
DIRECT: dict[Any, _Reader] = {
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(GRADIENTS, _backward),
    **{getattr(owner, name): _product for name in _METHODS for owner in (torch, Tensor) if hasattr(owner, name)},
    **dict.fromkeys((torch.linalg.matmul, *_of_aten(*_PRODUCTS, "linalg_matmul")), _product),
    **dict.fromkeys((*_SUMS, *_of_aten("einsum", "tensordot", "chain_matmul", "linalg_multi_dot")), _sum),
    **dict.fromkeys((torch.conv_tbc, torch.bilinear, *_of_aten("conv_tbc", "bilinear")), _other_layer),
    **dict.fromkeys((*(getattr(torch, name) for name in _RECURRENT), *_of_aten(*_RECURRENT)), _recurrent),
}
