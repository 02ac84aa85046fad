"""Read a model's weights from the checkpoints that trainers write.

A checkpoint may hold its state_dict under any name (state_dict, model, params_ema, ...), and several of them; names of
tensors may begin with what a wrapper has added (module., model., _orig_mod.). What fits the model is taken, and said.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.errors import runtime_error, value_error
from te_nvfp4_cv.layer.names import plain_name

State = dict[str, Tensor]


def load_weights(model: nn.Module, path: Path, key: str | None = None) -> None:
    """Load a checkpoint into a model, and tell on stderr what had to be done for it.

    Args:
        key: the name of the state_dict in the checkpoint, with dots for tables in tables.
    Raises:
        RuntimeError: The package safetensors is missing.
        ValueError: The file is missing, damaged or of another kind, holds no state_dict of the model, or several.
    """
    found = dict(_states(read(path)))
    if key is not None:
        if key not in found:
            raise value_error(
                f"--key {key}: no state_dict of that name in {path}.", got=_listed(found),
                needs="one of these names", fix="correct --key",
            )
        found = {key: found[key]}
    if not found:
        raise value_error(
            f"--checkpoint {path} is no state_dict.", got="no table of names and tensors",
            needs="names and tensors", fix="torch.save(model.state_dict(), path)",
        )
    wanted = {plain_name(name): name for name in model.state_dict()}
    fitting = {name: fit for name, state in found.items() if (fit := _fit(state, wanted)) is not None}
    if len(fitting) > 1:
        raise value_error(
            f"--checkpoint {path}: several state_dicts fit the model.", got=_listed(fitting),
            needs="the one to take: averaged weights (ema) are others than the last ones",
            fix=f"--key {next(iter(fitting))}",
        )
    if not fitting:  # the largest is loaded as it is: torch names all that is missing
        largest = max(found, key=lambda name: len(found[name]))
        fitting = {largest: (found[largest], [])}
    name, (state, notes) = next(iter(fitting.items()))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise value_error(
            f"--checkpoint {path}: the weights do not fit the model.",
            got=" ".join(str(error).split())[:600],
            needs="a state_dict of the model" + (f"; the file holds {_listed(found)}" if len(found) > 1 else ""),
            fix="name the function that builds the model as it was trained",
        ) from error
    if len(found) > 1 and key is None:
        notes = [f"the state_dict {name!r} fits the model, of {_listed(found)}", *notes]
    for note in notes:
        print(f"note: --checkpoint {path}: {note}", file=sys.stderr)


def read(path: Path) -> Any:
    """Read what a checkpoint holds, without running code from it.

    Raises:
        RuntimeError: The package safetensors is missing.
        ValueError: The file is missing or damaged, or holds objects of classes that could run code.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # weights_only: a checkpoint may come from anywhere, and a pickle can run code.
        return torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError as error:
        raise runtime_error(
            "--checkpoint: safetensors is not installed.", got=str(error), needs="it", fix="pip install safetensors"
        ) from error
    except Exception as error:  # a damaged file fails anywhere, with any class of error
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch underlines and colours its text
        blocked = re.search(r"GLOBAL ([\w.]+)", text)
        if blocked is not None:
            raise value_error(
                f"--checkpoint {path} holds more than tensors.",
                got=f"an object of {blocked[1]}, whose code would run while it is read",
                needs="a state_dict of tensors alone",
                fix="if you trust the file, in Python: state = torch.load(path, weights_only=False), then torch.save() "
                "the state_dict in it to another file",
            ) from error
        raise value_error(
            f"--checkpoint {path} cannot be read.",
            got=f"{type(error).__name__}: {text.splitlines()[0] if text else ''}",
            needs="a state_dict of tensors alone (weights_only), .pt or .safetensors",
            fix="torch.save(model.state_dict(), path)",
        ) from error


def _states(held: Any, name: str = "", depth: int = 3) -> Iterator[tuple[str, State]]:
    """Yield the tables of tensors in what a checkpoint holds, by the path of their keys."""
    if not isinstance(held, Mapping) or not held:
        return
    if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in held.items()):
        yield name, dict(held)
    elif depth:
        for key, value in held.items():
            yield from _states(value, f"{name}.{key}" if name else str(key), depth - 1)


def _fit(state: State, wanted: Mapping[str, str]) -> tuple[State, list[str]] | None:
    """Return a state_dict under the model's names, with notes on what was changed; None if it does not fit.

    Args:
        wanted: the model's names by their names without the parts that wrappers add.
    """
    if state.keys() == set(wanted.values()):
        return state, []
    first = next(iter(wanted), "")
    # What stands before the first name, in the hope that it stands before all of them.
    before = [name.removesuffix(first) for name in state if first and name.endswith(f".{first}")]
    for prefix in ("", *before):
        inside = {plain_name(name.removeprefix(prefix)): t for name, t in state.items() if name.startswith(prefix)}
        if inside.keys() != wanted.keys():
            continue
        notes = [f"{prefix!r} was taken off the names" if prefix else "parts of wrappers were taken off the names"]
        if left := len(state) - len(inside):
            notes.append(f"{left} other tensors are not the model's and were left out")
        return {wanted[name]: t for name, t in inside.items()}, notes
    return None


def _listed(states: Mapping[str, Any]) -> str:
    names = [name or "(the file itself)" for name in states]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
