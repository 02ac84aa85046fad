"""te-nvfp4-cv on a model: coverage, project, bench, quantize, export, verify; text, JSON and bad input."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import te_nvfp4_cv as nv
from te_nvfp4_cv import cli
from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.cli.pictures import Pictures, Preparation
from te_nvfp4_cv.export.ptq import calibration, post_training
from te_nvfp4_cv.report.projection import GPUS, project
from tests.networks import Net

safetensors = pytest.importorskip("safetensors.torch", reason="the extra [export]")
SIZE = ["--input", "3", "8", "8"]
SCALED = ["--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225"]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """MODEL and its checkpoint."""
    torch.manual_seed(0)
    file = tmp_path / f"network_{tmp_path.name}.py"  # each of its own name: Python keeps what it has imported
    file.write_text(
        "from tests.networks import Net\n\n\ndef build():\n    return Net()\n\n\ndef number():\n    return 3\n"
    )
    torch.save({"model": Net().state_dict()}, tmp_path / "w.pt")
    return [f"{file}:build", "--checkpoint", f"{tmp_path}/w.pt", *SIZE]


def told(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(5):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


def test_coverage(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["coverage", *model]) == 0
    assert "4 of 5 layers" in capsys.readouterr().out
    assert cli.main(["coverage", *model, "--recipe", "resnet", "--json"]) == 2  # the network has no layer fc
    assert "'fc'" in capsys.readouterr().err
    assert cli.main(["coverage", *model, "--json"]) == 0
    assert told(capsys)["nvfp4_layers"] == 4


def test_project(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for gpu in GPUS:
        assert cli.main(["project", *model, "--gpu", gpu]) == 0
        text = capsys.readouterr().out
        assert text.startswith("ESTIMATE for") and "training: bf16" in text and "(estimate:" in text
    assert cli.main(["project", *model, "--json"]) == 0
    found = told(capsys)
    assert found["estimate"] and len(found["assumptions"]) == 3 and len(found["layers"]) == 5
    assert cli.main(["project", *model, "--batch", "0"]) == 2
    capsys.readouterr()
    assert cli.main(["project", *model, "--batch", "32", "--memory", "adamw8bit", "--json"]) == 0
    memory = told(capsys)["memory"]
    assert memory["total_nvfp4"] - memory["saved_nvfp4"] == memory["total_bf16"] - memory["saved_bf16"]
    assert 0 < memory["saved_nvfp4"] < memory["saved_bf16"] and memory["optimizer"] == "adamw8bit"
    assert cli.main(["project", *model, "--batch", "0"]) == 2
    assert "batch >= 1" in capsys.readouterr().err


def test_layers_with_computed_weights_have_rows_of_their_own() -> None:
    norm = torch.nn.utils.parametrizations.weight_norm
    layers = [norm(torch.nn.Linear(64, 64)), norm(torch.nn.Linear(64, 8)), torch.nn.Linear(8, 64)]
    found = project(torch.nn.Sequential(*layers), torch.randn(1, 64)).layers
    assert [(row.name, row.nvfp4) for row in found] == [("0", True), ("1", False), ("2", False)]
    attention = torch.nn.MultiheadAttention(64, 2, batch_first=True)
    names = [row.name for row in project(attention, *[torch.randn(1, 4, 64)] * 3).layers]
    assert names == ["in_proj_weight", "out_proj"]


def test_the_estimate_by_hand() -> None:
    """One 1x1 convolution, so large that products rule: FLOPs over the rate; and the passes, bytes over bandwidth."""
    layer = torch.nn.Conv2d(1024, 1024, 1, bias=False)
    found = project(layer, torch.randn(1, 1024, 2, 2), gpu="b200", batch=4096, efficiency=1.0)
    (row,) = found.layers
    pixels, gpu = 4096 * 4, GPUS["b200"]
    flops = 2 * pixels * 1024 * 1024
    assert row.flops == flops and row.nvfp4 and row.name == ""
    elements, weights = pixels * 1024, 1024 * 1024
    bf16 = max(flops / gpu.bf16, (2 * (elements + weights) + 2 * elements) / gpu.bandwidth)
    assert row.infer_bf16 == pytest.approx(bf16)
    product = max(flops / gpu.fp4, (0.5625 * (elements + weights) + 2 * elements) / gpu.bandwidth)
    assert row.infer_nvfp4 == pytest.approx(product + 2.5625 * elements / gpu.bandwidth)
    high = project(layer, torch.randn(1, 1024, 2, 2), recipe=nv.NVFP4BlockScaling(precision={}), gpu="h200", batch=8)
    assert high.batch == 8 and "no FP4 tensor cores" in str(high)
    with nv.nvfp4_autocast(enabled=False):
        assert project(layer, torch.randn(1, 1024, 2, 2)).layers[0].nvfp4
    forward = nv.NVFP4BlockScaling(high_precision_gemms=("fprop",))
    (row,) = project(layer, torch.randn(1, 1024, 2, 2), gpu="b200", batch=4096, efficiency=1.0, recipe=forward).layers
    assert row.infer_nvfp4 == row.infer_bf16  # nothing is quantized
    backward = nv.NVFP4BlockScaling(high_precision_gemms=("dgrad", "wgrad"))
    (row,) = project(layer, torch.randn(1, 1024, 2, 2), gpu="b200", batch=4096, efficiency=1.0, recipe=backward).layers
    of_x, of_w = (2 + 0.5625) * elements, (4 + 0.5625) * weights  # no pass over dy, no second face of x
    assert row.train_nvfp4 == pytest.approx(2 * bf16 + product + (of_x + of_w) / gpu.bandwidth)


def test_bench(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *model, "--batch", "1", "2", "--rounds", "1", "--dtype", "bf16", "--json"]) == 0
    forms = {form["name"]: form for form in told(capsys)["forms"]}
    assert set(forms) == {"fp32", "bf16", "packed", "cached", "nvfp4 packed", "nvfp4 cached"}
    assert forms["packed"]["held_bytes"] < forms["bf16"]["held_bytes"] < forms["fp32"]["held_bytes"]
    assert all(form["ms_per_image"].keys() == {"1", "2"} for form in forms.values())
    assert cli.main(["bench", *model, "--batch", "1", "--rounds", "1"]) == 0
    assert "medians of 1 passes" in capsys.readouterr().out
    assert cli.main(["bench", *model, "--batch", "1", "--rounds", "1", "--dtype", "fp32", "--channels-last"]) == 0
    assert "/ fp32" in (text := capsys.readouterr().out) and "channels_last" in text and "bf16" not in text
    assert cli.main(["bench", *model, "--rounds", "0"]) == 2


def test_bench_compares_with_no_emulated_bf16(
    model: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["bench", *model, "--batch", "1", "--rounds", "1"]
    for has_units, default in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(dispatch, "bf16_is_native", lambda device, found=has_units: found)
        assert cli.main([*command, "--json"]) == 0
        assert (found := told(capsys))["dtype"] == default and not found["emulated"]
    assert cli.main([*command, "--dtype", "bf16"]) == 0
    text = capsys.readouterr().out
    assert "/ fp32" in text and "/ bf16" not in text and "bf16 is emulated" in text
    monkeypatch.setattr(dispatch, "bf16_is_native", lambda device: True)
    assert cli.main([*command, "--dtype", "bf16"]) == 0
    assert "/ bf16" in (text := capsys.readouterr().out) and "emulated" not in text


def test_quantize_verify_export(
    model: list[str], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "q.safetensors"
    command = ["quantize", *model, *SCALED, "--images", str(images), "--count", "4", "--batch", "2", "--out", str(out)]
    assert cli.main([*command, "--json"]) == 0
    assert told(capsys)["quantized"] == ["body.1", "body.4", "up", "head"]
    without = ["quantize", model[0], *SIZE, *command[command.index(SCALED[0]) : -1], str(tmp_path / "random")]
    assert cli.main([*without, "--method", "nearest"]) == 0
    assert "no --checkpoint: the weights are those that" in capsys.readouterr().err
    assert cli.main(["verify", str(out)]) == 0
    assert "Every claim holds" in capsys.readouterr().out
    loaded = nv.export.load(out, Net())
    assert loaded.head.input_amax is not None
    assert cli.main([*command, "--dynamic", "--method", "nearest", "--force"]) == 0
    assert nv.export.load(out, Net()).head.input_amax is None
    pytest.importorskip("onnxscript", reason="the extra [export]")
    made = tmp_path / "q.onnx"
    plain = [model[0], *SIZE]
    convert = ["export", *plain, "--packed", str(out), "--out", str(made), "--form", "portable"]
    assert cli.main([*convert, "--max-batch", "63"]) == 0
    assert cli.main([*convert, "--force", "--max-batch", "1"]) == 2
    assert cli.main(["verify", str(made), "--json"]) == 0


def test_export_of_a_trained_network(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text('[precision]\n"head" = "high"\n')
    command = ["export", *model, "--recipe", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "e.safetensors")]
    assert cli.main(command) == 0
    said = capsys.readouterr()
    assert "head: high precision" in said.out and "no --checkpoint" not in said.err
    assert cli.main(["export", model[0], "--out", str(tmp_path / "random")]) == 0
    assert "no --checkpoint: the weights are those that" in capsys.readouterr().err
    assert type(nv.export.load(tmp_path / "e.safetensors", Net()).head) is torch.nn.Linear


def test_an_error_of_the_users_code_comes_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(16, 16, 3)

        def forward(self, x):
            return self.conv(x)

    def broken():
        return Net().conv.weight.view(7)

    def chain():
        return torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3))
    """
    (tmp_path / "users_net.py").write_text(textwrap.dedent(code))
    monkeypatch.chdir(tmp_path)
    for function, line in (("broken", "return Net().conv.weight.view(7)"), ("Net", "return self.conv(x)")):
        assert cli.main(["coverage", f"users_net.py:{function}", "--input", "3", "8", "8"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("Traceback") and line in error and "\nerror: RuntimeError: " in error
    assert cli.main(["coverage", "users_net.py:chain", "--input", "3", "8", "8"]) == 2  # --input is what is wrong
    assert capsys.readouterr().err.startswith("error: Given groups=1")


def test_bad_input(model: list[str], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(arguments: list[str], words: str) -> None:
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error, error

    file = model[0].rpartition(":")[0]
    refused(["coverage", f"{file}:nothing", *SIZE], "no function")
    refused(["coverage", f"{file}:number", *SIZE], "only try, and scan without --images")
    refused(["coverage", "nowhere.py:build", *SIZE], "no such file")
    refused(["coverage", "resnet18", *SIZE], "torchvision.models:resnet18, timm:resnet18, or model.py:build")
    refused(["coverage", "net.py", *SIZE], "fix:   net.py:build")
    refused(["coverage", model[0], "--checkpoint", str(tmp_path / "none.pt")], "cannot be read")
    torch.save(torch.nn.Linear(3, 3).state_dict(), tmp_path / "other.pt")
    refused(["coverage", model[0], "--checkpoint", str(tmp_path / "other.pt")], "do not fit the model")
    torch.save([1, 2], tmp_path / "list.pt")
    refused(["coverage", model[0], "--checkpoint", str(tmp_path / "list.pt")], "is no state_dict")
    refused(["coverage", *model[:3], "--input", "0"], "out of range")
    refused(["coverage", *model, "--recipe", "none"], "none")
    out = ["--out", str(tmp_path / "q.safetensors")]
    refused(["quantize", *model, *SCALED, "--images", str(tmp_path / "empty"), *out], "no such folder")
    (images / "broken.png").write_bytes(b"text")
    refused(["quantize", *model, *SCALED, "--images", str(images), "--strict", *out], "broken.png cannot be read")
    refused(["quantize", *model, "--images", str(images), *out], "how does the model want its pictures")
    refused(["quantize", *model, "--mean", "0.5", "--images", str(images), *out], "belong together")
    refused(["quantize", *model, "--range", "1", "0", "--images", str(images), *out], "out of range")
    refused(["quantize", *model[:3], "--input", "7", "--images", str(images), *out], "3 HEIGHT WIDTH")
    refused(["export", *model, "--out", str(tmp_path / "x.onnx")], "do not go together")
    refused(["verify", str(tmp_path / "none.safetensors")], "no such exported file")
    refused(["bench", *model, "--device", "cuda:99"], "bench: device not usable")


def test_a_model_that_fails_is_no_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "failing_model.py"
    file.write_text(
        "import torch\n\n\ndef build():\n    return {}['width']\n\n\ndef other():\n    assert False, 'no'\n"
    )
    for function, told_ in (("build", "error: KeyError: 'width'"), ("other", "error: AssertionError: no")):
        assert cli.main(["coverage", f"{file}:{function}"]) == 2
        assert told_ in (text := capsys.readouterr().err) and "failing_model.py" in text
    other = tmp_path / "other_build.py"
    other.write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    assert cli.main(["coverage", f"{other}:build"]) == 2
    assert "torch and torchvision of one build" in capsys.readouterr().err


def test_no_file_is_replaced_unasked(
    model: list[str], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "net.safetensors"
    safetensors.save_file(Net().state_dict(), out)
    before = out.read_bytes()
    own = [model[0], "--checkpoint", str(out), *SIZE]
    commands = {
        "export": [*own, "--out", str(tmp_path / "net")],
        "quantize": [*own, *SCALED, "--images", str(images), "--out", str(out)],
    }
    for command, arguments in commands.items():
        assert cli.main([command, *arguments, "--force"]) == 2
        assert "is what is read" in capsys.readouterr().err
        arguments[2] = model[2]  # the same weights in another file
        assert cli.main([command, *arguments]) == 2
        assert "exists; name a new one" in capsys.readouterr().err
        assert out.read_bytes() == before
        assert cli.main([command, *arguments, "--force"]) == 0
        out.write_bytes(before)
    index = str(tmp_path / "net.safetensors.index.json")
    assert cli.main(["export", *own, "--out", index, "--force"]) == 2  # it would be written to net.safetensors
    assert "is what is read" in capsys.readouterr().err and out.read_bytes() == before
    nv.export.save(Net(), tmp_path / "big", shard_bytes=4000)
    shards = sorted(tmp_path.glob("big*"))
    assert len(shards) > 2
    assert cli.main(["export", *model, "--out", str(tmp_path / "big.safetensors")]) == 2
    assert "exists" in capsys.readouterr().err and sorted(tmp_path.glob("big*")) == shards
    packed = [model[0], *SIZE, "--packed", str(out), "--out", str(tmp_path / "x.onnx")]
    assert cli.main(["export", *packed, "--recipe", "unet"]) == 2
    assert "do not go together" in capsys.readouterr().err


def test_all_images_of_the_count_are_used_from_the_whole_folder(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        (tmp_path / "photos" / f"class{number // 3}").mkdir(parents=True, exist_ok=True)
        pixels = np.full((4, 4, 3), number, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"class{number // 3}" / f"{number:02}.png")
    prepared = Preparation((0.5,), (0.5,))
    chosen = Pictures(tmp_path / "photos", (4, 4), 1, 20, prepared).paths
    assert len(chosen) == 20 and len({path.parent for path in chosen}) == 10
    assert len(Pictures(tmp_path / "photos", (4, 4), 1, 99, prepared).paths) == 30
    rows: list[int] = []
    collect = calibration.collect

    def counted(*arguments: Any) -> Any:
        found = collect(*arguments)
        rows.append(max(statistics.rows for statistics in found.values()))
        return found

    monkeypatch.setattr(post_training, "collect", counted)
    command = ["quantize", *model, *SCALED, "--images", str(tmp_path / "photos"), "--count", "20", "--batch", "1"]
    assert cli.main([*command, "--out", str(tmp_path / "q.safetensors")]) == 0
    assert rows == [19 * 8 * 8]  # pixels of 20 images of 8 x 8, of which the report holds the last batch back
