"""One warning for a model of which most work stays in high precision unasked."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import te_nvfp4_cv as nv
from te_nvfp4_cv.layer import shortfall
from tests.helpers import values


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", values((16, 16, 3, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1)


def conv() -> nn.Conv2d:
    return nn.Conv2d(16, 16, 3, padding=1)


def told(model: Any, *recipe: Any, x: Tensor | None = None, times: int = 3, **context: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            with nv.nvfp4_autocast(*recipe, **context):
                model(values((2, 16, 6, 6)) if x is None else x)
    return [str(w.message) for w in caught if "of the work of" in str(w.message)]


def test_once_for_a_model_and_not_for_a_context():
    model = nn.Sequential(conv(), Bank(), Bank(), nn.ReLU())
    (text,) = told(model)
    assert "only 33% of the work of Sequential" in text and "67% because the kernel is a constant" in text
    assert not told(model)
    assert len(told(nn.Sequential(Bank()), times=1)) == 1  # another model, in its first pass


def test_the_line_of_the_context_is_named():
    model = nn.Sequential(Bank())  # alive at the end: of one that is gone the reason is told once a process
    with pytest.warns(UserWarning, match="of the work of") as caught, nv.nvfp4_autocast():
        model(values((2, 16, 6, 6)))
    assert caught[0].filename == __file__


def test_a_context_around_a_whole_loop(monkeypatch):
    monkeypatch.setattr(shortfall, "OFTEN", 4)
    model = nn.Sequential(Bank())
    with nv.nvfp4_autocast():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(12):
                model(values((2, 16, 6, 6)))
        assert len(caught) == 1


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(16, 16)).double(), "input is float64"),
        (lambda: Bank(), "the kernel is a constant"),
        (lambda: Mapped(), "inside a torch.func transform"),
    ],
)
def test_reasons(make, reason):
    model = make()
    x = values((2, 16, 16)).double() if isinstance(model, nn.Sequential) else values((2, 16, 6, 6))
    (text,) = told(model, x=x)
    assert f"100% because {reason}" in text


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(self.layer)(x.mean((2, 3)))


def test_what_is_meant_or_small_is_not_warned_of():
    assert not told(nn.Sequential(conv(), conv(), Bank()))  # a third
    assert not told(nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 4, 3)))  # not of eligible shape
    entry = nn.Sequential(conv(), conv())
    nv.set_precision(entry, {"*": None})
    assert not told(entry)
    assert not told(nn.utils.parametrizations.weight_norm(conv()), nv.NVFP4BlockScaling(kernels="parameters"))
    assert not told(conv(), nv.NVFP4BlockScaling(high_precision_gemms=("fprop", "dgrad", "wgrad")))
    assert not told(Bank(), enabled=False)
    assert not told(nn.ReLU())


class Ends(nn.Module):
    """A layer, and a small product of its result that no layer makes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.w = layer, nn.Parameter(values((16, 16)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y.flatten(1)[:, :16] @ self.w


def explicit(x: Tensor) -> Tensor:
    return nv.functional.linear(x, WEIGHT)


WEIGHT = nn.Parameter(values((64, 64)))
GROUPED = nv.NVFP4GroupedLinear(2, 64, 64)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nv.NVFP4Linear(64, 64),
        lambda: nv.NVFP4Linear(64, 64, recipe="current_pow2"),
        lambda: Called(explicit),
        lambda: Called(lambda x: nv.functional.linear(x, WEIGHT * 1.0)),  # of which nothing is remembered
        lambda: Called(lambda x: GROUPED(x, torch.tensor([5, 32], dtype=torch.int32))),
        lambda: nv.export.quantize(nn.Sequential(nn.Linear(64, 64)), [values((32, 64))]),
        lambda: nn.Linear(64, 64),
    ],
    ids=["module", "module's recipe", "functional", "computed weight", "experts", "packed", "plain"],
)
def test_layers_that_ask_for_nvfp4_by_name_count(make, grad):
    """The first call is looked at, and those after it may be repeated."""
    model = Ends(make())
    with torch.set_grad_enabled(grad):
        assert not told(model, x=values((32, 64)))
        for _ in range(2):
            with nv.nvfp4_autocast():
                model(values((32, 64)))
                assert shortfall.local.macs == 32 * 64 * 64


class Called(nn.Module):
    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_on_the_meta_device_nothing_is_computed(backend):
    model = Ends(nn.Conv2d(16, 16, 3, padding=1)).to("meta")
    assert not told(model, x=torch.empty(2, 16, 6, 6, device="meta"), backend=backend)


@pytest.mark.parametrize("packed", [False, True], ids=["trained", "packed"])
def test_layers_in_a_graph_count(packed, fresh_dynamo):
    """The rest of the model runs beside the graph: that all of the work were in high precision would be false."""
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    net = nv.export.quantize(net, [values((32, 64))]) if packed else net
    model = Ends(torch.compile(net, backend="aot_eager"))
    with torch.set_grad_enabled(not packed):
        assert not told(model, x=values((32, 64)))
        with nv.nvfp4_autocast():
            model(values((32, 64)))
            assert (shortfall.local.macs, shortfall.local.in_graphs) == (0, 2 * 32 * 64 * 64)


def test_a_graph_is_no_function_that_runs_layers(fresh_dynamo):
    """Its backward pass was traced with its forward pass, and has nothing to repeat outside of the context."""
    net = torch.compile(nn.Sequential(conv(), nn.Conv2d(16, 8, 3)), backend="aot_eager")  # the second is thin
    with nv.nvfp4_autocast():
        y = net(values((2, 16, 6, 6)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y.sum().backward()


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_traced_calls_count_once_and_sizes_that_stay_open_do_not(mode):
    """Numbers with an open size cannot be shown, and a sum with one takes torch a millisecond."""
    direct, by_name = Ends(nn.Identity()), Called(explicit)
    make_fx(by_name, tracing_mode=mode, _allow_non_fake_inputs=True)(values((32, 64)))
    assert type(shortfall.local.macs) is int
    with warnings.catch_warnings(), nv.nvfp4_autocast():
        warnings.simplefilter("ignore")
        make_fx(by_name, tracing_mode=mode, _allow_non_fake_inputs=True)(values((32, 64)))
        assert shortfall.local.macs == (0 if mode == "symbolic" else 32 * 64 * 64) and not shortfall.local.in_graphs
    with warnings.catch_warnings(), nv.nvfp4_autocast():
        warnings.simplefilter("ignore")
        make_fx(direct, tracing_mode=mode, _allow_non_fake_inputs=True)(values((32, 64)))
        assert shortfall.local.missed == ({} if mode == "symbolic" else {"torch.matmul called directly": 32 * 16 * 16})


def test_packed_weights_beside_high_activations_are_meant():
    packed = nv.export.quantize(nn.Sequential(conv()), [values((2, 16, 6, 6))])
    packed[0].set_mode(activations="high")
    assert not told(packed)


def test_coverage_says_it_itself():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = nv.coverage(nn.Sequential(Bank()), values((2, 16, 6, 6)))
    assert report.nvfp4_flops_share == 0


def linears(count: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(count)))


def test_what_the_user_asks_for_is_work_too():
    """A small product beside layers that are in high precision as asked is not most of the work."""
    x = values((32, 64))
    entries = Ends(linears(3))
    nv.set_precision(entries, {"layer.*": None})
    assert not told(entries, x=x)
    assert not told(Ends(linears(3)), nv.NVFP4BlockScaling(high_precision_gemms=("fprop", "dgrad", "wgrad")), x=x)
    packed = nv.export.quantize(linears(1), [x])
    packed[0].set_mode(activations="high")
    assert not told(Ends(packed), x=x)
    mostly = nn.Sequential(nn.Linear(64, 64), Ends(nn.Identity()))
    nv.set_precision(mostly, {"0": None})
    assert not told(mostly, x=x)
    # But where most of the work is of another kind, that is said.
    wide = Ends(nn.Identity())
    wide.w = nn.Parameter(values((64, 512)))
    unasked = nn.Sequential(nn.Linear(64, 64), wide)
    nv.set_precision(unasked, {"0": None})
    wide.forward = lambda x: x @ wide.w  # type: ignore[method-assign]
    assert len(told(unasked, x=x)) == 1


def test_a_recipe_without_gemms_asks_for_products_too():
    model = Called(lambda x: x @ WEIGHT)
    assert not told(model, nv.NVFP4BlockScaling(high_precision_gemms=("fprop", "dgrad", "wgrad")), x=values((32, 64)))
    assert len(told(model, x=values((32, 64)))) == 1


def test_a_pass_that_an_exception_ends_says_nothing():
    class Stop(Exception):
        pass

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bank, self.rest = Bank(), nn.Sequential(conv(), conv())

        def forward(self, x: Tensor, stop: bool = False) -> Tensor:
            x = self.bank(x)
            if stop:
                raise Stop
            return self.rest(x)  # type: ignore[no-any-return]

    model = Half()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Stop), nv.nvfp4_autocast():
            model(values((2, 16, 6, 6)), stop=True)
    assert not told(model)


class Late(nn.Module):
    """Products of many steps come before the layers, which are most of the work."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.layers = nn.Parameter(values((16, 16))), nn.Sequential(conv(), conv(), conv())

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(20):
            x[0, :, 0].t() @ self.w
        return self.layers(x)  # type: ignore[no-any-return]


def test_the_middle_of_a_pass_is_no_pass(monkeypatch):
    monkeypatch.setattr(shortfall, "OFTEN", 6)
    model = Late()
    assert not told(model)
    with warnings.catch_warnings(), nv.nvfp4_autocast():
        warnings.simplefilter("error")
        for _ in range(3):
            model(values((2, 16, 6, 6)))


def test_a_context_inside_of_a_model_does_not_speak_for_the_model():
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bank, self.rest = Bank(), nn.Sequential(conv(), conv())

        def forward(self, x: Tensor) -> Tensor:
            for part in (self.bank, self.rest):
                with nv.nvfp4_autocast():
                    x = part(x)
            return x

    class Decorated(Bank):
        forward = nv.nvfp4_autocast()(Bank.forward)

    for model, name in ((Parts(), "a context inside of Parts"), (Decorated(), "Decorated")):
        with pytest.warns(UserWarning, match=f"of the work of {name} runs"):
            model(values((2, 16, 6, 6)))


def test_the_control_of_a_trial_is_quiet():
    from te_nvfp4_cv.cli.trial.control import control

    model = Ends(nn.Linear(64, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with control(nv.NVFP4BlockScaling()):
            model(values((32, 64)))
    assert not told(model, x=values((32, 64)))
