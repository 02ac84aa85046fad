"""Learnable weight scales: exact definitions, the same bits where nothing is learned."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv import functional as NF
from te_nvfp4_cv.layer import weight_transforms
from te_nvfp4_cv.nn.learned import NAMES
from tests.helpers import same_bits, values

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("clip", "scale")
NO_SR = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)
ONE_D = nv.NVFP4BlockScaling(disable_stochastic_rounding=True, disable_2d_quantization=True)
CASES = {
    "conv": (nn.Conv2d(32, 24, 3, padding=1), (4, 32, 5, 5)),
    "groups": (nn.Conv2d(32, 48, (3, 2), groups=2), (2, 32, 5, 6)),
    "transposed": (nn.ConvTranspose2d(24, 16, 2, stride=2), (2, 24, 4, 4)),
    "linear": (nn.Linear(40, 24), (16, 40)),
}


def layer_of(case: str):
    """A copy of the case's layer with weights of its own, and an input."""
    module, shape = CASES[case]
    module = copy.deepcopy(module)
    with torch.no_grad():
        module.weight.copy_(values(tuple(module.weight.shape), "normal", torch.float32, 3))
    return module, values(shape, "normal", torch.float32, 4)


def gradients(module: nn.Module, x, recipe):
    """(y, gradients of the module's parameters by name)."""
    module.zero_grad()
    with nv.nvfp4_autocast(recipe):
        y = module(x)
    y.backward(values(tuple(y.shape), "normal", torch.float32, 5))
    return y.detach(), {name: p.grad.clone() for name, p in module.named_parameters()}


def blocks_by_hand(w, case: str, two_d: bool):
    """amax of each element's block, by loops over [axis 0 in its group, axis 1] of every tap."""
    groups = 2 if case == "groups" else 1
    out = torch.zeros_like(w)
    flat, found = w.flatten(2) if w.dim() > 2 else w.unsqueeze(-1), None
    found = out.view_as(flat)
    rows = w.shape[0] // groups
    for g in range(groups):
        for i in range(rows):
            for j in range(w.shape[1]):
                r = slice(g * rows + i // 16 * 16, min(g * rows + i // 16 * 16 + 16, (g + 1) * rows))
                c = slice(j // 16 * 16, j // 16 * 16 + 16)
                if not two_d and case == "transposed":
                    c = slice(j, j + 1)
                elif not two_d:
                    r = slice(g * rows + i, g * rows + i + 1)
                found[g * rows + i, j] = flat[r, c].abs().amax((0, 1))
    return out


@pytest.mark.parametrize("recipe", [NO_SR, ONE_D, nv.NVFP4BlockScaling(tensor_scale="delayed")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_at_one_nothing_changes(case, kind, recipe):
    plain, x = layer_of(case)
    learning = copy.deepcopy(plain)
    (parameter,) = nv.learn_scales(learning, kind)
    assert float(parameter) == 1 and dict(learning.named_parameters())[NAMES[kind]] is parameter
    torch.manual_seed(0)
    y, grads = gradients(plain, x, recipe)
    torch.manual_seed(0)
    y_l, grads_l = gradients(learning, x, recipe)
    assert same_bits(y, y_l) and all(same_bits(grads[name], grads_l[name]) for name in grads)
    assert set(grads_l) - set(grads) == {NAMES[kind]}
    assert torch.isfinite(grads_l[NAMES[kind]]) and not weight_transforms.local.running


@pytest.mark.parametrize("two_d", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_blocks_are_those_of_the_face(case, two_d):
    module, _ = layer_of(case)
    seen = []
    original = weight_transforms.block_amax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_transforms, "block_amax", lambda w, plan: seen.append(original(w, plan)) or seen[-1])
        nv.learn_scales(module, "scale")
        with nv.nvfp4_autocast(NO_SR if two_d else ONE_D):
            module(layer_of(case)[1])
    assert torch.equal(seen[0], blocks_by_hand(module.weight.detach(), case, two_d))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_below_one_the_layer_is_that_of_the_clipped_weight(case, kind):
    module, x = layer_of(case)
    (parameter,) = nv.learn_scales(module, kind)
    with torch.no_grad():
        parameter.fill_(0.625)
    y, grads = gradients(module, x, NO_SR)

    w = module.weight.detach()
    limit = w.abs().max().expand_as(w) if kind == "clip" else blocks_by_hand(w, case, True)
    clipped = torch.minimum(torch.maximum(w, -limit * 0.625), limit * 0.625)
    twin, _ = layer_of(case)
    with torch.no_grad():
        twin.weight.copy_(clipped)
        twin.bias.copy_(module.bias)
    y_twin, grads_twin = gradients(twin, x, NO_SR)
    assert same_bits(y, y_twin) and same_bits(grads["weight"], grads_twin["weight"])

    g, beyond = grads["weight"].double(), w.abs() >= limit * 0.625
    expected = (g * w.sign() * limit)[beyond].sum()
    if kind == "scale":
        eye = None
        if case == "linear":  # the dequantized weight by another way: identity in, weight out
            eye = NF.linear(torch.eye(40), clipped, None, recipe=nv.NVFP4BlockScaling(), backend="reference")
        if eye is None:
            return
        q = eye.T.double()  # ones are exact in NVFP4
        expected = (expected + (g * (q - clipped) / 0.625)[~beyond].sum()) / (6 * w.numel()) ** 0.5
    assert float(grads[NAMES[kind]]) == pytest.approx(float(expected), rel=1e-4)


def test_a_multiplier_scales_the_block_scales():
    """The block's decode scale in real units is m times what it was: m = 1/2 halves it exactly."""
    w = values((32, 32), "normal", torch.float32, 0)
    tiles = w.view(2, 16, 2, 16)
    limit = tiles.abs().amax((1, 3), keepdim=True) / 2
    halved = torch.minimum(torch.maximum(tiles, -limit), limit).reshape(32, 32)
    quantize = nv.NVFP4Quantizer(columnwise=False, with_rht=False, with_2d_quantization=True)
    before, after = quantize(w), quantize(halved)
    assert torch.equal(before.rowwise_scale_inv.view(torch.uint8), after.rowwise_scale_inv.view(torch.uint8))
    assert torch.equal(after.amax_rowwise, before.amax_rowwise / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_learning_helps_a_layer_with_an_outlier(kind):
    """One frozen weight is 50 times the others' size. "clip" finds the threshold that the teacher has; "scale" finds
    that the outlier's input is always 0, so that its block is better off with a smaller scale.
    """
    torch.manual_seed(0)
    student = torch.randn(32, 32)
    student[0, 0] = 50.0
    teacher, x = student.clone(), torch.randn(256, 32)
    if kind == "clip":
        teacher[0, 0] = 4.0
    else:
        x[:, 0] = 0
    module = nn.Linear(32, 32, bias=False)
    with torch.no_grad():
        module.weight.copy_(student)
    module.weight.requires_grad_(False)
    optimizer = torch.optim.Adam(nv.learn_scales(module, kind), 0.02)
    losses = []
    for _ in range(60):
        with nv.nvfp4_autocast():
            loss = F.mse_loss(module(x), x @ teacher.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0] and 0 < float(getattr(module, NAMES[kind])) < 0.9


def test_copies_pickles_and_state_dicts_go_on_learning(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))
    assert len(nv.learn_scales(net)) == 1  # the first layer is too thin for NVFP4
    assert [id(p) for p in nv.learn_scales(net)] == [id(net[1].weight_scale)]
    with torch.no_grad():
        net[1].weight_scale.fill_(0.5)
    x = values((2, 3, 8, 8), "normal", torch.float32, 0)
    torch.save(net, tmp_path / "net.pt")
    twins = [copy.deepcopy(net), torch.load(tmp_path / "net.pt", weights_only=False)]
    fresh = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))
    nv.learn_scales(fresh)
    older = net.state_dict()
    older["1.weight_scale"] = older["1.weight_scale"].reshape(())  # as earlier versions saved it
    fresh.load_state_dict(older)
    with nv.nvfp4_autocast():
        expected = net(x)
        assert all(same_bits(twin(x), expected) for twin in (*twins, fresh))
        with torch.no_grad():
            twins[0][1].weight_scale.fill_(1.0)
        assert not torch.equal(twins[0](x), expected)
    assert torch.equal(net(x), nn.Sequential(net[0], net[1])(x))  # outside of a context nothing is clipped


def test_an_exception_leaves_nothing_behind():
    net = nn.Linear(32, 32)
    nv.learn_scales(net)
    with nv.nvfp4_autocast(), pytest.raises(RuntimeError):
        net(torch.ones(4, 31))
    assert not weight_transforms.local.running


def test_where_it_does_not_work_it_says_so():
    net = nn.Linear(32, 32)
    nv.learn_scales(net)
    with nv.nvfp4_autocast(), nv.frozen_weights(net), pytest.raises(RuntimeError, match="frozen_weights"):
        net(torch.ones(16, 32))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with nv.nvfp4_autocast(), pytest.raises(Exception, match=r"(?s)torch\.compile"):
        compiled(torch.ones(16, 32))


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: nv.learn_scales(3), TypeError, "torch.nn.Module"),
        (lambda: nv.learn_scales(nn.Linear(32, 32), "lsq"), ValueError, "'scale' or 'clip'"),
        (lambda: nv.learn_scales(nn.Linear(8, 32)), ValueError, "no layer that can run in NVFP4"),
        (lambda: nv.learn_scales(nn.Sequential(nn.Linear(32, 32)), layers="conv*"), ValueError, "no layer"),
    ],
)
def test_refusals(call, error, told):
    with pytest.raises(error, match=told):
        call()


def test_a_layer_learns_one_kind():
    net = nn.Linear(32, 32)
    nv.learn_scales(net, "clip")
    with pytest.raises(ValueError, match="the other kind"):
        nv.learn_scales(net, "scale")
