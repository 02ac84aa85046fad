"""Decide whether two calls are the same run. A checkpoint is resumed only if all of this is equal (checkpoint.py):

    data         for training and validation, the number of images and a hash of their names below the data's folder;
                 the folder may move, but other images or another split are refused
    file sizes   of up to 256 of these images for each; if a few differ (a repaired file), a note says so
    share_amax   with several ranks only: one process has one tensor scale anyway

Older checkpoints, which do not describe the data, have no hash: they are resumed with a note, and --high-precision-last
and --share-amax are compared with the options that they contain.
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
    """Return the identity that this run's checkpoints contain; `data` comes from data_identity."""
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
    if settings.ema:
        identity["ema"] = settings.ema
    if settings.augment != ("flip",):
        identity["augment"] = list(settings.augment)
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
    """Describe the images for training and validation, as the entries "data" and "file sizes"."""
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
    """Return whether some files differ in size, but no more than one in twenty."""
    pairs = [pair for split in now for pair in zip(saved.get(split, []), now[split], strict=False)]
    return 0 < sum(a != b for a, b in pairs) <= max(1, len(pairs) // 20)


def saved_identity(state: dict[str, Any], now: dict[str, Any], parallel: bool) -> dict[str, Any]:
    """Return a checkpoint's identity in a form that is comparable with this run's.

    Args:
        state: The result of load_checkpoint.
        now: This run's identity.
        parallel: Whether this run has several ranks.
    """
    saved: dict[str, Any] = dict(state["identity"])
    if "data" not in saved:
        tell_once(
            "note: the checkpoint is from an earlier version, which did not record the images of its training.\n"
            "  The run continues with these data; make sure that they are the same."
        )
        saved |= {key: now[key] for key in ("data", "file sizes")}
        last, shared = (state["args"].get(key) for key in ("high_precision_last", "share_amax"))
        if saved["recipe"] and last not in (None, "0"):
            saved["levers"] = {**saved.get("levers", {}), "high_precision_last": int(last)}
        if saved["recipe"] and shared == "True":
            saved["share_amax"] = True
    if saved["data"] == now["data"] and _few_differ(saved.get("file sizes", {}), now.get("file sizes", {})):
        tell_once(
            "note: some image files changed their size since the checkpoint was written; the run continues with them."
        )
        saved["file sizes"] = now["file sizes"]
    if not (parallel and "ranks" in state):
        saved.pop("share_amax", None)
        if "share_amax" in now:
            saved["share_amax"] = True
    return saved
