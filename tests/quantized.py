"""What the tests of NVFP4Tensor and NVFP4Quantizer share: settings to try, a sample, equality in bits."""

from __future__ import annotations

import torch

from te_nvfp4_cv.tensor.nvfp4_tensor import BUFFERS, NVFP4Tensor
from te_nvfp4_cv.tensor.quantizer import NVFP4Quantizer

OPTIONS = [
    {},
    {"with_rht": True},
    {"with_rht": True, "with_random_sign_mask": False},
    {"rowwise": False, "with_rht": True},
    {"columnwise": False},
    {"with_2d_quantization": True},
    {"row_scaled_nvfp4": True},
    {"nvfp4_use_4over6": True, "nvfp4_e4m3_max": 256},
]


def quantizer(**options) -> NVFP4Quantizer:
    return NVFP4Quantizer(**{"backend": "reference", **options})


def sample(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(a: NVFP4Tensor, b: NVFP4Tensor) -> None:
    """Equal buffers and settings, in different memory or the same."""
    assert type(a) is type(b) is NVFP4Tensor and a.dtype == b.dtype and a.shape == b.shape
    assert a.__tensor_flatten__()[1] == b.__tensor_flatten__()[1]
    for name in BUFFERS:
        first, second = getattr(a, name), getattr(b, name)
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first.view(torch.uint8), second.view(torch.uint8)), name
