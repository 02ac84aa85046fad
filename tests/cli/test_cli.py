"""te-nvfp4-cv doctor and recipes: what they say, as text and as JSON, and the exit status."""

from __future__ import annotations

import json

import pytest
import torch

import te_nvfp4_cv
from te_nvfp4_cv import cli
from te_nvfp4_cv.backend import native
from te_nvfp4_cv.backend.explain import explain
from te_nvfp4_cv.cli import machine
from te_nvfp4_cv.recipe.files import list_recipes


def test_recipes(capsys):
    assert cli.main(["recipes"]) == 0
    text = capsys.readouterr().out
    assert all(name in text and description in text for name, description in list_recipes().items())
    assert cli.main(["recipes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == list_recipes()


def test_doctor_json(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] == torch.__version__ and report["problems"] == []
    cpu = report["devices"]["cpu"]
    assert cpu["backend"] == explain(torch.device("cpu"))["backend"] and cpu["why"]
    assert cpu["autocast dtype"].split(":")[0] in ("bfloat16", "none")
    assert len(report["devices"]) == 1 + torch.cuda.device_count()
    assert set(list_recipes()) == set(report["recipes"].split(", "))


def test_doctor_text(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in (
        "torch",
        "torchvision",
        "triton",
        "compiler",
        "backend",
        "autocast dtype",
        "memory format",
        "channels_last",
    ):
        assert word in text


def test_doctor_without_a_compiler(monkeypatch):
    monkeypatch.setattr(native, "compiler", lambda: None)
    assert machine.doctor()["compiler"].startswith("none: ")


def test_doctor_on_a_torch_that_is_too_old(monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", "2.10.0+cpu")
    assert cli.main(["doctor"]) == 2
    assert "outside >=2.11,<2.16" in capsys.readouterr().out


def test_autocast_dtype_follows_the_hardware(monkeypatch):
    for bf16, word in ((True, "bfloat16"), (False, "none")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda bf16=bf16: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert machine._autocast_dtype(torch.device("cpu")).startswith(word)


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"te-nvfp4-cv {te_nvfp4_cv.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["docter"], ["doctor", "--yaml"]], ids=str)
def test_a_wrong_command_line_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and "usage: te-nvfp4-cv" in capsys.readouterr().err
