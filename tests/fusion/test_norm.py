"""Norm + activation as one node, and its modules: torch's values and gradients, less memory, errors of torch's kind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv import nvfp4_autocast
from te_nvfp4_cv.fusion.modules import NORM_CLASSES, BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, GroupNormAct
from te_nvfp4_cv.fusion.norm_act import batch_norm_act, group_norm_act
from te_nvfp4_cv.ops.norm.operators import NormSpec
from tests.helpers import relative_error, same_bits, values

pytestmark = pytest.mark.usefixtures("one_thread")
NEAR = {torch.float32: 3e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}


TORCHS = {
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "relu6": nn.ReLU6(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "leaky_relu": nn.LeakyReLU(),
    "leaky_relu:0.2": nn.LeakyReLU(0.2),
    "leaky_relu:0.0": nn.LeakyReLU(0.0),
}


def some_norm(kind: str, channels: int = 24, **settings) -> nn.Module:
    torch.manual_seed(3)
    norm = nn.GroupNorm(4, channels, **settings) if kind == "group" else nn.BatchNorm2d(channels, **settings)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    if kind == "batch" and norm.running_mean is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def fused_of(norm: nn.Module) -> nn.Module:
    norm = copy.deepcopy(norm)
    norm.__class__ = NORM_CLASSES[type(norm)]
    return norm


def chain(norm: nn.Module, z: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    u = norm(z) if residual is None else norm(z) + residual
    return TORCHS[activation](u)


def outcome(norm: nn.Module, z: Tensor, residual: Tensor | None, activation: str, dy: Tensor) -> dict[str, Tensor]:
    """y, gradients and buffers of one step."""
    z = z.clone().requires_grad_()
    residual = None if residual is None else residual.clone().requires_grad_()
    fused = type(norm) in NORM_CLASSES.values()
    y = norm(z, residual, activation) if fused else chain(norm, z, residual, activation)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach(), "dz": z.grad, **{f"d{n}": p.grad for n, p in norm.named_parameters()}}
    if residual is not None:
        found["dresidual"] = residual.grad
    return {**found, **{n: b.clone().reshape(-1) for n, b in norm.named_buffers()}}


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "what", ["batch relu", "batch add relu", "batch silu", "group relu", "group add relu", "group silu"]
)
def test_values_and_gradients_are_torchs(what, training, layout, dtype):
    kind, activation = what.split()[0], what.split()[-1]
    norm = some_norm(kind).train(training)
    if dtype == torch.float64:
        norm.double()
    z = (values((4, 24, 5, 6)) * 2 + 1).to(dtype)
    residual = values(z.shape, seed=1).to(dtype) if "add" in what else None
    dy = values(z.shape, seed=2).to(dtype)
    if layout == "channels_last":
        z, dy = (t.to(memory_format=torch.channels_last) for t in (z, dy))
    elif layout == "transposed":
        z = z.transpose(2, 3).contiguous().transpose(2, 3)
    expected, found = (outcome(n, z, residual, activation, dy) for n in (norm, fused_of(norm)))
    assert expected.keys() == found.keys()
    for name, truth in expected.items():
        exact = name in ("y", "dresidual", "num_batches_tracked") or name.startswith("running")
        if exact and layout != "transposed":  # which is copied: another order of summation
            assert same_bits(found[name], truth), name
        else:
            if not truth.dtype.is_floating_point:
                assert torch.equal(found[name], truth)
                continue
            assert found[name].dtype == truth.dtype and found[name].shape == truth.shape
            near = NEAR[dtype] if name == "dz" or exact else max(1e-5, NEAR[dtype])
            assert relative_error(found[name], truth) <= near, name
    if layout != "transposed":
        assert found["y"].stride() == expected["y"].stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["batch", "group"])
@pytest.mark.parametrize("activation", list(TORCHS)[2:])
def test_other_activations_are_torchs(activation, kind, training, dtype):
    norm = some_norm(kind).train(training)
    z = (values((4, 24, 5, 6)) * 4).to(dtype)  # far enough on both sides for the kinks of Hardswish and ReLU6
    dy = values(z.shape, seed=2).to(dtype)
    expected, found = (outcome(n, z, None, activation, dy) for n in (norm, fused_of(norm)))
    for name, truth in expected.items():
        if training or name in ("y", "num_batches_tracked"):
            assert same_bits(found[name], truth), name
        else:  # the running variance is taken from the saved 1 / sqrt(variance + eps)
            assert relative_error(found[name], truth) <= 2 * NEAR[dtype], name


def test_unknown_activations_are_refused():
    for make in (lambda: BatchNormAct2d(8, activation="elu"), lambda: BatchNormAct2d(8, activation="silu:2")):
        with pytest.raises(ValueError, match="BatchNormAct2d: unknown activation"):
            make()
    with pytest.raises(ValueError, match="norm_act: unknown activation"):
        batch_norm_act(values((2, 8, 3, 3)), None, None, training=True, activation="elu")


@pytest.mark.parametrize(
    "settings",
    [
        dict(momentum=None),
        dict(track_running_stats=False),
        dict(affine=False),
        dict(momentum=0.0),
        dict(eps=0.1, momentum=0.9),
    ],
    ids=str,
)
def test_batch_norm_options_over_several_steps(settings):
    norm = some_norm("batch", **settings)
    fused = fused_of(norm)
    for step in range(4):
        for n in (norm, fused):
            n.train(step != 2)
        z, dy = values((3, 24, 4, 4), seed=step), values((3, 24, 4, 4), seed=9 + step)
        expected, found = (outcome(n, z, None, "relu", dy) for n in (norm, fused))
        for name, truth in expected.items():
            if truth is not None and truth.dtype.is_floating_point:
                assert relative_error(found[name], truth) < 1e-5, (step, name)
            else:
                assert truth is None or torch.equal(found[name], truth)
    for a, b in zip(norm.buffers(), fused.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("cls", "shape"),
    [(BatchNormAct1d, (6, 8)), (BatchNormAct1d, (6, 8, 5)), (BatchNormAct3d, (2, 8, 3, 4, 5)), (GroupNormAct, (6, 8))],
)
def test_ranks(cls, shape):
    fused = cls(2, 8, activation="relu") if cls is GroupNormAct else cls(8, activation="relu")
    plain = copy.deepcopy(fused)
    plain.__class__ = {v: k for k, v in NORM_CLASSES.items()}[cls]
    z = values(shape)
    assert same_bits(fused(z).detach(), F.relu(plain(z)).detach())
    assert list(fused.state_dict()) == list(plain.state_dict())


def saved(run) -> int:
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    del y
    return sum(kept.values())


@pytest.mark.parametrize("what", ["batch relu", "group silu", "batch add relu", "batch hardswish", "group gelu"])
def test_only_the_input_and_one_bit_are_kept(what):
    kind, activation = what.split()[0], what.split()[-1]
    norm = fused_of(some_norm(kind, 16))
    z = values((8, 16, 16, 16)).bfloat16().requires_grad_()
    residual = values(z.shape).bfloat16().requires_grad_() if "add" in what else None
    bits = z.numel() // 8 if activation == "relu" else 0
    count = saved(lambda: norm(z, residual, activation))
    assert z.numel() * 2 + bits <= count <= z.numel() * 2 + bits + 4096
    with torch.no_grad():
        assert saved(lambda: norm(z, residual, activation)) == 0


def test_autocast_keeps_the_inputs_dtype():
    for kind in ("batch", "group"):
        norm = fused_of(some_norm(kind))
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(values((2, 24, 4, 4)).bfloat16(), None, "relu").dtype == torch.bfloat16
            assert norm(values((2, 24, 4, 4)), None, "relu").dtype == torch.float32
    z, residual = values((2, 24, 4, 4)).bfloat16(), values((2, 24, 4, 4))
    assert some_norm("batch")(z).add(residual).dtype == torch.float32
    assert fused_of(some_norm("batch"))(z, residual, "relu").dtype == torch.float32


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_gradients(activation, training):
    z, w, b = (values(s, seed=i).double().requires_grad_() for i, s in enumerate([(3, 4, 2, 3), (4,), (4,)]))
    running = torch.zeros(4).double(), torch.ones(4).double()

    def batch(z, w, b):
        stats = (None, None) if training else running
        return batch_norm_act(z, *stats, w, b, training, activation=activation)

    def group(z, w, b):
        return group_norm_act(z, 2, w, b, activation=activation)

    for function in (batch, group):
        assert torch.autograd.gradcheck(function, (z, w, b))
        assert torch.autograd.gradgradcheck(function, (z, w, b))


def test_calls_that_the_operator_does_not_take_run_as_torch():
    norm = fused_of(some_norm("batch"))
    plain = some_norm("batch")
    z = values((2, 24, 4, 4))
    broadcast = values((1, 24, 1, 1), seed=4)
    assert same_bits(norm(z, broadcast, "relu").detach(), F.relu(plain(z) + broadcast).detach())
    assert same_bits(norm(z, z, "silu").detach(), F.silu(plain(z) + z).detach())
    assert same_bits(norm(z).detach(), plain(z).detach())
    assert same_bits(norm(z, z).detach(), (plain(z) + z).detach())
    group = fused_of(some_norm("group"))
    batched = torch.func.vmap(lambda t: group(t[None], None, "relu"))(z)
    assert batched.shape == (2, 1, 24, 4, 4)


def test_eval_statistics_are_captured_at_the_call():
    norm = fused_of(some_norm("batch")).eval()
    z = values((2, 24, 4, 4)).requires_grad_()
    version = norm.running_mean._version
    norm(z, None, "relu").sum().backward()
    before = z.grad.clone()
    assert norm.running_mean._version == version
    z.grad = None
    y = norm(z, None, "relu")
    norm.running_var.fill_(100.0)  # torch raises in backward here; the node holds its own copy
    y.sum().backward()
    assert torch.equal(z.grad, before)


def test_errors():
    norm = BatchNormAct2d(24, activation="relu")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        norm(values((1, 24, 1, 1)))
    with pytest.raises(ValueError, match="expected 4D input"):
        norm(values((2, 24, 4)))
    with pytest.raises(ValueError, match="weight does not match"):
        norm(values((2, 23, 4, 4)))
    with pytest.raises(ValueError, match="unknown activation"):
        BatchNormAct2d(24, activation="elu")
    with pytest.raises(ValueError, match="unknown activation"):
        batch_norm_act(values((2, 4, 2, 2)), None, None, training=True, activation="elu")
    with pytest.raises(ValueError, match="residual cannot be added"):
        batch_norm_act(values((2, 4, 2, 2)), None, None, training=True, residual=values((2, 4, 2, 1)))
    with pytest.raises(ValueError, match="groups do not divide"):
        group_norm_act(values((2, 5, 2, 2)), 2)


def test_modules_copy_pickle_and_say_what_they_are():
    norm = BatchNormAct2d(8, activation="relu")
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(other) is BatchNormAct2d and other.activation == "relu"
    assert "activation='relu'" in repr(norm) and "activation" not in repr(GroupNormAct(2, 8))
    assert isinstance(norm, nn.BatchNorm2d)


def test_one_parameter_without_the_other():
    z = values((2, 8, 3, 3))
    weight = values((8,), seed=1)
    y = group_norm_act(z, 2, weight, None, activation="relu")
    assert same_bits(y, F.relu(F.group_norm(z, 2, weight, None)))


def test_non_finite_values_reach_the_result_and_the_gradients():
    for kind in ("nan", "inf"):
        z = values((2, 16, 4, 4), kind).requires_grad_()
        with nvfp4_autocast():
            y = fused_of(some_norm("batch", 16))(z, None, "relu")
        y.sum().backward()
        assert not bool(y.isfinite().all()) and not bool(z.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"affine": False}], ids=["affine", "no bias", "plain"])
@pytest.mark.parametrize("what", ["batch relu", "batch silu", "group relu", "group silu"])
def test_parameters_in_half_precision(what, settings, training, dtype):
    if "bias" in settings and torch.__version__.startswith("2.11."):
        pytest.skip("torch 2.11 has no norms with a weight and no bias")
    kind, activation = what.split()
    norm = some_norm(kind, **settings).to(dtype).train(training)
    z, dy = ((values((4, 24, 5, 6), seed=seed) + 1).to(dtype) for seed in (0, 2))
    expected, found = (outcome(n, z, None, activation, dy) for n in (norm, fused_of(norm)))
    assert expected.keys() == found.keys() and same_bits(found["y"], expected["y"])
    for name, truth in expected.items():
        assert found[name].dtype == truth.dtype
        assert torch.equal(found[name], truth) or relative_error(found[name], truth) <= NEAR[dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [0, 2])
def test_operators_pass_opcheck(groups, dtype):
    ops = torch.ops.te_nvfp4_cv
    z, w, b = (values(shape, seed=seed).to(dtype) for seed, shape in enumerate(((2, 8, 3, 3), (8,), (8,))))
    running = (None, None) if groups else (torch.zeros(8, dtype=dtype), torch.ones(8, dtype=dtype))
    spec = NormSpec(groups, momentum=0.1, eps=1e-5, need_mask=True, need_dresidual=True).encode()
    arguments = (z, None, w, b, *running, spec)
    torch.library.opcheck(ops.norm_forward.default, arguments)
    y, mean, rstd, mask = ops.norm_forward(*arguments)
    torch.library.opcheck(ops.norm_backward.default, (y, z, [mean, rstd, w, b], mask, spec))


def test_compiled_module_gives_the_same():
    norm = fused_of(some_norm("batch"))
    z = values((2, 24, 4, 4))
    expected = outcome(copy.deepcopy(norm), z, None, "relu", values(z.shape, seed=5))
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    leaf = z.clone().requires_grad_()
    y = compiled(leaf, None, "relu")
    y.backward(values(z.shape, seed=5))
    assert torch.equal(y, expected["y"]) and torch.equal(leaf.grad, expected["dz"])
