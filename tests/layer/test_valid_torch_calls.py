"""Valid torch calls that once went wrong: tiny images, in-place operations, transforms, odd arguments."""

from __future__ import annotations

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import te_nvfp4_cv as nv
from te_nvfp4_cv.ops.geometry import ConvArgs, padding_only
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.records import PACKED, WeightSpec
from tests.helpers import same_bits
from tests.networks import seen

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),  # torch.func.jvp's own
]


def dirty_heap() -> None:
    """Leave NaN where the next small tensors will lie, so that memory which a library never writes shows."""
    for size in (100, 1000, 3000, 5000, 20000):
        torch.full((size,), float("nan"))


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((16, 16, 1, 1), (16, 16, 3, 3), {"stride": 2, "padding": 1}),
        ((16, 16, 2, 2), (16, 16, 5, 5), {"stride": 3, "padding": 2}),
        ((3, 48, 2, 2), (93, 16, 1, 3), {"stride": (1, 3), "padding": (2, 2), "dilation": (2, 1), "groups": 3}),
    ],
)
@pytest.mark.parametrize("recipe", [nv.NVFP4BlockScaling(), nv.load_recipe("forward_only")], ids=["default", "forward"])
def test_taps_that_read_only_padding_have_no_gradient(shape, kernel, options, recipe):
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator).bfloat16().requires_grad_()
        w = torch.randn(kernel, generator=generator).bfloat16().requires_grad_()
        dirty_heap()
        y = nv.functional.conv2d(x, w, recipe=recipe, **options)
        y.sum().backward()
        exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, w))
        F.conv2d(exact_x, exact_w, **options).sum().backward()
        assert y.dtype == x.grad.dtype == w.grad.dtype == torch.bfloat16
        for got, want in ((x.grad, exact_x.grad), (w.grad, exact_w.grad)):
            assert torch.isfinite(got).all()
            assert (got.double() - want).norm() <= 0.5 * want.norm()
        assert not w.grad[exact_w.grad == 0].any()


def test_padding_only_rows_and_taps_by_brute_force():
    for a, b, kernel, stride, padding, dilation in (
        (1, 1, 3, 2, 1, 1),
        (8, 8, 3, 1, 1, 1),
        (2, 4, 1, 1, 1, 1),
        (7, 3, 3, 2, 0, 1),
    ):
        inside = torch.tensor([[0 <= p * stride - padding + t * dilation < a for t in range(kernel)] for p in range(b)])
        expected = not (inside.any(0).all() and inside.any(1).all())
        assert padding_only(a, b, kernel, stride, padding, dilation) == expected


def test_transposed_3d_with_padding_only_rows_trains():
    w = torch.randn(38, 16, 2, 3, 1).bfloat16()
    for _ in range(5):
        x = torch.randn(2, 38, 5, 9, 2).bfloat16().requires_grad_()
        y = nv.functional.conv_transpose3d(
            x, w, None, (3, 3, 2), (2, 0, 1), output_padding=(1, 1, 0), groups=2, dilation=(1, 1, 2)
        )
        y.sum().backward()
        assert y.shape == F.conv_transpose3d(x, w, None, (3, 3, 2), (2, 0, 1), (1, 1, 0), 2, (1, 1, 2)).shape
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("depth", "kernel", "transposed"), [(2, 3, False), (2, 2, True), (3, 3, False)])
def test_padded_3d_weight_gradients_on_small_volumes(depth, kernel, transposed):
    op = nv.functional.conv_transpose3d if transposed else nv.functional.conv3d
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(16, 32, depth, 5, 3, generator=generator).bfloat16()
        kernels = [
            torch.randn(32, 32, *[kernel] * 3, generator=generator.manual_seed(seed)).bfloat16() for _ in range(2)
        ]
        for w, backend in zip(kernels, ("vendor", "reference"), strict=True):
            torch.manual_seed(seed)
            dirty_heap()
            op(x, w.requires_grad_(), None, 1, 1, backend=backend).square().sum().backward()
        got, want = kernels[0].grad.double(), kernels[1].grad.double()
        assert (got - want).norm() <= 0.02 * want.norm()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_in_place_operations_after_one_pixel(activation):
    squeeze = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 16, 1), activation(inplace=True), nn.Conv2d(16, 32, 1)
    )
    with nv.nvfp4_autocast():
        squeeze(torch.randn(8, 32, 8, 8)).sum().backward()
        line = nn.Conv1d(32, 16, 4)(torch.randn(2, 32, 4)).add_(1)
    assert squeeze[1].weight.grad.abs().sum() > 0 and line.shape == (2, 16, 1)


def test_expanded_kernels_are_measured_by_their_own_values():
    base = torch.randn(16, 16, 3, 3)
    base[:, :, 0] *= 1000
    w = base[:, :, 1:2, :].expand(-1, -1, 3, 3)
    vendor, reference = (
        operand.quantize_weight(w, WeightSpec(1, PACKED), torch.bfloat16, backend)
        for backend in ("vendor", "reference")
    )
    assert all(same_bits(a, b) for a, b in zip(vendor.flat(), reference.flat(), strict=True))
    assert vendor.amax.item() == w.abs().max().item()


def test_a_place_for_the_result_is_written_to():
    w, x, place = nn.Parameter(torch.randn(16, 16)), torch.randn(4, 16), torch.full((4, 16), 7.0)
    with nv.nvfp4_autocast(), torch.no_grad():
        told = seen(lambda: F.linear(x, w, out=place))
    assert torch.equal(place, x @ w.T) and "out=" in told[0].reason


@pytest.mark.parametrize("shape", [(), (1,), (1, 16), (4, 16)], ids=str)
def test_a_bias_of_linear_may_be_broadcast(shape):
    w, x, bias = nn.Parameter(torch.randn(16, 16)), torch.randn(4, 16), torch.randn(shape)
    results = []
    with nv.nvfp4_autocast():
        told = seen(lambda: results.append(F.linear(x, w, bias)))
    assert torch.equal(results[0], F.linear(x, w, bias)) and "the bias is not" in told[0].reason


def test_numpy_integers_meta_tensors_and_empty_outputs():
    with nv.nvfp4_autocast():
        y = nn.Conv2d(16, 16, 3, stride=numpy.int64(2), padding=numpy.int64(1))(torch.randn(2, 16, 8, 8))
        meta = nn.Conv2d(16, 16, 3, device="meta")(torch.randn(2, 16, 8, 8, device="meta"))
        empty = nn.ConvTranspose2d(16, 16, 2, padding=1)(torch.randn(2, 16, 1, 1))
    assert y.shape == (2, 16, 4, 4) and meta.shape == (2, 16, 6, 6) and empty.shape == (2, 16, 0, 0)


def test_torch_func_and_forward_mode_run_as_in_torch():
    layer, x = nn.Linear(16, 16), torch.randn(4, 16)

    def loss(v: torch.Tensor) -> torch.Tensor:
        return F.relu(layer(v)).sum()

    plain = torch.func.grad(loss)(x), torch.func.vmap(layer)(x[None]), torch.func.jvp(layer, (x,), (x,))[1]
    with nv.nvfp4_autocast():
        inside = torch.func.grad(loss)(x), torch.func.vmap(layer)(x[None]), torch.func.jvp(layer, (x,), (x,))[1]
        quantized = layer(x)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    assert not torch.equal(quantized, layer(x))


def test_layers_that_ask_for_nvfp4_refuse_transforms():
    x, sizes = torch.randn(4, 16), torch.tensor([1, 4])
    layers = (nv.NVFP4Linear(16, 16), lambda v: nv.functional.grouped_linear(v, torch.ones(2, 16, 16), sizes))
    for layer in layers:
        for transformed in (torch.func.vmap(layer), lambda v, f=layer: torch.func.jvp(f, (v,), (v,))):
            with pytest.raises(RuntimeError, match=r"do not take a layer that asks for NVFP4[\s\S]*fix:"):
                transformed(x)
    with forward_ad.dual_level():
        assert layers[0](x).shape == (4, 16)  # nothing in it has a tangent


@pytest.mark.filterwarnings("ignore:nvfp4. too few:UserWarning")
def test_a_bias_with_a_tangent_is_refused():
    """Without gradients autograd does not see it, and the tangent was lost without a word."""
    x, w = torch.randn(4, 16), torch.ones(16, 16)
    stored = nv.export.quantize(nn.Sequential(nn.Linear(16, 16)), [x])[0]
    calls = {
        "linear": lambda bias: nv.functional.linear(x, w, bias),
        "conv2d": lambda bias: nv.functional.conv2d(x[..., None, None], w[..., None, None], bias),
        "grouped_linear": lambda bias: nv.functional.grouped_linear(x, w[None], torch.tensor([4]), bias[None]),
        "inference": lambda bias: stored.multiply(x, bias, ConvArgs()),
    }
    for name, call in calls.items():
        with torch.no_grad(), forward_ad.dual_level():
            bias = torch.zeros(16)
            assert call(bias).shape[:2] == (4, 16), name
            with pytest.raises(RuntimeError, match="forward-mode differentiation do not take"):
                call(forward_ad.make_dual(bias, torch.ones(16)))


def test_in_place_relu_of_a_leafs_view_is_refused_before_it_writes():
    x = torch.randn(4, 32, requires_grad=True)
    before = x.detach().clone()
    with nv.nvfp4_autocast(), pytest.raises(RuntimeError):
        F.relu_(x[1:3])
    assert torch.equal(x.detach(), before)
