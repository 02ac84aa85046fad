"""Write an inference model as an ONNX file, in one of three forms: nv.export.to_onnx.

    form="qdq"        FLOAT4E2M1 weights and activations by QuantizeLinear / DequantizeLinear around each layer:
                      standard ONNX, which onnx.reference runs. No runtime is known to run its convolutions in FP4
    form="matmul"     linear layers and 1x1 convolutions in that form, as MatMul, which is what TensorRT can run in FP4;
                      other convolutions in high precision, and listed. TensorRT itself: not executed
    form="portable"   the same numbers from packed uint8 weights and elementary operators: onnxruntime runs it

torch.onnx exports the model with a node of our own in the place of each InferenceLayer (tracing.py). Each of these
nodes is replaced by the layer's standard nodes and initializers (nodes.py). All else is exported as it is, in fp32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from te_nvfp4_cv.context.context_manager import outside_of_contexts
from te_nvfp4_cv.errors import check_choice, check_module, check_path, need_package, value_error
from te_nvfp4_cv.export.copies import copy_of
from te_nvfp4_cv.export.fit import shown
from te_nvfp4_cv.export.inner import Inner, around
from te_nvfp4_cv.export.manifest import join
from te_nvfp4_cv.export.modules import InferenceLayer
from te_nvfp4_cv.export.onnx import file
from te_nvfp4_cv.export.onnx.arguments import TorchOptions, read_call
from te_nvfp4_cv.export.onnx.tracing import DOMAIN, export, ranks_of, unwrapped
from te_nvfp4_cv.export.ranks import gathered, written_once
from te_nvfp4_cv.layer import grouped
from te_nvfp4_cv.nn.walk import LAYERS
from te_nvfp4_cv.recipe.fields import check_nvfp4

FORMS = ("qdq", "matmul", "portable")


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


@outside_of_contexts()  # plain layers of the model are in high precision in the file
def to_onnx(
    model: nn.Module,
    args: Any = None,
    f: str | os.PathLike[str] | None = None,
    form: str = "qdq",
    *,
    dynamic_batch: bool | int = True,
    external_data: bool | None = None,
    **options: Unpack[TorchOptions],
) -> OnnxFile:
    """Write an inference model as an ONNX file.

    A model that nv.tensor_parallel has shared out is gathered: call this on every rank; the first one writes.
    Arguments that torch.onnx.export has as well mean the same; others of it are refused, with what does the same.

    Args:
        model: a model of nv.export.load or nv.export.quantize. The mode of its layers (`activations`) decides whether
            the file quantizes x.
        args: an example: a tensor, or a tuple of tensors, as the model takes them. Any floating-point dtype will do;
            the file takes fp32.
        f: where to write; ".onnx" is added if it is missing.
        form: "qdq" (standard FP4 operators), "matmul" (the same, for linear layers and 1x1 convolutions only) or
            "portable" (elementary operators, for onnxruntime).
        dynamic_batch: leave the first axis of each tensor open, as the batch, if neither dynamic_shapes nor
            dynamic_axes says which axes are. An integer is the largest batch: some models take another way through
            their forward for large ones (diffusers' AutoencoderKL from 64 images on).
        external_data: write the weights into a file beside the model. If None, this is done if they do not fit into
            one file.
        **options: `kwargs` (more of the example, by name), `input_names` (by default "input"), `output_names`
            ("output"), `dynamic_shapes`, `dynamic_axes`, `custom_translation_table`, `verbose`.
    Returns:
        A summary: files and layers.
    Raises:
        TypeError: `model` is no module, or the example is no tensor.
        ValueError: The model has no inference layer, or one in another block format than NVFP4; `form` is unknown, an
            argument of torch.onnx.export has no meaning here, the example does not fit the model or has no batch axis,
            ONNX has no form for an operator, or the model branches on values or works for one batch size only.
        RuntimeError: A package is missing, or the file cannot be written.

    Example:
        >>> import tempfile, torch, te_nvfp4_cv as nv
        >>> images = torch.randn(2, 32, 8, 8)
        >>> model = nv.export.quantize(torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3)), [images])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = nv.export.to_onnx(model, images, f"{folder}/net.onnx", form="portable")
        >>> made.quantized
        ('0',)
        >>> with tempfile.TemporaryDirectory() as folder:  # as for torch.onnx.export: pictures of any size
        ...     axes = {"images": {0: "batch", 2: "height", 3: "width"}}
        ...     made = nv.export.to_onnx(
        ...         model, (images,), f"{folder}/net.onnx", input_names=["images"], dynamic_axes=axes
        ...     )
    """
    check_module("nv.export.to_onnx", model, "nv.export.to_onnx(model, args, f)")
    check_choice("nv.export.to_onnx", "form", form, FORMS)
    given: dict[str, Any] = dict(options)
    args, f = given.pop("example_input", args), given.pop("path", f)
    target = check_path("nv.export.to_onnx", f or "", "nv.export.to_onnx(model, args, 'model.onnx')")
    need_packages()
    # After need_packages: nodes.py imports onnx at its top.
    from te_nvfp4_cv.export.onnx.nodes import as_matmul

    model, group = gathered(model)
    # A copy: stand-ins replace its layers. float() leaves the codes alone, which are integers.
    traced = unwrapped(copy_of("nv.export.to_onnx", model)).eval().float().requires_grad_(False)
    call = read_call(traced, args, dynamic_batch, given)
    # Each layer once, by its first name; _export finds the other names of a shared one.
    found = {name: module for name, module in traced.named_modules() if isinstance(module, InferenceLayer)}
    _check_layers(found)
    high = dict.fromkeys(_others(traced, found), "the model holds it in high precision")
    inside = {name for name, _ in around(traced)}
    names = {name: shown(name, inside) for name in found}
    left_out: dict[str, str] = {}
    if form == "matmul":
        reason = "the form 'matmul' holds linear layers, and 1x1 convolutions without groups and padding"
        left_out = {name: reason for name, layer in found.items() if not as_matmul(layer)}
    proto = export(traced, found, call)
    called = _expand(proto, found, form)
    left_out |= {name: "not in the file: eval mode does not call it" for name in found if name not in called}
    quantized = [name for name in found if name not in left_out]
    file.remove_stack_traces(proto)  # before the checksums: they cover all that is in the file
    file.seal(proto, quantized)  # by the names that their nodes have, which the verifier looks for
    target = target if target.suffix == ".onnx" else target.with_name(target.name + ".onnx")
    files = written_once(group, lambda: file.write(proto, target, external_data))
    high |= {names[name]: reason for name, reason in left_out.items()}
    return OnnxFile(files, tuple(names[name] for name in quantized), high)


def _others(model: nn.Module, found: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the names of the convolutions, linear layers and attention's kernels that are not in NVFP4."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            yield from (join(name, key) for key, p in module._parameters.items() if p is not None and p.dim() == 2)
        elif isinstance(module, LAYERS) and not isinstance(module, Inner) and name not in found:
            yield name


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
        if layer.op == grouped.OP:
            raise value_error(
                f"nv.export.to_onnx: the experts of {name!r} have no form in ONNX.",
                got="a grouped linear layer, whose rows are cut by offsets that are known at run time",
                needs="convolutions and linear layers",
                fix="nv.export.save, whose files hold experts",
            )
        needs, fix = "NVFP4, whose blocks the nodes compute", "quantize with block_format='nvfp4'"
        check_nvfp4(f"nv.export.to_onnx: the layer {name!r}", layer.recipe.block_format, needs, fix)
        if layer.quantize_x and layer.recipe.settings("input").four_over_six is not None:
            raise value_error(
                f"nv.export.to_onnx: the activations of {name!r} have no form in ONNX.",
                got=f"4over6 of activations in the recipe {layer.recipe!r}",
                needs="nvfp4_4over6 'none' or 'weights', or activations in high precision",
                fix="load the model with activations='high'",
            )


def _expand(proto: Any, found: Mapping[str, InferenceLayer], form: str) -> set[str]:
    """Replace each stand-in by its layer's nodes, in place. Returns the names of the layers that were found."""
    from te_nvfp4_cv.export.onnx.nodes import Nodes, build

    graph, names, layers = proto.graph, list(found), list(found.values())
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
    return {names[index] for index in calls}


def _rank(graph: Any, name: str, layer: Any) -> int:
    # A linear layer takes any number of axes, so only the graph knows it.
    if not isinstance(layer, nn.Linear):
        return len(layer.kernel_size) + 2
    ranks = ranks_of(graph)
    if name not in ranks:
        raise RuntimeError(f"nv.export.to_onnx: the exporter gave no shape for {name}")
    return ranks[name]
