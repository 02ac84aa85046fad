"""Dropout of whole channels: a channel that is zeroed is zeroed on all ranks, so one of them draws for all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from te_nvfp4_cv.distributed.spatial.tensor import handles, named, piece_of, place, refusal


@handles("dropout1d", "dropout2d", "dropout3d", "feature_dropout")
def _channels(function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    given = named("input p training inplace", args, kwargs)
    x, p = given["input"], float(given.get("p", 0.5))
    if x.placed.dim < 2:
        raise refusal(f"{function.__name__} of an image whose channels are cut", args)
    if not given.get("training", True) or p == 0:
        return x  # type: ignore[no-any-return]
    piece, layout = piece_of(x), x.placed
    keep = torch.rand(piece.shape[:2], device=piece.device).ge_(p).to(piece.dtype)
    dist.broadcast(keep, dist.get_global_rank(layout.group, 0), group=layout.group)
    kept = keep.view(*keep.shape, *(1,) * (piece.dim() - 2))
    return place(piece * (kept / (1 - p) if p < 1 else kept), layout)
