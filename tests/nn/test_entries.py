"""Entries of set_precision act on the layers below a module by whatever path these are called.

What a layer runs in is what an observer is told: "high", or the recipe's name.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.context import entries
from tests.networks import Linears, ran

A, B = nv.NVFP4BlockScaling(name="a", disable_rht=True), nv.NVFP4BlockScaling(name="b", disable_2d_quantization=True)


@pytest.fixture
def x():
    return torch.randn(16, 16)


@pytest.fixture
def h():
    return torch.randn(16, 32)


# ---- paths ----


def test_layers_below_follow_when_the_container_is_never_called(x):
    model = Linears()
    nv.set_precision(model, {"body": None, "body.2": A})
    assert ran(model, lambda: model(x)) == {"stem": "nvfp4", "body.0": "high", "body.2": "a", "head": "nvfp4"}
    traced = torch.fx.symbolic_trace(model)
    assert ran(model, lambda: traced(x)) == ran(model, lambda: model(x))

    def by_hand():
        for layer in model.body:
            nonlocal y
            y = layer(y)

    y = model.stem(x)
    assert ran(model, by_hand) == {"body.0": "high", "body.2": "a"}


def test_another_method_than_forward_is_called(h):
    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Linear(32, 32)

        def encode(self, x):
            return self.conv(x)

    model = nn.ModuleDict({"coder": Coder()})
    nv.set_precision(model, {"coder": None})
    assert ran(model, lambda: model["coder"].encode(h)) == {"coder.conv": "high"}


@pytest.mark.parametrize("name", ["body.0", "body", "*"])
def test_calls_that_no_hook_sees_go_by_the_weight(h, name):
    model = Linears()
    nv.set_precision(model, {name: None})
    first = model.body[0]
    assert ran(model, lambda: first.forward(h)) == {"body.0": "high"}
    assert ran(model, lambda: F.linear(h, first.weight)) == {"body.0": "high"}
    assert ran(model, lambda: F.linear(h, first.weight[16:])) == {"body.0": "high"}  # a view
    assert ran(model, lambda: F.linear(h, model.body[2].weight)) == {"body.2": "nvfp4" if name == "body.0" else "high"}


def test_a_weight_that_another_module_reads_keeps_its_own_entry(h):
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.other = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return F.linear(x, self.inner.weight) + F.linear(x, self.other.weight)

    model = nn.ModuleDict({"m": Reads()})
    nv.set_precision(model, {"m": A, "m.inner": None})
    assert ran(model, lambda: model["m"](h)) == {"m.inner": "high", "m.other": "a"}


@pytest.mark.parametrize("table", [{"mha": None}, {"mha.out_proj": None}, {"mha": A, "mha.out_proj": None}])
def test_the_projection_of_attention_has_a_name(table, h):
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(32, 4)})
    nv.set_precision(model, table)
    inside = "high" if table.get("mha", B) is None else "a" if "mha" in table else "nvfp4"
    tokens = h.view(4, 4, 32).requires_grad_()
    for call in (model["mha"], model["mha"].forward):
        found = ran(model, lambda call=call: call(tokens, tokens, tokens))
        assert found == {"mha.in_proj_weight": inside, "mha.out_proj": "high"}


def test_computed_kernels_follow_the_entry_above_them():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias)

    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3))
    model = nn.ModuleDict({"m": nn.Sequential(Standardized(16, 16, 3), normed)})
    x = torch.randn(2, 16, 8, 8)
    assert ran(model, lambda: model["m"](x)) == {"computed": "nvfp4"}
    nv.set_precision(model, {"m": None})
    for layer in model["m"]:
        assert ran(model, lambda layer=layer: layer(x)) == {"computed": "high"}


def test_nvfp4_modules_follow_by_any_path(h):
    model = nv.convert_model(Linears(), B)
    nv.set_precision(model, {"body": None, "head": A})
    assert ran(model, lambda: model.body[0].forward(h)) == {"body.0": "high"}
    assert ran(model, lambda: model.head.forward(h)) == {"head": "a"}
    assert ran(model, lambda: model.stem.forward(torch.randn(16, 16))) == {"stem": "b"}


def test_a_high_precision_layer_called_directly_is_torch_bit_for_bit(h):
    model = Linears()
    nv.set_precision(model, {"body": None})
    plain = model.body[0].forward(h)
    with nv.nvfp4_autocast():
        assert torch.equal(model.body[0].forward(h), plain)
    assert torch.equal(model.body[0].forward(h), plain)


# ---- tied weights, shared modules ----


def test_a_shared_module_follows_the_way_of_the_call(h):
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared), "c": nn.Sequential(shared)})
    nv.set_precision(model, {"a": None, "b": A})
    assert ran(model, lambda: model["a"](h)) == {"a.0": "high"}
    assert ran(model, lambda: model["b"](h)) == {"a.0": "a"}
    assert ran(model, lambda: model["c"](h)) == {"a.0": "nvfp4"}
    nv.set_precision(model, {"b": None, "c": None})  # the ways agree now
    assert ran(model, lambda: shared.forward(h)) == {"a.0": "high"}


@pytest.mark.parametrize("other", ["none", "recipe", "same"])
def test_tied_weights_follow_the_module_that_is_called(h, other):
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32), "c": nn.Linear(32, 32)})
    model["b"].weight = model["a"].weight
    nv.set_precision(model, {"a": None} | ({} if other == "none" else {"b": A if other == "recipe" else None}))
    expected = {"none": "nvfp4", "recipe": "a", "same": "high"}[other]
    assert ran(model, lambda: model["a"](h)) == {"a": "high"}
    assert ran(model, lambda: model["b"](h)) == {"a": expected}
    alone = "high" if other == "same" else "nvfp4"  # the modules disagree: the context rules
    assert ran(model, lambda: F.linear(h, model["a"].weight)) == {"a": alone}
    copied = copy.deepcopy(model)
    assert ran(copied, lambda: F.linear(h, copied["b"].weight)) == {"a": alone}


# ---- entries come and go ----


def test_clear_precision_removes_everything(x, h):
    model = Linears()
    keys = list(model.state_dict())
    nv.set_precision(model, {"body": None, "head": A, "body.2": B})
    nv.clear_precision(model)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    assert all(not m._forward_hooks_always_called for m in model.modules())
    assert set(ran(model, lambda: model(x)).values()) == {"nvfp4"}
    assert ran(model, lambda: F.linear(h, model.body[0].weight)) == {"body.0": "nvfp4"}
    assert list(model.state_dict()) == keys
    user = model.body.register_forward_pre_hook(lambda module, args: None)
    nv.set_precision(model, {"": None})
    nv.clear_precision(model)
    assert list(model.body._forward_pre_hooks) == [user.id]
    with pytest.raises(TypeError, match="clear_precision"):
        nv.clear_precision({})  # type: ignore[arg-type]


def test_a_later_call_replaces_what_layers_inherit(x):
    model = Linears()
    for _ in range(2):
        nv.set_precision(model, {"": A})
        nv.set_precision(model, {"body": None})
    assert ran(model, lambda: model(x)) == {"stem": "a", "body.0": "high", "body.2": "high", "head": "a"}
    nv.set_precision(model.body, {"2": B})  # a part of the model: the rest keeps what it inherits from above
    assert ran(model, lambda: [model.body[0](x @ model.stem.weight.T), model.body[2](model.stem(x))]) == {
        "stem": "a",
        "body.0": "high",
        "body.2": "b",
    }
    nv.set_precision(model, {"body": A})
    assert ran(model, lambda: model(x)) == {"stem": "a", "body.0": "a", "body.2": "b", "head": "a"}
    assert all(len(m._forward_pre_hooks) == len(m._forward_hooks) <= 1 for m in model.modules())


def test_copies_and_pickles_have_entries_of_their_own(x, h):
    model = Linears()
    nv.set_precision(model, {"body": None, "head": A})
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        torch.optim.swa_utils.AveragedModel(model).module,
        copy.deepcopy(copy.deepcopy(model)),
    ]
    for other in copies:
        for net in (model, other):
            assert ran(net, lambda net=net: net.body[0].forward(h)) == {"body.0": "high"}
            assert ran(net, lambda net=net: F.linear(h, net.head.weight)) == {"head": "a"}
        nv.clear_precision(other)
        assert ran(other, lambda other=other: other.body[0].forward(h)) == {"body.0": "nvfp4"}
        assert ran(model, lambda: model.body[0].forward(h)) == {"body.0": "high"}
    part = copy.deepcopy(model.body[0])  # without the container
    assert ran(part, lambda: part.forward(h)) == {"weight": "high"}


def test_new_parameters_are_found(h):
    model = Linears()
    nv.set_precision(model, {"body": None})
    call = lambda: model.body[0].forward(h)  # noqa: E731
    assert ran(model, call) == {"body.0": "high"}
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assert ran(model, call) == {"body.0": "high"}
    model.body[0].weight = nn.Parameter(torch.randn(32, 32))
    assert ran(model, call) == {"body.0": "high"}


@pytest.mark.parametrize("name", ["body", "body.0"])  # the second one's only entry rules the weight that is asked for
def test_entries_hold_no_model(h, name):
    before = len(entries._entries), len(entries._found)
    model = Linears()
    nv.set_precision(model, {name: None})
    ran(model, functools.partial(model.body[0].forward, h))
    ran(model, functools.partial(model.head.forward, h))
    died = weakref.ref(model.body[0].weight)
    del model
    gc.collect()
    assert died() is None and len(entries._entries) <= before[0] and len(entries._found) <= before[1]


# ---- what cannot act ----


def test_a_recipe_that_could_never_act_is_refused():
    quiet = nn.Sequential(nn.ReLU(), nn.Dropout())
    model = nn.ModuleDict({"norm": nn.BatchNorm2d(16), "act": quiet, "conv": nn.Conv2d(16, 16, 3)})
    for pattern in ("norm", "act", "[an]*"):
        with pytest.raises(ValueError, match=r"no layer runs in NVFP4 inside of[\s\S]*needs:[\s\S]*fix:"):
            nv.set_precision(model, {"conv": None, pattern: A})
    assert all(not m._forward_pre_hooks for m in model.modules())
    nv.set_precision(model, {"norm": None, "*": A, "act": None})  # nothing is promised that does not happen


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_modules_of_torch_script(x):
    model = nn.ModuleDict({"script": torch.jit.script(nn.Linear(16, 16)), "plain": nn.Linear(16, 16)})
    with pytest.raises(ValueError, match="ScriptModule"):
        nv.set_precision(model, {"script": A})
    nv.set_precision(model, {"*": None})
    assert ran(model, lambda: model["script"](x)) == {}
    nv.clear_precision(model)


# ---- torch.compile ----


@pytest.mark.filterwarnings("ignore:Dynamo detected")
def test_compiled_calls_that_no_hook_sees(h):
    torch._dynamo.reset()
    model = Linears()
    nv.set_precision(model, {"body": None, "head": A})

    def call(z):
        unruled = F.linear(z, model.stem.weight.T)
        return model.body[0].forward(z), F.linear(z, model.head.weight), model.body[2](z), unruled

    with nv.nvfp4_autocast():
        expected = call(h)
        assert torch.equal(expected[0], F.linear(h, model.body[0].weight, model.body[0].bias))
        compiled = torch.compile(call, backend="eager", fullgraph=True)(h)
    assert all(map(torch.equal, compiled, expected))
    torch._dynamo.reset()


# ---- neighbours ----


def test_a_norm_below_a_module_with_an_entry_is_folded_still():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)), nn.Conv2d(16, 16, 3)).eval()
    nv.set_precision(model, {"0": A})
    images = torch.randn(4, 16, 8, 8)
    quantized = nv.export.quantize(model, [images], nv.NVFP4BlockScaling())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in quantized.modules())


def test_a_constant_of_a_module_with_an_entry_stays_a_constant():
    class Filters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bank = torch.randn(16, 16, 3, 3)  # no buffer: an attribute
            self.weight = nn.Parameter(torch.randn(16, 16))

        def forward(self, x):
            return F.conv2d(x, self.bank)

    model = nn.ModuleDict({"m": Filters()})
    x = torch.randn(2, 16, 8, 8)
    assert ran(model, lambda: model["m"](x)) == {"computed": "high"}
    nv.set_precision(model, {"*": A})
    assert ran(model, lambda: model["m"](x)) == {"computed": "high"}
