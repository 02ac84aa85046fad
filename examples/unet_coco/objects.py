"""Prepare objects for the model: each image with the boxes, classes and, if needed, masks of its objects.

    image: as in data.py;   box: x0, y0, x1, y1 scaled, cropped and flipped with it, cut at the borders
    mask: nearest pixel; if a thin mask would lose every pixel that way, each pixel of the small image that it touches

Crowds are left out in training and marked when a split is scored. Objects with a side of less than a pixel after
resizing (zero width, tiny) are left out; a message gives their number once, another one that of boxes beyond their
image. A split with no object left is refused, and so are images whose size differs from that of their annotations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from te_nvfp4_cv.errors import value_error

from .augmentation import colour, geometry
from .data import MEAN, STD
from .order import mix_seed
from .split import Objects, RawSplit, Thing, open_image, other_size
from .tracking import tell_once

Target = dict[str, Tensor]  # boxes [n, 4], labels [n], crowd [n] and, if needed, masks [n, H, W] bool


class ObjectDataset(Dataset[tuple[Tensor, Target]]):
    """Provide a split with objects: resized, flipped in training, normalised; keys and randomness as in data.py.

    Attributes:
        most: The largest number of objects in one image, without crowds.
    """

    def __init__(
        self,
        raw: RawSplit,
        size: tuple[int, int],
        train: bool,
        seed: int,
        masks: bool,
        augment: tuple[str, ...] = ("flip",),
    ) -> None:
        self.raw, self.size, self.train, self.seed, self.masks = raw, size, train, seed, masks
        self.augment = augment if train else ()
        self.kept: list[list[int]] = []  # for each image the indices of its usable objects
        total, beyond, counts = 0, 0, []
        for index in range(len(raw)):
            objects = self._objects(index)
            usable = [place for place, thing in enumerate(objects.things) if self._usable(objects, thing)]
            counts.append(sum(not objects.things[place].crowd for place in usable))
            total += sum(not thing.crowd for thing in objects.things)
            beyond += sum(_is_beyond(objects, thing) for thing in objects.things)
            # Crowds stay in evaluation, where predictions inside them must not count.
            self.kept.append([place for place in usable if not (train and objects.things[place].crowd)])
        left, self.most, at = sum(counts), max(counts), f"at {size[0]}x{size[1]}"
        if left < total:
            why = "a side below one pixel" + (" or no mask" if masks else "")
            tell_once(f"{raw.name}: {total - left} of {total} objects have {why} {at} and are left out")
        if beyond:
            tell_once(
                f"{raw.name}: {beyond} boxes reach more than a pixel beyond their image and are cut at its borders; "
                "bbox is x, y, width, height"
            )
        if not left:
            raise value_error(
                f"data: {raw.name} has no objects.",
                got=f"{total} annotations of the chosen classes, without crowds; none covers a pixel {at}",
                needs="at least one object to learn from or to score",
                fix="check the annotations and --classes, or raise --image-size",
            )

    def _objects(self, index: int) -> Objects:
        assert self.raw.objects is not None  # tasks refuse data without objects
        return self.raw.objects(index)

    def _box(self, objects: Objects, thing: Thing) -> list[float]:
        """Return x0, y0, x1, y1 at the size of the model's images, cut at their borders."""
        (h, w), scale_h, scale_w = self.size, self.size[0] / objects.height, self.size[1] / objects.width
        x0, y0, x1, y1 = thing.box
        return [
            min(max(x0 * scale_w, 0.0), w),
            min(max(y0 * scale_h, 0.0), h),
            min(max(x1 * scale_w, 0.0), w),
            min(max(y1 * scale_h, 0.0), h),
        ]

    def _usable(self, objects: Objects, thing: Thing) -> bool:
        x0, y0, x1, y1 = self._box(objects, thing)
        return min(x1 - x0, y1 - y0) >= 1 and (thing.mask is not None or not self.masks)

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Target]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, objects = open_image(Path(self.raw.names[index])), self._objects(index)
        size, told = (image.height, image.width), (objects.height, objects.width)
        if size != told:
            needs = "the height and width that `images` lists"
            fix = "remove the image from the split, or correct its entry"
            raise other_size(self.raw.names[index], "annotations", size, told, needs, fix)
        things = [objects.things[place] for place in self.kept[index]]
        pixels = v2.functional.resize(v2.functional.pil_to_tensor(image), list(self.size), antialias=True)
        target = self._target(objects, things)
        # The flip depends on (seed, epoch, index) only, and torch's generator stays where it is.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
            moved = tuple(name for name in ("scale", "crop") if name in self.augment)
            if moved:
                pixels, target = self._moved(moved, pixels, target)
            if "flip" in self.augment and torch.rand(1) < 0.5:
                pixels, target = pixels.flip(-1), self._flipped(target)
            for change in colour(self.augment):
                pixels = change(pixels)
        pixels = v2.functional.normalize(v2.functional.to_dtype(pixels, torch.float32, scale=True), MEAN, STD)
        return pixels, target

    def _target(self, objects: Objects, things: list[Thing]) -> Target:
        target = {
            "boxes": torch.tensor([self._box(objects, thing) for thing in things]).reshape(-1, 4),
            "labels": torch.tensor([thing.label for thing in things], dtype=torch.int64),
            "crowd": torch.tensor([thing.crowd for thing in things], dtype=torch.bool),
        }
        if self.masks:
            masks = [self._small(thing) for thing in things]
            target["masks"] = torch.stack(masks) if masks else torch.zeros(0, *self.size, dtype=torch.bool)
            drawn = target["masks"].flatten(1).any(dim=1)  # an annotation may have a box, but a mask without a pixel
            target = {key: value[drawn] for key, value in target.items()}
        return target

    def _small(self, thing: Thing) -> Tensor:
        assert thing.mask is not None
        mask = torch.from_numpy(thing.mask())[None, None].float()
        small = F.interpolate(mask, self.size)
        # A thin object can lie between the sampled pixels.
        if not small.any():
            small = F.adaptive_max_pool2d(mask, self.size)
        return small[0, 0] > 0

    def _moved(self, names: tuple[str, ...], pixels: Tensor, target: Target) -> tuple[Tensor, Target]:
        """Scale and crop the image; objects of which less than a pixel is left are gone."""
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=self.size)  # type: ignore[call-overload]
        both = tv_tensors.Image(pixels), boxes
        masks = (tv_tensors.Mask(target["masks"].to(torch.uint8)),) if self.masks else ()
        image, moved, *masks_left = v2.Compose(geometry(names, self.size, 0))(*both, *masks)
        changed = {**target, "boxes": moved.as_subclass(Tensor)}
        left = (changed["boxes"][:, 2:] - changed["boxes"][:, :2] >= 1).all(dim=1)
        if masks_left:
            changed["masks"] = masks_left[0].as_subclass(Tensor) > 0
            left &= changed["masks"].flatten(1).any(dim=1)
        return image.as_subclass(Tensor), {key: value[left] for key, value in changed.items()}

    def _flipped(self, target: Target) -> Target:
        x0, y0, x1, y1 = target["boxes"].unbind(1)
        flipped = {**target, "boxes": torch.stack([self.size[1] - x1, y0, self.size[1] - x0, y1], dim=1)}
        if self.masks:
            flipped["masks"] = target["masks"].flip(-1)
        return flipped


def _is_beyond(objects: Objects, thing: Thing) -> bool:
    """Return whether the box leaves the image by more than a pixel, as boxes of two corners do."""
    x0, y0, x1, y1 = thing.box
    return min(x0, y0) < -1 or x1 > objects.width + 1 or y1 > objects.height + 1


def collate_objects(items: list[tuple[Tensor, Target]]) -> tuple[Tensor, list[Target]]:
    """Stack the images and list the targets, because images have different numbers of objects."""
    images, targets = zip(*items, strict=True)
    return torch.stack(images), list(targets)


def to_learn(targets: list[Target]) -> list[Target]:
    """Return the targets without their crowds."""
    return [{key: value[~target["crowd"]] for key, value in target.items()} for target in targets]


def as_numpy(values: dict[str, Tensor]) -> dict[str, Any]:
    """Copy the tensors to the CPU and return them as numpy arrays."""
    return {key: value.detach().cpu().numpy() for key, value in values.items()}
