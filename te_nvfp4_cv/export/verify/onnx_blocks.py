"""Check the scales of one NVFP4 weight in an ONNX graph, and that its blocks run along the contracted index.

The direction of the blocks is found by evaluation: onnx.reference runs the nodes between scales and weight with each
block's number in the place of its scale. If a number then occurs in two output channels, its block crosses the
contracted index.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from te_nvfp4_cv.export.verify.onnx_graph import Graph
from te_nvfp4_cv.export.verify.report import Row
from te_nvfp4_cv.formats import BLOCK

MOST_BLOCKS = 1 << 24  # fp32 holds whole numbers exactly up to that


def check(graph: Graph, node: Any, row: Row, cone: list[Any], codes: str, scale: str) -> None:
    """Check the scales of a layer. What is wrong is added to its row, or else the direction of its blocks.

    Args:
        node: the node of the layer.
        cone: the nodes that compute the layer's weight.
        codes: the constant with the codes.
        scale: the constant with the block scales.
    """
    values = graph.array(scale).astype(np.float32)
    if not values.size:
        row.problems.append("its block scales are empty")
        return
    finite = np.nan_to_num(np.abs(values))  # for the range only; NaN is counted below
    row.scales = (float(finite.min()), float(finite.max()))
    nan, negative = int(np.isnan(values).sum()), int((values < 0).sum())
    row.problems += [f"{nan} of its block scales are NaN"] if nan else []
    row.problems += [f"{negative} of its block scales are negative"] if negative else []
    real = _real_scales(graph, cone, scale)
    if real is None:
        row.problems.append("its scales are not E4M3 times one fp32 number")
        return
    cut, tensor_scale = real
    row.problems += _of_tensor(graph, codes, tensor_scale)
    if values.size * BLOCK != row.count:
        row.problems.append(f"{row.count / values.size:g} values share a block scale, not 16")
        return
    if values.size > MOST_BLOCKS:
        # Said in the row, so that nobody takes the unchecked direction for a checked one.
        row.axis = (row.axis + "; too large to check").removeprefix("; ")
        return
    problem = _crossing(graph, node, cone, codes, scale, cut)
    if problem:
        row.problems.append(problem)
    else:
        row.axis = ("in-channels; " + row.axis).removesuffix("; ")


def _of_tensor(graph: Graph, codes: str, name: str) -> list[str]:
    """List what is wrong with the tensor scale `name`."""
    value = float(graph.array(name).astype(np.float32).reshape(()))
    if not math.isfinite(value) or value < 0:
        return [f"its tensor scale is {value}"]
    return ["its tensor scale is 0, its codes are not"] if value == 0 and _nonzero(graph, codes) else []


def _nonzero(graph: Graph, codes: str) -> bool:
    values = graph.array(codes)
    if graph.type_of(codes) == "UINT8":  # two to a byte; -0 is 0
        return bool((values & 0x77).any())
    return bool((values.astype(np.float32) != 0).any())


def _real_scales(graph: Graph, cone: list[Any], scale: str) -> tuple[str, str] | None:
    """Return the names of the value that is block scale times tensor scale, and of the tensor scale; else None."""
    # The first reader of the scales: DequantizeLinear in the QDQ form, Cast and Mul in the portable one.
    following = next((n for n in cone if scale in n.input), None)
    if following is not None and following.op_type == "Cast":
        following = next((n for n in cone if following.output[0] in n.input), None)
        if following is None or following.op_type != "Mul":
            return None
    elif following is None or following.op_type != "DequantizeLinear":
        return None
    others = [name for name in following.input if name != scale and name in graph.constants]
    if len(others) != 1 or graph.size(others[0]) != 1:
        return None
    return str(following.output[0]), others[0]


def _crossing(graph: Graph, node: Any, cone: list[Any], codes: str, scale: str, cut: str) -> str | None:
    """Return why the blocks do not run along the contracted index, or None if they do."""
    from onnx.reference import ReferenceEvaluator

    onnx, helper = graph.onnx, graph.onnx.helper
    later = _after(cone, cut)
    weight, scales = graph.constants[codes], graph.constants[scale]
    ones = b"\x22" * graph.bytes(codes)  # every code is 1.0
    unit = helper.make_tensor(codes, weight.data_type, weight.dims, ones, raw=True)
    needed = {i for n in later for i in n.input}
    others = [t for name, t in graph.constants.items() if name in needed and name != codes]
    made = helper.make_graph(
        later, "weight", [helper.make_tensor_value_info(cut, onnx.TensorProto.FLOAT, list(scales.dims))],
        [helper.make_tensor_value_info(node.input[1], onnx.TensorProto.FLOAT, None)], [*others, unit],
    )
    numbers = np.arange(1, 1 + graph.size(scale), dtype=np.float32).reshape(list(scales.dims))  # from 1: padding is 0
    try:
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)])
        # Codes of 1.0 and scales 1, 2, 3, ...: every value of the weight becomes the number of its block.
        results: Any = ReferenceEvaluator(model).run(None, {cut: numbers})
        rows = _output_rows(node, np.asarray(results[0]))
    except Exception as error:  # the file may hold any operator, with any arguments
        return f"its blocks cannot be followed: {type(error).__name__}"
    owner: dict[float, int] = {}  # the output channel in which a block was first met
    for number, values in enumerate(rows):
        for block in np.unique(values):
            if owner.setdefault(float(block), number) != number:
                return "its blocks do not run along the contracted index: one holds values of two output channels"
    return None


def _after(cone: list[Any], cut: str) -> list[Any]:
    """Return the nodes of the cone without those that serve only to compute `cut`."""
    wanted = {cone[-1].output[0]}
    needed = []
    # From the result back to `cut`: a node is needed if something that is needed reads it.
    for node in reversed(cone):
        if node.output[0] in wanted and node.output[0] != cut:
            needed.append(node)
            wanted.update(node.input)
    return needed[::-1]


def _output_rows(node: Any, weight: np.ndarray) -> np.ndarray:
    """Reshape a weight, as its operator takes it, to [output channels, rest]."""
    attributes = {a.name: a.i for a in node.attribute}
    if node.op_type == "Conv":
        return weight.reshape(weight.shape[0], -1)
    if node.op_type == "ConvTranspose":  # [in, out / groups, *kernel]
        groups = attributes.get("group", 1)
        by_group = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return by_group.transpose(0, 2, 1, 3).reshape(groups * weight.shape[1], -1)
    transposed = node.op_type == "Gemm" and attributes.get("transB", 0)  # MatMul and Gemm take [in, out] otherwise
    return weight if transposed else weight.T
