"""Read CIFAR-10 from files that contain no code: the official binary version, or one npz file of JPEGs.

    ROOT/{data_batch_1..5,test_batch}.bin    3073 bytes an image: label, then 3 x 32 x 32
    ROOT/cifar10_jpeg.npz                    jpeg_header, {train,test}_{data,offsets,labels}

The pickled "python version" is refused. Images stay in memory as uint8. Each batch is cropped (padding 4) and flipped
with random numbers that depend only on (seed, epoch, position), so every precision sees the same pixels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from te_nvfp4_cv.errors import value_error

MEAN, STD = (0.4913, 0.4821, 0.4465), (0.2452, 0.2428, 0.2606)


@dataclass(frozen=True)
class Images:
    """Hold a split: images [N, 3, 32, 32] uint8 and labels [N] int64."""

    images: Tensor
    labels: Tensor

    def first(self, count: int | None) -> Images:
        """Return the first `count` images, or all of them if `count` is None."""
        return self if count is None else Images(self.images[:count], self.labels[:count])


def load_cifar(root: Path, train_count: int | None = None, test_count: int | None = None) -> tuple[Images, Images]:
    """Read the training and the test images, in this order.

    Raises:
        ValueError: If the folder has neither of the two forms, or if a file is damaged.
    """
    if (root / "cifar10_jpeg.npz").is_file():
        return _from_jpeg(root / "cifar10_jpeg.npz", train_count, test_count)
    files = [root / f"data_batch_{n}.bin" for n in range(1, 6)], [root / "test_batch.bin"]
    if not all(path.is_file() for group in files for path in group):
        raise value_error(
            f"CIFAR-10: {root} has none of the forms that can be read.",
            got="no cifar10_jpeg.npz, and not all of data_batch_1..5.bin and test_batch.bin",
            needs="the binary version of CIFAR-10 (the python version is pickled and is not read)",
            fix="download cifar-10-binary.tar.gz and name the folder that it unpacks to",
        )
    train, test = (_from_binary(group) for group in files)
    return train.first(train_count), test.first(test_count)


def _from_binary(files: list[Path]) -> Images:
    rows = []
    for path in files:
        raw = np.fromfile(path, np.uint8)
        if raw.size == 0 or raw.size % 3073:
            raise value_error(
                f"CIFAR-10: {path} is damaged.",
                got=f"{raw.size} bytes",
                needs="a multiple of 3073",
                fix="download it again",
            )
        rows.append(torch.from_numpy(raw.reshape(-1, 3073)))
    table = torch.cat(rows)
    return Images(table[:, 1:].reshape(-1, 3, 32, 32).contiguous(), table[:, 0].long())


def _from_jpeg(path: Path, train_count: int | None, test_count: int | None) -> tuple[Images, Images]:
    splits = []
    with np.load(path, allow_pickle=False) as held:
        header = held["jpeg_header"].tobytes()
        for split, count in (("train", train_count), ("test", test_count)):
            data, offsets = held[f"{split}_data"], held[f"{split}_offsets"].astype(np.int64)
            labels = torch.from_numpy(held[f"{split}_labels"].astype(np.int64))
            number = len(labels) if count is None else min(count, len(labels))
            images = np.empty((number, 32, 32, 3), np.uint8)
            for i in range(number):
                # All images share one JPEG header, which the file stores once; the last two bytes end a JPEG.
                content = header + data[offsets[i] : offsets[i + 1]].tobytes() + b"\xff\xd9"
                images[i] = np.asarray(Image.open(io.BytesIO(content)))
            splits.append(Images(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels[:number]))
    return splits[0], splits[1]


def normalize(images: Tensor) -> Tensor:
    """Convert uint8 images to normalized floats in channels_last memory format."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    x = (images.float() / 255 - mean) / std
    return x.contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pad the images by 4 pixels, crop them at random places and flip half of them.

    The random numbers are drawn on the CPU, so that they are the same on every device.
    """
    count = len(images)
    numbers = torch.randint(0, 9, (2, count), generator=generator), torch.rand(count, generator=generator) < 0.5
    (top, left), flip = (n.to(images.device) for n in numbers)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    columns = torch.arange(32, device=images.device)
    x = torch.where(flip[:, None], columns.flip(0), columns) + left[:, None]
    rows = columns + top[:, None]
    index = torch.arange(count, device=images.device)[:, None, None]
    return padded[index, :, rows[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
