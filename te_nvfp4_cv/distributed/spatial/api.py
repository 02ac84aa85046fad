"""Enter and leave spatial parallelism: cut tensors into rows, put them together, do both around a model."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from te_nvfp4_cv.backend.torch_private import tree_map_only
from te_nvfp4_cv.distributed.collectives import check_group, gather_ints
from te_nvfp4_cv.distributed.spatial import shared
from te_nvfp4_cv.distributed.spatial.rows import Layout, piece
from te_nvfp4_cv.distributed.spatial.tensor import NAMES, SpatialTensor, piece_of, place
from te_nvfp4_cv.errors import describe, type_error, value_error


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
        ValueError: a mesh of several dimensions, or a dimension that x does not have.

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
    dim = _checked_dim(x, dim)
    if isinstance(x, DTensor):
        if list(x.placements) != [Shard(dim)] or x.device_mesh != mesh:
            raise value_error(
                "spatial_parallel.shard: a DTensor that lies otherwise.",
                got=f"{x.placements} on {x.device_mesh}",
                needs=f"Shard({dim}) on the mesh that was given",
                fix=f"x.redistribute(mesh, [Shard({dim})])",
            )
        return place(x.to_local(), Layout(mesh, dim, x.shape[dim]))
    layout = Layout(mesh, dim, x.shape[dim])
    mine = layout.mine
    cut = shared.own_rows(x, layout) if x.requires_grad else x.narrow(dim, mine.start, mine.size)
    return place(cut, layout)


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
    dim = _checked_dim(x, dim)
    layout = Layout(mesh, dim, rows)
    others = [n for axis, n in enumerate(x.shape) if axis != dim]
    every = gather_ints([x.dim(), rows, x.shape[dim], *(others + [0] * 5)[:5]], x.new_empty(0).long(), layout.group)
    wrong = [r for r, told in enumerate(every) if told[2] != piece(told[1], layout.ranks, r).size]
    if wrong or any(told[:2] + told[3:] != every[0][:2] + every[0][3:] for told in every):
        raise value_error(
            "spatial_parallel.from_piece: the ranks' rows are not one image.",
            got="; ".join(
                f"rank {r}: {told[2]} of {told[1]} rows, other sizes {told[3 : told[0] + 2]}"
                for r, told in enumerate(every)
            ),
            needs=f"the same sizes, and {[layout.of(r).size for r in range(layout.ranks)]} of {rows} rows",
            fix="read rows i * ceil(rows / ranks) to (i + 1) * ceil(rows / ranks) on rank i",
        )
    return place(x, layout)


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

    Tensors of the inputs with that many dimensions are cut; others, and SpatialTensors, pass. Names of layers are
    learned, which errors then give. Parameters stay as they are on every rank, so DDP and FSDP2 over another dimension
    of the mesh, checkpoints and exports are those of the plain model. Gradients are already those of the whole image.

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
    for name, module in model.named_modules():
        NAMES[module] = name

    def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
        def cut(t: Tensor) -> Tensor:
            return shard(t, mesh, dim) if not isinstance(t, SpatialTensor) and t.dim() > max(dim, 2) else t

        return tree_map_only(Tensor, cut, (args, kwargs))

    model.register_forward_pre_hook(enter, with_kwargs=True)
    if outputs == "whole":
        model.register_forward_hook(lambda _module, _args, y: _all_whole(y))
    return model


def _all_whole(y: Any) -> Any:
    if isinstance(y, SpatialTensor):
        return whole(y)
    if isinstance(y, dict):
        return type(y)((key, _all_whole(value)) for key, value in y.items())
    return type(y)(map(_all_whole, y)) if isinstance(y, (list, tuple)) else y


def _checked_dim(x: Tensor, dim: int) -> int:
    if -x.dim() <= dim < x.dim():
        return dim % x.dim()
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
