"""What the tests of tensor parallelism share: a layer under a plan against itself unsharded, operand by operand."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import parallelize_module

import te_nvfp4_cv as nv
from te_nvfp4_cv import errors, tensor_parallel
from te_nvfp4_cv.layer import gemms
from te_nvfp4_cv.ops.conv import integer
from te_nvfp4_cv.ops.records import Face
from tests.distributed.launch import Ranks
from tests.helpers import relative_error, same_bits, values

PLAIN = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)
COLUMNS, ROWS = tensor_parallel.ColwiseParallel, tensor_parallel.RowwiseParallel
_meshes: dict[int, Any] = {}


def mesh(ranks: Ranks) -> Any:
    if ranks.world not in _meshes:
        _meshes[ranks.world] = init_device_mesh(ranks.device.type, (ranks.world,), mesh_dim_names=("tp",))
    return _meshes[ranks.world]


def as_multiplied(face: Face, gemm: str, backend: str) -> Face:
    """Return x's or dy's face as the backend multiplies it: codes that came from other ranks become records, too."""
    if backend != "integer" or not face.scale.numel():
        return face
    data, scale = face
    if gemm == "wgrad":
        data, scale = data.movedim(0, -3).flatten(-2).contiguous(), scale.movedim(0, -2).contiguous()
    return Face(integer.expand_records(data, scale), scale.new_empty(0))


@contextmanager
def recorded() -> Iterator[dict[str, tuple[Any, ...]]]:
    """The operands of each GEMM that runs inside: {"fprop": (data, scale, data, scale, alpha), ...}."""
    seen: dict[str, tuple[Any, ...]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fprop", "dgrad", "wgrad"):
            real = getattr(gemms, f"conv_{name}")

            def spy(first: Face, second: Face, alpha: Any, *rest: Any, real: Any = real, name: str = name) -> Tensor:
                parts = (*as_multiplied(first, name, rest[-1]), *second, alpha)
                seen[name] = tuple(a.clone() if isinstance(a, Tensor) else a for a in parts)
                return real(first, second, alpha, *rest)

            patch.setattr(gemms, f"conv_{name}", spy)
        yield seen


def part(t: Tensor, placement: Any, ranks: Ranks) -> Tensor:
    """This rank's part of a whole tensor."""
    if not isinstance(placement, Shard):
        return t.clone()
    return t.chunk(ranks.world, placement.dim)[ranks.rank].clone()


def run(model: nn.Module, x: Tensor, dy: Tensor, recipe: Any, dtype: Any = None, backend: str = "auto") -> Any:
    """(y, dx, {name: gradient}) of one step."""
    x = x.detach().requires_grad_()
    autocast = torch.autocast(x.device.type, dtype) if dtype else nullcontext()
    with autocast, nv.nvfp4_autocast(recipe, backend=backend) if recipe else nullcontext():
        y = model(x)
    y.backward(dy.to(y.dtype))
    return y.detach(), x.grad, {n: p.grad for n, p in model.named_parameters()}


@contextmanager
def quiet() -> Iterator[None]:
    """Crossing ranks in high precision is an error inside."""
    errors._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="nvfp4")
        yield


def check(
    layer: nn.Module,
    style: Any,
    x: Tensor,
    ranks: Ranks,
    places: tuple[Any, Any],
    recipe: Any = PLAIN,
    dtype: Any = None,
    backend: str = "auto",
    tolerance: float = 1e-5,
    operands: bool = True,
) -> None:
    """One layer under `style` against itself unsharded. `places`: of x and y."""
    layer, column = layer.to(ranks.device), isinstance(style, tensor_parallel.ColwiseParallel)
    case = (type(layer).__name__, column, places, dtype, backend)
    x = x.to(ranks.device)
    shape = layer(x).shape
    dy = values(tuple(shape), seed=5).to(ranks.device)
    with recorded() as whole:
        y, dx, grads = run(copy.deepcopy(layer), x, dy, recipe, dtype, backend)
    model = parallelize_module(nn.Sequential(copy.deepcopy(layer)), mesh(ranks), {"0": style})
    with recorded() as mine:
        got = run(model, part(x, places[0], ranks), part(dy, places[1], ranks), recipe, dtype, backend)
    gathered = {n.removeprefix("0."): g.full_tensor() for n, g in got[2].items()}
    close = {"y": (got[0], part(y, places[1], ranks)), "dx": (got[1], part(dx, places[0], ranks))}
    close |= {name: (gathered[name], grads[name]) for name in grads}
    for name, (a, b) in close.items():
        assert a.shape == b.shape and a.dtype == b.dtype, (case, name, a.shape, b.shape)
        assert relative_error(a, b) <= tolerance, (case, name, relative_error(a, b))
    if operands:
        assert_operands(mine, whole, column, "Transpose" in type(layer).__name__, ranks, case)
        exact = ("y", "weight") if column else ("dx", "weight")
        for name in exact:
            assert same_bits(*close[name]), (case, name, relative_error(*close[name]))


def assert_operands(mine: Any, whole: Any, column: bool, transposed: bool, ranks: Ranks, case: Any) -> None:
    """Every operand is the unsharded layer's, or this rank's channels of it; alphas are equal."""

    def cut(t: Tensor, axis: int) -> Tensor:
        return t.tensor_split(ranks.world, axis)[ranks.rank]

    axis = 0 if column != transposed else 2
    wanted = {}
    for gemm, args in whole.items():
        first, second = args[0], args[2]
        if gemm != "wgrad" and second.dim() == 5:  # packed columns: [groups, blocks of axis 0, taps, axis 1, 8]
            of_w = {0: 1, 2: 3}[axis]
        else:
            of_w = axis
        if gemm == "fprop":
            wanted[gemm] = (first if column else cut(first, -1), cut(second, of_w))
        elif gemm == "dgrad":
            wanted[gemm] = (cut(first, -1) if column else first, cut(second, of_w))
        else:
            # Packed: 16 images of a channel are 8 bytes. The integer backend multiplies records of dy by codes of x.
            of_dy, of_x = (-2 if scale.numel() else -1 for scale in (args[1], args[3]))
            wanted[gemm] = (cut(first, of_dy) if column else first, second if column else cut(second, of_x))
    assert set(mine) == set(wanted) == {"fprop", "dgrad", "wgrad"}, case
    for gemm, (first, second) in wanted.items():
        args = mine[gemm]
        assert same_bits(args[0], first), (case, gemm, "activation")
        assert same_bits(args[2], second), (case, gemm, "second operand")
        a, b = args[4], whole[gemm][4]
        assert (a is None and b is None) or same_bits(a, b), (case, gemm, "alpha")
