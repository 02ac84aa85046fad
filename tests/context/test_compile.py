"""torch.compile: whole networks in one graph, no recompilation from step to step, contexts guarded, the bits of eager.

aot_eager traces forward and backward as every backend does and then runs the operators one by one: bits equal eager's.
inductor fuses what lies between the operators, so its results are near.
"""

from __future__ import annotations

import ast
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

import te_nvfp4_cv as nv
from tests.helpers import relative_error, same_bits, values
from tests.networks import NO_SR, Net, all_same, net_and_input, step

pytestmark = [pytest.mark.filterwarnings("ignore:Dynamo"), pytest.mark.usefixtures("fresh_dynamo")]
ROOT = Path(__file__).resolve().parents[2]
BAND = 0.02  # relative difference of losses over four steps: rounding of what inductor fuses, then of everything after


def graphs() -> int:
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


def resnet(depth: int) -> tuple[nn.Module, Tensor, Tensor, str]:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    model = getattr(torchvision.models, f"resnet{depth}")(num_classes=10)
    return model, values((4, 3, 32, 32)), torch.randint(10, (4,)), "resnet"


def unet() -> tuple[nn.Module, Tensor, Tensor, str]:
    from unet_coco.unet import UNet

    return UNet(4, 0.25, "relu", 0.0), values((4, 3, 32, 32)), torch.randint(4, (4, 32, 32)), "unet"


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        # Convolutions, norms and sums of the U-Net again, without its transposed convolutions.
        pytest.param(lambda: resnet(18), id="resnet18", marks=pytest.mark.stress),
        pytest.param(lambda: resnet(50), id="resnet50", marks=pytest.mark.stress),
        pytest.param(unet, id="unet"),
    ],
)
def test_unmodified_networks_train_and_evaluate_in_one_graph(make):
    model, images, labels, name = make()
    model = model.to(memory_format=torch.channels_last)
    recipe = nv.load_recipe(name)
    nv.set_precision(model, recipe)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    kept: list[float] = []
    for index in range(4):  # contexts are made anew at each step, as users do
        recompiles = torch._dynamo.config.patch(error_on_recompile=index >= 2)
        with recompiles, torch.autocast("cpu", dtype=torch.bfloat16), nv.nvfp4_autocast(recipe):
            loss = F.cross_entropy(compiled(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        kept.append(loss.item())
        assert graphs() == 1
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    model.eval()
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), nv.nvfp4_autocast(recipe):
            found, expected = compiled(images), model(images)
        assert same_bits(found, expected) and graphs() == 2


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("recipe", [NO_SR, nv.NVFP4BlockScaling()], ids=["nearest", "stochastic"])
def test_a_step_has_the_bits_of_eager(channels_last, recipe):
    net, x = net_and_input()
    net.dropout = nn.Identity()  # a graph draws its random numbers in another order
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    compiled = torch.compile(lambda net, x: net(x), backend="aot_eager", fullgraph=True)
    if recipe is NO_SR:
        assert all_same(step(net, x, nv.nvfp4_autocast(recipe)), step(net, x, nv.nvfp4_autocast(recipe), compiled))
        return
    eager, found = (step(net, x, nv.nvfp4_autocast(recipe), run) for run in (None, compiled))
    assert same_bits(eager[0], found[0])  # seeds follow the order of the backward graph, which is not eager's
    assert all(relative_error(a, b) < 0.5 for a, b in zip(eager[1:], found[1:], strict=True))


def test_layers_that_share_a_gradient_draw_their_own_seeds():
    conv = nn.ModuleList(nn.Conv2d(16, 16, 1, bias=False) for _ in range(2))
    conv[1].load_state_dict(conv[0].state_dict())
    x = values((16, 16, 4, 4))

    def both(x: Tensor) -> Tensor:
        return conv[0](x) + conv[1](x)

    with nv.nvfp4_autocast():
        torch.compile(both, backend="aot_eager", fullgraph=True)(x).backward(values((16, 16, 4, 4), seed=1))
    assert not same_bits(conv[0].weight.grad, conv[1].weight.grad)


def contexts() -> dict[str, Any]:
    return {
        "outside": contextlib.nullcontext(),
        "inside": nv.nvfp4_autocast(NO_SR),
        "disabled": nv.nvfp4_autocast(NO_SR, enabled=False),
        "another recipe": nv.nvfp4_autocast(nv.NVFP4BlockScaling(disable_2d_quantization=True)),
        "reference": nv.nvfp4_autocast(NO_SR, backend="reference"),
    }


def test_entering_and_leaving_a_context_is_noticed():
    net, x = net_and_input()
    net.eval()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        results = {}
        for name, context in contexts().items():
            with torch.no_grad(), context:
                results[name] = compiled(x)
                assert same_bits(results[name], net(x)), name
        assert same_bits(results["outside"], results["disabled"])
        assert not same_bits(results["outside"], results["inside"])
        assert not same_bits(results["inside"], results["another recipe"])
    assert graphs() == len(results)  # and none in the second round


def test_a_context_inside_of_the_compiled_function():
    net, x = net_and_input()
    net.eval()

    def forward(x: Tensor) -> Tensor:
        with nv.nvfp4_autocast(NO_SR):
            y = net(x)
        return y + net(x)  # and in high precision

    with torch.no_grad():
        expected = forward(x)
        assert same_bits(torch.compile(forward, backend="aot_eager", fullgraph=True)(x), expected)
        assert not same_bits(expected, 2 * net(x))
    assert nv.active_recipe() is None


@pytest.mark.filterwarnings("error:nvfp4. only")
@pytest.mark.parametrize("when", ["before", "after"])
def test_precisions_reach_a_compiled_model_by_plain_names(when):
    net, x = net_and_input()
    net.eval()
    table = {"body.*": None, "head": nv.NVFP4BlockScaling(disable_2d_quantization=True)}
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    nv.set_precision(net if when == "before" else compiled, table)
    with torch.no_grad(), nv.nvfp4_autocast(NO_SR):
        assert same_bits(compiled(x), net(x))
        plain = Net().eval()
        plain.load_state_dict(net.state_dict())
        assert not same_bits(compiled(x), plain(x))


def test_explicit_modules_compile():
    net, x = net_and_input()
    net.eval()
    converted = nv.convert_model(net, NO_SR)
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        inside = compiled(x)
        assert same_bits(inside, converted(x))
        with nv.nvfp4_autocast(enabled=False):
            assert same_bits(compiled(x), converted(x)) and not same_bits(compiled(x), inside)


def test_gradients_only_where_they_are_wanted():
    net, x = net_and_input()
    net.eval()
    net.body[1].weight.requires_grad_(False)
    compiled = torch.compile(lambda net, x: net(x), backend="aot_eager", fullgraph=True)
    assert all_same(step(net, x, nv.nvfp4_autocast(NO_SR)), step(net, x, nv.nvfp4_autocast(NO_SR), compiled))
    assert net.body[1].weight.grad is None


def losses_eager_and_compiled() -> list[list[float]]:
    """Four steps of a small net in eager mode, and compiled by inductor into one graph."""
    x = values((16, 16, 8, 8))
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layers = (nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 32, 3), nn.ReLU())
        net = nn.Sequential(*layers, nn.Flatten())
        run = torch.compile(net, fullgraph=True) if compiled else net
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
        losses.append([])
        for _ in range(4):
            with torch.autocast("cpu", dtype=torch.bfloat16), nv.nvfp4_autocast(NO_SR):
                loss = run(x).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert graphs() == 1
    return losses


@pytest.mark.slow
def test_inductor_stays_near_eager():
    """In a process of its own: inductor imports setuptools, which wants to be there before any distutils."""
    cpp_builder = pytest.importorskip("torch._inductor.cpp_builder")
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("no C++ compiler for inductor")
    code = "from tests.context.test_compile import losses_eager_and_compiled; print(losses_eager_and_compiled())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = ast.literal_eval(done.stdout.splitlines()[-1])
    assert losses[0][-1] < losses[0][0]
    for eager, found in zip(*losses, strict=True):
        assert abs(eager - found) <= BAND * abs(eager)


class Features(nn.Module):
    """As in Wav2Vec2, which sets requires_grad of an intermediate tensor: a graph break of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(1, 16, 3), nn.Conv1d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x[:, None]
        hidden.requires_grad = True
        return self.second(self.first(hidden))


class InEagerMode(Features):
    """As in YOLO's loss: a graph break in somebody's context manager, so that torch runs this forward in eager mode."""

    def forward(self, x: Tensor) -> Tensor:
        with scope():
            torch._dynamo.graph_break()
            hidden = F.conv1d(x[:, None].float(), self.first.weight).relu_()
            hidden = F.conv1d(hidden, self.second.weight).detach().view(-1, 60).select(0, 0)
        return hidden.float()


@contextlib.contextmanager
def scope() -> Iterator[None]:
    yield


@pytest.mark.parametrize("kind", [Features, InEagerMode])
def test_a_graph_break_of_torchs_own_is_followed_by_no_second_one(kind):
    """Neither the mode's handler nor what it calls is a graph of its own."""
    model, x, breaks = kind(), values((16, 64)), []
    for context in (contextlib.nullcontext(), nv.nvfp4_autocast(NO_SR)):
        torch._dynamo.reset()
        counters.clear()
        with context:
            expected = model(x)
            assert same_bits(torch.compile(model, backend="aot_eager")(x), expected)
        breaks.append((len(counters["graph_break"]), counters["stats"]["unique_graphs"]))
    assert breaks[0] == breaks[1]
    assert not same_bits(expected, model(x))


def move_a_module(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return nn.ReLU().to(x.device)(conv(x))


def compute_by_numpy(x: Tensor, conv: nn.Conv2d) -> Tensor:
    sizes = np.array(x.shape[2:])
    sizes += 1
    scale = 7 // abs(-sizes % 5) @ sizes
    return conv(x) * float(scale)


def compute_an_image_by_numpy(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return conv(torch.from_numpy(2 - x.numpy() * 1.5))


# In torch 2.11 and 2.12 Dynamo cannot look for what moves a module in a dictionary: a graph break.
OF_NO_BUSINESS = [] if torch.__version__.startswith(("2.11.", "2.12.")) else [move_a_module]


@pytest.mark.parametrize("function", [*OF_NO_BUSINESS, compute_by_numpy, compute_an_image_by_numpy])
def test_one_graph_where_dynamo_asks_a_mode_about_what_is_none_of_its_business(function):
    """The network of MONAI's SwinUNETR checks sizes by numpy, the loss of YOLO is a module that is made and moved."""
    x, conv = values((4, 16, 8, 8)), nn.Conv2d(16, 16, 3)
    with nv.nvfp4_autocast(NO_SR):
        expected = function(x, conv)
        assert same_bits(torch.compile(function, backend="aot_eager", fullgraph=True)(x, conv), expected)
    assert not same_bits(expected, function(x, conv))


@torch.library.custom_op("te_nvfp4_cv_tests::images_last", mutates_args=())
def images_last(x: Tensor) -> Tensor:
    """Return x in channels_last, and trace it as contiguous: torch 2.14 does so with group normalization."""
    return x.clone(memory_format=torch.channels_last)


images_last.register_fake(lambda x: torch.empty_like(x, memory_format=torch.contiguous_format))
images_last.register_autograd(lambda ctx, dy: images_last(dy))


@pytest.mark.parametrize(
    "make", [nn.ReLU, lambda: nn.ReLU(inplace=True), lambda: nv.BatchNormAct2d(16, activation="relu")],
    ids=["relu", "in place", "norm and relu"],
)  # fmt: skip
def test_masks_where_memory_is_not_as_it_was_traced(make):
    """The bits of a mask are in the order of memory, which must be the same in both passes."""
    x, weight, grads = values((4, 16, 6, 6)), values((4, 16, 6, 6), seed=1), []
    for compiles in (False, True):
        layer, leaf = make(), x.clone().requires_grad_()
        run = torch.compile(lambda z, f=layer: f(images_last(z)), backend="aot_eager", disable=not compiles)
        with nv.nvfp4_autocast(NO_SR):
            y = run(leaf)
        (y * weight).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-6)


class Sizes(nn.Module):
    """Layers of each kind, for images of any size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 16, 3, stride=2),
            nn.GELU(),
            nn.ConvTranspose2d(16, 16, 2, stride=2),
        )
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


@pytest.mark.parametrize("recipe", [NO_SR, nv.NVFP4BlockScaling(high_precision_gemms=("wgrad",))])
def test_many_image_sizes_share_a_graph(recipe):
    """As in plain torch: the second size is open. Then x itself is saved, and quantized again to the same codes."""
    net = Sizes()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for size in range(8, 30, 2) if recipe is NO_SR else (8, 10):
        x, results = values((4, 16, size, size + 2)), []
        for run in (net, compiled):
            net.zero_grad()
            torch.manual_seed(1)
            with nv.nvfp4_autocast(recipe), torch.autocast("cpu", dtype=torch.bfloat16):
                y = run(x.clone().requires_grad_())
            y.float().square().mean().backward()
            grads = [p.grad.clone() for p in net.parameters()] if recipe is NO_SR else []
            results.append([y.detach(), *grads])
        assert all_same(*results)
    assert graphs() == 2


def test_sizes_that_are_marked_as_open():
    net, x = Sizes(), values((4, 16, 8, 8))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for axis in (0, 2, 3):
        torch._dynamo.mark_dynamic(x, axis)
    with torch.no_grad(), nv.nvfp4_autocast(NO_SR):
        for images in (x, values((6, 16, 12, 10)), values((16, 16, 9, 9))):
            assert same_bits(compiled(images), net(images))
    assert graphs() == 1
