"""nv.sensitivity.update_bn: statistics of the precision asked for, momentum and flags kept, a switch in training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.sensitivity import update_bn
from tests.helpers import same_bits
from tests.networks import NO_SR


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32, momentum=0.3),
        nn.ReLU(),
        nn.Conv2d(32, 16, 1),
        nn.BatchNorm2d(16, momentum=None),
        nn.Dropout(0.5),
    )


def loader(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 16, 6, 6, generator=generator), torch.zeros(4)) for _ in range(count)]


def statistics(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.named_buffers()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name].view(-1), b[name].view(-1)) for name in a)


def test_statistics_are_plain_means_over_the_batches():
    net, batches = model(), loader()
    outputs = [net[0](x).detach() for x, _ in batches]
    assert update_bn(net, batches) == 3
    assert torch.allclose(net[1].running_mean, sum(y.mean((0, 2, 3)) for y in outputs) / 3, atol=1e-6)
    assert torch.allclose(net[1].running_var, sum(y.var((0, 2, 3)) for y in outputs) / 3, atol=1e-6)
    assert int(net[1].num_batches_tracked) == 3
    assert (net[1].momentum, net[4].momentum) == (0.3, None)


def test_the_contexts_rule_and_flags_stay():
    net = model().eval()
    net[5].train()
    flags = [module.training for module in net.modules()]
    high, low = copy.deepcopy(net), copy.deepcopy(net)
    by_hand = copy.deepcopy(net)
    assert update_bn(high, loader()) == update_bn(low, iter(loader()), nv.nvfp4_autocast(NO_SR)) == 3
    assert [module.training for module in low.modules()] == flags
    assert not same(statistics(high), statistics(low))
    with nv.nvfp4_autocast(NO_SR):
        torch.optim.swa_utils.update_bn(loader(), by_hand)
    assert same(statistics(by_hand), statistics(low))
    twice = copy.deepcopy(net)
    update_bn(twice, loader(), nv.nvfp4_autocast(NO_SR), nv.nvfp4_autocast(enabled=False))
    assert same(statistics(twice), statistics(high))
    tensors = copy.deepcopy(net)
    assert update_bn(tensors, [x for x, _ in loader()], device="cpu") == 3
    assert same(statistics(tensors), statistics(high))


def test_weights_gradients_and_delayed_scales_stay():
    net = model()
    recipe = nv.NVFP4BlockScaling(tensor_scale="delayed")
    with nv.nvfp4_autocast(recipe):
        net(loader()[0][0]).square().mean().backward()
    weights = [(p.clone(), p.grad.clone()) for p in net.parameters()]
    scales = str(nv.extra_state(net)["scales"])
    update_bn(net, loader(), nv.nvfp4_autocast(recipe))
    assert all(same_bits(p, w) and same_bits(p.grad, g) for p, (w, g) in zip(net.parameters(), weights, strict=True))
    assert str(nv.extra_state(net)["scales"]) == scales and "saturated" in scales


def test_without_batch_norm_the_loader_is_not_read(recwarn):
    def never() -> object:
        raise AssertionError
        yield

    net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.GroupNorm(4, 16))
    assert update_bn(net, never()) == 0 and not recwarn.list


@pytest.mark.parametrize("kind", ["empty", "raises", "shape"])
def test_an_error_puts_everything_back(kind):
    net = model().eval()
    before = statistics(net)

    def raising() -> object:
        yield loader()[0]
        raise KeyError("mine")

    batches, error, told = {
        "empty": ([], ValueError, "no batches"),
        "raises": (raising(), KeyError, "mine"),
        "shape": ([loader()[0], (torch.ones(1, 3, 4, 4), 0)], RuntimeError, "channels"),
    }[kind]
    with pytest.raises(error, match=told):
        update_bn(net, batches)
    assert same(before, statistics(net)) and not any(module.training for module in net.modules())
    assert (net[1].momentum, net[4].momentum) == (0.3, None)


def test_arguments_in_torchs_order_are_refused():
    with pytest.raises(TypeError, match="torch's own takes the loader first"):
        update_bn(loader(), model())
    with pytest.raises(TypeError, match=r"no batches[\s\S]*\[images\]"):
        update_bn(model(), torch.ones(2, 3, 4, 4))


class Numbered:
    """A sequence that has indices and no __iter__, over which Python iterates all the same."""

    def __init__(self, items):
        self.items = items

    def __getitem__(self, at):
        return self.items[at]


def test_batches_with_indices_alone_are_taken_and_samples_are_not():
    net = model()
    assert update_bn(net, Numbered(loader())) == 3
    samples = torch.utils.data.TensorDataset(torch.ones(4, 16, 6, 6))
    with pytest.raises(TypeError, match=r"no batches[\s\S]*DataLoader\(dataset"):
        update_bn(net, samples)


def test_a_switch_to_high_precision_in_the_middle_of_training():
    """The last epoch in high precision, then statistics of that precision: evaluation is that of a plain model."""
    net, batches, recipe = model(), loader(4), nv.NVFP4BlockScaling()
    net[5].p = 0.0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    losses = []
    for epoch in range(4):
        seen = []
        for x, _ in batches:
            optimizer.zero_grad()
            with nv.nvfp4_autocast(recipe, enabled=epoch < 4 - 1):
                seen.append(nv.active_recipe())
                loss = (net(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert set(seen) == ({recipe} if epoch < 3 else {None})
    assert sum(losses[-4:]) < sum(losses[:4])
    stale = statistics(net)
    assert update_bn(net, batches) == 4
    fresh = statistics(net)
    assert not same(stale, fresh)
    # torch: trained batch norm and estimated one agree on the data that they were estimated from
    net.eval()
    with torch.no_grad():
        normalized = torch.cat([net[1](net[0](x)) for x, _ in batches])
    scale = (normalized.mean((0, 2, 3)) - net[1].bias) / net[1].weight
    assert torch.allclose(scale, torch.zeros(32), atol=1e-5)
