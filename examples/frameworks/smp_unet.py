"""Train a UNet of segmentation-models-pytorch in NVFP4.

    python examples/frameworks/smp_unet.py --encoder resnet18 --architecture unet --steps 12

Two lines differ from a plain loop: prepare after create_model, and the context around forward and loss. What the
library hides from the context:
- It has no loop, and so no autocast, EMA or random state; it compiles nothing. In PyTorch Lightning use NVFP4Precision.
- Its encoders are timm's or its own; those of 3 input channels begin with a convolution that stays in high precision.
- Losses compute in fp32 on what the model returns; they call no convolution, so they may stand in the context.
- Checkpoints of model.save_pretrained are plain weights, which load with NVFP4 and without it.
"""

import argparse
from collections.abc import Sequence

import _setup  # noqa: F401  isort: skip
import segmentation_models_pytorch as smp
import torch

import te_nvfp4_cv as nv


def batch(step: int, device: torch.device, count: int = 8, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy images of a bright disc, and its masks."""
    generator = torch.Generator().manual_seed(step)
    centre = torch.randint(size // 4, 3 * size // 4, (count, 2, 1, 1), generator=generator)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    masks = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < (size // 4) ** 2).float().unsqueeze(1)
    return (masks + 0.5 * torch.randn(count, 3, size, size, generator=generator)).to(device), masks.to(device)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train, print what ran in NVFP4, and return the losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="unet", help="a name of smp.create_model")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = smp.create_model(options.architecture, options.encoder, encoder_weights=None, classes=1)
    model = model.to(device, memory_format=torch.channels_last).train()
    recipe = nv.NVFP4BlockScaling(precision={"segmentation_head.*": "high"})  # one class: the last layer
    nvfp4 = nv.prepare(model, recipe)
    criterion = smp.losses.DiceLoss(smp.losses.BINARY_MODE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(options.steps):
        images, masks = batch(step, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"), nvfp4:
            logits = model(images)
            loss = criterion(logits, masks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        counts = smp.metrics.get_stats((logits > 0).long(), masks.long(), mode="binary")
        print(f"loss {losses[-1]:.3f}  IoU {smp.metrics.iou_score(*counts, reduction='micro'):.3f}")
    print(f"{nv.coverage(model, images, recipe=recipe).nvfp4_flops_share:.0%} of FLOPs in NVFP4")
    return losses


if __name__ == "__main__":
    main()
