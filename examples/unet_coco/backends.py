"""Say where the NVFP4 layers of a run are multiplied, and keep to it at a resume, so that resumes stay bit-exact.

    reference, integer, vendor, triton    te_nvfp4_cv's backends, as --backend names them
    integer or vendor                     what --backend auto means on a CPU whose integer kernels are right

Checkpoints, telemetry and the results of the accuracy study hold this name, with the instruction set of the compiled
kernels, which changes no bit of "integer". Checkpoints of versions before 0.2 do not: on a CPU auto meant vendor then.
"""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path

import torch

from te_nvfp4_cv.backend import dispatch, native
from te_nvfp4_cv.errors import runtime_error

from .precision import Precision
from .tracking import tell_once


def backend_of(precision: Precision, device: torch.device) -> str:
    """Return the name of the backend that a precision's NVFP4 layers run on, or "" if it has none.

    Raises:
        RuntimeError: If the backend that --backend names cannot run on this device.
    """
    return "" if precision.recipe is None else dispatch.resolve(precision.backend, device, by_layer=True)


def kernels_of(device: torch.device) -> str:
    """Return what the compiled kernels are made for: an instruction set of the CPU, a GPU, or "none"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    library = native.load()
    return "none" if library is None else library.nvfp4_machine().decode()


def in_words(precision: Precision, device: torch.device) -> str:
    """Return backend and kernels in one text, or "" for a precision without NVFP4."""
    backend = backend_of(precision, device)
    return f"{backend}, kernels for {kernels_of(device)}" if backend else ""


def processor() -> str:
    """Return the name of the processor as the system gives it, for example "AMD EPYC 7763 64-Core Processor"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def keep_backend(path: Path, saved: str | None, precision: Precision, device: torch.device) -> Precision:
    """Return the precision with the backend that the checkpoint's run had.

    A --backend that is not auto has priority; a note says so if it changes what runs.

    Args:
        path: The checkpoint, for the error.
        saved: What backend_of returned when the run began. If None, the checkpoint does not say.
    Raises:
        RuntimeError: If that backend cannot run here.
    """
    now = backend_of(precision, device)
    if saved is None:
        saved = "vendor" if now and device.type == "cpu" else now
    if saved == now:
        return precision
    if precision.backend != "auto":
        tell_once(
            f"note: {precision.name} was trained on backend {saved!r} and goes on with --backend {precision.backend}.\n"
            "  It does not continue bit for bit: sums are rounded differently from here on."
        )
        return precision
    try:
        if saved == dispatch.BY_LAYER:  # no backend of its own: auto means it, or it cannot be had
            raise RuntimeError("the integer kernels are missing, or failed their check on this machine")
        dispatch.resolve(saved, device)
    except RuntimeError as error:
        raise runtime_error(
            f"checkpoint: {path} cannot be continued bit for bit on this machine.",
            got=f"a run on backend {saved!r}; here: {str(error).splitlines()[-1]}",
            needs="the backend that the run began with",
            fix=f"resume where it can run, or continue with other rounding: --backend {now.split()[-1]}",
        ) from error
    tell_once(f"note: {precision.name} goes on with backend {saved!r}, as it began; auto would now mean {now!r}.")
    return dataclasses.replace(precision, backend=saved)
