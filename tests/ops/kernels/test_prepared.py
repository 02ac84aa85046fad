"""A training step by launches that were looked up before has the bits, strides and state of the long way."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import te_nvfp4_cv as nv
from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.layer import delayed_scaling, prepared

pytestmark = pytest.mark.usefixtures("one_thread")
LAST, FIRST = torch.channels_last, torch.contiguous_format
RECIPES = {name: nv.NVFP4BlockScaling(tensor_scale=name) for name in ("current", "delayed", "current_pow2")}
RECIPES["plain"] = nv.NVFP4BlockScaling(disable_rht=True, disable_stochastic_rounding=True)
LAYERS = {
    "3x3": (lambda: nn.Conv2d(16, 24, 3, padding=1, bias=False), (16, 16, 3, 2), LAST),
    "stride, groups, bias": (lambda: nn.Conv2d(32, 64, 3, stride=2, groups=2), (16, 32, 5, 5), LAST),
    "1x1, images first": (lambda: nn.Conv2d(16, 16, 1), (16, 16, 2, 2), FIRST),
    "one pixel": (lambda: nn.Conv2d(24, 16, 1), (16, 24, 1, 1), LAST),
    "transposed": (lambda: nn.ConvTranspose2d(16, 32, 2, stride=2), (16, 16, 2, 2), LAST),
    "linear": (lambda: nn.Linear(16, 24), (3, 2, 16), FIRST),
    "linear, whole blocks": (lambda: nn.Linear(32, 16, bias=False), (16, 32), FIRST),
    "a batch that fills no block": (lambda: nn.Conv2d(16, 16, 2), (3, 16, 2, 2), LAST),
    "taps in the padding": (lambda: nn.Conv2d(16, 16, 3, padding=1), (3, 16, 1, 1), LAST),
    "3-d": (lambda: nn.Conv3d(16, 16, (1, 2, 2)), (16, 16, 1, 2, 3), FIRST),
}


@pytest.fixture(autouse=True)
def passes(kernel_device, monkeypatch):
    """Let a CPU take CUDA's way; the passes that were prepared, by name."""
    monkeypatch.setattr(dispatch, "KERNELS_ON_CPU", True)
    counted = []
    for name in ("forward", "backward"):
        run = getattr(prepared.PreparedLayer, name)

        def counting(self, *args, _run=run, _name=name):
            counted.append(_name)
            return _run(self, *args)

        monkeypatch.setattr(prepared.PreparedLayer, name, counting)
    return counted


def steps(layer, recipe, device, dtype, number=2, run=None):
    """Return what each of some training steps makes of the same tensors and random numbers, and the saved state."""
    make, shape, memory_format = LAYERS[layer]
    torch.manual_seed(3)
    module, x = make(), torch.randn(shape)
    if memory_format == LAST:
        module, x = module.to(memory_format=LAST), x.to(memory_format=LAST)
    module, x, made = module.to(device), x.to(device).requires_grad_(), []
    for _ in range(number):
        torch.manual_seed(4)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            with nv.nvfp4_autocast(dataclasses.replace(recipe), backend="vendor"):
                y = module(x) if run is None else run(module, x)
        assert not y._is_view()  # or autograd would refuse to change it in place
        made.append([y, *torch.autograd.grad(y, [x, *module.parameters()], torch.randn_like(y))])
    return made, nv.extra_state(module)


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        longer = [axis for axis in range(a.dim()) if a.shape[axis] > 1]
        assert all(a.stride(axis) == b.stride(axis) for axis in longer)
        assert torch.equal(a, b)


# recipe: own scales, powers of two, operands that are not rotated; layer: what decides a launch or a result's strides
@pytest.mark.parametrize(
    ("layer", "recipe", "dtype"),
    [
        ("3x3", "current", torch.bfloat16),
        ("3x3", "plain", torch.float32),
        ("3-d", "current_pow2", torch.bfloat16),
        ("taps in the padding", "current_pow2", torch.bfloat16),
        ("stride, groups, bias", "current", torch.float32),
        ("1x1, images first", "current", torch.bfloat16),
        ("linear", "current", torch.bfloat16),
        ("linear, whole blocks", "plain", torch.float32),
        ("a batch that fills no block", "plain", torch.float32),
    ],
    ids=str,
)
def test_a_prepared_step_equals_the_one_before(kernel_device, passes, layer, recipe, dtype):
    (first, second), _ = steps(layer, RECIPES[recipe], kernel_device, dtype)
    assert passes == ["forward", "backward"]  # the first step is remembered
    assert_same(second, first)


def twice(module, x):
    return module(x / 4) + module(x)  # of two calls in a step the first one moves the scales


@pytest.mark.parametrize(
    ("layer", "dtype", "run"),
    [("transposed", torch.bfloat16, None), ("one pixel", torch.float32, twice), ("linear", torch.bfloat16, None)],
    ids=["transposed", "one pixel, two calls", "linear"],
)
def test_scales_of_an_earlier_step_move_as_without(kernel_device, monkeypatch, passes, layer, dtype, run):
    args = (layer, RECIPES["delayed"], kernel_device, dtype, 3, run)
    found, state = steps(*args)
    assert passes.count("forward") == passes.count("backward") >= 2
    calls = len(passes)
    monkeypatch.setattr(prepared, "fits", lambda *_: False)
    expected, other = steps(*args)
    assert len(passes) == calls
    assert_same(sum(found, []), sum(expected, []))
    leaves = [torch.utils._pytree.tree_leaves(one) for one in (state, other)]
    assert [str(leaf) for leaf in leaves[0]] == [str(leaf) for leaf in leaves[1]]


def by_name(module, x):
    return nv.functional.conv2d(x, module.weight, module.bias, recipe=RECIPES["plain"], backend="vendor")


def as_ours(module, x):
    nv.convert_model(module)
    return module(x)


@pytest.mark.parametrize("run", [as_ours, by_name])
def test_layers_that_ask_by_name_are_prepared(kernel_device, passes, run):
    (first, second), _ = steps("one pixel", RECIPES["plain"], kernel_device, torch.float32, run=run)
    assert passes == ["forward", "backward"]
    assert_same(second, first)


def checkpointed(module, x):
    return checkpoint(module, x, use_reentrant=False)


def hooked(module, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return module(x)


@pytest.mark.parametrize(("run", "recipe"), [(checkpointed, "delayed"), (hooked, "plain")])
def test_who_sees_saved_tensors_sees_those_of_the_long_way(kernel_device, passes, run, recipe):
    steps("one pixel", RECIPES[recipe], kernel_device, torch.float32, run=run)
    assert not passes


def test_second_derivatives_are_refused_and_a_graph_may_be_kept(kernel_device, passes):
    conv, x = nn.Conv2d(16, 16, 3).to(kernel_device), torch.randn(16, 16, 3, 3, device=kernel_device).requires_grad_()
    for _ in range(2):
        with nv.nvfp4_autocast(RECIPES["plain"], backend="vendor"):
            y = conv(x)
    first, second = (torch.autograd.grad(y.sum(), [x, conv.weight], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert passes == ["forward", "backward", "backward"]
    dx, _ = torch.autograd.grad(y.sum(), [x, conv.weight], create_graph=True)
    assert torch.equal(dx, first[0])
    with pytest.raises(RuntimeError, match="differentiated again"):
        dx.sum().backward()


def in_bf16(module, function):
    """Call a function while the module's weight, the same Parameter, is in bf16."""
    values = module.weight.data
    module.weight.data = values.bfloat16()
    try:
        return function()
    finally:
        module.weight.data = values


def test_a_call_is_looked_at_again_when_it_differs(kernel_device, passes):
    """What a call is remembered by: each change takes the long way once, and gives what that gives."""
    conv = nn.Conv2d(16, 16, 1, bias=False).to(kernel_device, memory_format=LAST)
    x = torch.randn(16, 16, 2, 2, device=kernel_device).contiguous(memory_format=LAST)

    def run(x, conv=conv, recipe=RECIPES["plain"], **context):
        with nv.nvfp4_autocast(recipe, backend="vendor", **context):
            return conv(x)

    x.requires_grad_()
    run(x)
    expected = run(x)
    assert passes == ["forward"]
    changes = {
        "another shape": lambda: run(torch.cat((x, x))),
        "no gradient of x": lambda: run(x.detach()),
        "no gradients": lambda: torch.no_grad()(run)(x),
        "other strides": lambda: run(x.contiguous()),
        "another dtype": lambda: in_bf16(conv, lambda: run(x.detach().bfloat16().requires_grad_())),
        "off": lambda: run(x, enabled=False),
        "another recipe": lambda: run(x, recipe=RECIPES["current_pow2"]),
    }
    for name, change in changes.items():
        passes.clear()
        y = change()
        assert not passes, name
        if name not in ("another dtype", "off", "another recipe"):
            assert torch.equal(y[:16], expected), name
    run(x)
    run(x)
    conv.weight.data = conv.weight.data * 2  # a power of two
    assert torch.equal(run(x), expected * 2)
    with torch.no_grad():
        conv.weight.mul_(2)
    assert torch.equal(run(x), expected * 4) and passes


def test_scales_stay_as_they_are_where_they_are_only_read(kernel_device, passes):
    """Sensitivity runs passes with gradients inside of reading_only: they moved a model's scales."""
    conv, x = nn.Conv2d(16, 16, 1).to(kernel_device), torch.randn(16, 16, 2, 2, device=kernel_device).requires_grad_()

    def step(x):
        with nv.nvfp4_autocast(RECIPES["delayed"], backend="vendor"):
            conv(x).sum().backward()

    for _ in range(3):
        step(x)
    assert passes.count("forward") >= 1
    before, calls = nv.extra_state(conv)["scales"], len(passes)
    with delayed_scaling.reading_only():
        step((x * 4).detach().requires_grad_())
    assert str(nv.extra_state(conv)["scales"]) == str(before) and len(passes) == calls
    (state,) = delayed_scaling._states[conv.weight].values()
    state.in_graphs = True  # as a forward under capture sets it: replays move the scales, and nobody here sees that
    step(x)
    assert len(passes) == calls


def test_evaluation_between_two_steps_costs_no_prepared_layer(kernel_device, passes, monkeypatch):
    conv, x = nn.Conv2d(16, 16, 1).to(kernel_device), torch.randn(16, 16, 2, 2, device=kernel_device).requires_grad_()
    made = []
    monkeypatch.setattr(prepared, "fits", lambda *given, fits=prepared.fits: (made.append(1), fits(*given))[1])
    for _ in range(3):
        with nv.nvfp4_autocast(RECIPES["plain"], backend="vendor"):
            conv(x)
            with torch.no_grad():
                conv(x)
    assert len(made) == 1 and passes == ["forward"] * 2


def test_a_bias_that_is_not_contiguous(kernel_device, passes):
    weight = nn.Parameter(torch.randn(16, 16, 1, 1, device=kernel_device))
    x, table = (torch.randn(shape, device=kernel_device) for shape in ((16, 16, 2, 2), (16, 2)))
    x.requires_grad_()
    for bias in (table[:, 0], table[:1, 0].expand(16)):
        passes.clear()
        with nv.nvfp4_autocast(RECIPES["current"], backend="vendor"):
            expected = nn.functional.conv2d(x, weight, bias.contiguous())
            given = [nn.functional.conv2d(x, weight, bias) for _ in range(2)]
        assert passes and all(torch.equal(y, expected) for y in given)


def test_a_dispatch_mode_around_backward_sees_the_operators(kernel_device, passes):
    conv, x = nn.Conv2d(16, 16, 1).to(kernel_device), torch.randn(16, 16, 2, 2, device=kernel_device).requires_grad_()
    with nv.nvfp4_autocast(RECIPES["plain"], backend="vendor"):
        conv(x)
        y = conv(x)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        y.sum().backward()
    assert passes == ["forward"] and any("te_nvfp4_cv" in name for name in seen)
