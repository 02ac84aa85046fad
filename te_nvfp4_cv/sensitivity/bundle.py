"""Save one training step as a file, a bundle, with all that a replay needs and nothing else.

    build(arguments) -> (model, loss);  model.load_state_dict(model_state);  model.train();  torch.manual_seed(seed)
    with torch.autocast(..), nvfp4_autocast(recipe): loss(model, batch)

The state is that before the optimizer step, the seed the one that was set before the forward pass. The file is written
under a temporary name and then renamed, so a file of this name is whole, or there is none. It is read with
weights_only=True: a bundle holds tensors, numbers and text, and runs no code. Whether to run the function that its
`builder` names is the reader's decision (builder.py). Objects of other classes, tensor subclasses, and damaged or
foreign files are refused.
"""

from __future__ import annotations

import functools
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

from te_nvfp4_cv.errors import bad_value, describe, no_such_file, type_error, value_error
from te_nvfp4_cv.files import write_atomically
from te_nvfp4_cv.recipe.files import parse_recipe

FORMAT, VERSION = "te_nvfp4_cv bundle", 1
AUTOCAST = (None, "bfloat16", "float16")
_bad = functools.partial(bad_value, "bundle")


@dataclass(frozen=True)
class Bundle:
    """One training step, as load_bundle returns it.

    Attributes:
        model_state: the state_dict before the step.
        batch: what the loss function takes: tensors, numbers and text in dicts, lists and tuples.
        seeds: {"torch": the seed that torch.manual_seed was given before the forward pass}.
        recipe_text: the recipe as TOML, its [precision] table included; "" for a step without NVFP4.
        builder: {"name": "package.module:function", "arguments": {...}}, which makes the model and the loss function.
        step: the number of the step.
        reason: why the step was saved, in words.
        autocast: the dtype of torch.autocast, "bfloat16" or "float16", or None.
        nvfp4_state: nv.extra_state(model) before the step, for delayed tensor scales, or None.
        loss: the loss of the step, to compare a replay with, or None.
        optimizer_state: the optimizer's state_dict before the step, or None; a replay does not need it.
        extra: anything else that a bundle can hold, or None.

    Raises:
        ValueError: a field of another kind.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> builder = {"name": "my_package.rebuild:build", "arguments": {"width": 32}}
        >>> nv.sensitivity.Bundle({}, [], {"torch": 0}, "", builder, step=12, reason="the loss is NaN").step
        12
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
        # A broken recipe is refused when the bundle is written, not weeks later when somebody reads it.
        if self.recipe_text:
            parse_recipe(self.recipe_text, "the bundle's recipe")


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
    """Write a bundle. Tensors are copied to the CPU, with their memory format.

    Args:
        path: the file to write; a file that is there is replaced.

    The other arguments are the attributes of Bundle.

    Raises:
        ValueError: a field of another kind.
        TypeError: a field is missing or unknown, or holds something that a bundle cannot.
        RuntimeError: the file cannot be written. What lay at `path` before is then untouched.

    Example:
        >>> import tempfile, te_nvfp4_cv as nv
        >>> path = tempfile.mkdtemp() + "/step.pt"
        >>> builder = {"name": "my_package.rebuild:build", "arguments": {}}
        >>> step = {"model_state": {}, "batch": [], "seeds": {"torch": 0}, "step": 12, "reason": "the loss is NaN"}
        >>> nv.sensitivity.save_bundle(path, recipe_text="", builder=builder, **step)
        >>> nv.sensitivity.load_bundle(path).reason
        'the loss is NaN'
    """
    fields: dict[str, Any] = {name: value for name, value in locals().items() if name != "path"}  # all arguments
    Bundle(**fields)  # refuses what a bundle cannot be
    # Plain data and not the Bundle: weights_only refuses our own class.
    copied = {name: _copied(value, name) for name, value in fields.items()}
    buffer = io.BytesIO()  # in memory first, so that an error of torch.save leaves no file
    torch.save({"format": FORMAT, "version": VERSION, **copied}, buffer)
    write_atomically(Path(path), buffer.getbuffer())


def _copied(value: Any, where: str) -> Any:
    if isinstance(value, Tensor):
        # Such a tensor is made of others, and its class would have to be imported to read it.
        if hasattr(value, "__tensor_flatten__") or hasattr(value, "full_tensor"):
            raise type_error(
                f"bundle: {where} is a tensor subclass.", got=type(value).__name__, needs="plain tensors",
                fix="a DTensor's full_tensor(); dequantize() of a quantized one",
            )
        return value.detach().to("cpu", copy=True)  # a copy: a view would bring the memory of its base along
    if isinstance(value, OrderedDict):  # a state_dict: its _metadata holds the versions of the modules
        copied = OrderedDict((_copied(key, where), _copied(item, f"{where}[{key!r}]")) for key, item in value.items())
        vars(copied).update(vars(value))  # an OrderedDict has attributes, unlike a dict
        return copied
    if isinstance(value, Mapping):
        return {_copied(key, where): _copied(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):  # not a NamedTuple, whose class weights_only would refuse
        return type(value)(_copied(item, f"{where}[{index}]") for index, item in enumerate(value))
    if value is None:
        return value
    for kind in (bool, int, float, str):  # numpy's numbers are subclasses, which weights_only refuses
        if isinstance(value, kind):
            return str.__str__(value) if kind is str else kind(value)
    raise type_error(
        f"bundle: {where} cannot be saved.",
        got=describe(value),
        needs="tensors, numbers, text and None, in dicts, lists and tuples",
        fix="torch.from_numpy(array), dict(...) or tuple(...)",
    )


def load_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Read a bundle onto the CPU. No code of the file runs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, no bundle, or one of another version.

    Example:
        >>> import tempfile, te_nvfp4_cv as nv
        >>> path, builder = tempfile.mkdtemp() + "/spike.pt", {"name": "my_package.rebuild:build", "arguments": {}}
        >>> step = {"model_state": {}, "batch": [], "seeds": {"torch": 0}, "step": 12, "reason": "a spike"}
        >>> nv.sensitivity.save_bundle(path, recipe_text="", builder=builder, **step)
        >>> nv.sensitivity.load_bundle(path).step
        12
    """
    if not Path(path).is_file():
        got = f"{os.fspath(path)!r}: " + ("a folder" if Path(path).is_dir() else "no such file")
        raise no_such_file("bundle: no such file.", got=got, needs="a file of save_bundle", fix="correct the path")
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
            got=kind, needs="a file of nv.sensitivity.save_bundle", fix="pass the bundle, not a checkpoint"
        )
    # Compared before the fields are: another version may have other fields.
    if state.get("version") != VERSION:
        raise value_error(
            f"bundle: {os.fspath(path)} is of another version.", got=f"version {state.get('version')!r}",
            needs=f"version {VERSION}", fix="read it with the version of te_nvfp4_cv that wrote it",
        )
    names = Bundle.__dataclass_fields__
    fields = {name: value for name, value in state.items() if name in names}  # without format and version
    try:
        return Bundle(**fields)
    except TypeError as error:  # a field is missing
        raise value_error(
            f"bundle: {os.fspath(path)} is incomplete.",
            got=str(error).partition("() ")[2], needs=", ".join(names), fix="write it with save_bundle"
        ) from None
