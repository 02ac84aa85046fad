"""Quantize a weight once for many forward passes under torch.no_grad, and notice every change of it.

Evaluation meets the same weights batch after batch. Their codes, or the integer backend's bytes, are kept here until
the weight dies. `_version` does not see all writes (`w.data.add_()`, some fused optimizers, other processes), so a
digest of every byte of the weight is compared at each use: that reads the weight once, where quantizing reads it twice
and computes. Only Parameters on a CPU are kept, from their second pass without a change on: one pass gains nothing.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from te_nvfp4_cv.backend import native
from te_nvfp4_cv.backend.swapping import gives_up
from te_nvfp4_cv.backend.torch_private import dispatch_modes
from te_nvfp4_cv.layer import operands
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.records import RECORDS, Face, WeightCodes

MOST = 4096  # weights


class _Entry(NamedTuple):
    """One weight; the last three are empty until it has been seen twice. Entries are replaced, never changed."""

    weight: weakref.ref[Tensor]
    key: tuple[Any, ...]
    digest: bytes = b""
    codes: WeightCodes | None = None
    unpacked: Tensor | None = None


# By id: tensors compare element by element. One reading or writing of a dict needs no lock.
_entries: dict[int, _Entry] = {}


@gives_up
def _forget(w: Tensor) -> None:
    _entries.pop(id(w), None)


def find(w: Tensor, plan: Plan) -> tuple[WeightCodes | None, Tensor | None]:
    """Return a weight's codes for fprop, and its integer panels if the plan multiplies those, or (None, None).

    Call it only where no gradient is wanted: the codes hold nothing for backward, and beside panels only the amax.
    """
    # A selective checkpoint counts operators, and wants the same ones when it runs the forward again.
    if dispatch_modes():
        return None, None
    # Without kernels there is no digest. An inference tensor has no _version.
    if type(w) is not Parameter or w.device.type != "cpu" or w.is_inference() or "fprop" not in plan.gemms:
        return None, None
    if not layouts.is_dense(w) or native.load() is None:  # the digest is that of consecutive bytes
        return None, None
    spec, g = plan.weight_specs[False], plan.geometry
    layout = (w.data_ptr(), w._version, w.shape, w.stride(), w.dtype)
    key = (*layout, spec, g.groups, g.transposed, plan.backend, plan.expert_scales)
    entry = _entries.get(id(w))
    if entry is None or entry.weight() is not w or entry.key != key:
        _remember(w, _Entry(_reference(w), key))
        return None, None
    digest = native.digest(w)
    if entry.digest != digest:
        codes, unpacked = _expand(w, plan)
        # Whoever writes to w meanwhile gets codes of mixed values, as without a cache, but not for long.
        entry = _Entry(entry.weight, key, digest, codes, unpacked)
        _remember(w, entry)
    return entry.codes, entry.unpacked


def _expand(w: Tensor, plan: Plan) -> tuple[WeightCodes, Tensor | None]:
    # A normal tensor serves passes under no_grad and under inference_mode alike.
    with torch.inference_mode(False), torch.no_grad():
        codes = operands.quantize_weight(w, plan, for_dgrad=False)
        if plan.operand_form != RECORDS:
            return codes, None
        empty = codes.row.data.new_empty(0)
        return WeightCodes(Face(empty, empty), Face(empty, empty), codes.amax), operands.weight_panels(codes, plan)


def _reference(w: Tensor) -> weakref.ref[Tensor]:
    number = id(w)
    return weakref.ref(w, lambda _: _entries.pop(number, None))


def _remember(w: Tensor, entry: _Entry) -> None:
    if len(_entries) >= MOST and id(w) not in _entries:
        _entries.clear()
    _entries[id(w)] = entry
