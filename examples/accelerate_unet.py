"""Use NVFP4 in a Hugging Face accelerate script, with gradient accumulation and exact resume.

    python examples/accelerate_unet.py --steps 8
    accelerate launch --cpu --num_processes 2 examples/accelerate_unet.py --cpu    (or torchrun --nproc-per-node 2)
    python examples/accelerate_unet.py --steps 16 --folder runs/accelerate --resume

The script trains the UNet on random images. Two lines differ from a plain accelerate script: nvfp4_autocast around the
forward pass, and NVFP4State in the checkpoint (save_state already saves weights, optimizer and random states).
Resume with the same number of processes, and from a state saved after an optimizer step: gradients that are still
accumulating are not saved.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[1]))  # te_nvfp4_cv of this checkout, where it is not installed

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from unet_coco.unet import UNet  # noqa: E402

import te_nvfp4_cv as nv  # noqa: E402
from te_nvfp4_cv.integrations.accelerate import NVFP4State  # noqa: E402

CLASSES = 4


def batch(step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random images and masks of their brightness, the same for a step in every run."""
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(16, 3, size, size, generator=generator)
    return images, (images.mean(1) * 2 * CLASSES).long().remainder(CLASSES)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train, print the losses, and return the losses of this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=8, help="micro-steps in total, including those before a resume")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-steps per optimizer step")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--recipe", default="unet", help="a recipe's name or file")
    parser.add_argument("--folder", type=Path, default=None, help="folder where the state is saved at the end")
    parser.add_argument("--resume", action="store_true", help="continue from --folder")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(arguments)
    if options.resume and options.folder is None:
        parser.error("--resume needs --folder, the folder with the state to continue from")
    accelerator = Accelerator(mixed_precision="bf16", cpu=options.cpu, gradient_accumulation_steps=options.accumulate)
    torch.manual_seed(0)
    recipe = nv.load_recipe(options.recipe)
    model = UNet(CLASSES, 0.25, "silu", options.dropout)
    nv.set_precision(model, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(NVFP4State(model))
    start = 0
    if options.resume:
        accelerator.load_state(str(options.folder))
        start = int((options.folder / "step.txt").read_text())
    losses = []
    for step in range(start, options.steps):
        images, masks = batch(step * accelerator.num_processes + accelerator.process_index, options.size)
        with accelerator.accumulate(model):
            with nv.nvfp4_autocast(recipe):
                loss = F.cross_entropy(model(images.to(accelerator.device)), masks.to(accelerator.device))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        accelerator.print(f"step {step + 1:4}  loss {losses[-1]:.4f}")
    if options.folder is not None:
        accelerator.save_state(str(options.folder))
        if accelerator.is_main_process:
            (options.folder / "step.txt").write_text(str(options.steps))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    main()
