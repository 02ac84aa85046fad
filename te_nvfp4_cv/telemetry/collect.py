"""Watch the training of a model in every N-th step, without changing it.

    sink = nv.telemetry.JSONL("runs/telemetry.jsonl")
    with nv.telemetry.attach(model, every=100, sinks=[sink], name="nvfp4") as watch:   # or watch.close() at the end
        for step, (x, y) in enumerate(loader):
            with watch.step(step):                      # forward and backward; before optimizer.step()
                with nv.nvfp4_autocast(recipe):
                    loss = criterion(model(x), y)
                loss.backward()
            optimizer.step()
            watch.scalars(step, {"train/loss": loss.item()})

In a sampled step every layer's operands are looked at while they are quantized: x and w in forward, dy in backward,
with the codes that the GEMMs multiply. Layers in high precision, and whole runs without nvfp4_autocast, show their raw
operands. Other steps cost nothing, because nothing is registered in them. Results are the same bits with and without.

The gradient noise of a layer is |dw - dw_hp|, where dw_hp is the weight gradient that high precision gives for the same
x and dy. An alarm is raised where |dw_hp| < sqrt(3) |dw - dw_hp|, the threshold below which training stalls in arXiv
2505.19115. To compute dw_hp, the raw x stays alive until the layer's backward; layers take turns from sample to sample
so that `noise_bytes` of memory are enough.

What is not seen:
- If a layer runs several times in a step, only its first call is recorded.
- Of sparse and nested tensors, of complex numbers, and inside of torch.func's transforms nothing is recorded.
- Inside a graph of torch.compile only weights and weight gradients are recorded. Where part of a model is compiled,
  other layers in high precision outside of nvfp4_autocast are not seen either.
- Of a weight that is computed (parametrizations), the gradient is not recorded: torch does not keep it.
- With several ranks only the first one watches, and it sees its part of the batch.
"""

from __future__ import annotations

import datetime
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.context import state
from te_nvfp4_cv.context.context_manager import heard
from te_nvfp4_cv.errors import check_module, check_trainable, warn_once
from te_nvfp4_cv.layer import observe
from te_nvfp4_cv.nn.walk import op_of, own_weight
from te_nvfp4_cv.recipe.block_scaling import as_recipe
from te_nvfp4_cv.telemetry.records import FORMAT, VERSION
from te_nvfp4_cv.telemetry.sample import Memory, Sample, layers_of
from te_nvfp4_cv.telemetry.settings import THRESHOLD, Settings
from te_nvfp4_cv.telemetry.sinks import Sink


def attach(
    model: nn.Module,
    *,
    every: int = 100,
    sinks: Sequence[Sink] = (),
    name: str = "run",
    group: str = "",
    recipe: Any = None,
    backend: str = "",
    gradient_noise: bool = True,
    max_elements: int = 1 << 16,
    noise_bytes: int = 1 << 28,
    last: int | None = None,
) -> Telemetry:
    """Start to watch the training of a model; nothing of the model changes.

    What it returns is a context manager, too, which closes the sinks at its end, after an exception as well.

    Args:
        model: the model, as it is trained (a DDP, FSDP or compiled wrapper is fine).
        every: how many steps from sample to sample, beginning with step 0; 0 takes no samples, and records only what
            `scalars` is given.
        sinks: where records go: JSONL, WandB, TensorBoard, or anything with their methods.
        name: the name of this run; give each precision a run of its own.
        group: the name of the group of runs that are compared.
        recipe: written into the header, for people to read; it does not choose the precision.
        backend: written into the header likewise: where NVFP4 layers run.
        gradient_noise: compare weight gradients with those of high precision; this costs one more convolution per
            layer in a sampled step.
        max_elements: how many values of an operand the statistics are computed from; the largest magnitude and the
            number of values that are not finite always come from all of them.
        noise_bytes: how many bytes of activations may stay alive in one sampled step for gradient_noise.
        last: the number of the last step, which is sampled too, so that records end where training does.
    Raises:
        TypeError: `model` is not a module.
        ValueError: a number is out of range, or a sink cannot start.

    Example:
        >>> import tempfile, torch, te_nvfp4_cv as nv
        >>> model, path = torch.nn.Linear(32, 16), tempfile.mkdtemp() + "/telemetry.jsonl"
        >>> with nv.telemetry.attach(model, every=10, sinks=[nv.telemetry.JSONL(path)], name="nvfp4") as watch:
        ...     with watch.step(0), nv.nvfp4_autocast():
        ...         model(torch.randn(16, 32)).sum().backward()
        >>> nv.telemetry.read(path).steps[0]["Linear"]["precision"]
        'nvfp4'
    """
    check_module("telemetry", model, "attach(model, ...)")
    check_trainable("telemetry", model)
    text = "" if recipe is None else as_recipe(recipe).to_toml()
    settings = Settings(every, name, group, text, backend, gradient_noise, max_elements, noise_bytes, last)
    return Telemetry(model, tuple(sinks), settings)


class Telemetry:
    """A running watch, made by attach: wrap each step in `step`, and call `close` at the end, or use it in a `with`.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> watch = nv.telemetry.attach(torch.nn.Linear(32, 16), every=100, sinks=[])
        >>> watch.due(100)  # without a sink no step is sampled
        False
    """

    def __init__(self, model: nn.Module, sinks: tuple[Sink, ...], settings: Settings) -> None:
        # Ranks train the same weights, and a file has one writer: only the first rank records.
        self.model, self.settings, self.sinks = model, settings, sinks if _rank() == 0 else ()
        self.memory = Memory()
        self._not_entered: set[object] = set()  # calls of `step` without `with`
        self.alarmed: set[str] = set()  # the conditions that hold now, and so need no second alarm
        header = {
            "kind": "run",
            "format": FORMAT,
            "version": VERSION,
            "name": settings.name,
            "group": settings.group,
            # The user's class, not that of a wrapper: runs are compared by it.
            "model": type(getattr(model, "module", getattr(model, "_orig_mod", model))).__name__,
            "recipe": settings.recipe,
            "backend": settings.backend,
            "every": settings.every,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "layers": [{"name": name, "op": op_of(layer), "shape": _shape(layer)} for name, layer in layers_of(model)],
        }
        for sink in self.sinks:
            sink.start(header)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def every(self) -> int:
        """Return how many steps lie from sample to sample; 0 takes none."""
        return self.settings.every

    @property
    def gradient_noise(self) -> bool:
        """Return whether weight gradients are compared with those of high precision."""
        return self.settings.gradient_noise

    @property
    def max_elements(self) -> int:
        """Return how many values of an operand the statistics are computed from."""
        return self.settings.max_elements

    @property
    def noise_bytes(self) -> int:
        """Return how many bytes of activations may stay alive in one sampled step."""
        return self.settings.noise_bytes

    def due(self, step: int) -> bool:
        """Return whether that step is sampled on this rank."""
        return bool(self.sinks) and self.every > 0 and (step % self.every == 0 or step == self.settings.last)

    def step(self, step: int, grad_scale: float | Tensor = 1.0) -> AbstractContextManager[None]:
        """Watch the forward and backward passes inside, if this step is sampled.

        Args:
            step: the number of the training step.
            grad_scale: what the loss was multiplied by, scaler.get_scale() with a GradScaler. Figures of weight
                gradients are divided by it; those of grad_output are recorded as they arrive, scaled.
        """
        call = object()
        self._not_entered.add(call)
        # operator.index: of NumPy and torch an integer is none that JSON can hold.
        return self._step(operator.index(step), grad_scale, call)

    @contextmanager
    def _step(self, step: int, grad_scale: float | Tensor, call: object) -> Iterator[None]:
        self._not_entered.discard(call)  # of a decorator, the body begins at each call of the function
        if not self.due(step):
            yield
            return
        sample = Sample(self.model, self.settings, self.memory)
        with ExitStack() as stack:
            if sample.compiled:
                warn_once(
                    "telemetry compiled",
                    "nvfp4 telemetry: the model is compiled; operands inside its graphs are not recorded, weights and "
                    "weight gradients are",
                )
            stack.enter_context(observe.observe(sample.called))
            # Outside of nvfp4_autocast nobody would tell of calls. A compiled model is spared: the context would make
            # torch.compile compile its graphs again.
            if state.state() is None and not sample.compiled:
                stack.enter_context(heard())
            yield
        # Outside of the contexts, so that nothing of the statistics is itself observed.
        self._write(step, sample.record(grad_scale))

    def _write(self, step: int, layers: dict[str, Any]) -> None:
        alarms = [alarm for name, layer in layers.items() for alarm in self._alarms(step, name, layer)]
        for sink in self.sinks:
            sink.step({"kind": "step", "step": step, "layers": layers})
            for alarm in alarms:
                sink.alarm(alarm)

    def _alarms(self, step: int, name: str, layer: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Return an alarm for each condition that starts in this step; it can come again after it has ended."""
        gradient = layer.get("gradient", {})
        noisy = gradient.get("alarm", False)
        broken = [tensor for tensor, held in layer["tensors"].items() if held.get("raw", {}).get("nonfinite", 0)]
        # Said when a condition starts, not at every sample: a layer may stay below the threshold for a whole run.
        conditions = {f"{name} non-finite": broken and f"values that are not finite: {', '.join(broken)}"}
        if gradient:  # a sample in which other layers had their turn says nothing of this one's noise
            conditions[f"{name} noise"] = (
                noisy and f"gradient norm is {gradient['ratio']:.2f} of the quantization noise, below {THRESHOLD:.2f}"
            )
        for key, text in conditions.items():
            if text and key not in self.alarmed:
                yield {"kind": "alarm", "step": step, "layer": name, "text": text}
            (self.alarmed.add if text else self.alarmed.discard)(key)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record figures of the run itself, such as its loss, on the same step axis: anything that float() takes."""
        for sink in self.sinks:
            sink.scalars(operator.index(step), {name: float(value) for name, value in values.items()})

    def image(self, name: str, path: Path, step: int) -> None:
        """Show a picture in each sink that can."""
        for sink in self.sinks:
            sink.image(name, path, operator.index(step))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Show a table in each sink that can; its cells are numbers, texts, or pictures [H, W, 3] uint8."""
        for sink in self.sinks:
            sink.table(name, columns, rows, operator.index(step))

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """Finish the sinks, once. Nothing is recorded afterwards."""
        if self._not_entered:
            warn_once(
                "telemetry step",
                f"nvfp4 telemetry: step() was called {len(self._not_entered)} times without `with`, and recorded "
                "nothing. Write `with watch.step(step):` around the forward and backward pass",
            )
        sinks, self.sinks = self.sinks, ()
        for sink in sinks:
            sink.close(None if summary is None else dict(summary))


# ---- helpers --------------------------------------------------------------------------------------------------------


def _shape(layer: nn.Module) -> list[int]:
    weight = own_weight(layer)
    return [] if weight is None else list(weight.shape)


def _rank() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0
