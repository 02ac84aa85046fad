"""The trained model of a trial and its packed file, which the checks of files and of ONNX share."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from te_nvfp4_cv.cli.trial.cells import Trial
from te_nvfp4_cv.cli.trial.subject import descend, evaluate
from te_nvfp4_cv.export.checkpoints import Saved, load, save


class Trained:
    """A trial's model after one step in NVFP4, and what nv.export.save made of it."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.model = trial.copy()
        trial.step(self.model, trial.context())
        descend(self.model)

    @cached_property
    def output(self) -> list[Tensor]:
        """The output of the trained model under the context."""
        return evaluate(self.model, self.trial.subject, self.trial.context())

    @cached_property
    def saved(self) -> Saved:
        """The file."""
        return save(self.model, self.trial.folder / "model", self.trial.recipe)

    @cached_property
    def loaded(self) -> nn.Module:
        """The file's model, loaded into one that was built anew and holds other values."""
        return load(self.saved.files[0], self._other(), backend=self.trial.backend)

    def _other(self) -> nn.Module:
        fresh = self.trial.subject.made()
        with torch.no_grad():
            for value in fresh.state_dict().values():  # what load forgets shows
                if isinstance(value, Tensor) and value.is_floating_point():
                    value.uniform_(0.5, 1.5)
        return fresh


def trained(trial: Trial) -> Trained:
    """Return the trained model of a trial, which the checks of one row share."""
    if trial.trained is None:
        trial.trained = Trained(trial)
    return trial.trained  # type: ignore[no-any-return]
