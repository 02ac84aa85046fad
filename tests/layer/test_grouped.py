"""Grouped linear layers: bit for bit a loop over experts, whatever the routing; torch's grouped product taken over."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.layer import forward_backward, operands
from te_nvfp4_cv.layer.forward_backward import Like
from te_nvfp4_cv.layer.options import CallOptions
from te_nvfp4_cv.layer.plan import plan_for
from te_nvfp4_cv.ops.conv import integer
from te_nvfp4_cv.ops.experts import Experts
from te_nvfp4_cv.ops.geometry import linear_geometry
from te_nvfp4_cv.ops.quantize import cpu, grouped, rounding_seeds
from te_nvfp4_cv.recipe.fields import Role
from tests.helpers import relative_error, same_bits, values

BACKENDS = ("reference", "integer", "vendor")
ROUTINGS = {  # of 75 tokens to four experts
    "an expert without rows": [20, 20, 53, 75],
    "all to one": [0, 0, 75, 75],
    "whole blocks": [16, 48, 64, 75],
    "rows of nobody": [3, 19, 20, 61],
    "no rows": [0, 0, 0, 0],
}
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "no RHT": dict(disable_rht=True),
    "1x16 weights": dict(disable_2d_quantization=True),
    "powers of two": dict(tensor_scale="current_pow2"),
    "4over6": dict(nvfp4_4over6="all", disable_rht=True),
}
Results = dict[str, Tensor | None]


def call(routing: str = "an expert without rows", dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return x [75, 40], w [4, 48, 40], bias, dy and offsets, with experts of different magnitudes."""
    sizes = torch.tensor([1.0, 8.0, 0.1, 3.0])
    x, w = values((75, 40), dtype=dtype), (values((4, 48, 40), seed=1) * sizes.view(4, 1, 1)).to(dtype)
    bias, dy = values((4, 48), dtype=dtype, seed=2), values((75, 48), dtype=dtype, seed=3)
    return x, w, bias, dy, torch.tensor(ROUTINGS[routing])


def ranges(offsets: Tensor) -> list[tuple[int, int, int]]:
    """Return (expert, first row, end) of each expert that has rows."""
    ends = offsets.tolist()
    pairs = zip([0, *ends[:-1]], ends, strict=True)
    return [(expert, start, end) for expert, (start, end) in enumerate(pairs) if end > start]


def step(recipe: Any, backend: str, x: Tensor, w: Tensor, bias: Tensor, dy: Tensor, offsets: Tensor) -> Results:
    x, w, bias = (t.clone().requires_grad_() for t in (x, w, bias))
    y = nv.functional.grouped_linear(x, w, offsets, bias, recipe=recipe, backend=backend)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "dw": w.grad, "db": bias.grad}


class Given:
    """Amaxes that are the same for every expert."""

    group = None

    def __init__(self, amaxes: dict[Role, Tensor]) -> None:
        self.amaxes = amaxes

    def amax(self, role: Role, operand: Tensor) -> Tensor:
        return self.amaxes[role]

    def collector(self, role: Role) -> None:
        return None

    def take_move(self) -> None:
        return None

    def backward_ran(self) -> None:
        return None


def loop(
    recipe: Any, backend: str, x: Tensor, w: Tensor, bias: Tensor, dy: Tensor, offsets: Tensor, seed: int
) -> Results:
    """Run one linear layer per expert, with the amaxes of all experts' rows and seed + expert."""
    amaxes: dict[Role, Tensor] = {}
    for role, operand in ((Role.INPUT, x), (Role.GRAD_OUTPUT, dy)):
        rotated = [torch.zeros(2)]
        for _, start, end in ranges(offsets):
            plan = plan_for(linear_geometry(end - start, 40, 48), recipe, backend, x.dtype, False)
            fold = plan.folds[0]
            spec = plan.input_specs[True]._replace(fold=fold, rht=recipe.settings(role).rht)
            rotated.append(operands.operand.measure_operand(operand[start:end], spec, backend))
        amaxes[role] = torch.stack(rotated).amax(0)
    scales: Any = Given(amaxes)
    y, dx, dw, db = torch.zeros(75, 48).to(x), torch.zeros_like(x), torch.zeros_like(w), torch.zeros_like(bias)
    for expert, start, end in ranges(offsets):
        plan = plan_for(linear_geometry(end - start, 40, 48), recipe, backend, x.dtype, False)
        codes = operands.quantize_weight(w[expert], plan, True, w.abs().amax().float().reshape(1))
        options = CallOptions(codes=codes, scales=scales)
        y[start:end], saved = forward_backward.forward(x[start:end], w[expert], bias[expert], plan, True, True, options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rounding_seeds, "draw_seed", lambda like, e=expert: torch.tensor([seed + e]))
            like = Like.of(x[start:end], w[expert], bias[expert])
            grads = forward_backward.backward(dy[start:end], saved, plan, like, (True, True, True), options)
        dx[start:end], dw[expert], db[expert] = grads  # type: ignore[assignment]
    return {"y": y, "dx": dx, "dw": dw, "db": db}


def expect_same(ours: Results, expected: Results) -> None:
    for name, value in expected.items():
        mine = ours[name]
        assert mine is not None and value is not None and same_bits(mine, value), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_equals_a_loop_over_experts_with_shared_scales(
    backend: str, routing: str, monkeypatch: pytest.MonkeyPatch, poison: None
) -> None:
    recipe = nv.NVFP4BlockScaling()
    monkeypatch.setattr(rounding_seeds, "draw_seed", lambda like: torch.tensor([1234]))
    expect_same(step(recipe, backend, *call(routing)), loop(recipe, backend, *call(routing), seed=1234))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*RECIPES, "bf16"])
def test_equals_a_loop_for_every_recipe(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = nv.NVFP4BlockScaling(**RECIPES.get(name, {}))
    monkeypatch.setattr(rounding_seeds, "draw_seed", lambda like: torch.tensor([1234]))
    given = call(dtype=torch.bfloat16 if name == "bf16" else torch.float32)
    expect_same(step(recipe, backend, *given), loop(recipe, backend, *given, seed=1234))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_of_each_expert_are_those_of_single_layers(backend: str) -> None:
    """With grouped_scale="expert" the layer is torch's way to write it: F.linear for each expert."""
    recipe = nv.NVFP4BlockScaling(grouped_scale="expert", disable_stochastic_rounding=True)
    x, w, bias, dy, offsets = call("rows of nobody")
    ours = step(recipe, backend, x, w, bias, dy, offsets)
    x, w, bias = (t.clone().requires_grad_() for t in (x, w, bias))
    for expert, start, end in ranges(offsets):
        y = nv.functional.linear(x[start:end], w[expert], bias[expert], recipe=recipe, backend=backend)
        y.backward(dy[start:end])
        assert ours["y"] is not None and same_bits(ours["y"][start:end], y.detach())
    expect_same(ours, {"dx": x.grad, "dw": w.grad, "db": bias.grad})
    shared = step(replace(recipe, grouped_scale="operand"), backend, *call("rows of nobody"))
    assert shared["y"] is not None and not same_bits(shared["y"], ours["y"])  # type: ignore[arg-type]


def test_one_expert_is_a_linear_layer() -> None:
    x, w, bias, dy, _ = call()
    torch.manual_seed(3)
    ours = step(None, "auto", x, w[:1], bias[:1], dy, torch.tensor([75]))
    torch.manual_seed(3)
    x, v, b = x.requires_grad_(), w[0].clone().requires_grad_(), bias[0].clone().requires_grad_()
    y = nv.functional.linear(x, v, b)
    y.backward(dy)
    assert same_bits(ours["y"], y.detach()) and same_bits(ours["dx"], x.grad)  # type: ignore[arg-type]
    assert same_bits(ours["dw"][0], v.grad) and same_bits(ours["db"][0], b.grad)  # type: ignore[index, arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "fields",
    [
        dict(high_precision_gemms=("fprop",)),
        dict(high_precision_gemms=("dgrad", "wgrad")),
        dict(backward_override="dequantized", grouped_scale="expert"),
        dict(backward_override="dequantized"),
    ],
    ids=str,
)
def test_gemms_in_high_precision(backend: str, fields: dict[str, Any]) -> None:
    x, w, bias, dy, offsets = call()
    ours = step(nv.NVFP4BlockScaling(**fields), backend, x, w, bias, dy, offsets)
    x, w, bias = (t.clone().requires_grad_() for t in (x, w, bias))
    torch.cat([F.linear(x[a:b], w[e], bias[e]) for e, a, b in ranges(offsets)]).backward(dy)
    y = torch.cat([F.linear(x[a:b], w[e], bias[e]) for e, a, b in ranges(offsets)]).detach()
    exact = set(fields.get("high_precision_gemms", ()))
    for name, gemm, truth in (("y", "fprop", y), ("dx", "dgrad", x.grad), ("dw", "wgrad", w.grad)):
        mine = ours[name]
        assert mine is not None and truth is not None
        assert relative_error(mine, truth) < (1e-5 if gemm in exact else 0.25)


def test_columns_are_those_of_padded_experts_and_rows_lie_where_they_lay() -> None:
    """The table for kernels on a GPU says the same as the loop on a CPU: TransformerEngine's padding to 16."""
    for offsets in ([20, 20, 53, 75], [0, 16, 17, 60], [75, 75, 75, 75], [0, 0, 0, 0]):
        experts = Experts(torch.tensor(offsets), 75)
        table = experts.source_rows.view(-1, 16)
        expected = torch.full_like(table, -1)
        for rows in experts.rows:
            of_expert = expected[rows.block : rows.last].view(-1)
            of_expert[: rows.end - rows.start] = torch.arange(rows.start, rows.end)
        assert torch.equal(table, expected)


def test_a_nan_reaches_all_experts_that_share_its_scale() -> None:
    x, w, bias, dy, offsets = call()
    x[0, 0] = torch.nan
    assert bool(nv.functional.grouped_linear(x, w, offsets, bias).isnan().all())
    alone = nv.functional.grouped_linear(x, w, offsets, bias, recipe=nv.NVFP4BlockScaling(grouped_scale="expert"))
    assert bool(alone[:20].isnan().all()) and bool(alone[20:].isfinite().all())


def test_rows_of_nobody_are_not_read() -> None:
    x, w, bias, dy, offsets = call("rows of nobody")
    before = step(nv.NVFP4BlockScaling(disable_stochastic_rounding=True), "auto", x, w, bias, dy, offsets)
    x[61:], dy[61:] = torch.nan, 1e30
    after = step(nv.NVFP4BlockScaling(disable_stochastic_rounding=True), "auto", x, w, bias, dy, offsets)
    expect_same(before, after)
    assert before["y"] is not None and before["dx"] is not None
    assert not before["y"][61:].any() and not before["dx"][61:].any()


def test_no_tokens() -> None:
    w = torch.randn(3, 32, 16, requires_grad=True)
    x = torch.randn(0, 16, requires_grad=True)
    y = nv.functional.grouped_linear(x, w, torch.zeros(3, dtype=torch.int32))
    y.sum().backward()
    assert y.shape == (0, 32) and w.grad is not None and not w.grad.any() and x.grad is not None
    with pytest.raises(ValueError, match=r"offsets\[1\] = 2 after 0, with 0 tokens"):
        nv.functional.grouped_linear(x, w, torch.tensor([0, 2, 2]))


@pytest.mark.parametrize(
    "offsets, text",
    [
        ([20, 19, 75, 75], r"offsets\[1\] = 19 after 20"),
        ([20, 30, 75, 76], r"offsets\[3\] = 76 after 75, with 75 tokens"),
        ([-1, 30, 75, 75], r"offsets\[0\] = -1 after 0"),
        ([20, 30, 75], r"got:   \(3,\) int64 on cpu"),
        ([20.0, 30, 75, 75], r"got:   \(4,\) float32 on cpu"),
    ],
)
def test_bad_offsets(offsets: list[Any], text: str) -> None:
    x, w, bias, _, _ = call()
    with pytest.raises(ValueError, match=text):
        nv.functional.grouped_linear(x, w, torch.tensor(offsets), bias)


@pytest.mark.parametrize(
    "x, w, bias, text",
    [
        ((75, 32), (4, 48, 40), None, "shapes do not match"),
        ((3, 25, 40), (4, 48, 40), None, "x.flatten"),
        ((75, 40), (48, 40), None, "shapes do not match"),
        ((75, 40), (4, 48, 40), (48,), "bias does not match"),
        ((75, 8), (4, 48, 8), None, "8 in-channels"),
    ],
)
def test_bad_shapes(x: Any, w: Any, bias: Any, text: str) -> None:
    given = None if bias is None else torch.zeros(bias)
    with pytest.raises(ValueError, match=text):
        nv.functional.grouped_linear(torch.zeros(x), torch.zeros(w), torch.tensor([20, 20, 53, 75]), given)


def test_offsets_that_are_no_tensor_and_recipes_that_do_not_fit() -> None:
    x, w, _, _, offsets = call()
    with pytest.raises(ValueError, match="got:   list"):
        nv.functional.grouped_linear(x, w, [20, 20, 53, 75])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activation_shift"):
        nv.functional.grouped_linear(x, w, offsets, recipe=nv.NVFP4BlockScaling(activation_shift="mean"))
    with pytest.raises(ValueError, match="experts have NVFP4 only"):
        nv.functional.grouped_linear(x, w, offsets, recipe=nv.NVFP4BlockScaling(block_format="mxfp4"))
    with pytest.raises(ValueError, match="delayed scales do not go with scales of experts"):
        recipe = nv.NVFP4BlockScaling(tensor_scale="delayed", grouped_scale="expert")
        nv.functional.grouped_linear(x, w, offsets, recipe=recipe)
    with pytest.raises(ValueError, match="grouped_scale"):
        nv.NVFP4BlockScaling(grouped_scale="row")


# ---- the module, and torch's function under the context --------------------------------------------------------------


class Torchs(nn.Module):
    """Experts as models write them: kernels [E, C, O], or weights [E, O, C] that are transposed at the call."""

    def __init__(self, stored: str = "E C O") -> None:
        super().__init__()
        _, w, *_ = call()
        self.kernels = nn.Parameter(w.transpose(1, 2).contiguous() if stored == "E C O" else w.clone())
        self.stored = stored

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        kernels = self.kernels if self.stored == "E C O" else self.kernels.transpose(1, 2)
        return F.grouped_mm(x, kernels, offs=offsets.to(torch.int32))


@pytest.mark.parametrize("stored", ["E C O", "E O C"])
def test_grouped_mm_is_taken_over(stored: str) -> None:
    x, w, bias, dy, offsets = call()
    model = Torchs(stored)
    recipe = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)
    expected = step(recipe, "auto", x, w, torch.zeros_like(bias), dy, offsets)
    x.requires_grad_()
    with nv.nvfp4_autocast(recipe):
        y = model(x, offsets)
    y.backward(dy)
    dw = model.kernels.grad
    assert dw is not None
    dw = dw.transpose(1, 2).contiguous() if stored == "E C O" else dw
    expect_same({"y": y.detach(), "dx": x.grad, "dw": dw}, {name: expected[name] for name in ("y", "dx", "dw")})
    with nv.nvfp4_autocast(recipe, enabled=False):
        assert same_bits(model(x, offsets), model(x, offsets)) and not same_bits(model(x, offsets), y)


def test_coverage_lists_what_runs_and_what_does_not() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.thin = Torchs(), nn.Parameter(torch.randn(2, 48, 8))
            self.last = nv.NVFP4GroupedLinear(4, 48, 16)
            self.register_buffer("fixed", torch.randn(2, 48, 16))

        def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
            y = self.experts(x, offsets)
            halves = torch.tensor([30, 75], dtype=torch.int32)
            rest = F.grouped_mm(y, self.thin, offs=halves).sum() + F.grouped_mm(y, self.fixed, offs=halves).sum()
            batches = F.grouped_mm(y.view(3, 25, 48), self.experts.kernels[:3].mT)
            return self.last(y, offsets).sum() + rest + batches.sum()

    x, *_, offsets = call()
    report = nv.coverage(Both(), x, offsets)
    rows = {(row.name, row.op, row.nvfp4): row.reason for row in report.rows}
    assert ("experts.kernels", "grouped_linear", True) in rows and ("last", "grouped_linear", True) in rows
    assert "thin layer" in rows["Both.thin", "grouped_mm", False]
    assert "constant" in rows["Both", "grouped_mm", False]
    assert "without offsets" in rows["experts.kernels", "grouped_mm", False]
    flops = next(row for row in report.rows if row.name == "experts.kernels" and row.nvfp4)
    assert flops.flops == 3 * 2 * 75 * 40 * 48 and 0 < flops.padding_waste < 0.7


def test_the_module() -> None:
    x, *_, dy, offsets = call()
    layer = nv.NVFP4GroupedLinear(4, 40, 48, recipe=nv.NVFP4BlockScaling(disable_stochastic_rounding=True))
    expected = nv.functional.grouped_linear(x, layer.weight, offsets, layer.bias, recipe=layer.recipe)
    assert same_bits(layer(x, offsets), expected)
    with nv.nvfp4_autocast(enabled=False):
        plain = layer(x, offsets)
    truth = torch.cat([F.linear(x[a:b], layer.weight[e], layer.bias[e]) for e, a, b in ranges(offsets)])
    assert same_bits(plain, truth) and "num_experts=4, in_features=40, out_features=48, bias=True" in repr(layer)
    nv.set_precision(layer, {"*": None})
    with nv.nvfp4_autocast():
        assert same_bits(layer(x, offsets), truth)
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_autocast_casts_x_and_the_module_follows() -> None:
    x, *_, offsets = call()
    layer = nv.NVFP4GroupedLinear(4, 40, 48, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, offsets)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


def test_frozen_weights_and_evaluation_keep_the_bits() -> None:
    x, *_, offsets = call()
    layer = nv.NVFP4GroupedLinear(4, 40, 48)
    expected = layer(x, offsets).detach()
    with torch.no_grad():
        for _ in range(3):  # the third pass takes what the second one stored
            assert same_bits(layer(x, offsets), expected)
    with nv.frozen_weights(layer):
        for _ in range(2):
            assert same_bits(layer(x, offsets), expected)


def test_delayed_scales() -> None:
    """The second step quantizes with the first one's amaxes, and a grouped layer of one expert does as a linear one."""
    x, w, bias, dy, offsets = call()
    recipe = nv.NVFP4BlockScaling(tensor_scale="delayed", disable_stochastic_rounding=True)
    grouped_w, linear_w = w[:1].clone().requires_grad_(), w[0].clone().requires_grad_()
    for factor in (1.0, 3.0, 0.1):
        mine = nv.functional.grouped_linear(x * factor, grouped_w, torch.tensor([75]), recipe=recipe)
        theirs = nv.functional.linear(x * factor, linear_w, recipe=recipe)
        assert same_bits(mine.detach(), theirs.detach())
        mine.backward(dy)
        theirs.backward(dy)
    assert grouped_w.grad is not None and linear_w.grad is not None
    assert same_bits(grouped_w.grad[0], linear_w.grad)


@pytest.mark.parametrize("fields", [{}, dict(grouped_scale="expert"), dict(backward_override="dequantized")], ids=str)
def test_compiles_to_one_graph_with_the_bits_of_eager(fields: dict[str, Any]) -> None:
    recipe = nv.NVFP4BlockScaling(disable_stochastic_rounding=True, **fields)
    x, w, bias, dy, offsets = call("rows of nobody")
    model = Torchs()
    layer = nv.NVFP4GroupedLinear(4, 48, 32, recipe=recipe)

    def run(x: Tensor, offsets: Tensor) -> Tensor:
        with nv.nvfp4_autocast(recipe):
            return layer(model(x, offsets), offsets)

    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        x = x.detach().clone().requires_grad_()
        model.zero_grad()
        layer.zero_grad()
        y = function(x, offsets)
        y.square().sum().backward()
        assert layer.bias.grad is not None
        results.append([y.detach(), x.grad, model.kernels.grad, layer.weight.grad, layer.bias.grad])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))  # type: ignore[arg-type]


def test_saves_four_bits_for_each_value() -> None:
    """Backward keeps x's columnwise codes and w's codes, and no values."""
    x, w = torch.randn(1024, 64, requires_grad=True), torch.randn(4, 64, 64, requires_grad=True)
    sizes: list[int] = []

    def pack(saved: Tensor) -> Tensor:
        sizes.append(saved.untyped_storage().nbytes())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        nv.functional.grouped_linear(x, w, torch.tensor([100, 400, 900, 1024]))
    rows = 1024 + 4 * 16
    assert sum(sizes) <= (rows * 64 + 4 * 64 * 64) * 9 / 16 + 4 * 64 * 64 / 16


def test_measured_amaxes_see_every_expert() -> None:
    x, *_, offsets = call()
    experts = Experts(offsets, 75)
    spec = plan_for(linear_geometry(75, 40, 48), nv.NVFP4BlockScaling(), "vendor", torch.float32, False).input_specs[1]
    found = [grouped.measure_operand(x, experts, spec, backend) for backend in ("reference", "vendor")]
    assert same_bits(*found) and found[0][0] == x.abs().max()


def test_integer_kernels_take_all_experts_in_one_call_and_hold_panels_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What made small experts slow: Python for each of them, and panels of all, which leave the cache."""
    panels: list[int] = []
    quantized: list[int] = []
    make, quantize = integer.layouts.for_one_call, cpu.quantize_operand

    def made(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if shape[-1] == integer.PANEL:
            panels.append(shape[0] * shape[1] * shape[3])
        return make(shape, dtype, device)

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        quantized.append(x.shape[0])
        return quantize(x, *args, **kwargs)

    monkeypatch.setattr(integer.layouts, "for_one_call", made)
    monkeypatch.setattr(cpu, "quantize_operand", counted)
    step(nv.NVFP4BlockScaling(), "integer", *call())
    assert panels == [3 * 3, 3 * 3]  # 48 x 40 values in tiles of 16 x 16: one expert's, for fprop and dgrad
    assert quantized == [75, 75]  # x, and dy, which is rounded stochastically
