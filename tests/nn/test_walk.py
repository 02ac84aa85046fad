"""How the layers of a model are found: their names, operators, padding, and the recipe that rules each."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.nn import walk
from te_nvfp4_cv.nn.base import OPS, is_plain_layer
from te_nvfp4_cv.nn.modules import NVFP4_CLASSES
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

DEFAULT, NO_RHT = NVFP4BlockScaling(), NVFP4BlockScaling(disable_rht=True)


def test_each_layer_has_a_class_of_its_own():
    assert {plain: ours.op for plain, ours in NVFP4_CLASSES.items()} == OPS
    assert all(issubclass(ours, plain) and getattr(nv, ours.__name__) is ours for plain, ours in NVFP4_CLASSES.items())


def test_layers_have_plain_names_and_shared_ones_come_once():
    shared = nn.Conv2d(16, 16, 3)
    block = nn.Sequential(shared, nn.ReLU(), nn.Linear(4, 4))
    model = nn.ModuleDict({"module": block, "b": nn.Sequential(shared, nv.NVFP4Linear(16, 16))})
    assert [name for name, _ in walk.named_layers(model)] == ["0", "2", "b.1"]
    assert [name for name, _ in walk.named_modules(model)] == ["", "", "0", "1", "2", "b", "b.1"]


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_nothing_inside_of_a_script_module_is_found():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.ReLU(), nn.Conv2d(16, 16, 3))), nn.ReLU())
    assert [name for name, _ in walk.named_modules(model)] == ["", "0", "1"]


def test_entries_rule_over_a_modules_recipe_only_as_high_precision_or_where_it_has_none():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nv.NVFP4Conv2d(16, 16, 3, recipe=NO_RHT))
    nv.set_precision(model, {"0": None, "1": NO_RHT})
    found = {name: recipe for name, _, recipe in walk.with_recipes(model, DEFAULT)}
    assert found == {"": DEFAULT, "0": None, "1": NO_RHT, "2": NO_RHT}
    asked = {model: None}
    found = {name: recipe for name, _, recipe in walk.with_recipes(model, DEFAULT, asked)}
    assert found == {"": None, "0": None, "1": NO_RHT, "2": None}
    entries = {name: entry for name, _, entry in walk.with_entries(model, "outside", {model[1]: None})}
    assert entries == {"": "outside", "0": "outside", "1": None, "2": "outside"}, "made entries do not count"


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes_are_those_of_torch(mode):
    layer, x = nn.Conv2d(4, 4, 3, padding=(1, 2), padding_mode=mode), torch.randn(2, 4, 6, 7)
    padded, args = walk.padded(layer, x)
    assert args.padding == ((1, 2) if mode == "zeros" else 0)
    assert torch.equal(F.conv2d(padded, layer.weight, layer.bias, padding=args.padding), layer(x))
    assert walk.padded(nn.Linear(4, 4), x)[0] is x


def test_output_padding_is_that_of_torch():
    layer, x = nn.ConvTranspose2d(4, 4, 3, stride=2), torch.randn(2, 4, 6, 7)
    more = walk.for_output_size(layer, x, [14, 15]).output_padding
    y = F.conv_transpose2d(x, layer.weight, layer.bias, stride=2, output_padding=more)
    assert list(more) == [1, 0] and torch.equal(y, layer(x, [14, 15]))


def test_a_subclass_is_no_plain_layer():
    class Mine(nn.Conv2d):
        pass

    class Ours(nv.NVFP4Conv2d):
        pass

    assert is_plain_layer(nn.Conv2d(1, 1, 1)) and is_plain_layer(nv.NVFP4Conv2d(16, 16, 1))
    assert not is_plain_layer(Mine(1, 1, 1)) and not is_plain_layer(Ours(16, 16, 1))


@pytest.mark.parametrize("ask", [lambda m: nv.set_precision(m, {"0": None}), nv.learn_scales], ids=["entry", "learned"])
def test_new_hooks_do_not_replace_unpickled_ones(ask, monkeypatch):
    model = nn.Sequential(nn.Conv2d(16, 16, 3))
    ask(model)
    file = io.BytesIO()
    torch.save(model, file)
    # A new process counts from 0 and comes to the same numbers; here the next hook would get one of them at once.
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", min(model[0]._forward_pre_hooks))
    again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for one in (again, copy.deepcopy(again)):
        count = len(one[0]._forward_pre_hooks), len(one[0]._forward_hooks)
        for _ in range(3):
            one[0].register_forward_pre_hook(lambda module, args: None)
            one[0].register_forward_hook(lambda module, args, output: None)
        assert (len(one[0]._forward_pre_hooks), len(one[0]._forward_hooks)) == (count[0] + 3, count[1] + 3)
