"""Gradients of a norm whose channels lie on ranks, as one rank of one sees them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from te_nvfp4_cv.distributed.tp_norm import _Normalize, _Together
from tests.helpers import relative_error, values


@pytest.mark.parametrize(("shape", "axis"), [((16,), 0), ((3, 16), 1), ((2, 3, 16), 2), ((2, 16, 3, 4), 1)])
def test_gradients_are_torchs(shape: tuple[int, ...], axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda t, group=None: None)
    x, w, bias = (values(s, seed=i).requires_grad_() for i, s in enumerate((shape, (16,), (16,))))
    y = _Normalize.apply(x, w, bias, _Together(None, axis, 16), 1e-5, torch.float32)
    expected = F.layer_norm(x.movedim(axis, -1), (16,), w, bias, 1e-5).movedim(-1, axis)
    dy = values(shape, seed=5)
    assert relative_error(y, expected) < 1e-6
    found, truth = (torch.autograd.grad(result, (x, w, bias), dy) for result in (y, expected))
    assert all(a.shape == b.shape and relative_error(a, b) < 1e-5 for a, b in zip(found, truth, strict=True))
