"""Say what computed a run: commit, backend, kernels, processor, versions, threads.

A run that was stopped may go on elsewhere. The products of the integer backend have the same bits on all machines, but
layers in high precision do not. So a run on `integer` goes on, and its row lists all machines that it ran on; any other
run starts again if the machine or a version differs.
"""

from __future__ import annotations

import functools
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from unet_coco.backends import backend_of, kernels_of, processor
from unet_coco.precision import Precision

import te_nvfp4_cv as nv

ROOT = Path(nv.__file__).resolve().parents[1]  # of the package that is imported, which need not be beside this file


@functools.cache
def commit() -> str:
    """Return the commit of the package's checkout, or "unknown" without git; with "+" if tracked files were changed.

    Rows of results that a run of before has added to the checkout (docs/) do not count.
    """
    try:
        run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
        changed = run(["git", "status", "--porcelain", "--untracked-files=no", ":!docs"]).stdout.strip()
        return run(["git", "rev-parse", "HEAD"]).stdout.strip()[:12] + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def machine(precision: Precision, device: torch.device) -> dict[str, Any]:
    """Return what computes a run of this precision here, as it is written into rows and checkpoints."""
    return {
        "commit": commit(),
        "backend": backend_of(precision, device),
        "kernels": kernels_of(device),
        "processor": kernels_of(device) if device.type == "cuda" else processor(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of what differs and keeps a run from going on, as the first lines of this file say.

    Commits may differ: a change of the numbers is a change of the study, and starts with an empty folder.
    """
    if then["backend"] == now["backend"] == "integer":
        return []
    return [key for key in now if key != "commit" and then.get(key) != now[key]]
