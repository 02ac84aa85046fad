"""Recipes: every shipped file loads and round-trips; ours and TransformerEngine's agree field by field.

TransformerEngine's own code is the oracle where its wheel is installed: the recipe class itself, and the text of its
make_quantizers, run with a recorder in place of the CUDA quantizer.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, QParams, as_recipe, from_te, recipe_of_key
from te_nvfp4_cv.recipe.fields import GEMMS, PLAIN, REMOVED
from te_nvfp4_cv.recipe.files import list_recipes, load_recipe, parse_recipe, recipe_folder, save_recipe
from tests.helpers import same_bits, values

ROOT = Path(__file__).resolve().parents[2]
SAVED = ROOT / "tests" / "saved_by_0_1"  # pickles of the last commit before fields were removed
PRESETS = ("default", "no_rht", "no_sr", "no_2d", "forward_only", "four_over_six", "unet", "resnet", "detection")
QPARAMS = ("fp4_quant_fwd_inp", "fp4_quant_fwd_weight", "fp4_quant_bwd_grad")
needs_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="transformer-engine is not installed: pip install --no-deps transformer-engine==2.20.2",
)
BAD_VALUES = [
    {"disable_rht": "maybe"},
    {"disable_rht": 2},
    {"disable_rht": None},
    {"disable_stochastic_rounding": "maybe"},
    {"disable_2d_quantization": 3.5},
    {"row_scaled_activation": "sometimes"},
    {"nvfp4_4over6": "weight"},
    {"nvfp4_4over6": 3},
    {"nvfp4_4over6": None},
    {"nvfp4_4over6_e4m3_use_256": "256"},
    {"nvfp4_4over6_err_mode": "mae"},
    {"nvfp4_4over6_err_mode": "RMSE"},
    {"fp4_format": "E3M0"},
    {"fp8_format": "E5M2"},
    {"fp8_dpa": "maybe"},
    {"backward_override": "none at all"},
    {"backward_override": False},
]


SWITCHES = list(itertools.product((False, True), repeat=4))


def _fields(rht: bool, sr: bool, two_d: bool, row: bool) -> dict[str, bool]:
    return {
        "disable_rht": rht,
        "disable_stochastic_rounding": sr,
        "disable_2d_quantization": two_d,
        "row_scaled_activation": row,
    }


@pytest.fixture
def te():
    """TransformerEngine's recipe module."""
    return pytest.importorskip("transformer_engine.common.recipe")


# --- files


def test_the_presets_are_there():
    assert set(PRESETS) <= set(list_recipes())
    assert all(list_recipes().values()), "every recipe says what it is for"


@pytest.mark.parametrize("name", sorted(path.stem for path in recipe_folder().glob("*.toml")))
def test_every_recipe_loads_and_round_trips(name, tmp_path):
    recipe = load_recipe(name)
    recipe.validate_for_use()
    save_recipe(recipe, tmp_path / "copy.toml")
    again = load_recipe(tmp_path / "copy.toml")
    assert again == recipe and hash(again) == hash(recipe) and again.name == name
    assert load_recipe(recipe_folder() / f"{name}.toml") == recipe
    assert load_recipe(str(recipe_folder() / f"{name}.toml")) == recipe


def test_what_the_presets_say():
    assert load_recipe("default") == NVFP4BlockScaling()
    assert load_recipe("no_rht") == NVFP4BlockScaling(disable_rht=True)
    assert load_recipe("no_sr") == NVFP4BlockScaling(disable_stochastic_rounding=True)
    assert load_recipe("no_2d") == NVFP4BlockScaling(disable_2d_quantization=True)
    assert load_recipe("forward_only").nvfp4_gemms == ("fprop",)
    assert load_recipe("four_over_six").settings("input").four_over_six == "MAE"
    assert load_recipe("unet").precision == (("head", None),)
    assert load_recipe("resnet").precision == (("fc", None),)
    assert len(load_recipe("detection").precision) == 2


def test_files_hold_deviations_only():
    import tomllib

    for path in recipe_folder().glob("*.toml"):
        for field, value in tomllib.loads(path.read_text()).get("recipe", {}).items():
            assert value != PLAIN[field], f"{path.name}: {field} repeats the default"


def test_a_rich_recipe_round_trips(tmp_path):
    recipe = NVFP4BlockScaling(
        name='odd "name" \\ ü\n\x01',
        disable_rht=True,
        nvfp4_4over6="weights",
        nvfp4_4over6_e4m3_use_256="none",
        nvfp4_4over6_err_mode="MSE",
        high_precision_gemms=("wgrad", "fprop"),
        thin_layers="pad",
        precision=(
            ("stem.*", None),
            ('a"b', NVFP4BlockScaling(backward_override="dequantized", name="inner")),
            ("layer[12].*", NVFP4BlockScaling()),
        ),
    )
    save_recipe(recipe, tmp_path / "rich.toml")
    again = load_recipe(tmp_path / "rich.toml")
    assert again == recipe and again.name == recipe.name and again.precision[1][1].name == "inner"
    assert again.high_precision_gemms == ("fprop", "wgrad")


def test_a_pattern_that_a_table_repeats_has_its_last_recipe():
    table = (("head", None), ("*", "no_rht"), ("head", "delayed"), ("*", None))
    recipe = NVFP4BlockScaling(precision=table)
    assert recipe.precision == (("head", load_recipe("delayed")), ("*", None))
    assert parse_recipe(recipe.to_toml()) == recipe


def test_a_file_may_begin_with_the_mark_that_windows_editors_write(tmp_path):
    (tmp_path / "mine.toml").write_text("[recipe]\ndisable_rht = true\n", encoding="utf-8-sig")
    assert load_recipe(tmp_path / "mine.toml") == NVFP4BlockScaling(disable_rht=True)


def test_precision_names_recipes_by_name_and_by_relative_path(tmp_path):
    (tmp_path / "mine.toml").write_text('[recipe]\nthin_layers = "pad"\n')
    table = '[precision]\n"a" = "no_rht"\n"b" = "./mine.toml"\n"c" = {disable_rht = true}\n'
    (tmp_path / "outer.toml").write_text(table)
    first, second, third = (recipe for _, recipe in load_recipe(tmp_path / "outer.toml").precision)
    assert (first, second) == (load_recipe("no_rht"), NVFP4BlockScaling(thin_layers="pad"))
    assert (first.name, second.name) == ("no_rht", "mine") and third == first


def test_a_file_of_an_earlier_version_has_nvfp4s_blocks_and_one_of_a_later_version_is_refused(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[recipe]\ndisable_rht = true\n")
    assert load_recipe(path) == NVFP4BlockScaling(disable_rht=True, block_format="nvfp4")
    lines = {'block_format = "nvfp5"': "block_format='nvfp5'", "block_size = 32": "block_size"}
    lines['block_format = "mxfp4"\nrht_size = 32'] = "rht_size"  # the transform is that of 16 images in every format
    for line, said in lines.items():
        path.write_text(f"[recipe]\n{line}\n")
        with pytest.raises(ValueError, match=said):
            load_recipe(path)


def test_load_recipe_without_an_install(tmp_path):
    """A checkout on sys.path is enough."""
    code = "from te_nvfp4_cv.recipe.files import load_recipe; print(load_recipe('unet'))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == repr(load_recipe("unet")), result.stderr


# --- the object


def test_frozen_hashable_copies_and_pickles():
    recipe = NVFP4BlockScaling(disable_rht=True, precision={"a": None, "b": NVFP4BlockScaling(thin_layers="pad")})
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.disable_rht = False
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.fp4_quant_fwd_inp = QParams()
    for copied in (copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe)), dataclasses.replace(recipe)):
        assert copied == recipe and hash(copied) == hash(recipe) and repr(copied) == repr(recipe)
    assert recipe != NVFP4BlockScaling() and len({recipe, NVFP4BlockScaling(), NVFP4BlockScaling()}) == 2
    assert NVFP4BlockScaling(name="a") == NVFP4BlockScaling(name="b"), "the name takes no part in comparisons"


def test_repr_shows_deviations_only_and_evaluates_back():
    assert repr(NVFP4BlockScaling(disable_rht=True)).endswith("disable_rht=True)")
    assert "thin_layers" not in repr(NVFP4BlockScaling())
    recipe = load_recipe("detection")
    assert eval(repr(recipe)) == recipe


def test_nvfp4_gemms():
    assert NVFP4BlockScaling().nvfp4_gemms == GEMMS
    assert NVFP4BlockScaling(high_precision_gemms=("wgrad",)).nvfp4_gemms == ("fprop", "dgrad")
    assert NVFP4BlockScaling(high_precision_gemms=["fprop"]).nvfp4_gemms == ("dgrad", "wgrad")
    assert NVFP4BlockScaling(backward_override="dequantized").nvfp4_gemms == ("fprop",)
    assert NVFP4BlockScaling(backward_override="high_precision", high_precision_gemms={"fprop"}).nvfp4_gemms == ()


def test_as_recipe():
    recipe = NVFP4BlockScaling(disable_rht=True)
    assert as_recipe(recipe) is recipe and as_recipe(None) == NVFP4BlockScaling()


def test_a_look_alike_is_recognised_by_name():
    class NVFP4BlockScaling:  # an older TransformerEngine: fewer fields, QParams without some attributes unused here
        disable_rht = True
        backward_override = None

    class Mine(NVFP4BlockScaling):
        pass

    assert from_te(Mine()).disable_rht and as_recipe(Mine()).nvfp4_4over6 == "none"


# --- fields that a version removed


GONE = [("wgrad_block", "batch", "pixel"), ("activation_rounding", "nearest", "stochastic")]


def test_removed_fields_are_gone_and_the_others_keep_their_order():
    names = [field.name for field in dataclasses.fields(NVFP4BlockScaling)]
    first = ["tensor_scale", "thin_layers", "kernels", "high_precision_gemms", "precision", "name"]
    assert names[12:] == [*first, "activation_shift", "block_format", "grouped_scale"]
    assert names == list(inspect.signature(NVFP4BlockScaling).parameters)
    assert set(REMOVED) == {field for field, _, _ in GONE} and not set(REMOVED) & set(PLAIN)
    assert not any(hasattr(NVFP4BlockScaling(), field) for field in REMOVED)
    assert "pixel_wgrad" not in list_recipes()


@pytest.mark.parametrize("field, default, other", GONE)
def test_files_may_name_a_removed_field_with_its_old_default_only(field, default, other, tmp_path):
    path = tmp_path / "old.toml"
    path.write_text(f'[recipe]\ndisable_rht = true\n{field} = "{default}"\n')
    assert load_recipe(path) == NVFP4BlockScaling(disable_rht=True)
    path.write_text(f'[recipe]\n{field} = "{other}"\n')
    (tmp_path / "braces.toml").write_text(f'[precision]\n"a" = {{{field} = "{other}"}}\n')
    (tmp_path / "outer.toml").write_text('[precision]\n"a" = "./old.toml"\n')
    for name, place in (("old", "[recipe]"), ("braces", "[precision] 'a'"), ("outer", "[precision] 'a'")):
        with pytest.raises(ValueError, match=f"'{field}' was removed in version 0.2.0: ") as caught:
            load_recipe(tmp_path / f"{name}.toml")
        assert f"{name}.toml" in str(caught.value) and place in str(caught.value)
        assert f"remove {field}" in str(caught.value)
    with pytest.raises(ValueError, match=r"unknown key 'wgrad_blocks'"):  # a typing error is no removed field
        parse_recipe('[recipe]\nwgrad_blocks = "batch"\n')


@pytest.mark.parametrize("field, default, other", GONE)
def test_keywords_and_keys_of_a_removed_field(field, default, other):
    assert NVFP4BlockScaling(**{field: default, "disable_rht": True}) == NVFP4BlockScaling(disable_rht=True)
    assert recipe_of_key(f"disable_rht=True;{field}={default!r}") == NVFP4BlockScaling(disable_rht=True)
    for build in (
        lambda: NVFP4BlockScaling(**{field: other}),
        lambda: dataclasses.replace(NVFP4BlockScaling(), **{field: other}),
        lambda: recipe_of_key(f"{field}={other!r}"),
    ):
        with pytest.raises(ValueError, match=f"'{field}' was removed in version 0.2.0: "):
            build()
    with pytest.raises(TypeError, match="unexpected keyword argument 'wgrad'"):
        NVFP4BlockScaling(wgrad="batch")


def test_pickles_of_version_0_1_load():
    recipe = pickle.loads((SAVED / "recipe.pkl").read_bytes())
    inner = NVFP4BlockScaling(disable_rht=True, name="inner")
    expected = NVFP4BlockScaling(nvfp4_4over6="weights", precision={"a.*": None, "b": inner}, name="mine")
    assert recipe == expected and hash(recipe) == hash(expected) and repr(recipe) == repr(expected)
    assert vars(recipe) == vars(expected) and vars(recipe.precision[1][1]) == vars(inner)
    assert pickle.loads(pickle.dumps(recipe)) == copy.copy(recipe) == recipe


@pytest.mark.parametrize("name, field", [("pixel", "wgrad_block"), ("stochastic", "activation_rounding")])
def test_pickles_of_version_0_1_that_need_a_removed_field_are_refused(name, field):
    with pytest.raises(ValueError, match=f"'{field}' was removed in version 0.2.0: "):
        pickle.loads((SAVED / f"{name}.pkl").read_bytes())


def test_a_model_pickled_by_version_0_1_keeps_its_precision():
    """set_precision's entries are hooks that hold recipes: one without RHT for the first layer, none for the second."""
    model = torch.load(SAVED / "model.pt", weights_only=False)
    twin = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1))
    twin.load_state_dict(model.state_dict())
    nv.set_precision(twin, {"0": NVFP4BlockScaling(disable_rht=True), "1": None})
    x, results = values((16, 16, 2, 2)), []
    for net in (model, twin):
        torch.manual_seed(0)
        with nv.nvfp4_autocast():
            y = net(x)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in net.parameters())])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert [row.nvfp4 for row in nv.coverage(model, x).rows] == [True, False]


# --- TransformerEngine


@needs_te
def test_same_fields_and_defaults(te, monkeypatch):
    theirs = {field.name: field.default for field in dataclasses.fields(te.NVFP4BlockScaling)}
    ours = {field.name: field.default for field in dataclasses.fields(NVFP4BlockScaling)}
    assert set(theirs) <= set(ours)
    for name, value in theirs.items():
        assert ours[name] == getattr(value, "name", value), name
    recipe = te.NVFP4BlockScaling()
    for name in QPARAMS:
        assert dataclasses.asdict(getattr(NVFP4BlockScaling(), name)) == dataclasses.asdict(getattr(recipe, name))
    assert {field.name: field.default for field in dataclasses.fields(te.QParams)} == {
        field.name: field.default for field in dataclasses.fields(QParams)
    }


@needs_te
@pytest.mark.parametrize("fields", BAD_VALUES, ids=str)
def test_both_refuse(te, fields):
    with pytest.raises(ValueError):
        te.NVFP4BlockScaling(**fields)
    with pytest.raises(ValueError, match=next(iter(fields))):
        NVFP4BlockScaling(**fields)


@needs_te
@pytest.mark.parametrize("rht, sr, two_d, row", SWITCHES)
def test_te_objects_convert(te, rht, sr, two_d, row):
    fields = _fields(rht, sr, two_d, row)
    for scope, override in itertools.product(("none", "all"), (None, "high_precision", "dequantized")):
        more = fields | {"nvfp4_4over6": scope, "backward_override": override, "nvfp4_4over6_err_mode": "MSE"}
        ours = as_recipe(te.NVFP4BlockScaling(**more))
        assert ours == NVFP4BlockScaling(**more)
        theirs = te.NVFP4BlockScaling(**more)
        for name in QPARAMS:
            assert dataclasses.asdict(getattr(ours, name)) == dataclasses.asdict(getattr(theirs, name))


@needs_te
def test_replaced_qparams_rule(te):
    recipe = te.NVFP4BlockScaling()
    recipe.fp4_quant_fwd_inp = te.QParams()
    recipe.fp4_quant_fwd_weight = te.QParams()
    recipe.fp4_quant_bwd_grad = te.QParams()
    expected = NVFP4BlockScaling(disable_rht=True, disable_stochastic_rounding=True, disable_2d_quantization=True)
    assert from_te(recipe) == expected
    recipe = te.NVFP4BlockScaling()
    recipe.fp4_quant_bwd_grad = te.QParams(stochastic_rounding=True)
    with pytest.raises(ValueError, match="does not cancel"):
        as_recipe(recipe)
    recipe.backward_override = "high_precision"  # no wgrad in NVFP4: nothing has to cancel
    assert as_recipe(recipe).disable_rht is False
    for attribute, qparams in (
        ("fp4_quant_fwd_inp", te.QParams(random_hadamard_transform=True, stochastic_rounding=True)),
        ("fp4_quant_fwd_weight", te.QParams(random_hadamard_transform=True)),
        ("fp4_quant_bwd_grad", te.QParams(random_hadamard_transform=True, fp4_2d_quantization=True)),
    ):
        recipe = te.NVFP4BlockScaling()
        setattr(recipe, attribute, qparams)
        with pytest.raises(ValueError, match=attribute):
            as_recipe(recipe)


@needs_te
def test_te_recipe_inside_a_precision_table(te):
    recipe = NVFP4BlockScaling(precision={"layer4.*": te.NVFP4BlockScaling(disable_rht=True)})
    assert recipe.precision == (("layer4.*", NVFP4BlockScaling(disable_rht=True)),)


@needs_te
@pytest.mark.parametrize("name", ["MXFP8BlockScaling", "Float8CurrentScaling", "DelayedScaling", "Float8BlockScaling"])
def test_other_te_recipes_are_refused_by_name(te, name):
    with pytest.raises(TypeError, match=f"TransformerEngine's {name}"):
        as_recipe(getattr(te, name)())


@functools.cache
def _make_quantizers() -> types.CodeType:
    """TransformerEngine's make_quantizers, its source compiled alone: its module needs the GPU library."""
    spec = importlib.util.find_spec("transformer_engine")
    source = (Path(spec.origin).parent / "pytorch" / "quantization.py").read_text()
    owner = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "NVFP4BlockScalingRecipeState")
    method = next(n for n in owner.body if getattr(n, "name", "") == "make_quantizers")
    return compile(ast.Module([method], []), "make_quantizers", "exec")


def _their_quantizers(monkeypatch: pytest.MonkeyPatch, recipe: object, mode: str, types_: list[str]) -> list[dict]:
    """The arguments that TransformerEngine gives to its quantizers, taken by a recorder in their place."""
    recorder = types.ModuleType("recorded.tensor.nvfp4_tensor")
    recorder.NVFP4Quantizer = lambda **settings: settings
    for name in ("recorded", "recorded.tensor"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "recorded.tensor.nvfp4_tensor", recorder)
    namespace = {"__package__": "recorded", "__name__": "recorded.quantization", "NVFP4Quantizer": dict}
    exec(_make_quantizers(), namespace)
    state = types.SimpleNamespace(
        recipe=recipe, mode=mode, dtype=None, num_quantizers=len(types_), _slot_tensor_type=lambda index: types_[index]
    )
    return namespace["make_quantizers"](state)


@needs_te
@pytest.mark.parametrize("rht, sr, two_d, row", SWITCHES)
def test_settings_are_those_of_te_quantizers(te, monkeypatch, rht, sr, two_d, row):
    fields = _fields(rht, sr, two_d, row)
    scopes = ("none", "weights", "activations", "all")
    for scope, use_256, mode in itertools.product(scopes, scopes, ("MAE", "MSE")):
        more = fields | {
            "nvfp4_4over6": scope,
            "nvfp4_4over6_e4m3_use_256": use_256,
            "nvfp4_4over6_err_mode": mode,
        }
        theirs, ours = te.NVFP4BlockScaling(**more), NVFP4BlockScaling(**more)
        try:
            forward = _their_quantizers(monkeypatch, theirs, "forward", ["input", "weight"])
        except ValueError:
            with pytest.raises(ValueError, match="4over6"):
                ours.validate_for_use()
            continue
        backward = _their_quantizers(monkeypatch, theirs, "backward", ["grad_output"])
        for role, quantizer in zip(("input", "weight", "grad_output"), forward + backward, strict=True):
            settings = ours.settings(role)
            assert settings[6:] == (False, 1)  # delayed scales are this library's
            four_over_six = quantizer["nvfp4_4over6_err_mode"] if quantizer["nvfp4_use_4over6"] else None
            assert settings[:6] == (
                quantizer["with_rht"],
                quantizer["stochastic_rounding"],
                quantizer["with_2d_quantization"],
                four_over_six,
                quantizer["nvfp4_e4m3_max"],
                quantizer["row_scaled_nvfp4"],
            ), (more, role)


VARIABLES = [
    {"NVTE_NVFP4_DISABLE_RHT": "1", "NVTE_NVFP4_4OVER6": "all", "NVTE_NVFP4_4OVER6_ERR_MODE": "mse"},
    {
        "NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING": "1",
        "NVTE_NVFP4_DISABLE_2D_QUANTIZATION": "1",
        "NVTE_NVFP4_ROW_SCALED_ACTIVATION": "1",
        "NVTE_NVFP4_4OVER6_E4M3_USE_256": "weights",
        "NVTE_BACKWARD_OVERRIDE": "dequantized",
    },
    {"NVTE_NVFP4_DISABLE_RHT": "true", "NVTE_NVFP4_ROW_SCALED_ACTIVATION": "2"},
    {"NVTE_NVFP4_4OVER6": "some"},
    {"NVTE_BACKWARD_OVERRIDE": ""},
]
_BOTH = """
import dataclasses, importlib, json, os, sys
from te_nvfp4_cv.recipe import block_scaling as ours
from transformer_engine.common import recipe as theirs
names = [f.name for f in dataclasses.fields(theirs.NVFP4BlockScaling)]
def fields(module):
    try:
        made = importlib.reload(module).NVFP4BlockScaling()
    except ValueError:
        return "ValueError"
    return {name: getattr(value := getattr(made, name), "name", value) for name in names}
for variables in json.loads(sys.argv[1]):
    os.environ |= variables
    print(json.dumps([fields(ours), fields(theirs)]))
    for name in variables:
        del os.environ[name]
"""


@needs_te
def test_environment_variables_as_te_reads_them():
    """Each of both modules reads them when it is imported: anew for each set, in one process."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("NVTE_")}
    environment |= {"NVTE_PROJECT_BUILDING": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", _BOTH, json.dumps(VARIABLES)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    for variables, (ours, theirs) in zip(VARIABLES, lines, strict=True):
        assert ours == theirs, variables
    assert [ours == "ValueError" for ours, _ in lines] == [False, False, False, True, True]
    assert (lines[0][0]["nvfp4_4over6"], lines[1][0]["nvfp4_4over6"]) == ("all", "none")  # each set by itself


def test_files_survive_a_change_of_environment(tmp_path):
    """What a recipe saved under environment variables says holds without them, and the other way round."""
    script = (
        "import sys; from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling as R\n"
        "from te_nvfp4_cv.recipe.files import load_recipe, save_recipe\n"
        "save_recipe(R(backward_override=None, disable_rht=False), sys.argv[1]); save_recipe(R(), sys.argv[2])\n"
    )
    environment = os.environ | {"NVTE_NVFP4_DISABLE_RHT": "1", "NVTE_BACKWARD_OVERRIDE": "dequantized"}
    names = [str(tmp_path / "explicit.toml"), str(tmp_path / "inherited.toml")]
    subprocess.run([sys.executable, "-c", script, *names], cwd=ROOT, env=environment, check=True)
    explicit, inherited = (load_recipe(name) for name in names)
    assert (explicit.disable_rht, explicit.backward_override) == (False, None)
    assert (inherited.disable_rht, inherited.backward_override) == (True, "dequantized")
