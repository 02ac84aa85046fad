"""Check exported files: the precision that each layer really has, against what the file says."""

from __future__ import annotations

from pathlib import Path

from te_nvfp4_cv.export.verify.inspection import inspect_safetensors
from te_nvfp4_cv.export.verify.report import Report


def verify(path: str | Path) -> Report:
    """Inspect an exported file: safetensors, the index of several, or ONNX.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read.
        RuntimeError: The package onnx is missing.

    Example:
        >>> import tempfile, torch, te_nvfp4_cv as nv
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = nv.export.save(torch.nn.Conv2d(32, 32, 3), f"{folder}/layer")
        ...     report = verify(saved.files[0])
        >>> report.sound, report.rows[0].precision
        (True, 'nvfp4')
    """
    if Path(path).suffix == ".onnx":
        # In the function: it needs numpy's extra types and onnx, and a safetensors file does not.
        from te_nvfp4_cv.export.verify.inspection_onnx import inspect_onnx

        return inspect_onnx(Path(path))
    return inspect_safetensors(Path(path))
