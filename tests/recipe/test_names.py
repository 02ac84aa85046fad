"""A recipe's name, or the path of its file, is accepted wherever a recipe is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.nn.precision import entries_of
from te_nvfp4_cv.recipe import files
from te_nvfp4_cv.recipe.block_scaling import as_recipe


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 16))


def images() -> torch.Tensor:
    return torch.randn(16, 16, 6, 6, generator=torch.Generator().manual_seed(1))


def test_a_name_and_a_path_are_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert as_recipe("no_rht") == nv.load_recipe("no_rht") and as_recipe("no_rht").name == "no_rht"
    nv.save_recipe("no_sr", tmp_path / "mine.toml")
    assert as_recipe(tmp_path / "mine.toml") == nv.load_recipe("no_sr")
    monkeypatch.chdir(tmp_path)
    assert as_recipe("mine.toml").disable_stochastic_rounding
    nv.save_recipe("no_rht", tmp_path / "mine.toml")
    assert not as_recipe("mine.toml").disable_stochastic_rounding, "a user's file may change, so it is read again"


def test_the_package_s_own_recipes_are_read_once(monkeypatch: pytest.MonkeyPatch):
    first = as_recipe("resnet")
    monkeypatch.setattr(files, "_parse", lambda path: pytest.fail(f"{path} is read again"))
    assert as_recipe("resnet") is first  # a context is made in each step of a training loop


def test_the_context_takes_a_name():
    with nv.nvfp4_autocast("no_rht"):
        assert nv.active_recipe() == nv.load_recipe("no_rht")

    @nv.nvfp4_autocast("no_sr")
    def inside():
        return nv.active_recipe()

    assert inside() == nv.load_recipe("no_sr")


def test_a_name_under_torch_compile():
    layer, x = nn.Linear(32, 32), torch.randn(16, 32)

    def inside(x: torch.Tensor) -> torch.Tensor:
        with nv.nvfp4_autocast("no_rht"):
            return layer(x)

    compiled = torch.compile(inside, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), inside(x)) and not torch.equal(compiled(x), layer(x))


def test_modules_and_functions_take_a_name():
    assert nv.NVFP4Conv2d(16, 16, 3, recipe="no_rht").recipe == nv.load_recipe("no_rht")
    x, w = torch.randn(16, 16, 4, 4), torch.randn(16, 16, 1, 1)
    expected = nv.functional.conv2d(x, w, recipe=nv.load_recipe("no_2d"))
    assert torch.equal(nv.functional.conv2d(x, w, recipe="no_2d"), expected)


def test_convert_model_takes_a_name():
    model = nv.convert_model(network(), "no_rht")
    assert model[0].recipe == model[2].recipe == nv.load_recipe("no_rht")


def test_set_precision_takes_names_and_high():
    model = network()
    nv.set_precision(model, {"0": "no_rht", "2": "high"})
    assert [row.nvfp4 for row in nv.coverage(model, images(), recipe="no_sr").rows] == [True, False]
    assert entries_of(model[0]) == [nv.load_recipe("no_rht")] and entries_of(model[2]) == [None]
    named = nn.Sequential()
    named.fc = nn.Linear(16, 16)
    nv.set_precision(named, "resnet")
    assert not nv.coverage(named, torch.randn(16, 16), recipe="resnet").rows[0].nvfp4


def test_a_recipe_s_own_table_takes_names_and_high():
    recipe = nv.NVFP4BlockScaling(precision={"stem": "high", "layer4.*": "no_rht"})
    assert recipe.precision == (("stem", None), ("layer4.*", nv.load_recipe("no_rht")))


def test_reports_and_exports_take_a_name(tmp_path: Path):
    model = network()
    assert nv.coverage(model, images(), recipe="no_rht").recipe == repr(nv.load_recipe("no_rht"))
    found = nv.sensitivity.scan(model, lambda m, x: m(x).square().mean(), [images()], recipe="no_rht")
    assert found.recipe("no_sr").disable_stochastic_rounding
    nv.telemetry.attach(model, recipe="no_rht", sinks=[nv.telemetry.JSONL(tmp_path / "run.jsonl")]).close()
    assert "disable_rht" in nv.telemetry.read(tmp_path / "run.jsonl").recipe
    saved = nv.export.save(model, tmp_path / "model", "no_2d")
    assert saved.files


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("resnt", "did you mean 'resnet'"),
        ("no_rth", "'no_rht'"),
        ("high", "enabled=False"),
        ("nothing like it", "one of these names"),
        ("missing.toml", "no such file"),
    ],
)
def test_a_name_that_is_none(name: str, told: str):
    for call in (nv.nvfp4_autocast, nv.load_recipe, lambda r: nv.NVFP4Linear(16, 16, recipe=r)):
        with pytest.raises(FileNotFoundError) as caught:
            call(name)
        text = str(caught.value)
        assert all(part in text for part in (repr(name), told, "needs:", "fix:", "resnet")), text
