"""Which kernels run in NVFP4: Parameters and computed ones, no constants; alike in training, evaluation and graphs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import te_nvfp4_cv as nv
from te_nvfp4_cv.layer import observe
from tests.helpers import same_bits, values

pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils"),  # the older functions, which models still use
]
NVFP4, CONSTANT = "", "the kernel is a constant"


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Kernel(nn.Module):
    """A layer whose kernel is computed from a Parameter and a buffer, which are alike but for that."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(values((16, 16, 3, 3), seed=1))
        self.register_buffer("bank", values((16, 16, 3, 3), seed=2))
        self.register_buffer("two", values((32, 16, 3, 3), seed=3))
        self.attribute = values((16, 16, 3, 3), seed=4)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.compute(self, x), padding=1)


class Inside(nn.Module):
    """The kernel belongs to a module around the one that multiplies by it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", values((16, 16, 3, 3)))
        self.inner = Multiply()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, self.bank)


class Multiply(nn.Module):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=1)


class Double(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


class Standardized(nn.Conv2d):
    """Weight standardization, as BiT and the NF networks do it."""

    def forward(self, x: Tensor) -> Tensor:
        w = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        return F.conv2d(x, w.reshape_as(self.weight), self.bias, self.stride, self.padding)


def conv() -> nn.Conv2d:
    return nn.Conv2d(16, 16, 3, padding=1)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def hypernetwork() -> nn.Module:
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make = nn.Linear(16, 16 * 16 * 9)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.make(x.mean((0, 2, 3))).view(16, 16, 3, 3), padding=1)

    return Hyper()


TRAINED: dict[str, Callable[[], nn.Module]] = {
    "a Parameter": conv,
    "a frozen Parameter": lambda: frozen(conv()),
    "a cast Parameter": lambda: Kernel(lambda m, x: m.weight.to(torch.float64).to(x.dtype)),
    "a part of a Parameter": lambda: Kernel(lambda m, x: torch.cat([m.weight, m.weight])[4:20]),
    "equalized learning rate": lambda: Kernel(lambda m, x: m.weight * 0.5),
    "equalized, frozen": lambda: frozen(Kernel(lambda m, x: m.weight * 0.5)),
    "weight standardization": lambda: Standardized(16, 16, 3, padding=1),
    "weight_norm": lambda: parametrizations.weight_norm(conv()),
    "weight_norm, the old one": lambda: nn.utils.weight_norm(conv()),
    "spectral_norm": lambda: parametrizations.spectral_norm(conv()),
    "spectral_norm, frozen": lambda: frozen(parametrizations.spectral_norm(conv())),
    "spectral_norm, the old one": lambda: nn.utils.spectral_norm(conv()),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(16, 16)),
    "prune": lambda: prune.l1_unstructured(conv(), "weight", 0.5),
    "a parametrization": lambda: with_parametrization(conv()),
    "a Parameter and a buffer": lambda: Kernel(lambda m, x: m.weight * m.bank),
    "a hypernetwork": hypernetwork,
    "an activation": lambda: Kernel(lambda m, x: (x[:, :, :3, :3] * m.weight.mean()).repeat(4, 1, 1, 1)),
}
CONSTANTS: dict[str, Callable[[], nn.Module]] = {
    "a buffer": lambda: Kernel(lambda m, x: m.bank),
    "a cast buffer": lambda: Kernel(lambda m, x: m.bank.to(torch.float64).to(x.dtype)),
    "a cast that does nothing": lambda: Kernel(lambda m, x: m.bank.type_as(x)),
    "a part of a buffer": lambda: Kernel(lambda m, x: m.two[:16]),
    "a view of a view": lambda: Kernel(lambda m, x: m.two.view(2, 16, 16, 9)[1].view(16, 16, 3, 3)),
    "a repeated buffer": lambda: Kernel(lambda m, x: m.bank.repeat(2, 1, 1, 1)),
    "a flipped buffer": lambda: Kernel(lambda m, x: m.bank.flip(-1)),
    "a detached clone": lambda: Kernel(lambda m, x: m.bank.detach().clone()),
    "an attribute": lambda: Kernel(lambda m, x: m.attribute),
    "a buffer of the module around": Inside,
}


def with_parametrization(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, "weight", Double())
    return module


def image(model: nn.Module) -> Tensor:
    return values((16, 16)) if isinstance(model, nn.Linear) else values((16, 16, 6, 6))


def reasons(model: nn.Module, how: Any, recipe: Any = None) -> list[str]:
    """Why the model's last layer does not run in NVFP4, for a pass under `how`, in eager mode."""
    told: list[observe.Call] = []
    with how(), nv.nvfp4_autocast(recipe), observe.observe(told.append):
        model(image(model))
    return [call.reason for call in told[-1:]]


MODES = [
    pytest.param((torch.enable_grad, True), id="training"),
    pytest.param((torch.enable_grad, False), id="eval with gradients"),
    pytest.param((torch.no_grad, False), id="no_grad"),
    pytest.param((torch.inference_mode, False), id="inference_mode"),
]
CASES = [
    *(pytest.param(make, NVFP4, id=name) for name, make in TRAINED.items()),
    *(pytest.param(make, CONSTANT, id=name) for name, make in CONSTANTS.items()),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("make", "expected"), CASES)
def test_the_decision_does_not_hang_on_the_grad_mode(make, expected, mode):
    how, training = mode
    (reason,) = reasons(make().train(training), how)
    assert reason.startswith(expected) and bool(reason) == bool(expected)


@pytest.mark.parametrize("name", CONSTANTS)
def test_looking_on_changes_no_decision(name):
    model = CONSTANTS[name]()
    assert not any(row.nvfp4 for row in nv.coverage(model, image(model)).rows)
    with pytest.raises(ValueError, match="no layer runs in NVFP4"):
        nv.sensitivity.scan(model, lambda model, x: model(x).square().mean(), [image(model)])


def test_hooks_of_fsdp2_change_no_decision():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = torch.distributed.fsdp.fully_shard(CONSTANTS["an attribute"](), mesh=mesh)
        assert model._forward_pre_hooks and reasons(model, torch.no_grad)[0].startswith(CONSTANT)
    finally:
        torch.distributed.destroy_process_group()
    model = CONSTANTS["an attribute"]()
    model.register_forward_pre_hook(lambda module, args: None)  # of somebody who may compute the attribute
    assert reasons(model, torch.no_grad) == [""]


@pytest.mark.slow
@pytest.mark.parametrize("mode", [MODES[0], MODES[2]])
@pytest.mark.parametrize(("make", "expected"), CASES)
def test_a_graph_decides_alike(make, expected, mode):
    how, training = mode
    model = make().train(training)
    nodes: list[bool] = []

    def backend(graph: Any, inputs: Any) -> Any:
        nodes.extend(node.target is torch.ops.te_nvfp4_cv.layer.default for node in graph.graph.nodes)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def run(x: Tensor) -> Tensor:
        with nv.nvfp4_autocast():
            return model(x)

    with how():
        run(image(model))
    last_is_nvfp4 = nodes.count(True) == (2 if isinstance(getattr(model, "make", None), nn.Linear) else 1)
    assert last_is_nvfp4 == (expected == NVFP4)


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "a hypernetwork"])
def test_a_computed_kernel_gives_the_layer_of_that_kernel(name):
    model = TRAINED[name]().eval()
    x = image(model)
    told: list[observe.Call] = []
    with nv.nvfp4_autocast(), torch.no_grad(), observe.observe(told.append):
        y = model(x)
    function = nv.functional.linear if isinstance(model, nn.Linear) else nv.functional.conv2d
    more = {} if isinstance(model, nn.Linear) else {"padding": 1}
    with torch.no_grad():
        expected = function(x, told[0].weight, getattr(model, "bias", None), **more)
    assert same_bits(y, expected)


def test_gradients_reach_what_the_kernel_is_computed_from():
    model = parametrizations.weight_norm(conv())
    plain = copy.deepcopy(model)
    with nv.nvfp4_autocast():
        model(image(model)).square().mean().backward()
    plain(image(model)).square().mean().backward()
    for (name, found), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert F.cosine_similarity(found.grad.flatten(), wanted.grad.flatten(), 0) > 0.9, name


def test_tensors_in_the_place_of_parameters():
    """functional_call with the tensors of an exponential moving average."""
    model = nn.Sequential(conv(), Kernel(lambda m, x: m.bank))
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for how in (torch.enable_grad, torch.no_grad):
        told: list[observe.Call] = []
        with how(), nv.nvfp4_autocast(), observe.observe(told.append):
            torch.func.functional_call(model, average, (values((16, 16, 6, 6)),))
        assert [bool(call.reason) for call in told] == [False, True]


def test_cached_parametrizations_are_computed_kernels():
    model = parametrizations.weight_norm(conv()).eval()
    with parametrize.cached():
        assert [reasons(model, torch.no_grad) for _ in range(2)] == [[""], [""]]


def test_parameters_only():
    recipe = nv.NVFP4BlockScaling(kernels="parameters")
    for name, make in TRAINED.items():
        (reason,) = reasons(make(), torch.enable_grad, recipe)
        is_one = name in ("a Parameter", "a frozen Parameter")
        assert (reason == "") == is_one, name
        assert is_one or "kernels='parameters'" in reason
    assert "kernels='parameters'" in reasons(CONSTANTS["a buffer"](), torch.no_grad, recipe)[0]


def test_what_was_taken_from_a_tensor_that_is_gone_is_no_constant():
    def compute(module: Any, x: Tensor) -> Tensor:
        return (module.weight * 2).detach().to(torch.float64).to(x.dtype)

    assert reasons(Kernel(compute), torch.no_grad) == [""]


def test_outside_of_modules_nothing_is_held():
    x, w = values((4, 16, 6, 6)), values((16, 16, 3, 3))
    told: list[observe.Call] = []
    with nv.nvfp4_autocast(), observe.observe(told.append), contextlib.suppress(ZeroDivisionError):
        F.conv2d(x, w)
    assert told[0].reason == ""
