"""NVFP4Tensor: operators that act on codes, files, values elsewhere, usages, layouts."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle

import pytest
import torch

from te_nvfp4_cv import formats
from te_nvfp4_cv.tensor import layouts
from te_nvfp4_cv.tensor.nvfp4_tensor import BUFFERS, NVFP4Tensor
from tests.quantized import OPTIONS, assert_same, quantizer, sample


def shares(a: NVFP4Tensor, b: NVFP4Tensor) -> bool:
    pairs = [(getattr(a, n), getattr(b, n)) for n in BUFFERS if getattr(a, n) is not None]
    return all(first.data_ptr() == second.data_ptr() for first, second in pairs)


# ---- quantize and dequantize ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(4, 32), (2, 3, 20), (7,), (2, 16, 5, 17)])
def test_values_come_back_in_shape_and_dtype(shape, options):
    x = sample(*shape, dtype=torch.bfloat16)
    t = quantizer(**options)(x)
    assert t.shape == x.shape and t.dtype == x.dtype and t.device == x.device
    v = t.dequantize()
    assert type(v) is torch.Tensor and v.dtype == torch.bfloat16 and v.shape == x.shape
    assert float((v.float() - x.float()).norm() / x.float().norm()) < 0.2
    assert t.dequantize(torch.float32).dtype == torch.float32
    assert t.float().dtype == torch.float32 and t.half().dtype == torch.float16


def test_buffer_shapes():
    t = quantizer()(sample(2, 3, 20))
    assert t.rowwise_data.shape == (2, 3, 16) and t.rowwise_scale_inv.shape == (6, 2) and t.amax_rowwise.shape == (1,)
    assert t.columnwise_data.shape == (20, 8) and t.columnwise_scale_inv.shape == (20, 1)
    assert t.rowwise_scale_inv.dtype == torch.float8_e4m3fn and t.amax_columnwise.dtype == torch.float32
    q = t.quantizer
    assert q.get_scale_shape((2, 3, 20), False) == (6, 2) and q.get_scale_shape((2, 3, 20), True) == (20, 1)
    assert q.get_columnwise_shape((2, 3, 20)) == (20, 6)


def test_columnwise_face_stays_rotated_unless_asked():
    x = sample(32, 16)
    t = quantizer(with_rht=True)(x)
    rotated = formats.rht16(formats.blocks(x.t())).flatten(-2).t()
    seen = t.dequantize(face="columnwise")
    assert float((seen - rotated).norm() / x.norm()) < 0.2 < float((seen - x).norm() / x.norm())
    undone = t.dequantize(face="columnwise", undo_rht=True)
    assert float((undone - x).norm() / x.norm()) < 0.2
    columnwise_only = quantizer(with_rht=True, rowwise=False)(x)
    assert torch.equal(columnwise_only.dequantize(), undone)  # the values of the tensor are never rotated


def test_2d_faces_hold_the_same_values():
    t = quantizer(with_2d_quantization=True)(sample(40, 24))
    assert torch.equal(t.dequantize(), t.dequantize(face="columnwise"))


def test_dequantize_has_the_identity_as_gradient():
    t = quantizer()(sample(4, 32)).requires_grad_()
    weight = sample(4, 32, seed=1)
    (t.dequantize() * weight).sum().backward()
    assert torch.equal(t.grad, weight)


def test_stochastic_rounding_draws_from_the_default_generator():
    q, x = quantizer(stochastic_rounding=True), sample(64, 32)
    torch.manual_seed(3)
    first, second = q(x), q(x)
    torch.manual_seed(3)
    assert_same(q(x), first)
    assert not torch.equal(first.rowwise_data, second.rowwise_data)
    assert_same(q(x, seed=5), q(x, seed=torch.tensor(5)))


# ---- operators on codes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
def test_detach_clone_to_view_deepcopy_and_pickles(options):
    t = quantizer(**options)(sample(2, 3, 20))
    assert_same(t.detach(), t)
    assert shares(t.detach(), t)
    for other in (t.clone(), copy.deepcopy(t), pickle.loads(pickle.dumps(t)), t.to("cpu", copy=True)):
        assert_same(other, t)
        assert not shares(other, t)
    buffer = io.BytesIO()
    torch.save({"t": t}, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=True)["t"], t)
    flat = t.view(6, 20)
    assert flat.shape == (6, 20) and shares(flat, t)
    assert torch.equal(flat.dequantize(), t.dequantize().view(6, 20))
    assert_same(flat.reshape(2, 3, -1), t)
    assert_same(t[:], t)


def test_to_another_dtype_is_nominal():
    t = quantizer()(sample(4, 32))
    low = t.to(torch.bfloat16)
    assert type(low) is NVFP4Tensor and low.dtype == low.dequantize().dtype == torch.bfloat16
    assert torch.equal(low.rowwise_data, t.rowwise_data)


def test_meta_device():
    t = quantizer()(sample(4, 32)).to("meta")
    assert type(t) is NVFP4Tensor and t.device.type == t.rowwise_data.device.type == "meta"


def test_a_view_that_cuts_blocks_is_a_copy_of_values():
    t = quantizer()(sample(4, 32))
    with pytest.warns(UserWarning, match="dequantized copy"):
        cut = t.view(8, 16)
    assert type(cut) is torch.Tensor
    assert torch.equal(cut, t.dequantize().view(8, 16))


@pytest.mark.parametrize("face", ["rowwise", "columnwise"])
def test_a_view_has_as_many_elements(face):
    t = quantizer(**{"rowwise": False, "columnwise": False, face: True})(sample(4, 32))
    for size in ((3, 32), (8, 32), (-1, -1, 32)):
        with pytest.raises(RuntimeError, match="invalid for input|only one dimension"):
            t.view(size)
    assert t.view(-1, 2, 32).dequantize().shape == (2, 2, 32)


@pytest.mark.parametrize("options", OPTIONS)
def test_zero_(options):
    t = quantizer(**options)(sample(4, 32))
    assert t.zero_() is t
    assert not t.dequantize().any() and t.dequantize().isfinite().all()
    for name in BUFFERS:
        assert getattr(t, name) is None or not getattr(t, name).view(torch.uint8).any()


@pytest.mark.parametrize("options", OPTIONS)
def test_copy_between_equal_forms_copies_codes(options):
    q = quantizer(**options)
    src, dst = q(sample(4, 32, seed=1)), q(sample(4, 32, seed=2))
    pointers = [getattr(dst, n).data_ptr() for n in BUFFERS if getattr(dst, n) is not None]
    assert dst.copy_(src) is dst
    assert_same(dst, src)
    assert pointers == [getattr(dst, n).data_ptr() for n in BUFFERS if getattr(dst, n) is not None]


def test_copy_between_other_forms_quantizes_values():
    x = sample(32, 32, seed=1)
    dst = quantizer(with_2d_quantization=True)(sample(32, 32))
    dst.copy_(x)
    assert_same(dst, quantizer(with_2d_quantization=True)(x))
    row_only = quantizer(columnwise=False)(x)
    dst = quantizer()(sample(32, 32))
    dst.copy_(row_only)  # no stale columnwise face stays behind
    assert_same(dst, quantizer()(row_only.dequantize()))
    rotated = quantizer(with_rht=True)(sample(32, 32))
    rotated.copy_(quantizer()(x))
    assert rotated.columnwise_rht
    assert_same(rotated, quantizer(with_rht=True)(quantizer()(x).dequantize()))
    plain = torch.zeros(32, 32)
    plain.copy_(row_only)
    assert torch.equal(plain, row_only.dequantize())
    dst.copy_(torch.tensor(2.0))  # broadcasts
    assert torch.equal(dst.dequantize(), torch.full((32, 32), 2.0))


def test_copy_into_ntile():
    q = quantizer(with_rht=True)
    src = q(sample(2, 3, 16, 8))
    dst = q(sample(2, 3, 16, 8, seed=1)).to_columnwise_layout("ntile")
    dst.copy_(src)
    assert_same(dst.to_columnwise_layout("te"), src)
    dst.copy_(sample(2, 3, 16, 8, seed=2))
    assert_same(dst.to_columnwise_layout("te"), q(sample(2, 3, 16, 8, seed=2)))


# ---- every other operator -------------------------------------------------------------------------------------------


def test_operators_see_values():
    t, other = quantizer()(sample(4, 32)), sample(4, 32, seed=1)
    v = t.dequantize()
    for got, expected in (
        (t + other, v + other),
        (other * t, other * v),
        (t.sum(), v.sum()),
        (t[1:3], v[1:3]),
        (t.t(), v.t()),
        (torch.cat((t, other)), torch.cat((v, other))),
        (torch.stack([t, t]), torch.stack([v, v])),
        (torch.nn.functional.linear(other, t), torch.nn.functional.linear(other, v)),
    ):
        assert type(got) is torch.Tensor
        assert torch.equal(got, expected)
    assert torch.zeros_like(t).shape == t.shape


def test_in_place_operators_quantize_again():
    x = sample(4, 32)
    t = quantizer()(x)
    v = t.dequantize()
    assert t.mul_(2) is t
    assert_same(t, quantizer()(v * 2))
    t += 1
    assert_same(t, quantizer()(quantizer()(v * 2).dequantize() + 1))
    t.fill_(3.0)
    assert torch.equal(t.dequantize(), torch.full((4, 32), 3.0))
    torch.add(x, x, out=t)
    assert_same(t, quantizer()(x + x))
    with torch.no_grad():
        torch._foreach_mul_([t], 2.0)
    assert_same(t, quantizer()(quantizer()(x + x).dequantize() * 2))
    plain = x.clone()
    plain.add_(t)
    assert torch.equal(plain, x + t.dequantize())


def test_assignment_to_an_index_quantizes_again():
    t = quantizer()(sample(4, 32))
    for index, value in ((0, 3.0), (sample(4, 32) > 0, 0.0), ((slice(2), 5), sample(2))):
        v = t.dequantize()
        v[index] = t[index] = value
        assert_same(t, quantizer()(v))
    leaf = torch.nn.Parameter(t)
    with pytest.raises(RuntimeError, match="leaf"):
        leaf[0] = 1.0


def test_assignment_to_data():
    for options in ({}, {"with_rht": True}, {"columnwise": False}):
        p, other = (torch.nn.Parameter(quantizer(**options)(sample(16, 32, seed=seed))) for seed in (0, 1))
        p.data = other
        assert_same(p.data, other.data)
        p.data = p.data * 0.5  # plain values
        assert_same(p.data, quantizer(**options)(other.dequantize() * 0.5))
        assert p.requires_grad and isinstance(p, torch.nn.Parameter)
    p.data = quantizer()(sample(3, 48))
    assert p.shape == p.dequantize().shape == (3, 48) and p.get_usages()["columnwise"]
    with pytest.raises(RuntimeError, match="fix:"):
        quantizer()(sample(4, 32)).make_like(quantizer=None).data = sample(4, 32, seed=1)


def test_casts_of_a_module_keep_the_codes():
    layer = torch.nn.Linear(32, 16)
    layer.weight = torch.nn.Parameter(quantizer()(sample(16, 32)))
    codes = layer.weight.rowwise_data.clone()
    for cast, dtype in (("half", torch.float16), ("float", torch.float32), ("double", torch.float64)):
        assert getattr(layer, cast)().weight.dtype == dtype
        assert torch.equal(layer.weight.rowwise_data, codes)


def test_casts_to_integers_are_of_the_values():
    t = quantizer()(sample(4, 32))
    assert torch.equal(t.int().float(), t.dequantize().trunc()) and torch.equal(t.bool(), t.dequantize().bool())


def test_what_torch_does_past_its_dispatcher():
    t = quantizer()(sample(4, 32))
    v = t.dequantize()
    assert not t.is_shared() and t.share_memory_() is t and t.is_shared() and torch.equal(t.dequantize(), v)
    assert_same(t.apply_(lambda value: -value), quantizer()(-v))
    with pytest.raises(RuntimeError, match="DLPack"):
        torch.from_dlpack(t)


def test_writing_without_a_quantizer_raises():
    t = quantizer()(sample(4, 32)).make_like(quantizer=None)
    with pytest.raises(RuntimeError, match="fix:"):
        t.add_(1)
    assert not t.clone().zero_().dequantize().any()  # no quantizer is needed for that


def test_parameters():
    p = torch.nn.Parameter(quantizer(with_2d_quantization=True)(sample(16, 32)))
    layer = torch.nn.Linear(32, 16)
    layer.weight = p
    twin = copy.deepcopy(layer)
    assert isinstance(twin.weight, torch.nn.Parameter) and isinstance(twin.weight, NVFP4Tensor)
    assert isinstance(pickle.loads(pickle.dumps(layer)).weight, torch.nn.Parameter)
    x = sample(4, 32, seed=1)
    y = layer(x)
    assert torch.equal(y, torch.nn.functional.linear(x, p.dequantize(), layer.bias))
    y.sum().backward()
    assert type(p.grad) is torch.Tensor
    before = p.detach().dequantize()
    torch.optim.SGD([p], lr=0.5).step()
    assert type(p.data) is NVFP4Tensor
    assert float((p.detach().dequantize() - (before - 0.5 * p.grad)).norm() / before.norm()) < 0.3
    twin.load_state_dict(layer.state_dict())
    assert_same(twin.weight.data, p.data)


def test_compile_takes_and_returns_them():
    t, x = quantizer()(sample(16, 32)), sample(4, 32, seed=1)
    linear = torch.compile(lambda x, w: torch.nn.functional.linear(x, w), backend="aot_eager", fullgraph=True)
    assert torch.equal(linear(x, t), torch.nn.functional.linear(x, t))
    q = quantizer()
    made = torch.compile(lambda x: q(x), backend="aot_eager", fullgraph=True)(x)
    assert type(made) is NVFP4Tensor and made.quantizer is None
    assert torch.equal(made.rowwise_data, quantizer()(x).rowwise_data)


# ---- usages, layouts, errors ----------------------------------------------------------------------------------------


def test_update_usage():
    x = sample(40, 24)
    both, row = quantizer(with_2d_quantization=True)(x), quantizer(with_2d_quantization=True, columnwise=False)(x)
    row.update_usage(columnwise_usage=True)
    assert torch.equal(row.columnwise_data, both.columnwise_data)
    assert torch.equal(row.columnwise_scale_inv.view(torch.uint8), both.columnwise_scale_inv.view(torch.uint8))
    assert torch.equal(row.amax_columnwise, both.amax_columnwise)
    row.update_usage(rowwise_usage=False)
    assert row.get_usages() == {"rowwise": False, "columnwise": True} and row.rowwise_data is None
    for usages in ({"rowwise_usage": True}, {"columnwise_usage": False}):
        with pytest.raises(ValueError, match="face"):
            row.update_usage(**usages)
    assert row.get_usages()["columnwise"]
    plain = quantizer(columnwise=False)(x)
    with pytest.raises(ValueError, match="16x16"):
        plain.update_usage(columnwise_usage=True)
    with pytest.raises(ValueError, match="face"):
        plain.update_usage(rowwise_usage=False)
    for write in (lambda t, q: t.copy_(q(x * 3)), lambda t, q: q(x * 3, out=t)):  # codes without scales of tiles
        made = quantizer(with_2d_quantization=True, columnwise=False)(x)
        write(made, quantizer(columnwise=False))
        with contextlib.suppress(ValueError):  # there is no way to the other face then
            made.update_usage(columnwise_usage=True)
            assert torch.equal(made.dequantize(face="columnwise"), made.dequantize(face="rowwise"))
    made = quantizer(with_2d_quantization=True, columnwise=False)(x)
    made.update_usage(rowwise_usage=False, columnwise_usage=True)
    assert made.get_usages() == {"rowwise": False, "columnwise": True}


@pytest.mark.parametrize("shape", [(2, 3, 32, 8), (5, 16, 3), (2, 2, 2, 16, 4)])
def test_ntile_layout(shape):
    t = quantizer(with_rht=True)(sample(*shape))
    tiles = t.to_columnwise_layout("ntile")
    *spatial, batch, channels = shape
    assert tiles.columnwise_data.shape == (batch // 16, *spatial, channels, 8)
    assert tiles.columnwise_scale_inv.shape == (batch // 16, *spatial, channels)
    assert torch.equal(tiles.dequantize(face="columnwise"), t.dequantize(face="columnwise"))
    assert_same(tiles.to_columnwise_layout("te"), t)
    one = quantizer(with_rht=True)(sample(*shape)[(0,) * len(spatial)])  # 16 images at the first pixel, alone
    same_amax = quantizer(with_rht=True).quantize(
        sample(*shape)[(0,) * len(spatial)], amax=(t.amax_rowwise, t.amax_columnwise)
    )
    assert torch.equal(tiles.columnwise_data[(0, *(0,) * len(spatial))], same_amax.columnwise_data[:, :8])
    assert one.shape == (batch, channels)


def test_ntile_needs_16_images():
    with pytest.raises(ValueError, match="multiple of 16"):
        quantizer()(sample(2, 2, 12, 8)).to_columnwise_layout("ntile")


def test_swizzled_scales():
    t = quantizer()(sample(130, 80))
    swizzled = t.swizzled_scale_inv()
    assert swizzled.shape == (256, 8)
    back = layouts.unswizzle_scales(swizzled).view(torch.uint8)[:130, :5]
    assert torch.equal(back, t.rowwise_scale_inv.view(torch.uint8))
    assert t.swizzled_scale_inv("columnwise").shape == (128, 12)


def test_constructor_errors():
    t = quantizer()(sample(4, 32))
    with pytest.raises(ValueError, match="not complete"):
        t.make_like(amax_rowwise=None)
    with pytest.raises(ValueError, match="no face"):
        NVFP4Tensor(shape=(4, 32), dtype=torch.float32)
    with pytest.raises(ValueError, match="columnwise face is needed"):
        quantizer(columnwise=False)(sample(4, 32)).dequantize(face="columnwise")


def test_repr_says_what_is_there():
    assert repr(quantizer(with_rht=True)(sample(4, 32))) == (
        "NVFP4Tensor((4, 32), torch.float32, rowwise+columnwise, te, rht, device='cpu')"
    )
