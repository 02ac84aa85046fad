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
heard: their weights and weight gradients are. Nor are layers whose weight is computed (parametrizations), nor, where a
part of a model is compiled, other layers in high precision outside of nvfp4_autocast. With several ranks the first one
watches its part of the batch.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.context import state
from te_nvfp4_cv.context.context_manager import heard
from te_nvfp4_cv.errors import check_module, check_trainable, value_error, warn_once
from te_nvfp4_cv.layer import observe
from te_nvfp4_cv.nn.walk import op_of
from te_nvfp4_cv.recipe.block_scaling import as_recipe
from te_nvfp4_cv.telemetry.records import FORMAT, VERSION
from te_nvfp4_cv.telemetry.sample import THRESHOLD, Sample, layers_of, shape_of
from te_nvfp4_cv.telemetry.sinks import Sink


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
        max_elements: moments, kurtosis, histograms and what compares codes with values are of a sample of so many
            values of an operand's face; amax and the number of values that are not finite are of all of them.
        noise_bytes: how much of activations stays alive in one sampled step for gradient_noise.
    Raises:
        TypeError: no module; ValueError: a number out of range.
    """
    check_module("telemetry", model, "attach(model, ...)")
    check_trainable("telemetry", model)
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
                {"name": layer, "op": op_of(module), "shape": shape_of(module)} for layer, module in layers_of(model)
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
            grad_scale: what the loss was multiplied by (scaler.get_scale()); figures of weight gradients are divided by
                it. Those of grad_output are as it arrives, scaled.
        """
        if not self.due(step):
            yield
            return
        sample = Sample(self)
        with ExitStack() as stack:
            if sample.compiled:
                warn_once(
                    "telemetry compiled",
                    "nvfp4 telemetry: the model is compiled; operands inside of its graphs are not heard, weights and "
                    "weight gradients are",
                )
            stack.enter_context(observe.observe(sample.called))
            if state.state() is None and not sample.compiled:  # a graph would be compiled again for it
                stack.enter_context(heard())  # so that calls in high precision are heard, too
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
            and f"gradient norm is {gradient['ratio']:.2f} of the quantization noise, below {THRESHOLD:.2f}",
            f"{name} non-finite": broken and f"values that are not finite: {', '.join(broken)}",
        }
        for key, text in told.items():
            if text and key not in self.alarmed:
                yield {"kind": "alarm", "step": step, "layer": name, "text": text}
            (self.alarmed.add if text else self.alarmed.discard)(key)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record a run's own figures on the same step axis: anything that float() takes."""
        for sink in self.sinks:
            sink.scalars(step, {name: float(value) for name, value in values.items()})

    def image(self, name: str, path: Path, step: int) -> None:
        """Show a picture where a sink can."""
        for sink in self.sinks:
            sink.image(name, path, step)

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """Finish the sinks; the last call."""
        for sink in self.sinks:
            sink.close(None if summary is None else dict(summary))


# ---- helpers --------------------------------------------------------------------------------------------------------


def _rank() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0
