"""Write the plan of tensor parallelism for a network of blocks (nv.tensor_parallel.plan): ResNets, UNets, MLPs.

    a chain: layer - (norm | activation | pooling | depthwise)* - layer ...    each result read by the next one only
    two layers     ColwiseParallel, RowwiseParallel; what lies between: NormParallel
    three layers   ColwiseParallel, ColwiseParallel of an input split by channels, RowwiseParallel (bottlenecks)

A chain of more layers is cut into such pieces. What enters and leaves a piece is whole on every rank, so the rest of
the network stays as it is. The network is traced by torch.fx; where that cannot trace a module, its children are looked
at one by one. A layer is shared out if each rank gets a multiple of 16 channels: then operands have the codes of the
unsharded layer. Weights that are tied, or read by others than their layer, stay whole.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.distributed.tensor import Shard

from te_nvfp4_cv.distributed import tp_norm
from te_nvfp4_cv.distributed.tensor_parallel import ColwiseParallel, NormParallel, RowwiseParallel
from te_nvfp4_cv.errors import check_module, value_error
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.nn.base import NVFP4_CLASSES, OPS

Style = ColwiseParallel | NormParallel | RowwiseParallel
_ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.Hardswish, nn.Hardtanh),
    *(nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d),
    *(nn.Dropout3d,),
)
_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Upsample),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
_FUNCTIONS = {
    *(torch.relu, torch.sigmoid, torch.tanh, F.relu, F.relu_, F.relu6, F.leaky_relu, F.gelu, F.silu, F.mish, F.elu),
    *(F.hardswish, F.hardtanh, F.hardsigmoid, F.dropout, F.dropout2d, F.sigmoid, F.tanh),
}
_METHODS = {"relu", "relu_", "sigmoid", "tanh", "contiguous"}
_LAYERS = (*OPS, *NVFP4_CLASSES.values())


def plan(model: nn.Module, mesh: Any) -> dict[str, Style]:
    """Return a plan for torch's parallelize_module that shares out the blocks of a network.

    Args:
        model: the network, not parallelized yet.
        mesh: the DeviceMesh of one dimension over which channels will be shared out.
    Raises:
        TypeError: `model` is no module.
        ValueError: no two layers of the model follow each other so, with channels for all ranks.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> mesh = torch.distributed.init_device_mesh("cuda", (2,))  # doctest: +SKIP
        >>> model = parallelize_module(model, mesh, nv.tensor_parallel.plan(model, mesh))  # doctest: +SKIP
    """
    check_module("tensor_parallel.plan", model, "nv.tensor_parallel.plan(model, mesh)")
    found: dict[str, Style] = {}
    ranks = mesh.size()
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for chain in _chains(model, "", ranks, {p for p, count in owners.items() if count > 1}):
        layers = [name for name, _ in chain]
        while len(layers) > 1:
            size = 3 if len(layers) % 2 else 2
            piece, layers = layers[:size], layers[size:]
            for name in piece[:-1]:
                linear = isinstance(model.get_submodule(name), nn.Linear)
                split = None if name == piece[0] else Shard(-1 if linear else 1)
                found[name] = ColwiseParallel(input_layouts=split)
                found |= {norm: NormParallel() for norm in dict(chain)[name]}
            found[piece[-1]] = RowwiseParallel()
    if not found:
        raise value_error(
            "tensor_parallel.plan: nothing to share out.",
            got=f"a {type(model).__name__} in which no two layers follow each other, joined by norms, activations and "
            f"pooling only, with {BLOCK} channels between them for each of {ranks} ranks",
            needs="blocks such as conv - norm - activation - conv",
            fix="write the plan by hand, or use fewer ranks",
        )
    return found


Chain = list[tuple[str, list[str]]]  # a layer's name, and those of the norms between it and the next one


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in _LAYERS or bool(tp_norm.kind_of(m)) or super().is_leaf_module(m, module_qualified_name)


def _chains(model: nn.Module, prefix: str, ranks: int, tied: set[int]) -> list[Chain]:
    """Return the longest chains of layers that can be shared out; `tied`: ids of the parameters of several modules."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # code that cannot run on stand-ins may fail anywhere
        children = model.named_children()
        return [chain for name, child in children for chain in _chains(child, f"{prefix}{name}.", ranks, tied)]
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    read |= {name for name in calls if any(id(p) in tied for p in modules[name].parameters(recurse=False))}
    once = {name for name, count in calls.items() if count == 1} - read
    following: dict[str, tuple[list[str], str]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and node.target in once and _is_layer(modules[node.target]):
            found = _next_layer(node, modules, once, ranks)
            if found is not None:
                following[node.target] = found
    chains, second = [], {name for _, name in following.values()}
    for first in following:
        if first in second:
            continue
        chain: Chain = []
        name = first
        while name in following:
            norms, after = following[name]
            chain.append((prefix + name, [prefix + norm for norm in norms]))
            name = after
        chains.append([*chain, (prefix + name, [])])
    return chains


def _is_layer(module: nn.Module) -> bool:
    return type(module) in _LAYERS and getattr(module, "groups", 1) == 1


def _next_layer(node: Any, modules: dict[str, nn.Module], once: set[str], ranks: int) -> tuple[list[str], str] | None:
    """Return the norms on the way from a layer to the next one, and that one's name; None if there is none."""
    first: Any = modules[node.target]
    linear = isinstance(first, nn.Linear)
    norms: list[str] = []
    channels = first.out_features if linear else first.out_channels
    if channels % (BLOCK * ranks):
        return None
    while len(node.users) == 1:
        (after,) = node.users
        if after.args[:1] != (node,) or after.all_input_nodes != [node]:
            return None
        node = after
        if node.op in ("call_function", "call_method"):
            if node.target not in (_FUNCTIONS if node.op == "call_function" else _METHODS):
                return None
            continue
        if node.op != "call_module":
            return None
        module = modules[node.target]
        if isinstance(module, _ELEMENTWISE) or (not linear and isinstance(module, _POOLS)):
            continue  # ResNets call one ReLU twice
        if node.target not in once:
            return None
        if _is_layer(module):
            # After a linear layer channels are last, after a convolution they are not.
            return (norms, node.target) if isinstance(module, nn.Linear) == linear else None
        if not _keeps_channels(module, channels, linear, ranks):
            return None
        norms.append(node.target)
    return None


def _keeps_channels(module: Any, channels: int, linear: bool, ranks: int) -> bool:
    """Return True for what NormParallel takes there."""
    kind = tp_norm.kind_of(module)
    if not kind or tp_norm.channels_of(module) != channels:
        return False
    if kind == "depthwise":
        return not linear and module.out_channels == channels
    if kind == "layer":
        return linear == (type(module) is nn.LayerNorm)
    own = kind == "group" and type(module).forward is not nn.GroupNorm.forward
    return not (own and tp_norm.crosses_ranks(module, ranks))
