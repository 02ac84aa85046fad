"""Checks one call and plans it: can its recipe be used, may it run in NVFP4, do its shapes fit, what is its Plan.

nvfp4_autocast leaves what `ineligible` refuses in high precision, and coverage says why; nv.functional and the NVFP4
modules raise instead. Calls that are alike share one geometry and one Plan. The caches are keyed by everything that
decides: the operator, shapes and dtypes, the arguments with their types, the recipe with its name, the backend that was
chosen, the dtype of dequantized operands, y's memory format. What can change between two such calls (the backend that
"auto" means, autocast) is asked before, at every call. Each cache holds 4096 entries. Sizes that torch.compile traces
have no hash, and pass by the cache.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.backend.torch_private import constant_in_graphs
from te_nvfp4_cv.errors import describe, runtime_error, shape_error
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.layer.plan import Plan, plan_for
from te_nvfp4_cv.ops.geometry import ConvArgs, ConvGeometry, int_tuple, output_size, transposed_output_size
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, as_recipe

CACHED = 4096  # entries: one for each distinct call of a run, and a network has tens to hundreds
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MINIMUM = BLOCK  # channels on either side of a group


# ---- its recipe -----------------------------------------------------------------------------------------------------


def checked_recipe(recipe: object) -> NVFP4BlockScaling:
    """Return the recipe that as_recipe makes of the argument, after making sure that quantizers can carry it out.

    Raises:
        TypeError: It is not a recipe.
        ValueError: Its fields contradict each other, see NVFP4BlockScaling.validate_for_use.
    """
    if isinstance(recipe, str) and torch.compiler.is_compiling():
        _read(recipe)
        recipe = _named[recipe]
    found = recipe if isinstance(recipe, NVFP4BlockScaling) else as_recipe(recipe)
    if torch.compiler.is_compiling():  # Dynamo warns where it traces a cached function
        found.validate_for_use()
    else:
        _check_once(found)
    return found


_named: dict[str, NVFP4BlockScaling] = {}  # what a graph that torch.compile traces has named


@constant_in_graphs
def _read(name: str) -> bool:
    # Called while torch.compile traces, which cannot look into files. It takes constants from here, and no objects.
    _named[name] = as_recipe(name)
    return True


@functools.lru_cache(maxsize=256)
def _check_once(recipe: NVFP4BlockScaling) -> None:
    # Equal recipes need one check: contexts are entered in each step, with the same recipe.
    recipe.validate_for_use()


# ---- may it run in NVFP4 --------------------------------------------------------------------------------------------


def ineligible(op: str, x: Tensor, w: Tensor, groups: int, recipe: NVFP4BlockScaling) -> str | None:
    """Return why this call must stay in high precision, or None if it can run in NVFP4.

    Shapes that torch itself rejects are not checked here; torch's own error is the better one.
    """
    if not isinstance(x, Tensor) or not isinstance(w, Tensor):
        return "an operand is not a tensor"
    for name, tensor in (("input", x), ("weight", w)):
        if tensor.dtype not in DTYPES:
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
    if x.device.type == "meta":
        return "meta tensors hold no values"
    if x.device != w.device:
        return f"input on {x.device}, weight on {w.device}"
    if x.layout != torch.strided or w.layout != torch.strided or x.is_nested:
        return "an operand is not a dense tensor"
    # These are errors, and _check_shapes or torch words them better than a reason for high precision could.
    if w.dim() < 2 or groups < 1 or w.shape[0] % groups:
        return None
    sizes = w.shape[0] // groups, w.shape[1]
    # A traced size has no hash, and Dynamo warns where it traces a cached function.
    traced = torch.compiler.is_compiling() or not all(isinstance(size, int) for size in sizes)
    return (_thin if traced else _cached_thin)(op, *sizes, groups, recipe)


def _thin(op: str, first: int, second: int, groups: int, recipe: NVFP4BlockScaling) -> str | None:
    """Return why channels are too few, or why the recipe leaves nothing; `first`, `second`: of the weight's axes."""
    thin = min(first, second)
    if thin < MINIMUM:
        names = ("in", "out") if "transpose" in op else ("out", "in")
        which = names[0] if first < MINIMUM else names[1]
        plural = "s" if thin > 1 else ""
        # Groups are never padded: 16 channels for each group of a depthwise layer would multiply its work.
        if groups > 1:
            kind = "depthwise" if second == 1 else "thin groups"
            return f"{kind}: {thin} {which}-channel{plural} per group, fewer than {MINIMUM}"
        if recipe.thin_layers != "pad":
            fewer = f"thin layer: {thin} {which}-channel{plural}, fewer than {MINIMUM}"
            return f"{fewer} (recipe.thin_layers='high_precision')"
    return None if recipe.nvfp4_gemms else "recipe.high_precision_gemms names all three GEMMs"


_cached_thin = functools.lru_cache(maxsize=CACHED)(_thin)


TRACE = "torch.compile or torch.export in its place; or trace in high precision, under nvfp4_autocast(enabled=False)"


def refuse_jit_trace(what: str, fix: str = TRACE) -> None:
    """Refuse torch.jit.trace, which would freeze random bits, tensor scales and shapes into its graph.

    Raises:
        RuntimeError: it is at work.
    """
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        raise runtime_error(
            f"nvfp4: torch.jit.trace does not take {what}.",
            got="a call in NVFP4 inside torch.jit.trace",
            needs="Python at each call: it draws random bits and looks at shapes",
            fix=fix,
        )


def transformed() -> bool:
    """Return True if torch.func (grad, vmap, jvp) or forward-mode AD is at work: our Functions do not know these."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_dynamo_compiling() and torch_func_is_on()
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


# Dynamo enters the transform itself while it traces the code inside, and makes a guard of the stack.
@constant_in_graphs
def torch_func_is_on() -> bool:
    """Return True inside of a transform of torch.func; forward mode may be on without one."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_thin(w: Tensor, groups: int) -> bool:
    """Return True if a weight's shape is not for NVFP4: too few channels in a group."""
    return not groups or min(w.shape[0] // groups, w.shape[1]) < MINIMUM


# ---- its geometry and plan ------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """The shape and dtype of a tensor, or of a weight that is not there as one."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str

    @classmethod
    def of(cls, tensor: Tensor) -> Sizes:
        """Read them from a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype)


class CallShape(NamedTuple):
    """All that decides the geometry of one call. `types` are those of the arguments: 1, True and 1.0 have one hash."""

    op: str
    x: Sizes
    w: Sizes
    bias: Sizes | None
    args: ConvArgs
    types: Any = None

    @classmethod
    def of(cls, op: str, x: Tensor, w: Sizes, bias: Tensor | None, args: ConvArgs) -> CallShape:
        """Describe a call.

        Raises:
            ShapeError: bias is on another device than x.
        """
        if bias is not None and bias.device != x.device:
            raise shape_error(
                f"nvfp4 {op}: bias is on another device.",
                got=f"x on {x.device}, bias on {bias.device}",
                needs="one device",
                fix="bias.to(x.device), or model.to(device)",
            )
        types: Any = None
        # Only the cache needs the types, and torch.compile's calls pass it by.
        if not torch.compiler.is_compiling():
            types = tuple(tuple(map(type, a)) if isinstance(a, tuple) else type(a) for a in args)
            types = types if _constant(types) else [types]  # a list has no hash: such a call passes by the cache
        return cls(op, Sizes.of(x), w, None if bias is None else Sizes.of(bias), args, types)


@functools.lru_cache(maxsize=CACHED)
def _constant(types: tuple[Any, ...]) -> bool:
    """Return True if arguments of these types cannot change. A tensor can, and its hash stays the same."""
    flat = [kind for entry in types for kind in (entry if isinstance(entry, tuple) else (entry,))]
    return all(issubclass(kind, (int, float, str)) for kind in flat)


class Lowered(NamedTuple):
    """A call's geometry, and what x needs before: a batch axis, padding that padding="same" adds on one side."""

    geometry: ConvGeometry
    unbatched: bool
    pad: tuple[int, ...]

    @property
    def empty(self) -> bool:
        """True if x or y has no elements. Inference does not ask: torch.export may not know the batch size yet."""
        return 0 in self.geometry.x_shape or 0 in self.geometry.y_shape

    def input(self, x: Tensor) -> Tensor:
        """Return x with the batch axis and the padding that the geometry counts on."""
        x = x.unsqueeze(0) if self.unbatched else x
        return F.pad(x, self.pad) if self.pad else x


def lowered(call: CallShape) -> Lowered:
    """Return the geometry of a call.

    Raises:
        ShapeError: shapes or arguments that do not fit.
    """
    if torch.compiler.is_compiling():
        return _lower(call)
    try:
        return _cached_lower(call)
    except TypeError:  # a list among the arguments, or a traced size: neither has a hash
        return _lower(call)


def planned(
    call: CallShape, recipe: NVFP4BlockScaling, backend: str, compute_dtype: torch.dtype, channels_last: bool
) -> Plan:
    """Return the Plan of a call whose shapes are right."""
    try:
        return _cached_plan(call, recipe, recipe.name, backend, compute_dtype, channels_last)
    except TypeError:  # as in `lowered`: something without a hash
        return plan_for(_lower(call).geometry, recipe, backend, compute_dtype, channels_last)


@functools.lru_cache(maxsize=CACHED)
def _cached_plan(call: CallShape, recipe: NVFP4BlockScaling, name: str, *where: Any) -> Plan:
    # The name takes no part in comparisons of recipes, but errors and reports print it.
    return plan_for(lowered(call).geometry, recipe, *where)


def _lower(call: CallShape) -> Lowered:
    if call.op == "grouped_linear":
        return _lower_grouped(call)
    rank = len(call.w.shape) - 2
    _check_shapes(call, rank)
    x, padding = call.x.shape, call.args.padding
    pad: tuple[int, ...] = ()
    # A linear layer takes any leading axes, so no batch axis can be missing there.
    unbatched = rank > 0 and len(x) == rank + 1
    x = (1, *x) if unbatched else x
    if isinstance(padding, str) and "transpose" not in call.op:  # to which torch gives numbers only
        pad, padding = named_padding(call, rank)
        more = [low + high for low, high in zip(pad[::2], pad[1::2], strict=True)]  # F.pad counts from the last axis
        x = (*x[:2], *(size + n for size, n in zip(x[2:], reversed(more), strict=True))) if pad else x
    geometry = _geometry(call, rank, x, padding)
    return Lowered(geometry, unbatched, pad)


_cached_lower = functools.lru_cache(maxsize=CACHED)(_lower)


def _lower_grouped(call: CallShape) -> Lowered:
    x, w = call.x.shape, call.w.shape
    if len(x) != 2 or len(w) != 3 or not w[0] or x[1] != w[2]:
        raise shape_error(
            "nvfp4 grouped_linear: shapes do not match.",
            got=f"x {describe(call.x)}, weight {describe(call.w)}",
            needs="x [tokens, C] and weight [E, O, C]",
            fix="x.flatten(0, -2) for other leading axes; weight.transpose(1, 2) of one that is stored [E, C, O]",
        )
    experts, outputs, channels = w
    if call.bias is not None and call.bias.shape != (experts, outputs):
        raise shape_error(
            "nvfp4 grouped_linear: bias does not match.",
            got=f"bias {describe(call.bias)}",
            needs=f"({experts}, {outputs})",
            fix="one bias per expert and output channel",
        )
    none: tuple[int, ...] = ()
    sizes = (none, none, none, none, none, none, none)
    return Lowered(ConvGeometry(x[0], experts * channels, experts * outputs, *sizes, experts, False, True), False, ())


def _check_shapes(call: CallShape, rank: int) -> None:
    op, x, w, groups = call.op, call.x.shape, call.w.shape, call.args.groups
    got = f"x {describe(call.x)}, weight {describe(call.w)}"
    expected = 0 if op == "linear" else int(op[-2])
    if rank != expected or (rank and len(x) not in (rank + 1, rank + 2)) or len(x) < 1:
        images = f"x [B, C, {expected} image axes] and weight [., ., {expected} kernel axes]"
        raise shape_error(
            f"nvfp4 {op}: wrong rank.",
            got=got,
            needs="x [..., C] and weight [O, C]" if op == "linear" else images,
            fix="reshape the input",
        )
    transposed = "transpose" in op
    # x is as torch has it, [B, C, *image] or [C, *image]. The weight is [O, C / groups, *kernel], and that of a
    # transposed convolution [C, O / groups, *kernel].
    channels = x[-1] if rank == 0 else x[len(x) - rank - 1]
    wanted = w[0] if transposed else w[1] * groups
    if channels != wanted or groups < 1 or w[0] % groups:
        raise shape_error(
            f"nvfp4 {op}: channels do not match.",
            got=f"{got}, groups={groups}: input has {channels} channels",
            needs=f"{wanted} input channels, and groups that divide the weight's first axis",
            fix="check the layer before this one",
        )
    out = w[1] * groups if transposed else w[0]
    if call.bias is not None and call.bias.shape != (out,):
        raise shape_error(
            f"nvfp4 {op}: bias does not match.",
            got=f"bias {describe(call.bias)}",
            needs=f"({out},)",
            fix="one bias per output channel",
        )


def _geometry(call: CallShape, rank: int, x: tuple[int, ...], padding: Any) -> ConvGeometry:
    """Return the geometry of x's batched and padded shape."""
    op, w, args = call.op, call.w.shape, call.args._replace(padding=padding)
    names = ("stride", "padding", "dilation", "output_padding")
    stride, pads, dilation, extra = (int_tuple(getattr(args, name), rank, op, name) for name in names)
    kernel, transposed = tuple(w[2:]), "transpose" in op
    size: tuple[int, ...] = ()
    out: tuple[int, ...] = ()
    if rank == 0:
        batch = 1
        # All leading axes of a linear layer together are its batch.
        for n in x[:-1]:
            batch = batch * n
    else:
        batch, size = x[0], tuple(x[2:])
        rows = list(zip(size, kernel, stride, pads, dilation, strict=True))
        if transposed:
            out = tuple(transposed_output_size(*row, more) for row, more in zip(rows, extra, strict=True))
        else:
            out = tuple(output_size(*row) for row in rows)
        # An empty image gives an empty output, as in torch. A kernel that does not fit into an image is an error.
        if min(out) < 0 or (min(out) == 0 and min(size) > 0 and not transposed):
            raise shape_error(
                f"nvfp4 {op}: the output would be empty.",
                got=f"x {describe(call.x)}, kernel {kernel}, padding {pads}, dilation {dilation}",
                needs="an image at least as large as the dilated kernel, padding included",
                fix="pad the input or use a smaller kernel",
            )
        if any(more >= max(s, d) for more, s, d in zip(extra, stride, dilation, strict=True) if more):
            raise shape_error(
                f"nvfp4 {op}: bad output_padding.",
                got=str(extra),
                needs="less than stride or dilation",
                fix="check output_padding",
            )
    # Side a is what a plain convolution reads. A transposed one is the dgrad of that, so there a is the output.
    a, b = (out, size) if transposed else (size, out)
    groups = args.groups
    return ConvGeometry(
        batch, w[1] * groups, w[0], a, b, kernel, stride, pads, dilation, extra, groups, transposed
    )


def named_padding(call: CallShape, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return padding="same" or "valid" as numbers: what F.pad must add on one side, and what both sides have."""
    op, padding, stride = call.op, call.args.padding, call.args.stride
    if padding == "valid":
        return (), (0,) * rank
    if padding != "same" or any(s != 1 for s in int_tuple(stride, rank, op, "stride")):
        raise shape_error(
            f"nvfp4 {op}: bad padding.",
            got=f"padding={padding!r}, stride={stride}",
            needs='"valid", or "same" with stride 1',
            fix="give numbers",
        )
    dilation = int_tuple(call.args.dilation, rank, op, "dilation")
    totals = [d * (k - 1) for d, k in zip(dilation, call.w.shape[2:], strict=True)]
    pad: tuple[int, ...] = ()
    # An odd total cannot be halved: torch adds the odd zero at the end of the axis. F.pad wants the last axis first.
    if any(total % 2 for total in totals):
        pad = tuple(n for total in reversed(totals) for n in (0, total % 2))
    return pad, tuple(total // 2 for total in totals)
