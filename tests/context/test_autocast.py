"""nvfp4_autocast on unmodified modules: what it acts on, how contexts combine, and its arguments."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv import errors
from te_nvfp4_cv import functional as NF
from te_nvfp4_cv.context import function_mode
from te_nvfp4_cv.context import state as nv_context
from te_nvfp4_cv.context.context_manager import active_recipe, nvfp4_autocast
from te_nvfp4_cv.layer import observe
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.recipe.files import load_recipe
from tests.helpers import relative_error, same_bits, values
from tests.layers import BACKENDS
from tests.networks import NO_2D, NO_RHT, NO_SR, net_and_input, seen

pytestmark = pytest.mark.usefixtures("one_thread")

MODULES = {
    "conv1d": (nn.Conv1d(16, 16, 3, padding=1), (2, 16, 7)),
    "conv2d": (nn.Conv2d(16, 24, 3, stride=2), (2, 16, 7, 6)),
    "conv3d": (nn.Conv3d(16, 16, (1, 3, 2), bias=False), (2, 16, 3, 4, 3)),
    "conv_transpose1d": (nn.ConvTranspose1d(16, 16, 3, stride=2, output_padding=1), (2, 16, 5)),
    "conv_transpose2d": (nn.ConvTranspose2d(32, 32, 3, stride=2, groups=2, output_padding=1), (2, 32, 3, 4)),
    "conv_transpose3d": (nn.ConvTranspose3d(16, 16, 2, stride=(2, 1, 2)), (2, 16, 2, 3, 2)),
    "linear": (nn.Linear(32, 16), (3, 5, 32)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", MODULES)
def test_plain_modules_and_functionals_run_as_nv_functional(op, backend):
    module, shape = MODULES[op]
    x = values(shape)
    arguments = {}
    if op != "linear":
        names = ["stride", "padding", "dilation", "groups"] + (["output_padding"] if "transpose" in op else [])
        arguments = {name: getattr(module, name) for name in names}
    expected = getattr(NF, op)(x, module.weight, module.bias, **arguments, recipe=NO_RHT, backend=backend)
    with nvfp4_autocast(NO_RHT, backend=backend):
        of_module, of_functional = module(x), getattr(F, op)(x, module.weight, module.bias, **arguments)
        by_name = getattr(F, op)(input=x, weight=module.weight, bias=module.bias, **arguments)
    assert all(same_bits(y.detach(), expected.detach()) for y in (of_module, of_functional, by_name))
    assert "QuantizedConv" in type(of_module.grad_fn).__name__
    outside = module(x)
    assert not torch.equal(outside, expected) and "QuantizedConv" not in type(outside.grad_fn).__name__


class Bank(nn.Module):
    """A fixed filter bank."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", values((16, 16, 3, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel)


def test_layers_that_cannot_run_in_nvfp4_run_as_torch_would():
    x = values((2, 16, 6, 6))
    cases: dict[str, Callable[[], Tensor]] = {}
    thin, depthwise = nn.Conv2d(16, 4, 3), nn.Conv2d(16, 16, 3, groups=16)
    grouped, double = nn.Conv2d(16, 32, 3, groups=2), nn.Conv2d(16, 16, 3).double()
    cases["thin layer: 4 out-channels"] = lambda: thin(x)
    cases["depthwise"] = lambda: depthwise(x)
    cases["thin groups: 8 in-channels per group"] = lambda: grouped(x)
    cases["float64"] = lambda: double(x.double())
    cases["the kernel is a constant"] = lambda: Bank()(x)
    for words, run in cases.items():
        results: list[Tensor] = []
        with nvfp4_autocast():
            told = seen(lambda run=run, results=results: results.append(run()))  # type: ignore[misc]
        assert same_bits(results[0].detach(), run().detach())
        assert len(told) == 1 and words in told[0].reason and told[0].recipe is None, told[0].reason


def test_torchs_own_errors_stay():
    module = nn.Conv2d(16, 16, 3)
    with nvfp4_autocast():
        for bad in (values((2, 16)), values((2, 16, 6, 6)).bfloat16(), values((2, 16, 6, 6)).long()):
            with pytest.raises(RuntimeError):
                module(bad)
        with pytest.raises(RuntimeError, match="to have 16 channels"):
            module(values((2, 15, 6, 6)))
        with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            module(values((2, 16, 2, 6)))
        with pytest.raises(RuntimeError, match="output padding must be smaller"):
            F.conv_transpose2d(values((2, 16, 6, 6)), module.weight, output_padding=1)
        with pytest.raises((RuntimeError, TypeError)):
            F.conv2d(values((2, 16, 6, 6)), None)  # type: ignore[arg-type]


def test_a_users_own_valueerror_does_not_run_the_layer_again():
    """Only what torch refuses, too, is run by torch once more, for its error."""
    calls: list[Any] = []

    def refuses(given: Any) -> Any:
        calls.append(given)
        raise ValueError("mine")

    module, x = nn.Conv2d(16, 16, 3), values((2, 16, 6, 6))
    for _ in range(2):  # looked at, and with a call that is known
        with nvfp4_autocast():
            with pytest.raises(ValueError, match="mine"), torch.autograd.graph.saved_tensors_hooks(refuses, refuses):
                module(x)
            module(x)
    with nvfp4_autocast(), observe.observe(refuses), pytest.raises(ValueError, match="mine"):
        module(x)
    assert len(calls) == 3


def test_projections_of_attention_run_in_nvfp4():
    x = values((2, 16, 32))
    for kwargs in ({}, {"kdim": 48, "vdim": 48}):
        mha = nn.MultiheadAttention(32, 4, batch_first=True, **kwargs)
        memory = values((2, 16, 48)) if kwargs else x
        with nvfp4_autocast(NO_SR):
            told = seen(lambda mha=mha, memory=memory: mha(x, memory, memory)[0].sum().backward())
        assert len(told) >= 2 and all(call.op == "linear" and not call.reason for call in told)
        assert all(parameter.grad is not None for parameter in mha.parameters())
    with nvfp4_autocast(NO_SR):
        y, attention = mha(x, memory, memory)
    y_plain, attention_plain = mha(x, memory, memory)
    assert 0 < relative_error(y, y_plain) < 0.5 and relative_error(attention, attention_plain) < 0.5
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    with nvfp4_autocast(NO_SR):
        assert len(seen(lambda: layer(x))) == 4


def test_views_of_parameters_count_as_parameters():
    weight = nn.Parameter(values((48, 32)))
    with nvfp4_autocast():
        told = seen(lambda: [F.linear(values((2, 32)), part) for part in weight.chunk(3)])
    assert [call.reason for call in told] == ["", "", ""]


def test_replicas_of_data_parallel_raise_and_name_ddp():
    model, x = nn.DataParallel(nn.Linear(16, 16)), values((2, 16))
    replicas = ([model.module] * 2, [(x,), (x,)], [{}, {}])
    with nvfp4_autocast():
        with pytest.raises(RuntimeError, match="DDP"):
            model.parallel_apply(*replicas)
        with pytest.raises(RuntimeError, match="DDP"):  # nn.parallel.data_parallel, a function, calls it by this name
            nn.parallel.data_parallel.__globals__["parallel_apply"](*replicas)


def test_data_parallel_without_a_second_device_runs_the_module():
    net, x = net_and_input()
    wrapped = nn.DataParallel(net, device_ids=[0] if torch.cuda.is_available() else None)
    with nvfp4_autocast():
        direct, told = (seen(lambda run=run: run(x)) for run in (net, wrapped))
    assert "" in [call.reason for call in direct]
    assert [call.reason for call in told] == [call.reason for call in direct]


def test_hooks_and_parametrizations_still_work():
    net, x = net_and_input()
    called: list[str] = []
    for name, module in net.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.append("pre " + name))
        module.register_forward_hook(lambda *_, name=name: called.append("post " + name))
        if name in ("stem", "up", "head"):  # what follows them does not work in place, which such hooks do not allow
            module.register_full_backward_hook(lambda *_, name=name: called.append("backward " + name))
    x.requires_grad_()
    with nvfp4_autocast():
        net(x).sum().backward()
    assert {"backward stem", "backward up", "backward head"} <= set(called)
    assert sum(c.startswith("pre") for c in called) == sum(c.startswith("post") for c in called)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    with nvfp4_autocast():
        told = seen(lambda: normed(values((2, 16))))
    assert [call.reason for call in told] == [""]


# ---- contexts -------------------------------------------------------------------------------------------------------


def test_innermost_context_wins_and_leaving_restores():
    assert active_recipe() is None
    with nvfp4_autocast(NO_SR):
        assert active_recipe() is NO_SR
        with nvfp4_autocast(NO_RHT):
            assert active_recipe() is NO_RHT
            with nvfp4_autocast(enabled=False):
                assert active_recipe() is None
                with nvfp4_autocast(NO_2D):
                    assert active_recipe() is NO_2D
            assert active_recipe() is NO_RHT
        assert active_recipe() is NO_SR
    assert active_recipe() is None and nv_context.state() is None


def test_disabled_inside_enabled_is_plain_torch():
    module, shape = MODULES["conv2d"]
    x = values(shape)
    with nvfp4_autocast():
        with nvfp4_autocast(enabled=False):
            plain = module(x)
        quantized = module(x)
    assert same_bits(plain.detach(), module(x).detach()) and not torch.equal(plain, quantized)


def test_one_context_object_is_reusable_reentrant_and_survives_exceptions():
    module, shape = MODULES["conv2d"]
    x, context = values(shape), nvfp4_autocast(NO_SR)
    with context:
        first = module(x)
        with context:
            second = module(x)
        third = module(x)
    with pytest.raises(KeyError), context:
        with context:
            raise KeyError
    assert nv_context.state() is None and not function_mode.mode_is_on()
    with context:
        fourth = module(x)
    assert all(same_bits(first.detach(), y.detach()) for y in (second, third, fourth))
    assert "QuantizedConv" not in type(module(x).grad_fn).__name__


def test_decorator():
    module, shape = MODULES["conv2d"]

    @nvfp4_autocast(NO_SR)
    def forward(x: Tensor, depth: int = 0) -> Tensor:
        """Its docstring."""
        return forward(x, depth - 1) if depth else module(x)

    x = values(shape)
    with nvfp4_autocast(NO_SR):
        expected = module(x)
    assert same_bits(forward(x).detach(), expected.detach()) and same_bits(forward(x, 3).detach(), expected.detach())
    assert forward.__name__ == "forward" and forward.__doc__ == "Its docstring." and nv_context.state() is None
    with pytest.raises(TypeError, match=r"this is a class[\s\S]*fix:"):
        nvfp4_autocast(NO_SR)(nn.Linear)
    # A function around a module would keep its `training` of today as an attribute.
    for wrong, name in ((nn.Linear(16, 16), "Linear"), (values((1,)), "Tensor"), (None, "NoneType")):
        with pytest.raises(TypeError, match=rf"this is none[\s\S]*an object of {name}\n[\s\S]*fix:   call the model"):
            nvfp4_autocast(NO_SR)(wrong)


def test_threads_have_contexts_of_their_own():
    module, shape = MODULES["conv2d"]
    x, results = values(shape), {}
    barrier = threading.Barrier(2)

    def alone() -> None:
        results["alone"] = (active_recipe(), module(x).detach())

    def work(name: str, recipe: NVFP4BlockScaling) -> None:
        with nvfp4_autocast(recipe):
            barrier.wait(20)
            outputs = [module(x).detach() for _ in range(3)]
            results[name] = (active_recipe(), outputs)
            barrier.wait(20)

    with nvfp4_autocast(NO_SR):
        threads = [threading.Thread(target=alone)]
        threads += [threading.Thread(target=work, args=pair) for pair in (("2d", NO_SR), ("1d", NO_2D))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert results["alone"][0] is None and same_bits(results["alone"][1], module(x).detach())
    for name, recipe in (("2d", NO_SR), ("1d", NO_2D)):
        with nvfp4_autocast(recipe):
            expected = module(x).detach()
        assert results[name][0] is recipe and all(same_bits(y, expected) for y in results[name][1])
    assert not torch.equal(results["2d"][1][0], results["1d"][1][0])


def test_a_context_entered_in_a_backward_hook_acts():
    module, shape = MODULES["conv2d"]
    x, told = values(shape).requires_grad_(), []
    with nvfp4_autocast(NO_SR):
        y = module(x * 1)

        def hook(_: Tensor) -> None:
            with nvfp4_autocast(NO_RHT):
                told.extend(seen(lambda: module(values(shape))))

        y.register_hook(hook)
        y.sum().backward()
        assert active_recipe() is NO_SR and function_mode.mode_is_on()
    assert [call.recipe for call in told] == [NO_RHT]


# ---- arguments ------------------------------------------------------------------------------------------------------


def test_a_first_argument_that_is_no_recipe_is_explained():
    for wrong in (True, False):
        with pytest.raises(TypeError, match=f"enabled={wrong}"):
            nvfp4_autocast(wrong)
    for wrong in (3, {"disable_rht": True}, NVFP4BlockScaling):
        with pytest.raises(TypeError, match="fix:"):
            nvfp4_autocast(wrong)
    for options in (dict(enabled=1), dict(relu_mask="yes")):
        with pytest.raises(TypeError, match="True or False"):
            nvfp4_autocast(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nonsense"):
        nvfp4_autocast(backend="nonsense")
    with pytest.raises(ValueError, match="4over6"):
        nvfp4_autocast(NVFP4BlockScaling(nvfp4_4over6="all"))
    with pytest.raises(TypeError):
        nvfp4_autocast(None, True)  # type: ignore[misc]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_an_unavailable_backend_raises_at_once(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="CUDA GPU"):
        nvfp4_autocast(backend="triton")


def test_te_recipe_objects_are_accepted():
    te = pytest.importorskip("transformer_engine.common.recipe")
    module, shape = MODULES["conv2d"]
    with nvfp4_autocast(te.NVFP4BlockScaling(disable_2d_quantization=True)):
        assert active_recipe() == NO_2D
        y = module(values(shape))
    with nvfp4_autocast(NO_2D):
        assert same_bits(y.detach(), module(values(shape)).detach())
    with pytest.raises(TypeError, match="MXFP8"):
        nvfp4_autocast(te.MXFP8BlockScaling())


def test_a_precision_table_that_was_not_applied_warns_once(monkeypatch):
    monkeypatch.setattr(errors, "_warned", set())
    monkeypatch.setattr(nv_context, "_applied_tables", set())
    recipe = load_recipe("unet")
    assert recipe.precision
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            with nvfp4_autocast(recipe):
                pass
        with nvfp4_autocast(NO_SR), nvfp4_autocast(recipe, enabled=False):
            pass
    assert len(caught) == 1 and "nv.set_precision(model, recipe)" in str(caught[0].message)
    monkeypatch.setattr(errors, "_warned", set())
    nv_context.mark_applied(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with nvfp4_autocast(recipe):
            pass


def test_repr_names_the_recipe_and_the_switches():
    text = repr(nvfp4_autocast(NO_RHT, enabled=False, backend="vendor"))
    assert "disable_rht=True" in text and "enabled=False" in text and "'vendor'" in text
