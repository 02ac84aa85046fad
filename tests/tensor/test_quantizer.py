"""NVFP4Quantizer: settings, equality, pickles, usages, writing in place, amax reduction, refusals."""

from __future__ import annotations

import pickle

import pytest
import torch

from te_nvfp4_cv.tensor.nvfp4_tensor import BUFFERS
from te_nvfp4_cv.tensor.quantizer import NVFP4Quantizer
from tests.quantized import OPTIONS, assert_same, quantizer, sample


@pytest.mark.parametrize("options", OPTIONS)
def test_quantizer_equality_copies_and_pickles(options):
    q = quantizer(amax_reduction_group=lambda: "cannot be pickled", **options)
    twin = pickle.loads(pickle.dumps(q))
    assert twin == q == q.copy() and hash(twin) == hash(q) and twin.amax_reduction_group is None
    assert q != quantizer(**{**options, "stochastic_rounding": not options, "backend": "vendor"})
    assert eval(repr(q), {"NVFP4Quantizer": NVFP4Quantizer}) == q  # noqa: S307


def test_quantizer_usages_and_queries():
    q = quantizer()
    q.set_usage(columnwise=False)
    assert q.get_usages() == {"rowwise": True, "columnwise": False}
    assert q(sample(4, 32)).columnwise_data is None
    assert q.is_quantizable(sample(3, 5)) and not q.is_quantizable(torch.ones(4, dtype=torch.int32))
    assert q.is_requantization_safe() and not quantizer(stochastic_rounding=True).is_requantization_safe()
    assert q.calibrate(sample(4, 32)) is None
    assert quantizer(nvfp4_e4m3_max=256).nvfp4_e4m3_max == 448  # without 4over6


def test_quantize_into_out_and_noop_flag():
    q, x = quantizer(with_rht=True), sample(4, 32, seed=1)
    out = q.make_empty((4, 32))
    assert out.dtype == torch.float32
    assert q(x, out=out) is out
    assert_same(out, q(x))
    before = out.clone()
    q.update_quantized(sample(4, 32, seed=2), out, noop_flag=torch.ones(1))
    assert_same(out, before)
    out.quantize_(sample(4, 32, seed=2), noop_flag=torch.zeros(1))
    assert_same(out, q(sample(4, 32, seed=2)))
    with pytest.raises(ValueError, match="differ in shape"):
        q(sample(4, 16), out=out)


@pytest.mark.parametrize(("made", "writes"), [(False, True), (True, False)])
def test_scales_per_row_are_not_written_into_other_tensors(made, writes):
    t = NVFP4Quantizer(row_scaled_nvfp4=made, columnwise=False)(sample(32, 32))
    before = t.dequantize()
    with pytest.raises(ValueError, match="row_scaled_nvfp4 alike"):
        NVFP4Quantizer(row_scaled_nvfp4=writes, columnwise=False)(sample(32, 32, seed=1), out=t)
    assert torch.equal(t.dequantize(), before)


def test_a_noop_flag_leaves_no_other_way_of_reading():
    t = NVFP4Quantizer(with_rht=True, rowwise=False)(sample(32, 32))
    before = t.dequantize()
    with pytest.raises(ValueError, match="noop_flag"):
        NVFP4Quantizer(rowwise=False).update_quantized(sample(32, 32), t, noop_flag=torch.ones(1))
    assert torch.equal(t.dequantize(), before)
    row = NVFP4Quantizer(with_rht=True, columnwise=False)(sample(32, 32))  # no face is rotated
    NVFP4Quantizer().update_quantized(sample(32, 32, seed=1), row, noop_flag=torch.zeros(1))
    assert torch.equal(row.dequantize(), NVFP4Quantizer(columnwise=False)(sample(32, 32, seed=1)).dequantize())


@pytest.mark.parametrize("options", OPTIONS)
def test_make_empty_has_the_shapes_of_a_result(options):
    q = quantizer(**options)
    empty, full = q.make_empty((2, 3, 20), dtype=torch.bfloat16), q(sample(2, 3, 20, dtype=torch.bfloat16))
    for name in BUFFERS:
        first, second = getattr(empty, name), getattr(full, name)
        assert (first is None) == (second is None)
        assert first is None or (first.shape == second.shape and first.dtype == second.dtype)


def test_quantizing_an_nvfp4_tensor_and_given_amax():
    t = quantizer()(sample(16, 32))
    assert_same(quantizer()(t), quantizer()(t.dequantize()))
    amax = (torch.tensor([9.0]), torch.tensor([11.0]))
    u = quantizer(with_rht=True).quantize(sample(16, 32), amax=amax)
    assert u.amax_rowwise.item() == 9 and u.amax_columnwise.item() == 11


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"with_rht": True, "with_2d_quantization": True}, "two_d"),
        ({"row_scaled_nvfp4": True, "stochastic_rounding": True}, "row_scaled"),
        ({"row_scaled_nvfp4": True, "with_amax_reduction": True}, "no amax to reduce"),
        ({"nvfp4_use_4over6": True, "nvfp4_4over6_err_mode": "mse"}, "MSE"),
        ({"backend": "fast"}, "unknown backend"),
    ],
)
def test_quantizer_refuses_conflicts_when_built(options, words):
    with pytest.raises(ValueError, match=words):
        quantizer(**options)


@pytest.mark.parametrize("bad", [torch.ones(4, 4, dtype=torch.int32), torch.tensor(1.0), torch.ones(4, 4).double()])
def test_quantizer_refuses_bad_tensors(bad):
    with pytest.raises(ValueError, match="fix:"):
        quantizer()(bad)


def test_amax_reduction(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        q = quantizer(with_amax_reduction=True, with_rht=True)
        x = sample(16, 32)
        got, expected = q(x), quantizer(with_rht=True)(x)
        for name in BUFFERS:
            assert torch.equal(getattr(got, name).view(torch.uint8), getattr(expected, name).view(torch.uint8)), name
        x[0, 0] = float("nan")
        assert not q(x).amax_rowwise.isfinite().any()
    finally:
        torch.distributed.destroy_process_group()
