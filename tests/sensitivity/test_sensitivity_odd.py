"""Sensitivity tools where the obvious answer is wrong: what is suggested helps, and what is kept can be read."""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv import sensitivity
from te_nvfp4_cv.sensitivity import builder
from te_nvfp4_cv.sensitivity.measure import Measured, compare
from te_nvfp4_cv.sensitivity.scan_report import _gain
from tests.helpers import same_bits, values

NO_SR = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)


class BreaksInNVFP4(nn.Module):
    """Three layers; a rounded output of one of them makes the loss NaN."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
        self.exact: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[1](self.layers[0](x))
        y = self.layers[2](x)
        exact = nn.functional.linear(x.double(), self.layers[2].weight.double(), self.layers[2].bias.double())
        return y * (math.nan if float((y - exact).detach().abs().max()) > 1e-3 else 1.0)


@pytest.mark.parametrize("mode", ["both", "all_but_one"])
def test_the_layer_that_breaks_is_suggested(mode: str) -> None:
    model = BreaksInNVFP4()
    found = sensitivity.scan(model, lambda m, x: m(x).square().mean(), [values((8, 32))], NO_SR, mode=mode)
    assert found.suggest(count=1) == {"layers.2": None}


def test_a_model_that_writes_to_its_input_gets_the_same_batch_each_time() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x.sub_(1)).square().mean()

    model, batch = nn.Linear(32, 32), values((16, 32))
    before = batch.clone()
    found = sensitivity.scan(model, loss, [batch])
    with torch.no_grad():
        assert found.loss == pytest.approx(float(loss(model, before.clone())))
    assert same_bits(batch, before)


def test_gains_where_numbers_are_missing() -> None:
    assert _gain(3.0, 1.0) == 2.0 and _gain(math.inf, 1.0) == math.inf
    assert _gain(math.inf, math.inf) == 0.0 == _gain(math.nan, math.nan) and _gain(math.nan, 1.0) == math.inf


def test_save_bundle_takes_the_fields_of_a_bundle_by_name() -> None:
    given = inspect.signature(sensitivity.save_bundle).parameters
    assert {name for name, p in given.items() if p.kind is p.KEYWORD_ONLY} == set(given) - {"path"}
    for field in dataclasses.fields(sensitivity.Bundle):
        optional = field.default is not dataclasses.MISSING
        assert given[field.name].default == (field.default if optional else inspect.Parameter.empty)
    assert len(given) == 1 + len(dataclasses.fields(sensitivity.Bundle))


def test_numbers_of_numpy_are_kept_as_plain_ones(tmp_path: Path) -> None:
    sensitivity.save_bundle(
        tmp_path / "b.pt",
        model_state={},
        batch=(torch.ones(1), {3: np.float64(0.5), np.str_("name"): np.str_("text")}),
        seeds={"torch": 1},
        recipe_text="",
        builder={"name": "a:b", "arguments": {}},
        step=1,
        reason="test",
        loss=np.float64(0.25),
    )
    found = sensitivity.load_bundle(tmp_path / "b.pt")
    assert found.loss == 0.25 and found.batch[1] == {3: 0.5, "name": "text"}


def test_weights_without_values_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(16, 0), nn.Linear(16, 16))
    assert "1" in str(sensitivity.kurtosis(model))


def test_every_buffer_is_put_back_after_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True))
    before = [b.clone() for b in model.buffers()]

    def loader():
        yield values((2, 4, 6)) + 5.0
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        sensitivity.update_bn(model, loader())
    assert all(same_bits(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_a_builder_of_the_same_name_elsewhere_is_not_taken(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rebuild_twice.py").write_text(f"def build(arguments):\n    return {folder!r}\n")
    assert builder.given(f"{tmp_path}/a/rebuild_twice.py:build")({}) == "a"
    with pytest.raises(ValueError, match="another module is called"):
        builder.given(f"{tmp_path}/b/rebuild_twice.py:build")


def test_layers_that_cannot_learn_get_no_fraction() -> None:
    attention = nn.MultiheadAttention(32, 2)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
    model = nn.ModuleList([attention, normed, nn.Linear(32, 32).double(), nn.Linear(32, 32)])
    assert len(nv.learn_scales(model)) == 1 and hasattr(model[3], "weight_scale")


class Masked(nn.Module):
    """A causal mask of -inf, as attention has it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("mask", torch.full((16, 16), -math.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) + self.mask).softmax(-1)


def masked_step(arguments: object) -> tuple[nn.Module, object]:
    return Masked(), lambda model, x: model(x).square().sum()


def test_a_mask_of_minus_infinity_is_no_fault(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sensitivity.save_bundle(
        tmp_path / "b.pt",
        model_state=Masked().state_dict(),
        batch=values((16, 16)),
        seeds={"torch": 1},
        recipe_text=NO_SR.to_toml(),
        builder={"name": "a:b", "arguments": {}},
        step=1,
        reason="test",
    )
    found = sensitivity.diagnose(tmp_path / "b.pt", masked_step)
    assert found.finite and found.high.first is None and "mask" not in str(found)


# ---- tensors that are no plain arrays of real numbers ---------------------------------------------------------------


class Behind(nn.Module):
    """A linear layer behind something else, which `kind` names."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        dtype = torch.complex64 if kind == "complex" else torch.float32
        self.kind, self.first, self.last = kind, nn.Linear(32, 32, dtype=dtype), nn.Linear(32, 32)
        self.table = nn.Embedding(16, 32, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "table":
            return self.last(self.table(torch.arange(16)) + x)
        if self.kind == "sparse":
            return self.last(self.first(x.relu().to_sparse()))
        if self.kind == "vmap":
            return self.last(torch.vmap(self.first)(x))
        return self.last(self.first(x.to(torch.complex64)).imag)


def step_of(kind: str, broken: bool = False) -> sensitivity.Diagnosis:
    model, recipe = Behind(kind), NO_SR.to_toml()
    if broken:
        model.first.weight.data[0, 0] = complex(0, math.nan)
    builder = {"name": "rebuild:build", "arguments": {}}
    bundle = sensitivity.Bundle(model.state_dict(), values((16, 32)), {"torch": 0}, recipe, builder, 1, "a test")
    return sensitivity.diagnose(bundle, lambda _: (Behind(kind), lambda m, x: m(x).square().mean()))


@pytest.mark.parametrize("kind", ["table", "sparse", "vmap", "complex"])
def test_a_step_with_other_tensors_is_diagnosed(kind: str) -> None:
    found = step_of(kind)
    model = Behind(kind)
    model(values((16, 32))).square().mean().backward()
    gradients = [p.grad.to_dense() for p in model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float((g.real.double() ** 2 + (g.imag.double() if g.is_complex() else 0) ** 2).sum())
                         for g in gradients))  # fmt: skip
    assert found.finite and found.worst_layer == "last" and 0 < found.nvfp4.gradient_error < 0.5
    assert found.high.gradient_norm == pytest.approx(norm, rel=1e-6)


def test_an_imaginary_part_that_is_not_finite_is_found() -> None:
    assert str(step_of("complex", broken=True).high.first) == "parameter weight of first"


def test_sparse_and_complex_gradients_are_compared_whole() -> None:
    found = sensitivity.scan(Behind("table"), lambda m, x: m(x).square().mean(), [values((16, 32))], gradients=True)
    assert [row.name for row in found.rows] == ["last"] and found.everything.gradient_error > 0
    real, both = torch.tensor([1 + 0j, 0]), torch.tensor([1 + 1j, 0])
    error, cosine = compare(Measured(0.0, [both]), Measured(0.0, [real]))
    assert error == pytest.approx(1.0) and cosine == pytest.approx(1 / math.sqrt(2))


def test_weights_that_never_run_in_nvfp4_have_no_figures() -> None:
    assert [row.name for row in sensitivity.kurtosis(Behind("complex")).rows] == ["last"]
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse(), requires_grad=False)
    assert [row.name for row in sensitivity.kurtosis(model).rows] == ["1"]
