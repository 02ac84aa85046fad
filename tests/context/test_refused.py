"""What torch can do with a plain model and NVFP4 cannot: an error that says so, or what torch does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import te_nvfp4_cv as nv

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning", "ignore:nvfp4. only")
FIX = r"nvfp4[\s\S]*got:[\s\S]*needs:[\s\S]*fix:"


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3))


# ---- gradients of many outputs at once ----


def test_batched_gradients_are_refused():
    model, x = network(), torch.randn(4, 32, 8, 8, requires_grad=True)
    with nv.nvfp4_autocast():
        y = model(x).mean((2, 3))
    with pytest.raises(RuntimeError, match=FIX + "[\\s\\S]*is_grads_batched=False"):
        torch.autograd.grad(y, x, torch.randn(3, *y.shape), is_grads_batched=True)

    def forward(z):
        with nv.nvfp4_autocast():
            return model(z).mean((2, 3))

    with pytest.raises(RuntimeError, match=FIX):
        torch.autograd.functional.jacobian(forward, x, vectorize=True)
    with nv.nvfp4_autocast():
        y = model(x).mean((2, 3))
    with pytest.raises(RuntimeError, match=FIX):
        torch.vmap(lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0])(torch.randn(3, *y.shape))
    assert torch.autograd.functional.jacobian(forward, x).shape == (4, 16, 4, 32, 8, 8)
    with nv.nvfp4_autocast(enabled=False):
        y = model(x).mean((2, 3))
    assert torch.autograd.grad(y, x, torch.randn(3, *y.shape), is_grads_batched=True)[0].shape == (3, *x.shape)


def test_the_masked_relu_refuses_them_too():
    x = torch.randn(4, 8, requires_grad=True)
    with nv.nvfp4_autocast():
        y = torch.relu(x * 2)
    with pytest.raises(RuntimeError, match=FIX):
        torch.autograd.grad(y, x, torch.randn(3, 4, 8), is_grads_batched=True)
    with nv.nvfp4_autocast(relu_mask=False):
        y = torch.relu(x * 2)
    torch.autograd.grad(y, x, torch.randn(3, 4, 8), is_grads_batched=True)


def test_gradients_with_a_graph_may_be_written_to():
    model, x = network(), torch.randn(4, 32, 8, 8, requires_grad=True)
    recipe = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)
    with nv.nvfp4_autocast(recipe):
        loss = model(x).square().sum()
    wanted = [x, *model.parameters()]
    plain = torch.autograd.grad(loss, wanted, retain_graph=True)
    found = torch.autograd.grad(loss, wanted, create_graph=True)
    assert all(map(torch.equal, plain, found))
    assert all(torch.equal(g.mul_(2), 2 * p) for g, p in zip(found, plain, strict=True))
    with pytest.raises(RuntimeError, match="differentiated again"):
        found[0].sum().backward()


# ---- TorchScript ----


def test_torch_jit_trace():
    model, x = network(), torch.randn(4, 32, 8, 8)
    with nv.nvfp4_autocast(), pytest.raises(RuntimeError, match=FIX + "[\\s\\S]*enabled=False"):
        torch.jit.trace(model, x)
    nv.set_precision(model, {"*": None})
    plain = model(x)
    assert torch.equal(torch.jit.trace(model, x)(x), plain)
    with nv.nvfp4_autocast(), pytest.warns(UserWarning, match="is a ScriptModule"):  # all of it in high precision
        assert torch.equal(torch.jit.trace(model, x)(x), plain)


def test_torch_jit_trace_of_a_model_with_entries():
    """Entries with a recipe leave a trace outside of all contexts alone, and change nothing about one inside."""
    model, x = network(), torch.randn(4, 32, 8, 8)
    plain = model(x)
    nv.set_precision(model, {"0": nv.NVFP4BlockScaling(disable_rht=True)})
    traced = torch.jit.trace(model, x)
    assert torch.equal(traced(x), plain) and torch.equal(model(x), plain)
    with nv.nvfp4_autocast():
        with pytest.raises(RuntimeError, match=FIX):
            torch.jit.trace(model, x)
        with pytest.warns(UserWarning, match="is a ScriptModule"):
            assert torch.equal(traced(x), plain)
        assert not torch.equal(model(x), plain)


def test_torch_jit_script():
    model, x = network(), torch.randn(4, 32, 8, 8)
    with nv.nvfp4_autocast():
        with pytest.raises(RuntimeError, match=FIX):
            torch.jit.script(model)
        torch.jit.script(nn.Sequential(nn.ReLU(), nn.Flatten()))  # no layer that would run in high precision
    assert torch.equal(torch.jit.script(model)(x), model(x))
    nv.set_precision(model, {"0": None})
    with pytest.raises(AttributeError, match=FIX):
        torch.jit.script(model)
    assert getattr(next(iter(model[0]._forward_hooks.values())), "__name__", None) is None
    nv.clear_precision(model)
    assert torch.equal(torch.jit.script(model)(x), model(x))


def test_torch_compile_traces_the_backward_of_a_masked_relu():
    torch._dynamo.reset()
    x = torch.randn(4, 8, requires_grad=True)
    with nv.nvfp4_autocast():
        y = torch.compile(lambda z: torch.relu(z * 2), backend="aot_eager", fullgraph=True)(x)
        plain = torch.relu(x * 2)
    assert torch.equal(*(torch.autograd.grad(z.sum(), x)[0] for z in (y, plain)))
    torch._dynamo.reset()
