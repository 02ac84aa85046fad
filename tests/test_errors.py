"""What a user reads after a mistake: what came, what is needed, what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from te_nvfp4_cv import errors
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, QParams, as_recipe, from_te
from te_nvfp4_cv.recipe.files import load_recipe

ROOT = Path(__file__).resolve().parent.parent
SCOPES = "'none', 'weights', 'activations', 'all'"


def parts(error: BaseException) -> str:
    """The text of an error after checking that it has all its parts."""
    text = str(error)
    assert all(f"\n  {part}" in text for part in ("got:   ", "needs: ", "fix:   ")), text
    return text


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"nvfp4_4over6": "weight"}, ("nvfp4_4over6='weight'", SCOPES, "mean 'weights'")),
        ({"nvfp4_4over6_err_mode": "mse"}, ("'MAE', 'MSE'", "did you mean 'MSE'")),
        ({"disable_rht": 1}, ("disable_rht=1", "False, True")),
        ({"disable_rht": "yes"}, ("disable_rht='yes'", "False, True")),
        ({"backward_override": "dequantize"}, ("None, 'high_precision', 'dequantized'", "did you mean 'dequantized'")),
        ({"tensor_scale": "delay"}, ("tensor_scale='delay'", "'current', 'delayed'", "did you mean 'delayed'")),
        ({"tensor_scale": "static"}, ("tensor_scale='static'", "needs: one of: 'current', 'delayed'")),
        ({"wgrad_block": "pixel"}, ("removed in version 0.2.0", "3.5 times", "along the batch")),
        ({"activation_rounding": "stochastic"}, ("removed in version 0.2.0", "rounds to nearest")),
        ({"thin_layers": "high"}, ("'high_precision', 'pad'",)),
        ({"high_precision_gemms": "wgrad"}, ("'fprop', 'dgrad', 'wgrad'", "write ('wgrad',)")),
        ({"high_precision_gemms": ("wgrad", "bprop")}, ("'fprop', 'dgrad', 'wgrad'",)),
        ({"high_precision_gemms": None}, ("high_precision_gemms=None",)),
        ({"precision": "head"}, ("precision='head'", "pairs")),
        ({"precision": (("head",),)}, ("('head',)", "pairs")),
        ({"precision": {"a": NVFP4BlockScaling(precision={"b": None})}}, ("one table per recipe",)),
        ({"name": 3}, ("name=3", "a string")),
        ({"backward_override": "dequantized", "high_precision_gemms": ("dgrad",)}, ("contradict", "choose one")),
    ],
    ids=str,
)
def test_bad_fields(fields, told):
    with pytest.raises(ValueError) as caught:
        NVFP4BlockScaling(**fields)
    text = parts(caught.value)
    assert all(piece in text for piece in told), text


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"nvfp4_4over6": "all"}, ("4over6", "disable_rht=True", "'weights'")),
        ({"nvfp4_4over6": "activations"}, ("4over6", "disable_rht=True")),
        ({"nvfp4_4over6": "all", "backward_override": "high_precision"}, ("4over6", "disable_rht=True")),
        ({"row_scaled_activation": True}, ("row-scaled", "disable_rht=True")),
        ({"row_scaled_activation": True, "disable_rht": True, "nvfp4_4over6": "all"}, ("wgrad", "backward_override")),
        (
            {"tensor_scale": "delayed", "row_scaled_activation": True, "disable_rht": True},
            ("delayed", "tensor_scale='current'", "row_scaled_activation=False"),
        ),
    ],
    ids=str,
)
def test_combinations_are_refused_at_use(fields, told):
    recipe = NVFP4BlockScaling(**fields, name="mine")
    with pytest.raises(ValueError) as caught:
        recipe.validate_for_use()
    text = parts(caught.value)
    assert "'mine'" in text and all(piece in text for piece in told), text
    with pytest.raises(ValueError):
        NVFP4BlockScaling(precision={"layer4": recipe}).validate_for_use()


def test_combinations_that_work_are_not_refused():
    NVFP4BlockScaling(nvfp4_4over6="weights").validate_for_use()
    NVFP4BlockScaling(nvfp4_4over6="all", disable_rht=True).validate_for_use()
    NVFP4BlockScaling(row_scaled_activation=True, disable_rht=True).validate_for_use()
    both = NVFP4BlockScaling(
        row_scaled_activation=True, disable_rht=True, nvfp4_4over6="all", backward_override="high_precision"
    )
    both.validate_for_use()


def test_fp8_attention_is_accepted_and_said_to_do_nothing(monkeypatch):
    monkeypatch.setattr(errors, "_warned", set())
    with pytest.warns(UserWarning, match="attention"):
        NVFP4BlockScaling(fp8_dpa=True).validate_for_use()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NVFP4BlockScaling(fp8_mha=True).validate_for_use()  # once per process


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        (True, ("the first argument is the recipe", "enabled=True")),
        (False, ("enabled=False",)),
        (NVFP4BlockScaling, ("not the class", "NVFP4BlockScaling()")),
        ({"disable_rht": True}, ("NVFP4BlockScaling(**fields)", "set_precision")),
        (3.0, ("float", "a recipe's name or path")),
    ],
    ids=str,
)
def test_what_is_no_recipe(recipe, told):
    with pytest.raises(TypeError) as caught:
        as_recipe(recipe)
    text = parts(caught.value)
    assert all(piece in text for piece in told), text
    with pytest.raises(TypeError):
        from_te(recipe)


def test_settings_of_an_unknown_role():
    with pytest.raises(ValueError) as caught:
        NVFP4BlockScaling().settings("activation")
    assert "'input', 'weight', 'grad_output'" in parts(caught.value)


def test_bad_qparams():
    for fields in ({"stochastic_rounding": 1}, {"amax_epsilon": "0"}, {"amax_epsilon": True}):
        with pytest.raises(ValueError, match="QParams field"):
            QParams(**fields)
    assert QParams(amax_epsilon=1).amax_epsilon == 1.0


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[recipe]\ndisable_rth = true\n", ("unknown key 'disable_rth'", "[recipe]", "mean 'disable_rht'")),
        ("[recipe]\nname = 'x'\n", ("unknown key 'name'", "[recipe]")),
        ("disable_rht = true\n", ("unknown key 'disable_rht'", "below a line [recipe]")),
        ('[precision]\nlayer4.0 = "high"\n', ("unknown key '0'", "in quotes", '"layer4.0"')),
        ("disable_rth = true\n", ("unknown key 'disable_rth'", "'disable_rht'? It belongs below a line [recipe]")),
        ("[recipes]\n", ("unknown key 'recipes'", "did you mean 'recipe'")),
        ("[recipe]\nnvfp4_4over6 = 'some'\n", ("[recipe]", "nvfp4_4over6='some'", SCOPES)),
        ("[recipe]\ndisable_rht = 'true'\n", ("disable_rht='true'", "False, True")),
        ("[recipe]\nhigh_precision_gemms = ['bwd']\n", ("high_precision_gemms", "'fprop', 'dgrad', 'wgrad'")),
        ("[recipe]\ntensor_scale = 'static'\n", ("tensor_scale", "'current', 'delayed'")),
        ("recipe = 3\n", ("recipe", "a table")),
        ("precision = 'head'\n", ("precision", "a table")),
        ("description = 3\n", ("description", "a string")),
        ("[precision]\nhead = 'hihg'\n", ("[precision] 'head'", '"high"', "'hihg'")),
        ("[precision]\nhead = false\n", ("[precision] 'head'", '"high"')),
        ("[precision]\nhead = {disable_rth = true}\n", ("[precision] 'head'", "did you mean 'disable_rht'")),
        ("[precision]\nhead = {disable_rht = 3}\n", ("[precision] 'head'", "disable_rht=3")),
        ("[precision]\nhead = 'unet'\n", ("[precision]", "recipe that another one names")),
        ("[precision]\nhead = './mine.toml'\n", ("[precision]", "recipe that another one names")),
        ("[recipe\n", ("not TOML", "line 1")),
        ("[recipe]\ndisable_rht = true\ndisable_rht = true\n", ("not TOML",)),
    ],
)
def test_bad_recipe_files(tmp_path, content, told):
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        load_recipe(path)
    text = parts(caught.value)
    assert str(path) in text and all(piece in text for piece in told), text


def test_a_recipe_file_that_is_not_text(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not TOML"):
        load_recipe(tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("unett", ("'unett'", "default, ", "did you mean 'unet'")),
        ("zzz", ("'zzz'", "default, ", "a path that ends in .toml")),
        ("", ("''", "default, ")),
        ("nowhere/mine.toml", ("no such file", "use a name")),
        ("mine.toml", ("no such file",)),
        (Path("mine"), ("no such file",)),
        ("./", ("a folder",)),
    ],
    ids=str,
)
def test_missing_recipe_files(tmp_path, monkeypatch, name, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        load_recipe(name)
    text = parts(caught.value)
    assert all(piece in text for piece in told), text


@pytest.mark.parametrize("name", [None, 3, NVFP4BlockScaling()], ids=str)
def test_load_recipe_wants_a_name(name):
    with pytest.raises(ValueError, match="not a name"):
        load_recipe(name)


def test_a_bad_environment_variable_is_named():
    code = (
        "from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling as R\n"
        "print(R(nvfp4_4over6='none', backward_override=None).disable_rht)\n"
        "for fields in ({'backward_override': None}, {'nvfp4_4over6': 'none'}):\n"
        "    try: R(**fields)\n"
        "    except ValueError as error: print(str(error).splitlines()[-1])\n"
    )
    variables = {"NVTE_NVFP4_4OVER6": "some", "NVTE_BACKWARD_OVERRIDE": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
    )
    first, second, third = result.stdout.splitlines()
    assert first == "False"
    assert "NVTE_NVFP4_4OVER6" in second and "NVTE_BACKWARD_OVERRIDE" in third


def test_describe():
    import torch

    assert errors.describe(torch.zeros(2, 3, dtype=torch.bfloat16)) == "(2, 3) bfloat16"
    assert errors.describe("text") == "str"
