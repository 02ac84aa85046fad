"""examples/unet_coco: a folder belongs to one run, a resume goes on with the run's own files, and ends are one line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from te_nvfp4_cv import telemetry
from tests.examples.unet_coco_data import EXAMPLES, SMALL, draw_shapes, write_masks
from tests.helpers import run_script

from unet_coco import checkpoint, identity, ranks, tracking  # noqa: E402  isort: skip
from unet_coco.engine import Trainer  # noqa: E402  isort: skip
from unet_coco.folder import RESTARTS, give_up, restarted_in, run_folder  # noqa: E402  isort: skip
from unet_coco.stopping import Stop, Stopped  # noqa: E402  isort: skip
from unet_coco.train import main  # noqa: E402  isort: skip

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools on numpy 2
]
FP32 = ["--precisions", "fp32", "--pictures", "0", *SMALL]
NVFP4 = ["--precisions", "nvfp4", "--compute", "fp32", "--pictures", "0", *SMALL, "--scale", "0.25"]
TRAIN = EXAMPLES / "unet_coco" / "train.py"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_shapes(tmp_path_factory.mktemp("data"))


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, type[BaseException]], None]:
    """stopping(step, error): raise in the training step of that number; stopping(-1, ...) no more."""
    step = Trainer._step

    def stop(at: int, error: type[BaseException]) -> None:
        def raises(self: Trainer, *arguments: Any) -> torch.Tensor:
            if self.position.step == at:
                raise error("stopped here")
            return step(self, *arguments)

        monkeypatch.setattr(Trainer, "_step", raises)

    return stop


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_runs_that_start_together_get_a_folder_each(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: run_folder(out, resume=False), range(8)))
    assert sorted(found) == sorted((folder, True) for folder in [out, *(tmp_path / f"out_{n}" for n in range(2, 9))])
    assert run_folder(out, resume=True) == (out, False) and json.loads((out / "run.json").read_text())["started"]


@pytest.mark.parametrize(("job", "count"), RESTARTS.items())
def test_a_job_that_is_started_again_finds_its_folder(job: str, count: str, tmp_path: Path, monkeypatch) -> None:
    for name in (*RESTARTS, *RESTARTS.values()):
        monkeypatch.delenv(name, raising=False)
    out, call = tmp_path / "out", ["--out", "out", "--epochs", "2"]
    out.mkdir()
    (out / "summary.json").touch()  # a run of no job, which claimed nothing
    monkeypatch.setenv(job, "7")
    monkeypatch.setenv(count, "0")
    assert run_folder(out, False, call)[0] == run_folder(tmp_path / "out_2", True)[0]
    assert restarted_in(out, call) is None, "the first start finds nothing"
    monkeypatch.setenv(count, "1")
    assert restarted_in(out, call) == tmp_path / "out_2"
    assert restarted_in(out, [*call, "--lr", "1"]) is None, "another run of the job"
    (tmp_path / "out_2" / "run.json").write_text("[]")
    assert restarted_in(out, call) is None
    monkeypatch.setenv(job, "none")  # torchrun's default
    run_folder(out, False, call)
    assert restarted_in(out, call) == tmp_path / "out_3"
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert restarted_in(out, call) == (None if job.startswith("TORCH") else tmp_path / "out_3")


def test_a_folder_is_given_up_by_a_run_that_left_nothing(tmp_path: Path) -> None:
    out, _ = run_folder(tmp_path / "out", resume=False)
    give_up(out)
    assert run_folder(tmp_path / "out", resume=False) == (out, True)
    (out / "fp32").mkdir()
    (out / "fp32" / "telemetry.jsonl").touch()
    give_up(out)
    (out / "run.json").unlink()  # as a run of an earlier version left it
    assert run_folder(tmp_path / "out", resume=False) == (tmp_path / "out_2", True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--out cannot be made"):
        run_folder(tmp_path / "file", resume=False)


def test_a_run_that_was_stopped_before_its_first_checkpoint(shapes: Path, tmp_path: Path, stopping, capsys) -> None:
    """A new run leaves it alone; --resume starts it anew, in a telemetry file of its own."""
    call = ["--data", str(shapes), "--out", str(tmp_path / "out"), *FP32, "--epochs", "1"]
    stopping(1, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        main(call)
    assert (tmp_path / "out" / "run.json").is_file() and not (tmp_path / "out" / "fp32" / "last.pt").exists()
    stopping(-1, KeyboardInterrupt)
    main(call)
    assert not (tmp_path / "out" / "fp32" / "last.pt").exists() and (tmp_path / "out_2" / "fp32" / "last.pt").is_file()
    capsys.readouterr()
    drafts = [tmp_path / "out" / ".summary.json.1.tmp", tmp_path / "out" / "fp32" / f".last.pt.{os.getppid()}.tmp"]
    for draft in drafts:
        draft.touch()
        os.utime(draft, (time.time() - 60,) * 2)
    main([*call, "--resume"])
    assert not any(draft.exists() for draft in drafts), "a killed write leaves nothing, though its number runs again"
    assert "no checkpoint, starting fresh" in capsys.readouterr().out
    state = checkpoint.load_checkpoint(tmp_path / "out" / "fp32" / "last.pt")
    assert state["position"]["telemetry"] == "telemetry_2.jsonl"


def test_a_refused_run_leaves_its_folder_free(shapes: Path, tmp_path: Path) -> None:
    call = ["--data", str(shapes), "--out", str(tmp_path / "out"), *FP32, "--epochs", "1"]
    with pytest.raises(ValueError, match="absent.pt"):
        main([*call, "--init-from", str(tmp_path / "absent.pt")])
    main(call)
    assert (tmp_path / "out" / "summary.json").is_file() and not (tmp_path / "out_2").exists()


# ---- the run's own files --------------------------------------------------------------------------------------------


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no telemetry, which takes longer than they do."""
    monkeypatch.setattr("unet_coco.train.show_telemetry", lambda *_: [])


def test_a_resume_goes_on_in_the_runs_own_telemetry_file(shapes: Path, tmp_path: Path, no_drawing: None) -> None:
    call = ["--data", str(shapes), "--out", str(tmp_path), *FP32, "--epochs", "2", "--telemetry-every", "1"]
    main([*call, "--steps", "4"])
    folder = tmp_path / "fp32"
    os.rename(folder / "telemetry.jsonl", folder / "telemetry_2.jsonl")
    (folder / "telemetry.jsonl").write_text("another run's\n")
    state = checkpoint.load_checkpoint(folder / "last.pt")
    state["position"]["telemetry"] = "telemetry_2.jsonl"
    checkpoint.save_checkpoint(folder / "last.pt", {k: v for k, v in state.items() if k != "format"})
    main([*call, "--resume"])
    assert (folder / "telemetry.jsonl").read_text() == "another run's\n"
    assert list(telemetry.read(folder / "telemetry_2.jsonl").steps) == [0, 1, 2, 3, 4, 5]


def test_tensorboard_shows_each_step_once_after_a_crash(shapes: Path, tmp_path: Path, stopping, no_drawing) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra [telemetry]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    call = ["--data", str(shapes), "--out", str(tmp_path), *FP32, "--epochs", "2", "--tensorboard"]
    call += ["--telemetry-every", "1", "--log-every", "1"]
    stopping(5, RuntimeError)  # the last checkpoint is that of step 3
    with pytest.raises(RuntimeError, match="stopped here"):
        main(call)
    stopping(-1, RuntimeError)
    main([*call, "--resume"])
    events = EventAccumulator(str(tmp_path / "tensorboard" / "fp32"))
    events.Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert steps["train/loss"] == [1, 2, 3, 4, 5, 6] and steps["val/miou"] == steps["val/loss"] == [3, 6]
    assert steps["weight/head/std"] == [0, 1, 2, 3, 4, 5]


def test_what_can_be_drawn_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Heatmaps need plotly, the report does not; W&B gets it in a run beside those of the precisions."""
    pytest.importorskip("matplotlib")
    from tests.telemetry.fake_wandb import FakeRun, fake_wandb
    from tests.telemetry.synthetic_runs import write_run

    beside = FakeRun()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake_wandb(monkeypatch, {"offline": beside})
    Image.new("RGB", (8, 8)).save(tmp_path / "predictions.png")
    rows = {"bf16": {"miou": 0.5}, "nvfp4": {"miou": 0.4}}

    monkeypatch.setattr(tracking, "_told", set())
    monkeypatch.setitem(sys.modules, "plotly", None)
    run = write_run(tmp_path / "telemetry.jsonl")
    assert tracking.show_telemetry(tmp_path, [run], True, rows) == [tmp_path / "report.html"]
    logged = {name: value for values in beside.logged for name, value in values.items()}
    assert logged["results"] == (["precision", "miou"], [["bf16", 0.5], ["nvfp4", 0.4]])
    assert {"report", "predictions", "Heatmaps/Weight gradients: mean"} <= {*logged} and beside.finished
    assert beside.summary == {"bf16/miou": 0.5, "nvfp4/miou": 0.4}
    printed = capsys.readouterr().out
    assert "telemetry: no heatmaps: " in printed and "plotly" in printed and "no report" not in printed
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert tracking.show_telemetry(tmp_path, [run], False, {}) == []
    assert "telemetry: no report: " in capsys.readouterr().out


# ---- which run a checkpoint is of -----------------------------------------------------------------------------------


def test_a_checkpoint_beyond_the_epochs_is_refused(shapes: Path, tmp_path: Path) -> None:
    call = ["--data", str(shapes), "--out", str(tmp_path), *NVFP4]
    main([*call, "--epochs", "2"])
    before = (tmp_path / "summary.json").read_bytes()
    with pytest.raises(ValueError, match=r"beyond --epochs[\s\S]*--epochs 1, a checkpoint of epoch 2, step 6"):
        main([*call, "--epochs", "1", "--resume"])
    assert (tmp_path / "summary.json").read_bytes() == before
    rows = main([*call, "--epochs", "2", "--resume"])
    assert rows["nvfp4"] == json.loads(before)["nvfp4"]


def test_other_images_are_refused_and_the_same_elsewhere_are_not(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tracking, "_told", set())
    root = write_masks(tmp_path)
    call = ["--layout", "masks", "--out", str(tmp_path / "out"), *FP32, "--epochs", "1"]
    main(["--data", str(root), *call, "--steps", "1"])
    moved = root.rename(tmp_path / "moved")
    main(["--data", str(moved), *call, "--resume"])
    rng = np.random.default_rng(7)

    def replace(number: int) -> None:  # the same name, another picture
        image = moved / "train" / "images" / f"{number}.jpg"
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(image)

    replace(0)  # one that was repaired
    main(["--data", str(moved), *call, "--resume"])
    assert "some image files changed their size" in capsys.readouterr().out
    for number in (1, 2, 3):
        replace(number)
    with pytest.raises(ValueError, match=r"belongs to another run \(differing: file sizes\)"):
        main(["--data", str(moved), *call, "--resume"])
    (moved / "train" / "images" / "0.jpg").rename(moved / "train" / "images" / "9.jpg")
    (moved / "train" / "labels" / "0.png").rename(moved / "train" / "labels" / "9.png")
    with pytest.raises(ValueError, match=r"belongs to another run \(differing: data[\s\S]*5 images"):
        main(["--data", str(moved), *call, "--resume"])


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    root = write_masks(tmp_path)
    odd = os.fsdecode(b"caf\xe9")
    for kind, ending in (("images", "jpg"), ("labels", "png")):
        (root / "train" / kind / f"0.{ending}").rename(root / "train" / kind / f"{odd}.{ending}")
    call = ["--data", str(root), "--layout", "masks", "--out", str(tmp_path / "out"), *FP32, "--epochs", "1"]
    main([*call, "--steps", "1"])
    main([*call, "--resume"])


def test_a_refused_resume_leaves_the_claim_of_a_run_that_is_starting(shapes: Path, tmp_path: Path, monkeypatch) -> None:
    def refused(self: Trainer) -> bool:
        raise ValueError("belongs to another run")

    out, _ = run_folder(tmp_path / "out", resume=False)
    monkeypatch.setattr(Trainer, "resume", refused)
    with pytest.raises(ValueError, match="belongs to another run"):
        main(["--data", str(shapes), "--out", str(out), *FP32, "--resume"])
    assert (out / "run.json").is_file()


def test_another_validation_split_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "parts"
    for folder, count in (("train/good", 4), ("test/scratch", 4), ("ground_truth/scratch", 4)):
        (root / folder).mkdir(parents=True)
        for number in range(count):
            name = f"{number}_mask.png" if folder.startswith("ground") else f"{number}.png"
            Image.new("RGB", (32, 32), (200, 9, 9)).save(root / folder / name)
    call = ["--data", str(root), "--layout", "mvtec", "--out", str(tmp_path / "out"), *FP32, "--epochs", "1"]
    main(call)
    with pytest.raises(ValueError, match=r"differing: data[,)][\s\S]*'val_share': 0.5[\s\S]*'val_share': 0.75"):
        main([*call, "--val-share", "0.75", "--resume"])


def test_another_end_in_high_precision_is_refused(shapes: Path, tmp_path: Path) -> None:
    call = ["--data", str(shapes), "--out", str(tmp_path), *NVFP4, "--epochs", "3"]
    main([*call, "--steps", "1", "--high-precision-last", "1"])
    with pytest.raises(ValueError, match=r"differing: levers\)[\s\S]*'high_precision_last': 1"):
        main([*call, "--steps", "2", "--resume"])
    main([*call, "--steps", "2", "--high-precision-last", "1", "--resume"])


def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_note(shapes: Path, tmp_path: Path, monkeypatch, capsys):
    call = ["--data", str(shapes), "--out", str(tmp_path), *NVFP4, "--epochs", "3", "--high-precision-last", "1"]
    main([*call, "--steps", "1"])
    path = tmp_path / "nvfp4" / "last.pt"
    state = checkpoint.load_checkpoint(path)
    del state["identity"]["data"], state["identity"]["file sizes"]
    del state["identity"]["levers"], state["position"]["telemetry"], state["format"]
    checkpoint.save_checkpoint(path, state)
    monkeypatch.setattr(tracking, "_told", set())
    with pytest.raises(ValueError, match=r"differing: levers\)[\s\S]*'high_precision_last': 1"):
        main([*call[:-2], "--steps", "2", "--resume"])
    main([*call, "--steps", "2", "--resume"])
    assert capsys.readouterr().out.count("did not record the images of its training") == 1
    assert "data" in checkpoint.load_checkpoint(path)["identity"]


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("now", [True, False])
def test_shared_amaxes_are_compared_among_ranks_only(saved: bool, now: bool) -> None:
    of = {"recipe": "r", "data": {}}
    state = {"identity": of | ({"share_amax": True} if saved else {}), "args": {}, "ranks": [{}, {}]}
    this = of | ({"share_amax": True} if now else {})
    assert (identity.saved_identity(state, this, parallel=True) == this) == (saved == now)
    assert identity.saved_identity(state, this, parallel=False) == this
    del state["ranks"]
    assert identity.saved_identity(state, this, parallel=True) == this


# ---- ends -----------------------------------------------------------------------------------------------------------


def test_an_error_in_a_worker_is_told_without_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_masks(tmp_path)
    Image.new("L", (8, 8)).save(root / "train" / "labels" / "3.png")
    (root / "meta.json").write_text(json.dumps({"classes": ["a", "b", "c"]}))
    monkeypatch.chdir(tmp_path)
    status = run_script(TRAIN, "--data", root, "--layout", "masks", "--workers", 1, "--out", "out", *FP32)
    told = capsys.readouterr().err
    assert status == 1 and "Traceback" not in told, told
    assert told.splitlines()[-4].startswith("error: data: ") and "differ in size." in told
    assert told.splitlines()[-1].startswith("  fix:")


def test_other_messages_stay_as_they_are() -> None:
    raised = "Caught RuntimeError in DataLoader worker process 1.\nOriginal Traceback (most recent call last):\n"
    chained = f"{raised}  x\nKeyError: 'k'\n\nDuring handling:\n  y\nRuntimeError: first\n  second\n"
    assert ranks.message(RuntimeError(chained)) == "first\n  second"
    for text in ("plain", "Caught up in a worker.\nRuntimeError: no"):
        assert ranks.message(ValueError(text)) == text


def test_a_signal_saves_the_step_and_says_how_to_go_on(shapes: Path, tmp_path: Path) -> None:
    """In the middle of an epoch of 3 steps, too: the checkpoint is of the step that the message names."""
    call = [sys.executable, TRAIN, "--data", str(shapes), "--out", str(tmp_path / "out"), *FP32, "--epochs", "5000"]
    path = tmp_path / "out" / "fp32" / "last.pt"
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen([*call, "--eval-every", "5000"], **pipes, text=True) as process:
        for _ in range(1500):
            if path.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        process.terminate()
        _, told = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in told, told
    saved = checkpoint.load_checkpoint(path)["position"]
    done = f"step {saved['step']} of 15000 of fp32 is saved"
    assert saved["step"] >= 3 and saved["step"] == 3 * saved["epoch"] + saved["batch"]
    assert told.splitlines()[-1] == (
        f"stopped: SIGTERM; {done}. To go on, give the same command with --out {tmp_path / 'out'} --resume"
    )


@pytest.mark.parametrize("where", ["_step", "evaluate"])
def test_a_run_that_signals_stop_often_ends_with_the_same_bits(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_drawing: None, where: str
) -> None:
    """A signal in a step waits for its end, and one in a validation leaves it to the resumed run."""
    call = ["--data", str(shapes), *FP32, "--epochs", "2"]
    before = signal.getsignal(signal.SIGTERM)
    rows = main([*call, "--out", str(tmp_path / "whole")])
    method, calls = getattr(Trainer, where), []

    def signalled(self: Trainer, *arguments: Any, **options: Any) -> Any:
        calls.append(self.position.step)
        if len(calls) in (1, 3, 5):
            os.kill(os.getpid(), signal.SIGTERM)
        return method(self, *arguments, **options)

    monkeypatch.setattr(Trainer, where, signalled)
    out = ["--out", str(tmp_path / "stopped"), "--resume"]
    for _ in range(6):
        with contextlib.suppress(KeyboardInterrupt):
            resumed = main([*call, *out])
            break
    assert len(calls) > 2 and signal.getsignal(signal.SIGTERM) == before
    assert {**resumed["fp32"], "step_ms": 0} == {**rows["fp32"], "step_ms": 0}
    whole, stopped = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("whole", "stopped"))
    assert whole == stopped and len(whole["fp32"]["epochs"]) == 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_each_signal_has_its_exit_status(number: signal.Signals, status: int, monkeypatch, capsys) -> None:
    def stopped() -> None:
        with Stop().listening():
            os.kill(os.getpid(), number)

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        ranks.run(stopped)
    assert ended.value.code == status
    assert capsys.readouterr().err == f"stopped: {'Ctrl-C' if number == signal.SIGINT else number.name}\n"


def test_an_error_of_a_rank_that_nobody_foresaw_is_told_with_its_traceback(monkeypatch, capsys) -> None:
    def fails() -> None:
        raise KeyError("rank 1 has lost a key")

    ended: list[int] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(os, "_exit", ended.append)
    ranks.run(fails)
    told = capsys.readouterr().err
    assert ended == [1] and "Traceback" in told and "KeyError: 'rank 1 has lost a key'" in told


def test_a_second_signal_ends_a_step_that_hangs() -> None:
    stop = Stop()
    with pytest.raises(KeyboardInterrupt) as ended, stop.listening(), stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)
    assert not isinstance(ended.value, Stopped)


def test_save_every_keeps_what_a_kill_would_lose(shapes: Path, tmp_path: Path, stopping, no_drawing) -> None:
    call = ["--data", str(shapes), "--out", str(tmp_path), *FP32, "--epochs", "2", "--save-every", "2"]
    stopping(5, RuntimeError)  # no chance to save, as with SIGKILL
    with pytest.raises(RuntimeError, match="stopped here"):
        main(call)
    assert checkpoint.load_checkpoint(tmp_path / "fp32" / "last.pt")["position"]["step"] == 4


def test_the_last_step_is_recorded_and_validated(shapes: Path, tmp_path: Path, no_drawing: None) -> None:
    """A run of fewer steps than --log-every has a point in each curve, which a longer run does not keep."""
    call = ["--data", str(shapes), "--out", str(tmp_path), *FP32, "--epochs", "2", "--log-every", "10"]
    rows = main([*call, "--steps", "2"])
    history = json.loads((tmp_path / "history.json").read_text())["fp32"]
    assert [row["step"] for row in history["curve"]] == [row["step"] for row in history["epochs"]] == [2]
    assert history["epochs"][0]["miou"] == rows["fp32"]["miou"]
    assert history["epochs"][0]["epoch"] == pytest.approx(2 / 3)
    main([*call, "--resume"])
    history = json.loads((tmp_path / "history.json").read_text())["fp32"]
    assert [row["step"] for row in history["curve"]] == [6]
    assert [row["step"] for row in history["epochs"]] == [3, 6]
