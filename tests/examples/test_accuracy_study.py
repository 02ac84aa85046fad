"""The accuracy study: its statistics by hand, its data readers, and a run of each kind of network."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import te_nvfp4_cv as nv
from tests.examples.unet_coco_data import EXAMPLES, write_masks  # noqa: F401  (puts examples/ on the path)

from accuracy import cifar, deploy, study, table  # noqa: E402  isort: skip
from accuracy.nets import mobilenet, resnet  # noqa: E402  isort: skip
from accuracy.variants import SUITES, variants  # noqa: E402  isort: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def write_cifar(folder: Path) -> np.ndarray:
    """The binary version with 40 images a file; returns the rows of the first."""
    rng = np.random.default_rng(0)
    first = None
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        rows = rng.integers(0, 256, (40, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        rows.tofile(folder / f"{name}.bin")
        first = rows if first is None else first
    assert first is not None
    return first


def run_row(variant: str, seed: int, score: float, **more) -> dict:
    kind = {"task": "t", "size": "small", "compute": "fp32", "epochs": 2}
    return (
        {**kind, "variant": variant, "seed": seed, "score": score, "score_hp": score, "tail_loss": 1.0}
        | {"diverged": False}
        | more
    )


def test_the_interval_is_students():
    assert table.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / 3**0.5, rel=1e-3))
    mean, half = table.interval([0.1, -0.3, 0.2, 0.0, 0.5])
    assert mean == pytest.approx(0.1) and half == pytest.approx(
        2.776 * np.std([0.1, -0.3, 0.2, 0, 0.5], ddof=1) / 5**0.5
    )
    assert table.interval([0.7]) == (0.7, None)


def test_runs_are_paired_by_seed():
    rows = [run_row("baseline", s, 50 + 10 * s) for s in range(3)]
    rows += [run_row("preset", s, 49 + 10 * s + s / 10, tail_loss=1.02) for s in range(3)]
    rows += [run_row("minus SR", 0, 40.0), {**run_row("minus SR", 1, 0.0), "diverged": True}]
    found = {r["variant"]: r for r in table.rows(rows)}
    assert found["preset"]["gap"] == pytest.approx(-0.9) and found["preset"]["half_width"] < 0.3
    assert found["preset"]["loss_ratio"] == pytest.approx(1.02) and "gap" not in found["baseline"]
    assert found["minus SR"]["diverged"] == 1 and found["minus SR"]["half_width"] is None
    text = table.markdown(table.rows(rows))
    assert "| preset | 3 | 59.10 | 59.10 | -0.90 ± 0.25 | yes |  | 1.020 |" in text
    assert found["minus SR"]["against_preset"] == pytest.approx(40.0 - 49.0) and "against_preset" not in found["preset"]
    assert "minus SR (1 diverged)" in text and "one seed" in text


def test_learning_rates_are_compared_with_their_own_baseline():
    rows = [run_row("baseline", 0, 50), run_row("baseline, learning rate x2", 0, 40)]
    rows += [run_row("preset, learning rate x2", 0, 41)]
    found = {r["variant"]: r for r in table.rows(rows)}
    assert found["preset, learning rate x2"]["gap"] == 1 and "gap" not in found["baseline, learning rate x2"]


def test_every_ablation_that_is_asked_for_is_there():
    known = variants(nv.load_recipe("unet"))
    assert set().union(*SUITES.values()) == set(known)
    assert len(SUITES["ablations"]) == 16 and len(SUITES["rates"]) == 8
    assert known["high-precision wgrad"].recipe.nvfp4_gemms == ("fprop", "dgrad")
    assert known["first and last layer in NVFP4"].recipe.precision == () and known["preset"].recipe.precision
    for variant in known.values():
        if variant.recipe is not None:
            variant.recipe.validate_for_use()


def test_the_binary_version_is_read(tmp_path):
    rows = write_cifar(tmp_path)
    train, test = cifar.load_cifar(tmp_path, train_count=50, test_count=7)
    assert train.images.shape == (50, 3, 32, 32) and test.images.shape == (7, 3, 32, 32)
    assert train.images[3].flatten().tolist() == rows[3, 1:].tolist() and int(train.labels[3]) == rows[3, 0]


def test_jpegs_in_an_npz_are_read(tmp_path):
    content = []
    for value in (10, 200):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (value, value, value)).save(buffer, format="jpeg", quality=95)
        content.append(buffer.getvalue())
    header = 0
    while all(c[header] == content[0][header] for c in content):
        header += 1
    bodies = [np.frombuffer(c[header:-2], np.uint8) for c in content]
    offsets = np.cumsum([0, *map(len, bodies)]).astype(np.uint32)
    arrays = {"jpeg_header": np.frombuffer(content[0][:header], np.uint8)}
    for split in ("train", "test"):
        arrays |= {f"{split}_data": np.concatenate(bodies), f"{split}_offsets": offsets}
        arrays[f"{split}_labels"] = np.array([3, 4], np.uint8)
    np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)
    train, test = cifar.load_cifar(tmp_path, test_count=1)
    assert train.labels.tolist() == [3, 4] and test.labels.tolist() == [3]
    assert [int(image.float().mean().round()) for image in train.images] == [10, 200]


def test_bad_cifar_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="binary version"):
        cifar.load_cifar(tmp_path)
    write_cifar(tmp_path)
    (tmp_path / "data_batch_2.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"data_batch_2.bin is damaged"):
        cifar.load_cifar(tmp_path)


def test_augmented_images_are_crops_of_the_padded_ones():
    images = torch.arange(2 * 3 * 32 * 32).remainder(251).to(torch.uint8).view(2, 3, 32, 32) + 1
    out = cifar.augment(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for image, made in zip(padded, out, strict=True):
        crops = [image[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        assert any(torch.equal(made, c) or torch.equal(made, c.flip(-1)) for c in crops)


@pytest.mark.parametrize(
    "net", [resnet(16, 1), resnet(16, 2), mobilenet(16)], ids=["resnet10", "resnet18", "mobilenet"]
)
def test_networks_run_and_their_presets_apply(net):
    recipe = nv.load_recipe("resnet")
    nv.set_precision(net, recipe)
    report = nv.coverage(net, torch.randn(16, 3, 32, 32), recipe=recipe)
    high = {row.name: row.reason for row in report.rows if not row.nvfp4}
    assert {"stem.0", "fc"} <= set(high)
    assert all("depthwise" in reason for name, reason in high.items() if name not in ("stem.0", "fc"))
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_a_study_runs_goes_on_and_is_reproducible(tmp_path, capsys):
    root, out = write_masks(tmp_path), tmp_path / "results.jsonl"
    call = ["camvid-unet", str(root), "--epochs", "1", "--compute", "fp32", "--device", "cpu", "--out", str(out)]
    study.main([*call, "--seeds", "0"])
    first = study.read_results(out)
    assert [row["variant"] for row in first] == ["baseline", "preset"] and not any(row["diverged"] for row in first)
    assert 0 < first[0]["score"] <= 100 and first[0]["score"] == first[0]["score_hp"]
    with out.open("a") as file:
        file.write('{"task": "camvid-u')  # stopped in the middle of a line
    study.main([*call, "--seeds", "0", "1"])
    rows = study.read_results(out)
    assert [row["seed"] for row in rows] == [0, 0, 1, 1] and "2 runs to do, 2 done before" in capsys.readouterr().out
    study.main([*call[:-1], str(tmp_path / "again.jsonl"), "--variants", "preset", "--seeds", "1"])
    (again,) = study.read_results(tmp_path / "again.jsonl")
    assert again["curve"] == rows[3]["curve"] and again["score"] == rows[3]["score"]


def test_a_run_that_diverges_says_so(tmp_path):
    write_cifar(tmp_path)
    out = tmp_path / "results.jsonl"
    from accuracy.fit import fit
    from accuracy.tasks import Classification, Size
    from accuracy.variants import Variant

    task = Classification(tmp_path, Size({"width": 16, "blocks": 1}, 32, 1, 1e6), resnet)
    row = fit(task, Variant("baseline", None), 0, torch.device("cpu"), "fp32")
    assert row["diverged"] and "score" not in row
    out.write_text(json.dumps({**run_row("baseline", 0, 1.0), **row}) + "\nno json\n" + "x\n")
    with pytest.raises(ValueError, match="line 2"):
        study.read_results(out)


def test_levers_are_pulled(tmp_path):
    root = write_masks(tmp_path)
    out = tmp_path / "results.jsonl"
    call = ["camvid-unet", str(root), "--epochs", "3", "--compute", "fp32", "--device", "cpu", "--out", str(out)]
    names = [*SUITES["levers"], "preset, class weights", "baseline, cross-entropy alone"]
    study.main([*call, "--variants", *names])
    curves = {row["variant"]: row["curve"] for row in study.read_results(out)}
    assert set(curves) == set(names) and not any(row["diverged"] for row in study.read_results(out))
    different = {tuple(curve) for curve in curves.values()}
    assert len(different) == len(names)
    tuned, high = curves["fine-tuned: first 70 % of epochs in high precision"], curves["baseline"]
    assert tuned[:2] == high[:2] and tuned != high  # the first two of three epochs are the baseline's


def test_the_last_epochs_run_in_the_last_recipe(tmp_path, monkeypatch):
    write_cifar(tmp_path)
    from accuracy import fit as fitting
    from accuracy.tasks import Classification, Size

    used = []
    original = fitting.precision
    monkeypatch.setattr(fitting, "precision", lambda recipe, *a: used.append(recipe) or original(recipe, *a))
    task = Classification(tmp_path, Size({"width": 16, "blocks": 1}, 64, 4, 0.01, train=64, test=8), resnet)
    known = variants(nv.load_recipe("resnet"))
    variant = known["last 15 % with high-precision gradients"]
    fitting.fit(task, variant, 0, torch.device("cpu"), "fp32", epochs=7)
    assert used[:7] == [variant.recipe] * 6 + [variant.last_recipe]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["camvid-unet", "nowhere", "--variants", "minus everything"], "minus everything"),
        (["camvid-unet", "nowhere"], "nowhere is missing"),
    ],
)
def test_bad_arguments_are_refused(arguments, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        study.main([*arguments, "--out", str(tmp_path / "out.jsonl")])


def test_deployment_asks_for_its_packages_before_it_trains(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeError, match=r"deploy.py: a package is missing[\s\S]*onnxruntime"):
        deploy.main(["camvid-unet", "nowhere"])


@pytest.mark.slow
def test_an_onnx_file_that_fails_costs_no_row(tmp_path, monkeypatch):
    def fails(*_):
        raise KeyError("an operator")

    monkeypatch.setattr(deploy, "need_packages", lambda *_: None)
    monkeypatch.setattr(deploy._Onnx, "by_value", fails)
    monkeypatch.setattr(deploy, "METHODS", ("nearest",))
    out = tmp_path / "rows.jsonl"
    call = ["camvid-unet", str(write_masks(tmp_path)), "--epochs", "1", "--compute", "fp32", "--device", "cpu"]
    deploy.main([*call, "--out", str(out)])
    row = json.loads(out.read_text())
    assert row["ONNX"] == "KeyError: 'an operator'" and 0 < row["trained in NVFP4"] <= 100
