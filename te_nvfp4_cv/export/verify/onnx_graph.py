"""Read an ONNX graph to find out what a weight is computed from, without running the graph.

Initializers and the outputs of Constant nodes are treated alike: both are known before the first input arrives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Graph:
    """A model's nodes, by output and in order, and its constants by name, those of subgraphs (If, Loop), too."""

    onnx: Any
    producers: Mapping[str, Any]
    constants: Mapping[str, Any]
    nodes: list[Any]

    @classmethod
    def of(cls, onnx: Any, model: Any) -> Graph:
        """Read the graph of a model whose external data are loaded."""
        constants: dict[str, Any] = {}
        producers: dict[str, Any] = {}
        nodes: list[Any] = []
        for graph in _graphs(model.graph):
            constants |= {tensor.name: tensor for tensor in graph.initializer}
            nodes += graph.node
            for node in graph.node:
                value = _constant(onnx, node)
                if value is not None:
                    constants[value.name] = value
                else:
                    producers |= dict.fromkeys(node.output, node)
        return cls(onnx, producers, constants, nodes)

    def cone(self, name: str) -> list[Any] | None:
        """Return the nodes that compute a value, in order, or None if it depends on an input of the graph."""
        order: list[Any] = []
        done: set[str] = set()
        stack = [(name, False)]
        while stack:  # depth first, without recursion: a malicious graph may be a chain of any length
            value, expanded = stack.pop()
            # ONNX writes an optional input that is left out as an empty name.
            if value in self.constants or not value or (value in done and not expanded):
                continue
            node = self.producers.get(value)
            if node is None:
                return None
            if expanded:
                order.append(node)
                continue
            done.update(node.output)
            # Seen again after all its inputs, and put into the order then: a node comes after what it reads.
            stack.append((value, True))
            stack += [(source, False) for source in node.input]
        return order

    def sources(self, cone: list[Any] | None, name: str) -> list[str]:
        """Return the constants that a value is computed from."""
        if cone is None:
            return []
        if not cone:
            return [name] if name in self.constants else []
        return list(dict.fromkeys(i for node in cone for i in node.input if i in self.constants))

    def array(self, name: str) -> np.ndarray:
        """Return the values of a constant; types below 16 bits are those of ml_dtypes."""
        return self.onnx.numpy_helper.to_array(self.constants[name])

    def type_of(self, name: str) -> str:
        """Return ONNX's word for a constant's type: "FLOAT", "FLOAT8E4M3FN", ..."""
        return str(self.onnx.TensorProto.DataType.Name(self.constants[name].data_type))

    def size(self, name: str) -> int:
        """Return the number of values of a constant."""
        return int(np.prod(self.constants[name].dims, dtype=np.int64))

    def bytes(self, name: str) -> int:
        """Return how many bytes the values of a constant take."""
        kind = self.constants[name].data_type
        if self.type_of(name) in ("FLOAT4E2M1", "INT4", "UINT4"):
            return -(-self.size(name) // 2)  # two to a byte, rounded up
        return self.size(name) * int(self.onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph and the graphs inside of its nodes. A name stands for one value in all of them (ONNX says so)."""
    stack = [graph]
    while stack:  # without recursion: a malicious graph may be nested to any depth
        graph = stack.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                stack += [attribute.g] if attribute.HasField("g") else list(attribute.graphs)


def _constant(onnx: Any, node: Any) -> Any | None:
    """Return the tensor of a Constant node, named as the node's output; None for any other node."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or not node.output:
        return None
    for attribute in node.attribute:
        if attribute.name == "value":
            tensor = onnx.TensorProto()
            # A copy, as it gets another name: the model's checksum is taken from the original.
            tensor.CopyFrom(attribute.t)
            tensor.name = node.output[0]
            return tensor
        kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
        if attribute.name in kinds:
            values = np.asarray(onnx.helper.get_attribute_value(attribute), dtype=kinds[attribute.name])
            return onnx.numpy_helper.from_array(values, node.output[0])
    return None
