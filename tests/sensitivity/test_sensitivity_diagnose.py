"""Bundles and their diagnosis: a replay has the step's bits, planted NaN, inf and GEMM faults are named, bad files."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv import cli
from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.layer import gemms
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.sensitivity import Bundle, builder, bundle, diagnose, load_bundle, save_bundle
from tests.helpers import same_bits
from tests.networks import NO_SR, Net

RECIPE = nv.NVFP4BlockScaling()
ARGUMENTS = {
    "options": {"task": "semantic", "scale": 0.25, "activation": "relu", "dropout": 0.1},
    "image_size": [16, 16],
    "classes": ["background", "box", "dot"],
    "class_weights": None,
}


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def build(arguments: dict) -> tuple[nn.Module, object]:
    return Net(), loss


def a_step(recipe: nv.NVFP4BlockScaling = RECIPE, seed: int = 7, steps: int = 0) -> dict:
    """The fields of a bundle of a step of Net, and its loss; `steps` of training before."""
    torch.manual_seed(0)
    model = Net()
    batch = (torch.randn(4, 3, 8, 8), torch.randn(4, 16))
    nv.set_precision(model, recipe)
    for _ in range(steps):
        with nv.nvfp4_autocast(recipe):
            loss(model, batch).backward()
    fields = dict(
        model_state=copy.deepcopy(model.state_dict()),
        batch=batch,
        seeds={"torch": seed},
        recipe_text=recipe.to_toml(),
        builder={"name": "mine.rebuild:build", "arguments": {}},
        step=12,
        reason="loss 5, median 1",
        nvfp4_state=nv.extra_state(model),
    )
    torch.manual_seed(seed)
    with nv.nvfp4_autocast(recipe):
        value = loss(model, batch)
    model.zero_grad()
    value.backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    return {**fields, "loss": float(value.detach()), "extra": {"norm": norm}}


# ---- bundles --------------------------------------------------------------------------------------------------------


def test_a_bundle_holds_what_it_was_given(tmp_path):
    fields = a_step()
    fields["batch"] = {"x": [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), (1, 2.5)], "none": None}
    fields["optimizer_state"] = torch.optim.AdamW(Net().parameters()).state_dict()
    save_bundle(tmp_path / "b.pt", **fields)
    found = load_bundle(tmp_path / "b.pt")
    image = found.batch["x"][0]
    assert same_bits(image, fields["batch"]["x"][0]) and image.stride() == fields["batch"]["x"][0].stride()
    assert found.batch["x"][1] == (1, 2.5) and found.batch["none"] is None
    assert list(found.model_state) == list(fields["model_state"])
    assert all(
        same_bits(a.reshape(-1), fields["model_state"][name].reshape(-1)) for name, a in found.model_state.items()
    )
    for name in (
        "seeds",
        "recipe_text",
        "builder",
        "step",
        "reason",
        "loss",
        "extra",
        "nvfp4_state",
        "optimizer_state",
    ):
        assert getattr(found, name) == fields[name], name
    assert found.model_state._metadata == Net().state_dict()._metadata
    assert found.autocast is None and os.listdir(tmp_path) == ["b.pt"]


def test_a_view_does_not_bring_its_base_along(tmp_path):
    save_bundle(tmp_path / "small.pt", **a_step() | {"batch": torch.zeros(1_000_000)[:4]})
    assert (tmp_path / "small.pt").stat().st_size < 1_000_000


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path, fields = tmp_path / "b.pt", a_step()
    save_bundle(path, **fields)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RuntimeError, match="No space left"):
        save_bundle(path, **fields | {"step": 13})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["b.pt"]
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="could not be written"):
        save_bundle(path / "below a file" / "b.pt", **fields)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("seeds", {}, '"torch": the seed'),
        ("seeds", 3, "bad seeds"),
        ("autocast", "float32", "bad autocast"),
        ("builder", {"name": "x", "arguments": {}}, "package.module:function"),
        ("builder", {"name": "x:y", "arguments": {"a": torch.ones(1)}}, "JSON"),
        ("recipe_text", "[recipe]\nrht = 1", "unknown key 'rht'"),
        ("recipe_text", None, "bad recipe_text"),
        ("batch", {"x": [object()]}, "batch['x'][0]"),
        ("batch", nv.NVFP4Quantizer()(torch.ones(16, 16)), "tensor subclass"),
        ("step", "3", "bad step"),
    ],
    ids=range(10),
)
def test_what_a_bundle_refuses(field, value, told, tmp_path):
    fields = a_step() | {field: value}
    with pytest.raises((ValueError, TypeError)) as caught:
        save_bundle(tmp_path / "b.pt", **fields)
    assert told in str(caught.value) and not list(tmp_path.iterdir())


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "b.pt"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_bundle(path)
    with pytest.raises(FileNotFoundError, match="a folder"):
        load_bundle(tmp_path)
    save_bundle(path, **a_step())
    whole = path.read_bytes()
    for content in (b"", b"nothing", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read"):
            load_bundle(path)
    for state, told in (
        (Net().state_dict(), "is no bundle"),
        (torch.ones(3), "is no bundle"),
        ({"format": bundle.FORMAT, "version": 99}, "another version"),
        ({"format": bundle.FORMAT, "version": 1, "step": 3}, "incomplete"),
    ):
        torch.save(state, path)
        with pytest.raises(ValueError, match=told):
            load_bundle(path)


def test_loading_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"format": bundle.FORMAT, "version": 1, "batch": Evil()}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        load_bundle(tmp_path / "b.pt")
    assert not (tmp_path / "evil").exists()


# ---- replays --------------------------------------------------------------------------------------------------------

DELAYED = nv.NVFP4BlockScaling(tensor_scale="delayed", precision=(("body.1", None), ("head", NO_SR)))


@pytest.mark.parametrize(("recipe", "steps"), [(RECIPE, 0), (DELAYED, 2)], ids=["current", "delayed"])
def test_a_replay_has_the_bits_of_the_step(recipe, steps, tmp_path):
    """Loss and gradient, with dropout, stochastic rounding, batch norm, a [precision] table and delayed scales."""
    fields = a_step(recipe, steps=steps)
    save_bundle(tmp_path / "b.pt", **fields)
    generator = torch.get_rng_state()
    found = diagnose(tmp_path / "b.pt", build)
    assert found.nvfp4.loss == found.recorded_loss == fields["loss"]
    assert found.nvfp4.gradient_norm == fields["extra"]["norm"]
    assert torch.equal(torch.get_rng_state(), generator)
    model = Net()
    model.load_state_dict(fields["model_state"])
    torch.manual_seed(7)
    assert found.high.loss == float(loss(model, fields["batch"]).detach())
    assert found.finite and found.high.first is None is found.nvfp4.first
    eligible = {"body.1", "body.4", "up", "head"} - ({"body.1"} if recipe is DELAYED else set())
    assert set(found.layers) == eligible and set(found.gemms) == {"fprop", "dgrad", "wgrad"}
    assert found.gemms["dgrad"].loss == found.gemms["wgrad"].loss == found.nvfp4.loss  # forward passes are the same
    assert found.gemms["fprop"].loss == found.high.loss
    assert all(0 < replay.gradient_error < 1 for replay in (*found.gemms.values(), *found.layers.values()))
    assert found.layers[found.worst_layer].gradient_error == min(r.gradient_error for r in found.layers.values())
    saved = found.save(tmp_path / "mine.toml")
    assert nv.load_recipe(tmp_path / "mine.toml") == saved
    assert dict(saved.precision) == {**dict(recipe.precision), found.worst_layer: None}
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["worst_layer"] == found.worst_layer
    assert found.verdict() in str(found) and "step 12: loss 5, median 1" in str(found)


def test_a_layers_replay_is_that_of_its_suggested_recipe(tmp_path):
    fields = a_step()
    found = diagnose(Bundle(**fields), build)
    again = diagnose(Bundle(**fields | {"recipe_text": found.recipe().to_toml()}), build)
    assert again.nvfp4.loss == found.layers[found.worst_layer].loss
    assert again.nvfp4.gradient_error == found.layers[found.worst_layer].gradient_error
    assert found.worst_layer not in again.layers


def test_autocast_of_the_step_counts():
    fields = a_step() | {"autocast": "bfloat16"}
    found = diagnose(Bundle(**fields), build)
    model = Net()
    model.load_state_dict(fields["model_state"])
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16):
        assert found.high.loss == float(loss(model, fields["batch"]).detach())
    assert found.finite and found.high.loss != diagnose(Bundle(**a_step()), build).high.loss


def test_a_step_without_nvfp4():
    found = diagnose(Bundle(**a_step() | {"recipe_text": ""}), build)
    assert found.nvfp4 is None and not found.layers and found.finite and found.recipe() is None
    assert "no NVFP4 recipe" in found.verdict()


# ---- planted faults -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stem.weight", "body.2.bias", "head.weight"])
def test_a_planted_nan_weight_is_named(name):
    fields = a_step()
    fields["model_state"][name].view(-1)[3] = math.nan
    found = diagnose(Bundle(**fields), build)
    module, _, key = name.rpartition(".")
    for replay in (found.high, found.nvfp4):
        assert (replay.first.module, replay.first.what) == (module, f"parameter {key}") and not replay.finite
    assert not found.finite and not found.layers and found.suggest() == {} and found.recipe() is None
    assert found.verdict().startswith("High precision is itself not finite")
    assert f"First: parameter {key} of {module}." in found.verdict()


def test_a_planted_batch_is_named():
    fields = a_step()
    fields["batch"][0][0, 0, 0, 0] = math.inf
    found = diagnose(Bundle(**fields), build)
    assert str(found.high.first) == "input of the model" and "not NVFP4" in str(found)
    fields = a_step()
    fields["batch"][1][0, 0] = math.nan  # the target: only the loss function sees it
    found = diagnose(Bundle(**fields), build)
    assert found.high.forward is None and not found.high.finite and str(found.high.backward).startswith("gradient")


class Boom(nn.Module):
    """Overflows in the middle: exp of large numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x * 1e4)


def test_a_planted_inf_activation_is_named():
    def overflowing(arguments: dict) -> tuple[nn.Module, object]:
        model = Net()
        model.body[6] = Boom()
        return model, loss

    found = diagnose(Bundle(**a_step()), overflowing)
    assert str(found.high.first) == "output of body.6" == str(found.nvfp4.first)


@pytest.fixture
def fault(monkeypatch):
    """Make one GEMM of the layers with this many output channels give inf, in NVFP4 only."""

    def plant(gemm: str, channels: int) -> None:
        original = getattr(gemms, gemm)

        def faulty(first: Tensor, *args: object) -> Tensor:
            made = next(a for a in args if isinstance(a, Plan))
            y = original(first, *args)
            hit = gemm in made.gemms and made.geometry.y_shape[-1] == channels and made.geometry.rank
            return y * math.inf if hit else y

        monkeypatch.setattr(gemms, gemm, faulty)

    return plant


@pytest.mark.parametrize("gemm", ["fprop", "dgrad", "wgrad"])
def test_a_planted_gemm_fault_is_found(gemm, fault, tmp_path):
    fields = a_step()
    fault(gemm, 16)  # of the layers in NVFP4 only `up` has 16 output channels
    found = diagnose(Bundle(**fields), build)
    assert found.high.finite and not found.nvfp4.finite and not found.finite
    assert (found.worst_gemm, found.worst_layer) == (gemm, "up")
    assert [name for name, replay in found.gemms.items() if replay.finite] == [gemm]
    assert [name for name, replay in found.layers.items() if replay.finite] == ["up"]
    expected = {
        "fprop": "output of up",
        "dgrad": "gradient of the output of body.6",  # what flows into body's last module
        "wgrad": "gradient of the parameter weight of up",
    }
    assert str(found.nvfp4.first) == expected[gemm]
    assert dict(found.recipe().precision) == {"up": None}
    assert diagnose(Bundle(**fields | {"recipe_text": found.recipe().to_toml()}), build).finite


def test_faults_of_several_layers_are_the_gemms(fault):
    fields = a_step(dataclasses.replace(RECIPE, precision=(("head", None),)))
    fault("dgrad", 16)
    fault("dgrad", 32)
    found = diagnose(Bundle(**fields), build)
    assert (found.worst_gemm, found.worst_layer) == ("dgrad", None)
    table = dict(found.recipe().precision)
    assert table == {"*": nv.NVFP4BlockScaling(high_precision_gemms=("dgrad",)), "head": None}
    assert diagnose(Bundle(**fields | {"recipe_text": found.recipe().to_toml()}), build).finite


def test_faults_of_everything_have_no_recipe(fault):
    fields = a_step()
    for gemm in ("dgrad", "wgrad"):
        for channels in (16, 32):
            fault(gemm, channels)
    found = diagnose(Bundle(**fields), build)
    assert found.worst_gemm is None is found.worst_layer and found.suggest() == {}
    assert "No single layer or GEMM" in found.verdict()


class Steep(nn.Module):
    """A linear layer whose dy is near the end of fp32, and whose x is tiny."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_a_gradient_that_the_rotation_overflows_is_wgrads():
    """RHT sums 16 values of 2e38: with wgrad in high precision, x of 1e-30 keeps the product small."""
    model = Steep()
    fields = a_step() | {
        "model_state": model.state_dict(),
        "batch": torch.full((16, 16), 1e-30),
        "recipe_text": NO_SR.to_toml(),
    }
    signs = torch.tensor([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1.0])[:, None]

    def steep(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) * signs * 2e38).sum() * 1.0

    found = diagnose(Bundle(**fields), lambda arguments: (Steep(), steep))
    assert found.high.finite and not found.nvfp4.finite
    assert (found.worst_gemm, found.worst_layer) == ("wgrad", "fc")
    assert str(found.nvfp4.first) == "gradient of the parameter weight of fc"


# ---- builders and the command ---------------------------------------------------------------------------------------


def test_bad_builders_and_models(monkeypatch):
    loaded = Bundle(**a_step())
    with pytest.raises(ValueError, match="the builder failed"):
        diagnose(loaded, lambda arguments: arguments["missing"])
    with pytest.raises(TypeError, match="gave something else"):
        diagnose(loaded, lambda arguments: Net())
    with pytest.raises(ValueError, match="do not fit the model"):
        diagnose(loaded, lambda arguments: (Steep(), loss))
    with pytest.raises(ValueError, match="cannot be replayed") as caught:
        diagnose(loaded, lambda arguments: (Net(), lambda model, batch: model(batch["images"])))
    assert "TypeError: tuple indices" in str(caught.value)
    with pytest.raises(ValueError, match="device not usable"):
        diagnose(loaded, build, device="cuda:63")
    with pytest.raises(ValueError, match="device not usable"):
        diagnose(loaded, build, device="toaster")
    with pytest.raises(ValueError, match="unknown backend"):
        diagnose(loaded, build, backend="fast")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="cannot run here"):  # before the builder, whose code may take minutes
        diagnose(loaded, lambda arguments: pytest.fail("was built"), backend="triton")


@pytest.mark.parametrize("name", ["mine.rebuild:build", "os:system", "unet_coco.rebuild.x:y", "unet_coco...os:system"])
def test_a_foreign_builder_is_not_imported_unasked(name, tmp_path):
    path = tmp_path / "b.pt"
    save_bundle(path, **a_step() | {"builder": {"name": name, "arguments": {}}})
    with pytest.raises(ValueError, match="not imported without your consent") as caught:
        diagnose(path)
    assert f"te-nvfp4-cv diagnose {path} --builder {name}" in str(caught.value)


def test_given_builders(tmp_path, monkeypatch):
    package = tmp_path / "some_package_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("answer = 42\n")
    (package / "rebuild.py").write_text("from .parts import answer\ndef build(arguments):\n    return answer\n")
    assert builder.given(f"{package / 'rebuild.py'}:build")({}) == 42
    monkeypatch.chdir(tmp_path)
    assert builder.given("some_package_of_mine.rebuild:build")({}) == 42
    (tmp_path / "broken_builder.py").write_text("1 / 0\n")
    for name, told in (
        ("rebuild", "MODULE:FUNCTION"),
        ("nowhere.py:build", "no such file"),
        ("no_such_module_here:build", "cannot be imported"),
        ("broken_builder.py:build", "ZeroDivisionError"),
        ("some_package_of_mine.rebuild:other", "without a function 'other'"),
    ):
        with pytest.raises(ValueError, match=told):
            builder.given(name)


def unet_bundle(path: Path, **changes: object) -> dict:
    from unet_coco.rebuild import build as rebuild

    torch.manual_seed(0)
    model, step_loss = rebuild(ARGUMENTS)
    recipe = nv.load_recipe("unet")
    images = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    batch = (images, torch.randint(0, 3, (2, 16, 16)))
    fields = a_step() | {
        "model_state": model.state_dict(),
        "batch": batch,
        "recipe_text": recipe.to_toml(),
        "builder": {"name": "unet_coco.rebuild:build", "arguments": ARGUMENTS},
        "nvfp4_state": None,
    }
    nv.set_precision(model, recipe)
    torch.manual_seed(7)
    with nv.nvfp4_autocast(recipe):
        fields["loss"] = float(step_loss(model, batch).detach())
    save_bundle(path, **fields | changes)
    return fields


def test_the_command_on_a_unet(tmp_path, capsys):
    path, out = tmp_path / "b.pt", tmp_path / "mine.toml"
    fields = unet_bundle(path)
    assert cli.main(["diagnose", str(path), "--json", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["nvfp4"]["loss"] == fields["loss"] == found["recorded_loss"] and found["finite"]
    assert "head" not in found["layers_in_high_precision"] and len(found["layers_in_high_precision"]) == 21
    assert dict(nv.load_recipe(out).precision) == {"head": None, found["worst_layer"]: None}
    assert str(out) in printed.err
    before = out.read_text()
    assert cli.main(["diagnose", str(path), "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err and out.read_text() == before


def test_the_commands_exit_status(tmp_path, capsys):
    path, out = tmp_path / "b.pt", tmp_path / "mine.toml"
    fields = unet_bundle(path)
    fields["model_state"]["down.1.conv.0.weight"][0, 0, 0, 0] = math.nan
    save_bundle(path, **fields)
    assert cli.main(["diagnose", str(path), "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "First: parameter weight of down.1.conv.0." in printed.out
    assert "none written" in printed.err and not out.exists()
    save_bundle(path, **a_step())
    assert cli.main(["diagnose", str(path)]) == 2
    assert f"te-nvfp4-cv diagnose {path} --builder mine.rebuild:build" in capsys.readouterr().err
    mine = tmp_path / "mine_builder.py"
    mine.write_text(
        textwrap.dedent(
            """
            from tests.sensitivity.test_sensitivity_diagnose import build as make
            def build(arguments):
                return make(arguments)
            """
        )
    )
    assert cli.main(["diagnose", str(path), "--builder", f"{mine}:build"]) == 0
    assert "Both are finite" in capsys.readouterr().out
    assert cli.main(["diagnose", str(path), "--builder", f"{mine}:build", "--device", "cuda:63"]) == 2
    path.write_bytes(b"no bundle")
    assert cli.main(["diagnose", str(path)]) == 2 == cli.main(["diagnose", str(tmp_path / "absent.pt")])
