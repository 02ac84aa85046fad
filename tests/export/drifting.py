"""A network that 4-bit activations destroy, as they destroyed a trained embedding network. Not to be tuned.

A 1x1 convolution reads 16 channels with means of 3 to 6 and a standard deviation of 0.2. Along one direction these
channels hardly vary, and one row of the convolution looks in that direction: the batch norm after it makes the row 100
times as large as the others when it is folded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import te_nvfp4_cv as nv

SEED = 19


class Embedding(nn.Module):
    """A stem, a linear bottleneck, the 1x1 convolution that reads it, two 3x3 convolutions, a pooled embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.bottleneck = nn.Conv2d(32, 16, 1)
        self.expand = nn.Sequential(nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64, eps=1e-8), nn.ReLU6())
        self.conv1 = nn.Sequential(nn.Conv2d(64, 128, 3, 2, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU6())
        self.conv2 = nn.Sequential(nn.Conv2d(128, 128, 3, 2, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU6())
        self.head = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(self.bottleneck(self.stem(x)))
        return self.head(self.conv2(self.conv1(x)).mean((2, 3)))


def images(seed: int, count: int = 16) -> Tensor:
    """Return smooth random images, [count, 3, 32, 32]."""
    generator = torch.Generator().manual_seed(1000 * SEED + seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    return F.interpolate(coarse, scale_factor=4, mode="bilinear") + 0.3 * torch.randn(
        count, 3, 32, 32, generator=generator
    )


@torch.no_grad()
def embedding() -> Embedding:
    """Return the network in eval mode."""
    generator = torch.Generator().manual_seed(SEED)
    net = Embedding()
    for parameter in net.parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    batches = [images(seed) for seed in range(4)]
    nv.sensitivity.update_bn(net, batches)
    net.eval()

    # The bottleneck: whitened, but for one direction with a hundredth of the others' deviation; then the means.
    features = net.stem(torch.cat(batches)).movedim(1, -1).flatten(0, -2)
    features = (features - features.mean(0)).double()
    power, axes = torch.linalg.eigh(features.T @ features / len(features))
    white = axes[:, -16:] / power[-16:].sqrt()  # [32, 16]
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator).double())[0]
    narrow = turn[:, 0]
    spread = 0.2 * (torch.eye(16).double() - 0.99 * torch.outer(narrow, narrow))
    net.bottleneck.weight.copy_((white @ turn @ spread).T.float()[..., None, None])
    means = torch.linspace(3, 6, 16)[torch.randperm(16, generator=generator)]
    now = net.bottleneck(net.stem(torch.cat(batches))).mean((0, 2, 3)) - net.bottleneck.bias
    net.bottleneck.bias.copy_(means - now)
    net.expand[0].weight[7] = narrow.float()[:, None, None]
    net.train()
    nv.sensitivity.update_bn(net, batches)
    return net.eval()
