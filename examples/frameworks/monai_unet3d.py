"""Train MONAI's 3-D UNet in NVFP4: transforms, DiceCELoss, sliding-window inference, Dice.

    python examples/frameworks/monai_unet3d.py --steps 12

Two lines differ from MONAI's tutorials: prepare after the network is built, and the context around forward and loss.
What MONAI hides from the context:
- Its SupervisedTrainer enters torch.autocast itself (amp=True) and calls the network inside of iteration_update: give
  it the network in a module whose forward enters the context, or write the loop, as here and in the tutorials.
- sliding_window_inference calls the network window by window; one context around it serves all windows.
- Images come as MetaTensor, a subclass of Tensor. They run in NVFP4 with the same results; as_tensor(), as here, spares
  the network MONAI's bookkeeping at each operation.
- CheckpointSaver writes plain weights and no random state. Its loop has no EMA; compile=True compiles the network.
"""

import argparse
from collections.abc import Sequence

import _setup  # noqa: F401  isort: skip
import torch
from monai.data import CacheDataset, DataLoader
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from monai.networks.utils import one_hot
from monai.transforms import Compose, RandFlipd, ScaleIntensityd

import te_nvfp4_cv as nv

SIZE = 32


def volumes(count: int) -> list[dict[str, torch.Tensor]]:
    """Return noisy volumes with a bright ball, and its labels."""
    axes = torch.meshgrid(*[torch.arange(SIZE)] * 3, indexing="ij")
    made = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        centre = torch.randint(SIZE // 4, 3 * SIZE // 4, (3,), generator=generator).tolist()
        ball = sum((axis - at) ** 2 for axis, at in zip(axes, centre, strict=True)) < (SIZE // 4) ** 2
        image = ball + 0.3 * torch.randn(SIZE, SIZE, SIZE, generator=generator)
        made.append({"image": image.unsqueeze(0), "label": ball.long().unsqueeze(0)})
    return made


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train, print what ran in NVFP4, and return the losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transforms = Compose([ScaleIntensityd(["image"]), RandFlipd(["image", "label"], prob=0.5, spatial_axis=0)])
    data = CacheDataset(volumes(2 * options.steps), transforms, progress=False)
    model = UNet(3, in_channels=1, out_channels=2, channels=(16, 32, 64), strides=(2, 2), num_res_units=1).to(device)
    recipe = nv.NVFP4BlockScaling(precision={"model.2.*": "high"})  # the layers that give the classes
    nvfp4 = nv.prepare(model, recipe)
    criterion, optimizer = DiceCELoss(to_onehot_y=True, softmax=True), torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for batch in DataLoader(data, batch_size=2, shuffle=True):
        images, labels = (batch[name].as_tensor().to(device) for name in ("image", "label"))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"), nvfp4:
            loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad(), nvfp4:
        found = sliding_window_inference(images, (SIZE // 2,) * 3, 4, model.eval()).argmax(1, keepdim=True)
    dice = DiceMetric(include_background=False)(one_hot(found, 2), one_hot(labels, 2)).mean()
    share = nv.coverage(model, images, recipe=recipe).nvfp4_flops_share
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, Dice {dice:.3f}, {share:.0%} of FLOPs in NVFP4")
    return losses


if __name__ == "__main__":
    main()
