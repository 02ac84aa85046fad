"""Save a model that FSDP2 shards in shards, so that no rank ever holds the whole (--sharded-checkpoints).

    last.pt            as without the option, but for the tensors of the model and the optimizer; it names their folder
    shards-STEP-N/     one safetensors file for each rank, by torch.distributed.checkpoint

last.pt is written last: a kill at any moment leaves one whose shards are complete, and folders that no last.pt names
are removed after the next one. Any number of ranks reads the shards, with FSDP2, DDP or in one process. The writer is
that of safetensors, because the usual one keeps its metadata as a pickle, which runs code when it is read. Nothing is
written in the background: for 31 million parameters and their moments on a CPU, async_save takes 1.3 to 1.45 s of its
time, 0.4 to 0.55 before training goes on, where the plain save takes 0.8 to 1 s. On GPUs it is not measured yet.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from te_nvfp4_cv.errors import runtime_error, value_error

from .ranks import Ranks

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def write_shards(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> str:
    """Write each rank's part of the weights and moments, and return the name of the folder that they are in.

    Raises:
        RuntimeError: If a rank cannot write its part; on all of them.
    """
    # Never a folder that is there: last.pt may name it.
    numbers = itertools.count()
    path = ranks.first(lambda: next(p for n in numbers if not (p := folder / f"shards-{step}-{n}").exists()))
    tensors = _tensors(*get_state_dict(model, optimizer, options=_FLAT))
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(path), save_distributed=True))
    except CheckpointException as error:
        raise runtime_error(
            f"checkpoint: the shards in {path} could not be written.",
            got=str(error).strip().splitlines()[-1],
            needs="space for them, and the right to write there; the checkpoint from before is untouched",
            fix="free some space, then continue with --resume",
        ) from error
    return path.name


def read_shards(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Load what `write_shards` has written, however the model is wrapped now.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    weights, moments = get_state_dict(model, optimizer, options=_FLAT)
    tensors = _tensors(weights, moments)
    with _told(path):
        reader = dcp.HuggingFaceStorageReader(str(path))
        dcp.load(tensors, storage_reader=reader, no_dist=not ranks.parallel)  # in place
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=_FLAT)


def read_weights_of(path: Path) -> dict[str, Tensor]:
    """Return the whole weights that shards hold, on the CPU, in any process.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    with _told(path):
        reader = dcp.HuggingFaceStorageReader(str(path))
        saved: Any = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in saved.items()
            if name.startswith("model.")
        }
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def keep_shards(folder: Path, name: str = "") -> None:
    """Remove all shards but those that last.pt names."""
    for path in folder.glob("shards-*-*"):
        if path.name != name:
            shutil.rmtree(path, ignore_errors=True)


def _tensors(weights: dict[str, Any], moments: dict[str, Any]) -> dict[str, Any]:
    """Return what is saved under one name each; the rest, such as learning rates, is the options'."""
    both = {f"model.{name}": t for name, t in weights.items()} | {f"optimizer.{name}": t for name, t in moments.items()}
    return {name: t for name, t in both.items() if isinstance(t, Tensor)}


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Raise what torch.distributed.checkpoint raises on all ranks, or a damaged file anywhere, as one ValueError."""
    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        lines = str(error).strip().splitlines()
        raise value_error(
            f"checkpoint: the shards in {path} cannot be read.",
            got=lines[-1] if lines else type(error).__name__,
            needs="all the files that the ranks wrote",
            fix="restore them, or remove last.pt beside them to start from the beginning",
        ) from error
