"""A bundle: one training step as a file, with all that a replay needs and nothing else.

    build(arguments) -> (model, loss);  model.load_state_dict(model_state);  model.train();  torch.manual_seed(seed)
    with torch.autocast(..), nvfp4_autocast(recipe): loss(model, batch)

State before the optimizer step, seed as it was set before the forward pass. Written by torch.save into a temporary file
beside the target, flushed, then renamed: a file of this name is whole, or there is none. Read with weights_only=True: a
bundle holds tensors, numbers and text, and runs no code; whose function `builder` names is the reader's to decide.
Refused: objects of other classes, tensor subclasses without memory of their own, damaged and foreign files.
"""

from __future__ import annotations

import io
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.errors import describe, message, type_error, value_error
from te_nvfp4_cv.files import write_atomically
from te_nvfp4_cv.recipe.files import parse_recipe

FORMAT, VERSION = "te_nvfp4_cv bundle", 1
AUTOCAST = (None, "bfloat16", "float16")


@dataclass(frozen=True)
class Bundle:
    """One step.

    Attributes:
        model_state: state_dict before the step.
        batch: what the loss function takes: tensors, numbers and text in dicts, lists and tuples.
        seeds: {"torch": the seed that torch.manual_seed was given before the forward pass}.
        recipe_text: the recipe as TOML, its [precision] table included; "" for a step without NVFP4.
        builder: {"name": "package.module:function", "arguments": {...}}, which gives (model, loss).
        step: its number; `reason`: why it was kept, in words.
        autocast: dtype of torch.autocast, "bfloat16" or "float16", or None.
        nvfp4_state: nv.extra_state(model) before the step, for delayed tensor scales, or None.
        loss: that of the step, to compare a replay with, or None.
    """

    model_state: dict[str, Any]
    batch: Any
    seeds: dict[str, int]
    recipe_text: str
    builder: dict[str, Any]
    step: int
    reason: str
    autocast: str | None = None
    nvfp4_state: dict[str, Any] | None = None
    loss: float | None = None
    optimizer_state: dict[str, Any] | None = None
    extra: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        kinds = {"model_state": Mapping, "seeds": Mapping, "recipe_text": str, "builder": Mapping, "reason": str}
        for field, kind in {**kinds, "step": int}.items():
            if not isinstance(getattr(self, field), kind):
                raise _bad(field, f"{getattr(self, field)!r:.80}", f"a {kind.__name__.lower()}")
        if not isinstance(self.seeds.get("torch"), int):
            raise _bad("seeds", f"{self.seeds!r:.80}", '{"torch": the seed given to torch.manual_seed before the step}')
        if self.autocast not in AUTOCAST:
            raise _bad("autocast", f"{self.autocast!r:.80}", f"one of {', '.join(map(repr, AUTOCAST))}")
        name, arguments = self.builder.get("name"), self.builder.get("arguments")
        if not isinstance(name, str) or name.count(":") != 1 or not isinstance(arguments, Mapping):
            raise _bad("builder", f"{self.builder!r:.80}", '{"name": "package.module:function", "arguments": {...}}')
        try:
            json.dumps(arguments)
        except (TypeError, ValueError) as error:
            raise _bad("builder", str(error), "arguments that JSON can hold") from None
        if self.recipe_text:
            parse_recipe(self.recipe_text, "the bundle's recipe")


def _bad(field: str, got: str, needs: str) -> ValueError:
    return value_error(f"bundle: bad {field}.", got=got, needs=needs, fix=f"correct {field}")


def save_bundle(
    path: str | os.PathLike[str],
    *,
    model_state: Mapping[str, Any],
    batch: Any,
    seeds: Mapping[str, int],
    recipe_text: str,
    builder: Mapping[str, Any],
    step: int,
    reason: str,
    optimizer_state: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    autocast: str | None = None,
    nvfp4_state: Mapping[str, Any] | None = None,
    loss: float | None = None,
) -> None:
    """Write a bundle; arguments are Bundle's. Tensors are copied to the CPU, with their memory format.

    Raises:
        ValueError, TypeError: something that a bundle cannot hold; RuntimeError: the file cannot be written. What lay
            at `path` before is untouched then.
    """
    fields = dict(
        model_state=model_state,
        batch=batch,
        seeds=seeds,
        recipe_text=recipe_text,
        builder=builder,
        step=step,
        reason=reason,
        autocast=autocast,
        nvfp4_state=nvfp4_state,
        loss=loss,
        optimizer_state=optimizer_state,
        extra=extra,
    )
    Bundle(**fields)  # type: ignore[arg-type]
    copied = {name: _copied(value, name) for name, value in fields.items()}
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **copied}, buffer)
    write_atomically(Path(path), buffer.getbuffer())


def _copied(value: Any, where: str) -> Any:
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__") or hasattr(value, "full_tensor"):
            raise type_error(
                f"bundle: {where} is a tensor subclass.",
                got=type(value).__name__,
                needs="plain tensors",
                fix="a DTensor's full_tensor(); dequantize() of a quantized one",
            )
        return value.detach().to("cpu", copy=True)
    if isinstance(value, OrderedDict):  # a state_dict: its _metadata holds the versions of the modules
        copied = OrderedDict((_copied(key, where), _copied(item, f"{where}[{key!r}]")) for key, item in value.items())
        vars(copied).update(vars(value))
        return copied
    if isinstance(value, Mapping):
        return {_copied(key, where): _copied(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_copied(item, f"{where}[{index}]") for index, item in enumerate(value))
    if value is None:
        return value
    for kind in (bool, int, float, str):  # numpy's numbers are subclasses, which weights_only refuses
        if isinstance(value, kind):
            return str.__str__(value) if kind is str else kind(value)
    raise type_error(
        f"bundle: {where} cannot be kept.",
        got=describe(value),
        needs="tensors, numbers, text and None, in dicts, lists and tuples",
        fix="torch.from_numpy(array), dict(...) or tuple(...)",
    )


def load_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Read a bundle onto the CPU.

    Raises:
        FileNotFoundError: no such file; ValueError: a damaged file, no bundle, one of another version.
    """
    if not Path(path).is_file():
        got = f"{os.fspath(path)!r}: " + ("a folder" if Path(path).is_dir() else "no such file")
        raise FileNotFoundError(
            message("bundle: not there.", got=got, needs="a file of save_bundle", fix="correct the path")
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails anywhere in the reader, with any class of error
        raise value_error(
            f"bundle: {os.fspath(path)} cannot be read.",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'an empty message'}",
            needs="a complete file of save_bundle",
            fix="copy or write the bundle again",
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        kind = f"keys {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else type(state).__name__
        raise value_error(
            f"bundle: {os.fspath(path)} is no bundle.",
            got=kind,
            needs="a file of nv.sensitivity.save_bundle",
            fix="pass the bundle, not a checkpoint",
        )
    if state.get("version") != VERSION:
        raise value_error(
            f"bundle: {os.fspath(path)} is of another version.",
            got=f"version {state.get('version')!r}",
            needs=f"version {VERSION}",
            fix="read it with the version of te_nvfp4_cv that wrote it",
        )
    names = Bundle.__dataclass_fields__
    fields = {name: value for name, value in state.items() if name in names}
    try:
        return Bundle(**fields)
    except TypeError as error:  # a field is missing
        raise value_error(
            f"bundle: {os.fspath(path)} is incomplete.",
            got=str(error).partition("() ")[2],
            needs=", ".join(names),
            fix="write it with save_bundle",
        ) from None
