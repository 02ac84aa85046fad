"""Show where NVFP4 hurts a network of the study: each layer's quantization error beside what it does to the loss.

    python examples/accuracy/why.py --data FOLDER [--task shapes-unet] [--seed 0] [--at 0.25 1.0]

The default preset trains as in the study, and stops after the given shares of its steps. There, on batches of the
training data that it has not seen:

    SQNR           of the operands of each layer (x and w of fprop, dy of dgrad, both of wgrad), by telemetry, in dB
    alone          what the training loss and the whole gradient change if only this layer is quantized (nv.sensitivity)
    products       the same if all layers run only fprop, dgrad or wgrad in NVFP4, or all three, or all without one
                   technique
    Spearman       the rank correlation over layers of each operand's SQNR with the layer's gradient error

Rows go to docs/accuracy/why.jsonl. A run that is stopped goes on from its checkpoint in --out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve()
sys.path[:0] = [str(_HERE.parents[2]), str(_HERE.parents[1])]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from _torchvision import ensure_torchvision  # noqa: E402
from torch import Tensor, nn  # noqa: E402

ensure_torchvision()

from scipy.stats import spearmanr  # noqa: E402

import te_nvfp4_cv as nv  # noqa: E402
from accuracy.fit import Run, Setting, Stopped  # noqa: E402
from accuracy.plan import PLAN  # noqa: E402
from accuracy.provenance import machine  # noqa: E402
from accuracy.rows import append_row  # noqa: E402
from accuracy.tasks import TASKS, open_task, variants_of  # noqa: E402

Batches = list[tuple[Tensor, Tensor]]
OPERANDS = ("input", "weight", "grad_output", "input_column", "grad_output_column")
OTHER_EPOCH = 1 << 20  # augmentation that no epoch of the run draws
CHANGES: dict[str, dict[str, Any]] = {
    "all": {},
    "fprop only": {"high_precision_gemms": ("dgrad", "wgrad")},
    "dgrad only": {"high_precision_gemms": ("fprop", "wgrad")},
    "wgrad only": {"high_precision_gemms": ("fprop", "dgrad")},
    "all, minus RHT": {"disable_rht": True},
    "all, minus SR": {"disable_stochastic_rounding": True},
    "all, minus 2D": {"disable_2d_quantization": True},
    "all, 4over6 weights": {"nvfp4_4over6": "weights"},
    "all, 4over6, minus 2D and RHT": {
        "nvfp4_4over6": "all",
        "disable_2d_quantization": True,
        "disable_rht": True,
    },
}


def trained_to(run: Run, stop_at: list[int], step: int) -> None:
    """Train until `step`; `stop_at` is the list that the run's setting reads."""
    stop_at[0] = step
    with contextlib.suppress(Stopped):
        if run.step < step:
            run.train()


def batches_of(run: Run, count: int) -> Batches:
    """Return batches of the training images with augmentation of their own."""
    size = run.task.size.batch
    images = torch.randperm(run.task.count, generator=torch.Generator().manual_seed(run.seed))[: count * size].tolist()
    keys = [[(OTHER_EPOCH, i) for i in images[start : start + size]] for start in range(0, count * size, size)]
    return [run.task.batch(part, run.seed, run.setting.device) for part in keys]


def gradient(run: Run, batches: Batches, recipe: Any) -> tuple[float, Tensor]:
    """Return the mean loss and its gradient of all parameters, in NVFP4 by the recipe, or in high precision if None."""
    model = copy.deepcopy(run.model)  # running statistics of norms move
    losses = []
    for index, (x, y) in enumerate(batches):
        torch.manual_seed(index)  # dropout and rounding
        with nv.nvfp4_autocast(recipe, enabled=recipe is not None, backend=run.setting.backend):
            loss = run.task.loss(model(x), y) / len(batches)
        loss.backward()
        losses.append(loss.detach())
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(losses).sum()), torch.cat(parts).double()


def products(run: Run, batches: Batches) -> dict[str, dict[str, float]]:
    """Return what each part of the recipe changes: the loss, the gradient's relative error, and its cosine."""
    recipe, (loss, exact) = run.variant.recipe, gradient(run, batches, None)
    found: dict[str, dict[str, float]] = {"high precision": {"loss": loss}}
    for name, change in CHANGES.items():
        its_loss, its = gradient(run, batches, replace(recipe, name="", **change))
        found[name] = {
            "loss": its_loss - loss,
            "gradient_error": float((its - exact).norm() / exact.norm()),
            "gradient_cosine": float(F.cosine_similarity(its, exact, dim=0)),
        }
    return found


def errors(run: Run, batch: tuple[Tensor, Tensor], file: Path) -> dict[str, dict[str, float | None]]:
    """Return the SQNR in dB of each NVFP4 layer's operands in one step."""
    file.unlink(missing_ok=True)
    model = copy.deepcopy(run.model)
    with nv.telemetry.attach(model, every=1, sinks=[nv.telemetry.JSONL(file)], gradient_noise=False) as watch:
        torch.manual_seed(0)
        with watch.step(0):
            with nv.nvfp4_autocast(run.variant.recipe, backend=run.setting.backend):
                loss = run.task.loss(model(batch[0]), batch[1])
            loss.backward()
    layers = nv.telemetry.read(file).steps[0]
    return {
        name: {operand: layer["tensors"].get(operand, {}).get("sqnr_db") for operand in OPERANDS}
        for name, layer in layers.items()
        if layer["precision"] == "nvfp4"
    }


def examine(run: Run, batches: Batches, file: Path) -> dict[str, Any]:
    """Return a row's figures of the network as it is now."""
    run.model.train()
    sqnr = errors(run, batches[0], file)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return run.task.loss(model(batch[0]), batch[1])

    scan = nv.sensitivity.scan(
        run.model, loss, batches, run.variant.recipe, gradients=True, backend=run.setting.backend
    )
    layers = {}
    for row in scan.rows:
        assert row.alone is not None  # mode "one" measures it
        alone = {"loss": row.alone.loss, "standard_error": row.alone.standard_error}
        alone |= {"gradient_error": row.alone.gradient_error, "flops": row.flops}
        layers[row.name] = alone | {"sqnr_db": sqnr.get(row.name, {})}
    return {"step": run.step, "layers": layers, "products": products(run, batches), "spearman": ranks(layers)}


def ranks(layers: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the rank correlation over layers of each operand's SQNR with the gradient error of the layer alone."""
    found = {}
    for operand in OPERANDS:
        pairs = [(s["sqnr_db"].get(operand), s["gradient_error"]) for s in layers.values()]
        known = [pair for pair in pairs if None not in pair]
        if len(known) > 2:
            found[operand] = round(float(spearmanr(*zip(*known, strict=True)).statistic), 3)
    return found


def table(row: dict[str, Any]) -> str:
    """Return a row's figures in Markdown: the products, and the layers with the largest gradient error first."""
    lines = [f"**{row['task']}, seed {row['seed']}, after {row['step']} of {row['steps']} steps**", ""]
    lines += ["| in NVFP4 | loss, change | gradient, relative error | cosine |", "| --- | --- | --- | --- |"]
    for name, s in row["products"].items():
        if "gradient_error" in s:
            lines.append(f"| {name} | {s['loss']:+.4f} | {s['gradient_error']:.3f} | {s['gradient_cosine']:.4f} |")
    heads = ["layer alone", "loss, change", "gradient, relative error", *(f"{operand}, dB" for operand in OPERANDS)]
    lines += ["", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for name, s in sorted(row["layers"].items(), key=lambda pair: -pair[1]["gradient_error"]):
        cells = ["" if s["sqnr_db"].get(o) is None else f"{s['sqnr_db'][o]:.1f}" for o in OPERANDS]
        cells = [name, f"{s['loss']:+.5f}", f"{s['gradient_error']:.3f}", *cells]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Rank correlation of SQNR and gradient error: " + json.dumps(row["spearman"]), ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, examine at each share of the steps, print tables and append rows."""
    parser = argparse.ArgumentParser(prog="why.py", description="Where NVFP4 hurts a network of the study.")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="FOLDER", help="holds cifar10 and camvid")
    parser.add_argument("--out", type=Path, default=Path("runs/why"), metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=PLAN.with_name("why.jsonl"), metavar="FILE")
    parser.add_argument("--task", choices=TASKS, default="shapes-unet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at", type=float, nargs="+", default=[0.25, 1.0], metavar="SHARE")
    parser.add_argument("--batches", type=int, default=8, metavar="N")
    parser.add_argument("--epochs", type=int, metavar="N", help="another length than the study's")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    stop_at = [0]
    setting = Setting(torch.device("cpu"), backend="integer", stop=lambda: run.step >= stop_at[0])
    task = open_task(options.task, "cpu", options.data, options.out / "shapes")
    name = f"{options.task}_{options.seed}"
    path = options.out / f"{name}.pt"
    run = Run(task, variants_of(options.task)["preset"], options.seed, setting, options.epochs, path)
    batches = batches_of(run, options.batches)
    for share in sorted(options.at):
        trained_to(run, stop_at, round(share * run.steps))
        row = {"task": options.task, "seed": options.seed, "steps": run.steps}
        row |= examine(run, batches, options.out / f"{name}.jsonl")
        print(table(row), flush=True)
        append_row(options.results, row | machine(run.precision, setting.device))


if __name__ == "__main__":
    main()
