"""Kept buffers: never shared while a tensor uses them, used again after; operands out of them equal the reference."""

from __future__ import annotations

import threading

import pytest
import torch

from te_nvfp4_cv.backend import scratch
from te_nvfp4_cv.ops.geometry import Fold
from te_nvfp4_cv.ops.layouts import for_one_call
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.records import DEQUANTIZED, OperandSpec
from tests.helpers import same_codes, values

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_buffers(monkeypatch):
    monkeypatch.setattr(scratch, "_buffers", [])


def test_a_buffer_is_used_again_only_when_no_tensor_refers_to_it():
    shape = (scratch.SMALL // 4 + 3,)
    first = for_one_call(shape, torch.float32, CPU)
    address, view = first.data_ptr(), first[5:]
    assert first.shape == shape and first.is_contiguous() and address % scratch.ALIGN == 0
    second = for_one_call(shape, torch.float32, CPU)
    assert second.data_ptr() != address
    del first
    assert for_one_call(shape, torch.bfloat16, CPU).data_ptr() not in (address, second.data_ptr())  # a view lives on
    del view
    assert for_one_call(shape, torch.float32, CPU).data_ptr() == address


def test_small_tensors_have_memory_of_their_own_and_few_buffers_are_kept():
    assert for_one_call((7,), torch.float32, CPU).untyped_storage().nbytes() == 28 and not scratch._buffers
    held = [for_one_call((scratch.SMALL + i,), torch.uint8, CPU).fill_(i) for i in range(scratch.KEEP + 3)]
    assert len(scratch._buffers) == scratch.KEEP
    assert all(bool((tensor == i).all()) for i, tensor in enumerate(held))


def test_large_operands_equal_the_reference_in_used_buffers_and_from_threads():
    x = values((32, 12, 12, 64), "wide", torch.bfloat16)
    spec = OperandSpec(1, Fold(1, 0, 12, 0, 32), DEQUANTIZED, DEQUANTIZED, True, True)
    args = (x, spec, torch.float32, torch.tensor([3]), None)
    expected = operand.quantize_operand(*args, "reference")
    assert expected.row.data.numel() * 4 >= scratch.SMALL
    same: list[bool] = []

    def work() -> None:
        for _ in range(5):
            for_one_call(tuple(x.shape), torch.float32, CPU).fill_(float("nan"))
            same.append(same_codes(expected, operand.quantize_operand(*args, "vendor")))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert same == [True] * 15
