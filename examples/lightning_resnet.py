"""Train an unmodified ResNet-18 in NVFP4 with a PyTorch Lightning Trainer, with exact resume.

    python examples/lightning_resnet.py --steps 8
    python examples/lightning_resnet.py --devices 2 --cpu                           (DistributedDataParallel)
    python examples/lightning_resnet.py --steps 16 --folder runs/lightning --resume

The images are generated. One line differs from a plain Lightning script: plugins=[NVFP4Precision(...)]. With
root="net", the recipe's [precision] table names the modules of the network, not those of the LightningModule around it.
The checkpoint contains what a bit-exact resume needs. The script counts epochs, not steps, because with max_steps
Lightning shuffles the data again when it resumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[1]))  # te_nvfp4_cv of this checkout, where it is not installed

from _torchvision import ensure_torchvision  # noqa: E402

ensure_torchvision()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import torchvision  # noqa: E402
from lightning.pytorch import LightningModule, Trainer  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from te_nvfp4_cv.lightning import NVFP4Precision  # noqa: E402

CLASSES = 4


class Classifier(LightningModule):
    """Train a ResNet-18 with cross-entropy. This class knows nothing about NVFP4."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torchvision.models.resnet18(num_classes=CLASSES).to(memory_format=torch.channels_last)
        self.losses: list[float] = []
        self.validation_losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images.contiguous(memory_format=torch.channels_last)).float(), labels)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        images, labels = batch
        self.validation_losses.append(F.cross_entropy(self.net(images).float(), labels).item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def stripes(count: int, size: int, seed: int) -> TensorDataset:
    """Draw noisy images of stripes whose direction is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    angle = labels.view(-1, 1, 1) * torch.pi / CLASSES
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    waves = torch.sin(0.8 * (x * angle.cos() + y * angle.sin())).unsqueeze(1)
    return TensorDataset(waves + 0.3 * torch.randn(count, 3, size, size, generator=generator), labels)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train, print the losses, and return the losses of this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=8, help="total steps, those before a resume too; whole epochs")
    parser.add_argument("--epoch-steps", type=int, default=4, help="steps per epoch")
    parser.add_argument("--batch", type=int, default=16, help="images per device and step")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--recipe", default="resnet", help="a recipe's name or file")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"), help="dtype of torch.autocast")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="folder where the checkpoint is saved at the end")
    parser.add_argument("--resume", action="store_true", help="continue from --folder")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(arguments)
    if options.resume and options.folder is None:
        parser.error("--resume needs --folder, the folder with the state to continue from")
    torch.manual_seed(0)
    model = Classifier()
    trainer = Trainer(
        plugins=[NVFP4Precision(options.recipe, dtype=options.dtype, root="net")],
        accelerator="cpu" if options.cpu else "auto",
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        # rounded up to whole epochs
        max_epochs=-(-options.steps // options.epoch_steps),
        default_root_dir=options.folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    images = options.epoch_steps * options.batch * options.devices
    training = DataLoader(stripes(images, options.size, 1), options.batch, shuffle=True)
    validation = DataLoader(stripes(options.batch, options.size, 2), options.batch)
    checkpoint = None if options.folder is None else options.folder / "last.ckpt"
    trainer.fit(model, training, validation, ckpt_path=checkpoint if options.resume else None, weights_only=True)
    if checkpoint is not None:
        trainer.save_checkpoint(checkpoint)
    if trainer.is_global_zero:
        # After a resume, this process has only the losses of its own steps.
        first = trainer.global_step - len(model.losses) + 1
        for step, loss in enumerate(model.losses, first):
            print(f"step {step:4}  loss {loss:.4f}")
        print(f"validation loss {model.validation_losses[-1]:.4f}" if model.validation_losses else "")
    return model.losses


if __name__ == "__main__":
    main()
