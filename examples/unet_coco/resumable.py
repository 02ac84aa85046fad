"""Write the checkpoints of a run, and continue from them: the part of the trainer (engine.py) that deals with files.

    last.pt    after the last step that was saved
    best.pt    after the validation with the highest main score, in the same form; not with --sharded-checkpoints

Either file serves --init-from (with --ema the averaged weights are used), and a best.pt that is copied over last.pt is
what --resume continues from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from te_nvfp4_cv.errors import value_error

from .average import Average
from .backends import backend_of, keep_backend, kernels_of
from .checkpoint import check_identity, load_checkpoint, rng_state, save_checkpoint, set_rng_state
from .identity import identity_of, saved_identity
from .options import Settings
from .order import TrainOrder
from .parallel import load_whole_state, whole_state
from .position import Position
from .precision import Precision
from .ranks import Ranks
from .shards import keep_shards, read_shards, write_shards
from .task import Task


class Resumable:
    """Save and load what a trainer holds; every method must be called on all ranks."""

    precision: Precision
    settings: Settings
    device: torch.device
    folder: Path
    ranks: Ranks
    task: Task
    data: dict[str, Any]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average | None
    scaler: torch.amp.GradScaler
    order: TrainOrder
    schedule_steps: int
    position: Position

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "last.pt"

    @property
    def best_path(self) -> Path:
        return self.folder / "best.pt"

    def _has_checkpoint(self) -> bool:
        return self.ranks.first(self.checkpoint_path.is_file)

    def _identity(self) -> dict[str, Any]:
        """Return what must be equal for a checkpoint to belong to this run."""
        return identity_of(self.settings, self.precision, self.task, self.order, self.data)

    def _save(self) -> None:
        shards, model, optimizer = "", dict[str, Any](), dict[str, Any]()
        if self.settings.sharded_checkpoints:
            shards = write_shards(self.folder, self.position.step, self.model, self.optimizer, self.ranks)
        else:
            model, optimizer = whole_state(self.model, self.optimizer, self.ranks)
        own = {"nvfp4": self.precision.extra_state(self.model), "rng": rng_state(self.device)}
        of_ranks = self.ranks.gather(own)
        state: dict[str, Any] = {
            "identity": self._identity(),
            "args": {key: str(value) for key, value in vars(self.settings).items()},
            "backend": {"name": backend_of(self.precision, self.device), "kernels": kernels_of(self.device)},
            "position": vars(self.position),
            "model": model,
            "optimizer": optimizer,
            "scheduler": {"schedule_steps": self.schedule_steps},
            "scaler": self.scaler.state_dict(),
            **own,
        }
        if self.ranks.parallel:
            state["ranks"] = of_ranks
        if shards:
            state["shards"] = shards
        if self.average is not None:
            state["ema"] = self.average.values
        self.ranks.first(lambda: save_checkpoint(self.checkpoint_path, state))
        self.ranks.first(lambda: keep_shards(self.folder, shards))
        if not shards and self._is_best():  # shards belong to one step: those of a best one would be kept beside
            self.ranks.first(lambda: save_checkpoint(self.best_path, state))

    def _is_best(self) -> bool:
        """Return whether the validation at this step has the highest main score until now."""
        rows = self.position.epochs
        scores = [row[self.task.main] for row in rows]
        return bool(rows) and rows[-1]["step"] == self.position.step and max(scores[:-1], default=-1.0) < scores[-1]

    def _complete_best(self, state: dict[str, Any]) -> None:
        """Write the best.pt that a process did not come to, because it was killed after it had written last.pt."""
        best = self.best_path
        if not best.is_file() or best.stat().st_mtime < self.checkpoint_path.stat().st_mtime:
            save_checkpoint(best, state)

    def resume(self) -> bool:
        """Continue from the folder's checkpoint; return False if there is none."""
        if not self._has_checkpoint():
            return False
        state = load_checkpoint(self.checkpoint_path)
        now = self._identity()
        check_identity(self.checkpoint_path, saved_identity(state, now, bool(self.ranks.parallel)), now)
        backend = state.get("backend", {}).get("name")
        self.precision = keep_backend(self.checkpoint_path, backend, self.precision, self.device)
        at = Position(**state["position"])
        if at.step > self.settings.epochs * len(self.order):
            begun = at.epoch + bool(at.batch)
            raise value_error(
                f"checkpoint: {self.checkpoint_path} is beyond --epochs.",
                got=f"--epochs {self.settings.epochs}, a checkpoint of epoch {begun}, step {at.step}",
                needs=f"--epochs {begun} or more",
                fix=f"--epochs {begun} to evaluate what is there, or another --out to train from the beginning",
            )
        if "shards" in state:
            read_shards(self.folder / state["shards"], self.model, self.optimizer, self.ranks)
        else:
            load_whole_state(self.model, self.optimizer, state["model"], state["optimizer"], self.ranks)
        if self.average is not None:
            self.average.load(state["ema"])
        self.scaler.load_state_dict(state["scaler"])
        self.position = at
        if "shards" not in state and self._is_best():
            self.ranks.first(lambda: self._complete_best(state))
        of_ranks = state.get("ranks", [])
        own = of_ranks[self.ranks.rank] if len(of_ranks) == self.ranks.world else state  # else rank 0's
        set_rng_state(own["rng"], self.device)
        self.precision.load_extra_state(self.model, own["nvfp4"])  # after torch's seed, on which it depends
        laid_out = state["scheduler"]["schedule_steps"]
        if laid_out != self.schedule_steps:
            print(
                f"note: the checkpoint's cosine schedule spans {laid_out} steps, this run's {self.schedule_steps}.\n"
                f"  The learning rate follows the new one from step {self.position.step} on; "
                f"--schedule-steps {laid_out} keeps the old one."
            )
        return True
