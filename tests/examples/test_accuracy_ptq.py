"""The comparison of FP4 formats after training on photographs, with a small network in the place of MTCNN's."""

from __future__ import annotations

import json

import pytest
import torch
from accuracy import ptq_formats
from PIL import Image
from torch import nn


def test_formats_are_compared_over_photographs(tmp_path, monkeypatch, capsys):
    generator = torch.Generator().manual_seed(0)
    for folder, count in (("train2017", 1), ("val2017", 2)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            pixels = torch.randint(256, (60, 80, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(tmp_path / folder / f"{number}.jpg")
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, 4), nn.PReLU(32), nn.Conv2d(32, 32, 3, 4), nn.Flatten(), nn.Linear(288, 16)]
    monkeypatch.setattr(ptq_formats, "face_network", lambda: nn.Sequential(*layers, nn.Sigmoid()).eval())
    table = ptq_formats.main(["--images", str(tmp_path)])
    said = json.loads(capsys.readouterr().out)
    assert said["network"] == "MTCNN" and said["sets"] == 2 and list(said["formats"]) == list(ptq_formats.FORMS)
    for figures in table.values():
        assert figures["SNR, dB"]["mean, half"][0] > 15 and 0 <= figures["same answer, %"]["mean, half"][0] <= 100
    assert table["nvfp4"]["SNR, dB"]["to nvfp4: mean, half"] == pytest.approx((0, 0))
    x = ptq_formats.squares(tmp_path / "val2017" / "0.jpg", 5)
    assert x.shape == (5, 3, 48, 48) and x.abs().max() <= 1
    assert torch.equal(x, ptq_formats.squares(tmp_path / "val2017" / "0.jpg", 5))
