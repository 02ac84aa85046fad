"""Eager calls on plain tensors go straight to the implementation; everything that watches or traces sees operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from te_nvfp4_cv.backend.dispatch import runs_directly
from te_nvfp4_cv.ops.conv import operators as conv
from te_nvfp4_cv.ops.quantize import operand, rounding_seeds
from te_nvfp4_cv.ops.records import (
    DEQUANTIZED,
    PACKED,
    Face,
    Operand,
    OperandSpec,
    WeightCodes,
    WeightLayout,
    WeightSpec,
)
from tests.helpers import make_geometry, same_bits, values
from tests.layers import BACKENDS

pytestmark = pytest.mark.usefixtures("one_thread")
G = make_geometry(3, (16, 32), (5, 4), 3, 2, 1)
SPEC = OperandSpec(1, G.folds[0], PACKED, PACKED, True)
STOCHASTIC = OperandSpec(1, G.folds[1], DEQUANTIZED, PACKED, True, True)
WEIGHT, LAYOUT = WeightSpec(1, PACKED), WeightLayout(32, 16, 1, False)
X, DY, W = values((3, 5, 4, 16)), values((3, 3, 2, 32), seed=1), values((32, 16, 3, 3), seed=2)
BF16, F32 = torch.bfloat16, torch.float32


def operands() -> tuple[Operand, Operand, WeightCodes]:
    """Return x, dy and w, packed by the reference."""
    x = operand.quantize_operand(X, SPEC, F32, None, None, "reference")
    dy = operand.quantize_operand(DY, SPEC._replace(fold=G.folds[1]), F32, None, None, "reference")
    return x, dy, operand.quantize_weight(W, WEIGHT, F32, "reference")


def multiplied(face: Face, unpack: Callable[[Face], Tensor], backend: str) -> Face:
    """Return a packed face in the form that the backend multiplies."""
    return Face(unpack(face), face.scale.new_empty(0)) if backend == "vendor" else face


def product(gemm: str, backend: str) -> tuple[Face, Face]:
    """Return the two operands of one GEMM."""

    def columns(face: Face) -> Tensor:
        return operand.unpack_columns(face, F32, "reference")

    def weight(face: Face) -> Tensor:
        return operand.unpack_weight(face, LAYOUT, None, F32, "reference")

    def rows(face: Face) -> Tensor:
        return operand.unpack_rows(face, face.scale.shape[-1] * 16, 1, F32, "reference")

    x, dy, w = operands()
    if gemm == "wgrad":
        return multiplied(dy.col, columns, backend), multiplied(x.col, columns, backend)
    return multiplied(x.row if gemm == "fprop" else dy.row, rows, backend), multiplied(w.row, weight, backend)


Call = tuple[Callable[..., Any], tuple[Any, ...], Callable[..., Any], tuple[Any, ...]]


def calls(backend: str) -> dict[str, Call]:
    """Return, by operator: the function and its arguments, the operator and its arguments."""
    x, _, w = operands()
    seed, amax = torch.tensor([7]), torch.tensor([3.0, 9.0])
    found: dict[str, Call] = {}
    for name, array, spec, key, given in (
        ("quantize_operand", X, SPEC, None, None),
        ("quantize_operand, given", X, SPEC, None, amax),
        ("quantize_operand, stochastic", DY, STOCHASTIC, seed, None),
    ):
        more = (BF16, key, given, backend)
        arguments = (array, spec, *more), (array, spec.to_ints(), *more)
        found[name] = operand.quantize_operand, arguments[0], operand.quantize_operand_op, arguments[1]
    found["measure_operand"] = (
        *(operand.measure_operand, (X, SPEC, backend)),
        *(operand.measure_operand_op, (X, SPEC.to_ints(), backend)),
    )
    found["quantize_weight"] = (
        *(operand.quantize_weight, (W, WEIGHT, BF16, backend)),
        *(operand.quantize_weight_op, (W, WEIGHT.to_ints(), BF16, backend)),
    )
    found["unpack_rows"] = (
        *(operand.unpack_rows, (x.row, 16, 1, BF16, backend)),
        *(operand.unpack_rows_op, (*x.row, 16, 1, BF16, backend)),
    )
    found["unpack_columns"] = (
        *(operand.unpack_columns, (x.col, BF16, backend)),
        *(operand.unpack_columns_op, (*x.col, BF16, backend)),
    )
    factor = torch.tensor([0.5])
    found["unpack_weight"] = (
        *(operand.unpack_weight, (w.row, LAYOUT, factor, BF16, backend)),
        *(operand.unpack_weight_op, (*w.row, [*map(int, LAYOUT)], factor, BF16, backend)),
    )
    for gemm in ("fprop", "dgrad", "wgrad"):
        first, second = product(gemm, backend)
        alpha, bias = torch.tensor([0.37]), [values((32,), seed=4)] if gemm == "fprop" else []
        found[f"conv_{gemm}"] = (
            *(getattr(conv, f"conv_{gemm}"), (first, second, alpha, *bias, G, F32, backend)),
            *(getattr(conv, f"conv_{gemm}_op"), ([*first, *second], alpha, *bias, G.to_ints(), F32, backend)),
        )
    return found


NAMES = tuple(calls("reference"))


def flat(made: Any) -> tuple[Tensor, ...]:
    """Return what a function or an operator gave as tensors."""
    if isinstance(made, (Operand, WeightCodes)):
        return made.flat()
    return (made,) if isinstance(made, Tensor) else tuple(made)


class Seen(TorchDispatchMode):
    """Collects the names of the package's operators that are called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "te_nvfp4_cv":
            self.names.append(func._schema.name.removeprefix("te_nvfp4_cv::"))
        return func(*args, **(kwargs or {}))


class Labelled(Tensor):
    """A tensor that is not plain."""


@pytest.fixture(params=[*BACKENDS, "triton"])
def each_backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on a CPU; triton's kernels in the interpreter."""
    if request.param == "triton":
        if torch.cuda.is_available():
            pytest.skip("no interpreter beside a GPU")
        request.getfixturevalue("kernel_device")
    return str(request.param)


@pytest.mark.parametrize("name", NAMES)
def test_the_direct_call_gives_the_operators_bits(each_backend, name, poison):
    function, arguments, operator, plain = calls(each_backend)[name]
    direct, dispatched = flat(function(*arguments)), flat(operator(*plain))
    assert len(direct) == len(dispatched) and all(type(t) is Tensor for t in direct)
    assert all(same_bits(a, b) and a.stride() == b.stride() for a, b in zip(direct, dispatched, strict=True))


def test_the_direct_seed_is_the_operators():
    torch.manual_seed(5)
    expected = [int(rounding_seeds.draw_seed_op(X)) for _ in range(3)]
    torch.manual_seed(5)
    assert [int(rounding_seeds.draw_seed(X)) for _ in range(3)] == expected


@pytest.mark.parametrize("name", NAMES)
def test_an_eager_call_passes_by_the_operator(monkeypatch, name):
    function, arguments, *_ = calls("vendor")[name]
    for owner in (operand, conv):
        for key in [key for key in vars(owner) if key.endswith("_op")]:
            monkeypatch.setattr(owner, key, lambda *_: pytest.fail("the operator was called"))
    assert runs_directly(X) and flat(function(*arguments))


@pytest.mark.parametrize("name", NAMES)
def test_a_dispatch_mode_sees_the_operator(name):
    function, arguments, *_ = calls("vendor")[name]
    plain = flat(function(*arguments))
    with Seen() as seen:
        assert not runs_directly(X)
        watched = flat(function(*arguments))
    assert seen.names == [name.split(",")[0]]
    assert all(same_bits(a, b) for a, b in zip(plain, watched, strict=True))


def test_a_dispatch_mode_sees_the_seed_and_every_operator_of_a_layer():
    import te_nvfp4_cv as nv

    def step() -> list[Tensor]:
        torch.manual_seed(0)
        x, w = values((3, 16, 5, 4)).requires_grad_(), W.clone().requires_grad_()
        y = nv.functional.conv2d(x, w, None, 2, 1)
        y.backward(torch.ones_like(y))
        return [y.detach(), x.grad, w.grad]  # type: ignore[list-item]

    plain = step()
    with Seen() as seen:
        watched = step()
    assert {"draw_seed", "quantize_operand", "quantize_weight", "conv_fprop", "conv_dgrad", "conv_wgrad"} <= set(
        seen.names
    )
    assert all(same_bits(a, b) for a, b in zip(plain, watched, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_take_the_operator(name):
    function, arguments, *_ = calls("vendor")[name]
    real = flat(function(*arguments))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = flat(function(*arguments))
    assert all(isinstance(t, torch._subclasses.FakeTensor) for t in fake)
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


@pytest.mark.parametrize("name", NAMES)
def test_make_fx_traces_the_operator(name):
    function, arguments, *_ = calls("vendor")[name]
    first = arguments[0]
    leading = (first,) if isinstance(first, Tensor) else tuple(first)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return flat(function(tensors[0] if isinstance(first, Tensor) else Face(*tensors), *arguments[1:]))

    graph = make_fx(run)(*leading)
    called = [str(node.target) for node in graph.graph.nodes if "te_nvfp4_cv" in str(node.target)]
    assert called == [f"te_nvfp4_cv.{name.split(',')[0]}.default"]
    assert all(same_bits(a, b) for a, b in zip(graph(*leading), run(*leading), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_traces_the_operator(name):
    function, arguments, *_ = calls("vendor")[name]
    called: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if "te_nvfp4_cv" in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: flat(function(*given)), backend=backend, fullgraph=True)
    found, plain = compiled(*arguments), flat(function(*arguments))
    assert called == [f"te_nvfp4_cv.{name.split(',')[0]}.default"]
    assert all(same_bits(a, b) for a, b in zip(found, plain, strict=True))


def test_a_tensor_of_another_class_is_not_run_directly():
    assert runs_directly(X) and runs_directly(torch.nn.Parameter(X))
    assert not runs_directly(X.as_subclass(Labelled))
