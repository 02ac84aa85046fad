"""Train a UNet on images of which no rank holds more than some rows: spatial parallelism with 4-bit halos.

    torchrun --nproc-per-node 2 examples/spatial_unet.py
    torchrun --nproc-per-node 4 examples/spatial_unet.py --height 512 --width 512 --steps 20

Each rank makes its own rows of drawn shapes, as it would read them from a file. Printed are the loss and what a rank
saves for backward, beside what one rank would have to save alone. --limit-mb stops a rank that saves more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from unet_coco.unet import UNet

import te_nvfp4_cv as nv


def rows_of(step: int, start: int, end: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return rows start to end - 1 of an image [1, 3, ., W] with discs, and of its labels [1, ., W]."""
    generator = torch.Generator().manual_seed(step)
    y, x = torch.arange(start, end)[:, None] / height, torch.arange(width)[None, :] / width
    labels = torch.zeros(end - start, width, dtype=torch.long)
    for label in (1, 2):
        cy, cx, r = torch.rand(3, generator=generator).tolist()
        labels[(y - cy) ** 2 + (x - cx) ** 2 < (0.1 + 0.2 * r) ** 2] = label
    image = F.one_hot(labels, 3).permute(2, 0, 1)[None].float() * 0.5
    return image + 0.1 * torch.sin(40 * (y + 2 * x)), labels[None]


class Saved:
    """Counts the bytes that a forward pass saves for backward, and stops above a limit."""

    def __init__(self, limit: int | None) -> None:
        self.limit, self.seen = limit, dict[int, int]()

    def pack(self, tensor: Tensor) -> Tensor:
        """Count one saved tensor; parameters are there anyway."""
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            self.seen[storage.data_ptr()] = storage.nbytes()
        if self.limit is not None and self.bytes > self.limit:
            raise MemoryError(f"this rank saves more than {self.limit / 2**20:.0f} MiB for backward: take more ranks")
        return tensor

    @property
    def bytes(self) -> int:
        """The bytes so far, each piece of memory once."""
        return sum(self.seen.values())


def main(arguments: Sequence[str] | None = None) -> tuple[list[float], int]:
    """Train, print a line per step on the first rank, and return the losses and the bytes that this rank saves."""
    parser = argparse.ArgumentParser(description="Train a UNet on images that are cut into rows.")
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--scale", type=float, default=0.25, help="of the UNet's widths")
    parser.add_argument("--recipe", default="unet", help="name of a recipe, or none")
    parser.add_argument("--limit-mb", type=float, help="most that a rank may save for backward")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    own_group = not dist.is_initialized()
    if own_group:
        dist.init_process_group("nccl" if gpu else "gloo")
    mesh = dist.init_device_mesh("cuda" if gpu else "cpu", (dist.get_world_size(),))
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if gpu else torch.device("cpu")
    torch.manual_seed(0)  # the same parameters on every rank
    model = nv.spatial_parallel.parallelize(UNet(3, options.scale).to(device), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    limit = None if options.limit_mb is None else int(options.limit_mb * 2**20)
    each = -(-options.height // mesh.size())  # as torch.distributed.tensor.Shard cuts
    start, end = (min(options.height, (mesh.get_local_rank() + more) * each) for more in (0, 1))
    losses, saved = [], Saved(limit)
    for step in range(options.steps):
        images, labels = (
            nv.spatial_parallel.from_piece(part.to(device), mesh, options.height, dim)
            for part, dim in zip(rows_of(step, start, end, options.height, options.width), (2, 1), strict=True)
        )
        saved = Saved(limit)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            with nv.nvfp4_autocast(
                options.recipe if options.recipe != "none" else None, enabled=options.recipe != "none"
            ):
                loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if dist.get_rank() == 0:
            print(
                f"step {step}: loss {losses[-1]:.4f}, {saved.bytes / 2**20:.1f} MiB saved on this rank",
                flush=True,
            )
    dist.barrier()
    if own_group:
        dist.destroy_process_group()
    return losses, saved.bytes


if __name__ == "__main__":
    main()
