"""The accuracy study at work: runs that are stopped anywhere go on with the same bits, and workers share a plan."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import te_nvfp4_cv as nv
from te_nvfp4_cv.backend import native
from tests.examples.unet_coco_data import EXAMPLES, write_cifar, write_masks
from tests.helpers import seeds

from accuracy import deploy, fit, study  # noqa: E402  isort: skip
from accuracy.claims import claimed  # noqa: E402  isort: skip
from accuracy.nets import resnet  # noqa: E402  isort: skip
from accuracy.rows import read_rows  # noqa: E402  isort: skip
from accuracy.tasks import TASKS, Classification, Segmentation, Size  # noqa: E402  isort: skip
from accuracy.variants import variants  # noqa: E402  isort: skip
from unet_coco.data import load_data  # noqa: E402  isort: skip

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TIMES = ("seconds", "cpu_seconds")


def classify(folder: Path, lr: float = 0.02) -> Classification:
    write_cifar(folder)
    return Classification(folder, Size({"width": 16, "blocks": 1, "stages": 2}, 32, 7, lr, train=96, test=32), resnet)


def segment(folder: Path) -> Segmentation:
    data = load_data(write_masks(folder), "masks", None)
    size = Size({"scale": 0.25}, 4, 30, 3e-3, (16, 32), zoom=0.25)
    return Segmentation(data.train, [data.val, data.test], len(data.class_names), size)


# ---- one run --------------------------------------------------------------------------------------------------------


def whole(task: Any, variant: Any, **options: Any) -> dict[str, Any]:
    run = fit.Run(task, variant, 3, fit.Setting(CPU, **options))
    run.train()
    return {key: value for key, value in run.row().items() if key not in TIMES}


class Killed(Exception):
    pass


def in_pieces(task: Any, variant: Any, path: Path, stops: tuple[int, ...], **options: Any) -> dict[str, Any]:
    """Stop after the first number of steps, kill in the step after the second, and so on; then finish."""
    for number, after in enumerate(stops):
        steps = iter(range(1, 100))
        if number % 2 == 0:
            run = fit.Run(task, variant, 3, fit.Setting(CPU, stop=lambda s=steps, n=after: next(s) == n, **options),
                          path=path)  # fmt: skip
            with pytest.raises(fit.Stopped):
                run.train()
        else:
            run = fit.Run(task, variant, 3, fit.Setting(CPU, every=0.0, **options), path=path)
            one_step = run._one_step

            def killed(*args: Any, one_step: Any = one_step, steps: Any = steps, n: int = after) -> None:
                one_step(*args)
                if next(steps) == n:
                    raise Killed

            run._one_step = killed
            with pytest.raises(Killed):
                run.train()
        torch.manual_seed(12345)  # a new process would not continue this one's random numbers
        nv.functional.linear(torch.randn(16, 16, requires_grad=True), torch.randn(16, 16)).sum().backward()
    run = fit.Run(task, variant, 3, fit.Setting(CPU, **options), path=path)
    run.train()
    assert not run.losses == [] and len(run.losses) == run.steps
    return {key: value for key, value in run.row().items() if key not in TIMES}


@pytest.mark.parametrize(
    ("build", "name"),
    [
        pytest.param(classify, "baseline", marks=pytest.mark.stress),
        pytest.param(classify, "preset", marks=pytest.mark.stress),  # as that of segment
        pytest.param(classify, "delayed scales", marks=pytest.mark.slow),
        pytest.param(classify, "learned block-scale multiplier", marks=pytest.mark.slow),
        pytest.param(classify, "last 15 % of epochs in high precision", marks=pytest.mark.slow),
        (segment, "preset"),
    ],
)
def test_a_run_that_is_stopped_and_killed_goes_on_with_the_same_bits(build, name, tmp_path):
    task = build(tmp_path)
    blocks = ("stages.0", "stages.1") if build is classify else ("stem", "up.3")
    variant = variants(nv.load_recipe("resnet" if build is classify else "unet"), blocks)[name]
    expected = whole(task, variant)
    assert in_pieces(task, variant, tmp_path / "run.pt", (4, 3, 12 if build is classify else 21)) == expected
    assert expected["tail_loss"] > 0 and not expected["diverged"]
    assert (expected["nvfp4_flops_share"] == 0) == (name == "baseline")
    assert name in ("baseline", "preset") or expected != whole(task, replace(variant, recipe=None, learn="", last=0.0))


def test_a_loss_times_a_power_of_two_trains_the_same_and_other_formats_run_in_a_plan_for_the_integer_backend(tmp_path):
    task, known = classify(tmp_path), variants(nv.load_recipe("resnet"), ())

    def steps(variant: Any) -> fit.Run:
        run = fit.Run(task, variant, 0, fit.Setting(CPU, backend="integer"))
        for keys in list(run.order)[:2]:
            run._one_step(keys, 0)
        return run

    plain, scaled = steps(known["baseline"]), steps(replace(known["baseline"], loss_scale=2.0**20))
    assert all(map(torch.equal, plain.model.parameters(), scaled.model.parameters()))
    run = steps(known["UE5M3 scales, no tensor scale, loss times 2^20"])
    assert run.precision.backend == "integer" and all(p.grad.any() for p in run.model.parameters())


@pytest.mark.parametrize("name", ["preset", "delayed scales"])
def test_a_checkpoint_holds_everything(name, tmp_path):
    task, path = classify(tmp_path), tmp_path / "run.pt"
    variant = variants(nv.load_recipe("resnet"), ())[name]
    steps = iter(range(1, 10))
    begun = fit.Run(task, variant, 3, fit.Setting(CPU, stop=lambda: next(steps) == 4), path=path)
    with pytest.raises(fit.Stopped):
        begun.train()
    expected, tensors = nv.extra_state(begun.model), [*begun.average.now, *begun.average.values]
    assert bool(expected["scales"]) == (name == "delayed scales") and expected["sr_drawn"] > 0
    torch.manual_seed(0)
    run = fit.Run(task, variant, 3, fit.Setting(CPU), path=path)
    run._load(path)
    found = nv.extra_state(run.model)
    assert torch.equal(torch.get_rng_state(), fit.load_checkpoint(path)["rng"]["torch"])
    assert str(found) == str(expected) and (run.step, run.average.seen, len(run.losses)) == (4, 4, 4)
    assert all(map(torch.equal, [*run.average.now, *run.average.values], tensors))


def test_a_run_goes_on_elsewhere_only_if_its_products_have_the_same_bits(tmp_path, capsys):
    task, path = classify(tmp_path), tmp_path / "run.pt"
    if native.load() is None:
        pytest.skip("the integer kernels are not compiled here")
    known = variants(nv.load_recipe("resnet"), ("stages.0", "stages.1"))

    def elsewhere(variant: Any, **options: Any) -> fit.Run:
        begun = fit.Run(task, variant, 3, fit.Setting(CPU, stop=lambda: True, **options), path=path)
        with pytest.raises(fit.Stopped):
            begun.train()
        state = fit.load_checkpoint(path)
        state["machines"][-1]["processor"] = "another one"
        fit.save_checkpoint(path, {k: v for k, v in state.items() if k != "format"})
        run = fit.Run(task, variant, 3, fit.Setting(CPU, **options), path=path)
        run.train()
        return run

    run = elsewhere(known["preset"], backend="integer")
    row = run.row()
    assert [m["processor"] == "another one" for m in row["machines"]] == [True, False] and len(run.losses) == run.steps
    assert "starting again" not in capsys.readouterr().out
    for variant, backend in (("preset", "vendor"), ("baseline", "integer")):
        row = elsewhere(known[variant], backend=backend).row()
        assert "machines" not in row and "another processor than when it began" in capsys.readouterr().out
    elsewhere(known["preset"], backend="integer")
    other = fit.Run(task, known["minus SR"], 3, fit.Setting(CPU, backend="integer"), path=path)
    other.train()
    assert "belongs to another run" in capsys.readouterr().out and len(other.losses) == other.steps


def test_averaged_weights_are_averages_and_are_taken_out_again():
    net = torch.nn.BatchNorm1d(2)
    average = fit.Average(net, horizon=4)
    for value in (1.0, 2.0, 3.0, 8.0, 100.0):
        net.weight.data.fill_(value)
        net.running_mean.fill_(-value)
        if value < 100:
            average.update()
    with average.in_place():
        assert net.weight.tolist() == [3.5, 3.5] and net.running_mean.tolist() == [-3.5, -3.5]
    assert net.weight.tolist() == [100, 100] and net.running_mean.tolist() == [-100, -100]
    average.update()
    assert average.values[0].tolist() == [3.5 + 96.5 / 4] * 2


def test_a_run_that_diverges_says_so(tmp_path):
    task = classify(tmp_path, lr=1e6)
    run = fit.Run(task, variants(nv.load_recipe("resnet"), ())["baseline"], 0, fit.Setting(CPU))
    run.train()
    row = run.row()
    assert row["diverged"] and "score" not in row and row["steps"] < run.steps


def test_the_last_epochs_run_in_high_precision(tmp_path, monkeypatch):
    task, used = classify(tmp_path), []
    variant = variants(nv.load_recipe("resnet"), ())["last 15 % of epochs in high precision"]
    original = fit.Precision.context
    monkeypatch.setattr(fit.Precision, "context", lambda s, d, nvfp4=True: used.append(nvfp4) or original(s, d, nvfp4))
    run = fit.Run(task, variant, 0, fit.Setting(CPU), epochs=7)
    run.train()
    assert used == [True] * 6 * 3 + [False] * 3
    row = run.row()
    assert not any(used[21:]) and row["score"] == row["score_hp"] and 0 < row["nvfp4_flops_share"] < 6 / 7
    with pytest.raises(ValueError, match="too few"):
        fit.Run(task, variant, 0, fit.Setting(CPU), epochs=2)


# ---- the study ------------------------------------------------------------------------------------------------------

STAGE = """
[cpu]
compute = "fp32"
backend = "auto"
first_pairs = 4
budget_hours = 60
[cpu.tasks]
[[cpu.stages]]
title = "a test"
tasks = ["cifar-resnet20", "camvid-unet"]
variants = ["preset"]
pairs = 1
epochs = EPOCHS
"""


def small_study(folder: Path, epochs: int) -> list[str]:
    write_cifar(folder / "data" / "cifar10")
    write_masks(folder).rename(folder / "data" / "camvid")
    (folder / "plan.toml").write_text(STAGE.replace("EPOCHS", str(epochs)))
    call = ["--data", folder / "data", "--out", folder / "out", "--plan", folder / "plan.toml"]
    return [str(word) for word in (*call, "--results", folder / "study.jsonl")]


def test_a_study_runs_the_plan_once(tmp_path, capsys):
    call = small_study(tmp_path, epochs=2)
    assert study.main([*call, "--minutes", "0"]) == 0 and not (tmp_path / "out" / "rows.jsonl").is_file()
    with claimed(tmp_path / "out" / "claims" / "cifar-resnet20_cpu_fp32_2_baseline_0.lock"):
        study.main([*call, "--tasks", "camvid-unet"])
    assert study.main(call) == 0
    assert "nothing left to do" in capsys.readouterr().out
    rows = read_rows([tmp_path / "out" / "rows.jsonl"])
    assert [(arm.task, arm.variant) for arm in rows] == [
        (task, variant) for task in ("camvid-unet", "cifar-resnet20") for variant in ("baseline", "preset")
    ]
    needed = {"commit", "backend", "kernels", "processor", "torch", "python", "threads", "seconds", "cpu_seconds",
              "steps", "score", "ema_score", "score_hp", "tail_loss", "curve", "nvfp4_flops_share"}  # fmt: skip
    assert all(needed <= set(row) and row["threads"] == 1 for row in rows.values())
    backends = {arm.variant: row["backend"] for arm, row in rows.items()}
    assert backends["baseline"] == "" and backends["preset"]
    assert not list((tmp_path / "out" / "checkpoints").glob("*"))
    study.main([*call, "--collect"])
    (tmp_path / "out" / "rows.jsonl").unlink()
    assert study.main([*call, "--list"]) == 0
    assert "4 runs done in 0.0 core-hours of 60; 0.0 core-hours left to do" in capsys.readouterr().out


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    call = small_study(tmp_path, epochs=1)

    def fails(*_: Any) -> None:
        raise KeyError("an image")

    monkeypatch.setattr(Classification, "batch", fails)
    assert study.main(call) == 1
    assert [arm.task for arm in read_rows([tmp_path / "out" / "rows.jsonl"])] == ["camvid-unet"] * 2
    assert capsys.readouterr().out.count("KeyError: 'an image'") == 2


def test_a_claim_ends_with_its_process(tmp_path):
    path = tmp_path / "claims" / "a.lock"
    with claimed(path) as first, claimed(path) as second:
        assert first and not second
    code = f"import sys, time; sys.path.insert(0, {str(EXAMPLES)!r})\nfrom pathlib import Path\n"
    code += f"from accuracy.claims import claimed\nwith claimed(Path({str(path)!r})) as mine:\n"
    code += "    print(mine, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        with claimed(path) as mine:
            assert not mine
        process.kill()
        process.wait()
        with claimed(path) as mine:
            assert mine


@pytest.mark.slow
@pytest.mark.parametrize("workers", seeds([2], [1, 2]))
def test_sigterm_stops_all_workers_after_a_step(workers, tmp_path):
    if len(os.sched_getaffinity(0)) < workers:
        pytest.skip(f"needs {workers} cores")
    call = [sys.executable, str(EXAMPLES / "accuracy" / "study.py"), *small_study(tmp_path, epochs=100_000)]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen([*call, "--workers", str(workers)], stdout=file, stderr=subprocess.STDOUT)
        end = time.monotonic() + 120
        while log.read_text().count(" starts\n") < workers and time.monotonic() < end and process.poll() is None:
            time.sleep(0.2)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()
    text = log.read_text()
    assert text.count("worker ends: stopped") == workers and text.count("stopped at step") == workers, text
    assert len(list((tmp_path / "out" / "checkpoints").glob("*.pt"))) == workers


@pytest.mark.parametrize(
    ("given", "now", "expected"),
    [(["--until", "04:50"], "03:10", "04:50"), (["--until", "04:50", "--minutes", "5"], "03:10", "03:15")],
)
def test_the_time_to_stop(given, now, expected):
    def at(text: str) -> datetime.datetime:
        return datetime.datetime.fromisoformat(f"2026-01-01T{text}:00")

    assert study._deadline(study._options(given), at(now)) == at(expected).timestamp()
    tomorrow = study._deadline(study._options(["--until", "00:30"]), at("03:10"))
    assert tomorrow == (at("00:30") + datetime.timedelta(days=1)).timestamp()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--until", "soon"], "--until is no time"),
        (["--workers", "0"], "--workers is out of range"),
        (["--workers", "1000"], "--workers: too many"),
        (["--data", "nowhere", "--tasks", "cifar-resnet20"], "nowhere/cifar10 has none of the forms"),
    ],
)
def test_bad_arguments_are_refused(arguments, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        study.main([*arguments, "--out", str(tmp_path / "out")])


def test_deployment_asks_for_its_packages_before_it_trains(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeError, match=r"deploy.py: a package is missing[\s\S]*onnxruntime"):
        deploy.main(["camvid-unet", "nowhere"])


@pytest.mark.slow
def test_an_onnx_file_that_fails_costs_no_row(tmp_path, monkeypatch):
    def fails(*_: Any) -> None:
        raise KeyError("an operator")

    monkeypatch.setattr(deploy, "need_packages", lambda *_: None)
    monkeypatch.setattr(deploy._Onnx, "by_value", fails)
    monkeypatch.setattr(deploy, "METHODS", ("nearest",))
    monkeypatch.setitem(TASKS["camvid-unet"], "cpu", Size({"scale": 0.125}, 4, 1, 3e-3, (32, 48), zoom=0.25))
    write_masks(tmp_path).rename(tmp_path / "camvid")
    out = tmp_path / "rows.jsonl"
    call = ["camvid-unet", str(tmp_path), "--epochs", "1", "--compute", "fp32", "--device", "cpu"]
    deploy.main([*call, "--out", str(out)])
    row = json.loads(out.read_text())
    assert row["ONNX"] == "KeyError: 'an operator'" and 0 < row["trained in NVFP4"] <= 100
