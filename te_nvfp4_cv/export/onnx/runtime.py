"""Run an ONNX file in onnxruntime, on the CPU: to compare it with the model that it was made from.

    run     the file's outputs
    trace   the same, with what each layer in NVFP4 reads and gives on the way
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.errors import need_package
from te_nvfp4_cv.export.manifest import join

Calls = dict[str, list[tuple[Tensor, Tensor]]]


def run(path: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the floating-point outputs of a file of nv.export.to_onnx in its form "portable".

    Args:
        inputs: in the order of the graph's inputs.
    Raises:
        RuntimeError: onnxruntime is not installed.
    """
    return [y for y in _run(path, inputs) if y.is_floating_point()]


def trace(path: Path, inputs: Sequence[Tensor], layers: Sequence[str]) -> tuple[list[Tensor], Calls]:
    """Return the floating-point outputs of such a file, and by layer (x, y) of each of its calls, in their order.

    Args:
        inputs: as for `run`.
        layers: names of the layers in NVFP4, as the file's summary has them.
    """
    import onnx

    proto = onnx.load(str(path), load_external_data=False)
    places = _places(proto.graph, set(layers))
    known = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    values = list(dict.fromkeys(name for calls in places.values() for call in calls for name in call))
    more = [name for name in values if name not in known]
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in more)
    # Beside the file, whose external data it shares.
    watched = path.with_name(f"{path.name}.watched")
    try:
        watched.write_bytes(proto.SerializeToString())
        found = _run(watched, inputs)
    finally:
        watched.unlink(missing_ok=True)
    named = dict(zip((value.name for value in proto.graph.output), found, strict=True))
    named |= {value.name: x for value, x in zip(proto.graph.input, inputs, strict=True)}
    outputs = [y for y in found[: len(found) - len(more)] if y.is_floating_point()]
    return outputs, {name: [(named[x], named[y]) for x, y in calls] for name, calls in places.items()}


def _places(graph: Any, layers: set[str]) -> dict[str, list[tuple[str, str]]]:
    """Return by layer the names of each call's input and output: those that its nodes share with the others."""
    constants = {tensor.name for tensor in graph.initializer}
    # A layer's own begin with its name; one that is a table of the model may be what a layer reads.
    groups: dict[tuple[str, str], list[Any]] = {}
    for node in graph.node:  # names as nodes.py and convert.py give them: LAYER/KIND_NUMBER#CALL
        layer, slash, rest = node.name.rpartition("/")
        if slash and layer in layers:
            groups.setdefault((layer, rest.partition("#")[2]), []).append(node)
    found: dict[str, list[tuple[str, str]]] = {}
    for (layer, _), nodes in groups.items():
        made = {name for node in nodes for name in node.output}
        own = {name for name in constants if name.startswith(join(layer, ""))}
        read = [name for node in nodes for name in node.input if name not in made | own]
        found.setdefault(layer, []).append((read[0], nodes[-1].output[0]))
    return found


def _run(path: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    need_package("onnxruntime", "onnxruntime is not installed.", needs="it", fix="pip install onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    named = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, named)]
