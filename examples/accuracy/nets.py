"""Build classifiers for 32x32 images in plain torch: ResNets and a network in the style of MobileNetV2.

    resnet(width, blocks, stages)    stem 3x3; stages of basic blocks, widths (1, 2, 4, ..) * width, halving the image
    mobilenet(width)                 stem 3x3; inverted residuals (expand 1x1, depthwise 3x3, project 1x1), expansion 6

Recipes may use these module names: `stem`, `stages.N.M`, `fc`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Add a shortcut to the result of two 3x3 convolutions."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride > 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """Expand the channels, filter each of them, project back; add a shortcut if the shapes allow it."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = c_in * expansion
        self.body = nn.Sequential(
            nn.Conv2d(c_in, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(inplace=True),
            nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(inplace=True),
            nn.Conv2d(inner, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class Classifier(nn.Module):
    """Classify images with a stem, the given stages, a mean over the image and one linear layer."""

    def __init__(self, width: int, stages: list[nn.Module], features: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits [B, classes] of images [B, 3, 32, 32]."""
        return self.fc(self.stages(self.stem(x)).mean((2, 3)))


def resnet(width: int = 64, blocks: int = 2, stages: int = 4, classes: int = 10) -> Classifier:
    """Build a ResNet for 32x32 images: ResNet-18 with the defaults, the ResNet-20 of CIFAR-10 with (16, 3, 3)."""
    levels: list[nn.Module] = []
    c_in = width
    for level in range(stages):
        c_out, first = width << level, 1 if level == 0 else 2
        levels.append(nn.Sequential(*(BasicBlock(c_in if b == 0 else c_out, c_out, first if b == 0 else 1)
                                      for b in range(blocks))))  # fmt: skip
        c_in = c_out
    return Classifier(width, levels, c_in, classes)


def mobilenet(width: int = 32, classes: int = 10) -> Classifier:
    """Build seven inverted residuals. Their depthwise convolutions stay in high precision with every recipe."""
    stages: list[nn.Module] = []
    c_in = width
    for factor, stride in ((1, 1), (2, 2), (2, 1), (3, 2), (3, 1), (4, 2), (4, 1)):
        stages.append(InvertedResidual(c_in, width * factor, stride, 6))
        c_in = width * factor
    return Classifier(width, stages, c_in, classes)
