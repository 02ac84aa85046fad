"""Quantize weights once for several forward and backward passes: gradient accumulation.

    with frozen_weights(model): several forward and backward passes, one optimizer step after

Refused: a weight that changes meanwhile. Torch counts most changes, and they are found at the weight's next use; a
digest of the contents finds the others at the end.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.backend import devices
from te_nvfp4_cv.backend.torch_private import unseen_by_checkpoints
from te_nvfp4_cv.errors import check_module, runtime_error
from te_nvfp4_cv.layer import operands, weight_codes
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.records import WeightCodes

_frozen_lock = threading.Lock()


class _FrozenWeight:
    """The codes of one Parameter inside frozen_weights, one set for each way in which calls quantize it."""

    def __init__(self, name: str, weight: Tensor) -> None:
        self.name, self.weight, self.users = name, weight, 0
        self.digest: bytes | None = None  # until the first use, before which a change does no harm
        self.version: int | None = None
        self.sets: dict[tuple[Any, ...], tuple[WeightCodes, Any]] = {}  # and the stream that has made them

    @unseen_by_checkpoints
    def codes(self, w: Tensor, plan: Plan) -> WeightCodes:
        """Return the weight's codes for a plan; the first use makes them."""
        self.check_version()
        # A graph that is captured here may be replayed after the next optimizer step, so it quantizes by itself.
        if devices.capturing(w):
            return operands.quantize_weight(w, plan, for_dgrad=True)
        # All that the codes depend on beside the weight. Two calls of a shared weight may differ in it.
        key = (plan.weight_specs[True], plan.weight_faces, plan.compute_dtype, plan.backend)
        if key not in self.sets:
            if self.digest is None:
                self.digest, self.version = _digest(w), _version(self.weight)
            # The first use may be an evaluation, and later ones save the codes for a backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self.sets[key] = operands.quantize_weight(w, plan, for_dgrad=True), devices.stream_of(w)
        codes, stream = self.sets[key]
        if stream is not None:
            devices.follow(stream, codes.flat())
        return codes

    def check_version(self) -> None:
        """Raise an error if torch has counted a change."""
        if self.digest is not None and _version(self.weight) != self.version:
            raise _changed(self.name, "it was written to (an optimizer step, an in-place operation, load_state_dict)")

    def check_contents(self) -> None:
        """Raise an error if anything has changed, also through .data or a fused optimizer, which torch does not count.

        The digest copies the weight to the CPU, so this runs once, at the end.
        """
        self.check_version()
        if self.digest is not None and _digest(self.weight) != self.digest:
            raise _changed(self.name, "its contents differ (written through .data, or by a fused optimizer)")


def _version(w: Tensor) -> int | None:
    """Return how often torch has counted a change of the weight; it does not count those of inference tensors."""
    return None if w.is_inference() else w._version


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

    The results have the same bits as without it.

    Args:
        model: Its Parameters with two or more axes are frozen. A weight that is computed (parametrized, a slice) is
            quantized at every use.
    Raises:
        RuntimeError: A weight changed inside. It is raised at the weight's next use if torch counts the change, and
            otherwise at the end.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> model = torch.nn.Conv2d(16, 16, 3)
        >>> with nv.frozen_weights(model):
        ...     for x in torch.randn(2, 16, 16, 8, 8):
        ...         with nv.nvfp4_autocast():
        ...             model(x).square().mean().backward()
    """
    check_module("frozen_weights", model, "frozen_weights(model)")
    # A lazy parameter has no axes yet, and stays the same object when it gets them.
    kernels = ((name, w) for name, w in model.named_parameters() if nn.parameter.is_lazy(w) or w.dim() >= 2)
    weights = {id(w): (name, w) for name, w in kernels}
    table: dict[int, Any] = weight_codes.frozen
    with _frozen_lock:
        for key, (name, w) in weights.items():
            table.setdefault(key, _FrozenWeight(name, w)).users += 1  # contexts may be nested, or in two threads
    try:
        yield
        present = {id(w) for w in model.parameters()}
        for key, (name, _) in weights.items():
            if key not in present:
                raise _changed(name, "the module has another Parameter now")
            table[key].check_contents()
    finally:
        with _frozen_lock:
            for key in weights:
                table[key].users -= 1
                if not table[key].users:
                    del table[key]
