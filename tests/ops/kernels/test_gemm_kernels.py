"""The kernel behind nv.gemm's backend "triton", the decoding that it shares with convolutions, and the choice of tiles.

decoding   every byte of codes with every scale byte, exactly
products   equal float64 products of the dequantized operands, by FP4 products and by fp16
tiles      what a GPU gets follows from its compute capability, and is legal there
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from te_nvfp4_cv import formats
from te_nvfp4_cv.backend import dispatch, tuning
from te_nvfp4_cv.ops.gemm import reference
from te_nvfp4_cv.tensor.gemm import gemm
from te_nvfp4_cv.tensor.quantizer import NVFP4Quantizer
from tests.helpers import relative_error, same_bits
from tests.ops.kernels.gemm_helpers import WAYS, multiply_as, tolerance

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402

from te_nvfp4_cv.ops.conv.triton import launch as conv_launch  # noqa: E402, F401  (its tables are checked too)
from te_nvfp4_cv.ops.gemm.triton import launch  # noqa: E402
from te_nvfp4_cv.ops.triton import decode  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
ways = pytest.mark.parametrize("way", WAYS)
SCALES = 127  # bytes 0x00..0x7E
ROOT = Path(__file__).resolve().parents[3]


# ---- decoding -------------------------------------------------------------------------------------------------------


@triton.jit
def _decode(
    p_data, p_scale, p_low, p_high, ROWS: tl.constexpr, BLOCKS: tl.constexpr, QUADS: tl.constexpr, PTX: tl.constexpr
):
    o_row, o_byte, o_block = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCKS * 8), tl.arange(0, BLOCKS)
    data = tl.load(p_data + o_row * (BLOCKS * 8) + o_byte[None, :])
    scale = tl.load(p_scale + o_row * BLOCKS + o_block[None, :])
    low, high = decode.blocks_to_half(data, scale, ROWS, BLOCKS, QUADS, PTX)
    tl.store(p_low + o_row * (BLOCKS * 8) + o_byte[None, :], low)
    tl.store(p_high + o_row * (BLOCKS * 8) + o_byte[None, :], high)


def every_byte(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """data [128, 256] and scale [128, 32]: all bytes of codes with all scale bytes (row 127 repeats scale 0)."""
    data = torch.arange(256, dtype=torch.uint8).repeat(128, 1)
    scale = (torch.arange(128) % SCALES).to(torch.uint8)[:, None].repeat(1, 32)
    return data.to(device), scale.to(device)


def test_decoding_is_exact(kernel_device, poison):
    data, scale = every_byte(kernel_device)
    truth = formats.decode_blocks(data, scale.view(torch.float8_e4m3fn)).unflatten(-1, (-1, 2))
    quads = truth.unflatten(-2, (-1, 4, 2, 2)).transpose(-3, -4).reshape(truth.shape)  # (t, h, j) to (h, t, j)
    for ptx in (False, True) if kernel_device.type == "cuda" else (False,):
        for in_quads, expected in ((False, truth), (True, quads)):
            low, high = (torch.empty(data.shape, dtype=torch.float16, device=kernel_device) for _ in range(2))
            _decode[(1,)](data, scale, low, high, ROWS=128, BLOCKS=32, QUADS=in_quads, PTX=ptx)
            assert same_bits(low.float() * 128, expected[..., 0])
            assert same_bits(high.float() * 128, expected[..., 1])


# ---- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns", "blocks"), [(1, 1, 1), (33, 17, 3), (300, 20, 4), (40, 270, 17), (16, 48, 32)]
)
@ways
def test_products_equal_float64(rows, columns, blocks, way, kernel_device, monkeypatch, poison):
    multiply_as(monkeypatch, kernel_device, way, (launch,))
    parts = []
    for n in (rows, columns):
        data = torch.randint(0, 256, (n, blocks * 8), dtype=torch.uint8)
        scale = torch.randint(0, SCALES, (n, blocks), dtype=torch.uint8).view(torch.float8_e4m3fn)
        parts += [data.to(kernel_device), scale.to(kernel_device)]
    a, b = (formats.decode_blocks(*parts[i : i + 2]).double() for i in (0, 2))
    out = launch.multiply(*parts)
    assert out.dtype == torch.float32 and relative_error(out, a @ b.t()) <= tolerance(kernel_device)
    assert relative_error(out, reference.multiply(*parts)) <= tolerance(kernel_device)
    assert same_bits(launch.multiply(*parts), out)
    monkeypatch.setattr(launch, "WIDE_FROM", 1)
    assert same_bits(launch.multiply(*parts), out)


def test_empty_products(kernel_device, poison):
    data = torch.empty(0, 8, dtype=torch.uint8, device=kernel_device)
    scale = torch.empty(0, 1, dtype=torch.uint8, device=kernel_device).view(torch.float8_e4m3fn)
    some = torch.zeros(3, 8, dtype=torch.uint8, device=kernel_device)
    some_scale = torch.zeros(3, 1, dtype=torch.uint8, device=kernel_device).view(torch.float8_e4m3fn)
    assert launch.multiply(data, scale, some, some_scale).shape == (0, 3)
    nothing, no_scale = data.new_empty(3, 0), data.new_empty(3, 0).view(torch.float8_e4m3fn)
    assert same_bits(launch.multiply(nothing, no_scale, nothing, no_scale), torch.zeros(3, 3, device=kernel_device))


@pytest.mark.parametrize(("layout", "columnwise_layout"), [("TN", "te"), ("NN", "te"), ("NT", "te"), ("NT", "ntile")])
def test_gemm_of_tensors(layout, columnwise_layout, kernel_device):
    H, B = 3, 16
    rht = dict(with_rht=layout == "NT", backend="reference")
    x = torch.randn(H, B, 48, dtype=torch.bfloat16)
    dy = torch.randn(H, B, 32, dtype=torch.bfloat16)
    w = torch.randn(32, 48, dtype=torch.bfloat16)
    x_q, dy_q = (NVFP4Quantizer(**rht)(t).to_columnwise_layout(columnwise_layout) for t in (x, dy))
    w_q = NVFP4Quantizer(backend="reference", with_2d_quantization=True)(w)
    a, b = {"TN": (x_q, w_q), "NN": (dy_q, w_q), "NT": (dy_q, x_q)}[layout]
    expected = gemm(a, b, layout, torch.float32, backend="reference")
    bias = torch.randn(expected.shape[-1])
    a, b = a.to(kernel_device), b.to(kernel_device)
    got = gemm(a, b, layout, torch.float32, backend="triton")
    assert relative_error(got.cpu(), expected) <= tolerance(kernel_device)
    biased = gemm(a, b, layout, torch.bfloat16, bias=bias.to(kernel_device), backend="triton")
    assert same_bits(biased, (got + bias.to(kernel_device)).to(torch.bfloat16))


# ---- which tiles, which instructions --------------------------------------------------------------------------------

CAPABILITIES = {  # capability: (architecture whose tiles serve, FP4 tensor cores)
    (8, 0): (80, False),
    (8, 6): (80, False),
    (8, 9): (80, False),
    (9, 0): (90, False),
    (10, 0): (100, True),
    (10, 3): (100, True),
    (11, 0): (80, False),
    (12, 0): (120, True),
    (12, 1): (80, False),
}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_gpu_gets_what_its_capability_allows(capability, monkeypatch):
    arch, native = CAPABILITIES[capability]
    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    launch._gpu.cache_clear()
    gpu = launch.gpu_of(torch.device("cuda", 0))
    launch._gpu.cache_clear()
    assert gpu == launch.Gpu(arch, native, 132) and gpu.how["PTX"]
    assert native == dispatch.native_fp4(torch.device("cuda", 0))
    assert launch.gpu_of(torch.device("cpu")) == launch.Gpu(0, False, 2)


@pytest.mark.parametrize("kernel", ["gemm", "conv_data", "conv_weight"])
def test_tiles_are_legal(kernel):
    for arch, rows, columns, depth in itertools.product((0, 80, 90, 100, 120), (0, 5, 20), range(12), range(3, 13)):
        for native in (False, True) if arch == 0 else (arch >= 100,):
            key = (int(native), rows, columns, depth)
            for tile in (tuning.static(kernel, arch, key), *tuning._candidates[kernel](key)):
                if native:
                    assert tile["BK"] >= 64 and (arch == 0 or tile["BM"] == 128), (arch, key, tile)
                else:
                    assert tile["BM"] >= 64 and tile["BN"] >= 32 and tile["BK"] >= 32
                assert tile["BK"] <= max(64 if native else 32, 1 << depth)
            assert len(tuning._candidates[kernel](key)) <= 12
