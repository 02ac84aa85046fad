"""Delayed tensor scales: when they move, who only reads them, what a resume restores, how ranks agree."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import te_nvfp4_cv as nv
from te_nvfp4_cv import formats
from te_nvfp4_cv import functional as NF
from te_nvfp4_cv.layer import delayed_scaling
from te_nvfp4_cv.ops.quantize import operand as operand_ops
from te_nvfp4_cv.ops.records import Operand, OperandSpec
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from tests.helpers import make_geometry, relative_error, same_bits, values
from tests.layers import BACKENDS
from tests.networks import Net, all_same, gradients, net_and_input, step

pytestmark = pytest.mark.usefixtures("one_thread")
DELAYED = NVFP4BlockScaling(tensor_scale="delayed")
DELAYED_NEAREST = NVFP4BlockScaling(tensor_scale="delayed", disable_stochastic_rounding=True)
NEAREST = NVFP4BlockScaling(disable_stochastic_rounding=True)


def amaxes(model: nn.Module) -> dict[str, Tensor]:
    """The amaxes in use, [2 roles, 2 faces], by parameter."""
    return {name: entry["entries"][0]["used"] for name, entry in nv.extra_state(model)["scales"].items()}


def of(amax: float, margin: int) -> float:
    """The rule, by itself: 6 E 2^k at or above margin * amax."""
    k = 0
    while 2688.0 * 2.0**k < margin * amax:
        k += 1
    while 2688.0 * 2.0 ** (k - 1) >= margin * amax:
        k -= 1
    return 2688.0 * 2.0**k


def layer(c: int = 16, o: int = 32) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(c, o, 3, padding=1)


def train(model: nn.Module, x: Tensor, recipe: NVFP4BlockScaling = DELAYED, backend: str = "auto") -> Tensor:
    with nv.nvfp4_autocast(recipe, backend=backend):
        y = model(x)
    y.float().square().mean().backward()
    return y.detach()


# ---- when scales move -----------------------------------------------------------------------------------------------


def test_scales_come_from_the_step_before_and_the_first_from_itself():
    conv = layer()
    inputs = [values((16, 16, 4, 4), seed=i) * 4.0**i for i in range(3)]
    used = []
    for x in inputs:
        train(conv, x)
        used.append(float(amaxes(conv)["weight"][0, 0]))
    tops = [float(x.abs().max()) for x in inputs]
    assert used == [of(tops[0], 8), of(tops[0], 8), of(tops[1], 8)]


def test_the_columnwise_scale_and_that_of_gradients_have_their_own_amax():
    conv, x = layer(), values((16, 16, 4, 4))
    with nv.nvfp4_autocast(DELAYED):
        y = conv(x)
    dy = values(y.shape, seed=3) * 1e-3
    y.backward(dy)
    fold = make_geometry(16, (16, 32), (4, 4), 3, 1, 1).folds
    for role, margin, operand, f in ((0, 8, x, fold[0]), (1, 4, dy, fold[1])):
        last = operand.movedim(1, -1).contiguous()
        measured = operand_ops.measure_operand(last, OperandSpec(1, f, rht=True), "reference").tolist()
        assert amaxes(conv)["weight"][role].tolist() == [of(amax, margin) for amax in measured]


def test_a_step_whose_history_was_itself_gives_equal_bits():
    conv, x = layer(), values((8, 16, 5, 5))
    results = []
    for _ in range(2):
        conv.zero_grad()
        results.append([train(conv, x, DELAYED_NEAREST), *[g.clone() for g in gradients(conv)]])
    assert all_same(*results)


def test_forwards_without_a_backward_between_use_one_scale_and_collect_the_maximum():
    conv = layer()
    train(conv, values((4, 16, 4, 4)))
    small, large = values((4, 16, 4, 4), seed=1), values((4, 16, 4, 4), seed=2) * 100
    with nv.nvfp4_autocast(DELAYED):
        first = conv(small)  # moves: the first after a backward
        before = amaxes(conv)["weight"].clone()
        second = conv(large)
        conv(small)
        assert same_bits(before, amaxes(conv)["weight"])
        (first + second).sum().backward()
        assert same_bits(before, amaxes(conv)["weight"])
        conv(small)
    assert float(amaxes(conv)["weight"][0, 0]) == of(float(large.abs().max()), 8)


def test_gradients_have_one_scale_in_a_step_and_the_maximum_in_the_next():
    conv, x = layer(), values((4, 16, 4, 4)).requires_grad_()
    train(conv, x)
    with nv.nvfp4_autocast(DELAYED):
        y1, y2 = conv(x), conv(x)
        before = amaxes(conv)["weight"][1].clone()
        y2.backward(torch.full_like(y2, 3.0), retain_graph=True)
        y1.backward(torch.full_like(y1, 0.5))
        assert same_bits(before, amaxes(conv)["weight"][1])
        conv(x)
    assert float(amaxes(conv)["weight"][1, 0]) == of(3.0, 4)


def test_state_stays_in_place_as_cuda_graphs_need_it():
    conv, x = layer(), values((4, 16, 4, 4))
    train(conv, x)
    (state,) = delayed_scaling._states[conv.weight].values()
    tensors = (state.used, state.collected, state.saturated)
    places = [t.data_ptr() for t in tensors]
    for i in range(3):
        train(conv, x * 3**i)
    assert places == [t.data_ptr() for t in (state.used, state.collected, state.saturated)]
    assert list(delayed_scaling._states[conv.weight].values()) == [state]


def test_zero_operands_keep_the_scale_before():
    conv, x = layer(), values((4, 16, 4, 4))
    train(conv, torch.zeros_like(x))
    assert amaxes(conv)["weight"].tolist()[0] == [2688.0, 2688.0]  # the power 0 where there was none
    train(conv, x)
    train(conv, torch.zeros_like(x))
    before = float(amaxes(conv)["weight"][0, 0])
    assert before == of(float(x.abs().max()), 8)
    train(conv, x)
    assert float(amaxes(conv)["weight"][0, 0]) == before


def test_weights_have_a_power_of_two_at_or_above_their_amax_without_a_state():
    conv, x = layer(), values((4, 16, 4, 4)).requires_grad_()
    with nv.nvfp4_autocast(DELAYED):
        y = conv(x)
    amax = [float(t) for t in y.grad_fn.saved_tensors if t.dtype == torch.float32 and t.numel() == 1]
    assert amax[1:] == [of(float(conv.weight.detach().abs().max()), 1)]  # after that of x


# ---- who only reads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_only_reads(mode):
    conv, x = layer(), values((4, 16, 4, 4))
    with mode(), nv.nvfp4_autocast(DELAYED):
        fresh = conv(x).clone()
    assert nv.extra_state(conv)["scales"] == {} and nv.saturated_blocks(conv) == {}
    train(conv, x)
    before = nv.extra_state(conv)["scales"]
    with mode(), nv.nvfp4_autocast(DELAYED):
        conv(x * 1000)
        assert same_bits(conv(x).clone(), fresh)  # measured before, remembered now: the same rule
    after = nv.extra_state(conv)["scales"]
    for name in ("used", "collected", "saturated"):
        assert same_bits(before["weight"]["entries"][0][name], after["weight"]["entries"][0][name])
    assert after["weight"]["entries"][0]["stale"]


def test_a_frozen_layer_on_a_plain_input_is_evaluation():
    conv = layer().requires_grad_(False)
    with nv.nvfp4_autocast(DELAYED):
        conv(values((4, 16, 4, 4)))
    assert nv.extra_state(conv)["scales"] == {}
    with nv.nvfp4_autocast(DELAYED):
        conv(values((4, 16, 4, 4)).requires_grad_()).sum().backward()
    assert set(nv.extra_state(conv)["scales"]) == {"weight"}


def test_coverage_changes_no_state():
    net, x = net_and_input()
    nv.coverage(net, x, recipe=DELAYED)
    assert nv.extra_state(net)["scales"] == {}
    train(net, x)
    before = nv.extra_state(net)["scales"]
    nv.coverage(net, x * 100, recipe=DELAYED)
    after = nv.extra_state(net)["scales"]
    assert before.keys() == after.keys()
    for name, entry in before.items():
        a, b = entry["entries"][0], after[name]["entries"][0]
        assert all(same_bits(a[key], b[key]) for key in ("used", "collected", "saturated")) and a["stale"] == b["stale"]


class Block(nn.Module):
    """Two convolutions; the middle is recomputed or not."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.reentrant = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), reentrant

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return F.relu(self.two(F.relu(self.one(x))))

        return inner(x) if self.reentrant is None else checkpoint(inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_equal_bits_and_equal_states(reentrant):
    results = []
    for how in (None, reentrant):
        block = Block(how)
        torch.manual_seed(1)
        out: list[Tensor] = []
        for i in range(3):
            block.zero_grad()
            x = (values((4, 16, 6, 6), seed=i) * 3.0**i).requires_grad_()
            out += [train(block, x), x.grad, *[g.clone() for g in gradients(block)]]
        state = nv.extra_state(block)["scales"]
        out += [entry["entries"][0][key] for entry in state.values() for key in ("used", "collected")]
        results.append(out)
    assert all_same(*results)


def test_a_reentrant_checkpoint_under_no_grad_is_evaluation():
    block = Block(True)
    with torch.no_grad(), nv.nvfp4_autocast(DELAYED):
        block(values((4, 16, 6, 6)).requires_grad_())
    assert nv.extra_state(block)["scales"] == {}


# ---- whose state it is ----------------------------------------------------------------------------------------------


def test_a_copy_starts_fresh_and_a_dead_weight_leaves_nothing():
    conv, x = layer(), values((4, 16, 4, 4))
    train(conv, x)
    twin = copy.deepcopy(conv)
    assert nv.extra_state(twin)["scales"] == {} and nv.extra_state(conv)["scales"] != {}
    y = train(twin, x)
    assert same_bits(y, train(layer(), x))
    gc.collect()
    before = len(delayed_scaling._states)
    del conv
    gc.collect()
    assert len(delayed_scaling._states) == before - 1


def test_a_kernel_that_is_no_parameter_keeps_its_scales_while_it_lives():
    w, x = values((32, 16, 3, 3)).requires_grad_(), values((4, 16, 4, 4))
    for factor in (1.0, 50.0, 1.0):
        NF.conv2d(x * factor, w, None, 1, 1, recipe=DELAYED).sum().backward()
    (key,) = delayed_scaling._states[w]
    assert float(delayed_scaling._states[w][key].used[0, 0]) == of(50 * float(x.abs().max()), 8)
    gc.collect()
    before = len(delayed_scaling._states)
    NF.conv2d(x, w * 2, None, 1, 1, recipe=DELAYED).sum().backward()  # computed: measured, forgotten with it
    gc.collect()
    assert len(delayed_scaling._states) == before


def test_views_of_one_parameter_have_states_of_their_own():
    attention = nn.MultiheadAttention(32, 2)
    q, k = values((5, 3, 32)), values((7, 3, 32), seed=1) * 100
    for _ in range(2):
        with nv.nvfp4_autocast(DELAYED):
            attention(q, k, k)[0].sum().backward()
    entries = nv.extra_state(attention)["scales"]["in_proj_weight"]["entries"]
    tops = {float(e["used"][0, 0]) for e in entries}
    assert tops == {of(float(q.abs().max()), 8), of(float(k.abs().max()), 8)}


def test_recipes_with_other_settings_have_states_of_their_own():
    conv, x = layer(), values((4, 16, 4, 4))
    other = NVFP4BlockScaling(tensor_scale="delayed", disable_rht=True, nvfp4_4over6="all")
    for recipe in (DELAYED, other, DELAYED, other):
        train(conv, x, recipe)
    entries = nv.extra_state(conv)["scales"]["weight"]["entries"]
    assert [(e["e4m3_max"], e["rht"]) for e in entries] == [(448, True), (256, False)]
    assert float(entries[1]["used"][0, 0]) / 1536 in (2.0**k for k in range(-20, 20))


def test_a_weight_that_changes_its_dtype_keeps_its_state():
    conv, x = layer(), values((4, 16, 4, 4))
    train(conv, x)
    conv.to(torch.bfloat16)
    assert set(amaxes(conv)) == {"weight"}
    train(conv, x.bfloat16() * 100)
    assert nv.saturated_blocks(conv)[""]["input"] > 0


@pytest.mark.gpu
def test_a_weight_that_moves_takes_its_state_along():
    conv, x = layer(), values((4, 16, 4, 4))
    train(conv, x)
    used = amaxes(conv)["weight"]
    conv.cuda()
    with torch.no_grad(), nv.nvfp4_autocast(DELAYED):
        conv(x.cuda())
    assert same_bits(used, amaxes(conv)["weight"])
    assert next(iter(delayed_scaling._states[conv.weight].values())).used.is_cuda


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe", [DELAYED_NEAREST, dataclasses.replace(DELAYED_NEAREST, disable_2d_quantization=True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference_and_vendor_agree(recipe, dtype):
    results, states = {}, {}
    for backend in ("reference", "vendor"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 16, 2, 2)).to(dtype)
        out = []
        for i in range(2):
            net.zero_grad()
            x = values((4, 16, 6, 6), dtype=dtype, seed=i).requires_grad_()
            out = [train(net, x, recipe, backend), x.grad, *gradients(net)]
        results[backend], states[backend] = out, amaxes(net)
    for a, b in zip(results["reference"], results["vendor"], strict=True):
        assert relative_error(b, a) < (1e-4 if dtype == torch.float32 else 2e-2)
    assert all(same_bits(states["reference"][name][0], states["vendor"][name][0]) for name in states["vendor"])


def test_the_operands_are_the_reference_ones_bit_for_bit(monkeypatch):
    calls: dict[str, list[Operand]] = {"reference": [], "vendor": []}
    original = operand_ops.quantize_operand

    def spy(*args):  # type: ignore[no-untyped-def]
        out = original(*args)
        calls["vendor"].append(out)
        calls["reference"].append(original(*args[:5], "reference"))
        return out

    monkeypatch.setattr(operand_ops, "quantize_operand", spy)
    conv = layer(24, 40)
    for i in range(2):
        train(conv, (values((5, 24, 5, 4), seed=i) * 10**i).requires_grad_(), backend="vendor")
    assert len(calls["vendor"]) == 4
    for a, b in zip(calls["reference"], calls["vendor"], strict=True):
        assert all(same_bits(p, q) for p, q in zip(a.flat(), b.flat(), strict=True))


def test_the_integer_backend_trains_to_the_references_bits():
    found, saturated = [], []
    for backend in ("integer", "reference"):
        conv = layer(24, 40)
        outputs = []
        for i in range(4):  # up by a hundred and down again: some blocks saturate
            outputs.append(train(conv, values((5, 24, 5, 4), seed=i) * 10.0 ** (2 * (i % 2)), backend=backend))
            with torch.no_grad():
                conv.weight -= 0.1 * conv.weight.grad
        found.append([*outputs, *conv.parameters(), *amaxes(conv).values()])
        saturated.append(nv.saturated_blocks(nn.Sequential(conv))["0"])
    assert saturated[0] == saturated[1] and saturated[0]["input"] > 0
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


def test_the_vendors_forward_has_no_pass_over_its_result(monkeypatch):
    from te_nvfp4_cv.ops.conv import vendor

    seen = []
    original = vendor.finish
    monkeypatch.setattr(vendor, "finish", lambda y, alpha, *rest: seen.append(alpha) or original(y, alpha, *rest))
    conv = nn.Conv2d(16, 16, 3, padding=1)
    train(conv, values((4, 16, 5, 5)).requires_grad_(), backend="vendor")
    assert seen[0] is None and seen[1] is None and seen[2] is not None  # wgrad keeps alpha on dw
    seen.clear()
    strided = nn.Conv2d(16, 16, 1, stride=2)  # pixels of dx that no output reads: a NaN could not reach them
    train(strided, values((4, 16, 5, 5)).requires_grad_(), backend="vendor")
    assert seen[0] is None and seen[1] is not None and seen[2] is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_non_finite_input_reaches_every_output_and_no_scale(bad, backend, stride):
    conv = nn.Conv2d(16, 32, 1, stride)
    x = values((4, 16, 5, 5))
    train(conv, x, backend=backend)
    before = amaxes(conv)["weight"]
    broken = x.clone()
    broken[1, 3, 2, 2] = bad
    conv.zero_grad()
    broken.requires_grad_()
    y = train(conv, broken, backend=backend)
    assert not y.isfinite().any()
    assert not conv.weight.grad.isfinite().any() and not broken.grad.isfinite().any()
    train(conv, x, backend=backend)
    after = amaxes(conv)["weight"]
    assert same_bits(before[0], after[0]) and after.isfinite().all()


def test_saturated_blocks_are_counted_by_layer():
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))
    x = values((4, 16, 6, 6))
    train(net, x)
    train(net, x)
    assert nv.saturated_blocks(net) == {name: {"input": 0, "grad_output": 0} for name in "01"}
    train(net, x * 100)
    counts = nv.saturated_blocks(net)
    assert counts["0"]["input"] > 0 and counts["1"]["input"] > 0
    train(net, x * 100)
    assert nv.saturated_blocks(net)["0"]["input"] == counts["0"]["input"]
    with torch.no_grad(), nv.nvfp4_autocast(DELAYED):
        net(x * 1e6)
    assert nv.saturated_blocks(net)["0"] == nv.saturated_blocks(net)["0"]
    with pytest.raises(TypeError, match="saturated_blocks"):
        nv.saturated_blocks([net])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top", [1e-30, 1e-20, 1e20, 1e30])
def test_extreme_inputs_and_gradients(top, backend, dtype):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, 3, padding=1).to(dtype)
    conv.bias.data.zero_()
    x = (values((4, 16, 5, 5)) * top).to(dtype).requires_grad_()
    with nv.nvfp4_autocast(DELAYED_NEAREST, backend=backend):
        y = conv(x)
    plain = F.conv2d(x, conv.weight, None, 1, 1)
    assert relative_error(y, plain) < 0.3
    dy = (values(y.shape, seed=1) * top).to(dtype)
    dx = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
    assert relative_error(dx, torch.autograd.grad(plain, x, dy)[0]) < 0.3


def test_tiny_weights_lose_only_what_is_below_the_smallest_numbers():
    x = (values((4, 16, 5, 5)) * 1e-22).requires_grad_()
    for scale in (1e-3, 1e-8, 1e-14):
        conv = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        conv.weight.data.mul_(scale)
        with nv.nvfp4_autocast(DELAYED_NEAREST, backend="vendor"):
            y = conv(x)
        assert relative_error(y, F.conv2d(x, conv.weight, None, 1, 1)) < 0.3


@pytest.mark.parametrize(
    "fields",
    [
        {"backward_override": "high_precision"},
        {"backward_override": "dequantized"},
        {"thin_layers": "pad"},
        {"nvfp4_4over6": "weights"},
        {"nvfp4_4over6": "all", "disable_rht": True},
        *({"high_precision_gemms": out} for out in (("fprop",), ("dgrad",), ("wgrad",), ("fprop", "dgrad"))),
    ],
    ids=str,
)
def test_other_fields_of_the_recipe(fields):
    recipe = dataclasses.replace(DELAYED_NEAREST, **fields)
    net, x = net_and_input()
    x.requires_grad_()
    for _ in range(2):
        net.zero_grad()
        x.grad = None
        y = train(net, x, recipe)
    assert y.isfinite().all() and all(g.isfinite().all() for g in gradients(net))
    net.eval()
    with torch.no_grad():
        plain = net(x)
        with nv.nvfp4_autocast(recipe):
            assert relative_error(net(x), plain) < 0.5


def test_frozen_weights_give_equal_bits():
    net, x = net_and_input()
    results = []
    for inside in (False, True):
        model = copy.deepcopy(net)
        torch.manual_seed(4)
        with nv.frozen_weights(model) if inside else contextlib.nullcontext():
            for i in range(3):
                train(model, x * (i + 1))
        results.append(gradients(model))
    assert all_same(*results)


def test_linear_layers_and_unbatched_images():
    linear = nn.Linear(32, 48)
    for _ in range(2):
        y = train(linear, values((2, 5, 32)))
    assert relative_error(y, linear(values((2, 5, 32)))) < 0.3
    conv = layer()
    for _ in range(2):
        y = train(conv, values((16, 6, 6)))
    assert relative_error(y, conv(values((16, 6, 6)))) < 0.3


def test_training_is_as_good_as_with_current_scales():
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, 1)
            self.mid, self.up = nn.Conv2d(32, 32, 3, padding=1), nn.ConvTranspose2d(32, 16, 2, 2)
            self.head = nn.Conv2d(32, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            top = F.relu(self.stem(x))
            low = F.relu(self.mid(F.relu(self.down(top))))
            return self.head(torch.cat((top, F.relu(self.up(low))), 1))

    losses = {}
    for name, recipe in (("plain", None), ("current", NVFP4BlockScaling()), ("delayed", DELAYED)):
        torch.manual_seed(0)
        net = UNet()
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        x = values((8, 3, 16, 16))
        target = (F.avg_pool2d(x, 3, 1, 1)[:, :1] > 0).long().squeeze(1)
        for _ in range(40):
            with nv.nvfp4_autocast(recipe, enabled=recipe is not None):
                loss = F.cross_entropy(net(x)[:, :2], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[name] = float(loss)
        blocks = nv.saturated_blocks(net)
        assert (blocks != {}) == (name == "delayed")
    assert losses["plain"] < 0.45
    assert losses["current"] < 0.6 and losses["delayed"] < losses["current"] + 0.08, losses


# ---- resume ---------------------------------------------------------------------------------------------------------


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[Tensor]:
    out = []
    for i in range(first, last):
        with nv.nvfp4_autocast(DELAYED):
            loss = model(values((4, 3, 8, 8), seed=i) * 2.0**i).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.detach())
    return out


def fresh() -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("wrapped", [False, True])
def test_resume_is_bit_exact(tmp_path, wrapped):
    model, optimizer = fresh()
    torch.manual_seed(9)
    whole = steps(model, optimizer, 0, 4) + [p.detach().clone() for p in model.parameters()]

    model, optimizer = fresh()
    torch.manual_seed(9)
    first = steps(model, optimizer, 0, 2)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "nvfp4": nv.extra_state(model)}
    torch.save({**saved, "rng": torch.get_rng_state()}, tmp_path / "checkpoint.pt")

    torch.manual_seed(77)
    model, optimizer = Net(), None
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    model.load_state_dict(loaded["model"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["rng"])
    outer = nn.ModuleDict({"module": model}) if wrapped else model
    now = nv.extra_state(outer, load=loaded["nvfp4"])
    assert set(now["scales"]) == set(loaded["nvfp4"]["scales"])
    second = steps(model, optimizer, 2, 4)
    assert all_same(whole, first + second + [p.detach() for p in model.parameters()])


def test_resume_without_the_scales_is_not():
    """What the test above proves is due to the scales."""
    model, optimizer = fresh()
    steps(model, optimizer, 0, 2)
    twin = copy.deepcopy(model)
    x = values((4, 3, 8, 8)) * 1000  # beyond the margin
    outputs = []
    for net in (model, twin):
        net.eval()
        with torch.no_grad(), nv.nvfp4_autocast(DELAYED):
            outputs.append(net(x))
    assert not torch.equal(*outputs)


def test_states_that_do_not_fit_are_refused_and_change_nothing():
    net, x = net_and_input()
    train(net, x)
    saved = nv.extra_state(net)
    other = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3))
    with pytest.raises(ValueError, match="model lacks") as error:
        nv.extra_state(other, load=saved)
    assert "body.1.weight" in str(error.value)
    wide = Net()
    wide.body[1] = nn.Conv2d(16, 48, 3, padding=1)
    with pytest.raises(ValueError, match="another shape"):
        nv.extra_state(wide, load=saved)
    name = next(iter(saved["scales"]))
    entry = saved["scales"][name]["entries"][0]
    for damage in ({"used": torch.zeros(3)}, {"saturated": None}, {"measured": 3}, {"e4m3_max": "448"}):
        broken = copy.deepcopy(saved)
        broken["scales"][name]["entries"][0] = entry | damage
        before = nv.extra_state(net)
        with pytest.raises(ValueError, match="damaged"):
            nv.extra_state(net, load=broken)
        after = nv.extra_state(net)
        assert before["scales"].keys() == after["scales"].keys() and before["sr_drawn"] == after["sr_drawn"]
        assert same_bits(before["scales"][name]["entries"][0]["used"], after["scales"][name]["entries"][0]["used"])
    with pytest.raises(ValueError, match="not what extra_state saved"):
        nv.extra_state(net, load=saved | {"scales": [1]})
    assert nv.extra_state(other)["scales"] == {}


def test_loading_a_state_without_scales_starts_fresh():
    net, x = net_and_input()
    empty = nv.extra_state(net)
    old = {key: value for key, value in empty.items() if key != "scales"} | {"version": 1}
    for state in (empty, old):
        train(net, x)
        assert nv.extra_state(net)["scales"] != {}
        assert nv.extra_state(net, load=state)["scales"] == {}


# ---- torch.compile --------------------------------------------------------------------------------------------------


def test_compiling_with_delayed_scales_says_what_to_do():
    conv, x = layer(), values((4, 16, 4, 4))
    with nv.nvfp4_autocast(DELAYED), pytest.raises(Exception, match="tensor_scale='current'"):
        torch.compile(conv, backend="eager", fullgraph=True)(x)


# ---- the rule itself ------------------------------------------------------------------------------------------------


def test_the_rule_of_this_file_is_the_librarys():
    for amax in (1e-6, 0.3, 1.0, 336.0, 336.1, 5e4):
        for margin in (1, 4, 8):
            assert of(amax, margin) == float(formats.power_of_two_amax(torch.tensor([amax]), 448, margin))


def test_step_helper_sees_delayed_scales_as_reproducible():
    net, x = net_and_input()
    assert all_same(step(net, x, nv.nvfp4_autocast(DELAYED)), step(net, x, nv.nvfp4_autocast(DELAYED)))


# ---- kernels that are computed at each call -------------------------------------------------------------------------


class Halved(nn.Conv2d):
    """A layer whose kernel is computed, and which so has no Parameter that could own its scales."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * 0.5, self.bias, padding=1)


@pytest.mark.parametrize("make", [Halved, lambda *sizes: nn.utils.parametrizations.weight_norm(nn.Conv2d(*sizes))])
def test_a_computed_kernel_has_the_scales_of_its_module(make):
    net, x = nn.Sequential(nn.Identity(), make(16, 32, 3)), values((4, 16, 6, 6))
    train(net, x)
    (entry,) = nv.extra_state(net)["scales"].values()
    (state,) = entry["entries"]
    assert float(state["used"][0, 0]) == of(float(x.abs().max()), 8)
    assert nv.saturated_blocks(net) == {"1": {"input": 0, "grad_output": 0}}
    train(net, x * 2)  # moves the scales to those of the step before, and collects this one's
    train(net, x)
    (entry,) = nv.extra_state(net)["scales"].values()
    assert float(entry["entries"][0]["used"][0, 0]) == of(2 * float(x.abs().max()), 8)
    # Evaluation quantizes with the trained scales: a batch that is larger saturates.
    with torch.no_grad(), nv.nvfp4_autocast(DELAYED):
        y = net(x).clone()
        assert same_bits(net(torch.cat([x, x]))[:4].clone(), y)
    fresh = copy.deepcopy(net)
    assert nv.extra_state(fresh)["scales"] == {}
    nv.extra_state(fresh, load=nv.extra_state(net))
    with torch.no_grad(), nv.nvfp4_autocast(DELAYED):
        assert same_bits(fresh(x).clone(), y)
