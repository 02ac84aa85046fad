"""Show what happens to weights, activations and gradients in 4-bit training, as records, curves and heatmaps.

    attach(model, every=100, sinks=...)     watch the training of a model in chosen steps
    JSONL, WandB, TensorBoard               where its records go
    read(path)                              a file of records, as a Run
    render_heatmaps(path, out)              pictures of one run
    write_report(paths, out)                several runs side by side, as one HTML file
"""

from te_nvfp4_cv.telemetry.collect import Telemetry, attach
from te_nvfp4_cv.telemetry.heatmaps import render as render_heatmaps
from te_nvfp4_cv.telemetry.records import Run, read
from te_nvfp4_cv.telemetry.report import write_report
from te_nvfp4_cv.telemetry.sinks import JSONL, Sink, TensorBoard, fresh_path
from te_nvfp4_cv.telemetry.weights_and_biases import WandB

__all__ = [
    "JSONL", "Run", "Sink", "Telemetry", "TensorBoard", "WandB", "attach", "fresh_path", "read",
    "render_heatmaps", "write_report",
]
