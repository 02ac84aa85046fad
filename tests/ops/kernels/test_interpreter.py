"""The repaired interpreter computes as a GPU does: each thing it gets wrong unrepaired, by a kernel of its own."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402


@triton.jit
def _cast(source, target, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(target + index, tl.load(source + index).to(target.dtype.element_ty))


@triton.jit
def _dot(a, b, c, N: tl.constexpr):
    row, col = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tl.store(c + row * N + col, tl.dot(tl.load(a + row * N + col), tl.load(b + row * N + col)))


@triton.jit
def _dot_scaled(a, a_scale, b, b_scale, c, N: tl.constexpr, K: tl.constexpr):
    row, half, block = tl.arange(0, N), tl.arange(0, K // 2), tl.arange(0, K // 16)
    left = tl.load(a + row[:, None] * (K // 2) + half[None, :])
    right = tl.load(b + row[:, None] * (K // 2) + half[None, :])
    left_scale = tl.load(a_scale + row[:, None] * (K // 16) + block[None, :])
    right_scale = tl.load(b_scale + row[:, None] * (K // 16) + block[None, :])
    acc = tl.zeros((N, N), tl.float32)
    acc = tl.dot_scaled(left, left_scale, "e2m1", right.T, right_scale, "e2m1", acc)
    tl.store(c + row[:, None] * N + row[None, :], acc)


@triton.jit
def _invert(source, target, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(target + index, ~tl.load(source + index))


@triton.jit
def _loop(source, target, size, N: tl.constexpr):
    total = tl.zeros((N,), tl.float32)
    for start in range(0, size, N):
        total += tl.load(source + start + tl.arange(0, N))
    tl.store(target + tl.arange(0, N), total)


@triton.jit
def _halve(target, number):
    tl.store(target, number >> 1)
    tl.store(target + 1, number)


def test_arguments_beyond_int32(kernel_device: torch.device) -> None:
    for number in (2**31, 3 * 2**30, 2**32 - 2, 2**32):
        target = torch.empty(2, dtype=torch.int64, device=kernel_device)
        _halve[(1,)](target, number)
        assert target.tolist() == [number // 2, number]


def test_bf16_rounds_to_nearest(kernel_device: torch.device) -> None:
    source = torch.randn(1024, device=kernel_device)
    target = torch.empty(1024, dtype=torch.bfloat16, device=kernel_device)
    _cast[(1,)](source, target, N=1024)
    assert torch.equal(target, source.to(torch.bfloat16))


def test_e4m3_rounds_with_carry_and_saturates(kernel_device: torch.device) -> None:
    if kernel_device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no E4M3 type below compute capability 8.9")
    source = torch.randn(1024, device=kernel_device) * 100
    source[:4] = torch.tensor([7.97, 500.0, -1e6, 7.82])
    target = torch.empty(1024, dtype=torch.float8_e4m3fn, device=kernel_device)
    _cast[(1,)](source, target, N=1024)
    expected = source.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(target.view(torch.uint8), expected.view(torch.uint8))
    assert target[0].float() == 8.0 and target[1].float() == 448.0


def test_dot_of_bf16(kernel_device: torch.device) -> None:
    a, b = (torch.randn(32, 32, device=kernel_device).to(torch.bfloat16) for _ in range(2))
    c = torch.empty(32, 32, device=kernel_device)
    _dot[(1,)](a, b, c, N=32)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_dot_scaled_of_nvfp4(kernel_device: torch.device) -> None:
    from te_nvfp4_cv import formats

    if kernel_device.type == "cuda" and torch.cuda.get_device_capability()[0] < 10:
        pytest.skip("E4M3 block scales in tl.dot_scaled need Blackwell (the compiler of triton 3.6 stops on sm_90)")
    N, K = 128, 128
    a, b = (torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device=kernel_device) for _ in range(2))
    scales = [(torch.rand(N, K // 16, device=kernel_device) * 448).to(torch.float8_e4m3fn) for _ in range(2)]
    c = torch.empty(N, N, device=kernel_device)
    _dot_scaled[(1,)](a, scales[0], b, scales[1], c, N=N, K=K)
    left, right = (formats.decode_blocks(data, scale).double() for data, scale in zip((a, b), scales, strict=True))
    torch.testing.assert_close(
        c.double(), left @ right.t(), rtol=1e-5, atol=1e-5 * float((left @ right.t()).abs().max())
    )


def test_not_of_bytes(kernel_device: torch.device) -> None:
    source = torch.arange(256, dtype=torch.uint8, device=kernel_device)
    target = torch.empty_like(source)
    _invert[(1,)](source, target, N=256)
    assert torch.equal(target, 255 - source)


def test_loop_over_a_runtime_size(kernel_device: torch.device) -> None:
    source = torch.arange(128, dtype=torch.float32, device=kernel_device)
    target = torch.empty(32, device=kernel_device)
    _loop[(1,)](source, target, 128, N=32)
    assert torch.equal(target, source.view(4, 32).sum(0))
