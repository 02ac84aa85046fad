"""Train a RetinaNet in NVFP4 as torchvision's detection reference does.

    python examples/frameworks/torchvision_retinanet.py --steps 12

Two lines differ from the reference's engine.py and train.py: prepare after the model is built, and the context inside
of its torch.amp.autocast. What the reference hides from the context:
- With --amp it uses float16 and a GradScaler. bf16 needs no scaler; a CPU without bf16 units wants fp32.
- Weights that do not train (--trainable-backbone-layers) still run in NVFP4, without the product for their gradient.
- Its checkpoints hold no random state; add it and nv.extra_state for an exact resume. It has no EMA, no compilation.
"""

import argparse
from collections.abc import Sequence
from functools import partial

import _setup  # noqa: F401  isort: skip
import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead

import te_nvfp4_cv as nv

SIZE = 64


def batches(steps: int, count: int = 4):
    """Yield lists of images with one bright square, and their targets."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images = [torch.rand(3, SIZE, SIZE, generator=generator) * 0.3 for _ in range(count)]
        targets = []
        for image in images:
            x, y = torch.randint(0, SIZE // 2, (2,), generator=generator).tolist()
            image[:, y : y + SIZE // 2, x : x + SIZE // 2] += 0.7
            box = torch.tensor([[x, y, x + SIZE // 2, y + SIZE // 2]], dtype=torch.float32)
            targets.append({"boxes": box, "labels": torch.tensor([1])})
        yield images, targets


def build() -> RetinaNet:
    """Return a RetinaNet on a ResNet-18, with GroupNorm: frozen batch norms would need pretrained weights."""
    norm = partial(nn.GroupNorm, 16)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=norm, trainable_layers=5)
    model = RetinaNet(backbone, num_classes=2, min_size=SIZE, max_size=SIZE)
    model.head = RetinaNetHead(256, model.anchor_generator.num_anchors_per_location()[0], 2, norm_layer=norm)
    return model


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train, print what ran in NVFP4, and return the losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build().to(device, memory_format=torch.channels_last).train()
    nvfp4 = nv.prepare(model, "detection")  # its table leaves the two prediction layers in high precision
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)
    losses = []
    for images, targets in batches(options.steps):
        images = [image.to(device) for image in images]
        targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
        with torch.amp.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"), nvfp4:
            loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warmup.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"{nv.coverage(model, images, targets, recipe='detection').nvfp4_flops_share:.0%} of FLOPs in NVFP4")
    return losses


if __name__ == "__main__":
    main()
