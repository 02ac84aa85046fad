"""nv.sensitivity.scan: a planted bad layer ranks first, the numbers are those of set_precision, nothing is changed."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import sys
import types

import numpy
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.sensitivity import scan
from tests.helpers import same_bits
from tests.networks import NO_SR, Net, net_and_input


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


class Chain(nn.Module):
    """Four linear layers; the weight of one has an outlier in every tile of 16x16, at inputs that are always 0."""

    def __init__(self, bad: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
        with torch.no_grad():
            self.layers[bad].weight[::16, ::16] = 30.0
        self.bad = bad

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            if index == self.bad:
                x = x * (torch.arange(32) % 16 != 0)
            x = layer(x)
        return x


def chain(bad: int = 2) -> tuple[Chain, list[tuple[Tensor, Tensor]]]:
    model = Chain(bad)
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(2):  # what a trained model would see: its outputs, and noise
        x = torch.randn(16, 32, generator=generator)
        batches.append((x, model(x).detach() + 0.05 * torch.randn(16, 32, generator=generator)))
    return model, batches


def regression(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("mode", ["one", "all_but_one", "both"])
@pytest.mark.parametrize("bad", [1, 2])
def test_a_planted_layer_ranks_first(mode, bad, gradients):
    model, batches = chain(bad)
    found = scan(model, regression, batches, NO_SR, mode=mode, gradients=gradients)
    worst = found.ranked()[0]
    assert worst.name == f"layers.{bad}" and found.score(worst) > 3 * found.score(found.ranked()[1])
    assert (worst.alone is None) == (mode == "all_but_one") and (worst.without is None) == (mode == "one")
    if worst.alone is not None:
        assert worst.alone.loss > 0 and (worst.alone.gradient_error is not None) == gradients
    assert list(found.suggest(count=1)) == [worst.name]
    assert str(found).splitlines()[1].startswith(worst.name)
    assert nv.sensitivity.kurtosis(model).rows[0].name == worst.name


def test_changes_are_those_of_set_precision():
    model, batches = chain()
    found = scan(model, regression, batches, NO_SR, mode="both", gradients=True)

    def losses(table: dict) -> list[float]:
        copied = copy.deepcopy(model)
        nv.set_precision(copied, table)
        with nv.nvfp4_autocast(NO_SR):
            return [float(regression(copied, batch).detach()) for batch in batches]

    high = losses({"*": None})
    assert found.loss == sum(high) / 2
    assert found.everything.loss == sum(a - b for a, b in zip(losses({}), high, strict=True)) / 2
    for row in found.rows:
        alone = [a - b for a, b in zip(losses({"*": None, row.name: NO_SR}), high, strict=True)]
        without = [a - b for a, b in zip(losses({row.name: None}), high, strict=True)]
        assert row.alone.loss == sum(alone) / 2 and row.without.loss == sum(without) / 2
        assert row.alone.loss_rms == pytest.approx(math.hypot(*alone) / math.sqrt(2))
        assert row.alone.standard_error == pytest.approx(abs(alone[0] - alone[1]) / 2)


def test_gradient_error_and_cosine_against_backward():
    model, batches = chain()
    row = scan(model, regression, batches[:1], NO_SR, gradients=True).rows[0]

    def gradient(table: dict) -> Tensor:
        copied = copy.deepcopy(model)
        nv.set_precision(copied, table)
        with nv.nvfp4_autocast(NO_SR):
            regression(copied, batches[0]).backward()
        return torch.cat([p.grad.flatten() for p in copied.parameters()]).double()

    high, own = gradient({"*": None}), gradient({"*": None, row.name: NO_SR})
    assert row.alone.gradient_error == pytest.approx(float((own - high).norm() / high.norm()))
    assert row.alone.gradient_cosine == pytest.approx(float(torch.cosine_similarity(own, high, dim=0)))
    assert row.alone.standard_error is None


def hooks_of(model: nn.Module) -> list:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
    return [[list(getattr(module, kind).items()) for kind in kinds] for module in model.modules()]


def test_the_model_is_the_same_afterwards():
    """Parameters, gradients, buffers, hooks, entries, flags and random states, with delayed scales and dropout."""
    net, x = net_and_input()
    recipe = nv.NVFP4BlockScaling(tensor_scale="delayed")
    nv.set_precision(net, {"body.*": None, "body.4": NO_SR, "head": recipe})
    net.body[3].eval()
    net.register_forward_hook(lambda *_: None)
    with nv.nvfp4_autocast(recipe):
        square(net, x).backward()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    versions = [t._version for t in (*net.parameters(), *net.buffers())]
    grads = {name: (p.grad, p.grad.clone()) for name, p in net.named_parameters()}
    before = hooks_of(net), [m.training for m in net.modules()], nv.extra_state(net)
    generators = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    buffers = [id(b) for b in net.buffers()]

    def noisy(model: nn.Module, batch: Tensor) -> Tensor:
        model.train()
        random.random(), numpy.random.rand()
        return square(model, batch) * (1 + 0 * torch.rand(()))

    scan(net, noisy, [x, x], recipe, mode="both", gradients=True)
    assert all(same_bits(state[name].reshape(-1), value.reshape(-1)) for name, value in net.state_dict().items())
    assert versions[: len(list(net.parameters()))] == [p._version for p in net.parameters()]
    assert buffers == [id(b) for b in net.buffers()]
    assert all(p.grad is grads[n][0] and same_bits(p.grad, grads[n][1]) for n, p in net.named_parameters())
    assert hooks_of(net) == before[0] and [m.training for m in net.modules()] == before[1]
    assert str(nv.extra_state(net)) == str(before[2])
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]
    assert numpy.array_equal(numpy.random.get_state()[1], generators[2])


def test_the_model_is_the_same_after_an_error():
    net, x = net_and_input()
    before, generator, calls = hooks_of(net), torch.get_rng_state(), []

    def fails(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyError("mine")
        return square(model, batch)

    with pytest.raises(KeyError, match="mine"):
        scan(net, fails, [x])
    assert hooks_of(net) == before and torch.equal(torch.get_rng_state(), generator)


def test_dropout_is_the_same_in_every_configuration():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Dropout(0.5), nn.Linear(16, 16, bias=False))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.fill_(0.5)  # exact in NVFP4
    x = torch.ones(16, 16)
    found = scan(model, square, [x, x], NO_SR, mode="both")
    assert found.everything.loss == pytest.approx(0, abs=1e-5)
    assert all(abs(change.loss) < 1e-5 for row in found.rows for change in (row.alone, row.without))
    assert scan(model, square, [x], NO_SR, seed=1).loss != scan(model, square, [x], NO_SR, seed=2).loss


def test_the_models_own_entries_and_tables_do_not_count():
    model, batches = chain()
    plain = scan(model, regression, batches, NO_SR).to_dict()
    nv.set_precision(model, {"layers": None, "layers.1": None})
    assert scan(model, regression, batches, NO_SR).to_dict() == plain
    with_table = dataclasses.replace(NO_SR, precision=(("layers.0", None),))
    assert scan(model, regression, batches, with_table).to_dict() == plain
    with nv.nvfp4_autocast(NO_SR):
        assert scan(model, regression, batches).to_dict() == plain

    def inner(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:  # a loss with a context of its own
        with nv.nvfp4_autocast(NO_SR):
            return regression(model, batch)

    assert scan(model, inner, batches, NO_SR).to_dict() == plain


def test_suggest_recipe_and_file(tmp_path):
    net, x = net_and_input()
    found = scan(net.eval(), square, iter([x, 2 * x]), NO_SR, mode="both")
    flops = {row.name: row.flops for row in found.rows}
    assert set(flops) == {"body.1", "body.4", "up", "head"} and found.batches == 2
    assert found.flops == sum(flops.values()) + 3 * 2 * 4 * 64 * 16 * 27  # and the stem's
    assert found.suggest(budget=0.0) == {} == found.suggest(count=0)
    for budget in (0.05, 0.3, 1.0):
        table = found.suggest(budget=budget)
        assert sum(flops[name] for name in table) <= budget * sum(flops.values())
        assert set(table.values()) <= {None}
    assert set(found.suggest(budget=1.0)) == {row.name for row in found.rows if found.score(row) > 0}
    path = tmp_path / "mine.toml"
    base = nv.NVFP4BlockScaling(disable_rht=True, precision=(("stem", None),))
    saved = found.save(path, base, count=2)
    assert nv.load_recipe(path) == saved == found.recipe(base, count=2)
    assert saved.disable_rht and dict(saved.precision) == found.suggest(count=2)
    nv.set_precision(net, nv.load_recipe(path))
    assert {row.name: row.nvfp4 for row in nv.coverage(net, x, recipe=saved).rows} == {
        "stem": False,
        **{name: name not in found.suggest(count=2) for name in flops},
    }
    with pytest.raises(FileExistsError, match="overwrite=True"):
        found.save(path)
    assert nv.load_recipe(path) == saved
    assert found.save(path, overwrite=True) == nv.load_recipe(path) == found.recipe()
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["layers"][0]["name"] == found.ranked()[0].name


def test_what_a_budget_refuses():
    model, batches = chain()
    found = scan(model, regression, batches[:1], NO_SR)
    for options in ({"budget": 1.5}, {"budget": True}, {"count": -1}, {"count": 1.0}, {"budget": 0.1, "count": 1}):
        with pytest.raises(ValueError, match="budget|count"):
            found.suggest(**options)


def test_a_layer_that_makes_the_loss_nan_is_the_worst():
    model, batches = chain()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        exact = nn.functional.linear(batch[0], model.layers[0].weight, model.layers[0].bias)
        return regression(model, batch) + (math.nan if model.seen.ne(exact).any() else 0.0)

    model.layers[0].register_forward_hook(lambda module, args, y: setattr(model, "seen", y.detach()))
    found = scan(model, loss, batches, NO_SR)
    assert found.ranked()[0].name == "layers.0" and found.score(found.ranked()[0]) == math.inf
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["layers"][0]["score"] is None


class Nested(nn.Module):
    """A container that runs a layer itself: attention's projections, and a kernel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.weight = nn.Parameter(torch.randn(32, 32))
        self.add_module("odd[0]*", nn.Linear(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(self.attention(x, x, x, need_weights=False)[0], self.weight)
        return self.get_submodule("odd[0]*")(x)


@pytest.mark.parametrize("name", ["", "attention", "odd[0]*"])
def test_a_layer_is_what_set_precision_can_name(name):
    """The table leaves in high precision what was measured without, in containers and under odd names too."""
    torch.manual_seed(0)
    model, x = Nested(), torch.randn(2, 16, 32)
    found = scan(model, square, [x], NO_SR, mode="all_but_one")
    assert [row.name for row in found.rows] == ["attention", "", "odd[0]*"]
    row = next(row for row in found.rows if row.name == name)
    recipe = dataclasses.replace(NO_SR, precision=tuple(found._table([row]).items()))
    nv.set_precision(model, recipe)
    with nv.nvfp4_autocast(recipe):
        assert float(square(model, x).detach()) - found.loss == row.without.loss


def test_explicit_modules_thin_layers_and_wrappers():
    net, x = net_and_input()
    reference = scan(net, square, [x], NO_SR).to_dict()
    assert scan(nv.convert_model(copy.deepcopy(net), NO_SR), square, [x], NO_SR).to_dict() == reference
    padded = dataclasses.replace(NO_SR, thin_layers="pad")
    assert "stem" in [row.name for row in scan(net, square, [x], padded).rows]
    wrapped = nn.Sequential()
    wrapped.add_module("module", net)
    assert [row.name for row in scan(wrapped, square, [x], NO_SR).rows] == ["body.1", "body.4", "up", "head"]


@pytest.mark.parametrize("kind", ["checkpoint", "compile"])
def test_checkpointed_and_compiled_models_are_measured_alike(kind):
    """Checkpointing runs the modules again in the backward pass: under the same entries."""
    model, batches = chain()
    plain = scan(model, regression, batches[:1], NO_SR, mode="both", gradients=True).to_dict()
    if kind == "compile":
        other = torch.compile(model, backend="eager")
    else:
        other = copy.deepcopy(model)
        for index, layer in enumerate(list(other.layers)):
            other.layers[index] = Checkpointed(layer)
    found = scan(other, regression, batches[:1], NO_SR, mode="both", gradients=True).to_dict()
    if kind == "checkpoint":
        for row in found["layers"]:
            row["name"] = row["name"].removesuffix(".inner")
    assert found == plain


class Checkpointed(nn.Module):
    """Runs a module again in the backward pass, by its call, hooks included."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


def test_progress():
    model, batches = chain()
    told = []
    scan(model, regression, batches, NO_SR, mode="both", progress=lambda done, of: told.append((done, of)))
    assert told == [(i, 10) for i in range(1, 11)] * 2


def test_refused():
    net, x = net_and_input()
    with pytest.raises(ValueError, match="no batches"):
        scan(net, square, [])
    with pytest.raises(TypeError, match=r"no batches[\s\S]*\[images\]"):
        scan(net, square, x)  # its images, one by one
    with pytest.raises(ValueError, match="no layer runs in NVFP4"):
        scan(nn.Conv2d(3, 8, 3), square, [x])
    with pytest.raises(ValueError, match="not a scalar"):
        scan(net, lambda model, batch: model(batch), [x])
    with pytest.raises(TypeError, match="loss is not a tensor"):
        scan(net, lambda model, batch: float(model(batch).mean()), [x])
    with pytest.raises(ValueError, match="no gradient"):
        scan(net, lambda model, batch: model(batch).mean().detach(), [x], gradients=True)
    with pytest.raises(ValueError, match="high precision is not finite on batch 1"):
        scan(net, square, [x, x * math.nan])
    with pytest.raises(ValueError, match="lazy parameters"):
        scan(nn.LazyLinear(16), square, [x])
    with pytest.raises(ValueError, match="unknown mode"):
        scan(net, square, [x], mode="each")
    with pytest.raises(ValueError, match="unknown backend"):
        scan(net, square, [x], backend="fast")
    with pytest.raises(TypeError, match="not a module"):
        scan(square, net, [x])
    with pytest.raises(TypeError, match="not an NVFP4 recipe"):
        scan(Net(), square, [x], recipe=4)


# ---- a criterion in place of a function, and a table for pandas ------------------------------------------------------


class Named(nn.Module):
    """A loss that was a module before criterions were taken: called with the model."""

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return regression(model, batch)


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.functional.mse_loss, Named()], ids=["module", "f", "old"])
def test_a_criterion_with_pairs_measures_what_the_function_does(criterion):
    model, batches = chain()
    expected = scan(model, lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]), batches, NO_SR)
    found = scan(model, criterion, [list(batch) for batch in batches], NO_SR)
    assert [row.name for row in found.ranked()] == [row.name for row in expected.ranked()]
    assert found.loss == pytest.approx(expected.loss) and found.everything == expected.everything


@pytest.mark.parametrize(("batch", "told"), [(torch.zeros(16, 32), "a Tensor"), ((1, 2, 3), "tuple of 3")])
def test_a_criterion_refuses_what_is_no_pair(batch, told):
    with pytest.raises(TypeError, match="a criterion needs pairs") as caught:
        scan(chain()[0], nn.MSELoss(), [batch], NO_SR)
    assert told in str(caught.value) and "fix:" in str(caught.value)


def test_a_data_frame_holds_the_ranked_rows():
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    model, batches = chain()
    found = scan(model, nn.MSELoss(), batches, NO_SR, mode="both")
    frame = found.to_dataframe()
    assert isinstance(frame, pandas.DataFrame) and list(frame.index) == [row.name for row in found.ranked()]
    assert frame.index.name == "layer" and frame["score"].is_monotonic_decreasing
    assert frame["alone loss_rms"].iloc[0] == found.ranked()[0].alone.loss_rms and "without loss" in frame


def test_the_rows_that_pandas_gets(monkeypatch):
    made = types.SimpleNamespace(
        DataFrame=lambda rows, index: (rows, index), Index=lambda names, name: (name, names)
    )
    monkeypatch.setitem(sys.modules, "pandas", made)
    model, batches = chain()
    found = scan(model, nn.MSELoss(), batches, NO_SR)
    rows, index = found.to_dataframe()
    assert index == ("layer", [row.name for row in found.ranked()])
    assert rows[0]["op"] == "linear" and rows[0]["alone loss"] == found.ranked()[0].alone.loss
    assert rows[0]["score"] == found.score(found.ranked()[0]) and not any("without" in key for key in rows[0])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(RuntimeError, match="needs: the package pandas"):
        found.to_dataframe()
