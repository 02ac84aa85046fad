"""TransformerEngine's layers under te_plugin.recipe: what a module keeps between calls, and those beside te.Linear."""

from __future__ import annotations

import copy
import io
import weakref
from typing import Any

import pytest
import torch

from tests.integrations.te.process import with_te
from tests.integrations.te.recipes import SR_OFF, recipe

ROLES = ("input", "weight", "grad_output")


@with_te
def test_fused_weight_gradient() -> None:
    """fuse_wgrad_accumulation: dw is added to main_grad in fp32, which TransformerEngine's dispatcher would lose."""
    import transformer_engine.pytorch as te

    import te_nvfp4_cv as nv
    from tests.integrations.te import composed

    layer = composed.linear(composed.operands((64, 64), 96)[1], fuse_wgrad_accumulation=True)
    layer.weight.main_grad = torch.zeros(96, 64)
    wanted = torch.zeros(96, 64)
    quantizer = nv.NVFP4Quantizer(rowwise=False, with_rht=True, backend="reference")
    for seed in range(2):
        x, _, dy, _ = composed.operands((64, 64), 96, seed=seed)
        with te.autocast(recipe=recipe(**SR_OFF)):
            y = layer(x.requires_grad_())
        y.backward(dy)
        nv.gemm(quantizer(dy), quantizer(x), "NT", accumulate=True, out=wanted, backend="reference")
    assert wanted.abs().max() > 0 and torch.equal(layer.weight.main_grad, wanted)


@with_te
def test_weight_kept_over_micro_batches() -> None:
    """is_first_microbatch: False takes the codes of before, also while an earlier forward waits for its backward."""
    import transformer_engine.pytorch as te

    from tests.integrations.te import composed

    x, w, dy, bias = composed.operands((32, 64), 96)
    layer = composed.linear(w, bias)
    wanted = composed.step(layer, x, dy, recipe(**SR_OFF))
    first = composed.step(layer, x, dy, recipe(**SR_OFF), is_first_microbatch=True)
    composed.same(first, wanted, "first")
    with torch.no_grad():
        layer.weight.mul_(-3)
    composed.same(composed.step(layer, x, dy, recipe(**SR_OFF), is_first_microbatch=False), wanted, "kept")
    xs = [x.clone().requires_grad_() for _ in range(2)]
    with te.autocast(recipe=recipe(**SR_OFF)):
        ys = [layer(x, is_first_microbatch=False) for x in xs]
    for y in ys:
        y.backward(dy)
    assert all(torch.equal(x.grad, wanted.dx) for x in xs)
    fresh = composed.step(layer, x, dy, recipe(**SR_OFF), is_first_microbatch=True)
    assert not torch.equal(fresh.y, wanted.y)
    composed.same(fresh, composed.step(layer, x, dy, recipe(**SR_OFF)), "rewritten in place")


@with_te
def test_update_in_place() -> None:
    """A storage is rewritten where it lies, and left alone where noop_flag is 1 (a CUDA graph's captured flag)."""
    from transformer_engine.pytorch.quantization import QuantizerRole

    quantizer = recipe().qfactory(QuantizerRole("linear", "weight"))
    a, b = torch.randn(2, 64, 64).unbind()
    storage, wanted = quantizer(a), quantizer(b)
    data = storage.rowwise_sub_storage.data
    before = data.clone()
    storage.quantize_(b, noop_flag=torch.ones(1))
    assert torch.equal(data, before)
    storage.quantize_(b, noop_flag=torch.zeros(1))
    assert storage.rowwise_sub_storage.data is data and not torch.equal(data, before)
    quantizer.quantize(a, out=storage)
    assert torch.equal(data, before)
    storage.quantize_(b)
    for face in ("rowwise_sub_storage", "columnwise_sub_storage"):
        for x, y in zip(
            getattr(storage, face).get_data_tensors(), getattr(wanted, face).get_data_tensors(), strict=True
        ):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


@with_te
def test_original_input_kept() -> None:
    """save_original_input: x is kept as it is and quantized again in backward; the codes are the same."""
    import warnings

    from transformer_engine.pytorch.quantization import QuantizerRole

    from tests.integrations.te import composed

    x, w, dy, _ = composed.operands((64, 64), 96)
    wanted = composed.step(composed.linear(w), x, dy, recipe(**SR_OFF))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # TransformerEngine warns where it ignores the request
        composed.same(composed.step(composed.linear(w, save_original_input=True), x, dy, recipe(**SR_OFF)), wanted)
    safe = {role: recipe().qfactory(QuantizerRole("linear", role)).is_requantization_safe() for role in ROLES}
    assert safe == {"input": True, "weight": True, "grad_output": False}


@with_te
def test_what_is_kept_for_backward() -> None:
    """Packed codes: x columnwise and w, 0.5625 byte an element and one amax each; nothing of x in its own precision."""
    import transformer_engine.pytorch as te

    from tests.integrations.te import composed

    x, w, _, _ = composed.operands((256, 128), 192)
    layer = composed.linear(w)
    kept: list[torch.Tensor] = []
    originals: list[Any] = []

    def pack(t: torch.Tensor) -> torch.Tensor:  # as a hook that offloads
        if t.data_ptr() == layer.weight.data_ptr():
            return t
        kept.append(t.clone())
        originals.append(weakref.ref(t))
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), te.autocast(recipe=recipe()):
        y = layer(x.clone().requires_grad_())
    assert originals and not any(ref() is not None for ref in originals), "something else holds what was offloaded"
    sizes = sum(t.numel() * t.element_size() for t in kept)
    face = lambda t: t.numel() // 2 + t.numel() // 16 + 4  # noqa: E731
    assert sizes == face(x) + 2 * face(w), sorted((tuple(t.shape), t.dtype) for t in kept)
    assert {t.dtype for t in kept} == {torch.uint8, torch.float8_e4m3fn, torch.float32}
    y.sum().backward()
    assert layer.weight.grad.abs().max() > 0


@with_te
def test_quantizers_are_made_once() -> None:
    """A recipe built anew at each step is the same object, so a module keeps its quantizers."""
    from tests.integrations.te import composed

    x, w, dy, _ = composed.operands((32, 64), 96)
    layer = composed.linear(w)
    composed.step(layer, x, dy, recipe())
    first = layer.quantizers["scaling_fwd"]
    composed.step(layer, x, dy, recipe())
    assert layer.quantizers["scaling_fwd"] is first
    composed.step(layer, x, dy, recipe(disable_rht=True))
    assert layer.quantizers["scaling_fwd"] is not first


@with_te
def test_amax_reduction() -> None:
    """Sequence parallelism sets a process group on a quantizer for one call: amax is reduced over it, then no more."""
    from unittest import mock

    from transformer_engine.pytorch.module._common import set_quantizer_amax_reduction_group
    from transformer_engine.pytorch.quantization import QuantizerRole

    groups = []

    def all_reduce(t: torch.Tensor, op: Any, group: Any) -> None:  # another rank has twice the amax
        groups.append(group)
        t.view(torch.float32).mul_(2)

    quantizer = recipe(**SR_OFF).qfactory(QuantizerRole("linear", "input"))
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    alone = quantizer(x)
    ranks = mock.patch("torch.distributed.get_world_size", lambda group: 2)
    with ranks, mock.patch("torch.distributed.all_reduce", all_reduce):
        set_quantizer_amax_reduction_group(quantizer, "the group")
        shared = quantizer(x)
        assert torch.equal(shared.rowwise_sub_storage.tensor.amax_rowwise, 2 * x.abs().max().float().view(1))
        set_quantizer_amax_reduction_group(quantizer, None)
        again = quantizer(x)
        shared._quantizer.update_quantized(x, shared)
    assert groups == ["the group"]
    for face, name in (("rowwise_sub_storage", "amax_rowwise"), ("columnwise_sub_storage", "amax_columnwise")):
        a, b = (getattr(getattr(t, face).tensor, name) for t in (alone, again))
        assert torch.equal(a, b)
        assert torch.equal(getattr(getattr(shared, face).tensor, name), a), "rewritten without the group"


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@with_te
def test_layer_norm_linear(normalization: str) -> None:
    """The norm in high precision, then the linear layer."""
    import transformer_engine.pytorch as te

    from tests.integrations.te import composed

    x, w, dy, bias = composed.operands((2, 32, 64), 96)
    layer = te.LayerNormLinear(64, 96, normalization=normalization, params_dtype=torch.bfloat16, device="cpu")
    with torch.no_grad():
        layer.weight.copy_(w)
        layer.bias.copy_(bias)
        layer.layer_norm_weight.uniform_(0.5, 1.5)
    got = composed.step(layer, x, dy, recipe(**SR_OFF))
    leaf = x.clone().requires_grad_()
    gamma = layer.layer_norm_weight.detach().clone().requires_grad_()
    if normalization == "LayerNorm":
        normed = torch.nn.functional.layer_norm(leaf.float(), (64,), gamma.float(), layer.layer_norm_bias.float(), 1e-5)
    else:
        normed = torch.nn.functional.rms_norm(leaf.float(), (64,), gamma.float(), 1e-5)
    normed = normed.bfloat16()
    inner = composed.step(composed.linear(w, bias), normed.detach(), dy, recipe(**SR_OFF))
    normed.backward(inner.dx)
    assert (got.y != inner.y).float().mean() < 0.02  # a norm that rounds otherwise in a few places
    for a, b in ((got.y, inner.y), (got.dw, inner.dw), (got.db, inner.db), (got.dx, leaf.grad)):
        assert (a.float() - b.float()).norm() < 0.01 * b.float().norm()
    assert (layer.layer_norm_weight.grad.float() - gamma.grad.float()).norm() < 0.01 * gamma.grad.float().norm()


@with_te
def test_fusible_linear() -> None:
    """te.ops.Linear without a bias."""
    import transformer_engine.pytorch as te

    from tests.integrations.te import composed

    x, w, dy, _ = composed.operands((32, 64), 96)
    layer = te.ops.Linear(64, 96, bias=False, device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(w)
    composed.same(
        composed.step(layer, x, dy, recipe(**SR_OFF)), composed.step(composed.linear(w), x, dy, recipe(**SR_OFF))
    )


@with_te
def test_layer_norm_mlp() -> None:
    """Both linear layers run all three GEMMs in NVFP4; TransformerEngine's own reference cannot run this module."""
    import transformer_engine.pytorch as te

    from tests.integrations.te import composed

    x, w1, _, b1 = composed.operands((32, 64), 128)
    _, w2, dy, b2 = composed.operands((32, 128), 64, seed=1)
    layer = te.LayerNormMLP(64, 128, params_dtype=torch.bfloat16, device="cpu")
    with torch.no_grad():
        for parameter, value in (
            (layer.fc1_weight, w1),
            (layer.fc1_bias, b1),
            (layer.fc2_weight, w2),
            (layer.fc2_bias, b2),
        ):
            parameter.copy_(value)
    leaf = x.clone().requires_grad_()
    with te.autocast(recipe=recipe(**SR_OFF)):
        y = layer(leaf)
    y.backward(dy)

    other = x.clone().requires_grad_()
    fc1, fc2 = composed.linear(w1, b1), composed.linear(w2, b2)
    normed = torch.nn.functional.layer_norm(other.float(), (64,)).bfloat16()
    with te.autocast(recipe=recipe(**SR_OFF)):
        z = fc2(torch.nn.functional.gelu(fc1(normed), approximate="tanh"))
    z.backward(dy)
    pairs = {
        "y": (y, z),
        "dx": (leaf.grad, other.grad),
        "dw1": (layer.fc1_weight.grad, fc1.weight.grad),
        "db1": (layer.fc1_bias.grad, fc1.bias.grad),
        "dw2": (layer.fc2_weight.grad, fc2.weight.grad),
        "db2": (layer.fc2_bias.grad, fc2.bias.grad),
    }
    for name, (a, b) in pairs.items():
        assert b.abs().max() > 0 and (a.float() - b.float()).norm() < 0.01 * b.float().norm(), name


@with_te
def test_a_model_learns_and_is_saved() -> None:
    """Three layers with bias, the whole recipe: the loss falls; a checkpoint and a copy give equal bits."""
    import transformer_engine.pytorch as te

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fc3 = (te.Linear(a, b, device="cpu") for a, b in ((32, 64), (64, 64), (64, 16)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))

    x = torch.randn(128, 32)
    target = torch.tanh(x @ torch.randn(32, 16) * 0.3)

    def losses(nvfp4: bool) -> tuple[Model, list[float]]:
        torch.manual_seed(1)
        model = Model()
        optimizer, values = torch.optim.AdamW(model.parameters(), lr=3e-3), []
        for _ in range(60):
            with te.autocast(enabled=nvfp4, recipe=recipe("auto")):
                loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return model, values

    model, values = losses(True)
    _, plain = losses(False)
    assert values != plain and values[-1] < 0.35 * values[0] and values[-1] < 3 * plain[-1] + 0.02, (
        values[-1],
        plain[-1],
    )

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = Model()
    other.load_state_dict(torch.load(file, weights_only=False))
    with te.autocast(recipe=recipe("auto")):
        wanted = model(x)
        assert torch.equal(other(x), wanted) and torch.equal(copy.deepcopy(model)(x), wanted)
