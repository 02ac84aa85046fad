"""Files that version 0.1 saved load and mean the same: checkpoints, whole models, tensors, packed files, a run.

tests/fixtures/v0_1/README.md says what each file is. Weights and codes are compared bit for bit, outputs with a
tolerance for another CPU's sums: the networks' first layer alone runs in NVFP4, on given numbers, so that no other
rounding can change a code. Only the public API is used, but for the old module names inside the pickles.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import te_nvfp4_cv as nv

FILES = Path(__file__).resolve().parent / "fixtures" / "v0_1"
NO_2D = nv.NVFP4BlockScaling(disable_2d_quantization=True)
DELAYED = nv.NVFP4BlockScaling(tensor_scale="delayed")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return torch.load(FILES / "expected.pt", weights_only=True)


@pytest.fixture
def images(expected: dict[str, Any]) -> Tensor:
    return expected["images"]


def net() -> nn.Sequential:
    """The saved networks' architecture, with weights of its own."""
    torch.manual_seed(99)
    conv = nn.Conv2d(16, 16, (1, 3), padding=(0, 1), bias=False)
    layers = {"conv": conv, "act": nn.ReLU(), "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
    return nn.Sequential(OrderedDict({**layers, "head": nn.Linear(16, 5)}))


def output(model: nn.Module, x: Tensor, recipe: Any = None) -> Tensor:
    torch.manual_seed(3)
    with torch.no_grad(), nv.nvfp4_autocast(recipe, backend="reference"):
        return model(x)


def digests(state: dict[str, Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(t.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in state.items()
    }


def far(a: Tensor, b: Tensor) -> bool:
    """Whether the difference is far outside of what `CLOSE` allows, as that of quantization is."""
    return bool((a - b).abs().max() > 1e-3 * b.abs().max())


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_with_delayed_scales_goes_on(expected: dict[str, Any], images: Tensor) -> None:
    state = torch.load(FILES / "checkpoint.pt", weights_only=True)
    assert list(state["nvfp4"]["scales"]) == ["conv.weight"] and state["nvfp4"]["sr_drawn"] == 3
    model, fresh = net(), net()
    for one in (model, fresh):
        one.load_state_dict(state["model"])
    torch.set_rng_state(state["rng"])
    nv.extra_state(model, load=state["nvfp4"])
    again = nv.extra_state(model)
    assert again["sr_drawn"] == 3 and same(again["scales"], state["nvfp4"]["scales"])
    with nv.nvfp4_autocast(DELAYED, backend="reference"):
        y = model(32 * images)
    y.square().mean().backward()
    then = expected["checkpoint"]
    torch.testing.assert_close(y.detach(), then["y"], **CLOSE)
    assert nv.extra_state(model)["sr_drawn"] == then["drawn"]
    # dy comes from sums in high precision, so that another CPU may round single codes of it otherwise
    assert (model.conv.weight.grad - then["dw"]).norm() < 0.1 * then["dw"].norm()
    with nv.nvfp4_autocast(DELAYED, backend="reference"):
        assert far(fresh(32 * images).detach(), then["y"]), "the saved scales make a difference"


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


# ---- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "acts"),
    [
        ("set_precision", True),
        ("convert_model", True),
        ("learn_scales", True),
        ("fuse", False),
        ("norm_module", False),
        ("inference", True),
    ],
)
def test_a_pickled_model_gives_what_it_gave(name: str, acts: bool, expected: dict[str, Any], images: Tensor) -> None:
    """`acts`: its settings change the output of the same weights, which must be seen after loading."""
    model = torch.load(FILES / f"model_{name}.pt", weights_only=False)
    then = expected["models"][name]
    assert digests(model.state_dict()) == then["state"]
    y = output(model, images)
    torch.testing.assert_close(y, then["y"], **CLOSE)
    if acts:
        assert far(y, then["plain"])


def test_pickled_models_are_of_todays_classes(images: Tensor, tmp_path: Path) -> None:
    def load(name: str) -> nn.Module:
        return torch.load(FILES / f"model_{name}.pt", weights_only=False)

    assert type(load("convert_model").conv) is nv.NVFP4Conv2d and load("convert_model").conv.recipe == NO_2D
    assert type(load("norm_module").norm) is nv.BatchNormAct2d
    assert isinstance(load("inference").conv, nv.export.InferenceLayer)
    assert type(load("fuse").norm) is nv.BatchNormAct2d and type(load("fuse")) is not nn.Sequential
    learned = load("learn_scales")
    assert learned.conv.weight_scale.requires_grad and float(learned.conv.weight_scale.detach()) == 0.875
    for name in ("set_precision", "convert_model", "learn_scales", "fuse", "norm_module", "inference"):
        torch.save(load(name), tmp_path / "again.pt")
        again = torch.load(tmp_path / "again.pt", weights_only=False)
        assert torch.equal(output(again, images), output(load(name), images)), name


def test_entries_of_set_precision_can_be_replaced(images: Tensor) -> None:
    model = torch.load(FILES / "model_set_precision.pt", weights_only=False)
    before = output(model, images)
    nv.set_precision(model, {"conv": None})
    assert torch.equal(output(model, images), model(images).detach()), "one entry rules, not the old one beside it"
    nv.set_precision(model, {"conv": NO_2D})
    assert torch.equal(output(model, images), before)


def test_a_pickled_fused_model_trains_as_the_plain_one(images: Tensor) -> None:
    fused = torch.load(FILES / "model_fuse.pt", weights_only=False).train()
    plain = net()
    layers = OrderedDict(plain.named_children())
    norm = nn.BatchNorm2d(16)
    plain = nn.Sequential(OrderedDict([("conv", layers.pop("conv")), ("norm", norm), *layers.items()]))
    plain.load_state_dict(fused.state_dict())
    for model in (fused, plain):
        torch.manual_seed(1)
        with nv.nvfp4_autocast(backend="reference"):
            model(images).square().mean().backward()
    for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


# ---- tensors, quantizers, recipes -----------------------------------------------------------------------------------


@pytest.fixture(params=["objects.pt", "objects.pkl"])
def objects(request: pytest.FixtureRequest) -> dict[str, Any]:
    path = FILES / request.param
    return torch.load(path, weights_only=False) if path.suffix == ".pt" else pickle.loads(path.read_bytes())


def parts(t: nv.NVFP4Tensor) -> Iterator[tuple[str, Tensor]]:
    yield from (("data", t.rowwise_data), ("scale", t.rowwise_scale_inv.view(torch.uint8)), ("amax", t.amax_rowwise))
    if t.columnwise_data is not None:
        yield from (("columnwise data", t.columnwise_data), ("columnwise amax", t.amax_columnwise))
        yield "columnwise scale", t.columnwise_scale_inv.view(torch.uint8)
    yield "values", t.dequantize()


@pytest.mark.parametrize("name", ["rht", "2d", "4over6"])
def test_pickled_tensors_and_quantizers(name: str, objects: dict[str, Any], expected: dict[str, Any]) -> None:
    t, quantizer = objects["tensors"][name], objects["quantizers"][name]
    assert type(t) is nv.NVFP4Tensor and type(quantizer) is nv.NVFP4Quantizer
    assert t.quantizer == quantizer
    for made in (t, quantizer(expected["objects"]["x"])):
        found = dict(parts(made))
        assert found.keys() == expected["objects"][name].keys()
        for part, then in expected["objects"][name].items():
            assert torch.equal(found[part], then) and found[part].dtype == then.dtype, part


def test_pickles_of_coverage_reports_find_their_classes() -> None:
    report = nv.coverage(nn.Linear(32, 16), torch.randn(2, 32))
    for cls in (type(report), type(report.rows[0])):
        assert pickle.loads(f"cte_nvfp4_cv.coverage_report\n{cls.__name__}\n.".encode()) is cls


def test_pickled_recipes(objects: dict[str, Any]) -> None:
    found = objects["recipes"]
    assert found["default"] == nv.NVFP4BlockScaling() and found["default"].name == "default"
    table = nv.NVFP4BlockScaling(tensor_scale="delayed", precision=(("head", None), ("conv", NO_2D)))
    assert found["table"] == table == nv.load_recipe(FILES / "recipe.toml")
    assert found["table"].to_toml() == (FILES / "recipe.toml").read_text(encoding="utf-8")
    assert found["qparams"] == NO_2D.fp4_quant_bwd_grad
    for role in ("input", "weight", "grad_output"):
        assert found["table"].settings(role) == table.settings(role)
    assert hash(found["table"]) == hash(table) and repr(found["default"]) == repr(nv.load_recipe("default"))


def test_a_pickled_recipe_runs(objects: dict[str, Any], images: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(16, 16, 3)
    for old, new in ((objects["recipes"]["default"], None), (objects["recipes"]["table"].precision[1][1], NO_2D)):
        assert torch.equal(output(model, images, old), output(model, images, new))


# ---- exported files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["packed.safetensors", "sharded.safetensors.index.json"])
def test_packed_files(name: str, expected: dict[str, Any], images: Tensor) -> None:
    pytest.importorskip("safetensors", reason="the extra [export]")
    model = nv.export.load(FILES / name, net(), backend="reference")
    then = expected["files"][name.split(".")[0]]
    assert digests(model.state_dict()) == then["state"]
    torch.testing.assert_close(model(images), then["y"], **CLOSE)


def test_saving_a_packed_file_again_gives_its_tensors(tmp_path: Path) -> None:
    load_file = pytest.importorskip("safetensors.torch", reason="the extra [export]").load_file
    model = nv.export.load(FILES / "packed.safetensors", net())
    nv.export.save(model, tmp_path / "again")
    old, new = load_file(FILES / "packed.safetensors"), load_file(tmp_path / "again.safetensors")
    assert digests(old) == digests(new)


@pytest.mark.parametrize("name", ["packed.safetensors", "sharded.safetensors.index.json", "model.onnx"])
def test_the_verifier_finds_old_files_sound(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx" if name.endswith("onnx") else "safetensors", reason="the extra [export]")
    from te_nvfp4_cv.export.verify import verify

    report = verify(FILES / name)
    assert report.sound and "conv" in str(report)


def test_a_bundle(images: Tensor) -> None:
    kept = nv.sensitivity.load_bundle(FILES / "bundle.pt")
    assert (kept.step, kept.seeds, kept.loss, kept.reason) == (2, {"torch": 7}, 1.5, "loss 5, median 1")
    assert torch.equal(kept.batch[0], images) and kept.recipe_text == DELAYED.to_toml()
    model = net()
    model.load_state_dict(kept.model_state)
    torch.manual_seed(kept.nvfp4_state["sr_seed"])
    nv.extra_state(model, load=kept.nvfp4_state)
    assert same(nv.extra_state(model)["scales"], kept.nvfp4_state["scales"])


# ---- a run of the example trainer -----------------------------------------------------------------------------------


def test_a_trainers_folder_is_resumed(
    expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("torchvision", "torchmetrics", "pycocotools"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the example needs the extra [train]: {package} is not installed")
    from unet_coco.train import main

    options = expected["trainer"]["options"]
    shutil.copytree(FILES, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    before = torch.load("run/nvfp4/last.pt", weights_only=True)
    assert before["position"]["step"] == 2 and len(before["nvfp4"]["scales"]) > 10
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation")  # pycocotools on numpy 2
        main([*options, "--steps", "2", "--resume"])  # nothing left to do: what is written is what was read
        unchanged = torch.load("run/nvfp4/last.pt", weights_only=True)
        end = main([*options, "--resume"])["nvfp4"]
    assert "resumed at step 2" in capsys.readouterr().out
    for part in ("model", "optimizer", "nvfp4"):
        assert same(unchanged[part], before[part])
    after = torch.load("run/nvfp4/last.pt", weights_only=True)
    assert after["position"]["step"] == 4 and after["identity"] == before["identity"]
    assert not same(after["model"], before["model"])
    for key, then in expected["trainer"]["end"].items():  # codes of other roundings upstream: not to the last digit
        assert end[key] == pytest.approx(then, rel=0.02), key
