"""The coverage report: who ran in what, the totals, and that measuring leaves no trace."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import te_nvfp4_cv as nv
from te_nvfp4_cv.backend import dispatch, native
from te_nvfp4_cv.context import function_mode
from te_nvfp4_cv.context import state as nv_context
from te_nvfp4_cv.export.codes import quantize_layer
from te_nvfp4_cv.export.modules import become

F = nn.functional


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.body = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.drop = nn.Dropout(0.5)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.head = nn.Linear(16, 32)
        self.unused = nn.Linear(16, 16)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = self.up(self.drop(self.body(self.deep(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def image():
    return torch.randn(16, 3, 8, 8)


def rows(report) -> dict:
    return {row.name: row for row in report.rows}


def test_rows_say_what_and_why(image):
    report = nv.coverage(Net(), image)
    found = rows(report)
    assert [row.name for row in report.rows] == ["stem", "deep", "body", "up", "head", "unused"]
    assert {name for name, row in found.items() if row.nvfp4} == {"body", "up", "head"}
    assert "3 in-channels" in found["stem"].reason and "depthwise" in found["deep"].reason
    assert found["unused"].reason == "not reached in this forward pass" and found["unused"].calls == 0
    assert found["body"].op == "conv2d" and found["body"].kernel == (32, 16, 3, 3) and found["body"].reason == ""
    assert (report.nvfp4_layers, report.high_precision_layers) == (3, 3)


def test_flops_are_those_of_the_three_gemms(image):
    pixels = 16 * 8 * 8
    expected = {
        "stem": pixels * 16 * 3 * 9,
        "deep": pixels * 16 * 9,
        "body": pixels * 32 * 16 * 9,
        "up": pixels * 32 * 16 * 4,
        "head": 16 * 16 * 32,
        "unused": 0,
    }
    report = nv.coverage(Net(), image)
    assert {row.name: row.flops for row in report.rows} == {name: 6 * macs for name, macs in expected.items()}
    part = sum(expected[name] for name in ("body", "up", "head"))
    assert report.nvfp4_flops_share == pytest.approx(part / sum(expected.values()))
    two = nv.coverage(Net(), image, recipe=nv.NVFP4BlockScaling(high_precision_gemms=("dgrad",)))
    assert two.nvfp4_flops_share == pytest.approx(2 / 3 * part / sum(expected.values()))
    one = nv.coverage(Net(), image, recipe=nv.NVFP4BlockScaling(backward_override="high_precision"))
    assert one.nvfp4_flops_share == pytest.approx(1 / 3 * part / sum(expected.values()))


def test_saved_bytes_of_a_layer_are_its_packed_codes():
    model = nn.Conv2d(32, 64, 3, padding=1)
    report = nv.coverage(nn.Sequential(nn.Identity(), model), torch.randn(16, 32, 8, 8, requires_grad=True))
    x_codes, w_codes = 16 * 32 * 64 * 9 // 16, 32 * 64 * 9 // 2 + 9 * (32 // 16) * (64 // 16)
    kept = report.rows[0].saved_bytes
    amaxes = 8
    assert x_codes + w_codes + amaxes <= kept <= x_codes + 32 * 64 * 9 * 9 // 16 + amaxes
    assert report.saved_bytes == kept


def test_saved_bytes_are_autograds_account():
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 16))
    x = torch.randn(16, 16)
    high = nv.NVFP4BlockScaling(high_precision_gemms=("fprop", "dgrad", "wgrad"))
    report = nv.coverage(model, x, recipe=high)
    # tanh's result, dropout's mask (bool, or fp32), relu's mask, the second layer's input; not x, not the weights
    activations = 16 * 16 * 4
    mask = report.saved_bytes - 2 * activations - report.relu_mask_bytes
    assert report.relu_mask_bytes == 16 * 16 // 8 and mask in (16 * 16, activations)


def test_views_of_one_storage_count_once():
    class Twice(nn.Module):
        def forward(self, x):
            y = x * 2
            return (y.square() + y.view(-1).view_as(y).exp().detach() * y.t().square().t()).sum()

    report = nv.coverage(Twice(), torch.randn(8, 8, requires_grad=True))
    assert report.saved_bytes == 2 * 8 * 8 * 4  # y, also as y.t(), and exp(y)


def test_what_the_graph_drops_is_not_counted():
    class Drops(nn.Module):
        def forward(self, x):
            (x * 2).exp()  # its node dies with its result
            return (x * 3).exp()

    report = nv.coverage(Drops(), torch.randn(8, 8, requires_grad=True))
    assert report.saved_bytes == 8 * 8 * 4


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(image, training):
    model = Net().train(training)
    model.head.eval()
    nv.set_precision(model, {"head": None})
    model(image).sum().backward()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes = [m.training for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    buffers = {name: (b, b._version) for name, b in model.named_buffers()}
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy(), nv.extra_state(model)
    with nv.nvfp4_autocast(nv.NVFP4BlockScaling(disable_rht=True)):
        nv.coverage(model, image)
        assert nv.active_recipe().disable_rht
    assert nv_context.state() is None and not function_mode.mode_is_on()
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (numpy.random.get_state()[1] == before[2]).all() and nv.extra_state(model) == before[3]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert [m.training for m in model.modules()] == modes
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert all(b is buffers[name][0] for name, b in model.named_buffers())
    assert all(b._version == buffers[name][1] for name, b in model.named_buffers())


def test_a_step_that_waits_for_its_backward_pass_may_be_looked_at(image):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))
    gradients = []
    for looks in (False, True):
        torch.manual_seed(0)
        model[1].reset_running_stats()
        with nv.nvfp4_autocast():
            loss = model(image).square().mean()
            if looks:
                nv.coverage(model, image)
        gradients.append(torch.autograd.grad(loss, model.parameters()))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("training", [True, False])
def test_a_model_on_the_meta_device_has_a_report(training):
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)).train(training)
        report = nv.coverage(model, torch.empty(16, 16, 8, 8))
    assert [(row.nvfp4, row.reason) for row in report.rows] == [(False, "no fast backend for meta")]


@pytest.mark.parametrize("training", [True, False])
def test_a_model_of_fake_tensors_has_a_report(training):
    with FakeTensorMode():
        model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)).train(training)
        report = nv.coverage(model, torch.empty(16, 16, 8, 8))
    assert [(row.nvfp4, row.reason) for row in report.rows] == [(True, "")]


def test_an_error_in_forward_leaves_no_trace(image):
    model = Net()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        nv.coverage(model, image[:, :2])
    with pytest.raises(ZeroDivisionError):
        model.head.register_forward_pre_hook(lambda *_: 1 // 0)
        nv.coverage(model, image)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert nv_context.state() is None and not model.stem._forward_hooks


def test_runs_under_no_grad_and_in_inference_mode(image):
    model = Net()
    expected = nv.coverage(model, image).to_dict()
    with torch.no_grad():
        assert nv.coverage(model, image).to_dict() == expected
    with torch.inference_mode():
        assert nv.coverage(model, image).to_dict() == expected
    with nv.nvfp4_autocast(enabled=False):
        assert nv.coverage(model, image).to_dict() == expected


def test_set_precision_and_the_enclosing_recipe_show(image):
    model = Net()
    nv.set_precision(model, {"up": None, "head": nv.NVFP4BlockScaling(high_precision_gemms=("wgrad",))})
    with nv.nvfp4_autocast(nv.NVFP4BlockScaling(disable_rht=True)):
        report = nv.coverage(model, image)
    found = rows(report)
    assert found["up"].reason == "set_precision: high precision" and not found["up"].nvfp4
    assert found["head"].nvfp4_flops == found["head"].flops * 2 // 3
    assert "disable_rht=True" in report.recipe


def test_padding_waste():
    def waste(layer, x, **fields):
        return nv.coverage(layer, x, recipe=nv.NVFP4BlockScaling(**fields)).rows[0].padding_waste

    assert waste(nn.Conv2d(16, 32, 3, padding=1), torch.randn(16, 16, 8, 8)) == 0
    assert waste(nn.Conv2d(24, 24, 1), torch.randn(16, 24, 8, 8)) == pytest.approx(1 - 24 / 32)
    assert waste(nn.Linear(16, 16), torch.randn(4, 16)) == pytest.approx(1 - 4 / 16)
    assert waste(nn.Linear(16, 16), torch.randn(4, 16), high_precision_gemms=("wgrad",)) == 0
    assert waste(nn.Conv2d(16, 16, 1), torch.randn(4, 16, 8, 8)) == 0  # four strips per image, no halo
    assert 0 < waste(nn.Conv2d(16, 16, 3, padding=1), torch.randn(4, 16, 8, 8)) < 0.5
    assert waste(nn.Conv2d(3, 32, 1), torch.randn(16, 3, 8, 8), thin_layers="pad") == pytest.approx(1 - 35 / 48)
    assert waste(nn.Conv2d(64, 64, 1, stride=2), torch.randn(4, 64, 8, 8)) >= 0


def test_row_scaling_is_noted_where_it_does_not_apply():
    recipe = nv.NVFP4BlockScaling(row_scaled_activation=True, disable_rht=True)
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1))
    three, one = nv.coverage(model, torch.randn(4, 16, 6, 6), recipe=recipe, backend="vendor").rows
    assert "row scaling does not apply" in three.note and one.note == ""


@pytest.mark.parametrize("passes", [True, False])
def test_row_scales_that_keep_a_layer_from_the_integer_backend_are_noted(monkeypatch, passes):
    monkeypatch.setattr(dispatch, "_integer_passes", passes and native.load() is not None)
    recipe = nv.NVFP4BlockScaling(row_scaled_activation=True, disable_rht=True)
    (row,) = nv.coverage(nn.Linear(16, 16), torch.randn(4, 16), recipe=recipe).rows
    assert row.nvfp4 and row.note == ("row scales: on the vendor backend" if dispatch.integer_passes() else "")


def test_several_calls_of_one_layer_are_one_row(image):
    shared = nn.Conv2d(16, 16, 1)
    report = nv.coverage(nn.Sequential(shared, nn.ReLU(), shared), torch.randn(16, 16, 4, 4))
    (row,) = report.rows
    assert row.calls == 2 and row.flops == 2 * 6 * 16 * 16 * 16 * 16


def test_functionals_are_named_by_the_owner_of_the_weight():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.kernel = nn.Linear(16, 16), nn.Parameter(torch.randn(16, 16, 1, 1))

        def forward(self, x):
            x = F.conv2d(x, self.kernel)
            computed = self.kernel * 2
            x = F.conv2d(x, computed)
            return F.linear(x.mean((2, 3)), self.layer.weight)

    report = nv.coverage(nn.ModuleDict({"inner": Functional()})["inner"], torch.randn(4, 16, 4, 4))
    assert [row.name for row in report.rows] == ["Functional.kernel", "Functional", "layer"]
    assert all(row.nvfp4 for row in report.rows)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.lstm = nn.LSTM(32, 16, batch_first=True)
        self.cell = nn.GRUCell(16, 16)

    def forward(self, x):
        x, _ = self.attention(x, x, x)
        x, _ = self.lstm(x)
        return self.cell(x[:, 0])


@pytest.mark.parametrize("training", [True, False])
def test_attention_and_recurrent_layers(training):
    report = nv.coverage(Attention().train(training), torch.randn(16, 5, 32))
    found = rows(report)
    assert found["attention.in_proj_weight"].nvfp4 and found["attention.out_proj"].nvfp4
    assert found["attention.in_proj_weight"].flops == 6 * 80 * 32 * 96
    assert found["lstm"].reason == found["cell"].reason == "recurrent layer"
    assert found["lstm"].flops == 6 * 80 * (32 * 64 + 16 * 64) and found["cell"].flops == 6 * 16 * 2 * 16 * 48
    assert len(report.rows) == 4 and found["lstm"].saved_bytes > 0
    x_codes, w_codes = 80 * 32 * 9 // 16, 32 * 32 * 9 // 16
    assert found["attention.out_proj"].saved_bytes <= x_codes + w_codes + 8  # attention's own tensors are not its


class Product(nn.Linear):
    def forward(self, x):
        return x @ self.weight.t()


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("basis", torch.randn(16, 16))

    def forward(self, x):
        return F.linear(x, self.basis)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.script = torch.jit.script(nn.Sequential(nn.Linear(16, 16)))
        self.product = Product(16, 16)
        self.direct = nn.Parameter(torch.randn(16, 16, 1))
        self.fp64 = nn.Linear(16, 16, dtype=torch.float64)
        self.fixed = Fixed()

    def forward(self, x):
        x = self.fixed(self.product(self.script(x)))
        x = torch.convolution(x[:, :, None], self.direct, None, (1,), (0,), (1,), False, (0,), 1)[:, :, 0]
        return self.fp64(x.double())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_never_reaches_the_context_is_listed():
    report = nv.coverage(Odd(), torch.randn(16, 16))
    found = rows(report)
    assert not any(row.nvfp4 for row in report.rows)
    assert "ScriptModule" in found["script"].reason and "script.0" not in found
    assert found["product"].reason == "torch.matmul called directly" and found["product"].flops == 6 * 16**3
    assert found["Odd.direct"].reason == "torch.convolution called directly"
    assert "float64" in found["fp64"].reason
    assert "the kernel is a constant" in found["fixed"].reason
    assert report.nvfp4_flops_share == 0


def test_deformable_convolutions_are_listed():
    library = torch.library.Library("te_nvfp4_cv_test", "DEF")
    library.define("deform_conv2d(Tensor x, Tensor weight) -> Tensor")
    library.impl("deform_conv2d", lambda x, weight: F.conv2d(x, weight), "CompositeImplicitAutograd")

    class DeformConv2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16, 1, 1))

        def forward(self, x):
            return torch.ops.te_nvfp4_cv_test.deform_conv2d(x, self.weight)

    model = nn.ModuleDict({"a": DeformConv2d(), "b": DeformConv2d()})
    model.forward = lambda x: model["a"](x)  # type: ignore[method-assign]
    found = rows(nv.coverage(model, torch.randn(2, 16, 4, 4)))
    assert found["a"].reason == "deformable convolution" and found["a"].flops == 6 * 32 * 16 * 16
    assert found["b"].reason == "not reached in this forward pass"


def test_explicit_modules_and_wrapped_models(image):
    model = nv.convert_model(Net())
    expected = nv.coverage(Net(), image)
    found = nv.coverage(torch.compile(model, backend="eager"), image)
    assert [(r.name, r.nvfp4) for r in found.rows] == [(r.name, r.nvfp4) for r in expected.rows]
    averaged = nv.coverage(torch.optim.swa_utils.AveragedModel(Net()), image)
    assert [r.name for r in averaged.rows] == [r.name for r in expected.rows]


def test_checkpointed_segments_keep_nothing():
    class Segments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x):
            return checkpoint(self.fc, x, use_reentrant=False)

    report = nv.coverage(Segments(), torch.randn(16, 16, requires_grad=True))
    assert report.rows[0].nvfp4 and report.saved_bytes == 0


def test_keyword_inputs_backend_and_dict_outputs(image):
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, *, images, scale):
            return {"out": [self.fc(images) * scale]}

    report = nv.coverage(Keywords(), images=torch.randn(16, 16), scale=2.0, backend="reference")
    assert report.rows[0].nvfp4 and report.saved_bytes > 0


def test_table_and_dict(image):
    report = nv.coverage(Net(), image, recipe=nv.NVFP4BlockScaling(name="mine"))
    text, data = str(report), report.to_dict()
    lines = text.splitlines()
    column = lines[0].index("precision")
    assert all(line[column:].startswith(("nvfp4", "high")) for line in lines[1:-2])
    assert "3 of 6 layers" in text and "thin layer" in text and "mine" in lines[-1]
    needed = {"layers", "saved_bytes", "nvfp4_flops_share", "nvfp4_layers", "high_precision_layers", "recipe"}
    assert needed <= set(data) and len(data["layers"]) == 6 and data["layers"][0]["kernel"] == [16, 3, 3, 3]
    import json

    assert json.loads(json.dumps(data)) == data


def test_bad_arguments(image):
    with pytest.raises(TypeError, match="coverage: not a module"):
        nv.coverage(image)
    layer = nn.Linear(16, 16)
    packed = nn.Sequential(become(layer, quantize_layer(layer, nv.NVFP4BlockScaling()), nv.NVFP4BlockScaling()))
    with pytest.raises(ValueError, match="an inference model"):
        nv.coverage(packed, torch.randn(2, 16))
    with pytest.raises(ValueError, match="lazy parameters"):
        nv.coverage(nn.LazyLinear(16), torch.randn(2, 16))
    with pytest.raises(TypeError, match="recipe"):
        nv.coverage(Net(), image, recipe=4)
