"""Trace an inference model for nv.export.to_onnx: a node of our own stands in the place of each inference layer.

torch.onnx has no form for the layers' operators. A Stub takes the place of each layer and becomes one node of the
domain DOMAIN, which convert.py replaces afterwards. Errors of torch.export are shown with the module in which they were
raised and with what helps against them.
"""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_nvfp4_cv.backend.torch_private import OpOverload
from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.export.modules import InferenceLayer
from te_nvfp4_cv.export.onnx.arguments import OPSET, Call, name_axes
from te_nvfp4_cv.export.packed_weight import PackedWeight
from te_nvfp4_cv.nn.walk import padded
from te_nvfp4_cv.ops.geometry import ConvArgs

DOMAIN = "te_nvfp4_cv"  # of the stand-ins, which no finished file contains


def _shape(layer: Any, x: Tensor, args: ConvArgs) -> Any:
    """Return the output's shape by running torch's layer; the exporter drops these nodes, as only the shape is used."""
    w = x.new_empty(layer.weight_shape)  # the packed weight has another shape, and values do not matter
    if isinstance(layer, nn.Linear):
        return F.linear(x, w).shape
    # torch's functions take their last arguments in another order here.
    transposed = (args.output_padding, args.groups, args.dilation)
    rest = transposed if layer.plan.geometry.transposed else (args.dilation, args.groups)
    return getattr(F, layer.op)(x, w, None, args.stride, args.padding, *rest).shape


SETTINGS = (  # of torch's layers, which a forward may read
    *("stride", "padding", "dilation", "groups", "kernel_size", "padding_mode", "output_padding"),
    *("in_channels", "out_channels", "in_features", "out_features"),
)


class Stub(nn.Module):
    """Stand-in for the layer with that index, which is exported as a node of the domain DOMAIN."""

    def __init__(self, index: int, name: str, layer: Any) -> None:
        super().__init__()
        self.index, self.name, self.layer = index, name, [layer]  # a list hides the layer from the module tree
        # Made before the trace, in which no tensor can become one of a subclass; hidden, too.
        zeros = torch.zeros(()).expand(layer.weight_shape)
        self.nvfp4_computed = getattr(layer, "nvfp4_computed", False)
        self.shown = [zeros if self.nvfp4_computed else PackedWeight.of(zeros, self)]
        self.rank = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)

    def __getattr__(self, name: str) -> Any:
        """Return what a forward reads of the layer: its stride, its number of channels."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Nothing else: what a layer computes from its weight would become part of the graph.
            if name not in SETTINGS or "layer" not in self.__dict__:
                raise
            return getattr(self.layer[0], name)

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


def unwrapped(model: nn.Module) -> nn.Module:
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


def export(traced: nn.Module, found: Mapping[str, InferenceLayer], call: Call) -> Any:
    """Export the model, which is changed on the way, as an ONNX model with a node of DOMAIN for each layer.

    Args:
        found: the layers by name; a node has the layer's index in this order.
        call: the example, and what is said of the file's inputs and outputs.
    Raises:
        ValueError: torch.export cannot trace the model, or ONNX has no form for an operator.
    """
    for index, (name, layer) in enumerate(found.items()):
        if name:
            for shared in [n for n, m in traced.named_modules(remove_duplicate=False) if m is layer]:
                place, _, key = shared.rpartition(".")
                # Not set_submodule: a module with a forward of its own shows a layer inside as a tensor.
                traced.get_submodule(place)._modules[key] = Stub(index, name, layer)
        else:
            traced = Stub(index, name, layer)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own code
        # Traced here and not by torch.onnx, whose error for a failed trace does not name the module.
        program = _trace(traced, call)
        try:
            exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, **call.options)
        except torch.onnx.errors.OnnxExporterError as error:
            raise _unknown_operator(program, error) from error
    assert exported is not None
    proto = exported.model_proto  # made anew at each look
    name_axes(proto, call.axes)
    _keep_pads(proto.graph)
    return proto


def ranks_of(graph: Any) -> dict[str, int]:
    """Return how many axes the values of a graph have, by name."""
    values = (*graph.value_info, *graph.input, *graph.output)
    return {value.name: len(value.type.tensor_type.shape.dim) for value in values}


def _keep_pads(graph: Any) -> None:
    """Name the axes of each Pad that a MaxPool reads, in place, which changes no value.

    onnxruntime (1.31) moves zeros that stand before a pooling into the pooling's own padding, which is -inf: other
    values wherever a window holds negative numbers alone. It leaves a Pad that names its axes. timm's BiT has one.
    """
    from onnx import numpy_helper

    pooled = {node.input[0] for node in graph.node if node.op_type == "MaxPool"}
    ranks = ranks_of(graph)
    for node in graph.node:
        if node.op_type == "Pad" and node.output[0] in pooled and not any(node.input[3:]):
            axes = numpy.arange(ranks[node.output[0]])
            node.input[:] = [*node.input, *[""] * (3 - len(node.input)), f"{node.output[0]}.axes"][:4]
            graph.initializer.append(numpy_helper.from_array(axes, node.input[3]))


def _trace(traced: nn.Module, call: Call) -> Any:
    """Trace the model by torch.export. An error names the module in which it was raised."""
    try:
        return torch.export.export(traced, call.args, call.kwargs, dynamic_shapes=call.shapes)
    except ValueError:  # a stand-in or the model itself refuses the input, and says why
        raise
    except Exception as error:  # whatever a model's forward raises
        names = {id(module): name for name, module in traced.named_modules()}
        running = [id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__)]
        place = next((names[module] or "the model itself" for module in reversed(running) if module in names), None)
        needs, fix = _remedy(str(error))
        raise value_error(
            "nv.export.to_onnx: torch.export cannot trace the model.",
            got=" ".join(f"{type(error).__name__}: {error}".split())[:300]
            + ("" if place is None else f"; in the module {place!r}"),
            needs=needs, fix=fix,
        ) from error


def _remedy(text: str) -> tuple[str, str]:
    """Return what is needed and what to do, by the text of torch.export's error."""
    if "Constraints violated" in text or "not marked as dynamic" in text or "specialized" in text:
        most = re.search(r"Dim\('batch'.*?max=(\d+)", text)
        if most:
            return "a batch for which the model does the same", f"dynamic_batch={most[1]}: the largest batch for that"
        return "sizes that follow the batch", "dynamic_batch=False, or dynamic_shapes, for a model of one batch size"
    if "data-dependent" in text or "data dependent" in text:
        return "no branch on values of tensors", "torch.where for a branch"
    return (
        "an example that fits the model, and a forward that torch.export can trace",
        "run model(*example) and torch.export.export(model, example); a tuple holds several inputs, a list is one",
    )


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
