"""Inspect an ONNX file: the weight of every Conv, ConvTranspose, Gemm and MatMul is traced back to its bytes.

    FLOAT4E2M1, or packed uint8 looked up in the 16 E2M1 values, times E4M3 scales of 16    "nvfp4"
    FLOAT8, INT8, ... behind a DequantizeLinear; a plain initializer or Constant            its type

The metadata of a file of nv.export.to_onnx name the layers that are in NVFP4, and each of them must be. The checksums
in the metadata must fit the file (onnx/file.py).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from te_nvfp4_cv.errors import need_package, no_such_file, value_error
from te_nvfp4_cv.export.onnx import file
from te_nvfp4_cv.export.verify import onnx_blocks
from te_nvfp4_cv.export.verify.onnx_graph import Graph
from te_nvfp4_cv.export.verify.report import Report, Row
from te_nvfp4_cv.formats import decode_e2m1

LAYERS = {"Conv": "conv", "ConvTranspose": "conv_transpose", "Gemm": "linear", "MatMul": "linear"}
NAMES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "FLOAT8E4M3FN": "fp8", "DOUBLE": "fp64"}


def inspect_onnx(path: Path) -> Report:
    """Inspect an ONNX file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged.
        RuntimeError: The package onnx is missing.
    """
    title, fix = "verify: ONNX files need the package onnx.", "pip install 'te_nvfp4_cv[export]'"
    need_package("onnx", title, needs="onnx and ml_dtypes", fix=fix)
    import onnx

    if not path.is_file():
        raise no_such_file("verify: no such file.", got=str(path), needs="an .onnx file", fix="correct the path")
    model = _read(onnx, path)
    graph = Graph.of(onnx, model)
    claims, problems = _claims(model)
    rows = [row for node in graph.nodes if (row := _row(graph, node, claims)) is not None]
    notes = [f"{count} nodes {kind}: the format of their weights is not known" for kind, count in _unknown(graph)]
    found = {row.name for row in rows}
    problems += [f"layer {name!r} is named as NVFP4 and is not in the graph" for name in claims if name not in found]
    problems += file.changes(model)
    origin = " ".join(text for text in (model.producer_name, model.producer_version) if text) or "unknown tool"
    return Report(str(path), f"ONNX opset {_opset(model)}, {origin}", rows, problems, notes)


def _unknown(graph: Graph) -> list[tuple[str, int]]:
    """Return the kinds of products in other domains than ONNX's (MatMulNBits of onnxruntime), with their numbers."""
    kinds = [f"{node.domain}::{node.op_type}" for node in graph.nodes
             if node.domain not in ("", "ai.onnx") and re.search("MatMul|Gemm|Conv", node.op_type)]
    return sorted(Counter(kinds).items())


def _read(onnx: Any, path: Path) -> Any:
    """Read the model with its external data. Types and shapes are checked, too, if this library wrote the file."""
    try:
        model = onnx.load(str(path))
        # By path, or the checker would not look at external data. full_check rejects operators that other tools use.
        onnx.checker.check_model(str(path), full_check=file.entry(model, file.CLAIMS) is not None)
        if not _is_text(model):
            raise ValueError("a text in it is not UTF-8")
    except Exception as error:  # protobuf's, the checker's, the operating system's for external data
        raise value_error(
            f"{path} is damaged.",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            needs="a whole ONNX file, its external data beside it",
            fix="copy or export it again",
        ) from error
    return model


def _is_text(part: Any) -> bool:
    """Tell whether all strings of a protobuf message are texts: a string that is not UTF-8 is read as bytes."""
    for kind, value in part.ListFields():
        if kind.type == kind.TYPE_STRING:
            if not all(isinstance(text, str) for text in ([value] if isinstance(value, bytes) else value)):
                return False
        elif kind.type == kind.TYPE_MESSAGE:
            if not all(_is_text(inner) for inner in ([value] if hasattr(value, "ListFields") else value)):
                return False
    return True


def _opset(model: Any) -> str:
    return ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import).removeprefix("ai.onnx ")


def _claims(model: Any) -> tuple[list[str], list[str]]:
    """Return the names of the layers that the file says are in NVFP4, and what is wrong with that list."""
    text = file.entry(model, file.CLAIMS)
    try:
        names = [] if text is None else json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return [], ["its list of layers in NVFP4 cannot be read"]
    return names, []


def _row(graph: Graph, node: Any, claims: list[str]) -> Row | None:
    """Return the row of a node that is a layer with a weight, else None."""
    if node.op_type not in LAYERS or len(node.input) < 2:
        return None
    cone = graph.cone(node.input[1])
    sources = graph.sources(cone, node.input[1])
    # Single numbers are tensor scales, shifts and the like, not weights.
    stored = [name for name in sources if graph.size(name) > 1]
    if cone is None or not stored:
        return None  # a product of two activations
    name = _name(node, stored, claims)
    kind = LAYERS[node.op_type] + (f"{_kernel_rank(graph, node)}d" if "conv" in LAYERS[node.op_type] else "")
    scales = [s for s in sources if graph.type_of(s) == "FLOAT8E4M3FN"]
    codes = [s for s in stored if _is_code(graph, s, cone)]
    # E2M1 codes are a claim in themselves, in a file of another tool, too.
    claimed = "nvfp4" if name in claims or codes else ""
    if not codes:
        return _other(graph, node, name, kind, stored, claimed)
    packed = graph.type_of(codes[0]) == "UINT8"
    shape = tuple(graph.constants[codes[0]].dims)
    shape = (*shape[:-1], 2 * shape[-1]) if packed else shape  # two codes to a byte
    count = graph.size(codes[0]) * (2 if packed else 1)
    size = sum(graph.bytes(s) for s in (*codes, *scales)) + 4  # and the tensor scale
    row = Row(name, kind, claimed, "nvfp4", shape, count, size, "uint8, looked up" if packed else "")
    row.activations = _activations(graph, node.input[0], packed)
    # A weight that adds, say, an fp32 correction to the codes is not what NVFP4 promises.
    beside = [s for s in stored if graph.type_of(s) in NAMES and s not in scales and not _is_table(graph, s)]
    row.problems += [f"its weight is made of {NAMES[graph.type_of(s)]} values, too: {s}" for s in beside]
    if len(scales) != 1:
        row.problems.append(f"it has {len(scales)} arrays of E4M3 scales, not one")
    else:
        onnx_blocks.check(graph, node, row, cone, codes[0], scales[0])
    if row.problems:
        row.precision = "uint8" if packed else "fp4"
    return row


def _is_code(graph: Graph, name: str, cone: list[Any]) -> bool:
    """Tell whether a constant holds E2M1 codes: by its type, or as packed bytes that are looked up in the 16 values."""
    if graph.type_of(name) == "FLOAT4E2M1":
        return True
    if graph.type_of(name) != "UINT8" or graph.size(name) < 8:  # less than one block: a mask or a shift
        return False
    for node in cone:
        table = node.input[0] if node.op_type == "Gather" else ""
        if table in graph.constants and graph.size(table) == 16:
            return _is_table(graph, table)
    return False


def _is_table(graph: Graph, name: str) -> bool:
    """Tell whether a constant holds the 16 values of E2M1 in the order of their codes."""
    values = decode_e2m1(torch.arange(16)).numpy()
    return graph.size(name) == 16 and bool(np.array_equal(graph.array(name).ravel(), values))


def _name(node: Any, stored: list[str], claims: list[str]) -> str:
    """Return a layer's name, which the names of its weight's constants begin with; "" for a model that is one layer."""
    parent, dot, _ = stored[0].rpartition(".")
    return parent if dot or "" in claims else node.name


def _kernel_rank(graph: Graph, node: Any) -> int:
    for attribute in node.attribute:
        if attribute.name == "kernel_shape":
            return len(attribute.ints)
    weight = graph.constants.get(node.input[1])
    return len(weight.dims) - 2 if weight is not None else 2


def _other(graph: Graph, node: Any, name: str, kind: str, stored: list[str], claimed: str) -> Row:
    """Return the row of a layer whose weight is not in E2M1."""
    # The largest constant is the weight; smaller ones are its scales and zero points.
    main = max(stored, key=graph.bytes)
    precision = NAMES.get(graph.type_of(main), graph.type_of(main).lower())
    size = sum(graph.bytes(s) for s in stored)
    shape = tuple(graph.constants[main].dims)
    row = Row(name, kind, claimed or precision, precision, shape, graph.size(main), size)
    row.activations = _activations(graph, node.input[0], False)
    if claimed == "nvfp4":
        row.problems.append(f"it is named as NVFP4, its weight is {precision}")
    return row


def _activations(graph: Graph, name: str, portable: bool) -> str:
    """Tell in a word how a layer's input is quantized. Operators that only change the layout are skipped."""
    passed = {"Transpose", "Reshape", "Slice", "Identity", "Pad", "Unsqueeze", "Squeeze", "Flatten"}
    node = graph.producers.get(name)
    while node is not None and node.op_type in passed:
        node = graph.producers.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear":
        # The portable form ends in values times scales, and has no operator of its own that would show it.
        return "computed" if portable and node is not None and node.op_type == "Mul" else "high"
    quantizer = graph.producers.get(node.input[0])
    if quantizer is None or quantizer.op_type != "QuantizeLinear":
        return "high"
    kinds = [a.i for a in quantizer.attribute if a.name == "output_dtype"]
    return "nvfp4" if kinds == [graph.onnx.TensorProto.FLOAT4E2M1] else "quantized otherwise"
