"""te.Linear under te_plugin.recipe: bias, SR, shapes, and which products run in which precision.

The comparison is composed.written_out: this package's quantizers and GEMM, called one after the other.
"""

from __future__ import annotations

import pytest
import torch

from tests.integrations.te.process import with_te
from tests.integrations.te.recipes import SR_OFF, recipe


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(32, 64), (2, 3, 8, 48)])
@with_te
def test_bias(shape: tuple[int, ...], dtype: torch.dtype, stochastic: bool, backend: str) -> None:
    """Bias, its gradient, four dimensions, fp16, and SR with the seeds that torch.manual_seed gives."""
    import te_nvfp4_cv as nv
    from tests.integrations.te import composed

    r = nv.NVFP4BlockScaling(disable_stochastic_rounding=not stochastic)
    x, w, dy, bias = composed.operands(shape, 96, dtype)
    torch.manual_seed(3)
    got = composed.step(composed.linear(w, bias), x, dy, recipe(backend, disable_stochastic_rounding=not stochastic))
    torch.manual_seed(3)
    wanted = composed.written_out(x, w, dy, bias, r, backend)
    composed.same(got, wanted)
    without = composed.step(composed.linear(w), x, dy, recipe(backend, **SR_OFF))
    moved = got.y.float() - without.y.float()
    torch.testing.assert_close(moved, bias.float().expand_as(moved), rtol=0.02, atol=0.1)


@pytest.mark.parametrize(("rows", "k", "n"), [(8, 48, 24), (24, 16, 8), (40, 80, 56), (0, 64, 96)])
@with_te
def test_lengths_that_are_padded(rows: int, k: int, n: int) -> None:
    """Rows and outputs that are no multiple of 16, a contraction that is none of 32: TE's reference refuses these."""
    import te_nvfp4_cv as nv
    from tests.integrations.te import composed

    x, w, dy, bias = composed.operands((rows, k), n)
    got = composed.step(composed.linear(w, bias), x, dy, recipe(**SR_OFF))
    composed.same(got, composed.written_out(x, w, dy, bias, nv.NVFP4BlockScaling(**SR_OFF)))
    if rows:
        plain = x.float() @ w.float().t() + bias.float()
        assert (got.y.float() - plain).norm() < 0.2 * plain.norm()


@with_te
def test_stochastic_rounding() -> None:
    """Two draws differ, one seed repeats, y does not depend on it, the mean of draws approaches the exact gradient."""
    import te_nvfp4_cv as nv
    from tests.integrations.te import composed

    x, w, dy, _ = composed.operands((64, 64), 64)
    layer = composed.linear(w)

    def draw() -> composed.Step:
        return composed.step(layer, x, dy, recipe())

    torch.manual_seed(7)
    first, second = draw(), draw()
    rest = torch.rand(3)
    torch.manual_seed(7)
    again = draw()
    composed.same(first, again, "the same seed")
    assert torch.equal(first.y, second.y)
    assert not torch.equal(first.dx, second.dx) and not torch.equal(first.dw, second.dw)
    torch.manual_seed(7)
    assert torch.equal(rest, torch.rand(3)), "stochastic rounding moved torch's own generator"

    nearest = composed.step(layer, x, dy, recipe(**SR_OFF))
    q = nv.NVFP4Quantizer(with_2d_quantization=True, columnwise=False, backend="reference")(layer.weight)
    unrounded = dy.float() @ q.dequantize(torch.float32)  # what SR is unbiased about: dy as it is, w as quantized
    draws = [draw().dx.float() for _ in range(64)]
    mean_error = (torch.stack(draws).mean(0) - unrounded).norm()
    assert mean_error < 0.3 * (draws[0] - unrounded).norm(), "64 draws shrink the error by 8 where there is no bias"
    assert mean_error < 0.5 * (nearest.dx.float() - unrounded).norm()


@with_te
def test_codes_are_adjacent() -> None:
    """A stochastic code is one of the value's two neighbours: at most one step from nearest rounding."""
    from transformer_engine.pytorch.quantization import QuantizerRole

    from te_nvfp4_cv import formats

    role = QuantizerRole("linear", "grad_output")
    dy = torch.randn(64, 128, dtype=torch.bfloat16)
    sr, rn = (recipe(disable_stochastic_rounding=off).qfactory(role)(dy) for off in (False, True))
    for face in ("rowwise_sub_storage", "columnwise_sub_storage"):
        a, b = getattr(sr, face), getattr(rn, face)
        assert torch.equal(a.scale.view(torch.uint8), b.scale.view(torch.uint8))
        codes = [formats.unpack_nibbles(t.data).int() for t in (a, b)]
        signs, sizes = zip(*((c >> 3, c & 7) for c in codes), strict=True)
        assert (sizes[0] - sizes[1]).abs().max() == 1
        assert torch.equal(signs[0], signs[1])


@pytest.mark.parametrize("gemms", [("fprop",), ("dgrad",), ("wgrad",), ("fprop", "dgrad", "wgrad")])
@with_te
def test_high_precision_gemms(gemms: tuple[str, ...]) -> None:
    """The named products are those of the operands as they are, the others stay NVFP4, bias included."""
    import te_nvfp4_cv as nv
    from tests.integrations.te import composed

    x, w, dy, bias = composed.operands((64, 64), 96)
    got = composed.step(composed.linear(w, bias), x, dy, recipe(high_precision_gemms=gemms, **SR_OFF))
    low = composed.written_out(x, w, dy, bias, nv.NVFP4BlockScaling(**SR_OFF))
    x32, w32, dy32 = x.float(), w.float(), dy.float()
    high = composed.Step(
        (x32 @ w32.t() + bias.float()).bfloat16(), (dy32 @ w32).bfloat16(), (dy32.t() @ x32).bfloat16(), low.db
    )
    names = {"y": "fprop", "dx": "dgrad", "dw": "wgrad"}
    wanted = composed.Step(*(getattr(high if gemm in gemms else low, name) for name, gemm in names.items()), low.db)
    composed.same(got, wanted, str(gemms))


@pytest.mark.parametrize("mode", ["high_precision", "dequantized"])
@with_te
def test_backward_override(mode: str) -> None:
    """dgrad and wgrad in high precision, of the original operands or of fprop's dequantized ones."""
    import te_nvfp4_cv as nv
    from tests.integrations.te import composed

    x, w, dy, bias = composed.operands((64, 64), 96)
    got = composed.step(composed.linear(w, bias), x, dy, recipe(backward_override=mode))
    bx, bw = x, w
    if mode == "dequantized":
        bx = nv.NVFP4Quantizer(columnwise=False)(x).dequantize()
        bw = nv.NVFP4Quantizer(columnwise=False, with_2d_quantization=True)(w).dequantize()
    dx, dw = (dy.float() @ bw.float()).bfloat16(), (dy.float().t() @ bx.float()).bfloat16()
    low = composed.written_out(x, w, dy, bias, nv.NVFP4BlockScaling(**SR_OFF))
    composed.same(got, composed.Step(low.y, dx, dw, dy.float().sum(0).bfloat16()))


@with_te
def test_torch_autocast() -> None:
    """fp32 parameters under torch.autocast to bf16: x and the results are bf16, w is quantized from fp32."""
    import transformer_engine.pytorch as te

    import te_nvfp4_cv as nv
    from tests.integrations.te import composed

    x, w, dy, _ = composed.operands((64, 64), 96, torch.float32)
    layer = composed.linear(w)
    x, dy = x.bfloat16(), dy.bfloat16()
    for mode in (None, "dequantized"):
        leaf = x.float().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16), te.autocast(recipe=recipe(backward_override=mode, **SR_OFF)):
            y = layer(leaf)
        y.backward(dy)
        qx = nv.NVFP4Quantizer(columnwise=False)(x)
        qw = nv.NVFP4Quantizer(with_2d_quantization=True)(w)
        qdy = nv.NVFP4Quantizer(columnwise=False)(dy)
        assert torch.equal(y, nv.gemm(qx, qw, "TN", torch.bfloat16))
        dx = nv.gemm(qdy, qw, "NN", torch.bfloat16) if mode is None else dy.float() @ qw.dequantize().bfloat16().float()
        assert torch.equal(leaf.grad, dx.bfloat16().float()), mode


@with_te
def test_nested_autocast() -> None:
    """The innermost te.autocast decides; without one a layer runs as it is."""
    import transformer_engine.pytorch as te

    from tests.integrations.te import composed

    x, w, dy, bias = composed.operands((32, 64), 96)
    layer = composed.linear(w, bias)
    outer, inner = recipe(**SR_OFF), recipe(disable_2d_quantization=True, **SR_OFF)
    with te.autocast(recipe=outer):
        a = layer(x)
        with te.autocast(enabled=False):
            b = layer(x)
        with te.autocast(recipe=inner):
            c = layer(x)
        d = layer(x)
    e = layer(x)
    plain = (x.float() @ w.float().t() + bias.float()).bfloat16()
    assert torch.equal(b, plain) and torch.equal(e, plain)
    assert torch.equal(a, d) and not torch.equal(a, plain) and not torch.equal(a, c)
    assert torch.equal(c, composed.step(composed.linear(w, bias), x, dy, inner).y)


@with_te
def test_precision_table() -> None:
    """A [precision] table goes by the modules' names: None, another recipe, children by their prefix, the last wins."""
    import te_nvfp4_cv as nv
    from te_nvfp4_cv import te_plugin
    from tests.integrations.te import composed

    r = nv.NVFP4BlockScaling(
        precision={"head": None, "body*": nv.NVFP4BlockScaling(disable_2d_quantization=True, **SR_OFF), "body.z": None},
        **SR_OFF,
    )
    x, w, dy, bias = composed.operands((32, 64), 96)
    ys = {
        name: composed.step(composed.linear(w, bias, name=name), x, dy, te_plugin.recipe(r, backend="reference")).y
        for name in ("stem", "head", "head.fc", "body.a", "body.z")
    }
    plain = (x.float() @ w.float().t() + bias.float()).bfloat16()
    assert torch.equal(ys["stem"], composed.step(composed.linear(w, bias), x, dy, recipe(**SR_OFF)).y)
    assert torch.equal(ys["head"], plain) and torch.equal(ys["head.fc"], plain) and torch.equal(ys["body.z"], plain)
    one_d = composed.step(composed.linear(w, bias), x, dy, recipe(disable_2d_quantization=True, **SR_OFF)).y
    assert torch.equal(ys["body.a"], one_d) and not torch.equal(one_d, ys["stem"])
