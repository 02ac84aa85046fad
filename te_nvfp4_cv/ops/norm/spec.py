"""The record of a norm + activation, as it crosses the operator boundary, and the shapes that all backends share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# A name's place is its number in the operators' lists of floats. Each is a function of the norm's result without
# parameters, and all but ReLU recompute that result from z in backward. "leaky_relu:0.2" gives another slope than 0.01.
ACTIVATIONS = ("relu", "silu", "hardswish", "relu6", "gelu", "gelu_tanh", "leaky_relu")
BACKENDS = ("reference", "triton")
Pair = tuple[Tensor | None, Tensor | None]  # weight and bias, or the running mean and variance


@dataclass(frozen=True)
class NormSpec:
    """The settings of one norm + activation.

    Args:
        groups: 0 is batch normalization, one mean a channel, over batch and image; otherwise group normalization, one
            mean an image and group.
        activation: One of ACTIVATIONS, leaky_relu's slope included.
        batch_stats: normalize with the statistics of z, and update the running ones; else use the running ones.
        need_mask: backward will come, so forward writes ReLU's mask.
        need_dresidual: backward returns the residual's gradient too.
        backend: "reference" or "triton".
    """

    groups: int = 0
    activation: str = "relu"
    batch_stats: bool = True
    momentum: float = 0.0
    eps: float = 0.0
    need_mask: bool = False
    need_dresidual: bool = False
    backend: str = "reference"

    def encode(self) -> list[float]:
        """Return the fields in their order as floats, for the operator boundary. Doubles hold all of them exactly."""
        name, slope = split(self.activation)
        flags = self.batch_stats, self.momentum, self.eps, self.need_mask, self.need_dresidual
        fields = self.groups, ACTIVATIONS.index(name), *flags, BACKENDS.index(self.backend), slope
        return [float(field) for field in fields]

    @classmethod
    def decode(cls, numbers: Sequence[float]) -> NormSpec:
        """Rebuild a spec from encode."""
        groups, activation, batch_stats, momentum, eps, need_mask, need_dresidual, backend, slope = numbers
        settings = bool(batch_stats), momentum, eps, bool(need_mask), bool(need_dresidual)
        name = ACTIVATIONS[int(activation)]
        return cls(int(groups), f"{name}:{slope}" if name == "leaky_relu" else name, *settings, BACKENDS[int(backend)])

    def statistics_shape(self, z: Tensor) -> tuple[int, ...]:
        """Return the shape of mean and rstd for z [B, C, *image]: [C], or [B, groups]."""
        return (z.shape[0], self.groups) if self.groups else (z.shape[1],)

    def mask_bytes(self, z: Tensor) -> int:
        """Return the size of ReLU's mask, one bit an element of z; 0 where no mask is written."""
        return (z.numel() + 7) // 8 if self.activation == "relu" and self.need_mask else 0


def split(activation: str) -> tuple[str, float]:
    """Return an activation's name, and the slope of "leaky_relu:0.2", which is 0.01 if none is given; others have 0.

    Raises:
        ValueError: There is no such activation.
    """
    name, _, slope = activation.partition(":")
    if name not in ACTIVATIONS or (slope and name != "leaky_relu"):
        raise ValueError(activation)
    return name, float(slope or 0.01) if name == "leaky_relu" else 0.0


def norm_of(mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> list[Tensor]:
    """Return what a norm subtracts and multiplies with: two tensors or, where there is an affine part, four."""
    return [mean, rstd] if weight is None or bias is None else [mean, rstd, weight, bias]


def affine_of(norm: Sequence[Tensor]) -> Pair:
    """Return weight and bias from [mean, rstd, weight, bias], None twice from [mean, rstd]."""
    return (norm[2], norm[3]) if len(norm) == 4 else (None, None)
