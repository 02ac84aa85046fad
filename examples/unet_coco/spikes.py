"""Detect losses that jump, and save the step at which that happened as a bundle.

    spike    loss > factor * median  and  loss > median + deviations * 1.4826 * MAD,  of the last `window` losses
    MAD      median of |loss - median|; 1.4826 MAD is the standard deviation of a normal distribution

Both conditions are needed, because a smooth curve has a tiny MAD and a noisy curve a small median. Until `least` losses
are known, only values that are not finite count. Finite spikes enter the window: a few of them do not move its median,
and a loss that stays high becomes the new normal.

A replay needs the weights before the optimizer step, so a step is judged between backward() and optimizer.step(). This
costs one synchronization per step, but no copies, because the weights, the batch and the seed of the step are all still
there. Gradients that are not finite are also noticed one step before the loss shows them. On a CPU this costs nothing.
On a GPU the host can no longer run ahead, which matters more the smaller the step is. The forward pass itself changes
the delayed tensor scales, so nv.extra_state(model) must be called before it.
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
    """Describe one step that went wrong, with the reason in words."""

    step: int
    loss: float
    reason: str


class SpikeWatch:
    """Judge each loss: a spike, not finite, or normal.

    Args:
        factor: A spike exceeds this multiple of the median; > 1.
        window: Number of losses for the median.
        deviations: A spike also exceeds the median by this many robust standard deviations.
        least: Number of losses to know before a finite loss can be a spike; at most `window`.
    Raises:
        ValueError: If a value is out of range.
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
        """Judge this step. Call it after backward() and before optimizer.step().

        Args:
            gradients: [p.grad for p in model.parameters()], to find values that are not finite; None is skipped.
        """
        found = [gradient.detach().isfinite().all() for gradient in gradients if gradient is not None]
        finite = torch.stack(found).all() if found else torch.tensor(True, device=loss.device)
        # One transfer to the host for both values: this is the one synchronization per step.
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
    """Save a step for `te-nvfp4-cv diagnose PATH`. Call it before optimizer.step().

    Args:
        state: The whole model's state_dict before the step.
        batch: (images, targets) as the model received them.
        seed: The argument of torch.manual_seed before the forward pass.
        recipe_text: Precision.recipe_text.
        autocast: Precision.dtype.
        arguments: The arguments of rebuild.build.
        nvfp4_state: nv.extra_state(model) from before the forward pass; needed for delayed tensor scales.
    Raises:
        RuntimeError: If the file cannot be written. Nothing has changed on disk then.
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
