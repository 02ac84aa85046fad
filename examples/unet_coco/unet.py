"""Build a UNet for semantic segmentation, as a plain torch module that knows nothing about NVFP4.

    width of level l in 0..4 = round(scale * (64, 128, 256, 512, 1024)[l])
    down: max-pool 2, two (conv 3x3, GroupNorm, activation)
    up:   ConvTranspose2d k2 s2, concat with the skip of that level, two (conv 3x3, GroupNorm, activation)
    head: conv 1x1

Recipes may use these names in their [precision] table: `stem` (level 0; its first convolution reads the image),
`down.0` .. `down.3`, `up.0` .. `up.3`, `head` (the classifier). Image sides need not be multiples of 16: an odd level
is padded on the way up. A scale so small that a level would have no channel is refused, and so is an unknown
activation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_nvfp4_cv.errors import value_error

WIDTHS = (64, 128, 256, 512, 1024)
ACTIVATIONS = ("relu", "silu")


def group_count(channels: int) -> int:
    """Return the number of GroupNorm groups, a divisor of the channels.

    A group has four channels, and there are at most 32 groups. 16 channels per group trained far worse (docs/LOG.md).
    """
    return math.gcd(channels, min(32, max(1, channels // 4)))


class DoubleConv(nn.Sequential):
    """Apply (conv 3x3, GroupNorm, activation) twice. The convolutions have no bias, because GroupNorm has one."""

    def __init__(self, c_in: int, c_out: int, activation: str) -> None:
        layers: list[nn.Module] = []
        for c in (c_in, c_out):
            layers += [
                nn.Conv2d(c, c_out, 3, padding=1, bias=False),
                nn.GroupNorm(group_count(c_out), c_out),
                nn.ReLU(inplace=True) if activation == "relu" else nn.SiLU(),
            ]
        super().__init__(*layers)


class Down(nn.Module):
    """Halve the image, then apply DoubleConv, which sets the channels."""

    def __init__(self, c_in: int, c_out: int, activation: str) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.conv = DoubleConv(c_in, c_out, activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(x))


class Up(nn.Module):
    """Double the image with a transposed convolution, concatenate the skip, then apply DoubleConv."""

    def __init__(self, c_in: int, c_out: int, activation: str) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(c_in, c_out, 2, stride=2)
        self.conv = DoubleConv(2 * c_out, c_out, activation)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        missing_h, missing_w = skip.shape[-2] - x.shape[-2], skip.shape[-1] - x.shape[-1]
        # Max-pooling dropped the last row or column of an odd image, so the doubled image is one short.
        if missing_h or missing_w:
            x = F.pad(x, (0, missing_w, 0, missing_h))
        return self.conv(torch.cat([skip, x.to(skip.dtype)], dim=1))


class UNet(nn.Module):
    """Run a UNet of five levels.

    Args:
        num_classes: Channels of the logits, background included.
        scale: Factor on the widths 64 .. 1024.
        activation: "relu" or "silu".
        dropout: Share of bottleneck channels that are zeroed in training.
    """

    def __init__(self, num_classes: int, scale: float = 1.0, activation: str = "relu", dropout: float = 0.1) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise value_error(
                "UNet: unknown activation.",
                got=repr(activation),
                needs=" or ".join(ACTIVATIONS),
                fix="--activation relu",
            )
        widths = [round(width * scale) for width in WIDTHS]
        if widths[0] < 1 or num_classes < 2:
            raise value_error(
                "UNet: nothing to train.",
                got=f"scale={scale} (first width {widths[0]}), num_classes={num_classes}",
                needs="at least one channel in the first level and two classes",
                fix="--scale 0.25 gives the widths 16, 32, 64, 128, 256",
            )
        self.stem = DoubleConv(3, widths[0], activation)
        self.down = nn.ModuleList(Down(a, b, activation) for a, b in zip(widths, widths[1:], strict=False))
        self.dropout = nn.Dropout2d(dropout)
        rising = widths[::-1]
        self.up = nn.ModuleList(Up(a, b, activation) for a, b in zip(rising, rising[1:], strict=False))
        self.head = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits [B, num_classes, H, W] of images [B, 3, H, W]."""
        skips = [self.stem(x)]
        for down in self.down:
            skips.append(down(skips[-1]))
        # The lowest level is the start of the way up, not a skip.
        x = self.dropout(skips.pop())
        for up in self.up:
            x = up(x, skips.pop())
        return self.head(x)
