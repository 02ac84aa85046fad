"""Telemetry: what happens to weights, activations and gradients in 4-bit training, as records, curves and heatmaps.

collect.py     attach(model, every=100, sinks=...): looks on in chosen steps
sinks.py       JSONL, WandB, TensorBoard
records.py     the file format, read(path)
"""

from te_nvfp4_cv.telemetry.collect import Telemetry, attach
from te_nvfp4_cv.telemetry.records import Run, read
from te_nvfp4_cv.telemetry.sinks import JSONL, Sink, TensorBoard, WandB, fresh_path

__all__ = ["JSONL", "Run", "Sink", "Telemetry", "TensorBoard", "WandB", "attach", "fresh_path", "read"]
