"""Write an inference model as an ONNX file, in one of three forms: nv.export.to_onnx.

    form="qdq"        FLOAT4E2M1 weights and activations by QuantizeLinear / DequantizeLinear around each layer:
                      standard ONNX, which onnx.reference runs. No runtime is known to run its convolutions in FP4
    form="matmul"     linear layers and 1x1 convolutions in that form, as MatMul, which is what TensorRT can run in FP4;
                      other convolutions in high precision, and listed. TensorRT itself: not executed
    form="portable"   the same numbers from packed uint8 weights and elementary operators: onnxruntime runs it

torch.onnx exports the model with a node of our own in the place of each InferenceLayer. Then each of these nodes is
replaced by the layer's standard nodes and initializers (nodes.py). Everything else is exported as it is, in fp32.
"""

from __future__ import annotations

import inspect
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_nvfp4_cv.backend.torch_private import OpOverload
from te_nvfp4_cv.errors import check_module, describe, need_package, type_error, value_error
from te_nvfp4_cv.export.artifact import join
from te_nvfp4_cv.export.copies import copy_of
from te_nvfp4_cv.export.fit import shown
from te_nvfp4_cv.export.inner import Inner
from te_nvfp4_cv.export.modules import InferenceLayer, check_choice, check_path
from te_nvfp4_cv.export.onnx import file
from te_nvfp4_cv.export.packed_weight import PackedWeight
from te_nvfp4_cv.nn.walk import LAYERS, padded
from te_nvfp4_cv.ops.geometry import ConvArgs

FORMS = ("qdq", "matmul", "portable")
OPSET = 23  # the first with FLOAT4E2M1
DOMAIN = "te_nvfp4_cv"  # of the stand-ins, which no finished file contains
CONSTANTS = (bool, int, float, str, type(None))  # arguments of these types become constants in the graph


@dataclass(frozen=True)
class OnnxFile:
    """The result of nv.export.to_onnx; print it for a summary.

    Attributes:
        files: the files that were written, beginning with the model.
        quantized: names of the layers in NVFP4.
        high: names of the other convolutions and linear layers, with the reason.
    """

    files: tuple[Path, ...]
    quantized: tuple[str, ...]
    high: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.files[0]}: {len(self.quantized)} layers in NVFP4"]
        return "\n".join(lines + [f"  {name}: high precision: {reason}" for name, reason in self.high.items()])


def _shape(layer: Any, x: Tensor, args: ConvArgs) -> Any:
    """Return the output's shape by running torch's layer; the exporter drops these nodes, as only the shape is used."""
    w = x.new_empty(layer.weight_shape)  # the packed weight has another shape, and values do not matter
    if isinstance(layer, nn.Linear):
        return F.linear(x, w).shape
    # torch's functions take their last arguments in another order here.
    transposed = (args.output_padding, args.groups, args.dilation)
    rest = transposed if layer.plan.geometry.transposed else (args.dilation, args.groups)
    return getattr(F, layer.op)(x, w, None, args.stride, args.padding, *rest).shape


class _Stub(nn.Module):
    """Stand-in for the layer with that index, which is exported as a node of the domain DOMAIN."""

    def __init__(self, index: int, name: str, layer: Any) -> None:
        super().__init__()
        self.index, self.name, self.layer = index, name, [layer]  # a list hides the layer from the module tree
        # Made before the trace, in which no tensor can become one of a subclass; hidden, too.
        zeros = torch.zeros(()).expand(layer.weight_shape)
        self.nvfp4_computed = getattr(layer, "nvfp4_computed", False)
        self.shown = [zeros if self.nvfp4_computed else PackedWeight.of(zeros, self)]
        self.rank = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)

    @property
    def weight(self) -> Tensor:
        """Return a tensor that stands for the layer where others read its weight and multiply by it."""
        return self.shown[0]

    @property
    def bias(self) -> Tensor | None:
        """Return the layer's bias, for those that read it."""
        bias: Tensor | None = self.layer[0].bias
        return bias

    def multiply(self, x: Tensor, bias: Tensor | None, args: ConvArgs) -> Tensor:
        """Put the node for a call of torch's function with this layer's weight into the graph."""
        own, y = self.bias, self._node(x, args)
        # The node adds the layer's own bias. A layer inside of a module has that of the module, which a trace replaces.
        if bias is own or bool(getattr(self.layer[0], "nvfp4_bias", "")):
            return y
        if own is not None:
            raise value_error(
                f"nv.export.to_onnx: a call with the weight of {self.name!r} cannot be exported.",
                got="another bias than the layer's", needs="the layer's bias", fix="call the layer itself",
            )
        return y if bias is None else y + bias.reshape(-1, *(1,) * self.rank)

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        """Put the node into the graph; x is padded before it where the padding is not by zeros."""
        if output_size is not None or (self.rank and x.dim() != self.rank + 2):
            raise value_error(
                f"nv.export.to_onnx: the call of {self.name!r} cannot be exported.",
                got=f"x with {x.dim()} axes, output_size={output_size}",
                needs=f"a batch axis ({self.rank + 2} axes) and no output_size",
                fix="give the example a batch axis; set output_padding in the layer",
            )
        return self._node(*padded(self.layer[0], x))

    def _node(self, x: Tensor, args: ConvArgs) -> Tensor:
        shape = _shape(self.layer[0], x, args)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Layer", [x], {"index": self.index}, dtype=x.dtype, shape=shape, version=1
        )


def to_onnx(
    model: nn.Module,
    example_input: Any,
    path: str | os.PathLike[str],
    form: str = "qdq",
    *,
    dynamic_batch: bool = True,
    external_data: bool | None = None,
    input_names: tuple[str, ...] = ("input",),
    output_names: tuple[str, ...] = ("output",),
) -> OnnxFile:
    """Write an inference model as an ONNX file.

    Args:
        model: a model of nv.export.load or nv.export.quantize. The mode of its layers (`activations`) decides whether
            the file quantizes x.
        example_input: a tensor, or a tuple of tensors, as the model takes them. The first axis of each is the batch.
            Any floating-point dtype will do; the file takes fp32.
        path: where to write; ".onnx" is added if it is missing.
        form: "qdq" (standard FP4 operators), "matmul" (the same, for linear layers and 1x1 convolutions only) or
            "portable" (elementary operators, for onnxruntime).
        dynamic_batch: leave the size of the batch open.
        external_data: write the weights into a file beside the model. If None, this is done if they do not fit into
            one file.
        input_names: names of the inputs in the file.
        output_names: names of the outputs in the file.
    Returns:
        A summary: files and layers.
    Raises:
        TypeError: `model` is no module, or the example is no tensor.
        ValueError: The model has no inference layer, `form` is unknown, the example has no batch axis, ONNX has no form
            for an operator, or the model branches on values or works for one batch size only.
        RuntimeError: A package is missing, or the file cannot be written.

    Example:
        >>> import tempfile, torch, te_nvfp4_cv as nv
        >>> images = torch.randn(2, 32, 8, 8)
        >>> model = nv.export.quantize(torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3)), [images])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = nv.export.to_onnx(model, images, f"{folder}/net.onnx", form="portable")
        >>> made.quantized
        ('0',)
    """
    check_module("nv.export.to_onnx", model, "nv.export.to_onnx(model, example_input, path)")
    check_choice("nv.export.to_onnx", "form", form, FORMS)
    target = check_path("nv.export.to_onnx", path, "model.onnx")
    need_packages()
    # After need_packages: nodes.py imports onnx at its top.
    from te_nvfp4_cv.export.onnx.nodes import as_matmul

    args = _arguments(example_input, dynamic_batch)
    # A copy: stand-ins replace its layers. float() leaves the codes alone, which are integers.
    traced = _unwrapped(copy_of("nv.export.to_onnx", model)).eval().float().requires_grad_(False)
    # Each layer once, by its first name; _export finds the other names of a shared one.
    found = {name: module for name, module in traced.named_modules() if isinstance(module, InferenceLayer)}
    _check_layers(found)
    high = dict.fromkeys(_others(traced, found), "the model holds it in high precision")
    if form == "matmul":
        high |= {shown(name): "no matrix product of pixels" for name, layer in found.items() if not as_matmul(layer)}
    proto, called = _export(traced, found, args, form, dynamic_batch, input_names, output_names)
    high |= {shown(name): "not in the file: eval mode does not call it" for name in found if name not in called}
    quantized = tuple(shown(name) for name in found if shown(name) not in high)
    file.remove_stack_traces(proto)  # before the checksums: they cover all that is in the file
    file.seal(proto, quantized)
    target = target if target.suffix == ".onnx" else target.with_name(target.name + ".onnx")
    return OnnxFile(file.write(proto, target, external_data), quantized, high)


def _others(model: nn.Module, found: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the names of the convolutions, linear layers and attention's kernels that are not in NVFP4."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            yield from (join(name, key) for key, p in module._parameters.items() if p is not None and p.dim() == 2)
        elif isinstance(module, LAYERS) and not isinstance(module, Inner) and name not in found:
            yield name


def _arguments(example: Any, dynamic_batch: bool) -> tuple[Any, ...]:
    """Return the example as the arguments of a model in fp32."""
    args = example if isinstance(example, tuple) else (example,)
    needs = "a tensor whose first axis is the batch, or a tuple of them"
    tensors = [x for x in args if isinstance(x, Tensor)]
    if not tensors or not all(isinstance(x, (Tensor, *CONSTANTS)) for x in args):
        raise type_error(
            "nv.export.to_onnx: the example is no tensor.",
            got=f"({', '.join(map(describe, args))})" if isinstance(example, tuple) else describe(example),
            needs=needs,
            fix="wrap a model that takes lists or dicts in a module that takes tensors",
        )
    if dynamic_batch and not all(x.dim() for x in tensors):
        raise value_error(
            "nv.export.to_onnx: the example has no batch axis.", got=", ".join(map(describe, args)),
            needs=needs, fix="give numbers the shape [batch], or pass dynamic_batch=False",
        )
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model without torch.compile's wrappers; those of its submodules are removed in place."""
    while True:
        modules = dict(model.named_modules(remove_duplicate=False))
        name = next((name for name, module in modules.items() if hasattr(module, "_orig_mod")), None)
        if name is None:
            return model
        # One wrapper at a time: names change as wrappers go, and one may wrap another.
        inner: Any = modules[name]._orig_mod
        if name:
            model.set_submodule(name, inner)
        else:
            model = inner


def need_packages(caller: str = "nv.export.to_onnx", *more: str) -> None:
    """Check that the packages which ONNX export needs, and `more` packages, can be imported.

    Raises:
        RuntimeError: A package cannot be imported.
    """
    names = ("onnx", "onnxscript", "ml_dtypes", *more)
    fix = "pip install 'te_nvfp4_cv[export]'"
    for name in names:
        need_package(name, f"{caller}: a package is missing.", needs=", ".join(names), fix=fix)


def _check_layers(found: dict[str, InferenceLayer]) -> None:
    if not found:
        raise value_error(
            "nv.export.to_onnx: the model has no layer in NVFP4.",
            got="a model without InferenceLayers",
            needs="a model of nv.export.load or nv.export.quantize",
            fix="nv.export.save(model, path); nv.export.load(path, fresh_model)",
        )
    for name, layer in found.items():
        if layer.quantize_x and layer.recipe.settings("input").four_over_six is not None:
            raise value_error(
                f"nv.export.to_onnx: the activations of {name!r} have no form in ONNX.",
                got=f"4over6 of activations in the recipe {layer.recipe!r}",
                needs="nvfp4_4over6 'none' or 'weights', or activations in high precision",
                fix="load the model with activations='high'",
            )


def _export(
    traced: nn.Module, found: dict[str, InferenceLayer], args: tuple[Any, ...], form: str, dynamic_batch: bool,
    input_names: tuple[str, ...], output_names: tuple[str, ...],
) -> tuple[Any, set[str]]:
    """Export the model, which is changed on the way. Returns the ONNX model and the names of the layers in it."""
    layers = list(found.values())
    # torch.onnx has no form for our operators. A stand-in becomes one node, which _expand replaces afterwards.
    for index, (name, layer) in enumerate(zip(found, layers, strict=True)):
        if name:
            for shared in [n for n, m in traced.named_modules(remove_duplicate=False) if m is layer]:
                place, _, key = shared.rpartition(".")
                # Not set_submodule: a module with a forward of its own shows a layer inside as a tensor.
                traced.get_submodule(place)._modules[key] = _Stub(index, name, layer)
        else:
            traced = _Stub(index, name, layer)
    if dynamic_batch:  # torch.export would take an axis of size 1 for a constant
        args = tuple(x.repeat_interleave(2, 0) if isinstance(x, Tensor) and x.shape[0] == 1 else x for x in args)
    batch = torch.export.Dim("batch")
    shapes: Any = tuple({0: batch} if isinstance(x, Tensor) else None for x in args) if dynamic_batch else None
    if shapes is not None:
        # What a forward(self, *inputs) takes is one argument to torch.export, a tuple.
        kinds = [parameter.kind for parameter in inspect.signature(traced.forward).parameters.values()]
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            first = kinds.index(inspect.Parameter.VAR_POSITIONAL)
            shapes = (*shapes[:first], shapes[first:])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own code
        # Traced here and not by torch.onnx, whose error for a failed trace does not name the module.
        program = _trace(traced, args, shapes)
        try:
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=list(input_names),
                output_names=list(output_names), verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise _unknown_operator(program, error) from error
    assert exported is not None
    return _expand(exported.model_proto, list(found), layers, form)


def _trace(traced: nn.Module, args: tuple[Any, ...], shapes: Any) -> Any:
    """Trace the model by torch.export. An error names the module in which it was raised."""
    try:
        return torch.export.export(traced, args, dynamic_shapes=shapes)
    except ValueError:  # a stand-in or the model itself refuses the input, and says why
        raise
    except Exception as error:  # whatever a model's forward raises
        names = {id(module): name for name, module in traced.named_modules()}
        running = [id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__)]
        place = next((names[module] or "the model itself" for module in reversed(running) if module in names), None)
        raise value_error(
            "nv.export.to_onnx: torch.export cannot trace the model.",
            got=" ".join(f"{type(error).__name__}: {error}".split())[:300]
            + ("" if place is None else f"; in the module {place!r}"),
            needs="an example that fits the model, no branch on values of tensors, and sizes that follow the batch",
            fix="torch.where for a branch; dynamic_batch=False for a model of one batch size",
        ) from error


def _unknown_operator(program: Any, error: Exception) -> ValueError:
    """Return an error that names the first operator without a form in ONNX and its module, or else torch's words."""
    from torch.onnx._internal.exporter import _registration  # torch says this in no public place

    registry = _registration.ONNXRegistry.from_torchlib()
    # torch.onnx decomposes operators, too, before it looks them up.
    decomposed = program.run_decompositions()
    for node in decomposed.graph.nodes:
        target = node.target
        if (
            node.op != "call_function"
            or not isinstance(target, OpOverload)
            or target.namespace == "onnx_symbolic"  # the stand-ins
        ):
            continue
        if not registry.is_registered(target):
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            place = stack[-1][0] if stack else ""
            return value_error(
                f"nv.export.to_onnx: {target} cannot be exported.",
                got=f"{target} in the module {place.removeprefix('L__self__').lstrip('.') or 'the model itself'!r}",
                needs="operators that torch.onnx knows",
                fix="leave that module out of the exported model, or write it with other operators",
            )
    return value_error(
        "nv.export.to_onnx: torch.onnx cannot export the model.", got=str(error)[:400],
        needs="a model that torch.onnx.export takes", fix="try torch.onnx.export on the plain model",
    )


def _expand(proto: Any, names: list[str], layers: list[Any], form: str) -> tuple[Any, set[str]]:
    """Replace each stand-in by its layer's nodes. Returns the model and the names of the layers that were found."""
    from te_nvfp4_cv.export.onnx.nodes import Nodes, build

    graph = proto.graph
    nodes: list[Any] = []
    calls: dict[int, int] = {}
    initializers: dict[str, Any] = {}
    for node in graph.node:
        # Nodes stay in their order, because ONNX wants each value computed before it is read.
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        index = next(a.i for a in node.attribute if a.name == "index")
        layer = layers[index]
        calls[index] = calls.get(index, 0) + 1
        made = Nodes(names[index])
        rank = _rank(graph, node.input[0], layer)
        output = build(made, layer, node.input[0], rank, form)
        # A layer that is called again gets nodes with other names, which read the same initializers.
        suffix = "" if calls[index] == 1 else f"#{calls[index]}"
        for own in made.nodes:
            known = made.initializers.keys() | {node.input[0]}
            own.input[:] = [name if name in known else name + suffix for name in own.input]
            # The layer's output takes the stand-in's name, which the rest of the graph reads.
            own.output[:] = [node.output[0] if name == output else name + suffix for name in own.output]
            own.name += suffix
        nodes += made.nodes
        initializers |= made.initializers
    # Repeated fields of protobuf cannot be assigned to.
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(initializers.values())
    # No node of our domain is left, so the file should not ask a runtime for it.
    for function in [f for f in proto.functions if f.domain == DOMAIN]:
        proto.functions.remove(function)
    for opset in [o for o in proto.opset_import if o.domain == DOMAIN]:
        proto.opset_import.remove(opset)
    return proto, {names[index] for index in calls}


def _rank(graph: Any, name: str, layer: Any) -> int:
    # A linear layer takes any number of axes, so only the graph knows it.
    if not isinstance(layer, nn.Linear):
        return len(layer.kernel_size) + 2
    for value in (*graph.value_info, *graph.input):
        if value.name == name:
            return len(value.type.tensor_type.shape.dim)
    raise RuntimeError(f"nv.export.to_onnx: the exporter gave no shape for {name}")
