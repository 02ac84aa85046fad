"""Read what nv.export.to_onnx is called with: the arguments of torch.onnx.export, with the same meaning.

An argument that has no meaning here is refused, unless it asks for what is done anyway, and the error names what does
the same. The example becomes fp32, because the file takes fp32; shapes become those of torch.export.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from te_nvfp4_cv.errors import describe, type_error, value_error

CALLER = "nv.export.to_onnx"
OPSET = 23  # the first with FLOAT4E2M1
CONSTANTS = (bool, int, float, str, type(None))  # arguments of these types become constants in the graph


class TorchOptions(TypedDict, total=False):
    """The further arguments of nv.export.to_onnx, which are torch.onnx.export's."""

    kwargs: Mapping[str, Any] | None
    input_names: Sequence[str] | None
    output_names: Sequence[str] | None
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None
    dynamic_axes: Mapping[str, Mapping[int, str] | Sequence[int]] | None
    opset_version: int | None
    custom_translation_table: dict[Any, Any] | None
    verbose: bool | None
    # Scripts often say these, as what is done anyway.
    dynamo: bool
    export_params: bool
    do_constant_folding: bool
    # The names of `args` and `f` in earlier versions.
    example_input: Any
    path: Any


# An argument of torch.onnx.export: the values that ask for what is done anyway, and what to do instead of others.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "opset_version": ((None, OPSET), f"leave it out; onnx.version_converter raises the file's opset above {OPSET}"),
    "dynamo": ((True,), "leave it out: the exporter by TorchScript has no form for NVFP4's layers"),
    "verify": ((False,), "run te-nvfp4-cv verify FILE, which compares the file with what it should hold"),
    "optimize": ((True,), "leave it out: the layers are found in the optimized graph"),
    "report": ((False,), "print what nv.export.to_onnx returns; torch.onnx.export reports on the plain model"),
    "profile": ((False,), "profile torch.onnx.export on the plain model"),
    "dump_exported_program": ((False,), "torch.export.export on the plain model gives its program"),
    "artifacts_dir": ((".",), "leave it out: reports are not written"),
    "export_params": ((True,), "leave it out: weights are part of the file; external_data=True splits them off"),
    "keep_initializers_as_inputs": ((False, None), "leave it out: weights are no inputs here"),
    "training": ((None, "EVAL"), "leave it out: the file is for inference"),
    "do_constant_folding": ((True,), "leave it out: codes are never folded, other constants always are"),
    "custom_opsets": ((None,), "pass custom_translation_table"),
    "export_modules_as_functions": ((False,), "leave it out: torch's exporter has dropped it, too"),
    "operator_export_type": ((None, "ONNX"), "pass custom_translation_table"),
    "autograd_inlining": ((True, False), "leave it out"),
}


@dataclass(frozen=True)
class Call:
    """How the model is called while it is traced, and what the file's inputs and outputs are called.

    Attributes:
        args: the positional arguments, tensors in fp32.
        kwargs: the arguments that only go by keyword.
        shapes: what torch.export takes as dynamic_shapes; None if every size is fixed.
        axes: for each tensor, the names of axes that name_axes puts into the file.
        options: what else torch.onnx.export is given.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: tuple[Any, ...] | None
    axes: list[dict[int, str]]
    options: dict[str, Any]


def read_call(model: nn.Module, args: Any, dynamic_batch: bool | int, given: dict[str, Any]) -> Call:
    """Read the arguments of nv.export.to_onnx.

    Args:
        model: the model, with its own forward.
        args: a tensor, or a tuple of what forward takes.
        dynamic_batch: leave the first axis of each tensor open, up to this number, where no shapes are given.
        given: the other arguments, by the names of torch.onnx.export.
    Raises:
        TypeError: the example is no tensor, dynamic_batch no number, or an argument is unknown.
        ValueError: an argument asks for what to_onnx does not do, or the example does not fit the model.
    """
    if not isinstance(dynamic_batch, int) or (type(dynamic_batch) is int and dynamic_batch < 2):
        raise (value_error if isinstance(dynamic_batch, int) else type_error)(
            f"{CALLER}: bad dynamic_batch.", got=repr(dynamic_batch),
            needs="True, False, or the largest batch: an integer of at least 2", fix="dynamic_batch=True",
        )  # fmt: skip
    _check_options(given)
    inputs = tuple(given.get("input_names") or ("input",))
    outputs = tuple(given.get("output_names") or ("output",))
    bound = _bind(model, args, given.get("kwargs") or {})
    shapes = given.get("dynamic_shapes")
    if shapes is None and given.get("dynamic_axes") is not None:
        shapes = _by_axes(bound, given["dynamic_axes"], inputs, outputs)
    elif shapes is None and dynamic_batch:
        shapes = _by_batch(bound, dynamic_batch)
    axes: list[dict[int, str]] = []
    specs = None
    if shapes is not None:
        specs = tuple(_spec(value, part, axes) for value, part in _beside(bound, shapes))
        for (name, value), spec in zip(list(bound.arguments.items()), specs, strict=True):
            bound.arguments[name] = _mapped(_widened, value, spec)
    options = {"input_names": list(inputs), "output_names": list(outputs), "verbose": bool(given.get("verbose"))}
    options["custom_translation_table"] = given.get("custom_translation_table")
    return Call(bound.args, bound.kwargs, specs, axes, options)


def _check_options(given: Mapping[str, Any]) -> None:
    known = TorchOptions.__annotations__.keys() | REFUSED.keys()
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"{CALLER}() got an unexpected keyword argument {name!r}")
        fine, instead = REFUSED.get(name, ((value,), ""))
        if value not in fine and getattr(value, "name", value) not in fine:  # torch's enumerations, by their names
            needs = " or ".join(map(repr, fine))
            raise value_error(f"{CALLER}: {name} is not taken.", got=f"{name}={value!r}", needs=needs, fix=instead)
    if given.get("dynamic_shapes") is not None and given.get("dynamic_axes") is not None:
        raise value_error(
            f"{CALLER}: the shapes are given twice.", got="dynamic_shapes and dynamic_axes", needs="one of them",
            fix="leave out dynamic_axes",
        )  # fmt: skip


def _bind(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """Return the example as the arguments of the model's forward, tensors in fp32."""
    args = args if isinstance(args, tuple) else () if args is None and kwargs else (args,)
    values = [*args, *kwargs.values()]
    tensors = [x for x in values if isinstance(x, Tensor)]
    if not tensors or not all(isinstance(x, (Tensor, *CONSTANTS)) for x in values):
        one = len(values) == 1
        raise type_error(
            f"{CALLER}: the example is no tensor.",
            got=describe(values[0]) if one else f"({', '.join(map(describe, values))})",
            needs="a tensor whose first axis is the batch, or a tuple of them",
            fix="wrap a model that takes lists or dicts in a module that takes tensors",
        )

    def in_fp32(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x

    try:
        # What can go by position does: so the file's inputs are in the order of forward's parameters.
        return inspect.signature(model.forward).bind(
            *map(in_fp32, args), **{name: in_fp32(x) for name, x in kwargs.items()}
        )
    except TypeError as error:
        raise value_error(
            f"{CALLER}: the example does not fit the model.",
            got=f"TypeError: {error}", needs="what the model's forward takes", fix="args and kwargs as for model(...)",
        ) from error  # fmt: skip


def _mapped(act: Callable[..., Any], value: Any, *beside: Any) -> Any:
    """Apply act to each argument in a value of inspect.BoundArguments, where *args is a tuple and **kwargs a dict."""
    if isinstance(value, tuple):
        return tuple(act(x, *parts) for x, *parts in zip(value, *beside, strict=True))
    if isinstance(value, dict):
        return {key: act(x, *(part[key] for part in beside)) for key, x in value.items()}
    return act(value, *beside)


def _by_batch(bound: inspect.BoundArguments, most: bool | int) -> list[Any]:
    """Return shapes with the first axis of each tensor open, up to `most` if that is a number."""
    batch = torch.export.Dim("batch", max=None if most is True else most)

    def first(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return None
        if not x.dim():
            raise value_error(
                f"{CALLER}: the example has no batch axis.", got=describe(x),
                needs="a tensor whose first axis is the batch, or a tuple of them",
                fix="give numbers the shape [batch], or pass dynamic_batch=False",
            )  # fmt: skip
        return {0: batch}

    return [_mapped(first, value) for value in bound.arguments.values()]


def _by_axes(
    bound: inspect.BoundArguments, axes: Mapping[str, Any], inputs: Sequence[str], outputs: Sequence[str]
) -> list[Any]:
    """Return the shapes for dynamic_axes, which go by the names of the file's inputs; those of outputs follow."""
    unknown = axes.keys() - {*inputs, *outputs}
    if unknown:
        raise value_error(
            f"{CALLER}: dynamic_axes names no input or output.", got=", ".join(sorted(unknown)),
            needs=", ".join((*inputs, *outputs)), fix="give input_names and output_names, too",
        )  # fmt: skip
    names = iter(inputs)

    def named(x: Any) -> Any:
        found = axes.get(next(names, "")) if isinstance(x, Tensor) else None
        return None if found is None else dict(found) if isinstance(found, Mapping) else dict.fromkeys(found, "")

    return [_mapped(named, value) for value in bound.arguments.values()]


def _beside(bound: inspect.BoundArguments, shapes: Any) -> list[tuple[Any, Any]]:
    """Return each argument with its part of dynamic_shapes, which goes by name or by position."""
    values = bound.arguments
    if isinstance(shapes, Mapping):
        fits, parts = shapes.keys() <= values.keys(), [shapes.get(name) for name in values]
    else:
        fits, parts = len(shapes) == len(values), list(shapes)
    if not fits:
        raise value_error(
            f"{CALLER}: dynamic_shapes does not fit the example.", got=str(shapes)[:200],
            needs=f"a dict of {', '.join(values)}, or a tuple of {len(values)}", fix="name forward's parameters",
        )  # fmt: skip
    return list(zip(values.values(), parts, strict=True))


def _spec(value: Any, shape: Any, axes: list[dict[int, str]]) -> Any:
    """Return the shape of an argument as torch.export takes it, and add the names in it to `axes`.

    torch.export takes no texts for names, as torch.onnx.export does: such an axis is open, and named later.
    """

    def one(x: Any, given: Any) -> Any:
        if not isinstance(x, Tensor):
            return None
        dims = dict(given.items() if isinstance(given, Mapping) else enumerate(given or ()))
        named = {axis: dim.__name__ if type(dim) is torch.export.Dim else dim for axis, dim in dims.items()}
        axes.append({axis: name for axis, name in named.items() if isinstance(name, str) and name})
        return {axis: torch.export.Dim.DYNAMIC if isinstance(dim, str) else dim for axis, dim in dims.items()}

    return _mapped(one, value, _mapped(lambda x: None, value) if shape is None else shape)


def _widened(x: Any, spec: Any) -> Any:
    """Return the tensor with 2 in place of 1 on open axes: torch.export would take a size of 1 for a constant."""
    for axis, dim in (spec or {}).items():
        if dim is not None and not isinstance(dim, int) and x.shape[axis] == 1:
            x = x.repeat_interleave(2, axis)
    return x


def name_axes(proto: Any, axes: Sequence[Mapping[int, str]]) -> None:
    """Give the open axes of the file's inputs their names, and what is computed from them, too."""
    names = {}
    for value, named in zip(proto.graph.input, axes, strict=False):
        for axis, name in named.items():
            if symbol := value.type.tensor_type.shape.dim[axis].dim_param:
                names[symbol] = name
    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = pattern.sub(lambda found: names[found[1]], dim.dim_param)
