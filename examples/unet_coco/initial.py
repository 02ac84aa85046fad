"""Load trained weights at the start, to fine-tune in NVFP4 or any precision (--init-from, --init-skip).

    last.pt         a checkpoint of this trainer, of any precision, with its shards if it has any; its model is used,
                    with --ema the average
    *.pt, *.pth     a state_dict, read by torch.load(weights_only=True)
    *.safetensors   the same as a safetensors file

Names are compared without the prefixes of DDP ("module.") and torch.compile ("_orig_mod."). Every tensor of the model
must be in the file, with its shape, and every tensor of the file in the model, except those that `skip` names, which
stay as they are. A file that is missing, damaged or of another kind is refused. If tensors do not fit, all of them are
listed and nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.errors import describe, runtime_error, value_error
from te_nvfp4_cv.nn.learned import NAMES

from .checkpoint import FORMAT
from .shards import read_weights_of

FORMS = "last.pt of this trainer, a state_dict (.pt) or a .safetensors file"
FIX = "give the options the weights were trained with (--scale, --classes, ...), or --init-skip 'head.*'"
SHOWN = 20


def load_initial(model: nn.Module, path: Path, skip: Sequence[str] = (), high_precision: bool = False) -> None:
    """Copy the weights of a file into `model`, in the model's dtypes and memory layout.

    Args:
        skip: Patterns of plain names ("head.*") of tensors, in the model or in the file, to leave alone.
        high_precision: Whether the model has no fractions of --learn-scales; then those in the file are ignored.
    Raises:
        ValueError: If the file cannot be read or is of another kind; if tensors are missing, unexpected, of another
            shape or not finite; or if a pattern names no tensor.
        RuntimeError: If the file is a .safetensors file and the package safetensors is not installed.
    """
    what = f"--init-from: {path}"
    found = plain_names(read_weights(path).items(), what)
    # Earlier versions saved the fractions of --learn-scales without an axis.
    found = {name: t.reshape(1) if _is_fraction(name) and not t.dim() else t for name, t in found.items()}
    wanted = plain_names(model.state_dict(keep_vars=True).items(), what)
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in (*wanted, *found)):
            raise value_error(
                f"--init-skip {pattern} names no tensor.",
                got=pattern,
                needs=f"a pattern of names of the model or the file: {_listed(wanted)}",
                fix="--init-skip 'head.*'",
            )
    found, wanted = (
        {name: t for name, t in tensors.items() if not any(fnmatchcase(name, pattern) for pattern in skip)}
        for tensors in (found, wanted)
    )
    if high_precision:  # the fractions of --learn-scales have an effect in NVFP4 only
        found = {name: t for name, t in found.items() if name in wanted or not _is_fraction(name)}
    # fractions that --learn-scales added start at 1 if the file has none
    wanted = {name: t for name, t in wanted.items() if name in found or not _is_fraction(name)}
    copy_all(wanted, found, what, FIX)


def copy_all(wanted: dict[str, Tensor], found: dict[str, Tensor], what: str, fix: str) -> None:
    """Copy every tensor of `found` into that of the same name, if the names are the same and all of them fit.

    Args:
        what: The option and its value, for the error.
        fix: What to do if the tensors do not fit, for the error.
    Raises:
        ValueError: If tensors are missing, unexpected, of another shape or not finite; nothing was copied then.
    """
    # All tensors are checked before the first is copied, so that an error leaves the model unchanged.
    _check(what, found, wanted, fix)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])


def _is_fraction(name: str) -> bool:
    return name.rpartition(".")[2] in NAMES.values()


def read_weights(path: Path, option: str = "--init-from") -> dict[str, Tensor]:
    """Read the tensors of a file, by their names, onto the CPU; errors name the option that the file was given to."""
    if not path.is_file():
        raise value_error(
            f"{option}: {path} is missing.",
            got="a folder" if path.is_dir() else "no such file",
            needs=FORMS,
            fix="check the path",
        )
    try:
        state = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    except ModuleNotFoundError as error:
        raise runtime_error(
            f"{option}: {path} needs the package safetensors.",
            got="it is not installed",
            needs="pip install safetensors",
            fix="install it, or save the weights by torch.save(model.state_dict(), ...)",
        ) from error
    except Exception as error:  # a damaged file can fail anywhere in the reader, with any class of error
        raise value_error(
            f"{option}: {path} cannot be read.",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'an empty message'}",
            needs=f"a complete file: {FORMS}; code is not loaded from it",
            fix="download or write it again: torch.save(model.state_dict(), ...)",
        ) from error
    if isinstance(state, dict) and "format" in state and "model" in state:
        if state["format"] != FORMAT:
            raise value_error(
                f"{option}: {path} is not a checkpoint of this version.",
                got=f"format {state['format']}",
                needs=f"format {FORMAT}",
                fix="save only its model: torch.save(torch.load(FILE)['model'], ...)",
            )
        average = state.get("ema")
        state = read_weights_of(path.parent / state["shards"]) if "shards" in state else state["model"]
        if average:
            state = {**state, **average}
    foreign = _foreign(state)
    if foreign:
        raise value_error(
            f"{option}: {path} contains no weights.",
            got=foreign,
            needs=f"{FORMS}, with names and tensors only",
            fix="save only the weights: torch.save(model.state_dict(), ...)",
        )
    return state


def _safetensors(path: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(path)


def _pickled(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _foreign(state: Any) -> str:
    """Describe the first entry that does not belong in a state_dict, or return "" if there is none."""
    if not isinstance(state, dict):
        return describe(state)
    others = [f"{name}: {type(value).__name__}" for name, value in state.items() if not isinstance(value, Tensor)]
    return _listed(others) if others else "" if state else "an empty table"


def plain_names(tensors: Iterable[tuple[str, Tensor]], what: str) -> dict[str, Tensor]:
    """Return the tensors by their names without the prefixes of DDP and torch.compile.

    Raises:
        ValueError: If two tensors get the same name.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors:
        short = str(name).replace("_orig_mod.", "")
        while short.startswith("module."):
            short = short.removeprefix("module.")
        if short in plain:
            raise value_error(
                f"{what} contains a tensor twice.",
                got=f"{name} and another {short}",
                needs="each name once, not counting module. and _orig_mod.",
                fix="save the weights of one model",
            )
        plain[short] = tensor
    return plain


def _check(what: str, found: dict[str, Tensor], wanted: dict[str, Tensor], fix: str) -> None:
    both = [name for name in wanted if name in found]
    fitting = [name for name in both if found[name].is_floating_point() == wanted[name].is_floating_point()]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of another shape": [
            f"{name} {tuple(found[name].shape)} for {tuple(wanted[name].shape)}"
            for name in both
            if found[name].shape != wanted[name].shape
        ],
        "of another kind": [
            f"{name} {found[name].dtype} for {wanted[name].dtype}" for name in both if name not in fitting
        ],
        "not finite": [name for name in fitting if not bool(found[name].to(wanted[name].dtype).isfinite().all())],
    }
    if any(problems.values()):
        raise value_error(
            f"{what} does not fit the model; nothing was loaded.",
            got="; ".join(f"{why}: {', '.join(names)}" for why, names in problems.items() if names),
            needs="each tensor of the model once, with its shape and finite values, and no other",
            fix=fix,
        )


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:SHOWN]) + (f", and {len(every) - SHOWN} more" if len(every) > SHOWN else "")
