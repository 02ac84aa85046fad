"""Enter and leave spatial parallelism: cut tensors into rows, put them together, do both around a model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from te_nvfp4_cv.backend.torch_private import tree_map_only
from te_nvfp4_cv.distributed.collectives import check_group, gather_ints
from te_nvfp4_cv.distributed.spatial import shared
from te_nvfp4_cv.distributed.spatial.rows import Layout, piece
from te_nvfp4_cv.distributed.spatial.tensor import SpatialTensor, piece_of, place
from te_nvfp4_cv.errors import describe, type_error, value_error
from te_nvfp4_cv.nn.hooks import HookOfRanks

_eager = torch.compiler.disable(reason="an image that is cut into rows (nv.spatial_parallel) runs eagerly")


@_eager  # type: ignore[untyped-decorator]
def shard(x: Tensor, mesh: Any, dim: int = 2) -> SpatialTensor:
    """Return this rank's rows of a tensor that every rank has whole, as a SpatialTensor.

    Args:
        x: the same on every rank: an image [B, C, H, W], a volume [B, C, D, H, W], labels [B, H, W] (dim=1), or a
            DTensor with Shard(dim) on this mesh, of which nothing is moved.
        mesh: a DeviceMesh of one dimension.
        dim: the dimension that is cut, into pieces of ceil(rows / ranks) rows.
    Returns:
        A tensor whose shape is that of x. Gradients reach x whole, on every rank.
    Raises:
        TypeError: x is no tensor, or mesh no DeviceMesh.
        ValueError: a mesh of several dimensions, a dimension that x does not have, an image without rows; on every
            rank, if their images differ in shape (one small message at each call says so).

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> mesh = torch.distributed.init_device_mesh("cpu", (2,))  # doctest: +SKIP
        >>> x = nv.spatial_parallel.shard(torch.randn(1, 16, 64, 64), mesh)  # doctest: +SKIP
        >>> x.shape, x.piece.shape  # doctest: +SKIP
        (torch.Size([1, 16, 64, 64]), torch.Size([1, 16, 32, 64]))
    """
    _check_mesh(mesh)
    if isinstance(x, SpatialTensor):
        return x
    if not isinstance(x, Tensor):
        raise type_error(
            "spatial_parallel.shard: this is no tensor.", got=f"{x!r:.80}", needs="a tensor", fix="shard(x, mesh)"
        )
    if isinstance(x, DTensor):
        dim = _checked_dim(x, dim)
        if list(x.placements) != [Shard(dim)] or x.device_mesh != mesh:
            raise value_error(
                "spatial_parallel.shard: a DTensor that lies otherwise.",
                got=f"{x.placements} on {x.device_mesh}",
                needs=f"Shard({dim}) on the mesh that was given",
                fix=f"x.redistribute(mesh, [Shard({dim})])",
            )
        return place(x.to_local(), Layout(mesh, dim, x.shape[dim]))
    every = _told_by_all(x, dim, 0, mesh)
    if any(told != every[0] for told in every):
        raise value_error(
            "spatial_parallel.shard: the ranks do not have the same image.",
            got="; ".join(f"rank {r}: {tuple(told.sizes)}, dim={told.dim}" for r, told in enumerate(every)),
            needs="the whole image on every rank, of which each takes its rows",
            fix="the same batch on the ranks of one image; from_piece(x, mesh, rows), if x are rows of this rank alone",
        )
    dim = _checked_dim(x, dim)
    layout = Layout(mesh, dim, x.shape[dim])
    mine = layout.mine
    cut = shared.own_rows(x, layout) if x.requires_grad else x.narrow(dim, mine.start, mine.size)
    return place(cut, layout)


@_eager  # type: ignore[untyped-decorator]
def from_piece(x: Tensor, mesh: Any, rows: int, dim: int = 2) -> SpatialTensor:
    """Return rows that a rank has read by itself as its part of an image, of which no rank need have more.

    Args:
        x: this rank's rows, as many as torch.distributed.tensor.Shard(dim) gives it of `rows`.
        rows: the number of rows of all ranks.
    Raises:
        ValueError: on every rank, if one has another number of rows, or other sizes than the others.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> x = nv.spatial_parallel.from_piece(my_rows, mesh, rows=4096)  # doctest: +SKIP
    """
    _check_mesh(mesh)
    every = _told_by_all(x, dim, rows, mesh)
    pieces = [piece(rows, mesh.size(), rank).size for rank in range(mesh.size())]
    alike = all(told.without_rows == every[0].without_rows for told in every)
    if not alike or [told.found for told in every] != pieces:
        raise value_error(
            "spatial_parallel.from_piece: the ranks' rows are not one image.",
            got="; ".join(f"rank {r}: {tuple(told.sizes)} of {told.rows} rows" for r, told in enumerate(every)),
            needs=f"the same sizes, and {pieces} of {rows} rows along dim={dim}",
            fix="read rows i * ceil(rows / ranks) to (i + 1) * ceil(rows / ranks) on rank i",
        )
    layout = Layout(mesh, dim % x.dim(), rows)
    return place(x, layout)


@_eager  # type: ignore[untyped-decorator]
def whole(x: SpatialTensor) -> Tensor:
    """Return the whole tensor, on every rank; differentiable. The way out for layers that need all rows at once.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> features = nv.spatial_parallel.whole(backbone(x)).flatten(1)  # doctest: +SKIP
    """
    if not isinstance(x, SpatialTensor):
        return x
    return shared.gathered(piece_of(x), x.placed)


def to_dtensor(x: SpatialTensor) -> DTensor:
    """Return the same rows as a DTensor with Shard(dim). Nothing is moved.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> saved = nv.spatial_parallel.to_dtensor(scores)  # doctest: +SKIP
    """
    shape = x.shape
    strides, step = [0] * len(shape), 1
    for axis in reversed(range(len(shape))):
        strides[axis], step = step, step * shape[axis]
    layout = x.placed
    return DTensor.from_local(
        piece_of(x), layout.mesh, [Shard(layout.dim)], run_check=False, shape=shape, stride=tuple(strides)
    )


def parallelize(model: nn.Module, mesh: Any, *, dim: int = 2, outputs: str = "rows") -> nn.Module:
    """Have a model cut its inputs, and give its outputs as rows or whole; the model itself is not changed.

    Tensors of the inputs with that many dimensions are cut; others, and SpatialTensors, pass. Parameters stay as they
    are on every rank, so DDP and FSDP2 over another dimension of the mesh, checkpoints and exports are those of the
    plain model (nv.export.quantize and nv.export.to_onnx call a copy that takes whole images). Gradients are already
    those of the whole image.

    Args:
        model: convolutions, pooling, norms, resampling and functions of every value by itself.
        mesh: a DeviceMesh of one dimension: mesh["rows"] of a larger one.
        dim: the dimension of the inputs that is cut.
        outputs: "rows" for SpatialTensors, of which losses give whole numbers; "whole" for plain tensors.
    Returns:
        The model.
    Raises:
        ValueError: another word for outputs.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> model = nv.spatial_parallel.parallelize(model, mesh)  # doctest: +SKIP
        >>> with nv.nvfp4_autocast("unet"):  # doctest: +SKIP
        ...     scores = model(images)  # [B, classes, H, W], of which each rank has some rows
    """
    _check_mesh(mesh)
    if outputs not in ("rows", "whole"):
        raise value_error(
            "spatial_parallel.parallelize: unknown outputs.",
            got=repr(outputs),
            needs="'rows' or 'whole'",
            fix="outputs='rows'",
        )
    model.register_forward_pre_hook(_Cut(mesh, dim), with_kwargs=True)
    if outputs == "whole":
        model.register_forward_hook(_Whole())
    return model


class _Cut(HookOfRanks):
    """Forward pre-hook: cut the inputs."""

    def __init__(self, mesh: Any, dim: int) -> None:
        self.mesh, self.dim = mesh, dim

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        def cut(t: Tensor) -> Tensor:
            wanted = not isinstance(t, SpatialTensor) and t.dim() > max(self.dim, 2)
            return shard(t, self.mesh, self.dim) if wanted else t

        return tree_map_only(Tensor, cut, (args, kwargs))


class _Whole(HookOfRanks):
    """Forward hook: put the outputs together."""

    def __call__(self, module: nn.Module, args: Any, y: Any) -> Any:
        return _all_whole(y)


def _all_whole(y: Any) -> Any:
    if isinstance(y, SpatialTensor):
        return whole(y)
    if isinstance(y, dict):
        return type(y)((key, _all_whole(value)) for key, value in y.items())
    if isinstance(y, (list, tuple)):
        parts = map(_all_whole, y)
        return type(y)(*parts) if hasattr(y, "_fields") else type(y)(parts)  # a named tuple takes its fields one by one
    return y


class _Told(NamedTuple):
    """What a rank says of its tensor: sizes, which dimension is cut, and how many rows there are of it."""

    sizes: list[int]
    dim: int
    rows: int

    @property
    def found(self) -> int:
        """The rows that the rank has, or -1."""
        return self.sizes[self.dim] if -len(self.sizes) <= self.dim < len(self.sizes) else -1

    @property
    def without_rows(self) -> tuple[Any, ...]:
        """What all ranks must say alike of their pieces."""
        cut = self.dim % max(1, len(self.sizes))
        return self.dim, self.rows, [n for axis, n in enumerate(self.sizes) if axis != cut]


def _told_by_all(x: Tensor, dim: int, rows: int, mesh: Any) -> list[_Told]:
    """Return what the ranks say of their tensors. It is asked before anything is refused, so all ranks refuse."""
    sizes = [x.dim(), dim, rows, *[*x.shape, *[0] * 8][:8]]
    every = gather_ints(sizes, torch.empty(0, dtype=torch.int64, device=x.device), mesh.get_group())
    return [_Told(told[3 : 3 + told[0]], told[1], told[2]) for told in every]


def _checked_dim(x: Tensor, dim: int) -> int:
    if -x.dim() <= dim < x.dim() and x.shape[dim]:
        return dim % x.dim()
    if -x.dim() <= dim < x.dim():
        raise value_error(
            "spatial_parallel: an image without rows.",
            got=f"dim={dim}, {describe(x)}",
            needs="at least one row; a rank may have none of them",
            fix="leave such an image out, on every rank",
        )
    raise value_error(
        "spatial_parallel: the tensor has no such dimension.",
        got=f"dim={dim}, {describe(x)}",
        needs="a dimension of the image's height, or of a volume's depth",
        fix="dim=2 for [B, C, H, W], dim=1 for labels [B, H, W]",
    )


def _check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, dist.DeviceMesh):
        raise type_error(
            "spatial_parallel: this is no mesh.",
            got=f"{mesh!r:.80}",
            needs="a DeviceMesh",
            fix="torch.distributed.init_device_mesh('cuda', (ranks,))",
        )
    if mesh.ndim != 1:
        raise value_error(
            "spatial_parallel: a mesh of several dimensions.",
            got=f"{mesh}",
            needs="the one dimension over which rows are cut",
            fix="mesh['rows'], with mesh_dim_names at init_device_mesh",
        )
    check_group(mesh.get_group(), "spatial_parallel")
