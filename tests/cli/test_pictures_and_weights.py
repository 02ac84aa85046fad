"""The command line reads pictures as a model wants them and checkpoints as trainers write them; it guesses nothing."""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from te_nvfp4_cv.cli.pictures import Pictures, Preparation, check_pictures, picture_options, preparation_of
from te_nvfp4_cv.cli.weights import load_weights
from tests.helpers import same_bits

PLAIN = Preparation((0.0,), (1.0,))


def save(path: Path, pixels: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path)
    return path


def only(folder: Path, size: tuple[int, int], prepared: Preparation) -> torch.Tensor:
    (batch,) = Pictures(folder, size, 8, 8, prepared)
    return batch


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_range_mean_and_std(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.full((4, 4, 3), 51, dtype=np.uint8))
    assert float(only(tmp_path, (4, 4), Preparation((0.0,), (1.0,), (0.0, 255.0))).unique()) == 51.0
    assert float(only(tmp_path, (4, 4), Preparation((0.0,), (1.0,), (-1.0, 1.0))).unique()) == pytest.approx(-0.6)
    by_channel = only(tmp_path, (4, 4), Preparation((0.1, 0.2, 0.3), (1.0, 2.0, 4.0)))[0, :, 0, 0]
    torch.testing.assert_close(by_channel, torch.tensor([0.1, 0.0, -0.025]))


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.full((4, 4), 13107, dtype=np.uint16))  # a fifth of 65535
    x = only(tmp_path, (4, 4), PLAIN)
    assert x.shape == (1, 3, 4, 4) and float(x.unique()) == pytest.approx(0.2, abs=1e-6)


def test_resize_modes(tmp_path: Path) -> None:
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, 4:12] = 255  # the middle half is white
    save(tmp_path / "a.png", pixels)
    stretched, cropped, padded = (
        only(tmp_path, (8, 8), Preparation((0.0,), (1.0,), mode=mode))[0, 0] for mode in ("stretch", "crop", "pad")
    )
    assert float(cropped[:, 1:7].min()) > 0.9  # the middle, as it was
    assert float(padded[0].max()) == 0 == float(padded[-1].max()) and float(padded[4, 3:5].min()) > 0.9
    assert float(stretched[4, 0]) < 0.1 and float(stretched[4, 4]) > 0.9


def test_files_that_cannot_be_read_are_skipped_and_counted(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.zeros((4, 4, 3), dtype=np.uint8))
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "c.jpg").write_bytes(b"no picture")
    pictures = Pictures(tmp_path, (4, 4), 2, 9, PLAIN)
    assert [len(batch) for batch in pictures] == [1] and [p.name for p in pictures.skipped] == ["b.png", "c.jpg"]
    with pytest.raises(ValueError, match="b.png cannot be read"):
        list(Pictures(tmp_path, (4, 4), 2, 9, PLAIN, strict=True))
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="no file could be read"):
        list(Pictures(tmp_path, (4, 4), 2, 9, PLAIN))


def test_grey_beyond_sixteen_bits_is_not_clipped_to_white(tmp_path: Path) -> None:
    save(tmp_path / "a.tif", np.full((4, 4), 70000, dtype=np.int32))
    with pytest.raises(ValueError, match=r"a.tif cannot be read[\s\S]*beyond 16 bits"):
        list(Pictures(tmp_path, (4, 4), 2, 9, PLAIN, strict=True))


def test_a_narrow_picture_does_not_take_all_memory(tmp_path: Path) -> None:
    """Its middle, 224 pixels wide, would be cut from one of 224 x 4480000."""
    save(tmp_path / "a.png", np.zeros((20000, 1, 3), dtype=np.uint8))
    crop = Preparation((0.0,), (1.0,), mode="crop")
    with pytest.raises(ValueError, match=r"a.png cannot be read[\s\S]*1 x 20000 pixels are too narrow"):
        list(Pictures(tmp_path, (224, 224), 2, 9, crop, strict=True))
    for mode in ("stretch", "pad"):
        assert only(tmp_path, (224, 224), Preparation((0.0,), (1.0,), mode=mode)).shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--size", "0", "8"], "--size is out of range"),
        (["--size", "-8", "8"], "--size is out of range"),
        (["--mean", "nan", "--std", "1"], "--mean, --std or --range is out of range"),
        (["--mean", "0", "--std", "inf"], "one finite number or three"),
        (["--range", "0", "inf"], "one finite number or three"),
    ],
)
def test_numbers_that_no_picture_can_have(more: list[str], told: str) -> None:
    parser = argparse.ArgumentParser()
    picture_options(parser)
    options = parser.parse_args(["--images", "folder", *more])
    options.input, options.model = None, "m.py:net"
    with pytest.raises(ValueError, match=told):
        check_pictures("quantize", options)
        preparation_of(options, nn.Identity())


def test_a_picture_in_place_of_a_folder(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", np.zeros((4, 4, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"no pictures[\s\S]*a file"):
        Pictures(file, (4, 4), 2, 9, PLAIN)


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "a.png", np.zeros((4, 4, 3), dtype=np.uint8))
    (tmp_path / "images").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "images" / "linked")
    os.symlink(tmp_path / "images", tmp_path / "elsewhere" / "round")
    assert len(Pictures(tmp_path / "images", (4, 4), 2, 9, PLAIN).paths) == 1


def options(name: str, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    picture_options(parser)
    return parser.parse_args([name, "--images", "x", *words])


def test_what_timm_writes_into_a_model_is_taken() -> None:
    model = nn.Conv2d(3, 8, 3)
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 0.9, "crop_mode": "center"}  # type: ignore[assignment]
    assert preparation_of(options("x:y"), model) == Preparation((0.5,) * 3, (0.5,) * 3, mode="crop", kept=0.9)
    given = preparation_of(options("x:y", "--range", "0", "255", "--resize-mode", "pad"), model)
    assert given == Preparation((0.0,), (1.0,), (0.0, 255.0), "pad")
    with pytest.raises(ValueError, match="how does the model want its pictures"):
        preparation_of(options("x:y"), nn.Conv2d(3, 8, 3))


def test_what_torchvision_says_of_a_network_is_taken() -> None:
    pytest.importorskip("torchvision", reason="it knows how its networks want their pictures")
    found = preparation_of(options("torchvision.models:resnet50"), nn.Conv2d(3, 8, 3))
    assert found.mean == (0.485, 0.456, 0.406) and found.mode == "crop" and found.kept == pytest.approx(224 / 232)


# ---- weights --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 4)


def loaded(path: Path, held: Any, key: str | None = None) -> Net:
    torch.save(held, path)
    net = Net()
    load_weights(net, path, key)
    return net


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module.model.", "net.backbone."])
def test_prefixes_are_taken_off_when_all_fits_then(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    state = Net().state_dict()
    held = {"state_dict": {**{prefix + name: t for name, t in state.items()}, "criterion.weight": torch.ones(4)}}
    found = loaded(tmp_path / "w.pt", held)
    assert all(same_bits(t, state[name]) for name, t in found.state_dict().items())
    assert "taken off the names" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["model_ema", "net", "params_ema", "model_state_dict"])
def test_a_state_dict_under_any_name_is_found(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    state = Net().state_dict()
    momentum = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}
    found = loaded(tmp_path / "w.pt", {key: state, "optimizer": momentum, "epoch": 3})
    assert all(same_bits(t, state[name]) for name, t in found.state_dict().items())
    assert repr(key) in capsys.readouterr().err


def test_of_two_that_fit_the_user_chooses(tmp_path: Path) -> None:
    torch.manual_seed(0)
    held = {"state_dict": Net().state_dict(), "state_dict_ema": Net().state_dict()}
    with pytest.raises(ValueError, match="several state_dicts fit the model(.|\n)*state_dict, state_dict_ema"):
        loaded(tmp_path / "w.pt", held)
    found = loaded(tmp_path / "w.pt", held, key="state_dict_ema")
    assert same_bits(found.head.weight.detach(), held["state_dict_ema"]["head.weight"])
    with pytest.raises(ValueError, match="no state_dict of that name"):
        loaded(tmp_path / "w.pt", held, key="ema")


def test_a_blocked_class_is_named_without_escape_codes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="argparse.Namespace") as told:
        loaded(tmp_path / "w.pt", {"model": Net().state_dict(), "args": argparse.Namespace(lr=1)})
    assert "\x1b" not in str(told.value) and "weights_only=False" in str(told.value)
