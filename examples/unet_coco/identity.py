"""What makes two calls the same run: a checkpoint is resumed only where all of this is equal (checkpoint.py).

    data         of training and validation the number of images, and a hash of their names below the data's folder,
                 which may move: other images or another split are refused
    file sizes   of up to 256 of those images each; a few that differ (one that was repaired) are told and allowed
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
        **data,
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
    """Which images are trained on and validated with: "data" and "file sizes"."""
    shared = os.path.commonprefix([*data.train.names, *data.val.names])
    start = shared.rfind(os.sep) + 1
    names: dict[str, Any] = {raw.name: _names(raw, start) for raw in (data.train, data.val)}
    names |= {"val_share": settings.val_share} if settings.layout == "mvtec" else {}
    return {"data": names, "file sizes": {raw.name: _sizes(raw) for raw in (data.train, data.val)}}


def _names(raw: RawSplit, start: int) -> str:
    digest = hashlib.sha256()
    for name in raw.names:
        digest.update(os.fsencode(name[start:]) + b"\n")
    return f"{len(raw.names)} images, {digest.hexdigest()[:16]}"


def _sizes(raw: RawSplit) -> list[int]:
    every = -(-len(raw.names) // MOST_SIZES) or 1
    return [os.path.getsize(name) if os.path.isfile(name) else 0 for name in raw.names[::every]]


def _few_differ(saved: dict[str, list[int]], now: dict[str, list[int]]) -> bool:
    """Whether files differ in size, but no more than one in twenty."""
    pairs = [pair for split in now for pair in zip(saved.get(split, []), now[split], strict=False)]
    return 0 < sum(a != b for a, b in pairs) <= max(1, len(pairs) // 20)


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
        saved |= {key: now[key] for key in ("data", "file sizes")}
        last, shared = (state["args"].get(key) for key in ("high_precision_last", "share_amax"))
        if saved["recipe"] and last not in (None, "0"):
            saved["levers"] = {**saved.get("levers", {}), "high_precision_last": int(last)}
        if saved["recipe"] and shared == "True":
            saved["share_amax"] = True
    if saved["data"] == now["data"] and _few_differ(saved.get("file sizes", {}), now.get("file sizes", {})):
        tell_once(
            "note: some images have another size on disk than when the checkpoint was written; it goes on with them."
        )
        saved["file sizes"] = now["file sizes"]
    if not (parallel and "ranks" in state):
        saved.pop("share_amax", None)
        if "share_amax" in now:
            saved["share_amax"] = True
    return saved
