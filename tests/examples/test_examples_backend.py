"""examples/unet_coco: a run records the backend of its NVFP4 layers, and a resume goes on with the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from te_nvfp4_cv import telemetry
from te_nvfp4_cv.backend import dispatch, native
from tests.examples.unet_coco_data import SMALL, draw_shapes

from unet_coco import checkpoint, tracking  # noqa: E402  isort: skip
from unet_coco.backends import backend_of, in_words, kernels_of  # noqa: E402  isort: skip
from unet_coco.precision import parse_precisions  # noqa: E402  isort: skip
from unet_coco.train import main  # noqa: E402  isort: skip

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(native.load() is None, reason="the integer backend needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools on numpy 2
]
CPU = torch.device("cpu")
NVFP4 = ["--precisions", "nvfp4", "--compute", "fp32", "--pictures", "0", *SMALL, "--scale", "0.25", "--epochs", "2"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_shapes(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn, and notes are told again."""
    monkeypatch.setattr("unet_coco.train.show_telemetry", lambda *_: [])
    monkeypatch.setattr(tracking, "_told", set())


def integers(monkeypatch: pytest.MonkeyPatch, passed: bool) -> None:
    """Say whether the integer kernels have passed their check, and so whether auto means them."""
    monkeypatch.setattr(dispatch, "_integer_passes", passed)


def train(shapes: Path, out: Path, steps: int, *more: str) -> dict[str, Any]:
    """Train to a step, and return the checkpoint."""
    main(["--data", str(shapes), "--out", str(out), *NVFP4, "--steps", str(steps), *more])
    return checkpoint.load_checkpoint(out / "nvfp4" / "last.pt")


def same_weights(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


def test_what_ran_is_recorded(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    integers(monkeypatch, True)
    state = train(shapes, tmp_path / "auto", 1)
    machine = kernels_of(CPU)
    assert state["backend"] == {"name": "integer or vendor", "kernels": machine} and state["args"]["backend"] == "auto"
    run = telemetry.read(tmp_path / "auto" / "nvfp4" / "telemetry.jsonl")
    assert run.backend == f"integer or vendor, kernels for {machine}"
    assert f"NVFP4 layers run on {run.backend}" in capsys.readouterr().out
    assert train(shapes, tmp_path / "vendor", 1, "--backend", "vendor")["backend"]["name"] == "vendor"
    plain, nvfp4 = parse_precisions(["fp32", "nvfp4"], "unet", backend="reference")
    assert in_words(plain, CPU) == "" and backend_of(nvfp4, CPU) == "reference"


@pytest.mark.parametrize("old", [True, False], ids=["without a record", "recorded"])
def test_a_run_of_the_time_when_auto_meant_vendor_stays_there(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, old: bool
) -> None:
    whole = train(shapes, tmp_path / "whole", 3, "--backend", "vendor")
    integers(monkeypatch, False)  # auto means vendor
    state = train(shapes, tmp_path / "out", 1)
    assert state["backend"]["name"] == "vendor"
    if old:
        del state["backend"], state["format"]
        checkpoint.save_checkpoint(tmp_path / "out" / "nvfp4" / "last.pt", state)
    integers(monkeypatch, True)
    resumed = train(shapes, tmp_path / "out", 3, "--resume")
    assert resumed["backend"]["name"] == "vendor" and same_weights(resumed, whole)
    assert "nvfp4 goes on with backend 'vendor', as it began" in capsys.readouterr().out


def test_a_run_on_integers_resumes_bit_exactly_and_only_where_they_run(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    integers(monkeypatch, True)
    whole = train(shapes, tmp_path / "whole", 3)
    train(shapes, tmp_path / "out", 1)
    integers(monkeypatch, False)
    for _ in range(2):  # nothing has changed on disk
        with pytest.raises(RuntimeError, match="on backend 'integer or vendor'; here: .*failed their check") as refusal:
            train(shapes, tmp_path / "out", 3, "--resume")
        assert "--backend vendor" in str(refusal.value)
    integers(monkeypatch, True)
    assert same_weights(train(shapes, tmp_path / "out", 3, "--resume"), whole)


def test_a_named_backend_has_priority_over_the_checkpoints(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    integers(monkeypatch, True)
    train(shapes, tmp_path, 1, "--backend", "integer")
    integers(monkeypatch, False)
    assert train(shapes, tmp_path, 2, "--resume")["backend"]["name"] == "integer"  # auto: as it began
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(native, "load", lambda: None)  # no compiler
        with pytest.raises(RuntimeError, match="on backend 'integer'(.|\n)*--backend vendor"):
            train(shapes, tmp_path, 3, "--resume")
    state = train(shapes, tmp_path, 3, "--resume", "--backend", "vendor")
    assert state["backend"]["name"] == "vendor" and state["position"]["step"] == 3
    assert "does not continue bit for bit" in capsys.readouterr().out


def test_a_backend_that_cannot_run_is_refused_before_training(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "load", lambda: None)  # no compiler
    with pytest.raises(RuntimeError, match="backend 'integer' cannot run here"):
        train(shapes, tmp_path, 1, "--backend", "integer")
    assert not (tmp_path / "nvfp4" / "last.pt").exists()
