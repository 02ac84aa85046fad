"""Read a folder of pictures as a model wants them: size, range, mean and standard deviation.

    x = (low + (high - low) * pixel - mean) / std       pixel: 0 .. 1 whatever the file's depth; low, high: --range

What the options do not say is taken from the model: timm writes it into the model (pretrained_cfg), torchvision beside
the weights of a network of that name, transformers into a file beside the weights. Where none says it, nothing is
guessed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from te_nvfp4_cv.cli.libraries import image_processor, library_of
from te_nvfp4_cv.cli.shape import progress
from te_nvfp4_cv.errors import need_package, value_error

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
MOST_PIXELS = 2**27  # of a scaled picture, of which "crop" keeps the middle
MODES = ("stretch", "crop", "pad")


@dataclass(frozen=True)
class Preparation:
    """How a model wants its pictures.

    Attributes:
        mean, std: of the three channels, or of all of them alike.
        range: what black and white are before that.
        mode: "stretch" to the size, "crop" the middle, or "pad" with black.
        kept: the share of the shorter side that "crop" keeps.
        size: height and width, if they are known.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    range: tuple[float, float] = (0.0, 1.0)
    mode: str = "stretch"
    kept: float = 1.0
    size: tuple[int, int] | None = None


def picture_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the options about pictures to a parser."""
    text = "calibration images" if required else "pictures (default: the inputs that MODEL returns)"
    parser.add_argument("--images", type=Path, required=required, metavar="FOLDER", help=text)
    parser.add_argument("--count", type=int, default=64, metavar="N", help="how many of them (default: 64)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images at a time (default: 8)")
    told = "(default: as timm, torchvision or transformers say of the model; else it must be given)"
    parser.add_argument("--mean", type=float, nargs="+", metavar="M", help=f"one number, or one per channel {told}")
    parser.add_argument("--std", type=float, nargs="+", metavar="S", help=f"likewise {told}")
    text = "values of black and white, before --mean and --std (default: 0 1); alone it means --mean 0 --std 1"
    parser.add_argument("--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help=text)
    text = "size of the pictures (default: that of --input, else what the model's preparation says, else 224 224)"
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
        found = _of_timm(model) or _of_torchvision(options.model) or _of_transformers(options.model)
        if found is None:
            raise value_error(
                "--images: how does the model want its pictures?",
                got="no --mean, --std or --range, and a model that timm, torchvision and transformers say nothing of",
                needs="the numbers that it was trained with",
                fix="--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 for ImageNet's; --range 0 255 or --range -1 1",
            )
    else:
        # One of the two alone would leave half of it to a guess.
        if (options.mean is None) != (options.std is None):
            raise value_error(
                "--mean and --std belong together.",
                got="one of them", needs="both", fix="give the other, too",
            )
        found = Preparation(tuple(options.mean or (0.0,)), tuple(options.std or (1.0,)), tuple(options.range or (0, 1)))
    numbers = (*found.mean, *found.std, *found.range)
    if (
        {len(found.mean), len(found.std)} - {1, 3} or not all(map(math.isfinite, numbers))
        or min(found.std) <= 0 or found.range[0] >= found.range[1]
    ):
        raise value_error(
            "--mean, --std or --range is out of range.",
            got=f"{found.mean}, {found.std}, {found.range}",
            needs="one finite number or three; deviations above 0; LOW below HIGH", fix="--mean 0.5 --std 0.5",
        )
    mode = options.resize_mode or found.mode
    return replace(found, mode=mode, kept=found.kept if mode == found.mode else 1.0)


def _of_timm(model: nn.Module) -> Preparation | None:
    told = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(told, dict) or not told.get("mean") or not told.get("std"):
        return None
    kept = told.get("crop_pct") or 1.0
    mode = {"squash": "stretch", "border": "pad"}.get(told.get("crop_mode") or "center", "crop")
    size = told.get("input_size")  # (channels, height, width)
    two = (int(size[1]), int(size[2])) if size and len(size) == 3 else None
    return Preparation(tuple(told["mean"]), tuple(told["std"]), mode=mode, kept=float(kept), size=two)


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
    size = (int(crop[0]), int(crop[-1])) if crop else None
    return Preparation(tuple(told.mean), tuple(told.std), mode=mode, kept=kept, size=size)


def _of_transformers(name: str) -> Preparation | None:
    known = library_of(name)
    told = image_processor(known[1]) if known is not None and known[0] == "transformers" else None
    if not told or not told.get("do_normalize", True) or not told.get("image_mean") or not told.get("image_std"):
        return None
    # Pixels of 0 to 255 are multiplied by this before the mean is subtracted.
    white = 255.0 * float(told.get("rescale_factor") or 1 / 255) if told.get("do_rescale", True) else 255.0
    resized, crop = (told.get(key) if told.get(f"do_{do}", True) else None
                     for key, do in (("size", "resize"), ("crop_size", "center_crop")))
    shortest, size = (resized or {}).get("shortest_edge"), crop or resized or {}
    two = (int(size["height"]), int(size["width"])) if "height" in size else (int(shortest),) * 2 if shortest else None
    kept = two[0] / shortest if crop and shortest and two else 1.0
    mode = "crop" if shortest else "stretch"
    return Preparation(
        tuple(told["image_mean"]), tuple(told["image_std"]), (0.0, white), mode, min(float(kept), 1.0), two
    )


def check_pictures(command: str, options: argparse.Namespace) -> None:
    """Check the numbers that a command about pictures was given.

    Raises:
        ValueError: One of them is out of range.
    """
    # Picture files have three channels.
    wrong_input = options.input is not None and (len(options.input) != 3 or options.input[0] != 3)
    if options.size is not None and min(options.size) < 1:
        raise value_error(
            f"{command}: --size is out of range.", got=" ".join(map(str, options.size)), needs="sizes of at least 1",
            fix="--size 224 224",
        )
    if wrong_input or options.count < 1 or options.batch < 1:
        raise value_error(
            f"{command}: --input, --count or --batch is out of range.",
            got=f"{options.input}, {options.count}, {options.batch}",
            needs="3 HEIGHT WIDTH for pictures; numbers of at least 1",
            fix=f"in Python: nv.{'export.quantize' if command == 'quantize' else 'sensitivity.scan'} takes any input",
        )


def read_pictures(options: argparse.Namespace, model: nn.Module) -> list[Tensor]:
    """Return the batches of the pictures that the options name, prepared as the model wants them."""
    prepared = preparation_of(options, model)
    height, width = options.size or (options.input or (0,))[1:] or prepared.size or (224, 224)
    images = Pictures(options.images, (height, width), options.batch, options.count, prepared, options.strict)
    batches = list(progress(images, "images", len(images)))  # in memory: they are read several times
    if images.skipped:
        text = f"note: {len(images.skipped)} of {len(images.paths)} files could not be read and were skipped"
        print(f"{text}: {images.skipped[0]}, ... (--strict stops there)", file=sys.stderr)
    return batches


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
                got="no picture in it" if folder.is_dir() else "a file" if folder.exists() else "no such folder",
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
        grey = np.asarray(image, dtype=np.float32)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"mode {image.mode} with values beyond 16 bits, whose white is not known")
        image, depth = Image.fromarray(grey), 65535.0
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
        scaled = max(1, round(wide * ratio)), max(1, round(high * ratio))
        if scaled[0] * scaled[1] > MOST_PIXELS:
            raise ValueError(f"{wide} x {high} pixels are too narrow for --resize-mode crop, which would cut most away")
        image = image.resize(scaled, Image.Resampling.BICUBIC)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))  # beyond its edges PIL crops black
    else:
        image = image.resize((width, height))
    pixels = np.asarray(image, dtype=np.float32).clip(0, depth) / np.float32(depth)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
