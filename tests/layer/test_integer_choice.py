"""When a layer runs on the integer backend: what "auto" means on a CPU, the check of first use, errors, who calls."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn as nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.backend import cache, dispatch, native
from te_nvfp4_cv.backend.dispatch import BY_LAYER
from te_nvfp4_cv.export.codes import quantize_layer
from te_nvfp4_cv.export.modules import become
from te_nvfp4_cv.layer import custom_op, inference, plan
from te_nvfp4_cv.layer.plan import plan_for
from te_nvfp4_cv.ops.conv import integer
from te_nvfp4_cv.ops.records import Face
from tests.helpers import make_geometry, same_bits, values
from tests.layers import NO_SR, step, tensors

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ROW_SCALED = nv.NVFP4BlockScaling(row_scaled_activation=True, disable_rht=True, disable_stochastic_rounding=True)
ONE_BY_ONE = make_geometry(2, (32, 16), (4, 4), 1)

pytestmark = [
    pytest.mark.skipif(native.load() is None, reason="no compiled kernels"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def passes(monkeypatch):
    """A function that says whether the kernels have passed their check in this process."""
    return lambda passed: monkeypatch.setattr(dispatch, "_integer_passes", passed)


def plan_with(backend: str, recipe: Any = NO_SR, dtype: torch.dtype = torch.float32, geometry: Any = ONE_BY_ONE) -> str:
    """Return the backend of the plan of one layer."""
    return plan_for(geometry, recipe, backend, dtype, False).backend


# ---- auto -----------------------------------------------------------------------------------------------------------


def test_auto_decides_layer_by_layer_where_the_check_has_passed(passes):
    passes(True)
    assert dispatch.resolve("auto", CPU, by_layer=True) == BY_LAYER
    assert dispatch.resolve("auto", CPU) == "vendor"  # for a caller that multiplies nothing
    for name in ("reference", "integer", "vendor"):
        assert dispatch.resolve(name, CPU, by_layer=True) == dispatch.resolve(name, CPU) == name
    passes(False)
    assert dispatch.resolve("auto", CPU, by_layer=True) == "vendor"
    assert dispatch.resolve("integer", CPU) == "integer"  # by name it runs all the same


def test_a_plan_of_auto_is_integer_or_vendor(monkeypatch):
    monkeypatch.setattr(plan, "prefers_vendor", lambda *_: False)
    assert plan_with(BY_LAYER) == "integer" == plan_with("integer")
    monkeypatch.setattr(plan, "prefers_vendor", lambda *_: True)
    assert plan_with(BY_LAYER) == "vendor"
    assert plan_with("integer") == "integer"  # an explicit choice is nobody's to improve
    assert plan_with("vendor") == "vendor" and plan_with("reference") == "reference"


def test_row_scaled_activations_stay_on_the_vendor_backend(monkeypatch):
    monkeypatch.setattr(plan, "prefers_vendor", lambda *_: False)
    assert plan_with(BY_LAYER, ROW_SCALED) == "vendor"
    with pytest.raises(ValueError, match="row-scaled") as error:
        plan_with("integer", ROW_SCALED)
    assert "backend='auto'" in str(error.value)
    wide = make_geometry(2, (32, 16), (4, 4), 3)  # where row scaling does not apply
    for name in (BY_LAYER, "integer"):
        assert plan_with(name, ROW_SCALED, geometry=wide) == "integer"


def test_layers_with_row_scales_run_on_the_vendor_backend_and_the_others_do_not(passes, plans):
    passes(True)
    for layer in ("linear", "conv2d"):
        step(layer, *tensors(layer), recipe=ROW_SCALED)
    assert [made.backend for made in plans] == ["vendor", "integer"]
    auto, vendor = (step("linear", *tensors("linear"), recipe=ROW_SCALED, backend=b) for b in ("auto", "vendor"))
    assert all(same_bits(a, b) for a, b in zip(auto, vendor, strict=True))


def test_auto_has_the_bits_of_the_backend_that_it_chose(passes, plans):
    operands = tensors("conv2d groups")
    for passed, name in ((True, "integer"), (False, "vendor"), (True, "integer")):
        passes(passed)
        auto, named = (step("conv2d groups", *operands, recipe=NO_SR, backend=b) for b in ("auto", name))
        assert [made.backend for made in plans[-2:]] == [name, name]
        assert all(same_bits(a, b) for a, b in zip(auto, named, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_backend_gets_the_plan_of_another(passes, plans, dtype):
    passes(True)
    names = ["reference", "integer", "vendor", "integer", "vendor", "reference"]
    for name in names:
        step("conv2d", *tensors("conv2d", dtype), recipe=NO_SR, backend=name)
    assert [made.backend for made in plans] == names
    # The operator of torch.compile keeps plans by the text of its spec.
    sizes = make_geometry(2, (16, 24), (5, 5), 3).to_ints()
    for name in (*names, BY_LAYER):
        spec = custom_op.LayerSpec(NO_SR.key, name, torch.float32, False)
        assert custom_op.plan_of(sizes, spec.to_text()).backend == name.removesuffix(" or vendor")


# ---- the check of first use -----------------------------------------------------------------------------------------


@pytest.fixture
def first_use(monkeypatch, tmp_path):
    """A function: the check's answer -> the list of its runs, in a new process with an empty cache folder."""
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(cache, "ready", lambda name: None)  # nor one that came with a folder that is only read
    runs: list[bool] = []

    def prepare(answer: bool) -> list[bool]:
        def asked() -> bool:
            runs.append(answer)
            return answer

        monkeypatch.setattr(dispatch, "_integer_passes", None)
        monkeypatch.setattr(dispatch, "integer_check", asked)
        return runs

    return prepare


@pytest.mark.parametrize("answer", [True, False])
def test_the_check_runs_once_a_machine_and_its_answer_is_kept(first_use, tmp_path, monkeypatch, answer):
    runs, chosen = first_use(answer), BY_LAYER if answer else "vendor"
    for _ in range(3):
        assert dispatch.resolve("auto", CPU, by_layer=True) == chosen
    assert runs == [answer]
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("integer_") and json.loads(path.read_text())["content"] == {"passed": answer}
    first_use(not answer)  # a new process reads the answer of the first
    assert dispatch.resolve("auto", CPU, by_layer=True) == chosen and len(runs) == 1
    monkeypatch.setattr(native, "name", lambda library: "another")
    first_use(not answer)  # the old answer says nothing of other kernels
    assert (dispatch.resolve("auto", CPU, by_layer=True) == BY_LAYER) is not answer and len(runs) == 2


def test_nothing_is_checked_for_other_backends_and_callers(first_use):
    runs = first_use(True)
    for name in ("vendor", "reference", "integer"):
        dispatch.resolve(name, CPU, by_layer=True)
    dispatch.resolve("auto", CPU)
    assert runs == []


@pytest.mark.parametrize("text", ["", "{", '{"passed": true}', '{"identity": {}, "content": {"passed": true}}'])
def test_a_damaged_answer_is_asked_again(first_use, tmp_path, text):
    runs = first_use(False)
    for _ in range(2):
        first_use(False)
        assert dispatch.resolve("auto", CPU, by_layer=True) == "vendor"
        (path,) = tmp_path.iterdir()
        path.write_text(text)
    assert runs == [False, False]


def test_layers_run_on_the_vendor_backend_where_the_check_fails(first_use, plans):
    first_use(False)
    step("conv2d", *tensors("conv2d"))
    assert [made.backend for made in plans] == ["vendor"]


def test_the_check_compares_products_of_the_kernels(first_use, monkeypatch):
    first_use(True)
    monkeypatch.setattr(dispatch, "integer_check", integer.matches_reference)
    assert dispatch.integer_passes()


# ---- where it cannot run --------------------------------------------------------------------------------------------


def test_without_compiled_kernels_the_name_is_an_error_and_auto_is_vendor(monkeypatch, passes):
    monkeypatch.setattr(native, "load", lambda: None)
    passes(None)
    with pytest.raises(RuntimeError, match="C\\+\\+ compiler") as error:
        dispatch.resolve("integer", CPU)
    assert "backend='vendor'" in str(error.value)
    assert dispatch.resolve("auto", CPU, by_layer=True) == "vendor"
    with pytest.raises(RuntimeError, match="integer"):
        step("conv2d", *tensors("conv2d"), backend="integer")


def test_other_devices_refuse_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    with pytest.raises(RuntimeError, match="needs: cpu") as error:
        dispatch.resolve("integer", CUDA)
    assert "backend='auto'" in str(error.value)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        dispatch.resolve("integer", torch.device("xpu"))


def test_the_kernels_of_a_gpu_on_a_cpu_keep_their_way(monkeypatch, passes):
    passes(True)
    monkeypatch.setattr(dispatch, "KERNELS_ON_CPU", True)
    assert dispatch.resolve("auto", CPU, by_layer=True) == "vendor"


# ---- who else calls layers ------------------------------------------------------------------------------------------


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(24, 16, 2, 2), nn.Flatten(2), nn.Linear(64, 17)
    )


def trained(model: Any, backend: str, autocast: bool) -> list[torch.Tensor]:
    """Return y, dx and the weights' gradients of one step with stochastic rounding."""
    x = values((5, 16, 8, 8)).requires_grad_()
    outer = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    torch.manual_seed(3)
    with outer, nv.nvfp4_autocast(backend=backend):
        y = model(x)
    y.float().square().mean().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_model_gives_the_bits_of_eager_and_of_the_reference(autocast):
    torch._dynamo.reset()
    eager = trained(small(), "integer", autocast)
    compiled = trained(torch.compile(small(), backend="aot_eager", fullgraph=True), "integer", autocast)
    reference = trained(small(), "reference", autocast)
    torch._dynamo.reset()
    assert all(same_bits(a, b) for a, b in zip(compiled, eager, strict=True))
    assert all(same_bits(a, b) for a, b in zip(reference, eager, strict=True))


@pytest.mark.slow
def test_a_compiled_model_may_be_the_first_to_ask():
    code = (
        "import torch, te_nvfp4_cv as nv\n"
        "from te_nvfp4_cv.backend import dispatch\n"
        "for backend in ('integer', 'auto'):\n"
        "    torch._dynamo.reset()\n"
        "    model = torch.compile(torch.nn.Conv2d(16, 16, 3), backend='aot_eager', fullgraph=True)\n"
        "    with nv.nvfp4_autocast(backend=backend):\n"
        "        model(torch.randn(16, 16, 5, 5)).sum().backward()\n"
        "    print(dispatch._integer_passes)\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "None\nTrue\n", done.stderr[-3000:]


@pytest.mark.parametrize("two_d", [True, False])
@pytest.mark.parametrize("kind", ["conv2d", "groups", "transposed", "linear"])
def test_stored_weights_give_the_bits_of_training(kind, two_d, plans):
    recipe = replace(nv.NVFP4BlockScaling(), disable_2d_quantization=not two_d)
    torch.manual_seed(0)
    layer = {
        "conv2d": lambda: nn.Conv2d(20, 37, 3, padding=1),
        "groups": lambda: nn.Conv2d(32, 64, 3, 2, groups=2),
        "transposed": lambda: nn.ConvTranspose2d(20, 18, 3, 2),
        "linear": lambda: nn.Linear(20, 37),
    }[kind]()
    x = values((3, 20) if kind == "linear" else (3, 32 if kind == "groups" else 20, 7, 5))
    with nv.nvfp4_autocast(recipe, backend="integer"):
        expected = layer(x).detach()
    assert plans[0].backend == "integer"
    stored = become(layer, quantize_layer(layer, recipe), recipe, "integer")
    with torch.no_grad():
        for weights in ("packed", "cached"):
            stored.set_mode(weights=weights)
            assert same_bits(stored(x), expected), weights
        # The kernels' own layout of the weight, made once.
        g = make_geometry(1, (20, 37), (1, 1), 1) if kind == "linear" else plans[0].geometry
        face = Face(stored.weight_data, stored.weight_scale)
        panels = integer.panels(face, g, not g.transposed)
        weight = inference.StoredWeight(face, stored.weight_amax, panels, stored.weight_shape, False, None)
        args = plans[0].geometry, getattr(stored, "stride", 1), getattr(stored, "padding", 0)
        conv_args = inference.ConvArgs(args[1], args[2], 1, getattr(stored, "groups", 1), 0)
        for backend in ("integer", "vendor"):  # a form that the backend does not multiply is left alone
            y = inference.run(stored.op, x, weight, stored.bias, conv_args, stored.recipe, backend)
            assert (y - expected).norm() <= 1e-5 * expected.norm()
            assert same_bits(y, expected) or backend == "vendor"
