"""Train a small vision transformer with experts (V-MoE) on CIFAR-10, in high precision and in NVFP4 from the same seed.

    python examples/vision_moe.py --data FOLDER                 the binary version of CIFAR-10, unpacked
    python examples/vision_moe.py --steps 20                    drawn images, to see it run
    python examples/vision_moe.py --data FOLDER --epochs 10 --width 256 --experts 8

An image becomes 64 tokens of 4x4 pixels. In every second block the MLP is a mixture of experts: a router sends each
token to one expert, tokens are sorted by expert, and torch.nn.functional.grouped_mm multiplies each expert's rows by
its weights. The model knows nothing about NVFP4: under nv.nvfp4_autocast the grouped products run in NVFP4, forward and
backward, as do the attention's projections. The router and the first and last layer have fewer than 16 channels on one
side and stay in high precision. Source of the model: arXiv 2106.05974, with one expert a token (arXiv 2101.03961).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # te_nvfp4_cv of this checkout, where it is not installed

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import te_nvfp4_cv as nv  # noqa: E402

CLASSES, PATCH = 10, 4
BALANCE = 0.01  # weight of the loss that keeps the router from sending all tokens to one expert


class Experts(nn.Module):
    """An MLP for each expert, and the router that chooses one of them for each token."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, 4 * width) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, 4 * width, width) / (4 * width) ** 0.5)
        self.balance = torch.zeros(())
        self.load = torch.zeros(experts)  # tokens of each expert in the last call

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        if torch.is_autocast_enabled(x.device.type):  # which does not know grouped_mm
            tokens = tokens.to(torch.get_autocast_dtype(x.device.type))
        share = self.router(tokens).float().softmax(-1)
        best, expert = share.max(-1)
        order = expert.argsort(stable=True)
        self.load = torch.bincount(expert, minlength=share.shape[1])
        # A token goes to its expert and comes back to its place, weighted by the router's share, its way to learn.
        offsets = self.load.cumsum(0).to(torch.int32)
        hidden = F.gelu(F.grouped_mm(tokens[order], self.up.to(tokens.dtype), offs=offsets))
        y = F.grouped_mm(hidden, self.down.to(tokens.dtype), offs=offsets)
        y = torch.zeros_like(y).index_copy(0, order, y) * best.unsqueeze(-1).to(y.dtype)
        self.balance = share.shape[1] * (self.load / len(tokens) * share.mean(0)).sum()
        return y.view_as(x)


class Block(nn.Module):
    """Attention and an MLP, or experts in its place."""

    def __init__(self, width: int, heads: int, experts: int) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        plain = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.mlp = Experts(width, experts) if experts else plain

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.after(x))


class VisionMoE(nn.Module):
    """The network: patches, blocks, the mean of all tokens, a linear layer."""

    def __init__(self, width: int, depth: int, experts: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, PATCH, PATCH)
        self.place = nn.Parameter(0.02 * torch.randn(1, (32 // PATCH) ** 2, width))
        blocks = [Block(width, width // 32, experts if i % 2 else 0) for i in range(depth)]
        self.blocks, self.norm, self.head = nn.Sequential(*blocks), nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.place
        y: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return y

    def experts(self) -> list[Experts]:
        """Return the mixtures of experts."""
        return [module for module in self.modules() if isinstance(module, Experts)]


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images [N, 3, 32, 32] and labels [N]: a smooth pattern for each class, under noise."""
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    images = F.interpolate(patterns, size=32, mode="bilinear")[labels]
    return images + 1.5 * torch.randn(images.shape, generator=generator), labels


def read(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return CIFAR-10's training and test images, normalized, with their labels."""
    sys.path.insert(0, str(Path(__file__).resolve().parent / "accuracy"))
    from cifar import MEAN, STD, load_cifar

    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    train, test = (((split.images / 255 - mean) / deviation, split.labels) for split in load_cifar(folder))
    return train, test


def train(options: argparse.Namespace, enabled: bool, data: tuple[tuple[Tensor, Tensor], ...]) -> list[float]:
    """Train one network; return its loss at each step and, last, its accuracy on the test images."""
    torch.manual_seed(options.seed)
    (images, labels), (test_images, test_labels) = data
    model = VisionMoE(options.width, options.depth, options.experts).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.05)
    order = torch.Generator().manual_seed(options.seed)
    bf16 = options.device == "cuda"
    history: list[float] = []
    steps = options.steps or options.epochs * (len(images) // options.batch)
    for _ in range(steps):
        picked = torch.randint(len(images), (options.batch,), generator=order)
        batch, target = images[picked].to(options.device), labels[picked].to(options.device)
        with torch.autocast(options.device, torch.bfloat16, enabled=bf16):
            with nv.nvfp4_autocast(options.recipe, enabled=enabled):
                logits = model(batch)
        loss = F.cross_entropy(logits.float(), target)
        (loss + BALANCE * sum(moe.balance for moe in model.experts())).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    model.eval()
    right = 0
    with (
        torch.no_grad(),
        torch.autocast(options.device, torch.bfloat16, enabled=bf16),
        nv.nvfp4_autocast(options.recipe, enabled=enabled),
    ):
        for start in range(0, len(test_images), options.batch):
            logits = model(test_images[start : start + options.batch].to(options.device))
            right += int((logits.argmax(1).cpu() == test_labels[start : start + options.batch]).sum())
    if enabled:
        with torch.autocast(options.device, torch.bfloat16, enabled=bf16):
            print(nv.coverage(model, images[: options.batch].to(options.device), recipe=options.recipe))
        for index, moe in enumerate(model.experts()):
            print(f"tokens of each expert, mixture {index}: {moe.load.tolist()}")
    return [*history, right / len(test_images)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train both precisions and print what came out."""
    parser = argparse.ArgumentParser(description="A small vision transformer with experts, in NVFP4")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="CIFAR-10, binary version (default: drawn images)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=0, help="in place of --epochs")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default="default", help="name or path")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    data = read(options.data) if options.data else (drawn(2048, 1), drawn(512, 2))
    results = {name: train(options, enabled, data) for name, enabled in (("high", False), ("nvfp4", True))}
    for name, (*losses, accuracy) in results.items():
        tail = losses[-max(1, len(losses) // 10) :]
        print(f"{name:6s} loss {losses[0]:.3f} -> {sum(tail) / len(tail):.3f}   accuracy {accuracy:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
