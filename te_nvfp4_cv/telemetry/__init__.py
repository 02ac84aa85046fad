"""Telemetry: what happens to weights, activations and gradients in 4-bit training, as records, curves and heatmaps.

collect.py     attach(model, every=100, sinks=...): looks on in chosen steps
sinks.py       JSONL, WandB, TensorBoard
records.py     the file format, read(path)
heatmaps.py    pictures of one run: render_heatmaps(path, out)
report.py      several runs side by side as one HTML file: write_report(paths, out)
drawing.py     what both draw with matplotlib
"""

from te_nvfp4_cv.telemetry.collect import Telemetry, attach
from te_nvfp4_cv.telemetry.heatmaps import render as render_heatmaps
from te_nvfp4_cv.telemetry.records import Run, read
from te_nvfp4_cv.telemetry.report import write_report
from te_nvfp4_cv.telemetry.sinks import JSONL, Sink, TensorBoard, WandB, fresh_path

__all__ = [
    "JSONL",
    "Run",
    "Sink",
    "Telemetry",
    "TensorBoard",
    "WandB",
    "attach",
    "fresh_path",
    "read",
    "render_heatmaps",
    "write_report",
]
