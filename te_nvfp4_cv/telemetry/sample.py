"""One sampled step: what each layer's first call shows, forward and backward, as statistics on its device.

Operands are looked at where the layer quantizes them (plan.Watch); layers in high precision by their input and by a
hook on their output. collect.py says which steps are samples and where the record goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.distributed.fsdp_weight import GatheredWeight
from te_nvfp4_cv.layer import gemms, observe
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.nn.names import plain_name
from te_nvfp4_cv.nn.walk import named_layers, op_of, own_weight
from te_nvfp4_cv.telemetry import blocks as operand_blocks
from te_nvfp4_cv.telemetry import statistics

if TYPE_CHECKING:
    from te_nvfp4_cv.telemetry.collect import Telemetry

THRESHOLD = 3**0.5


class Sample:
    """One sampled step."""

    def __init__(self, telemetry: Telemetry) -> None:
        self.telemetry = telemetry
        self.layers = list(layers_of(telemetry.model))
        owned = ((name, own_weight(module)) for name, module in self.layers)
        self.names = {id(w): name for name, w in owned if w is not None}
        self.found: dict[str, _Layer] = {}
        self.compiled = [plain_name(name) for name, module in telemetry.model.named_modules() if is_compiled(module)]
        self.bytes_left = telemetry.noise_bytes
        self.turn = 0  # how many layers have asked to keep x
        self.refused: list[int] = []  # the numbers of those for which no memory was left

    def called(self, call: observe.Call) -> observe.Seen | None:
        """A layer is called."""
        name = self._name(call.weight)
        if name is None:
            return None
        recomputed = torch._C._current_graph_task_id() != -1  # activation checkpointing, inside of backward
        layer = self.found.get(name)
        first = layer is None
        if layer is None:
            layer = self.found[name] = _Layer(self, name, call)
        elif not recomputed:
            return None  # a layer that is called again
        if call.recipe is not None:
            return observe.Seen(watch=_Watch(layer, first))
        if "input" not in layer.tensors and isinstance(call.x, Tensor):
            layer.tensors["input"] = {"raw": self.plain(call.x)}
        return observe.Seen(finished=layer.finished)

    def plain(self, v: Tensor) -> dict[str, Any]:
        """Statistics of a tensor in high precision."""
        v = v.detach()
        whole = operand_blocks.whole(v)
        v = v.movedim(1, -1) if v.dim() > 2 else v  # channels innermost, as a channels_last tensor lies
        flat = v.reshape(-1)
        return statistics.stats(flat[:: _stride(len(flat), self.telemetry.max_elements)], whole=whole)

    def may_keep(self, x: Tensor) -> bool:
        """Whether this layer's x may stay alive until its backward; layers take turns."""
        telemetry, number = self.telemetry, self.turn
        self.turn += 1
        size = x.numel() * x.element_size()
        if not telemetry.gradient_noise or number < telemetry.noise_from:
            return False
        if size > self.bytes_left:
            self.refused.append(number)
            return False
        self.bytes_left -= size
        return True

    def _name(self, weight: Any) -> str | None:
        for candidate in (weight, getattr(weight, "_base", None)):
            if candidate is None:
                continue
            if id(candidate) in self.names:
                return self.names[id(candidate)]
            for prefix, module in self.telemetry.model.named_modules():  # FSDP2 swaps parameters while a module runs
                for key, parameter in module._parameters.items():
                    if parameter is candidate:
                        name = plain_name(prefix) or type(module).__name__
                        self.names[id(candidate)] = name if key == "weight" else f"{name}.{key}"
                        return self.names[id(candidate)]
        return None

    def record(self, grad_scale: float | Tensor) -> dict[str, Any]:
        """The step's layers as plain numbers, in the model's order; one copy from the device."""
        telemetry = self.telemetry
        out: dict[str, Any] = {}
        for name, module in self.layers:
            seen = self.found.pop(name, None)
            out[name] = seen.entry() if seen is not None else self._unseen(name, module)
            self._weight(out[name], own_weight(module), grad_scale)
        for name, seen in self.found.items():  # weights that are no `weight` of a layer: attention's, functional ones
            out[name] = seen.entry()
            self._weight(out[name], seen.weight, grad_scale)
        for entry in out.values():
            if "gradient" in entry:
                entry["gradient"] = {key: value / grad_scale for key, value in entry["gradient"].items()}
        telemetry.noise_from = self.refused[0] if self.refused and self.refused[0] > telemetry.noise_from else 0
        layers: dict[str, Any] = statistics.fetch(out)
        for layer in layers.values():
            _judge(layer)
        return layers

    def _unseen(self, name: str, module: nn.Module) -> dict[str, Any]:
        compiled = any(not prefix or name == prefix or name.startswith(f"{prefix}.") for prefix in self.compiled)
        reason = "its weight is computed: not heard" if own_weight(module) is None else "not called in this step"
        if compiled:
            reason = "inside of a compiled graph"
        return {"op": op_of(module), "precision": "high", "reason": reason, "tensors": {}}

    def _weight(self, entry: dict[str, Any], weight: Any, grad_scale: float | Tensor) -> None:
        weight, grad = _local(weight), _local(getattr(weight, "grad", None))
        if isinstance(weight, Tensor) and "raw" not in entry["tensors"].get("weight", {}):
            entry["tensors"].setdefault("weight", {})["raw"] = self.plain(weight)
        if grad is not None and not grad.is_sparse:
            entry["tensors"]["weight_gradient"] = {"raw": self.plain(grad / grad_scale)}


class _Layer:
    """What one layer's call shows, forward and backward."""

    def __init__(self, sample: Sample, name: str, call: observe.Call) -> None:
        self.sample, self.name, self.op, self.weight = sample, name, call.op, call.weight
        self.precision, self.reason = ("high", call.reason) if call.recipe is None else ("nvfp4", "")
        self.tensors: dict[str, dict[str, Any]] = {}
        self.more: dict[str, Any] = {}
        self.x: tuple[Tensor, int] | None = None  # kept for the gradient noise, with its version

    def entry(self) -> dict[str, Any]:
        """LAYER of the record."""
        return {"op": self.op, "precision": self.precision, "reason": self.reason, "tensors": self.tensors, **self.more}

    def finished(self, y: Tensor) -> None:
        """A call in high precision has its result."""
        if y.requires_grad and "grad_output" not in self.tensors:
            y.register_hook(self._arrived)

    def _arrived(self, dy: Tensor) -> None:
        self.tensors.setdefault("grad_output", {"raw": self.sample.plain(dy)})


class _Watch:
    """Looks on while the layer is quantized (plan.Watch)."""

    def __init__(self, layer: _Layer, first: bool) -> None:
        self.layer = layer
        self.first = first  # else a recomputed forward, whose backward is the layer's

    @torch.no_grad()
    def quantized(self, role: str, operand: Tensor, faces: tuple[Tensor, ...], seed: Tensor | None, plan: Plan) -> None:
        layer, most = self.layer, self.layer.sample.telemetry.max_elements
        if role == "weight":
            if self.first:
                self._weight(operand, faces, plan)
            return
        if role == "input":
            trains = layer.weight.requires_grad and "wgrad" in plan.gemms
            if trains and layer.sample.may_keep(operand):
                layer.x = operand, operand._version
            if not self.first and "input_column" in layer.tensors:
                return
        found = operand_blocks.of_operand(role, operand, faces, seed, plan, most)
        for face, name in (("row", role), ("col", f"{role}_column")):
            if face in found and name not in layer.tensors:
                layer.tensors[name] = statistics.operand(found[face])

    def _weight(self, w: Tensor, w_q: tuple[Tensor, ...], plan: Plan) -> None:
        layer, telemetry = self.layer, self.layer.sample.telemetry
        found = operand_blocks.of_weight(w, w_q, plan, telemetry.max_elements)
        for gemm, name in (("fprop", "weight"), ("dgrad", "weight_column")):
            if gemm not in found:
                continue
            told = statistics.operand(found[gemm])
            if isinstance(w, GatheredWeight):  # its values are the codes'; record() adds the raw ones of the shard
                told = {key: told[key] for key in ("codes", "dequantized", "scales")}
            layer.tensors[name] = told
        face = plan.weight_faces[0]
        packed = w_q[0 if face == "row" else 2]
        if not packed.numel():
            return
        before = telemetry.codes.setdefault(layer.name, [])
        if before and before[0].shape == packed.shape:
            earlier = before[1] if len(before) > 1 and before[1].shape == packed.shape else None
            changed, back = statistics.flips(packed, before[0], earlier)
            layer.more["flip_rate"] = changed / w.numel()
            layer.more["oscillation"] = None if back is None else back / w.numel()
        else:
            layer.more["flip_rate"] = layer.more["oscillation"] = None
        before[:] = [packed, *before[:1]]

    @torch.no_grad()
    def weight_gradient(self, dy: Tensor, dw: Tensor, plan: Plan) -> None:
        kept, self.layer.x = self.layer.x, None
        if kept is None or kept[0]._version != kept[1]:
            return
        exact = gemms.high_precision_wgrad(dy, kept[0], plan).double()
        noise = (dw.double() - exact).norm()
        self.layer.more["gradient"] = {"norm": exact.norm(), "noise": noise}


# ---- helpers --------------------------------------------------------------------------------------------------------


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Convolutions and linear layers by plain name, in the model's order; a shared one once."""
    return ((name or type(module).__name__, module) for name, module in named_layers(model))


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile was called on the module."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def shape_of(module: nn.Module) -> list[int]:
    """Of its weight; [] where that is computed."""
    w = own_weight(module)
    return [] if w is None else list(w.shape)


def _judge(layer: dict[str, Any]) -> None:
    """The ratio of gradient norm and noise, and whether it is an alarm."""
    gradient = layer.get("gradient")
    if gradient is None:
        return
    norm, noise = gradient["norm"], gradient["noise"]
    gradient["ratio"] = norm / noise if noise else None  # no noise: the weight gradient ran in high precision
    gradient["alarm"] = gradient["ratio"] is not None and gradient["ratio"] < THRESHOLD


def _stride(count: int, most: int) -> int:
    """Every how many elements one is looked at, as for blocks."""
    return operand_blocks.step_of(max(1, count), most * operand_blocks.BLOCK)


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
