"""examples/accuracy/why.py: each layer's quantization error beside what the layer does to the loss."""

from __future__ import annotations

import json

import pytest

from tests.examples.unet_coco_data import EXAMPLES, write_cifar  # noqa: F401  (puts examples/ on the path)

from accuracy import why  # noqa: E402  isort: skip
from accuracy.tasks import TASKS, Size  # noqa: E402  isort: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_network_is_examined_at_each_share_of_its_steps(tmp_path, monkeypatch, capsys):
    size = Size({"width": 16, "blocks": 1, "stages": 2}, 16, 2, 0.02, train=32, test=16)
    monkeypatch.setitem(TASKS["cifar-resnet20"], "cpu", size)
    write_cifar(tmp_path / "cifar10")
    call = ["--data", tmp_path, "--out", tmp_path / "out", "--results", tmp_path / "why.jsonl", "--batches", "2"]
    why.main([*map(str, call), "--task", "cifar-resnet20", "--at", "0.5", "1.0"])
    half, whole = map(json.loads, (tmp_path / "why.jsonl").read_text().splitlines())
    assert (half["step"], whole["step"], whole["steps"]) == (2, 4, 4)
    for row in (half, whole):
        products, layers = row["products"], row["layers"]
        assert products["high precision"]["loss"] > 0
        assert all(0 < s["gradient_error"] < 2 for name, s in products.items() if name != "high precision")
        # Only fprop changes the loss; without it the forward pass is that of high precision, bit for bit.
        assert products["fprop only"]["loss"] == products["all"]["loss"] != 0
        assert products["dgrad only"]["loss"] == 0 == products["wgrad only"]["loss"]
        assert all(s["gradient_error"] > 0 for s in layers.values()) and len(layers) > 4
        known = [s["sqnr_db"] for s in layers.values() if s["sqnr_db"]]
        assert len(known) >= len(layers) - 1  # the classifier is in high precision
        assert all(5 < value < 60 for each in known for value in each.values())
        assert set(row["spearman"]) == set(why.OPERANDS)
    text = capsys.readouterr().out
    assert "after 2 of 4 steps" in text and "| wgrad only | +0.0000 |" in text


def test_ranks_are_of_the_layers_whose_errors_are_known():
    layers = {
        name: {"gradient_error": error, "sqnr_db": {"input": db, "weight": 20.0 + error}}
        for name, error, db in (("a", 0.3, 10.0), ("b", 0.2, 15.0), ("c", 0.1, 18.0), ("d", 0.4, None))
    }
    assert why.ranks(layers) == {"input": -1.0, "weight": 1.0}
