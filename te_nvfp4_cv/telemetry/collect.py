"""Watch the training of a model, every N steps, without changing it.

    watch = nv.telemetry.attach(model, every=100, sinks=[nv.telemetry.JSONL("runs/telemetry.jsonl")], name="nvfp4")
    for step, (x, y) in enumerate(loader):
        with watch.step(step):                      # forward and backward; before optimizer.step()
            with nv.nvfp4_autocast(recipe):
                loss = criterion(model(x), y)
            loss.backward()
        optimizer.step()
        watch.scalars(step, {"train/loss": loss.item()})
    watch.close()

In a sampled step every layer's operands are looked at where they are quantized: x and w in forward, dy in backward,
with the codes that the GEMMs multiply. Layers in high precision, and whole runs without nvfp4_autocast, give their raw
operands. Other steps cost nothing: nothing is registered in them. Results are the same bits with and without.

The gradient noise of a layer is |dw - dw_hp|, dw_hp the weight gradient that high precision gives for the same x and
dy; an alarm is raised where |dw_hp| < sqrt(3) |dw - dw_hp|, the threshold below which training stalls in arXiv
2505.19115. For it the raw x stays alive until the layer's backward: layers take turns from sample to sample so that
`noise_bytes` suffice.

Of a layer that runs several times in a step the first call counts. Layers inside of a graph of torch.compile are not
heard: their weights and weight gradients are. With several ranks the first one watches its part of the batch.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv import calls, context
from te_nvfp4_cv import plan as steps
from te_nvfp4_cv.autocast import nvfp4_autocast
from te_nvfp4_cv.checks import describe, type_error, value_error, warn_once
from te_nvfp4_cv.modules import NVFP4_CLASSES
from te_nvfp4_cv.plan import Plan
from te_nvfp4_cv.policy import plain_name
from te_nvfp4_cv.recipe import as_recipe
from te_nvfp4_cv.telemetry import blocks as operand_blocks
from te_nvfp4_cv.telemetry import statistics
from te_nvfp4_cv.telemetry.records import FORMAT, VERSION
from te_nvfp4_cv.telemetry.sinks import Sink

LAYERS = tuple(NVFP4_CLASSES)
THRESHOLD = 3**0.5


def attach(
    model: nn.Module,
    *,
    every: int = 100,
    sinks: Sequence[Sink] = (),
    name: str = "run",
    group: str = "",
    recipe: Any = None,
    gradient_noise: bool = True,
    max_elements: int = 1 << 16,
    noise_bytes: int = 1 << 28,
) -> Telemetry:
    """Start to watch a model; see the top of this file.

    Args:
        every: steps between samples; step 0 is one. 0: no samples, only `scalars`.
        sinks: where records go (JSONL, WandB, TensorBoard, or anything with their methods).
        name: of this run, one per precision; group: of the runs that are compared.
        recipe: written into the header, for people.
        gradient_noise: compare weight gradients with those of high precision, one convolution more per layer in a
            sampled step.
        max_elements: how many elements of an operand's face are looked at.
        noise_bytes: how much of activations stays alive in one sampled step for gradient_noise.
    Raises:
        TypeError: no module; ValueError: a number out of range.
    """
    if not isinstance(model, nn.Module):
        raise type_error(
            "telemetry: not a module.", got=describe(model), needs="a torch.nn.Module", fix="attach(model, ...)"
        )
    for argument, value, least in (
        ("every", every, 0),
        ("max_elements", max_elements, 16),
        ("noise_bytes", noise_bytes, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise value_error(
                f"telemetry: bad {argument}.",
                got=repr(value),
                needs=f"an integer >= {least}",
                fix=f"correct {argument}",
            )
    text = "" if recipe is None else as_recipe(recipe).to_toml()
    return Telemetry(model, every, tuple(sinks), name, group, text, gradient_noise, max_elements, noise_bytes)


class Telemetry:
    """What attach returns."""

    def __init__(
        self,
        model: nn.Module,
        every: int,
        sinks: tuple[Sink, ...],
        name: str,
        group: str,
        recipe: str,
        gradient_noise: bool,
        max_elements: int,
        noise_bytes: int,
    ) -> None:
        self.model, self.every, self.sinks = model, every, sinks if _rank() == 0 else ()
        self.max_elements, self.gradient_noise, self.noise_bytes = max_elements, gradient_noise, noise_bytes
        self.codes: dict[str, list[Tensor]] = {}  # by layer: packed weights of the last two samples, the newest first
        self.noise_from = 0  # number of the layer whose turn for gradient noise comes next
        self.alarmed: set[str] = set()
        self.compiled = any(_is_compiled(module) for module in model.modules())
        header = {
            "kind": "run",
            "format": FORMAT,
            "version": VERSION,
            "name": name,
            "group": group,
            "model": type(getattr(model, "module", getattr(model, "_orig_mod", model))).__name__,
            "recipe": recipe,
            "every": every,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "layers": [
                {"name": layer, "op": _op(module), "shape": list(module.weight.shape)}  # type: ignore[union-attr,arg-type]
                for layer, module in layers_of(model)
            ],
        }
        for sink in self.sinks:
            sink.start(header)

    def due(self, step: int) -> bool:
        """Whether that step is a sample, on this rank."""
        return bool(self.sinks) and self.every > 0 and step % self.every == 0

    @contextmanager
    def step(self, step: int, grad_scale: float | Tensor = 1.0) -> Iterator[None]:
        """Watch the forward and backward passes inside, where the step is a sample.

        Args:
            grad_scale: what the loss was multiplied by (scaler.get_scale()); weight gradients are divided by it.
        """
        if not self.due(step):
            yield
            return
        sample = _Sample(self)
        with ExitStack() as stack:
            if self.compiled:
                warn_once(
                    "telemetry compiled",
                    "nvfp4 telemetry: the model is compiled; operands inside of its graphs are not heard, weights and "
                    "weight gradients are",
                )
            else:
                stack.enter_context(calls.observe(sample.called))
                if context.state() is None:  # so that calls in high precision are heard, too
                    stack.enter_context(nvfp4_autocast(enabled=False))
            yield
        self._write(step, sample.record(grad_scale))

    def _write(self, step: int, layers: dict[str, Any]) -> None:
        alarms = [alarm for name, layer in layers.items() for alarm in self._alarms(step, name, layer)]
        for sink in self.sinks:
            sink.step({"kind": "step", "step": step, "layers": layers})
            for alarm in alarms:
                sink.alarm(alarm)

    def _alarms(self, step: int, name: str, layer: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """An alarm where a condition starts; it can come again after it ended."""
        gradient = layer.get("gradient", {})
        noisy = gradient.get("alarm", False)
        broken = [tensor for tensor, held in layer["tensors"].items() if held.get("raw", {}).get("nonfinite", 0)]
        told = {
            f"{name} noise": noisy
            and f"gradient norm is {gradient['ratio']:.2f} of the quantization noise, below 1.73",
            f"{name} non-finite": broken and f"values that are not finite: {', '.join(broken)}",
        }
        for key, text in told.items():
            if text and key not in self.alarmed:
                yield {"kind": "alarm", "step": step, "layer": name, "text": text}
            (self.alarmed.add if text else self.alarmed.discard)(key)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record a run's own figures on the same step axis."""
        for sink in self.sinks:
            sink.scalars(step, dict(values))

    def image(self, name: str, path: Path, step: int) -> None:
        """Show a picture where a sink can."""
        for sink in self.sinks:
            sink.image(name, path, step)

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """Finish the sinks; the last call."""
        for sink in self.sinks:
            sink.close(None if summary is None else dict(summary))


class _Sample:
    """One sampled step."""

    def __init__(self, telemetry: Telemetry) -> None:
        self.telemetry = telemetry
        self.layers = list(layers_of(telemetry.model))
        self.names = {id(module.weight): name for name, module in self.layers}
        self.found: dict[str, _Layer] = {}
        self.bytes_left = telemetry.noise_bytes
        self.turn = 0  # how many layers have asked to keep x
        self.refused: list[int] = []  # the numbers of those for which no memory was left

    def called(self, call: calls.Call) -> calls.Seen | None:
        """A layer is called."""
        name = self._name(call.weight)
        if name is None:
            return None
        recomputed = torch._C._current_graph_task_id() != -1  # activation checkpointing, inside of backward
        layer = self.found.get(name)
        if layer is None:
            layer = self.found[name] = _Layer(self, name, call)
        elif not recomputed:
            return None  # a layer that is called again
        if call.recipe is not None:
            return calls.Seen(watch=_Watch(layer))
        if "input" not in layer.tensors and isinstance(call.x, Tensor):
            layer.tensors["input"] = {"raw": self.plain(call.x)}
        return calls.Seen(finished=layer.finished)

    def plain(self, v: Tensor) -> dict[str, Any]:
        """Statistics of a tensor in high precision."""
        v = v.detach()
        v = v.movedim(1, -1) if v.dim() > 2 else v  # channels innermost, as a channels_last tensor lies
        flat = v.reshape(-1)
        return statistics.stats(flat[:: _stride(len(flat), self.telemetry.max_elements)])

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
            out[name] = seen.entry() if seen is not None else _unseen(_op(module), telemetry.compiled)
            self._weight(out[name], module.weight, grad_scale)
        for name, seen in self.found.items():  # weights that are no `weight` of a layer: attention's, functional ones
            out[name] = seen.entry()
            self._weight(out[name], seen.weight, grad_scale)
        telemetry.noise_from = self.refused[0] if self.refused and self.refused[0] > telemetry.noise_from else 0
        layers: dict[str, Any] = statistics.fetch(out)
        for layer in layers.values():
            _judge(layer)
        return layers

    def _weight(self, entry: dict[str, Any], weight: Any, grad_scale: float | Tensor) -> None:
        weight, grad = _local(weight), _local(getattr(weight, "grad", None))
        if "weight" not in entry["tensors"] and isinstance(weight, Tensor):
            entry["tensors"]["weight"] = {"raw": self.plain(weight)}
        if grad is not None and not grad.is_sparse:
            entry["tensors"]["weight_gradient"] = {"raw": self.plain(grad / grad_scale)}


class _Layer:
    """What one layer's call shows, forward and backward."""

    def __init__(self, sample: _Sample, name: str, call: calls.Call) -> None:
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

    def __init__(self, layer: _Layer) -> None:
        self.layer = layer
        self.first = "input" not in layer.tensors  # else a recomputed forward, whose backward is the layer's

    @torch.no_grad()
    def quantized(self, role: str, operand: Tensor, faces: tuple[Tensor, ...], seed: Tensor | None, plan: Plan) -> None:
        layer, most = self.layer, self.layer.sample.telemetry.max_elements
        if role == "weight":
            if self.first:
                self._weight(operand, faces, plan)
            return
        if role == "input":
            if "wgrad" in plan.gemms and layer.sample.may_keep(operand):
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
            if gemm in found:
                layer.tensors[name] = statistics.operand(found[gemm])
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
        exact = steps.high_precision_wgrad(dy, kept[0], plan).double()
        noise = (dw.double() - exact).norm()
        self.layer.more["gradient"] = {"norm": exact.norm(), "noise": noise}


# ---- helpers --------------------------------------------------------------------------------------------------------


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Convolutions and linear layers by plain name, in the model's order; a shared one once."""
    for name, module in model.named_modules():
        if isinstance(module, LAYERS) and isinstance(module.weight, Tensor):
            yield plain_name(name) or type(module).__name__, module


def _op(module: nn.Module) -> str:
    return next(ours.op for plain, ours in NVFP4_CLASSES.items() if isinstance(module, plain))


def _unseen(op: str, compiled: bool) -> dict[str, Any]:
    reason = "inside of a compiled graph" if compiled else "not called in this step"
    return {"op": op, "precision": "high", "reason": reason, "tensors": {}}


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


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _rank() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0
