"""Programs that were made from a model (TorchScript, torch.export, torch.fx, torch.ao): in NVFP4, or they say so."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.package import PackageExporter, PackageImporter

import te_nvfp4_cv as nv
from tests.helpers import same_bits, values
from tests.networks import NO_SR

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(16, 32, 3, padding=1), nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.conv(x).relu()).mean((2, 3)))


def told(function: Callable[..., Tensor], *args: Any, times: int = 2) -> tuple[Tensor, list[str]]:
    """Call it under the context; return its result, and our warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            with nv.nvfp4_autocast():
                y = function(*args)
    return y, [str(w.message) for w in caught if str(w.message).startswith("nvfp4")]


def image() -> Tensor:
    return values((2, 16, 6, 6))


def loaded(script: Any) -> Any:
    file = io.BytesIO()
    torch.jit.save(script, file)
    file.seek(0)
    return torch.jit.load(file)


# ---- TorchScript ----


@pytest.mark.parametrize(
    "make",
    [
        torch.jit.script,
        lambda net: torch.jit.trace(net, image()),
        lambda net: loaded(torch.jit.script(net)),
        lambda net: torch.jit.freeze(torch.jit.script(net.eval())),
    ],
    ids=["script", "trace", "load", "freeze"],
)
def test_a_script_module_says_once_that_it_runs_in_high_precision(make):
    script, x = make(Net()), image()
    plain = script(x)  # no word outside of the context
    y, (text,) = told(script, x)
    assert same_bits(y, plain)
    assert "the model, Net, is a ScriptModule" in text and "high precision" in text
    assert not told(script, x)[1]
    assert "ScriptModule" in nv.coverage(script, x).rows[0].reason


def test_a_script_module_at_the_place_of_another_in_memory_says_so_too(monkeypatch):
    from te_nvfp4_cv.context import torchscript

    monkeypatch.setattr(torchscript, "id", lambda _: 0, raising=False)  # as if each took the place of the one before
    for _ in range(2):
        assert len(told(torch.jit.script(Net()), image())[1]) == 1


def test_a_script_module_inside_of_a_model():
    model = nn.Sequential(nn.Conv2d(16, 16, 1), torch.jit.script(Net()), torch.jit.script(nn.Linear(16, 16)))
    _, (text,) = told(model, image())
    assert "'1' of Sequential is a ScriptModule" in text and 'set_precision(model, {"1": None})' in text


@pytest.mark.filterwarnings("error:nvfp4")
def test_no_word_of_script_modules_where_there_is_nothing_to_say():
    x = image()
    nv.coverage(torch.jit.script(Net()), x)  # its report says so
    with nv.nvfp4_autocast(enabled=False):
        torch.jit.script(Net())(x)
    for inside in (nn.Sequential(nn.ReLU()), nn.Conv2d(16, 8, 1)):  # no layer, and one that is too thin
        assert not told(nn.Sequential(torch.jit.script(inside)), x)[1]
    for entry in ("0", "*"):  # it is meant
        model = nn.Sequential(torch.jit.script(Net()))
        nv.set_precision(model, {entry: None})
        assert not told(model, x)[1]


def test_a_script_function_says_so():
    def layer(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w)

    script, arguments = torch.jit.script(layer), (image(), nn.Parameter(values((16, 16, 1, 1))))
    y, (text,) = told(script, *arguments)
    assert same_bits(y, layer(*arguments)) and "layer run in high precision" in text
    other = torch.jit.script(without_layers)
    assert not told(other, image())[1]


def without_layers(x: Tensor) -> Tensor:
    return x * 2


# ---- torch.export, torch.fx, torch.package ----


def exported(net: nn.Module) -> Any:
    return torch.export.export(net, (image(),))


def package(net: nn.Module) -> Any:
    file = io.BytesIO()
    with PackageExporter(file) as exporter:
        exporter.extern("**")
        exporter.save_pickle("net", "net.pkl", net)
    file.seek(0)
    return PackageImporter(file).load_pickle("net", "net.pkl")


@pytest.mark.parametrize(
    "make",
    [
        lambda net: exported(net).module(),
        lambda net: torch.export.unflatten(exported(net)),
        lambda net: torch.compile(exported(net).module(), backend="aot_eager", fullgraph=True),
        torch.fx.symbolic_trace,
        package,
    ],
    ids=["export", "unflatten", "compiled export", "fx", "package"],
)
def test_the_layers_of_an_exported_program_run_in_nvfp4(make):
    net, x = Net(), image()
    y, said = told(net, x)
    assert not said
    program = make(net)
    found, said = told(program, x)
    assert same_bits(found, y) and not said
    if program is not net and not isinstance(program, torch._dynamo.eval_frame.OptimizedModule):
        assert [row.nvfp4 for row in nv.coverage(program, x).rows] == [True] * 3
        with nv.nvfp4_autocast(enabled=False):
            assert same_bits(program(x), net(x))


def test_entries_act_on_an_exported_program():
    program, x = exported(Net()).module(), image()
    nv.set_precision(program, {"conv": None})
    assert [row.nvfp4 for row in nv.coverage(program, x).rows] == [False, True, True]


@pytest.mark.parametrize("make", [lambda f: exported(f).run_decompositions().module(), lambda f: make_fx(f)(image())])
def test_programs_below_the_layers_say_so(make):
    program, x = make(Net()), image()
    text = told(program, x)[1][0]
    assert "only 0% of the work" in text and "torch.convolution called directly" in text
    called = {f"torch.{name} called directly" for name in ("convolution", "addmm")}
    assert {row.reason for row in nv.coverage(program, x).rows} == called


@pytest.mark.parametrize("known", [False, True], ids=["the first calls", "calls that ran before"])
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx_traces_a_training_step(mode, known):
    net, x = Net(), image()

    def step(x: Tensor) -> tuple[Tensor, ...]:
        loss = net(x).square().mean()
        return loss, *torch.autograd.grad(loss, list(net.parameters()))

    if known:
        told(net, x)
    with nv.nvfp4_autocast():
        graph = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    called = [str(node.target) for node in graph.graph.nodes]
    assert called.count("te_nvfp4_cv.layer.default") == called.count("te_nvfp4_cv.layer_backward.default") == 3
    torch.manual_seed(0)
    found = graph(x)
    torch.manual_seed(0)
    with nv.nvfp4_autocast():
        wanted = step(x)
    assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_takes_parameters_as_arguments(mode):
    net, x = Net(), image()
    parameters = dict(net.named_parameters())

    def step(parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
        with nv.nvfp4_autocast(NO_SR):
            loss = torch.func.functional_call(net, parameters, (x,)).square().mean()
        return torch.autograd.grad(loss, list(parameters.values()))

    found = make_fx(step, tracing_mode=mode)(parameters, x)(parameters, x)
    assert all(same_bits(a, b) for a, b in zip(found, step(parameters, x), strict=True))


def test_make_fx_refuses_what_lives_outside_of_a_graph():
    recipe = nv.NVFP4BlockScaling(tensor_scale="delayed")
    with pytest.raises(RuntimeError, match="make_fx traces"), nv.nvfp4_autocast(recipe):
        make_fx(Net())(image())


# ---- functorch, torch.ao ----


@pytest.mark.parametrize(
    "call",
    [
        lambda net, x: torch.func.vmap(lambda v: net(v[None])[0])(x),
        lambda net, x: torch.func.functionalize(net)(x),
        lambda net, x: torch.func.vjp(net, x)[0],
        lambda net, x: torch.func.jvp(net, (x,), (x,))[0],
        lambda net, x: torch.func.grad(lambda v: net(v).sum())(x),
    ],
    ids=["vmap", "functionalize", "vjp", "jvp", "grad"],
)
def test_transformed_functions_say_so(call):
    net = Net()
    _, (text,) = told(lambda x: call(net, x), image())
    assert "inside a torch.func transform" in text


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="no engine for 8-bit layers")
def test_layers_that_torch_ao_has_quantized_are_listed():
    import torch.ao.quantization as ao

    model = ao.quantize_dynamic(nn.Sequential(nn.Linear(16, 32), nn.Flatten()), {nn.Linear})
    (row,) = nv.coverage(model, values((2, 16))).rows
    assert (row.name, row.nvfp4) == ("0", False) and "torch.ao" in row.reason
