"""What an ONNX file really holds: the weight of every Conv, ConvTranspose, Gemm and MatMul, traced to its bytes.

    FLOAT4E2M1, or packed uint8 looked up in the 16 E2M1 values, times E4M3 scales of 16    "nvfp4"
    FLOAT8, INT8, ... behind a DequantizeLinear; a plain initializer                        its type

Along what the blocks run is found by evaluation: the nodes between scales and weight run with each block's number in
the place of its scale (onnx.reference); a number that then occurs in two output channels crosses the contracted index.
A file of nv.export.to_onnx names in its metadata the layers that are in NVFP4; what it names must be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from te_nvfp4_cv.checks import message, runtime_error, value_error
from te_nvfp4_cv.export.inspection import Report, Row
from te_nvfp4_cv.formats import BLOCK, decode_e2m1

CLAIMS = "te_nvfp4_cv.layers"  # key in the model's metadata: JSON list of names
LAYERS = {"Conv": "conv", "ConvTranspose": "conv_transpose", "Gemm": "linear", "MatMul": "linear"}
QUANTIZED = ("DequantizeLinear", "QuantizeLinear")
MOST_BLOCKS = 1 << 24  # fp32 counts to that


@dataclass
class _Graph:
    """A model's nodes by output and initializers by name."""

    onnx: Any
    producers: Mapping[str, Any]
    initializers: Mapping[str, Any]


def inspect_onnx(path: Path) -> Report:
    """The rows of an ONNX file.

    Raises:
        FileNotFoundError: no such file; ValueError: a damaged one; RuntimeError: the package onnx is missing.
    """
    try:
        import onnx
    except ImportError as error:
        raise runtime_error(
            "verify: ONNX files need the package onnx.",
            got=str(error),
            needs="onnx and ml_dtypes",
            fix="pip install 'te_nvfp4_cv[export]'",
        ) from error
    if not path.is_file():
        raise FileNotFoundError(
            message("verify: no such file.", got=str(path), needs="an .onnx file", fix="correct the path")
        )
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(str(path))
    except Exception as error:  # protobuf's, the checker's, the operating system's for external data
        raise value_error(
            f"{path} is damaged.",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            needs="a whole ONNX file, its external data beside it",
            fix="copy or export it again",
        ) from error
    graph = _Graph(
        onnx,
        {output: node for node in model.graph.node for output in node.output},
        {tensor.name: tensor for tensor in model.graph.initializer},
    )
    claims = _claims(model)
    rows = [row for node in model.graph.node if (row := _row(graph, node, claims)) is not None]
    found = {row.name for row in rows}
    problems = [f"layer {name!r} is named as NVFP4 and is not in the graph" for name in claims if name not in found]
    origin = " ".join(text for text in (model.producer_name, model.producer_version) if text) or "unknown tool"
    return Report(str(path), f"ONNX opset {_opset(model)}, {origin}", rows, problems)


def _opset(model: Any) -> str:
    return ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import).removeprefix("ai.onnx ")


def _claims(model: Any) -> list[str]:
    for entry in model.metadata_props:
        if entry.key == CLAIMS:
            try:
                return [str(name) for name in json.loads(entry.value)]
            except (ValueError, TypeError, RecursionError):
                return []
    return []


def _row(graph: _Graph, node: Any, claims: list[str]) -> Row | None:
    """The row of a layer with a weight, else None."""
    if node.op_type not in LAYERS or len(node.input) < 2:
        return None
    cone = _cone(graph, node.input[1])
    stored = [name for name in _sources(graph, cone, node.input[1]) if _size(graph.initializers[name]) > 1]
    if cone is None or not stored:
        return None  # a product of two activations
    name = _name(node, stored)
    kind = LAYERS[node.op_type] + (f"{_kernel_rank(graph, node)}d" if "conv" in LAYERS[node.op_type] else "")
    types = graph.onnx.TensorProto
    scales = [s for s in stored if graph.initializers[s].data_type == types.FLOAT8E4M3FN]
    codes = [s for s in stored if _is_code(graph, s, cone)]
    claimed = "nvfp4" if name in claims or codes else ""
    if not codes:
        main = max(stored, key=lambda s: _bytes(graph.initializers[s]))
        return _other(graph, node, name, kind, main, stored, claimed)
    weight = graph.initializers[codes[0]]
    packed = weight.data_type == types.UINT8
    count = _size(weight) * (2 if packed else 1)
    size = sum(_bytes(graph.initializers[s]) for s in (*codes, *scales)) + 4
    row = Row(name, kind, claimed, "nvfp4", tuple(weight.dims), count, size, "uint8, looked up" if packed else "")
    row.activations = _activations(graph, node.input[0], packed)
    if len(scales) != 1:
        row.problems.append(f"it has {len(scales)} arrays of E4M3 scales, not one")
    else:
        _check_scales(graph, node, row, cone, codes[0], scales[0], count)
    if row.problems:
        row.precision = "uint8" if packed else "fp4"
    return row


def _cone(graph: _Graph, name: str) -> list[Any] | None:
    """The nodes that compute a value from initializers alone, inputs first; None where it depends on an input."""
    order: list[Any] = []
    done: set[str] = set()
    stack = [(name, False)]
    while stack:
        value, expanded = stack.pop()
        if value in graph.initializers or not value or (value in done and not expanded):
            continue
        node = graph.producers.get(value)
        if node is None:
            return None
        if expanded:
            order.append(node)
            continue
        done.update(node.output)
        stack.append((value, True))
        stack += [(source, False) for source in node.input]
    return order


def _sources(graph: _Graph, cone: list[Any] | None, name: str) -> list[str]:
    if cone is None:
        return []
    if not cone:
        return [name] if name in graph.initializers else []
    return list(dict.fromkeys(i for node in cone for i in node.input if i in graph.initializers))


def _is_code(graph: _Graph, name: str, cone: list[Any]) -> bool:
    """Whether an initializer holds E2M1 codes: by its type, or as packed bytes that are looked up in the 16 values."""
    tensor = graph.initializers[name]
    if tensor.data_type == graph.onnx.TensorProto.FLOAT4E2M1:
        return True
    if tensor.data_type != graph.onnx.TensorProto.UINT8 or _size(tensor) < 8:
        return False
    values = decode_e2m1_values()
    for node in cone:
        table = graph.initializers.get(node.input[0]) if node.op_type == "Gather" else None
        if table is not None and _size(table) == 16:
            return bool(np.array_equal(graph.onnx.numpy_helper.to_array(table).ravel(), values))
    return False


def decode_e2m1_values() -> np.ndarray:
    """The 16 values in the order of their codes."""
    import torch

    return decode_e2m1(torch.arange(16)).numpy()


def _size(tensor: Any) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64))


def _bytes(tensor: Any) -> int:
    if tensor.raw_data:
        return len(tensor.raw_data)
    return _size(tensor) * 4


def _name(node: Any, stored: list[str]) -> str:
    """The layer's name: that of its weight's initializers, without their last part."""
    return stored[0].rpartition(".")[0] or node.name


def _kernel_rank(graph: _Graph, node: Any) -> int:
    for attribute in node.attribute:
        if attribute.name == "kernel_shape":
            return len(attribute.ints)
    weight = graph.initializers.get(node.input[1])
    return len(weight.dims) - 2 if weight is not None else 2


def _other(graph: _Graph, node: Any, name: str, kind: str, main: str, stored: list[str], claimed: str) -> Row:
    """A row of a weight that is not in E2M1."""
    tensor = graph.initializers[main]
    names = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "FLOAT8E4M3FN": "fp8", "DOUBLE": "fp64"}
    kind_of = graph.onnx.TensorProto.DataType.Name(tensor.data_type)
    precision = names.get(kind_of, kind_of.lower())
    size = sum(_bytes(graph.initializers[s]) for s in stored)
    row = Row(name, kind, claimed or precision, precision, tuple(tensor.dims), _size(tensor), size)
    row.activations = _activations(graph, node.input[0], False)
    if claimed == "nvfp4":
        row.problems.append(f"it is named as NVFP4, its weight is {precision}")
    return row


def _activations(graph: _Graph, name: str, portable: bool) -> str:
    """Whether the layer's input comes from a quantizer to FLOAT4E2M1; layout operators between are passed."""
    passed = {"Transpose", "Reshape", "Slice", "Identity", "Pad", "Unsqueeze", "Squeeze", "Flatten"}
    node = graph.producers.get(name)
    while node is not None and node.op_type in passed:
        node = graph.producers.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear":
        return "computed" if portable and node is not None and node.op_type == "Mul" else "high"
    quantizer = graph.producers.get(node.input[0])
    if quantizer is None or quantizer.op_type != "QuantizeLinear":
        return "high"
    kinds = [a.i for a in quantizer.attribute if a.name == "output_dtype"]
    return "nvfp4" if kinds == [graph.onnx.TensorProto.FLOAT4E2M1] else "quantized otherwise"


# ---- scales ---------------------------------------------------------------------------------------------------------


def _check_scales(graph: _Graph, node: Any, row: Row, cone: list[Any], codes: str, scale: str, count: int) -> None:
    tensor = graph.initializers[scale]
    raw = np.frombuffer(tensor.raw_data, dtype=np.uint8) if tensor.raw_data else np.zeros(0, np.uint8)
    if not raw.size:
        row.problems.append("its block scales cannot be read")
        return
    values = graph.onnx.numpy_helper.to_array(tensor).astype(np.float32)
    finite = np.nan_to_num(np.abs(values))
    row.scales = (float(finite.min()), float(finite.max()))
    nan = int(((raw & 0x7F) == 0x7F).sum())
    row.problems += [f"{nan} of its block scales are NaN"] if nan else []
    row.problems += [f"{int((values < 0).sum())} of its block scales are negative"] if bool((values < 0).any()) else []
    if raw.size * BLOCK != count:
        row.problems.append(f"{count / raw.size:g} values share a block scale, not 16")
        return
    if raw.size > MOST_BLOCKS:
        row.axis = (row.axis + "; too large to check").removeprefix("; ")
        return
    problem = _crossing(graph, node, cone, codes, scale)
    if problem:
        row.problems.append(problem)
    else:
        row.axis = ("in-channels; " + row.axis).removesuffix("; ")


def _crossing(graph: _Graph, node: Any, cone: list[Any], codes: str, scale: str) -> str | None:
    """Why blocks do not run along the contracted index, or None."""
    import torch
    from onnx.reference import ReferenceEvaluator

    cut = _real_scales(graph, cone, scale)
    if cut is None:
        return "its scales are not E4M3 times one fp32 number"
    onnx, helper = graph.onnx, graph.onnx.helper
    later = _after(cone, cut)
    weight, scales = graph.initializers[codes], graph.initializers[scale]
    ones = torch.full((len(weight.raw_data),), 0x22, dtype=torch.uint8).numpy().tobytes()  # every code is 1.0
    unit = helper.make_tensor(codes, weight.data_type, weight.dims, ones, raw=True)
    needed = {i for n in later for i in n.input}
    kept = [t for name, t in graph.initializers.items() if name in needed and name != codes]
    made = helper.make_graph(
        later,
        "weight",
        [helper.make_tensor_value_info(cut, onnx.TensorProto.FLOAT, list(scales.dims))],
        [helper.make_tensor_value_info(node.input[1], onnx.TensorProto.FLOAT, None)],
        [*kept, unit],
    )
    numbers = np.arange(1, 1 + _size(scales), dtype=np.float32).reshape(list(scales.dims))
    try:
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)])
        results: Any = ReferenceEvaluator(model).run(None, {cut: numbers})
    except Exception as error:  # any operator may be in the way
        return f"its blocks cannot be followed: {type(error).__name__}"
    rows = _output_rows(node, np.asarray(results[0]))
    owner: dict[float, int] = {}
    for number, values in enumerate(rows):
        for block in np.unique(values):
            if owner.setdefault(float(block), number) != number:
                return "its blocks do not run along the contracted index: one holds values of two output channels"
    return None


def _real_scales(graph: _Graph, cone: list[Any], scale: str) -> str | None:
    """The value that is E4M3 scale times tensor scale, of the scale's own shape."""
    following = next((n for n in cone if scale in n.input), None)
    if following is not None and following.op_type == "Cast":
        following = next((n for n in cone if following.output[0] in n.input), None)
        if following is None or following.op_type != "Mul":
            return None
    elif following is None or following.op_type != "DequantizeLinear":
        return None
    others = [graph.initializers.get(name) for name in following.input if name != scale]
    sizes = [_size(t) for t in others if t is not None]
    return str(following.output[0]) if sizes == [1] else None


def _after(cone: list[Any], cut: str) -> list[Any]:
    """The nodes of the cone that do not only lead to `cut`."""
    wanted = {cone[-1].output[0]}
    kept = []
    for node in reversed(cone):
        if node.output[0] in wanted and node.output[0] != cut:
            kept.append(node)
            wanted.update(node.input)
    return kept[::-1]


def _output_rows(node: Any, weight: np.ndarray) -> np.ndarray:
    """[output channels, rest] of a weight as its operator takes it."""
    attributes = {a.name: a.i for a in node.attribute}
    if node.op_type == "Conv":
        return weight.reshape(weight.shape[0], -1)
    if node.op_type == "ConvTranspose":  # [in, out / groups, *kernel]
        groups = attributes.get("group", 1)
        by_group = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return by_group.transpose(0, 2, 1, 3).reshape(groups * weight.shape[1], -1)
    transposed = node.op_type == "Gemm" and attributes.get("transB", 0)
    return weight if transposed else weight.T
