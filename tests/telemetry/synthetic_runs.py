"""Runs as the collector would record them, from a random generator: what the tests of readers and pictures look at."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from te_nvfp4_cv.telemetry.records import FORMAT, VERSION
from te_nvfp4_cv.telemetry.report import OPERANDS
from te_nvfp4_cv.telemetry.sinks import JSONL

RESNET = [f"layer{s}.{b}.conv{c}" for s, count in enumerate((3, 4, 23, 3), 1) for b in range(count) for c in (1, 2, 3)]
NAMES = {
    5: ["stem.0", "down.0.conv.0", "mid.conv.0", "up.0.conv.0", "head"],
    23: [f"{part}.{i}.conv.{j}" for part in ("down", "up") for i in range(5) for j in (0, 3)] + ["stem", "mid", "head"],
    160: [f"backbone.{name}" for name in RESNET] + [f"classifier.aspp.convs.{i}.project.0" for i in range(61)],
}


def statistics(rng: random.Random, spread: float, shape: list[int], depth: float) -> dict[str, Any]:
    tail = 3 * depth * rng.random()
    return {
        "count": shape[0] * shape[1] * 9,
        "nonfinite": 0,
        "mean": rng.gauss(0, spread / 20),
        "std": spread * rng.uniform(0.8, 1.2),
        "kurtosis": tail * 4 - 0.5,
        "amax": spread * (4 + tail),
        "zeros": 0.01,
    }


def bins(rng: random.Random, count: int) -> list[int]:
    middle = (count - 1) / 2
    return [int(1000 * 2.718 ** -(((i - middle) / count * 6) ** 2)) + rng.randint(0, 5) for i in range(count)]


def tensor(rng: random.Random, spread: float, shape: list[int], depth: float, quantized: bool) -> dict[str, Any]:
    raw = statistics(rng, spread, shape, depth) | {"histogram": bins(rng, 64), "log2_histogram": bins(rng, 64)}
    if not quantized:
        return {"raw": raw}
    return {
        "raw": raw,
        "codes": statistics(rng, 2.0, shape, depth) | {"usage": [int(n) for n in (bins(rng, 8) + bins(rng, 8))]},
        "dequantized": statistics(rng, spread, shape, depth),
        "sqnr_db": 21 - 3 * depth + rng.gauss(0, 0.5),
        "correlation": 1 - 0.01 * (1 + depth * rng.random()),
        "underflow": 0.05 + 0.1 * depth,
        "saturation": 0.001 * rng.random(),
        "scales": {"mean": 100.0, "min": 1.0, "max": 448.0, "zeros": 0.0, "histogram": bins(rng, 16)},
    }


def layer(rng: random.Random, step: int, first: bool, depth: float, high: bool, frozen: bool) -> dict[str, Any]:
    shape = [64, 64, 3, 3]
    tensors = {name: tensor(rng, 0.02 if "weight" in name else 1.0, shape, depth, not high) for name in OPERANDS}
    tensors["weight_gradient"] = tensor(rng, 10 ** (-6 + 4 * depth) / (1 + step / 500), shape, depth, False)
    if high:
        tensors = {name: tensors[name] for name in ("weight", "weight_gradient")}
    if frozen:
        tensors = {name: value for name, value in tensors.items() if "grad" not in name}
    norm = rng.uniform(1, 2)
    ratio = 6 / (1 + step / 400) * rng.uniform(0.7, 1.3)
    record = {
        "op": "conv2d",
        "precision": "high" if high else "nvfp4",
        "reason": "thin_layers: 3 channels" if high else "",
        "tensors": tensors,
        "flip_rate": None if first or high else 0.2 / (1 + step / 300) * rng.uniform(0.8, 1.2),
        "oscillation": None if first or high else 0.02 * rng.random(),
    }
    if not frozen and not high:
        record["gradient"] = {"norm": norm, "noise": norm / ratio, "ratio": ratio, "alarm": ratio < 1.73}
    return record


def header(name: str, names: list[str], high: bool = False, model: str = "UNet") -> dict[str, Any]:
    return {
        "kind": "run",
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "group": "camvid",
        "model": model,
        "recipe": "" if high else '# a recipe\n[precision]\nstem = "high"\n',
        "backend": "" if high else "integer or vendor",
        "every": 100,
        "started": "2026-11-25T21:30:00+00:00",
        "layers": [{"name": item, "op": "conv2d", "shape": [64, 64, 3, 3]} for item in names],
    }


def write_run(
    path: Path, layers: int = 5, steps: int = 6, name: str = "nvfp4", high: bool = False, **options: Any
) -> Path:
    """A run: a first layer in high precision, a frozen second one, NaN statistics here and there; all high: bf16."""
    rng = random.Random(f"{layers} {steps} {name}")
    names = options.pop("names", None) or NAMES[layers]
    sink = JSONL(path)
    sink.start(header(name, names, high, **options))
    for index in range(steps):
        step = 100 * index
        record = {
            item: layer(rng, step, not index, place / len(names), high or (place == 0 < len(names) - 1), place == 1)
            for place, item in enumerate(names)
        }
        if len(names) > 3 and index == steps // 2:
            record[names[3]]["tensors"]["weight"]["raw"].update(kurtosis=float("nan"), mean=float("inf"), nonfinite=7)
        sink.step({"kind": "step", "step": step, "layers": record})
        loss = 2 / (1 + step / 200) + rng.gauss(0, 0.02)
        sink.scalars(step, {"train/loss": loss})
        if index % 2:
            sink.scalars(step, {"val/miou": 0.5 - loss / 4})
        if not high and index == steps - 1:
            sink.alarm(
                {
                    "kind": "alarm",
                    "step": step,
                    "layer": names[-1],
                    "text": "gradient noise: norm / noise = 1.5 < sqrt(3)",
                }
            )
    sink.close()
    return path
