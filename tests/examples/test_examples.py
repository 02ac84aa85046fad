"""examples/unet_coco as a whole: short runs in every precision, bit-exact resume, what a run leaves.

Refusals are tested too. Small images, a few steps, no download.
"""

from __future__ import annotations

import errno
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from unet_coco import checkpoint, tracking
from unet_coco.data import load_data
from unet_coco.engine import Trainer
from unet_coco.options import parse_options
from unet_coco.precision import parse_precisions
from unet_coco.report import palette
from unet_coco.train import main

import te_nvfp4_cv as nv
from te_nvfp4_cv import errors, files, telemetry
from te_nvfp4_cv.telemetry import Telemetry, attach
from tests.examples.unet_coco_data import EXAMPLES, KEYS, SMALL, draw_shapes, write_masks
from tests.helpers import run_script, seeds
from tests.telemetry.fake_wandb import FakeRun, fake_wandb

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools on numpy 2


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Images of 32x32 gain nothing from threads, which only wait for each other where tests share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_shapes(tmp_path_factory.mktemp("data"))


@pytest.fixture
def masks_root(tmp_path: Path) -> Path:
    return write_masks(tmp_path)


def check_run(out: Path, rows: dict[str, Any], names: list[str], extra: set[str]) -> None:
    """What every finished run leaves."""
    assert json.loads((out / "summary.json").read_text()) == rows and list(rows) == names
    for row in rows.values():
        assert set(row) == KEYS | extra and all(math.isfinite(value) for value in row.values())
        assert row["step_ms"] > 0 and row["saved_bytes"] > 0
    assert "precision" in (out / "table.md").read_text() and len(
        (out / "table.csv").read_text().splitlines()
    ) == 1 + len(names)
    sheet = Image.open(out / "predictions.png")
    assert sheet.width > 32 * (2 + len(names))
    colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 20)}
    classes = checkpoint.load_checkpoint(out / names[0] / "last.pt")["identity"]["architecture"]["classes"]
    assert {tuple(colour) for colour in palette(len(classes))[: len(classes)].tolist()} <= colours, "the legend"
    assert all((out / name / "last.pt").is_file() for name in names)


def test_coco_layout_two_steps(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = main(["--data", str(shapes), "--precisions", "fp32", "bf16", "--steps", "2", "--out", str(tmp_path), *SMALL])
    check_run(tmp_path, rows, ["fp32", "bf16"], set())
    assert rows["bf16"]["saved_bytes"] < 0.8 * rows["fp32"]["saved_bytes"]
    assert rows["bf16"]["train_loss"] == pytest.approx(rows["fp32"]["train_loss"], rel=0.02), "same seed, same batches"
    printed = capsys.readouterr().out
    assert "| bf16" in printed and "predictions.png" in printed and "table.md" in printed


def test_masks_layout_two_steps_fp16_and_silu(masks_root: Path, tmp_path: Path) -> None:
    options = ["--layout", "masks", "--activation", "silu", "--precisions", "fp16", "--steps", "2", "--workers", "1"]
    rows = main(["--data", str(masks_root), *options, "--out", str(tmp_path / "out"), *SMALL])
    check_run(tmp_path / "out", rows, ["fp16"], {"test_dice", "test_miou"})


def test_loss_falls(shapes: Path, tmp_path: Path) -> None:
    main(
        ["--data", str(shapes), "--precisions", "bf16", "--epochs", "6", "--lr", "0.01", "--out", str(tmp_path), *SMALL]
    )
    epochs = json.loads((tmp_path / "history.json").read_text())["bf16"]["epochs"]
    assert len(epochs) == 6 and epochs[-1]["train_loss"] < 0.9 * epochs[0]["train_loss"]


def same(a: Any, b: Any, where: str = "") -> None:
    """Bit-equality of two checkpoints; times and what was asked for by options may differ."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("args", "step_ms", "first_ms"):
                same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b) and a.dtype == b.dtype, where
    else:
        assert a == b or (a != a and b != b), where


@pytest.mark.parametrize("precision", seeds(["bf16", "nvfp4"], ["fp32"]))
def test_resume_is_bit_exact(shapes: Path, tmp_path: Path, precision: str) -> None:
    """2 epochs of 3 steps in one go, against stops in the middle of an epoch and at the end of one."""
    scale = ["--scale", "0.25"] if precision == "nvfp4" else []
    common = ["--data", str(shapes), "--precisions", precision, "--epochs", "2", *SMALL, *scale]
    straight = main([*common, "--out", str(tmp_path / "straight")])
    stops = [["--steps", "2"], ["--steps", "3", "--resume"], ["--resume"]]
    for number, stop in enumerate(stops):
        torch.manual_seed(number)  # what ran before must not matter
        resumed = main([*common, *stop, "--out", str(tmp_path / "resumed")])
    a, b = (checkpoint.load_checkpoint(tmp_path / name / precision / "last.pt") for name in ("straight", "resumed"))
    assert a["position"]["step"] == 6 and len(a["position"]["epochs"]) == 2
    same(a, b)
    assert {k: v for k, v in straight[precision].items() if k != "step_ms"} == {
        k: v for k, v in resumed[precision].items() if k != "step_ms"
    }


def test_resume_after_the_end_only_evaluates(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(shapes), "--precisions", "fp32", "--epochs", "1", "--out", str(tmp_path), *SMALL]
    run = FakeRun()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake_wandb(monkeypatch, {"offline": run})
    rows = main([option for option in options if option != "--no-wandb"])
    logged = {name: value for values in run.logged for name, value in values.items()}
    columns, cells = logged["predictions_by_image"]
    assert columns == ["image", "truth", "predicted"] and len(cells) == 4
    assert run.finished and {"predictions", "train/loss"} <= logged.keys()
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in capsys.readouterr().out
    assert main([*options, "--resume"]) == rows


def test_works_without_wandb_tqdm_and_matplotlib(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("wandb", "tqdm", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(tracking, "_told", set())
    monkeypatch.setattr(errors, "_warned", set())
    options = [option for option in SMALL if option != "--no-wandb"]
    with pytest.warns(UserWarning, match="wandb is not installed") as told:
        main(["--data", str(shapes), "--precisions", "fp32", "bf16", "--steps", "1", "--out", str(tmp_path), *options])
    printed = capsys.readouterr().out
    assert all(printed.count(f"{name} is not installed") == 1 for name in ("tqdm", "matplotlib"))
    assert sum("wandb" in str(warning.message) for warning in told) == 1


def make_trainer(shapes: Path, tmp_path: Path, precision: str = "fp32", options: tuple[str, ...] = ()) -> Trainer:
    settings = parse_options(["--data", str(shapes), "--out", str(tmp_path), *SMALL, *options])
    data = load_data(shapes, "coco", settings.classes)
    return Trainer(parse_precisions([precision], "unet")[0], settings, data, torch.device("cpu"), tmp_path)


def quiet(trainer: Trainer) -> Telemetry:
    return attach(trainer.model, every=0)


@pytest.mark.parametrize(
    ("precision", "options", "named"),
    [
        ("bf16", (), "precision"),
        ("fp32", ("--scale", "0.125"), "architecture"),
        ("fp32", ("--activation", "silu"), "architecture"),
        ("fp32", ("--classes", "circle"), "architecture"),
        ("fp32", ("--batch-size", "5"), "data order"),
        ("fp32", ("--seed", "1"), "data order"),
    ],
)
def test_checkpoint_of_another_run(
    shapes: Path, tmp_path: Path, precision: str, options: tuple[str, ...], named: str
) -> None:
    make_trainer(shapes, tmp_path)._save()
    with pytest.raises(ValueError, match=rf"last.pt belongs to another run \(differing: {named}\)"):
        make_trainer(shapes, tmp_path, precision, options).resume()


def test_checkpoint_of_another_recipe(tmp_path: Path) -> None:
    now = {"precision": "nvfp4", "recipe": "disable_rht = false\n"}
    with pytest.raises(
        ValueError, match=r"differing: recipe[\s\S]*got: .*disable_rht = true[\s\S]*needs: .*disable_rht = false"
    ):
        checkpoint.check_identity(tmp_path / "last.pt", {**now, "recipe": "disable_rht = true\n"}, now)


def test_damaged_checkpoint(shapes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(shapes, tmp_path)
    trainer._save()
    whole = trainer.checkpoint_path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text"):
        trainer.checkpoint_path.write_bytes(content)
        with pytest.raises(ValueError, match="last.pt cannot be read"):
            trainer.resume()
    torch.save({"weights": torch.zeros(1)}, trainer.checkpoint_path)
    with pytest.raises(ValueError, match="not a checkpoint of this example"):
        trainer.resume()


def test_full_disk_leaves_the_old_checkpoint(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(shapes, tmp_path, options=("--steps", "2"))
    trainer.train(quiet(trainer))
    old = trainer.checkpoint_path.read_bytes()

    def half(file: Any, content: memoryview) -> None:
        file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_write_all", half)
    trainer.total_steps = 3
    with pytest.raises(RuntimeError, match=r"last.pt could not be written[\s\S]*No space left[\s\S]*--resume"):
        trainer.train(quiet(trainer))
    monkeypatch.undo()
    assert trainer.checkpoint_path.read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"], "no draft is left"
    resumed = make_trainer(shapes, tmp_path)
    assert resumed.resume() and resumed.position.step == 2


def test_disk_full_for_real(tmp_path: Path) -> None:
    """The operating system refuses the write in the middle: a limit on file size stands in for a full disk."""
    resource = pytest.importorskip("resource", reason="file size limits exist on POSIX only")
    path = tmp_path / "last.pt"
    checkpoint.save_checkpoint(path, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(RuntimeError, match="untouched"):
            checkpoint.save_checkpoint(path, {"step": 2, "weights": torch.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.load_checkpoint(path)["step"] == 1 and len(list(tmp_path.iterdir())) == 1


def test_divergence_is_an_error(shapes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(shapes, tmp_path, options=("--steps", "3"))
    with torch.no_grad():
        trainer.model.head.bias.fill_(math.nan)
    with pytest.raises(RuntimeError, match=r"diverged[\s\S]*loss nan at step 1"):
        trainer.train(quiet(trainer))
    assert not trainer.checkpoint_path.exists()


def test_the_command_line_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_script(EXAMPLES / "unet_coco" / "train.py", "--data", "absent", "--precisions", "fp32") == 1
    told = capsys.readouterr().err
    assert told.startswith("error: data: absent is missing.") and "Traceback" not in told


def test_nvfp4_beside_bf16(shapes: Path, tmp_path: Path) -> None:
    options = ["--precisions", "bf16", "nvfp4", "no_rht", "--compute", "bf16"]
    options += ["--scale", "0.25", "--steps", "2", "--batch-size", "8"]
    rows = main(["--data", str(shapes), "--out", str(tmp_path), *SMALL, *options])
    check_run(tmp_path, rows, ["bf16", "nvfp4", "no_rht"], set())
    assert rows["nvfp4"]["nvfp4_flops_share"] > 0.5 and rows["bf16"]["nvfp4_flops_share"] == 0
    assert rows["nvfp4"]["saved_bytes"] < rows["bf16"]["saved_bytes"]
    assert rows["nvfp4"]["train_loss"] == pytest.approx(rows["bf16"]["train_loss"], rel=0.1)


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Runs draw no telemetry, which takes longer than they do, until the patch is undone."""
    with monkeypatch.context() as patch:
        patch.setattr("unet_coco.train.show_telemetry", lambda *_: [])
        yield patch


def test_telemetry_does_not_change_a_run_and_goes_on_with_a_resume(
    shapes: Path, tmp_path: Path, no_drawing: None
) -> None:
    common = ["--data", str(shapes), "--precisions", "nvfp4", "--epochs", "2", *SMALL, "--scale", "0.25"]
    main([*common, "--telemetry-every", "0", "--out", str(tmp_path / "unseen")])
    for stop in (["--steps", "4"], ["--resume"]):
        main([*common, *stop, "--telemetry-every", "2", "--tensorboard", "--out", str(tmp_path / "seen")])
    a, b = (checkpoint.load_checkpoint(tmp_path / name / "nvfp4" / "last.pt") for name in ("unseen", "seen"))
    same(a, b)
    assert not telemetry.read(tmp_path / "unseen" / "nvfp4" / "telemetry.jsonl").steps
    run = telemetry.read(tmp_path / "seen" / "nvfp4" / "telemetry.jsonl")
    assert list(run.steps) == [0, 2, 3, 4, 5] and (run.name, run.group, run.model) == ("nvfp4", "seen", "UNet")
    assert run.steps[4]["down.3.conv.0"]["precision"] == "nvfp4" and run.steps[4]["head"]["precision"] == "high"
    assert {"train/loss", "val/miou"} <= set(run.scalars[6]) | set(run.scalars[3])
    assert list((tmp_path / "seen" / "tensorboard" / "nvfp4").glob("events.*"))
    before = {path: path.read_bytes() for path in (tmp_path / "seen").rglob("*") if path.is_file()}
    main([*common, "--telemetry-every", "2", "--out", str(tmp_path / "seen")])  # a new run leaves the old one alone
    assert all(path.read_bytes() == content for path, content in before.items())
    again = telemetry.read(tmp_path / "seen_2" / "nvfp4" / "telemetry.jsonl")
    assert list(again.steps) == [0, 2, 4, 5] and again.group == "seen_2"


def test_the_last_epochs_in_high_precision(shapes: Path, tmp_path: Path, no_drawing: pytest.MonkeyPatch) -> None:
    common = ["--data", str(shapes), "--precisions", "nvfp4", "--epochs", "3", *SMALL, "--scale", "0.25"]
    main([*common, "--high-precision-last", "1", "--telemetry-every", "3", "--out", str(tmp_path)])
    run = telemetry.read(tmp_path / "nvfp4" / "telemetry.jsonl")
    precisions = [layers["down.3.conv.0"]["precision"] for layers in run.steps.values()]
    assert list(run.steps) == [0, 3, 6, 8] and precisions == ["nvfp4", "nvfp4", "high", "high"]

    trainer = make_trainer(shapes, tmp_path, "nvfp4", ("--epochs", "3", "--high-precision-last", "1"))
    at, enabled = trainer.position, []
    for at.step, at.epoch, at.batch in ((0, 0, 0), (3, 1, 0), (6, 2, 0), (7, 2, 1), (9, 3, 0)):
        with trainer.context():  # to evaluate: the precision of the last step
            enabled.append(nv.active_recipe() is not None)
    assert enabled == [True, True, True, False, False]
