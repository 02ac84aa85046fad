"""nn.frozen_weights."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.errors import check_module, runtime_error
from te_nvfp4_cv.layer import operands, weight_codes
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.records import WeightCodes

_frozen_lock = threading.Lock()


class _FrozenWeight:
    """One Parameter inside frozen_weights: its codes, one set for each way in which the calls quantize it."""

    def __init__(self, name: str, weight: Tensor) -> None:
        self.name, self.weight, self.users = name, weight, 0
        self.version = weight._version
        self.digest: bytes | None = None
        self.sets: dict[tuple[Any, ...], WeightCodes] = {}

    def codes(self, w: Tensor, plan: Plan) -> WeightCodes:
        """The weight's codes, made at the first use."""
        self.check_version()
        key = (plan.weight_specs[True], plan.weight_faces, plan.compute_dtype, plan.backend)
        if key not in self.sets:
            if self.digest is None:
                self.digest = _digest(w)
            self.sets[key] = operands.quantize_weight(w, plan, for_dgrad=True)
        return self.sets[key]

    def check_version(self) -> None:
        """Raise if torch has counted a change."""
        if self.weight._version != self.version:
            raise _changed(self.name, "it was written to (an optimizer step, an in-place operation, load_state_dict)")

    def check_contents(self) -> None:
        """Raise if anything has changed, also through .data or a fused optimizer, which torch does not count."""
        self.check_version()
        if self.digest is not None and _digest(self.weight) != self.digest:
            raise _changed(self.name, "its contents differ (written through .data, or by a fused optimizer)")


def _digest(w: Tensor) -> bytes:
    data = w.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
    return hashlib.blake2b(data.numpy().data, digest_size=16).digest()


def _changed(name: str, how: str) -> RuntimeError:
    return runtime_error(
        f"nvfp4 frozen_weights: the weight {name!r} changed inside.",
        got=how,
        needs="weights that stay as they are: their codes were made at their first use",
        fix="call optimizer.step() and load weights after the with block",
    )


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """Quantize each weight once, at its first use inside, and reuse the codes: for gradient accumulation.

    The results are the same bits as without.

    Args:
        model: its Parameters with two or more axes are meant; a weight that is computed (parametrized, a slice) is
            quantized at every use.
    Raises:
        RuntimeError: a weight changed inside: at its next use where torch counts the change, otherwise at the end.
    """
    check_module("frozen_weights", model, "frozen_weights(model)")
    weights = {id(w): (name, w) for name, w in model.named_parameters() if w.dim() >= 2}
    with _frozen_lock:
        for key, (name, w) in weights.items():
            entry = weight_codes.frozen.setdefault(key, _FrozenWeight(name, w))
            entry.users += 1  # type: ignore[attr-defined]
    try:
        yield
        present = {id(w) for w in model.parameters()}
        for key, (name, _) in weights.items():
            if key not in present:
                raise _changed(name, "the module has another Parameter now")
            weight_codes.frozen[key].check_contents()  # type: ignore[attr-defined]
    finally:
        with _frozen_lock:
            for key in weights:
                entry = weight_codes.frozen[key]
                entry.users -= 1  # type: ignore[attr-defined]
                if not entry.users:  # type: ignore[attr-defined]
                    del weight_codes.frozen[key]
