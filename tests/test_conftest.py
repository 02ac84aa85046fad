"""The poison fixture really poisons: otherwise every test that relies on it would pass by luck."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_poison_floating(poison, dtype):
    x = torch.zeros(3, dtype=torch.float32)
    for tensor in (
        torch.empty(2, 3, dtype=dtype),
        torch.empty_like(x, dtype=dtype),
        x.new_empty(5, dtype=dtype),
        torch.empty_strided((2, 2), (1, 2), dtype=dtype),
        torch.empty(1, 4, 2, 2, dtype=dtype, memory_format=torch.channels_last),
    ):
        assert tensor.dtype == dtype and tensor.float().isnan().all()


def test_poison_integers(poison):
    assert (torch.empty(7, dtype=torch.uint8) == 255).all()
    assert (torch.empty(7, dtype=torch.int32) == -1).all()
    assert torch.empty(0).numel() == 0


def test_without_poison_nothing_is_patched():
    assert torch.empty.__name__ == "empty"


def test_seed_is_fixed():
    assert torch.initial_seed() == 0
