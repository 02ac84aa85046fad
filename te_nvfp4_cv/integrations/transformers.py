"""Resume a Hugging Face Trainer in NVFP4 bit for bit.

    Trainer(model, args, callbacks=[NVFP4Callback()])

The Trainer keeps weights, optimizer and random states, and with the random states the position in the stream of
stochastic rounding. What it cannot know are delayed tensor scales. The callback adds nv.extra_state of every rank to
the checkpoint's trainer_state.json, whose other entries stay as they are. A callback is not told which folder a run
resumes from; what that file holds reaches it in any case.
Importing this file needs transformers; importing te_nvfp4_cv does not.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from te_nvfp4_cv.integrations.ranks import gathered, of_this_rank
from te_nvfp4_cv.nn.resume import extra_state

_STATE = "trainer_state.json"  # the Trainer's file in a checkpoint


class NVFP4Callback(TrainerCallback):  # type: ignore[misc]  # a base without types
    """Keep nv.extra_state in the Trainer's checkpoints, and restore it when a run resumes.

    The model is the one that the Trainer trains. A run that resumes on another number of ranks takes the scales of
    rank 0. A checkpoint that was saved without this callback resumes as it would without it.

    Example:
        >>> from te_nvfp4_cv.integrations.transformers import NVFP4Callback
        >>> callback = NVFP4Callback()  # for Trainer(model, args, callbacks=[callback])
    """

    def __init__(self) -> None:
        self.ranks: list[str] = []  # what a checkpoint held, until the first step has begun

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the states that the checkpoint holds, if the run resumes from one."""
        held = (state.stateful_callbacks or {}).get(type(self).__name__, {})
        self.ranks = held.get("attributes", {}).get("ranks", []) if state.global_step else []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Restore this rank's state in the first step: by then the Trainer has restored torch's random state.

        Raises:
            ValueError: The scales do not fit the model.
            RuntimeError: Torch has another seed than when the state was saved.
        """
        if self.ranks:
            file = io.BytesIO(base64.b64decode(of_this_rank(self.ranks)))
            extra_state(model, load=torch.load(file, weights_only=True))
            self.ranks = []

    def on_save(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Add the states of all ranks to the checkpoint that the Trainer has just written."""
        file = io.BytesIO()
        torch.save(extra_state(model), file)
        ranks = gathered(base64.b64encode(file.getvalue()).decode())
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _STATE
        # A search for hyperparameters writes into folders of its own, and never resumes.
        if args.should_save and path.is_file():
            # In the form that the Trainer's own restoring of callbacks reads, where a user has turned that on.
            entry = {"args": {}, "attributes": {"ranks": ranks}}
            state.stateful_callbacks = {**(state.stateful_callbacks or {}), type(self).__name__: entry}
            state.save_to_json(str(path))
