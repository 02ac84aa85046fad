"""Train a network of timm in NVFP4 with timm's own parts: mixup, averaged weights, channels_last, cosine schedule.

    python examples/frameworks/timm_resnet.py --model resnet10t     (or convnext_atto, or any other)

Two lines differ from timm's train.py: prepare after create_model, and the context around forward and loss, inside
timm's amp_autocast. What timm hides from the context:
- amp_autocast is torch.autocast and works together with it (bf16 on a GPU; a CPU without bf16 units wants fp32).
- torch.compile (--torchcompile) traces the context. Call prepare before it.
- ModelEmaV3 copies the model and averages plain weights; its evaluation runs in NVFP4 inside of the context only.
- Its checkpoints hold weights, optimizer and scaler, no random state: a resumed run is not bit for bit the whole one.
"""

import argparse
from collections.abc import Sequence

import _setup  # noqa: F401  isort: skip
import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import te_nvfp4_cv as nv

CLASSES = 4


def loader(steps: int, batch: int = 32, size: int = 32):
    """Yield noisy images whose brightest quarter is the class."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        labels = torch.arange(batch) % CLASSES
        images = torch.randn(batch, 3, size, size, generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[:, label // 2 * size // 2 :, label % 2 * size // 2 :][:, : size // 2, : size // 2] += 1
        yield images, labels


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train, print what ran in NVFP4, and return the losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet10t", help="a name of timm.list_models()")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = timm.create_model(options.model, num_classes=CLASSES).to(device, memory_format=torch.channels_last)
    recipe = nv.NVFP4BlockScaling(precision={model.default_cfg["classifier"]: "high"})  # fc, head.fc, ...
    nvfp4 = nv.prepare(model, recipe)
    mixup = Mixup(mixup_alpha=0.1, cutmix_alpha=0.0, num_classes=CLASSES, label_smoothing=0.0)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    schedule = CosineLRScheduler(optimizer, t_initial=options.steps, t_in_epochs=False)
    averaged, criterion, losses = ModelEmaV3(model, decay=0.9), SoftTargetCrossEntropy(), []
    model.train()
    for step, (images, labels) in enumerate(loader(options.steps)):
        images = images.to(device, memory_format=torch.channels_last)
        images, target = mixup(images, labels.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"), nvfp4:
            loss = criterion(model(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step_update(step + 1)
        averaged.update(model, step=step)
        losses.append(loss.item())
    with torch.no_grad(), nvfp4:
        right = (averaged.module.eval()(images).argmax(1) == target.argmax(1)).float().mean()
    share = nv.coverage(model, images, recipe=recipe).nvfp4_flops_share
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, averaged weights right for {right:.0%}")
    print(f"{share:.0%} of FLOPs in NVFP4")
    return losses


if __name__ == "__main__":
    main()
