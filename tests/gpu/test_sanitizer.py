"""Small launches of every kernel with ragged sizes, for compute-sanitizer: it slows them down a hundredfold.

compute-sanitizer --error-exitcode 9 python -m pytest -m gpu tests/gpu/test_sanitizer.py
"""

from __future__ import annotations

import pytest
import torch

from te_nvfp4_cv.selftest import products, quantization, training
from te_nvfp4_cv.selftest.setting import Setting

pytestmark = pytest.mark.gpu
CHECKS = (
    quantization.activations,
    quantization.weights,
    quantization.unpacking,
    products.convolutions,
    products.linear_layers,
    training.norms,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_small_launches(check):
    assert check(Setting(torch.device("cuda", 0), "triton", small=True))
