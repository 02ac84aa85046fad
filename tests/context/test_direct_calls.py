"""Products with weights that are no layers of NVFP4: coverage lists them, and a context that misses them warns."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import te_nvfp4_cv as nv
from te_nvfp4_cv import errors
from te_nvfp4_cv.context.direct_calls import DIRECT, DirectCall
from te_nvfp4_cv.layer import shortfall
from tests.helpers import same_bits, values
from tests.networks import NO_SR

MACS = 6 * 5 * 32 * 48  # of a product of [6, 5, 32] and [32, 48]


class Product(nn.Module):
    """Something that multiplies by its weight [48, 32]."""

    def __init__(self, call: Callable[[Tensor, Any], Any]) -> None:
        super().__init__()
        self.weight, self.bias, self.call = nn.Parameter(values((48, 32))), nn.Parameter(values((48,))), call

    def forward(self, x: Tensor) -> Any:
        return self.call(x, self)


CALLS: dict[str, Callable[[Tensor, Any], Any]] = {
    "matmul": lambda x, m: x @ m.weight.T,
    "matmul, weight first": lambda x, m: m.weight @ x.flatten(0, 1).T,
    "matmul, method": lambda x, m: x.matmul(m.weight.mT),
    "mm": lambda x, m: x.flatten(0, 1).mm(m.weight.t()),
    "addmm": lambda x, m: torch.addmm(m.bias, x.flatten(0, 1), m.weight.t()),
    "bmm": lambda x, m: torch.bmm(x, m.weight.T.expand(6, -1, -1)),
    "einsum": lambda x, m: torch.einsum("bti,oi->bto", x, m.weight),
    "tensordot": lambda x, m: torch.tensordot(x, m.weight, dims=([2], [1])),
    "inner": lambda x, m: torch.inner(x, m.weight),
    "linalg_matmul": lambda x, m: torch.linalg.matmul(x, m.weight.T),
    "linalg_multi_dot": lambda x, m: torch.linalg.multi_dot([x.flatten(0, 1), m.weight.T]),
    "matmul of aten": lambda x, m: torch.ops.aten.matmul(x, m.weight.T),
    "addmm of aten": lambda x, m: torch.ops.aten.addmm.default(m.bias, x.flatten(0, 1), m.weight.t()),
    "conv_tbc": lambda x, m: torch.conv_tbc(x, m.weight.T[None].expand(1, -1, -1), m.bias),
    "convolution": lambda x, m: torch.convolution(x.mT, m.weight[..., None], None, (1,), (0,), (1,), False, (0,), 1),
    "convolution of aten": lambda x, m: torch.ops.aten.convolution(
        x.mT, m.weight[..., None], None, [1], [0], [1], False, [0], 1
    ),
}


def told(call: Callable[[], Any]) -> str:
    """Return our warnings of a call under the context."""
    shortfall._warned_reasons.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with nv.nvfp4_autocast():
            call()
    return "\n".join(str(w.message) for w in caught if str(w.message).startswith("nvfp4"))


@pytest.mark.parametrize("name", CALLS)
def test_products_with_a_parameter_are_listed_and_missed(name: str) -> None:
    model, x, kind = Product(CALLS[name]), values((6, 5, 32)), name.split(",")[0].split(" ")[0]
    results: list[Tensor] = []
    assert f"100% because torch.{kind} called directly" in told(lambda: results.append(model(x)))
    assert shortfall.local.missed == {f"torch.{kind} called directly": MACS}
    assert torch.equal(results[0], model(x))
    report = nv.coverage(model, x)
    (row,) = report.rows
    assert (row.name, row.nvfp4, row.flops) == ("Product", False, 6 * MACS), row
    assert row.reason == f"torch.{kind} called directly" and not report.nvfp4_flops_share


PENALTIES: dict[str, Callable[[Any], Any]] = {
    "einsum": lambda w: torch.einsum("ij,kj->ik", w, w),
    "einsum of three": lambda w: torch.einsum("ij,jk,kl->il", w, w, w),
    "einsum of aten": lambda w: torch.ops.aten.einsum("ij,kj->ik", [w, w]),
    "tensordot": lambda w: torch.tensordot(w, w, dims=([1], [1])),
    "tensordot of aten": lambda w: torch.ops.aten.tensordot.default(w, w, [1], [1]),
    "linalg_multi_dot": lambda w: torch.linalg.multi_dot([w, w]),
    "chain_matmul": lambda w: torch.chain_matmul(w, w),
    "matmul": lambda w: w @ w,
}


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
@pytest.mark.parametrize("name", PENALTIES)
def test_a_weight_that_is_multiplied_by_itself(name: str) -> None:
    """The penalty that keeps a weight orthogonal, for one."""
    model = Product(lambda _, m: PENALTIES[name](m.weight))
    model.weight = nn.Parameter(values((32, 32)))
    results: list[Tensor] = []
    kind = name.split(" ")[0]
    assert f"100% because torch.{kind} called directly" in told(lambda: results.append(model(values((1,)))))
    products = 2 if name == "einsum of three" else 1
    assert torch.equal(results[0], model(values((1,)))) and shortfall.local.missed.popitem()[1] == products * 32**3
    (row,) = nv.coverage(model, values((1,))).rows
    assert row.reason == f"torch.{kind} called directly"


X, BATCHES = values((6, 32, 48)), values((4, 6, 48))
HEADS, EXPERTS, SQUARE = (nn.Parameter(values(shape)) for shape in ((48, 4, 8), (4, 48, 32), (48, 48)))
PRODUCTS: dict[str, Callable[[], Any]] = {
    "einsum, heads": lambda: torch.einsum("bsd,dhk->bshk", X, HEADS),
    "einsum, heads to channels": lambda: torch.einsum("bshk,chk->bsc", values((6, 32, 4, 8)), HEADS),
    "einsum, experts": lambda: torch.einsum("ebi,eio->ebo", BATCHES, EXPERTS),
    "einsum, rest": lambda: torch.einsum("...d,dc", X, SQUARE),
    "einsum, rest of batches": lambda: torch.einsum("...bi,...io->...bo", BATCHES, EXPERTS),
    "einsum, numbers": lambda: torch.einsum(X, [..., 1], SQUARE, [1, 0], [..., 0]),
    "einsum, weight between": lambda: torch.einsum("bqi,ij,bkj->bqk", X, SQUARE, X),
    "einsum, scaled": lambda: torch.einsum("bi,io,b->bo", X[0], SQUARE, values((32,))),
    "einsum, an axis of one operand": lambda: torch.einsum("bsd,dhk->hk", X, HEADS),
    "einsum, rest of one operand": lambda: torch.einsum("...d,dc->c", X, SQUARE),
    "einsum, repeated": lambda: torch.einsum("bii,io->bo", values((4, 48, 48)), SQUARE),
    "einsum, one repeated": lambda: torch.einsum("ebi,eio->ebo", BATCHES[:1], EXPERTS),
    "einsum, spaces": lambda: torch.einsum(" b I , I o -> b o", X[0], SQUARE),
    "einsum of aten": lambda: torch.ops.aten.einsum("bi,io->bo", [X[0], SQUARE]),
    "einsum of aten, names": lambda: torch.ops.aten.einsum(equation="bi,io->bo", tensors=[X[0], SQUARE]),
    "tensordot, heads": lambda: torch.tensordot(X, HEADS, 1),
    "tensordot, axes": lambda: torch.tensordot(X, HEADS, ([-1], [0])),
    "tensordot, tensor": lambda: torch.tensordot(X, HEADS, torch.tensor([[2], [0]])),
    "tensordot of aten": lambda: torch.ops.aten.tensordot(X, HEADS, dims_self=[2], dims_other=[0]),
    "tensordot of aten, names": lambda: torch.ops.aten.tensordot(other=HEADS, self=X, dims_self=[2], dims_other=[0]),
    "linalg_multi_dot": lambda: torch.linalg.multi_dot([X[0], SQUARE, SQUARE]),
    "linalg_multi_dot, vectors": lambda: torch.linalg.multi_dot([X[0, 0], SQUARE, X[0, 1]]),
    "mm, names": lambda: torch.mm(mat2=SQUARE[:, :20], input=X[0]),
    "baddbmm, names": lambda: torch.baddbmm(batch1=BATCHES, batch2=EXPERTS, input=values((4, 6, 32))),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_multiply_adds_are_those_of_torch(name: str) -> None:
    """Few heads or experts do not make a product thin: what counts is over how much is summed, and what remains."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        PRODUCTS[name]()
    kind = name.split(",")[0].split(" ")[0]
    assert f"100% because torch.{kind} called directly" in told(PRODUCTS[name])
    assert shortfall.local.missed == {f"torch.{kind} called directly": counter.get_total_flops() // 2}


def test_sums_of_batches() -> None:
    assert "torch.addbmm called directly" in told(lambda: torch.addbmm(values((6, 32)), BATCHES, EXPERTS))
    assert shortfall.local.missed == {"torch.addbmm called directly": 4 * 6 * 48 * 32}  # torch counts none


@pytest.mark.parametrize("equation", ["ij,ij->ij", "ij,ij->", "ij,ij->i", "ij,j->ij", "ij,ik->ijk"])
def test_what_sums_over_no_axis_of_two_is_no_product(equation: str) -> None:
    other = values((48,)) if ",j" in equation else SQUARE
    assert not told(lambda: torch.einsum(equation, SQUARE, other))
    assert not nv.coverage(Product(lambda x, m: torch.einsum(equation, SQUARE, x)), other).rows


def test_what_has_no_elements_or_one_is_no_work() -> None:
    """torch repeats an operand of one element along an axis of the other, which it then sums up: no product."""
    for x, w in ((X[0, :0], SQUARE), (X[0], nn.Parameter(values((1, 48)))), (X[0, :, :1], SQUARE)):
        assert not told(lambda x=x, w=w: torch.einsum("bi,io->bo", x, w))


def test_a_number_times_a_weight_is_no_product() -> None:
    w, two = nn.Parameter(values((48, 32))), torch.tensor(2.0)
    for call in (lambda: torch.inner(two, w), lambda: torch.inner(w, two)):
        assert not told(call)
        assert not nv.coverage(Product(lambda _, m: torch.inner(two, m.weight)), two).rows


def test_what_cannot_be_counted_runs_as_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader of arguments that fails says so in a warning; the program goes on."""

    def fails(*_: Any) -> Any:
        raise IndexError("an operand of a new kind")

    model, x = Product(CALLS["mm"]), values((6, 5, 32))
    for reader in (fails, lambda name, args, kwargs: DirectCall(name, model.weight, 32, fails)):
        monkeypatch.setitem(DIRECT, Tensor.mm, reader)
        errors._warned.discard("uncounted mm")
        results: list[Tensor] = []
        text = told(lambda: results.append(model(x)))  # noqa: B023
        assert "torch.mm could not be counted (IndexError: an operand of a new kind)" in text
        assert torch.equal(results[0], model(x))
        nv.coverage(model, x)


def test_torchs_own_error_comes_of_what_torch_refuses() -> None:
    arguments = (None, (1,), (0,), (1,), False, (0,), 0)
    model = Product(lambda x, m: torch.convolution(x.mT, m.weight[..., None], *arguments))
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="groups"):
        warnings.simplefilter("ignore")
        nv.coverage(model, values((6, 5, 32)))


def test_a_product_with_a_place_for_its_result() -> None:
    w, x = nn.Parameter(values((48, 32))), values((32, 30))
    with torch.no_grad():
        assert "torch.mm called directly" in told(lambda: torch.mm(w, x, out=torch.empty(48, 30)))
    assert shortfall.local.missed == {"torch.mm called directly": MACS}


def test_products_of_decomposed_programs() -> None:
    x = values((4, 32))
    program = torch.export.export(nn.Linear(32, 48), (x,)).run_decompositions().module()
    assert "100% because torch.addmm called directly" in told(lambda: program(x))
    assert [row.op for row in nv.coverage(program, x).rows] == ["addmm"]


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_layers_are_missed_and_have_one_row(make: Callable[..., nn.Module]) -> None:
    layer, cell = make(32, 16), "Cell" in make.__name__
    x = values((6, 32) if cell else (5, 6, 32))
    assert "called directly" in told(lambda: layer(x))
    (row,) = nv.coverage(layer, x).rows
    assert row.reason == "recurrent layer"


def test_products_of_activations_and_thin_ones_are_no_ones_loss() -> None:
    x, thin = values((4, 16, 32)), nn.Parameter(values((32, 3)))

    def call() -> None:
        attention = torch.softmax(x @ x.mT, -1) @ x
        torch.einsum("bij,bkj->bik", attention, x), attention @ thin, torch.outer(x[0, 0], thin[:, 0])

    assert not told(call)
    assert not nv.coverage(Product(lambda y, m: y @ y.mT), x).rows


def test_what_is_left_on_purpose_is_not_missed() -> None:
    model, x = nn.Sequential(Product(CALLS["matmul"])), values((6, 5, 32))
    nv.set_precision(model, {"*": None})
    assert not told(lambda: model(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert not told(lambda: torch.autocast("cpu", enabled=False)(Product(CALLS["matmul"]))(x))


def test_bilinear() -> None:
    layer, x = nn.Bilinear(16, 32, 48), values((6, 16))
    assert "torch.bilinear called directly" in told(lambda: layer(x, values((6, 32))))
    (row,) = nv.coverage(layer, x, values((6, 32))).rows
    assert row.flops == 6 * 6 * 48 * 16 * 32


class WrittenOut(torch.autograd.Function):
    """A convolution whose gradients are written out, as those that share memory or delay dw do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return F.conv2d(x, w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return torch.nn.grad.conv2d_input(x.shape, w, dy), torch.nn.grad.conv2d_weight(x, w.shape, dy)


def test_gradients_that_a_function_writes_out() -> None:
    w, x = nn.Parameter(values((16, 16, 3, 3))), values((2, 16, 6, 6)).requires_grad_()
    text = told(lambda: WrittenOut.apply(x, w).sum().backward())
    assert "only 33% of the work" in text and "67% because torch.convolution_backward called directly" in text
    with nv.nvfp4_autocast():
        y = WrittenOut.apply(x, w)
    with pytest.warns(UserWarning, match="WrittenOut computes gradients in high precision of layers"):
        y.sum().backward()


@pytest.mark.parametrize(
    "op, shape", [("conv2d", (16, 16, 3, 3)), ("linear", (16, 16)), ("conv_transpose1d", (16, 16, 2))]
)
def test_layers_by_their_name_in_aten(op: str, shape: tuple[int, ...]) -> None:
    w, x = nn.Parameter(values(shape)), values((4, 16, *(8,) * (len(shape) - 2)))
    with nv.nvfp4_autocast(NO_SR):
        assert same_bits(getattr(torch.ops.aten, op)(x, w), getattr(F, op)(x, w))
        assert not same_bits(getattr(F, op)(x, w), getattr(torch.ops.aten, op).default(x, w.double().float() * 0))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_layers_by_their_name_in_aten_compiled(backend: str) -> None:
    """What a graph was told to leave in high precision stays so, though it calls the layer by that name."""
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), values((4, 16))
    nv.set_precision(model, {"0": None})

    def forward(x: Tensor) -> Tensor:
        return torch.ops.aten.linear(model(x), model[1].weight)

    with nv.nvfp4_autocast(NO_SR), torch.no_grad():
        assert same_bits(torch.compile(forward, backend=backend, fullgraph=True)(x), forward(x))
