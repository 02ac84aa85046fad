"""User errors and one-time warnings, in one shape everywhere.

A message says what came (`got`), what is needed (`needs`) and what to do (`fix`). Nothing here looks at tensors'
values.
"""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

_warned: set[str] = set()
_warned_lock = threading.Lock()


def message(title: str, *, got: str, needs: str, fix: str) -> str:
    """Return the text of a user error: a title line, then got / needs / fix, one line each.

    If `got` is the text of another such error, the result has that one's lines, which say more, under both titles.
    """
    if "\n  got:" in got:  # two blocks inside of each other would be hard to read
        return f"{title.removesuffix('.')}: {got}"
    return f"{title}\n  got:   {got}\n  needs: {needs}\n  fix:   {fix}"


def value_error(title: str, *, got: str, needs: str, fix: str) -> ValueError:
    """Make a ValueError to raise: an argument's value, shape or dtype is not usable."""
    return ValueError(message(title, got=got, needs=needs, fix=fix))


class ShapeError(ValueError):
    """Says that a layer's tensors or arguments do not fit each other: what torch's own layer refuses, too."""


def shape_error(title: str, *, got: str, needs: str, fix: str) -> ShapeError:
    """Make a ShapeError to raise."""
    return ShapeError(message(title, got=got, needs=needs, fix=fix))


def type_error(title: str, *, got: str, needs: str, fix: str) -> TypeError:
    """Make a TypeError to raise: an argument is of the wrong class."""
    return TypeError(message(title, got=got, needs=needs, fix=fix))


def runtime_error(title: str, *, got: str, needs: str, fix: str) -> RuntimeError:
    """Make a RuntimeError to raise: the call is right, but this machine or this state cannot serve it."""
    return RuntimeError(message(title, got=got, needs=needs, fix=fix))


def no_such_file(title: str, *, got: str, needs: str, fix: str) -> FileNotFoundError:
    """Make a FileNotFoundError to raise: Python's own class for this, with the text in our form."""
    return FileNotFoundError(message(title, got=got, needs=needs, fix=fix))


def bad_value(caller: str, name: str, got: str, needs: str) -> ValueError:
    """Make a ValueError to raise: the argument or field of that name is not usable."""
    return value_error(f"{caller}: bad {name}.", got=got, needs=needs, fix=f"correct {name}")


def need_package(name: str, title: str, *, needs: str, fix: str) -> None:
    """Refuse to go on without an optional package.

    Raises:
        RuntimeError: the package cannot be imported.
    """
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise runtime_error(title, got=str(error), needs=needs, fix=fix) from error


def warn_once(key: str, text: str, category: type[Warning] = UserWarning) -> None:
    """Warn with `text` the first time that `key` is seen in this process."""
    with _warned_lock:
        if key in _warned:
            return
        _warned.add(key)
    warnings.warn(text, category, stacklevel=3)  # names the line that called the function which warns


def describe(tensor: object) -> str:
    """Return the shape and dtype of a tensor, or the class of anything else, for the `got` line."""
    shape = getattr(tensor, "shape", None)
    if shape is None:
        return type(tensor).__name__
    return f"{tuple(shape)} {str(getattr(tensor, 'dtype', '')).removeprefix('torch.')}"


def check_module(caller: str, model: object, call: str) -> None:
    """Refuse a model that is no torch.nn.Module; `call` shows how `caller` is used.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise type_error(f"{caller}: not a module.", got=describe(model), needs="a torch.nn.Module", fix=call)


def check_trainable(caller: str, model: nn.Module) -> None:
    """Refuse a model that cannot be trained: one with lazy parameters, or one whose layers hold NVFP4 codes in place of
    weights (nv.export).

    Raises:
        ValueError: the model has such layers; the message names the first of them.
    """
    # Asked by an attribute of the class: an import of nv.export from here would point up.
    packed = [name for name, module in model.named_modules() if hasattr(type(module), "nvfp4_weight")]
    if packed:
        raise value_error(
            f"{caller}: an inference model.",
            got=", ".join(packed[:4]),
            needs="the model that is trained, with weights of its own",
            fix="give the original; te-nvfp4-cv verify FILE tells what an exported file holds",
        )
    lazy = [name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)]
    if lazy:
        raise value_error(
            f"{caller}: the model has lazy parameters.",
            got=", ".join(lazy[:4]),
            needs="parameters with values",
            fix="run one forward pass first",
        )


def check_batches(caller: str, batches: object) -> None:
    """Refuse something that gives no batches. A tensor would give its images one by one, without their batch axis.

    Raises:
        TypeError: `batches` is a tensor, or cannot be iterated over.
    """
    # Python also iterates over what has indices alone, as sequences of batches of one's own often do.
    iterable = isinstance(batches, Iterable) or hasattr(type(batches), "__getitem__")
    if isinstance(batches, torch.Tensor):
        fix = "[images]; list(images) if the first axis counts batches"
    elif isinstance(batches, torch.utils.data.Dataset) and not isinstance(batches, Iterable):
        fix = "DataLoader(dataset, batch_size=16); batch_size=None if its items are batches"  # samples, mostly
    elif not iterable:
        fix = "[images]"
    else:
        return
    needs = "an iterable of batches: a list or a DataLoader"
    raise type_error(f"{caller}: no batches.", got=describe(batches), needs=needs, fix=fix)


def no_script(module: object, needs: str, fix: str) -> RuntimeError:
    """Make an error to raise from __prepare_scriptable__, which torch.jit.script calls."""
    what = f"nvfp4: torch.jit.script does not take an object of {type(module).__name__}."
    return runtime_error(what, got="torch.jit.script of the model", needs=needs, fix=fix)


def check_choice(caller: str, name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Check that an argument is one of some words.

    Raises:
        ValueError: It is none of them.
    """
    if value not in allowed:
        raise value_error(
            f"{caller}: unknown {name}.",
            got=repr(value), needs=" or ".join(map(repr, allowed)), fix=f"{name}={allowed[0]!r}"
        )


def check_path(caller: str, path: str | os.PathLike[str], example: str) -> Path:
    """Return a path to write to, which must name a file.

    Raises:
        ValueError: It names none.
    """
    if not Path(path).name:
        raise value_error(f"{caller}: the path names no file.", got=repr(str(path)), needs="a file", fix=example)
    return Path(path)
