"""Save and load checkpoints, which contain everything that a bit-exact resume needs.

A full disk costs nothing but the new file:

    write:  serialise in memory -> temporary file in the same folder -> fsync -> os.replace -> fsync of the folder
    read:   torch.load(weights_only=True): tensors, numbers, text, lists and tables only

A checkpoint of another run (identity.py defines what that is) is refused, and the error names what differs.
"""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.files import write_atomically

FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` atomically. The previous file survives any failure."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(path, buffer.getbuffer(), fix="free some space, then continue with --resume")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        ValueError: If the file is damaged or is not a checkpoint of this example.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the reader, with any class of error
        raise value_error(
            f"checkpoint: {path} cannot be read.",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'an empty message'}",
            needs="a complete checkpoint of this example",
            fix="remove the file to start from the beginning, or restore it",
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise value_error(
            f"checkpoint: {path} is not a checkpoint of this example.",
            got=f"format {state.get('format') if isinstance(state, dict) else type(state).__name__}",
            needs=f"format {FORMAT}",
            fix="remove the file to start from the beginning",
        )
    return state


def check_identity(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise an error if a checkpoint's identity (identity.py) differs from this run's."""
    differing = [key for key in {**now, **saved} if saved.get(key) != now.get(key)]
    if not differing:
        return
    raise value_error(
        f"checkpoint: {path} belongs to another run (differing: {', '.join(differing)}).",
        got="; ".join(f"{key} = {_shown(saved, key)}" for key in differing),
        needs="; ".join(f"{key} = {_shown(now, key)}" for key in differing),
        fix="use the options of the checkpoint's run, choose another --out, or leave --resume out to start again",
    )


def _shown(identity: dict[str, Any], key: str) -> str:
    # What is not in an identity has its default; that of the dtype is none of today's options.
    value = identity.get(key, "bf16" if key == "compute" else "its default")
    text = " | ".join(line for line in str(value).splitlines() if line.strip())
    return text if len(text) <= 300 else text[:297] + "..."


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the random generators, in types that torch.load(weights_only=True) accepts.

    These are torch's generators (CPU and, if used, CUDA), Python's and numpy's.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the generators to the states that `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
