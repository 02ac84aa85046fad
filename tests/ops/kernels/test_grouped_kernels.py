"""The Triton kernels of grouped linear layers, run in the interpreter or on the GPU that is there.

products    the bits of the linear layer's kernels, expert by expert, by FP4 products and by fp16
operands    the codes of the reference, though no host code knows where experts begin
the layer   the reference's results; bad offsets reach no memory that is not theirs
"""

from __future__ import annotations

import pytest
import torch

import te_nvfp4_cv as nv
from te_nvfp4_cv.layer.check import CallShape, Sizes, lowered
from te_nvfp4_cv.ops.experts import Experts
from te_nvfp4_cv.ops.geometry import ConvArgs, ConvGeometry, linear_geometry
from te_nvfp4_cv.ops.quantize import grouped as quantize
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.records import NONE, PACKED, Face, OperandSpec, WeightSpec
from tests.helpers import relative_error, same_bits, values
from tests.ops.kernels.gemm_helpers import WAYS, multiply_as

pytest.importorskip("triton", reason="triton is not installed")
from te_nvfp4_cv.ops.conv.triton import grouped, launch  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, OFFSETS = 90, [0, 50, 51, 51, 80]
CHANNELS, OUTPUTS = 144, 40


def geometry() -> ConvGeometry:
    x, w = Sizes((TOKENS, CHANNELS), torch.float32), Sizes((len(OFFSETS), OUTPUTS, CHANNELS), torch.float32)
    return lowered(CallShape("grouped_linear", x, w, None, ConvArgs())).geometry


def without_host(device: torch.device, offsets: list[int] = OFFSETS, own_scales: bool = False) -> Experts:
    """Return the experts of a GPU, whose offsets no host code may ask for."""
    dtype = torch.int32 if own_scales else torch.int64
    experts = Experts.of_sizes(torch.tensor(offsets, dtype=dtype, device=device), TOKENS, own_scales)
    experts.__dict__["rows"] = None
    return experts


def operands(device: torch.device, two_d: bool) -> dict[str, Face]:
    """Return the packed faces of random x, dy and w, quantized by the reference."""
    g, experts, made = geometry(), Experts(torch.tensor(OFFSETS), TOKENS), {}
    for seed, (name, channels) in enumerate((("x", CHANNELS), ("dy", OUTPUTS))):
        spec = OperandSpec(1, g.folds[0], PACKED, PACKED, True)
        value = values((TOKENS, channels), seed=seed)
        q = quantize.quantize_operand(value, experts, spec, torch.float32, None, None, "reference")
        made[f"{name} row"], made[f"{name} col"] = q.row, q.col
    w = values((g.channels_b, CHANNELS), seed=5)
    codes = operand.quantize_weight(
        w, WeightSpec(g.groups, PACKED, NONE if two_d else PACKED, two_d), torch.float32, "reference"
    )
    made["w row"], made["w col"] = codes.row, codes.row if two_d else codes.col
    return {name: Face(data.to(device), scale.to(device)) for name, (data, scale) in made.items()}


def part(w: Face, expert: int) -> Face:
    """Return one expert's part of a weight's face."""
    return Face(*(t.unflatten(0, (len(OFFSETS), -1))[expert] for t in w))


@pytest.mark.parametrize("way, two_d", list(zip(WAYS, [False, True, True], strict=True)))
def test_products_have_the_bits_of_a_loop(
    way: str, two_d: bool, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch, poison: None
) -> None:
    multiply_as(monkeypatch, kernel_device, way, (launch, grouped))
    g, q = geometry(), operands(kernel_device, two_d)
    known, hidden = Experts(torch.tensor(OFFSETS), TOKENS), without_host(kernel_device, own_scales=way == "fp4")
    alpha = torch.rand(len(OFFSETS), device=kernel_device) + 0.5
    alpha = alpha if way == "fp4" else alpha[:1]
    bias = values((len(OFFSETS), OUTPUTS), seed=9).to(kernel_device)
    one = [alpha[e % alpha.numel()].reshape(1) for e in range(len(OFFSETS))]
    y = grouped.fprop(q["x row"], q["w row"], alpha, bias, hidden, g, torch.float32)
    dx = grouped.dgrad(q["dy row"], q["w col"], alpha, hidden, g, torch.bfloat16)
    dw = grouped.wgrad(q["dy col"], q["x col"], alpha, hidden, g, torch.float32)
    parts = dw.unflatten(0, (len(OFFSETS), -1))
    for rows in known.rows:
        e, one_layer = rows.expert, linear_geometry(rows.end - rows.start, CHANNELS, OUTPUTS)
        x, dy = (Face(*(t[rows.here] for t in q[name])) for name in ("x row", "dy row"))
        x_col, dy_col = (Face(*(t[rows.block : rows.last] for t in q[name])) for name in ("x col", "dy col"))
        expected = launch.fprop(x, part(q["w row"], e), one[e], bias[e], one_layer, torch.float32)
        assert same_bits(y[rows.here], expected)
        assert same_bits(dx[rows.here], launch.dgrad(dy, part(q["w col"], e), one[e], one_layer, torch.bfloat16))
        assert same_bits(parts[e], launch.wgrad(dy_col, x_col, one[e], one_layer, torch.float32))
    assert not y[known.end :].any() and not dx[known.end :].any()
    assert not parts[0].any() and not parts[3].any()  # experts without rows


@pytest.mark.parametrize("rht, pow2", [(True, False), (False, True)])
def test_operands_have_the_reference_codes(rht: bool, pow2: bool, kernel_device: torch.device) -> None:
    x = values((TOKENS, 40), dtype=torch.bfloat16)
    x[OFFSETS[-1] :] = torch.nan  # rows of nobody, which must not be read for amaxes or columns
    spec = OperandSpec(1, geometry().folds[0], PACKED, PACKED, rht, pow2=pow2)
    hidden = without_host(kernel_device)
    made = quantize.quantize_operand(x.to(kernel_device), hidden, spec, torch.float32, None, None, "triton")
    known = Experts(torch.tensor(OFFSETS), TOKENS)
    expected = quantize.quantize_operand(x, known, spec, torch.float32, None, None, "reference")
    end, blocks = OFFSETS[-1], hidden.source_rows.view(-1, 16).amax(1) >= 0
    assert same_bits(made.row_amax.cpu(), expected.row_amax) and same_bits(made.col_amax.cpu(), expected.col_amax)
    for ours, theirs in zip(made.row, expected.row, strict=True):
        assert torch.equal(ours[:end].cpu(), theirs[:end])
    for ours, theirs in zip(made.col, expected.col, strict=True):
        assert torch.equal(ours[blocks].cpu(), theirs[: int(blocks.sum())])


def test_the_layer(kernel_device: torch.device) -> None:
    recipe = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)
    results = []
    for backend in ("reference", "triton"):
        x, w, bias = (
            values(shape, seed=i).to(kernel_device).requires_grad_()
            for i, shape in enumerate([(TOKENS, 32), (5, 48, 32), (5, 48)])
        )
        offsets = torch.tensor(OFFSETS, device=kernel_device)
        y = nv.functional.grouped_linear(x, w, offsets, bias, recipe=recipe, backend=backend)
        y.backward(values((TOKENS, 48), seed=4).to(kernel_device))
        results.append((y.detach(), x.grad, w.grad, bias.grad))
    for expected, ours in zip(*results, strict=True):
        assert ours is not None and expected is not None and relative_error(ours, expected) < 1e-5


@pytest.mark.parametrize("offsets", [[0, 70, 20, 71, 400], [-5, 1 << 30, 3, 3, 3]])
def test_bad_offsets_read_and_write_nothing_of_others(offsets: list[int], kernel_device: torch.device) -> None:
    """A GPU is not asked for its offsets: the kernels take the rows that are left after clamping."""
    hidden = without_host(kernel_device, offsets)
    ends = torch.tensor(offsets).cummax(0).values.clamp(0, TOKENS).tolist()
    x = values((TOKENS, 32)).to(kernel_device)
    sums = grouped.row_sums(x, hidden)
    assert int(hidden.source_rows.max()) < TOKENS
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        assert relative_error(sums[expert] + 1, x[start:end].sum(0) + 1) < 1e-5
