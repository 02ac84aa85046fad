"""Equal calls share one Plan, and no call gets another one's: what decides is in the key, or asked at each call."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import te_nvfp4_cv as nv
from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.layer import check
from te_nvfp4_cv.layer.check import CallShape, Sizes
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops import geometry, records
from te_nvfp4_cv.ops.geometry import ConvArgs
from tests.helpers import relative_error, same_bits, values

pytestmark = pytest.mark.usefixtures("one_thread")
NO_SR = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)
CACHES = {check: ("_cached_plan", "_cached_lower"), geometry: ("_geometry", "fold_factor"), records: ("_operand_spec",)}


def clear() -> None:
    """Forget everything that was planned."""
    for module, names in CACHES.items():
        for name in names:
            getattr(module, name).cache_clear()


@pytest.fixture(autouse=True)
def cold():
    clear()


def call(
    batch: int = 3,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    autocast: bool = False,
    bias: bool = True,
    recipe: nv.NVFP4BlockScaling = NO_SR,
    backend: str = "vendor",
    size: int = 5,
    **arguments: Any,
) -> list[Tensor]:
    """Run one convolution forward and backward: y, dx and dw."""
    x, w = values((batch, 16, size, 4)).to(dtype), values((32, 16, 3, 3), seed=1).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    x, w = x.requires_grad_(), w.requires_grad_()
    b = values((32,), seed=2).to(dtype) if bias else None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = nv.functional.conv2d(x, w, b, **{"padding": 1, **arguments}, recipe=recipe, backend=backend)
    y.backward(values(tuple(y.shape), seed=3).to(y.dtype))
    return [y.detach(), x.grad, w.grad]  # type: ignore[list-item]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(same_bits(x, y) and x.stride() == y.stride() for x, y in zip(a, b, strict=True))


def test_equal_calls_share_one_plan(plans):
    first, second = call(), call()
    assert plans[0] is plans[1] and same(first, second)


def test_a_plan_keeps_its_answers(plans):
    call()
    (plan,) = plans
    before = {name: getattr(plan, name) for name in ("gemms", "folds", "input_specs", "gradient_specs", "weight_specs")}
    call()
    assert plans[1] is plan and all(getattr(plan, name) is value for name, value in before.items())


CHANGES: dict[str, tuple[dict[str, Any], Callable[[Plan], Any]]] = {  # what changes, and where the Plan must show it
    "recipe": (
        {"recipe": nv.NVFP4BlockScaling(disable_stochastic_rounding=True, disable_rht=True)},
        lambda plan: plan.input_specs[1].rht,
    ),
    "name of the recipe": (
        {"recipe": nv.NVFP4BlockScaling(disable_stochastic_rounding=True, name="mine")},
        lambda plan: plan.recipe.name,
    ),
    "layout": ({"channels_last": True}, lambda plan: plan.channels_last),
    "batch": ({"batch": 17}, lambda plan: plan.geometry.batch),
    "image": ({"size": 6}, lambda plan: plan.geometry.a_size),
    "backend": ({"backend": "reference"}, lambda plan: plan.backend),
    "autocast": ({"autocast": True}, lambda plan: plan.compute_dtype),
    "stride": ({"stride": 2}, lambda plan: plan.geometry.stride),
    "dilation": ({"dilation": (2, 1)}, lambda plan: plan.geometry.dilation),
    "named padding": ({"padding": "valid"}, lambda plan: plan.geometry.padding),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("first", ["plain", "changed"])
def test_no_call_gets_another_ones_plan(plans, change, first):
    changed, shown = CHANGES[change]
    for options in ({}, changed) if first == "plain" else (changed, {}):
        call(**options)
    assert plans[0] is not plans[1] and shown(plans[0]) != shown(plans[1])
    warm = call(**changed)
    clear()
    assert same(warm, call(**changed))
    assert plans[2] is not plans[3] and plans[2] == plans[3] and plans[2].recipe.name == plans[3].recipe.name


def test_the_dtype_changes_the_plans_key(plans):
    call()
    warm = call(dtype=torch.bfloat16)
    clear()
    assert same(warm, call(dtype=torch.bfloat16)) and warm[0].dtype == torch.bfloat16
    assert plans[0] is not plans[1]


def test_a_bias_that_does_not_fit_is_found_after_one_that_does():
    call()
    x, w = values((3, 16, 5, 4)), values((32, 16, 3, 3))
    with pytest.raises(ValueError, match="bias does not match"):
        nv.functional.conv2d(x, w, values((16,)), padding=1)


def test_what_auto_means_is_asked_at_each_call(plans, monkeypatch):
    """The device, and what a self-test has said since, decide outside of the cache."""
    for passes in (True, False):
        monkeypatch.setattr(dispatch, "_integer_passes", passes)
        call(backend="auto")
    monkeypatch.setattr(dispatch, "resolve", lambda backend, device, by_layer: "reference")
    call(backend="auto")
    assert [plan.backend for plan in plans] == ["integer", "vendor", "reference"]


def test_the_dtype_that_a_device_computes_in_is_asked_at_each_call(plans, monkeypatch):
    for native in (True, False, True):
        monkeypatch.setattr(dispatch, "bf16_is_native", lambda device, native=native: native)
        call(dtype=torch.bfloat16)
    assert [plan.compute_dtype for plan in plans] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert plans[0] is plans[2]


class Pair(NamedTuple):
    """A tuple of a class of its own."""

    height: Any
    width: Any


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("wrong", [True, 1.0, (1, True), (True, True), (1, 1.0), Pair(1, True), "one"], ids=repr)
def test_an_argument_that_only_equals_an_int_is_refused_after_the_int(name, wrong):
    for right in (1, (1, 1), Pair(1, 1)):  # 1, True and 1.0 are equal and have one hash
        call(**{name: right})
    with pytest.raises(ValueError, match=f"bad {name}"):
        call(**{name: wrong})
    call(**{name: 1})


@pytest.mark.parametrize(
    "other",
    [[2, 1], (2, 1), Pair(2, 1), torch.Size([2, 1]), (numpy.int64(2), numpy.int64(1)), (torch.tensor(2), 1)],
    ids=lambda other: type(other[0]).__name__ + " in " + type(other).__name__,
)
def test_lists_and_integers_of_other_kinds_mean_the_same(other):
    expected = call(stride=(2, 1))
    assert same(call(stride=other), expected) and same(call(stride=other), expected)


def test_a_list_that_changes_between_calls_is_read_again():
    stride = [1, 1]
    first = call(stride=stride)
    stride[0] = 2
    second = call(stride=stride)
    assert first[0].shape == (3, 32, 5, 4) and second[0].shape == (3, 32, 3, 4)
    assert same(second, call(stride=(2, 1)))


def test_threads_that_plan_at_once_get_right_results():
    cases = [{"batch": batch, "stride": stride, "bias": False} for batch in (1, 2, 3, 17) for stride in (1, 2)]
    expected = [call(**case) for case in cases]
    clear()
    start, wrong, finished = threading.Barrier(4), [], []

    def work(offset: int) -> None:
        start.wait(60)
        for i in range(3 * len(cases)):
            at = (i * (1 + offset % 2 * 2) + offset) % len(cases)
            if not same(call(**cases[at]), expected[at]):
                wrong.append(at)
            if i == len(cases):
                clear()
        finished.append(offset)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(finished) == [0, 1, 2, 3] and wrong == []


# ---- the caches themselves -------------------------------------------------------------------------------------------


def caches() -> dict[str, Any]:
    """Return each lru_cache of the package's loaded modules whose function takes arguments."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("te_nvfp4_cv."):
            for key, value in vars(module).items():
                if isinstance(value, functools._lru_cache_wrapper) and value.__wrapped__.__code__.co_argcount:
                    found[f"{value.__module__}.{key}"] = value
    return found


def test_every_cache_of_shapes_and_recipes_is_bounded():
    importlib.import_module("te_nvfp4_cv.ops.quantize.triton.tiles")  # loaded late: only a kernel needs it
    found = caches()
    folders = ("te_nvfp4_cv.layer.", "te_nvfp4_cv.ops.", "te_nvfp4_cv.recipe.")
    unbounded = [name for name, cache in found.items() if cache.cache_info().maxsize is None]
    kept = ["te_nvfp4_cv.ops.quantize.triton.tiles._source_rows"]  # a captured CUDA graph reads these tables
    assert [name for name in unbounded if name.startswith(folders)] == kept
    for module, names in CACHES.items():
        assert {f"{module.__name__}.{name}" for name in names} <= set(found)


def shape_of(batch: int) -> CallShape:
    x, w = Sizes((batch, 16, 5, 4), torch.float32), Sizes((32, 16, 3, 3), torch.float32)
    return CallShape("conv2d", x, w, None, ConvArgs(padding=1))


def test_filling_the_caches_beyond_their_bound_keeps_answers_right():
    def ask(batch: int) -> Plan:
        return check.planned(shape_of(batch), NO_SR, "vendor", torch.float32, False)

    count = check.CACHED + 100
    first = ask(1)
    for batch in range(1, count + 1):
        plan, low = ask(batch), check.lowered(shape_of(batch))
        assert plan.geometry.batch == low.geometry.batch == batch
    assert check._cached_plan.cache_info().currsize == check._cached_lower.cache_info().currsize == check.CACHED
    again = ask(1)
    assert again == first and again is not first  # it had been dropped
    assert again.input_specs == first.input_specs and ask(count) is plan


def test_results_are_right_while_the_caches_overflow(monkeypatch):
    cases = [{"batch": batch, "size": size, "bias": False} for batch in (1, 2, 16) for size in (4, 5)]
    expected = [call(**case) for case in cases]
    small = {}
    for module, names in CACHES.items():
        for name in names:
            small[name] = functools.lru_cache(maxsize=2)(getattr(module, name).__wrapped__)
            monkeypatch.setattr(module, name, small[name])
    for _ in range(2):
        assert all(same(call(**case), result) for case, result in zip(cases, expected, strict=True))
    assert all(cache.cache_info().currsize <= 2 for cache in small.values())
    assert small["_cached_plan"].cache_info().misses == 2 * len(cases)


def test_an_argument_that_changes_in_place_is_read_at_each_call():
    x, w, stride = values((3, 16, 6, 6)), values((32, 16, 3, 3), seed=1), torch.tensor(1)
    shapes = []
    for number in (1, 2):
        stride.fill_(number)
        shapes.append(nv.functional.conv2d(x, w, stride=stride, padding=1).shape[2:])
    assert shapes == [(6, 6), (3, 3)]


# ---- sizes that are not numbers --------------------------------------------------------------------------------------


def asked() -> dict[str, int]:
    """Return how often each cache of check.py was asked, hit or missed."""
    infos = {name: getattr(check, name).cache_info() for name in CACHES[check]}
    return {name: info.hits + info.misses for name, info in infos.items()}


@pytest.mark.filterwarnings("error:Dynamo detected")  # it warns of each lru_cache on its way
def test_calls_that_torch_compile_traces_pass_by_the_caches():
    x, w = values((3, 16, 5, 4)), values((32, 16, 3, 3), seed=1)
    run = torch.compile(
        lambda x: nv.functional.conv2d(x, w, None, 2, 1, recipe=NO_SR), backend="eager", fullgraph=True, dynamic=False
    )
    torch._dynamo.reset()
    traced = run(x)
    assert asked() == dict.fromkeys(CACHES[check], 0)
    assert same_bits(traced, nv.functional.conv2d(x, w, None, 2, 1, recipe=NO_SR))
    assert all(asked().values())  # what an eager call asks


def test_a_bias_in_double_precision_is_compiled():
    x, w, bias = values((3, 16, 5, 4)), values((32, 16, 3, 3), seed=1), values((32,), seed=2).double()
    bias.requires_grad_()
    torch._dynamo.reset()
    run = torch.compile(lambda x: nv.functional.conv2d(x, w, bias, recipe=NO_SR), backend="aot_eager", fullgraph=True)
    traced, eager = run(x), nv.functional.conv2d(x, w, bias, recipe=NO_SR)
    assert same_bits(traced.detach(), eager.detach())
    grads = [torch.autograd.grad(y.sum(), bias)[0] for y in (traced, eager)]
    assert grads[0].dtype == torch.float64 and same_bits(*grads)


def test_symbolic_sizes_pass_by_the_caches():
    mode = torch._subclasses.FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(values((3, 16, 5, 4)), static_shapes=False)
    assert any(isinstance(size, torch.SymInt) for size in x.shape)
    shape = CallShape.of("conv2d", x, Sizes((32, 16, 3, 3), torch.float32), None, ConvArgs(padding=1))
    with mode:
        low = check.lowered(shape)
        plan = check.planned(shape, NO_SR, "vendor", torch.float32, False)
    assert [info.currsize for info in (check._cached_lower.cache_info(), check._cached_plan.cache_info())] == [0, 0]
    assert low.geometry.y_shape == plan.geometry.y_shape == (3, 5, 4, 32)


def test_fake_tensors_leave_nothing_behind():
    x, w = values((3, 16, 5, 4)), values((32, 16, 3, 3), seed=1)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = nv.functional.conv2d(mode.from_tensor(x), mode.from_tensor(w), None, 2, 1, recipe=NO_SR)
    real = nv.functional.conv2d(x, w, None, 2, 1, recipe=NO_SR)
    assert type(fake) is not Tensor and fake.shape == real.shape and fake.stride() == real.stride()
    clear()
    assert type(real) is Tensor and same_bits(real, nv.functional.conv2d(x, w, None, 2, 1, recipe=NO_SR))
    assert relative_error(real, F.conv2d(x, w, None, 2, 1)) < 0.25
