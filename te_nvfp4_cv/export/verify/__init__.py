"""Check exported files: the precision that each layer really has, against what the file says."""

from __future__ import annotations

from pathlib import Path

import torch

from te_nvfp4_cv.backend.torch_private import tree_leaves
from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.export.artifact import is_of_torch
from te_nvfp4_cv.export.verify.inspection import inspect_safetensors
from te_nvfp4_cv.export.verify.report import Report


def verify(path: str | Path) -> Report:
    """Inspect an exported file: safetensors, the index of several, or ONNX.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, or is a checkpoint of torch.save; the message says what it holds.
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
    if Path(path).is_file() and is_of_torch(Path(path)):
        raise _of_torch(Path(path))
    return inspect_safetensors(Path(path))


def _of_torch(path: Path) -> ValueError:
    """Return the error for a file of torch.save: what it holds, and how it becomes a file that can be checked."""
    try:
        held = tree_leaves(torch.load(path, map_location="meta", weights_only=True))
        tensors = [leaf for leaf in held if isinstance(leaf, torch.Tensor)]
        kinds = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
        got = f"{len(tensors)} tensors of {kinds}, none of them packed by nv.export" if tensors else "no tensors"
    except Exception as error:  # another pickle or archive; it is not opened without weights_only, as it could run code
        got = f"something else than tensors ({type(error).__name__})"
    return value_error(
        f"verify: {path} is a checkpoint of torch.save, not an exported file.",
        got=got,
        needs="a .safetensors or .onnx file, which says of each layer what it is",
        fix=f"te-nvfp4-cv export MODEL --checkpoint {path} --out {path.with_suffix('.safetensors').name}",
    )
