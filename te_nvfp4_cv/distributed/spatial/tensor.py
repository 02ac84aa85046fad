"""SpatialTensor: this rank's rows of an image, which an unmodified model takes for the whole image.

Its shape is that of the whole image; its memory holds the rows of this rank. torch asks the class what each function
means for it (__torch_function__). The other files of this folder register the meanings here, by the function's name:

    pointwise   every value by itself: computed on the piece            here
    windows     convolutions and pooling: fetch the rows that they read windows.py, layers.py
    norms       statistics over all ranks                               norms.py
    resample    interpolation, crops, padding                           resample.py
    reductions  sums, means, losses: added over the ranks               reductions.py
    shapes      views that leave the cut dimension alone                shapes.py

A function that is not registered raises, on every rank, before anything is sent: nothing is computed on a piece as if
it were the whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.backend.torch_private import left_alone, not_traced, without_subclasses
from te_nvfp4_cv.context.tracing import is_tracing
from te_nvfp4_cv.distributed.spatial import shared
from te_nvfp4_cv.distributed.spatial.rows import Layout
from te_nvfp4_cv.errors import type_error, value_error

Handler = Callable[..., Any]
HANDLERS: dict[str, Handler] = {}  # name of a function or method -> (function, args, kwargs) -> its result

# Written for every element by itself. An in-place method has a _ at its end, an operator's dunders stand in the table.
_POINTWISE = """
abs absolute acos acosh addcdiv addcmul asin asinh atan atanh atan2 bernoulli bfloat16 bitwise_and bitwise_not
bitwise_or ceil celu clamp clamp_max clamp_min clip clone contiguous copysign cos cosh cpu cuda detach div divide
double dropout elu empty_like eq erf erfc exp exp2 expm1 fill float float_power floor fmod frac full_like gelu ge
greater greater_equal gt half hardshrink hardsigmoid hardswish hardtanh heaviside isfinite isinf isnan le leaky_relu
lerp less less_equal log log10 log1p log2 logaddexp logical_and logical_not logical_or logical_xor logit logsigmoid
long lt masked_fill maximum minimum mish mul multiply nan_to_num ne neg negative ones_like positive pow prelu
rand_like randn_like reciprocal relu relu6 remainder round rrelu rsqrt rsub selu sgn sigmoid sign silu sin sinh
softplus softshrink softsign sqrt square sub subtract tan tanh tanhshrink threshold to true_divide trunc type
type_as where zero zeros_like add int bool
"""
_DUNDERS = """
add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv div rdiv idiv pow rpow ipow neg pos abs invert
and or xor iand ior mod floordiv eq ne lt le gt ge
"""
POINTWISE = {
    *_POINTWISE.split(),
    *(f"{name}_" for name in _POINTWISE.split()),
    *(f"__{name}__" for name in _DUNDERS.split()),
    "log_sigmoid",
    "copy_",
}
# Asked of the piece, and answered as torch answers: what is the same for the whole image.
_PLAIN = {
    "dim",
    "ndimension",
    "is_floating_point",
    "is_complex",
    "is_contiguous",
    "stride",
    "element_size",
    "data_ptr",
    "get_device",
    "backward",
    "register_hook",
    "retain_grad",
    "is_pinned",
    "storage_offset",
    "untyped_storage",
    "is_set_to",
    "_is_view",
}
_PLAIN_PROPERTIES = set(
    """
dtype device layout requires_grad grad_fn is_leaf ndim is_cuda is_cpu is_meta is_sparse is_nested is_quantized
is_mkldnn output_nr _version _base _grad_fn names itemsize is_mps is_xla is_sparse_csr is_xpu is_ipu is_mtia is_maia
is_vulkan retains_grad _backward_hooks _post_accumulate_grad_hooks name is_shared
""".split()
)


class SpatialTensor(Tensor):
    """A tensor of which each rank of a mesh has some rows. shard() makes one, whole() undoes it.

    `layout` says which dimension is cut, and how many rows it has on all ranks.
    """

    placed: Layout
    reports_its_layers = True  # to observers, in NVFP4 or not: layers.py

    @classmethod
    @left_alone  # nothing in here is for a graph
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "__get__":
            return _property(function, args)
        if name in ("__set__", "__delete__"):
            with without_subclasses():
                return function(*args, **kwargs)
        handler = HANDLERS.get(name)
        if handler is not None:
            return handler(function, args, kwargs)
        if name in POINTWISE:
            return pointwise(function, args, kwargs)
        if name in _PLAIN:
            with without_subclasses():
                return function(*args, **kwargs)
        raise refusal(name or str(function), args)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Return the whole shape and this rank's rows."""
        layout = self.placed
        mine = layout.mine
        return (
            f"SpatialTensor({tuple(self.shape)}, rows {mine.start} to {mine.end} of {layout.rows} "
            f"along dimension {layout.dim}, {self.dtype})"
        )

    def __deepcopy__(self, memo: Any) -> SpatialTensor:
        return place(piece_of(self).detach().clone(), self.placed)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise type_error(
            "spatial_parallel: a rank's rows are no whole tensor, and are not pickled.",
            got=repr(self),
            needs="a plain tensor",
            fix="nv.spatial_parallel.whole(x) on every rank, or x.piece",
        )

    @property
    def piece(self) -> Tensor:
        """This rank's rows, a plain tensor."""
        return piece_of(self)


def place(piece: Tensor, layout: Layout) -> SpatialTensor:
    """Return a plain tensor, this rank's rows, as a SpatialTensor."""
    with without_subclasses():
        placed = piece.as_subclass(SpatialTensor)
    placed.placed = layout
    return placed


def piece_of(x: SpatialTensor) -> Tensor:
    """Return this rank's rows, a plain tensor with the same memory and history."""
    if not hasattr(x, "placed"):
        raise type_error(
            "spatial_parallel: a tensor has lost its place on the mesh.",
            got="a SpatialTensor that torch has made without asking its class",
            needs="a tensor made by nv.spatial_parallel.shard, or by torch's functions of one",
            fix="a custom autograd Function does this: give it x.piece, if it works value by value",
        )
    with without_subclasses():
        return x.as_subclass(Tensor)


def base_of(x: SpatialTensor) -> Tensor | None:
    """Return the tensor of which x is a view of the same shape, if there is one: what may be written to in place."""
    with without_subclasses():
        base = x._base
        same = (
            base is not None
            and type(base) is Tensor
            and base.shape == torch.Tensor.size(x)
            and base.stride() == x.stride()
        )
        return base if same else None


def spatial(values: Iterable[Any]) -> list[SpatialTensor]:
    """Return the SpatialTensors among arguments, in lists too."""
    found: list[SpatialTensor] = []
    for value in values:
        if isinstance(value, SpatialTensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(spatial(value))
    return found


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register what functions of these names mean: handler(function, args, kwargs)."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def named(names: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name; `names` are those that may be given by position, in order."""
    return {**dict(zip(names.split(), args, strict=False)), **kwargs}


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], at: int, name: str, default: Any = None) -> Any:
    """Return the argument that a call gives by name or at a position."""
    return kwargs.get(name, args[at] if len(args) > at else default)


# ---- shape and other attributes -------------------------------------------------------------------------------------


def global_shape(x: SpatialTensor) -> torch.Size:
    """Return the whole image's shape."""
    with without_subclasses():
        shape = list(Tensor.size(x))
    shape[x.placed.dim] = x.placed.rows
    return torch.Size(shape)


def _property(getter: Any, args: Any) -> Any:
    name, (x, *_) = getter.__self__.__name__, args
    if name == "shape":
        return global_shape(x) if hasattr(x, "placed") else _local_shape(x)
    if name in _PLAIN_PROPERTIES:
        with without_subclasses():
            return getter(*args)
    if name in ("data", "grad"):
        with without_subclasses():
            value = getter(*args)
        return None if value is None else place(value.as_subclass(Tensor), x.placed)
    raise refusal(f"Tensor.{name}", args)


def _local_shape(x: Tensor) -> torch.Size:
    with without_subclasses():
        return Tensor.size(x)


@handles("view_as")
def _view_as(_: Any, args: Any, kwargs: dict[str, Any]) -> SpatialTensor:
    """Place a view; torch asks for one where an autograd Function (FSDP2 has one) returns its input."""
    x, other = args
    if global_shape(x) != other.shape:
        raise refusal("view_as", args)
    piece = piece_of(x)
    return place(piece.view_as(piece), x.placed)


@handles("is_conj")
def _is_conj(function: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Answer for the piece. It is the first question of torch.compile, which breaks its graph at the exception."""
    if is_tracing():
        raise not_traced("an image that is cut into rows (nv.spatial_parallel) runs eagerly")
    return piece_of(args[0]).is_conj()


@handles("size")
def _size(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    shape = global_shape(args[0])
    dim = argument(args, kwargs, 1, "dim")
    return shape if dim is None else shape[dim]


@handles("numel", "nelement")
def _numel(_: Any, args: Any, kwargs: dict[str, Any]) -> int:
    return global_shape(args[0]).numel()


@handles("__len__")
def _length(_: Any, args: Any, kwargs: dict[str, Any]) -> int:
    return global_shape(args[0])[0]


# ---- value by value -------------------------------------------------------------------------------------------------


def common(tensors: list[SpatialTensor], name: str) -> tuple[Layout, int]:
    """Return the layout of tensors that meet value by value, and the cut dimension counted from the last one.

    Raises:
        ValueError: they are cut differently.
    """
    first = tensors[0].placed
    from_last = tensors[0].dim() - first.dim
    for other in tensors[1:]:
        there = other.placed
        if other.dim() - there.dim != from_last or there.rows != first.rows or there.mesh != first.mesh:
            raise value_error(
                f"spatial_parallel: {name} of images that are cut differently.",
                got=", ".join(map(repr, tensors)),
                needs="the same cut dimension, counted from the last one, with as many rows, on one mesh",
                fix="whole(x), or shard both alike",
            )
    return first, from_last


def aligned(t: Tensor, layout: Layout, from_last: int, name: str) -> Tensor:
    """Return a plain tensor as it meets this rank's rows: its own rows of a whole image, or t itself.

    Raises:
        ValueError: it has another number of rows.
    """
    dim = t.dim() - from_last
    if dim < 0 or t.shape[dim] == 1:
        return shared.use(t, layout.group)
    if t.shape[dim] != layout.rows:
        raise value_error(
            f"spatial_parallel: {name} of an image that is cut and a tensor that does not fit.",
            got=f"{tuple(t.shape)} beside {layout.rows} rows",
            needs="one row, or all rows",
            fix="shard both tensors",
        )
    return shared.own_rows(t, layout.with_dim(dim))


def on_pieces(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any], Layout, int]:
    """Return the arguments of a function of every value by itself as this rank has them, and what `common` returns."""
    layout, from_last = common(spatial((*args, *kwargs.values())), name)

    def here(value: Any) -> Any:
        if isinstance(value, SpatialTensor):
            return piece_of(value)
        return aligned(value, layout, from_last, name) if isinstance(value, Tensor) else value

    return [here(value) for value in args], {key: here(value) for key, value in kwargs.items()}, layout, from_last


def pointwise(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute a function of every value by itself on the piece."""
    name = function.__name__
    method = name.endswith("_") and not name.startswith("__")
    in_place = method or (name.startswith("__i") and name != "__invert__") or kwargs.get("inplace") is True
    target = args[0] if method else kwargs.get("out")
    if isinstance(target, Tensor) and not isinstance(target, SpatialTensor):
        raise refusal(f"{name} that writes into a whole tensor", (args, kwargs))
    pieces, keywords, layout, from_last = on_pieces(name, args, kwargs)
    y = function(*pieces, **keywords)
    if in_place and args and isinstance(args[0], SpatialTensor):
        return written(args[0])
    return place(y, layout.with_dim(y.dim() - from_last)) if isinstance(y, Tensor) else y


def written(x: SpatialTensor) -> SpatialTensor:
    """Return a tensor whose memory was written to through another one."""
    with without_subclasses():
        # Asked for, because torch then looks up the history anew; register_hook on a stale one crashes (torch 2.13).
        _ = x.grad_fn
    return x


@handles("relu", "relu_")
def _relu(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    inplace = function.__name__ == "relu_" or argument(args, kwargs, 1, "inplace", False)
    if not inplace:
        return place(torch.relu(piece_of(x)), x.placed)
    base = base_of(x)
    # Written on the tensor itself and not on a view of it, so that the mask of one bit serves backward (layer/relu.py).
    torch.relu_(piece_of(x) if base is None else base)
    return written(x)


# ---- errors ---------------------------------------------------------------------------------------------------------


def running_layer() -> str:
    """Return the innermost module whose forward is running, by its name in the outermost one, as errors name it."""
    running: list[nn.Module] = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self") if frame.f_code.co_name != "__torch_function__" else None
        if isinstance(module, nn.Module):
            running.append(module)
        frame = frame.f_back
    if not running:
        return ""
    name, kind = next((n for n, m in running[-1].named_modules() if m is running[0]), ""), type(running[0]).__name__
    return f"{name} ({kind})" if name else kind


def refusal(name: str, args: Any, why: str = "") -> Exception:
    """Return the error of a function that has no meaning for an image whose rows lie on several ranks."""
    layer = running_layer()
    where = f" in {layer}" if layer else ""
    found = spatial(args if isinstance(args, (list, tuple)) else (args,))
    return value_error(
        f"spatial_parallel: {name}{where} has no form for an image that is cut into rows.",
        got=why or ", ".join(map(repr, found[:3])),
        needs="convolutions, pooling, norms, resampling, functions of every value by itself, and sums over the image",
        fix="x = nv.spatial_parallel.whole(x) before that layer: every rank then computes it on the whole tensor",
    )
