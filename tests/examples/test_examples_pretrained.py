"""--backbone-weights of examples/unet_coco: each source of weights, what training makes of them, each refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from unet_coco.checkpoint import load_checkpoint
from unet_coco.detector import Detector
from unet_coco.levers import Bundles
from unet_coco.options import parse_options
from unet_coco.precision import parse_precisions
from unet_coco.pretrained import load_body
from unet_coco.rebuild import build
from unet_coco.train import main

from tests.examples.test_examples import same
from tests.examples.unet_coco_data import SMALL, draw_shapes

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools on numpy 2
    pytest.mark.usefixtures("one_thread"),
]
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> State:
    """A state_dict as torchvision publishes it: with batch norms that have seen images, and a classifier."""
    from torchvision.models import resnet18

    torch.manual_seed(7)
    model = resnet18()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.normal_()
    return model.state_dict()


def body() -> torch.nn.Module:
    return Detector(3, (32, 32), scale=0.0625, pretrained=True).get_submodule("backbone.body")


def is_that_of(state: State, body: State) -> bool:
    return bool(body) and all(torch.equal(t, state[name]) for name, t in body.items())


def test_a_file_a_url_and_torchvisions_own(weights: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import ResNet18_Weights

    torch.save(weights, tmp_path / "w.pt")
    save_file(weights, tmp_path / "w.safetensors")
    torch.save({f"module.{name}": t for name, t in weights.items()}, tmp_path / "ddp.pth")
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(weights, cache / ResNet18_Weights.DEFAULT.url.rpartition("/")[2])
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    files = [str(tmp_path / name) for name in ("w.pt", "w.safetensors", "ddp.pth")]
    for source in (*files, (tmp_path / "w.pt").as_uri(), "imagenet"):
        model = body()
        load_body(model, "resnet18", source)
        assert is_that_of(weights, model.state_dict()), source
    assert (cache / "w.pt").is_file(), "what a URL gave stays in the cache"


def test_a_body_computes_what_torchvisions_network_computes(weights: State, tmp_path: Path) -> None:
    from torchvision.models import resnet18

    torch.save(weights, tmp_path / "w.pt")
    load_body(ours := body(), "resnet18", str(tmp_path / "w.pt"))
    whole, images, seen = resnet18().eval(), torch.randn(2, 3, 32, 32), []
    whole.load_state_dict(weights)
    whole.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        whole(images)
        assert torch.allclose(list(ours.train()(images).values())[-1], seen[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_training_and_resuming(weights: State, tmp_path: Path) -> None:
    """Batch norms stay, weights learn, and a resume does not need the file again."""
    file = tmp_path / "w.pt"
    torch.save(weights, file)
    common = ["--data", str(draw_shapes(tmp_path)), "--task", "detection", *SMALL, "--precisions", "nvfp4"]
    common += ["--pictures", "0", "--epochs", "1", "--backbone-weights", str(file), "--no-bundles"]
    main([*common, "--out", str(tmp_path / "whole")])
    main([*common, "--out", str(tmp_path / "half"), "--steps", "2"])
    file.unlink()
    main([*common, "--out", str(tmp_path / "half"), "--resume"])
    whole, half = (load_checkpoint(tmp_path / name / "nvfp4" / "last.pt") for name in ("whole", "half"))
    same(whole, half)
    trained = {name.removeprefix("backbone.body."): t for name, t in whole["model"].items() if "backbone.body" in name}
    norms = {name: t for name, t in trained.items() if ".bn" in name or ".downsample.1" in name}
    assert is_that_of(weights, norms) and len(norms) == 4 * 19  # bn1 is among them, without a dot before it
    moved = [name for name, t in trained.items() if not torch.equal(t, weights[name])]
    assert len(moved) == 20, "every convolution"
    without = [word for word in common if word not in ("--backbone-weights", str(file))]
    with pytest.raises(ValueError, match=r"belongs to another run \(differing: architecture\)"):
        main([*without, "--out", str(tmp_path / "half"), "--resume"])


def test_a_bad_steps_bundle_builds_the_same_model_without_the_file(tmp_path: Path) -> None:
    settings = parse_options(["--task", "detection", "--scale", "0.0625", "--backbone-weights", "absent.pt"])
    precision = parse_precisions(["fp32"], "detection")[0]
    model, _ = build(Bundles(tmp_path, settings, precision, ["background", "a", "b"], None).arguments)
    expected = Detector(3, (96, 96), scale=0.0625, pretrained=True)
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in expected.state_dict().items()}


def test_what_cannot_be_used_is_refused(weights: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    torch.save({name: t for name, t in weights.items() if "layer4.1" not in name}, tmp_path / "part.pt")
    torch.save({**weights, "layer9.conv": torch.zeros(1)}, tmp_path / "more.pt")
    model = body()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for source, said in {
        str(tmp_path / "part.pt"): "does not fit the model; nothing was loaded[\\s\\S]*missing: layer4.1.conv1",
        str(tmp_path / "more.pt"): "unexpected: layer9.conv",
        str(tmp_path / "no.pt"): r"--backbone-weights: \S+no.pt is missing",
        "http://127.0.0.1:9/w.pt": "cannot be had[\\s\\S]*refused[\\s\\S]*hub/checkpoints/w.pt[\\s\\S]*copy it there",
        (tmp_path / "no.pt").as_uri(): "cannot be had",
    }.items():
        with pytest.raises((ValueError, RuntimeError), match=said):
            load_body(model, "resnet18", source)
    assert is_that_of(model.state_dict(), before)
    with pytest.raises(ValueError, match="--backbone-weights has no backbone to go to"):
        parse_options(["--backbone-weights", "imagenet"])
