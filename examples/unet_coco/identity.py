"""What makes two calls the same run: a checkpoint is resumed only where all of this is equal (checkpoint.py).

    data         of each split the number of images, and a hash of their names below the folder of the data and of the
                 sizes of up to 256 of the files: the folder may move, other images or another split are refused
    share_amax   among ranks only: one process has one tensor scale anyway

Checkpoints from before the data were kept give no hash: they are resumed with a note; --high-precision-last and
--share-amax are compared with the options that they hold.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

from .levers import changed
from .options import Settings
from .order import TrainOrder
from .precision import Precision
from .split import RawSplit, SegmentationData
from .task import Task
from .tracking import tell_once

MOST_SIZES = 256


def identity_of(
    settings: Settings, precision: Precision, task: Task, order: TrainOrder, data: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint of this run says of it; `data`: of data_identity."""
    identity: dict[str, Any] = {
        "precision": precision.name,
        "recipe": precision.recipe_text,
        "architecture": task.architecture(),
        "data": data,
        "data order": {
            "images": order.count,
            "batch_size": order.batch_size,
            "seed": settings.seed,
            "size": list(settings.image_size),
        },
        "optimizer": {"lr": settings.lr, "weight_decay": settings.weight_decay},
    }
    if settings.changed_loss():
        identity["loss"] = settings.changed_loss()
    if precision.recipe is not None:
        if changed(settings):
            identity["levers"] = changed(settings)
        if precision.compute != "bf16":
            identity["compute"] = precision.compute
        if settings.share_amax:
            identity["share_amax"] = True
    return identity


def data_identity(data: SegmentationData, settings: Settings) -> dict[str, Any]:
    """Which images are trained on and validated with."""
    shared = os.path.commonprefix([*data.train.names, *data.val.names])
    start = shared.rfind(os.sep) + 1
    found: dict[str, Any] = {raw.name: _images(raw, start) for raw in (data.train, data.val)}
    return found | ({"val_share": settings.val_share} if settings.layout == "mvtec" else {})


def _images(raw: RawSplit, start: int) -> str:
    digest = hashlib.sha256()
    every = -(-len(raw.names) // MOST_SIZES) or 1
    for index, name in enumerate(raw.names):
        digest.update(name[start:].encode() + b"\n")
        if index % every == 0 and os.path.isfile(name):
            digest.update(f"{os.path.getsize(name)}\n".encode())
    return f"{len(raw.names)} images, {digest.hexdigest()[:16]}"


def saved_identity(state: dict[str, Any], now: dict[str, Any], parallel: bool) -> dict[str, Any]:
    """The identity that a checkpoint holds, made comparable with this run's.

    Args:
        state: what load_checkpoint gave.
        parallel: this run has several ranks.
    """
    saved: dict[str, Any] = dict(state["identity"])
    if "data" not in saved:
        tell_once(
            "note: the checkpoint is of an earlier version, which did not keep which images it was trained on.\n"
            "  It goes on with these data; see to it that they are the same."
        )
        saved["data"] = now["data"]
        last, shared = (state["args"].get(key) for key in ("high_precision_last", "share_amax"))
        if saved["recipe"] and last not in (None, "0"):
            saved["levers"] = {**saved.get("levers", {}), "high_precision_last": int(last)}
        if saved["recipe"] and shared == "True":
            saved["share_amax"] = True
    if not (parallel and "ranks" in state):
        saved.pop("share_amax", None)
        if "share_amax" in now:
            saved["share_amax"] = True
    return saved
