"""Start from trained weights in examples/unet_coco: each form of file, each refusal, and what training makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from unet_coco.checkpoint import load_checkpoint
from unet_coco.data import load_data
from unet_coco.engine import Trainer
from unet_coco.initial import load_initial
from unet_coco.options import parse_options
from unet_coco.precision import parse_precisions
from unet_coco.train import main
from unet_coco.unet import UNet

import te_nvfp4_cv as nv
from tests.examples.unet_coco_data import SMALL, draw_shapes

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools on numpy 2
State = dict[str, Tensor]


def unet(classes: int = 3, seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(classes, scale=0.0625)


def state_of(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_shapes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of two steps in fp32."""
    out = tmp_path_factory.mktemp("trained")
    main(["--data", str(shapes), "--precisions", "fp32", "--steps", "2", "--out", str(out), "--pictures", "0", *SMALL])
    return out / "fp32" / "last.pt"


def prefixed(*prefixes: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for prefix in prefixes for name, tensor in state.items()}


FORMS: dict[str, tuple[str, Callable[[State], Any]]] = {
    "state_dict": ("w.pt", dict),
    "DDP": ("w.pth", prefixed("module.")),
    "compiled DDP": ("w.pt", prefixed("module._orig_mod.")),
    "DDP compiled": ("w.pt", prefixed("_orig_mod.module.")),
    "compiled block": ("w.pt", lambda s: {name.replace("stem.", "stem._orig_mod."): t for name, t in s.items()}),
    "safetensors": ("w.safetensors", dict),
    "safetensors of DDP": ("w.safetensors", prefixed("module.")),
}


def write(path: Path, state: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path: Path, form: str) -> None:
    name, change = FORMS[form]
    source = state_of(unet(seed=1))
    path = write(tmp_path / name, change(source))
    model = unet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = dict(model.named_parameters())
    load_initial(model, path)
    assert equal(state_of(model), source)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters()), "the same objects"
    assert parameters["down.1.conv.0.weight"].is_contiguous(memory_format=torch.channels_last)


def test_checkpoint_of_this_trainer(trained: Path) -> None:
    state = load_checkpoint(trained)
    model = unet(len(state["identity"]["architecture"]["classes"]), seed=7)
    load_initial(model, trained)
    assert equal(state_of(model), state["model"])


def test_half_precision_weights_are_widened(tmp_path: Path) -> None:
    source = {name: tensor.bfloat16() for name, tensor in state_of(unet(seed=1)).items()}
    model = unet()
    load_initial(model, write(tmp_path / "w.safetensors", source))
    assert equal(state_of(model), {name: tensor.float() for name, tensor in source.items()})


def test_skipped_tensors_stay_fresh(tmp_path: Path) -> None:
    source = state_of(unet(classes=5, seed=1))
    path = write(tmp_path / "w.pt", {**source, "aux.weight": torch.zeros(2)})
    model = unet(classes=3)
    fresh = state_of(model)
    load_initial(model, path, ("head.*", "aux.*"))
    own = {name: fresh[name] if name.startswith("head.") else tensor for name, tensor in source.items()}
    assert equal(state_of(model), own)
    with pytest.raises(ValueError, match=r"--init-skip heads\.\* names no tensor[\s\S]*stem.0.weight"):
        load_initial(model, path, ("heads.*", "head.*"))
    load_initial(
        model, write(tmp_path / "without.pt", {n: t for n, t in source.items() if "head" not in n}), ("head.*",)
    )


def renamed(state: State) -> State:
    """Everything that can be wrong at once: four tensors missing or renamed, one of each other kind."""
    state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    state["classifier.weight"] = torch.zeros(1)
    state["extra"] = torch.zeros(1)
    state["stem.0.weight"] = state["stem.0.weight"][:, :1]
    state["stem.1.weight"] = torch.ones(4, dtype=torch.int64)
    state["stem.1.bias"] = state["stem.1.bias"] * torch.inf
    return state


def test_everything_that_does_not_fit_is_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pt", renamed(state_of(unet(seed=1))))
    model = unet()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"w.pt does not fit the model; nothing was loaded") as caught:
        load_initial(model, path)
    assert equal(state_of(model), before)
    got = next(line for line in str(caught.value).splitlines() if line.startswith("  got:"))
    assert got.removeprefix("  got:   ").split("; ") == [
        "missing: head.weight, head.bias",
        "unexpected: classifier.weight, extra",
        "of another shape: stem.0.weight (4, 1, 3, 3) for (4, 3, 3, 3)",
        "of another kind: stem.1.weight torch.int64 for torch.float32",
        "not finite: stem.1.bias",
    ]


def test_all_names_are_listed(tmp_path: Path) -> None:
    model = unet()
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_initial(model, write(tmp_path / "w.pt", {"other": torch.zeros(1)}))
    assert all(name in str(caught.value) for name in model.state_dict())


BAD_FILES: dict[str, tuple[str, Callable[[State], Any], str]] = {
    "module": ("w.pt", lambda _: unet(), "w.pt cannot be read"),
    "tensor": ("w.pt", lambda s: s["head.bias"], r"contains no weights[\s\S]*\(3,\) float32"),
    "list": ("w.pt", lambda s: list(s.values()), r"contains no weights[\s\S]*list"),
    "empty": ("w.pt", lambda _: {}, r"contains no weights[\s\S]*an empty table"),
    "others": ("w.pt", lambda s: {"epoch": 3, "state_dict": s}, r"no weights[\s\S]*epoch: int, state_dict: dict"),
    "another format": ("w.pt", lambda s: {"format": 99, "model": s}, r"is not a checkpoint[\s\S]*format 99"),
    "twice": ("w.pt", prefixed("", "module."), "contains a tensor twice"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_foreign_files(tmp_path: Path, case: str) -> None:
    name, make, message = BAD_FILES[case]
    model = unet()
    path = write(tmp_path / name, make(state_of(model)))
    with pytest.raises(ValueError, match=message):
        load_initial(model, path)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, state_of(unet(seed=1)))
    whole, model = path.read_bytes(), unet()
    before = state_of(model)
    for content in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"--init-from: .*{name} cannot be read"):
            load_initial(model, path)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing[\s\S]*no such file"):
        load_initial(model, path)
    with pytest.raises(ValueError, match=r"is missing[\s\S]*a folder"):
        load_initial(model, tmp_path)
    assert equal(state_of(model), before)


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "w.safetensors", state_of(unet()))
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(RuntimeError, match=r"needs the package safetensors[\s\S]*pip install safetensors"):
        load_initial(unet(), path)


# ---- in the trainer --------------------------------------------------------------------------------------------------


def make_trainer(shapes: Path, out: Path, precision: str, *options: str) -> Trainer:
    settings = parse_options(["--data", str(shapes), "--out", str(out), *SMALL, "--compute", "fp32", *options])
    data = load_data(shapes, "coco", settings.classes)
    out.mkdir(exist_ok=True)
    found = parse_precisions([precision], "unet", compute=settings.compute)[0]
    return Trainer(found, settings, data, torch.device("cpu"), out)


def test_training_starts_from_the_weights(shapes: Path, trained: Path, tmp_path: Path) -> None:
    """fp32 -> NVFP4: the very weights, a fresh optimizer and schedule, and a run of its own."""
    source = load_checkpoint(trained)["model"]
    trainer = make_trainer(shapes, tmp_path, "nvfp4", "--init-from", str(trained))
    assert equal(state_of(trainer.model), source)
    assert not trainer.optimizer.state and trainer.position.step == 0
    by_skip = make_trainer(shapes, tmp_path, "fp32", "--init-from", str(trained), "--init-skip", "head.*,stem.*")
    fresh = state_of(make_trainer(shapes, tmp_path, "fp32").model)
    left = {name for name, tensor in state_of(by_skip.model).items() if not torch.equal(tensor, source[name])}
    assert {name.split(".")[0] for name in left} == {"head", "stem"}
    assert all(torch.equal(by_skip.model.state_dict()[name], fresh[name]) for name in left)


def test_another_number_of_classes(shapes: Path, trained: Path, tmp_path: Path) -> None:
    options = ["--init-from", str(trained), "--classes", "circle"]
    with pytest.raises(
        ValueError, match=r"of another shape: head.weight \(\d+, 4, 1, 1\) for \(2, 4, 1, 1\), head.bias"
    ):
        make_trainer(shapes, tmp_path, "fp32", *options)
    trainer = make_trainer(shapes, tmp_path, "fp32", *options, "--init-skip", "head.*")
    assert trainer.model.head.weight.shape[0] == 2


def test_a_checkpoint_found_by_resume_wins(shapes: Path, trained: Path, tmp_path: Path) -> None:
    common = ["--data", str(shapes), "--precisions", "fp32", "--out", str(tmp_path), "--pictures", "0", *SMALL]
    own = tmp_path / "fp32" / "last.pt"
    main([*common, "--init-from", str(trained), "--resume", "--steps", "1"])  # nothing to resume: the file's weights
    first = load_checkpoint(own)["model"]
    main([*common, "--init-from", str(tmp_path / "absent.pt"), "--resume", "--steps", "1"])  # not even read
    assert equal(load_checkpoint(own)["model"], first)
    main([*common, "--steps", "1"])  # into another folder: the first run stays
    anew = tmp_path.with_name(f"{tmp_path.name}_2") / "fp32" / "last.pt"
    assert not equal(load_checkpoint(anew)["model"], first), "the file's weights mattered"


def test_refusals_come_before_training(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--init-skip has nothing to skip"):
        parse_options(["--init-skip", "head.*"])
    with pytest.raises(ValueError, match=r"absent.pt is missing"):
        main(["--data", str(shapes), "--out", str(tmp_path), *SMALL, "--init-from", str(tmp_path / "absent.pt")])
    assert not list(tmp_path.rglob("last.pt"))


def test_learned_fractions_start_at_one_or_at_what_the_file_has(tmp_path: Path) -> None:
    plain = UNet(3, scale=0.25)
    model = UNet(3, scale=0.25)
    fractions = nv.learn_scales(model)
    load_initial(model, write(tmp_path / "plain.pt", state_of(plain)))
    assert torch.equal(model.stem[0].weight, plain.stem[0].weight) and all(float(f) == 1 for f in fractions)
    with torch.no_grad():
        fractions[0].fill_(0.5)
    again = UNet(3, scale=0.25)
    copies = nv.learn_scales(again)
    load_initial(again, write(tmp_path / "learned.pt", state_of(model)))
    assert [float(f) for f in copies] == [float(f) for f in fractions]
    with pytest.raises(ValueError, match=r"unexpected: .*weight_scale"):
        load_initial(plain, tmp_path / "learned.pt")
