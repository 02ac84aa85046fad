"""Losses that jump, and the bundle that keeps the step at which one did.

    spike    loss > factor * median  and  loss > median + deviations * 1.4826 * MAD,  of the last `window` losses
    MAD      median of |loss - median|; 1.4826 MAD is the standard deviation of a normal distribution

Both, because a smooth curve has a tiny MAD and a noisy one a small median. Until `least` losses are known only values
that are not finite count. Finite spikes enter the window: a few do not move its median, and a loss that stays high
becomes the new normal.

A replay needs the weights before the optimizer step, so that a step is judged between backward() and
optimizer.step(): one synchronization a step, but nothing needs to be copied: the weights, the batch and the seed of the
step are all still there. It also sees gradients that are not finite a step before the loss does. On a CPU it costs
nothing; on a GPU the host no longer runs ahead, which costs the more the smaller the step. What a forward pass itself
changes, delayed tensor scales, has to be taken before it: nv.extra_state(model).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.errors import value_error

NORMAL = 1.4826


@dataclass(frozen=True)
class Spike:
    """One step that went wrong; `reason` in words."""

    step: int
    loss: float
    reason: str


class SpikeWatch:
    """Judges each loss: a spike, not finite, or neither.

    Args:
        factor: a spike exceeds this multiple of the median; > 1.
        window: losses that the median is taken of.
        deviations: and this many robust standard deviations above it.
        least: losses to know before anything finite is called a spike; at most `window`.
    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, factor: float = 2.0, window: int = 100, deviations: float = 6.0, least: int = 10) -> None:
        if not (math.isfinite(factor) and factor > 1 and deviations > 0 and 2 <= least <= window):
            raise value_error(
                "SpikeWatch: a value is out of range.",
                got=f"factor={factor}, window={window}, deviations={deviations}, least={least}",
                needs="factor > 1, deviations > 0, 2 <= least <= window",
                fix="SpikeWatch(factor=2.0, window=100)",
            )
        self.factor, self.deviations, self.least = factor, deviations, least
        self.known: deque[float] = deque(maxlen=window)

    def check(self, step: int, loss: Tensor, gradients: Iterable[Tensor | None] = ()) -> Spike | None:
        """Judge this step now: after backward(), before optimizer.step().

        Args:
            gradients: [p.grad for p in model.parameters()], to hear of values that are not finite; None are skipped.
        """
        found = [gradient.detach().isfinite().all() for gradient in gradients if gradient is not None]
        finite = torch.stack(found).all() if found else torch.tensor(True, device=loss.device)
        value, sound = torch.stack([loss.detach().float().reshape(()), finite.float()]).tolist()
        spike = self._judge(step, value)
        if spike is None and not sound:
            return Spike(step, value, f"a gradient is not finite (loss {value:.6g})")
        return spike

    def _judge(self, step: int, loss: float) -> Spike | None:
        if not math.isfinite(loss):
            return Spike(step, loss, f"loss {loss}")
        reason = self._excess(loss) if len(self.known) >= self.least else ""
        self.known.append(loss)
        return Spike(step, loss, reason) if reason else None

    def _excess(self, loss: float) -> str:
        median = statistics.median(self.known)
        spread = NORMAL * statistics.median(abs(value - median) for value in self.known)
        if loss > self.factor * median and loss > median + self.deviations * spread:
            return f"loss {loss:.6g}, median of the last {len(self.known)} losses {median:.6g}"
        return ""


def write_bundle(
    path: Path,
    *,
    state: Mapping[str, Any],
    batch: tuple[Tensor, Any],
    seed: int,
    recipe_text: str,
    autocast: torch.dtype | None,
    arguments: Mapping[str, Any],
    spike: Spike,
    nvfp4_state: Mapping[str, Any] | None = None,
) -> None:
    """Keep a step for `te-nvfp4-cv diagnose PATH`; call it before optimizer.step().

    Args:
        state: the whole model's state_dict, as it was before the step.
        batch: (images, targets) as the model got them.
        seed: what torch.manual_seed was given before the forward pass.
        recipe_text: Precision.recipe_text; autocast: Precision.dtype.
        arguments: those of rebuild.build.
        nvfp4_state: nv.extra_state(model) from before the forward pass; needed for delayed tensor scales.
    Raises:
        RuntimeError: the file cannot be written; nothing has changed on disk then.
    """
    from te_nvfp4_cv import sensitivity

    sensitivity.save_bundle(
        path,
        model_state=state,
        batch=batch,
        seeds={"torch": seed},
        recipe_text=recipe_text,
        builder={"name": "unet_coco.rebuild:build", "arguments": dict(arguments)},
        step=spike.step,
        reason=spike.reason,
        autocast=None if autocast is None else str(autocast).removeprefix("torch."),
        nvfp4_state=nvfp4_state,
        loss=spike.loss,
    )
