"""Draw the pictures of the README and of docs/WATCH.md from a run of the example trainer.

    make demo
    python examples/pictures.py runs/demo --out docs/demo.png

    demo.png           a heatmap of the weights beside predictions; the name is that of --out
    gradients.png      beside it: the standard deviation of each layer's weight gradients
    signal.png         beside it: each layer's signal to quantization noise

The run needs its telemetry (PRECISION/telemetry.jsonl), summary.json and predictions.png. The heatmap shows by how much
the standard deviation of each layer's weights has grown since the first sampled step: in NVFP4 of the weights as its
layers multiply them, decoded from their 4-bit codes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))  # te_nvfp4_cv of this checkout, where it is not installed

from te_nvfp4_cv.telemetry import drawing, read  # noqa: E402
from te_nvfp4_cv.telemetry.drawing import Panel  # noqa: E402
from te_nvfp4_cv.telemetry.heatmaps import table  # noqa: E402
from te_nvfp4_cv.telemetry.records import Run  # noqa: E402


def growth(run: Run, layers: Sequence[str]) -> np.ndarray:
    """Return by how many percent the standard deviation of each layer's weights has grown [layers, steps].

    The weights are those that its products use.
    """
    raw, decoded = (table(run, layers, "tensors", "weight", stage, "std") for stage in ("raw", "dequantized"))
    used = np.where(np.isfinite(decoded), decoded, raw)  # layers in high precision have no codes
    return 100 * (used / used[:, :1] - 1)


def tiles(sheet: np.ndarray) -> np.ndarray:
    """Cut the titles at the top of predictions.png off, and the last line of text at its bottom."""
    white = (sheet[..., :3] == 1).all(axis=(1, 2))
    end = len(sheet)
    for wanted in (True, False, True):  # the margin, the text, the gap above it
        while end > 20 and white[end - 1] == wanted:
            end -= 1
    return sheet[20:end] if end > 20 else sheet[20:]  # a sheet without a legend


def draw(folder: Path, out: Path) -> None:
    """Draw the picture of the run in `folder`.

    Raises:
        ValueError: The folder is not that of a finished run with telemetry.
    """
    import matplotlib.image

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    summary, sheet = folder / "summary.json", folder / "predictions.png"
    if not summary.is_file() or not sheet.is_file():
        raise ValueError(f"{folder} has no summary.json and predictions.png: name the folder of a finished run")
    scores = json.loads(summary.read_text(encoding="utf-8"))
    runs = {name: read(folder / name / "telemetry.jsonl") for name in scores}
    layers = next(iter(runs.values())).layers
    if not all(run.steps for run in runs.values()):
        raise ValueError(f"{folder}: no weights in its telemetry: train without --telemetry-every 0")
    values = {name: growth(run, layers) for name, run in runs.items()}
    found = np.concatenate([some[np.isfinite(some)] for some in values.values()])
    low, high = np.percentile(found, (1, 99))

    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.2, 1))
    maps = left.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, (name, run) in zip(maps, runs.items(), strict=True):
        picture = axes.imshow(values[name], aspect="auto", interpolation="nearest", vmin=low, vmax=high, cmap="viridis")
        steps = list(run.steps)
        ticks = range(0, len(steps), max(1, len(steps) // 4))
        axes.set_xticks(ticks, [steps[tick] for tick in ticks])
        axes.set(title=name, xlabel="step")
    maps[0].set_yticks(range(len(layers)), layers, fontsize=8)
    left.colorbar(picture, ax=maps, shrink=0.8, format="{x:+.0f} %")
    left.suptitle("Weights: growth of each layer's standard deviation")

    axes = right.subplots()
    shown = tiles(matplotlib.image.imread(sheet))
    axes.imshow(shown, interpolation="nearest")
    axes.set_axis_off()
    columns = ("image", "truth", *scores)
    for column, title in enumerate(columns):
        axes.text((column + 0.5) * shown.shape[1] / len(columns), -4, title, ha="center", va="bottom", fontsize=12)
    right.suptitle("Predictions: " + ", ".join(f"{name} {row['miou']:.3f} mIoU" for name, row in scores.items()))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    watched(list(runs.values())[-1], out.parent)


def watched(run: Run, folder: Path) -> None:
    """Draw what te-nvfp4-cv heatmaps draws of a run, as narrow as a page: gradients, and the noise of quantization."""
    steps, layers = list(run.steps), run.layers
    values = table(run, layers, "tensors", "weight_gradient", "raw", "std")
    bounds = drawing.limits([values], diverging=False)
    title = f"Weight gradients: standard deviation\n{run.model}, run {run.name}"
    map_ = drawing.heatmap(Panel(title, steps, values), layers, bounds, "units of the gradient", wide=7.0)
    title = f"Weights: signal to quantization noise\n{run.model}, run {run.name}"
    curves = drawing.curves(
        Panel(title, steps, table(run, layers, "tensors", "weight", "sqnr_db")), layers, "SQNR (dB)"
    )
    for name, figure in (("gradients.png", map_), ("signal.png", curves)):
        drawing.image(figure).quantize(256).save(folder / name, optimize=True)  # small files


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Draw pictures of a run of examples/unet_coco.")
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"), metavar="RUN", help="its folder")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), metavar="FILE", help="default: demo.png")
    options = parser.parse_args(arguments)
    try:
        draw(options.run, options.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(options.out)


if __name__ == "__main__":
    main()
