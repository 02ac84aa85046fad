"""Read a folder of pictures as a model wants them: size, range, mean and standard deviation.

    x = (low + (high - low) * pixel - mean) / std       pixel: 0 .. 1 whatever the file's depth; low, high: --range

What the options do not say is taken from the model: timm writes it into the model (pretrained_cfg), torchvision beside
the weights of a network of that name. Where neither says it, nothing is guessed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from te_nvfp4_cv.errors import need_package, value_error

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
MODES = ("stretch", "crop", "pad")


@dataclass(frozen=True)
class Preparation:
    """How a model wants its pictures.

    Attributes:
        mean, std: of the three channels, or of all of them alike.
        range: what black and white are before that.
        mode: "stretch" to the size, "crop" the middle, or "pad" with black.
        kept: the share of the shorter side that "crop" keeps.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    range: tuple[float, float] = (0.0, 1.0)
    mode: str = "stretch"
    kept: float = 1.0


def picture_options(parser: argparse.ArgumentParser) -> None:
    """Add the options about pictures to a parser."""
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="calibration images")
    parser.add_argument("--count", type=int, default=64, metavar="N", help="how many of them (default: 64)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images at a time (default: 8)")
    told = "(default: as timm or torchvision say of the model; else it must be given)"
    parser.add_argument("--mean", type=float, nargs="+", metavar="M", help=f"one number, or one per channel {told}")
    parser.add_argument("--std", type=float, nargs="+", metavar="S", help=f"likewise {told}")
    text = "values of black and white, before --mean and --std (default: 0 1); alone it means --mean 0 --std 1"
    parser.add_argument("--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help=text)
    text = "size of the pictures (default: that of --input)"
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help=text)
    text = "how they get that size (default: crop where the model's preparation says so, else stretch)"
    parser.add_argument("--resize-mode", choices=MODES, help=text)
    parser.add_argument("--strict", action="store_true", help="stop at a file that cannot be read, and do not skip it")


def preparation_of(options: argparse.Namespace, model: nn.Module) -> Preparation:
    """Return how the model wants its pictures, by the options and by what timm or torchvision say.

    Raises:
        ValueError: Neither says it.
    """
    if options.mean is None and options.std is None and options.range is None:
        found = _of_timm(model) or _of_torchvision(options.model)
        if found is None:
            raise value_error(
                "quantize: how does the model want its pictures?",
                got="no --mean, --std or --range, and a model that timm and torchvision say nothing of",
                needs="the numbers that it was trained with",
                fix="--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 for ImageNet's; --range 0 255 or --range -1 1",
            )
    else:
        # One of the two alone would leave half of it to a guess.
        if (options.mean is None) != (options.std is None):
            raise value_error(
                "quantize: --mean and --std belong together.",
                got="one of them", needs="both", fix="give the other, too",
            )
        found = Preparation(tuple(options.mean or (0.0,)), tuple(options.std or (1.0,)), tuple(options.range or (0, 1)))
    if {len(found.mean), len(found.std)} - {1, 3} or min(found.std) <= 0 or found.range[0] >= found.range[1]:
        raise value_error(
            "quantize: --mean, --std or --range is out of range.",
            got=f"{found.mean}, {found.std}, {found.range}",
            needs="one number or three; deviations above 0; LOW below HIGH", fix="--mean 0.5 --std 0.5",
        )
    mode = options.resize_mode or found.mode
    return Preparation(found.mean, found.std, found.range, mode, found.kept if mode == found.mode else 1.0)


def _of_timm(model: nn.Module) -> Preparation | None:
    told = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(told, dict) or not told.get("mean") or not told.get("std"):
        return None
    kept = told.get("crop_pct") or 1.0
    mode = {"squash": "stretch", "border": "pad"}.get(told.get("crop_mode") or "center", "crop")
    return Preparation(tuple(told["mean"]), tuple(told["std"]), mode=mode, kept=float(kept))


def _of_torchvision(name: str) -> Preparation | None:
    module, _, function = name.rpartition(":")
    if not module.startswith("torchvision.models"):
        return None
    from te_nvfp4_cv.cli.torchvision_ops import transforms_of

    told: Any = transforms_of(function)
    if told is None or not hasattr(told, "mean") or not hasattr(told, "std"):
        return None
    crop, resize = getattr(told, "crop_size", None), getattr(told, "resize_size", None)
    mode, kept = ("crop", crop[0] / resize[0]) if crop and resize else ("stretch", 1.0)
    return Preparation(tuple(told.mean), tuple(told.std), mode=mode, kept=kept)


class Pictures:
    """Batches [B, 3, H, W] of the pictures in a folder, spread over the whole of it.

    Attributes:
        paths: the files that are read.
        skipped: the files that could not be read, so far.
    """

    def __init__(
        self, folder: Path, size: tuple[int, int], batch: int, count: int, prepared: Preparation, strict: bool = False
    ) -> None:
        found = sorted(_files(folder)) if folder.is_dir() else []
        if not found:
            raise value_error(
                f"--images {folder}: no pictures.",
                got="an empty folder" if folder.is_dir() else "no such folder",
                needs=f"files {', '.join(sorted(PICTURES))}",
                fix="a folder of images like those that the model was trained on",
            )
        count = min(count, len(found))
        # Spread over the whole folder: its pictures may be sorted by class.
        self.paths = [found[i * len(found) // count] for i in range(count)]
        self.folder, self.size, self.batch, self.prepared, self.strict = folder, size, batch, prepared, strict
        self.skipped: list[Path] = []

    def __len__(self) -> int:
        return -(-len(self.paths) // self.batch)  # the last batch may be smaller

    def __iter__(self) -> Iterator[Tensor]:
        self.skipped = []
        for start in range(0, len(self.paths), self.batch):
            read = []
            for path in self.paths[start : start + self.batch]:
                try:
                    read.append(self._read(path))
                except ValueError:
                    if self.strict:
                        raise
                    self.skipped.append(path)
            if read:
                yield torch.stack(read)
        if len(self.skipped) == len(self.paths):
            raise value_error(
                f"--images {self.folder}: no file could be read.", got=f"{len(self.paths)} files",
                needs="pictures", fix="--strict says what is wrong with the first",
            )

    def _read(self, path: Path) -> Tensor:
        need_package("PIL", "--images: pillow is not installed.", needs="it", fix="pip install pillow")
        from PIL import Image, ImageOps

        try:
            with Image.open(path) as image:
                # A camera's picture may lie on its side, and say so in its EXIF data.
                pixels = _resized(ImageOps.exif_transpose(image), self.size, self.prepared)
        # PIL's decoders raise all of these.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise value_error(
                f"--images: {path} cannot be read.", got=str(error), needs="a picture", fix="remove or repair it"
            ) from error
        low, high = self.prepared.range
        # With arrays of fp32: those of Python floats would be fp64, and so would the result.
        mean, std = (np.asarray(numbers, np.float32) for numbers in (self.prepared.mean, self.prepared.std))
        scaled = (np.float32(low) + np.float32(high - low) * pixels - mean) / std
        return torch.from_numpy(scaled).permute(2, 0, 1).contiguous()  # [H, W, 3] -> [3, H, W]


def _files(folder: Path) -> Iterator[Path]:
    """Yield the pictures below a folder. Linked folders are followed, each folder once: links may go round."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place) / name for name in names if Path(name).suffix.lower() in PICTURES)


def _resized(image: Any, size: tuple[int, int], prepared: Preparation) -> np.ndarray:
    """Return a picture's pixels, fp32 [H, W, 3] from 0 to 1."""
    from PIL import Image

    depth = 255.0
    if image.mode.startswith("I"):  # 16 bits of grey, for which PIL's conversion to RGB gives white
        image, depth = Image.fromarray(np.asarray(image, dtype=np.float32)), 65535.0
    elif image.mode == "F":
        raise ValueError("pixels are floating-point numbers, whose white is not known")
    else:
        image = image.convert("RGB")
    height, width = size
    if prepared.mode != "stretch":
        wide, high = image.size  # PIL's sizes are (width, height)
        ratios = width / wide, height / high
        # The picture is scaled as a whole, so that its middle fills the size, or that it lies inside of it.
        ratio = max(ratios) / prepared.kept if prepared.mode == "crop" else min(ratios)
        image = image.resize((max(1, round(wide * ratio)), max(1, round(high * ratio))), Image.Resampling.BICUBIC)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))  # beyond its edges PIL crops black
    else:
        image = image.resize((width, height))
    pixels = np.asarray(image, dtype=np.float32).clip(0, depth) / np.float32(depth)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
