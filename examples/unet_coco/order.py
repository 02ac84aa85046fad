"""Compute the order of the data, and every seed, from (seed, epoch, position) alone.

    order(epoch)      = randperm(n) under mix_seed(seed, epoch);   batch k = order[k * batch : (k + 1) * batch]
    dropout of step t = torch's generator under mix_seed(seed, t), set before the step

    rank r of W       = the r-th of W equal parts of batch k, in order

So two precisions see the same batches and masks even if one of them draws more random numbers, and a run that is
resumed in the middle of an epoch continues with exactly the batch where it stopped.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from te_nvfp4_cv.errors import value_error

Collate = Callable[[list[Any]], Any] | None


def mix_seed(*parts: int) -> int:
    """Mix a few integers into a 63-bit seed (splitmix64 steps), the same on every machine."""
    mixed = 0
    for part in parts:
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed >> 1


class TrainOrder(Sampler[list[tuple[int, int]]]):
    """Yield the batches of one epoch, as (epoch, index) keys, from batch `start` on.

    The last, smaller batch is left out unless it is the only one.

    Args:
        batch_size: Size of the whole batch, over all ranks.
        rank: The rank, out of `world`, whose part to yield.
    Raises:
        ValueError: If a batch cannot be divided into equal parts.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.count, self.batch_size, self.seed = count, min(batch_size, count), seed
        self.epoch, self.start = 0, 0
        if self.batch_size % world:
            few = "" if batch_size <= count else f", of which there are only {count} images"
            raise value_error(
                "--batch-size cannot be cut into equal parts.",
                got=f"batches of {self.batch_size} images{few}, on {world} ranks",
                needs=f"a multiple of {world}: --batch-size counts the images of all ranks together",
                fix=f"--batch-size {self.batch_size // world * world or world}",
            )
        size = self.batch_size // world
        self.part = slice(rank * size, (rank + 1) * size)

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator).tolist()
        for batch in range(self.start, len(self)):
            whole = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(self.epoch, index) for index in whole[self.part]]


def train_loader(
    dataset: Dataset[Any], order: TrainOrder, workers: int, pin: bool, collate: Collate = None
) -> DataLoader[tuple[Tensor, Any]]:
    """Make the loader for `order`; set order.epoch and order.start before each pass."""
    return DataLoader(dataset, batch_sampler=order, pin_memory=pin, collate_fn=collate, **_workers(workers))


def eval_loader(
    dataset: Dataset[Any], batch_size: int, workers: int, pin: bool, collate: Collate = None
) -> DataLoader[tuple[Tensor, Any]]:
    """Make a loader that gives every item once, in the order of the files."""
    return DataLoader(dataset, batch_size=batch_size, pin_memory=pin, collate_fn=collate, **_workers(workers))


def _workers(workers: int) -> dict[str, Any]:
    """Return the loader options for worker processes.

    They are started by fork, so that the splits' open annotation indices need not be pickled.
    """
    generator = torch.Generator()  # without it, the loader would draw its base seed from torch's generator
    if workers == 0:
        return {"generator": generator}
    return {
        "generator": generator,
        "num_workers": workers,
        "multiprocessing_context": multiprocessing.get_context("fork"),
    }
