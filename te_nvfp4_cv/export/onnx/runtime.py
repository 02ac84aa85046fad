"""Run an ONNX file in onnxruntime, on the CPU: to compare it with the model that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from te_nvfp4_cv.errors import need_package


def run(path: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the floating-point outputs of a file of nv.export.to_onnx in its form "portable".

    Args:
        inputs: in the order of the graph's inputs.
    Raises:
        RuntimeError: onnxruntime is not installed.
    """
    need_package("onnxruntime", "onnxruntime is not installed.", needs="it", fix="pip install onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    named = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, named) if y.dtype.kind == "f"]
