"""Weights are quantized once for many passes under torch.no_grad, and every change of a weight is noticed."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.backend import native
from te_nvfp4_cv.layer import evaluation_cache, operands
from tests.helpers import same_bits, values

pytestmark = pytest.mark.skipif(native.load() is None, reason="the digest needs the compiled kernels")
Quantized = list[torch.Size]


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> Quantized:
    """Count the weights that are quantized; start with an empty cache."""
    monkeypatch.setattr(evaluation_cache, "_entries", {})
    counted: Quantized = []
    quantize = operands.quantize_weight

    def counting(w: torch.Tensor, *more: object, **named: object) -> object:
        counted.append(w.shape)
        return quantize(w, *more, **named)

    monkeypatch.setattr(operands, "quantize_weight", counting)
    return counted


def layer_and_x(dtype: torch.dtype = torch.float32) -> tuple[nn.Conv2d, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Conv2d(32, 48, 3, bias=False, dtype=dtype), values((2, 32, 6, 6), dtype=dtype)


def run(layer: nn.Module, x: torch.Tensor, backend: str = "integer", **options: object) -> torch.Tensor:
    with torch.no_grad(), nv.nvfp4_autocast(backend=backend, **options):
        return layer(x)


def fresh(layer: nn.Module, x: torch.Tensor, backend: str = "integer") -> torch.Tensor:
    """The result without a cache: with gradients on."""
    with nv.nvfp4_autocast(backend=backend):
        return layer(x).detach()


def test_a_weight_with_gaps_between_its_bytes_is_quantized_anew() -> None:
    layer, x = layer_and_x()
    wider = torch.cat([layer.weight.detach()] * 2, 1).to(memory_format=torch.channels_last)
    layer.weight = nn.Parameter(wider[:, :32])
    for _ in range(3):
        run(layer, x)
    layer.weight.data[-1] *= 3.0  # `_version` does not see it, and the last filter lies behind 48 * 32 * 9 values
    assert same_bits(run(layer, x), fresh(layer, x))


@pytest.mark.parametrize("backend", ["integer", "vendor", "reference"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_weight_is_quantized_at_its_first_two_passes(backend: str, mode: Callable, quantized: Quantized) -> None:
    layer, x = layer_and_x()
    expected = fresh(layer, x, backend)
    quantized.clear()
    for _ in range(5):
        with mode():
            assert same_bits(run(layer, x, backend), expected)
    assert len(quantized) == 2
    assert same_bits(fresh(layer, x, backend), expected) and len(quantized) == 3  # training does not ask the cache
    with torch.inference_mode() if mode is torch.no_grad else torch.no_grad():  # what one mode made serves the other
        assert same_bits(run(layer, x, backend), expected) and len(quantized) == 3


def flip(w: torch.Tensor, position: int, bit: int) -> None:
    """Flip one bit of the memory of w, past its _version."""
    bytes_of = w.data.numpy().reshape(-1).view("uint8")
    bytes_of[position] ^= 1 << bit


def test_every_flipped_bit_is_seen(quantized: Quantized) -> None:
    layer, x = layer_and_x()
    for _ in range(2):
        run(layer, x)
    size, version = layer.weight.numel() * 4, layer.weight._version
    generator = torch.Generator().manual_seed(0)
    for position in [0, size - 1, *torch.randint(0, size, (30,), generator=generator).tolist()]:
        quantized.clear()
        flip(layer.weight, position, position % 8)
        seen = run(layer, x)
        assert len(quantized) == 1 and layer.weight._version == version
        assert same_bits(seen, fresh(layer, x))
        quantized.clear()
        assert same_bits(run(layer, x), seen) and not quantized


def write_data(w: nn.Parameter) -> None:
    w.data.mul_(-1)  # every sign, which a sum of words would not see


def step_of_a_fused_optimizer(w: nn.Parameter) -> None:
    w.grad = torch.ones_like(w)
    torch.optim.AdamW([w], lr=0.1, fused=True).step()


def swap_halves(w: nn.Parameter) -> None:
    w.data.copy_(w.data.flip(0))


def replace_memory(w: nn.Parameter) -> None:
    w.data = w.data * 2 + 1


def other_strides(w: nn.Parameter) -> None:
    w.data = w.data.contiguous(memory_format=torch.channels_last)


CHANGES = (write_data, step_of_a_fused_optimizer, swap_halves, replace_memory, other_strides)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_of_a_weight_are_seen(change: Callable, quantized: Quantized) -> None:
    layer, x = layer_and_x()
    for _ in range(3):
        run(layer, x)
    change(layer.weight)
    expected = fresh(layer, x)
    for _ in range(3):
        assert same_bits(run(layer, x), expected)


def test_another_recipe_backend_or_dtype_has_codes_of_its_own(quantized: Quantized) -> None:
    layer, x = layer_and_x()
    one_d = nv.NVFP4BlockScaling(disable_2d_quantization=True)
    for _ in range(3):
        assert same_bits(run(layer, x), fresh(layer, x))
        assert same_bits(run(layer, x, "vendor"), fresh(layer, x, "vendor"))
        with nv.nvfp4_autocast(one_d, backend="integer"):
            expected = layer(x).detach()
        assert same_bits(run(layer, x, recipe=one_d), expected)
    low, x_low = layer_and_x(torch.bfloat16)
    for _ in range(3):
        assert same_bits(run(low, x_low), fresh(low, x_low))


def test_memory_is_that_of_the_weights_that_live(quantized: Quantized) -> None:
    layer, x = layer_and_x()
    for _ in range(2):
        run(layer, x)
    (entry,) = evaluation_cache._entries.values()
    assert entry.codes is not None and entry.unpacked is not None
    held = entry.unpacked.untyped_storage().nbytes() + sum(t.untyped_storage().nbytes() for t in entry.codes.flat())
    assert held <= 0.375 * 4 * layer.weight.numel() + 64
    del layer
    gc.collect()
    assert not evaluation_cache._entries


def test_no_more_weights_than_most(quantized: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_cache, "MOST", 2)
    layers, x = [nn.Linear(32, 32) for _ in range(5)], values((4, 32))
    for _ in range(3):
        for layer in layers:
            assert same_bits(run(layer, x), fresh(layer, x))
            assert len(evaluation_cache._entries) <= 2


def test_what_is_no_parameter_is_left_alone(quantized: Quantized) -> None:
    layer, x = layer_and_x()
    w = layer.weight.detach().clone()
    with torch.inference_mode():
        of_inference = nn.Parameter(w.clone(), requires_grad=False)
    for weight in (w, of_inference, nn.Parameter(values((48, 32, 3, 6))[..., ::2])):  # the last with gaps in memory
        quantized.clear()
        for _ in range(3):
            with torch.no_grad():
                nv.functional.conv2d(x, weight, backend="integer")
        assert len(quantized) == 3
    assert not evaluation_cache._entries


def test_threads_share_the_cache(quantized: Quantized) -> None:
    layer, x = layer_and_x()
    expected, wrong = fresh(layer, x), []

    def work() -> None:
        for _ in range(20):
            if not same_bits(run(layer, x), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_digest_depends_on_every_bit_and_on_order() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 127, 128, 129, 4096, (1 << 18) + 5, 3 << 18):
        t = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        seen = {native.digest(t)}
        positions = {0, size - 1, *torch.randint(0, size, (40,), generator=generator).tolist()}
        for position in positions:
            for bit in range(8):
                t[position] ^= 1 << bit
                seen.add(native.digest(t))
                t[position] ^= 1 << bit
        assert len(seen) == 1 + 8 * len(positions)
    parts = t.view(3, -1).clone()
    assert len({native.digest(parts[list(order)]) for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0))}) == 3  # chunks
    words = torch.arange(64, dtype=torch.int64)
    assert native.digest(words) != native.digest(words.view(4, 16).flip(0).contiguous())  # within a chunk
    signs = torch.randn(4096, generator=generator)
    assert len({native.digest(signs), native.digest(-signs), native.digest(signs.abs())}) == 3


def test_the_digest_is_that_of_one_thread() -> None:
    t = torch.randn(1 << 20)
    before = torch.get_num_threads()
    try:
        found = set()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(native.digest(t))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
