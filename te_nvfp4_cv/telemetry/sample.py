"""Take one sample: statistics of what each layer's first call in a step shows, forward and backward.

Operands are looked at where the layer quantizes them (plan.Watch). Layers in high precision show their input, and their
output's gradient through a hook. Everything is computed on the layer's device and fetched once, when the step is over.
collect.py decides which steps are sampled, and where the record goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.backend.torch_private import has_no_values, in_backward, is_batched, unseen_by_checkpoints
from te_nvfp4_cv.distributed.fsdp_weight import GatheredWeight
from te_nvfp4_cv.layer import gemms, observe
from te_nvfp4_cv.layer.check import torch_func_is_on
from te_nvfp4_cv.layer.constants import running_modules
from te_nvfp4_cv.layer.names import plain_name
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.nn.walk import named_layers, named_modules, op_of, own_weight
from te_nvfp4_cv.ops.experts import Experts
from te_nvfp4_cv.ops.geometry import BLOCK
from te_nvfp4_cv.ops.records import Operand, WeightCodes
from te_nvfp4_cv.recipe.fields import Role
from te_nvfp4_cv.telemetry import blocks, statistics
from te_nvfp4_cv.telemetry.settings import THRESHOLD, Settings


@dataclass
class Memory:
    """Values that one sample leaves to the next.

    Attributes:
        codes: packed weights of the last two samples by layer, the newest first, to count flips.
        noise_from: number of the layer whose turn for gradient noise comes next.
    """

    codes: dict[str, list[Tensor]] = field(default_factory=dict)
    noise_from: int = 0


class Sample:
    """One sampled step of a model."""

    def __init__(self, model: nn.Module, settings: Settings, memory: Memory) -> None:
        self.model, self.settings, self.memory = model, settings, memory
        self.layers = list(layers_of(model))
        self.names: dict[int, str] = {}  # by the weight's id; of layers that share a weight, the first one's
        self.tied: dict[int, set[str]] = {}  # the names of the others
        for name, module in self.layers:
            w = own_weight(module)
            if w is not None and self.names.setdefault(id(w), name) != name:
                self.tied.setdefault(id(w), set()).add(name)
        self.modules = {module: plain_name(name) or type(module).__name__ for name, module in named_modules(model)}
        self.found: dict[str, _Layer] = {}
        self.compiled = [plain_name(name) for name, module in model.named_modules() if _is_compiled(module)]
        self.bytes_left = settings.noise_bytes
        self.turn = 0  # how many layers have asked to hold x until their backward
        self.refused: list[int] = []  # the numbers of those for which no memory was left

    def called(self, call: observe.Call) -> observe.Seen | None:
        """Answer a layer's call: return what the sample wants to see of it, or None if it belongs to another model."""
        name = self._name(call.weight)
        if name is None:
            return None
        repeated = in_backward()  # a forward inside of backward is activation checkpointing's repetition
        layer = self.found.get(name)
        first = layer is None
        if layer is None:
            layer = self.found[name] = _Layer(self, name, call)
        elif not layer.takes(repeated):
            return None
        if call.recipe is not None:
            return observe.Seen(watch=_Watch(layer, first))
        # In high precision nothing is quantized that could be watched: the raw input is all that there is.
        if first:
            self.add(layer.tensors, "input", call.x)
        return observe.Seen(finished=partial(layer.finished, first))

    def add(self, tensors: dict[str, dict[str, Any]], name: str, v: Any) -> None:
        """Record the statistics of a tensor in high precision, if it has values that can be read."""
        v = _local(v)
        if isinstance(v, Tensor) and _readable(v):
            tensors.setdefault(name, {})["raw"] = self.plain(v)

    @unseen_by_checkpoints
    def plain(self, v: Tensor) -> dict[str, Any]:
        """Compute the statistics of a tensor in high precision."""
        v = v.detach()
        whole = blocks.whole(v)
        v = v.movedim(1, -1) if v.dim() > 2 else v  # channels innermost, as a channels_last tensor lies
        flat = v.reshape(-1)
        # The stride is that of blocks, but of elements: their number counts as if each were a block.
        stride = blocks.step_of(max(1, len(flat)), self.settings.max_elements * BLOCK)
        return statistics.stats(flat[::stride], whole=whole)

    def may_hold(self, x: Tensor) -> bool:
        """Decide whether this layer's x may stay alive until its backward; layers take turns."""
        number = self.turn
        self.turn += 1
        size = x.numel() * x.element_size()
        if not self.settings.gradient_noise or number < self.memory.noise_from:
            return False
        if size > self.bytes_left:
            self.refused.append(number)
            return False
        self.bytes_left -= size  # never given back: backward frees x only after all of forward has run
        return True

    def _name(self, weight: Any) -> str | None:
        """Return the name of the layer whose weight it is, a view or computed too; None if it is none of ours."""
        for candidate in (weight, getattr(weight, "_base", None)):
            if candidate is None:
                continue
            if id(candidate) in self.names:
                tied = self.tied.get(id(candidate))
                running = None if tied is None else self._running()
                return running if tied is not None and running in tied else self.names[id(candidate)]
            # Not a `weight` of a layer: look among all parameters once, and remember what was found.
            for prefix, module in self.model.named_modules():  # FSDP2 swaps parameters while a module runs
                for key, parameter in module._parameters.items():
                    if parameter is candidate:
                        name = plain_name(prefix) or type(module).__name__
                        self.names[id(candidate)] = name if key == "weight" else f"{name}.{key}"
                        return self.names[id(candidate)]
        # No module holds a computed weight, but the one that computes it is running.
        return self._running() if isinstance(weight, Tensor) else None

    def _running(self) -> str | None:
        module = next(running_modules(), None)
        return None if module is None else self.modules.get(module)

    def record(self, grad_scale: float | Tensor) -> dict[str, Any]:
        """Return the step's layers as plain numbers, in the model's order, after one copy from the device."""
        out: dict[str, Any] = {}
        for name, module in self.layers:
            seen = self.found.pop(name, None)
            out[name] = seen.entry() if seen is not None else self._unseen(name, module)
            weight = own_weight(module)
            self._weight(out[name], seen.weight if seen is not None and weight is None else weight, grad_scale)
        for name, seen in self.found.items():  # weights that no layer owns as `weight`: attention's, functional ones
            out[name] = seen.entry()
            self._weight(out[name], seen.weight, grad_scale)
        for entry in out.values():
            if "gradient" in entry:
                entry["gradient"] = {key: value / grad_scale for key, value in entry["gradient"].items()}
        # The first layer that found no memory comes first in the next sample. If that would be no progress, because
        # one layer alone is too large, the turns start again.
        first = self.refused[0] if self.refused else 0
        self.memory.noise_from = first if first > self.memory.noise_from else 0
        layers: dict[str, Any] = statistics.fetch(out)
        for layer in layers.values():
            _judge(layer)  # on plain numbers: to compare tensors on a GPU would wait for it at every layer
        return layers

    def _unseen(self, name: str, module: nn.Module) -> dict[str, Any]:
        compiled = any(not prefix or name == prefix or name.startswith(f"{prefix}.") for prefix in self.compiled)
        reason = "inside a compiled graph" if compiled else "not called in this step"
        return {"op": op_of(module), "precision": "unseen", "reason": reason, "tensors": {}}

    def _weight(self, entry: dict[str, Any], weight: Any, grad_scale: float | Tensor) -> None:
        # Torch warns of the gradient of a computed weight, which it does not keep.
        leaf = isinstance(weight, Tensor) and weight.is_leaf
        grad = _local(weight.grad if leaf else None)
        if "raw" not in entry["tensors"].get("weight", {}):
            self.add(entry["tensors"], "weight", weight)
        if grad is not None:
            scaled = grad if isinstance(grad_scale, float) and grad_scale == 1 else grad / grad_scale
            self.add(entry["tensors"], "weight_gradient", scaled)


class _Layer:
    """One layer of a sample: what its call shows, forward and backward."""

    def __init__(self, sample: Sample, name: str, call: observe.Call) -> None:
        self.sample, self.name, self.op, self.weight = sample, name, call.op, call.weight
        self.precision, self.reason = ("high", call.reason) if call.recipe is None else ("nvfp4", "")
        self.tensors: dict[str, dict[str, Any]] = {}
        self.more: dict[str, Any] = {}
        # Without a graph the first call has no backward pass of its own, as in a checkpoint that is reentrant.
        self.graph = torch.is_grad_enabled()
        self.repeated = self.over = False

    def takes(self, repeated: bool) -> bool:
        """Return whether a further call belongs to the record, which is that of the step's first call.

        It does if activation checkpointing repeats a forward that had no graph, because then the backward pass is that
        of the repetition. Of several calls the first one's backward comes last, and is the one that stays. A call that
        is no repetition after one that is begins another batch, of which nothing is recorded.
        """
        self.over |= self.repeated and not repeated
        self.repeated |= repeated
        return repeated and not self.over and not self.graph

    def entry(self) -> dict[str, Any]:
        """Return the layer's entry in the record."""
        return {"op": self.op, "precision": self.precision, "reason": self.reason, "tensors": self.tensors, **self.more}

    def finished(self, first: bool, y: Tensor) -> None:
        """Take the result of a call in high precision: its gradient is recorded when it arrives."""
        if y.requires_grad and _readable(y):  # else its gradient would not be, either
            y.register_hook(partial(self._arrived, first))

    def _arrived(self, first: bool, dy: Tensor) -> None:
        if not first or "grad_output" not in self.tensors:
            self.sample.add(self.tensors, "grad_output", dy)


class _Watch:
    """Look on while the layer's operands are quantized (plan.Watch).

    `first` is False for a forward that activation checkpointing repeats (_Layer.takes): its rows and weight were
    recorded before; what it adds is recorded when its backward comes.
    """

    def __init__(self, layer: _Layer, first: bool) -> None:
        self.layer, self.first, self.graph = layer, first, torch.is_grad_enabled()
        self.x: tuple[Tensor, int] | None = None  # held for the gradient noise, with its version
        self.made: dict[str, dict[str, Any]] = {}  # of a repetition, what its backward will record

    @unseen_by_checkpoints  # most figures are taken in the first forward alone
    @torch.no_grad()
    def quantized(
        self,
        role: Role,
        operand: Tensor,
        made: Operand | WeightCodes,
        seed: Tensor | None,
        plan: Plan,
        experts: Experts | None = None,
    ) -> None:
        layer, most = self.layer, self.layer.sample.settings.max_elements
        if isinstance(made, WeightCodes):
            if self.first:
                self._weight(operand, made, plan)
            return
        if role == Role.INPUT:
            trains = layer.weight.requires_grad and "wgrad" in plan.gemms and self.graph
            if trains and layer.sample.may_hold(operand):
                self.x = operand, operand._version  # an in-place ReLU may change x before its backward comes
        found = blocks.of_operand(role, operand, made, seed, plan, most, experts)
        for face, name in (("row", role.value), ("col", f"{role.value}_column")):
            # The first forward has recorded its rows.
            if face in found and name not in self.made and (self.first or name != Role.INPUT.value):
                self.made[name] = statistics.operand(found[face])
        if self.first or role == Role.GRAD_OUTPUT:
            layer.tensors |= self.made

    def _weight(self, w: Tensor, codes: WeightCodes, plan: Plan) -> None:
        layer, sample = self.layer, self.layer.sample
        found = blocks.of_weight(w, codes, plan, sample.settings.max_elements)
        for gemm, name in (("fprop", "weight"), ("dgrad", "weight_column")):
            if gemm not in found:
                continue
            figures = statistics.operand(found[gemm])
            # A gathered weight holds only codes, so comparing with its "raw" values would show no error. record() adds
            # the raw values of this rank's shard.
            if isinstance(w, GatheredWeight):
                figures = {key: figures[key] for key in ("codes", "dequantized", "scales")}
            layer.tensors[name] = figures
        packed = codes.face(plan.weight_faces[0]).data
        if not packed.numel():  # no GEMM reads this face, so there are no codes
            return
        before = sample.memory.codes.setdefault(layer.name, [])
        if before and before[0].shape == packed.shape:
            earlier = before[1] if len(before) > 1 and before[1].shape == packed.shape else None
            changed, back = statistics.flips(packed, before[0], earlier)
            layer.more["flip_rate"] = changed / w.numel()
            layer.more["oscillation"] = None if back is None else back / w.numel()
        else:
            layer.more["flip_rate"] = layer.more["oscillation"] = None
        before[:] = [packed, *before[:1]]

    @torch.no_grad()
    def weight_gradient(self, dy: Tensor, dw: Tensor, plan: Plan, experts: Experts | None) -> None:
        held, self.x = self.x, None
        if held is None or held[0]._version != held[1]:
            if not self.first:
                self.layer.more.pop("gradient", None)  # that of a later call
            return
        exact = gemms.plain_wgrad(dy, held[0], plan, experts).double()
        noise = (dw.double() - exact).norm()
        self.layer.more["gradient"] = {"norm": exact.norm(), "noise": noise}


# ---- helpers --------------------------------------------------------------------------------------------------------


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """List convolutions and linear layers by plain name, in the model's order; a shared one comes once."""
    return ((name or type(module).__name__, module) for name, module in named_layers(model))


def _is_compiled(module: nn.Module) -> bool:
    # torch.compile(module) wraps it and keeps the module as _orig_mod; module.compile() sets the other attribute.
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _judge(layer: dict[str, Any]) -> None:
    """Add the ratio of gradient norm and noise, and whether it is an alarm."""
    gradient = layer.get("gradient")
    if gradient is None:
        return
    norm, noise = gradient["norm"], gradient["noise"]
    gradient["ratio"] = norm / noise if noise else None  # no noise: the weight gradient ran in high precision
    gradient["alarm"] = gradient["ratio"] is not None and gradient["ratio"] < THRESHOLD


def _readable(v: Tensor) -> bool:
    """Return whether v is a plain array of real numbers, and so has statistics.

    Layers in high precision may get anything that torch takes: sparse and nested tensors, complex numbers, tensors of
    which a transform such as torch.vmap shows one row only.
    """
    strided = v.layout == torch.strided and not v.is_nested and not v.is_quantized
    return strided and not v.is_complex() and not has_no_values(v) and not is_batched(v) and not torch_func_is_on()


def _local(tensor: Any) -> Any:
    """Return this rank's part of a DTensor, and any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
