"""What the tests of all_gather share: shards of a tensor, quantizers, equality of NVFP4Tensors in every bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import te_nvfp4_cv as nv
from te_nvfp4_cv import errors
from te_nvfp4_cv.tensor.nvfp4_tensor import BUFFERS, SETTINGS
from tests.helpers import same_bits

AXES = {"rows": 0, "height": 0, "batch": -2, "channel": -1}
FACES = {
    "row": {"rowwise": True, "columnwise": False},
    "col": {"rowwise": False, "columnwise": True},
    "both": {"rowwise": True, "columnwise": True},
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rht": {"with_rht": True},
    "rht without signs": {"with_rht": True, "with_random_sign_mask": False},
    "2d": {"with_2d_quantization": True},
    "4over6": {"nvfp4_use_4over6": True, "nvfp4_e4m3_max": 256},
}


def quantizer(kind: str = "plain", faces: str = "both", **options: Any) -> nv.NVFP4Quantizer:
    return nv.NVFP4Quantizer(**{"backend": "reference", **KINDS[kind], **FACES[faces], **options})


def shards_of(x: Tensor, dim: str, sizes: Sequence[int]) -> list[Tensor]:
    return list(x.split(list(sizes), AXES[dim]))


def packed(q: nv.NVFP4Quantizer, shard: Tensor, whole: Tensor, layout: str = "te") -> nv.NVFP4Tensor:
    """A shard quantized with the amaxes of the whole."""
    return q.quantize(shard, amax=q.measure(whole)).to_columnwise_layout(layout)


def assert_equal(got: nv.NVFP4Tensor, expected: nv.NVFP4Tensor, case: object = "") -> None:
    """Every buffer in bits, and every setting."""
    assert isinstance(got, nv.NVFP4Tensor) and got.shape == expected.shape and got.dtype == expected.dtype, case
    assert not got.requires_grad, case
    for name in BUFFERS:
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None), (case, name)
        assert a is None or (a.is_contiguous() and same_bits(a, b)), (case, name, a.shape, b.shape)
    for name in SETTINGS:
        assert getattr(got, name) == getattr(expected, name), (case, name)


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings of this library are errors: codes travel, not values."""
    errors._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="all_gather")
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised tensors hold NaN, 255 or -1."""
    from tests.conftest import _poisoned

    with pytest.MonkeyPatch.context() as patch:
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(Tensor, name, _poisoned(getattr(Tensor, name)))
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, _poisoned(getattr(torch, name)))
        yield


@contextmanager
def calls_counted() -> Iterator[list[int]]:
    """Bytes that arrive from others in each collective of torch.distributed called inside, in their order."""
    received: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_into_tensor", "all_gather_single", "all_reduce", "broadcast", "all_gather"):
            original = getattr(dist, name, None)
            if original is None:
                continue

            def counted(*args: Any, original: Any = original, name: str = name, **kwargs: Any) -> Any:
                assert name.startswith("all_gather_"), f"unexpected {name}"
                received.append(args[0].nbytes - args[1].nbytes)
                return original(*args, **kwargs)

            patch.setattr(dist, name, counted)
        yield received
