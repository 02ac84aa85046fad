"""set_precision's hooks, frozen_weights, extra_state.

What a layer runs in is read off its result: high precision equals torch bit for bit, another recipe equals a context
with that recipe.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

import te_nvfp4_cv as nv
from te_nvfp4_cv.context import state as nv_context
from te_nvfp4_cv.layer import weight_codes
from te_nvfp4_cv.ops.quantize import operand
from tests.networks import Linears, ran

NO_RHT = nv.NVFP4BlockScaling(disable_rht=True)
NO_2D = nv.NVFP4BlockScaling(disable_2d_quantization=True)


@pytest.fixture
def x():
    return torch.randn(16, 16)


def named(name: str) -> nv.NVFP4BlockScaling:
    return nv.NVFP4BlockScaling(name=name)


# ---- set_precision ----


def test_high_precision_is_torch_bit_for_bit(x):
    model = Linears()
    nv.set_precision(model, {"*": None})
    with nv.nvfp4_autocast():
        assert torch.equal(model(x), Linears.forward(model, x)) and nv.active_recipe() is not None
        inside = model(x)
    assert torch.equal(inside, model(x))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"stem": None}, {"stem": "high", "body.0": "nvfp4", "body.2": "nvfp4", "head": "nvfp4"}),
        ({"body": None}, {"stem": "nvfp4", "body.0": "high", "body.2": "high", "head": "nvfp4"}),
        ({"body": "a", "body.0": None}, {"stem": "nvfp4", "body.0": "high", "body.2": "a", "head": "nvfp4"}),
        ({"body.0": "b", "body": None}, {"stem": "nvfp4", "body.0": "b", "body.2": "high", "head": "nvfp4"}),
        ({"*": None, "body.*": "a"}, {"stem": "high", "body.0": "a", "body.2": "a", "head": "high"}),
        ({"body.*": "a", "*": None}, {"stem": "high", "body.0": "high", "body.2": "high", "head": "high"}),
        ({"": None}, {"stem": "high", "body.0": "high", "body.2": "high", "head": "high"}),
        ({"body.[02]": "a", "h?ad": "b"}, {"stem": "nvfp4", "body.0": "a", "body.2": "a", "head": "b"}),
    ],
)
def test_patterns(x, table, expected):
    model = Linears()
    nv.set_precision(model, {key: named(value) if value else None for key, value in table.items()})
    assert ran(model, lambda: model(x)) == expected
    assert nv_context.local.overrides == []


def test_an_override_is_the_recipe_that_runs(x):
    model, other = Linears(), None
    nv.set_precision(model, {"*": NO_2D})
    with nv.nvfp4_autocast(NO_RHT):
        y = model(x)
    other = Linears()
    other.load_state_dict(model.state_dict())
    with nv.nvfp4_autocast(NO_2D):
        assert torch.equal(y, other(x))


def test_a_later_call_replaces_entries_and_adds_no_hooks(x):
    model = Linears()
    for _ in range(3):
        nv.set_precision(model, {"body.*": None, "head": None})
    nv.set_precision(model, {"body.0": named("a")})
    assert ran(model, lambda: model(x)) == {"stem": "nvfp4", "body.0": "a", "body.2": "high", "head": "high"}
    assert len(model.body[0]._forward_hooks) == len(model.body[0]._forward_pre_hooks) == 1
    assert len(model.body[0]._forward_hooks_always_called) == 1


def test_acts_only_inside_an_enabled_context(x):
    model = Linears()
    plain = model(x)
    nv.set_precision(model, {"*": NO_RHT})
    assert torch.equal(model(x), plain)
    assert set(ran(model, lambda: model(x), enabled=False).values()) == {"high"}


def test_a_recipe_with_a_table_and_one_without(x, recwarn):
    recipe = nv.NVFP4BlockScaling(precision=(("head", None), ("body.0", NO_RHT)), name="mine")
    model = Linears()
    nv.set_precision(model, recipe)
    assert ran(model, lambda: model(x), recipe=recipe)["head"] == "high"
    assert not [w for w in recwarn if "set_precision" in str(w.message)]
    untouched = Linears()
    nv.set_precision(untouched, nv.NVFP4BlockScaling())
    assert all(not m._forward_pre_hooks for m in untouched.modules())


def test_te_recipes_are_taken(x):
    common = pytest.importorskip("transformer_engine.common.recipe")
    model = Linears()
    nv.set_precision(model, {"head": common.NVFP4BlockScaling(disable_rht=True)})
    with nv.nvfp4_autocast():
        y = model(x)
    nv.set_precision(model, {"head": NO_RHT})
    with nv.nvfp4_autocast():
        assert torch.equal(y, model(x))


def test_a_pattern_without_match_changes_nothing():
    model = Linears()
    with pytest.raises(ValueError, match=r"(?s)'haed' matches no module.*did you mean 'head'"):
        nv.set_precision(model, {"stem": None, "haed": None})
    with pytest.raises(ValueError, match="names are stem, body"):
        nv.set_precision(model, {"zzzzzzzzz": None})
    assert all(not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ({"head": "hihg"}, FileNotFoundError),
        ({1: None}, TypeError),
        ("head", FileNotFoundError),
        ({"head": nv.NVFP4BlockScaling(precision=(("stem", None),))}, ValueError),
        ({"head": nv.NVFP4BlockScaling(row_scaled_activation=True)}, ValueError),
    ],
)
def test_bad_tables(table, error):
    with pytest.raises(error, match=r"(?s)got:.*needs:.*fix:"):
        nv.set_precision(Linears(), table)


@pytest.mark.parametrize("names", [["head"], ("head", "stem"), {"head"}])
def test_names_without_what_they_get(names):
    model = Linears()
    with pytest.raises(TypeError, match=r"(?s)is no dictionary.*\{\"head\.\*\": None\}.*dict\.fromkeys"):
        nv.set_precision(model, names)


def test_not_a_module():
    with pytest.raises(TypeError, match="needs: a torch.nn.Module"):
        nv.set_precision({"head": None}, Linears())


def test_wrapper_names_are_no_part_of_names(x):
    averaged = torch.optim.swa_utils.AveragedModel(Linears())
    nv.set_precision(averaged, {"head": None, "module.stem": None})  # the raw name works too
    found = ran(averaged.module, lambda: averaged.module(x))
    assert found["head"] == found["stem"] == "high"
    compiled = torch.compile(Linears(), backend="eager")
    nv.set_precision(compiled, {"body.0": None})
    assert ran(compiled._orig_mod, lambda: compiled._orig_mod(x))["body.0"] == "high"


def test_survives_deepcopy_pickling_and_averaging_and_stays_out_of_state_dict(x):
    model = Linears()
    keys = list(model.state_dict())
    nv.set_precision(model, {"head": None, "body": NO_RHT})
    assert list(model.state_dict()) == keys
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        torch.optim.swa_utils.AveragedModel(model).module,
    ]
    with nv.nvfp4_autocast():
        y = model(x)
    for other in copies:
        with nv.nvfp4_autocast():
            assert torch.equal(other(x), y)
        assert ran(other, functools.partial(other, x))["head"] == "high"
        nv.set_precision(other, {"head": named("b")})
        assert ran(other, functools.partial(other, x))["head"] == "b" and ran(model, lambda: model(x))["head"] == "high"


def test_an_unpickled_hook_keeps_its_id_to_itself(monkeypatch, x):
    model = Linears()
    nv.set_precision(model, {"head": None})
    data = pickle.dumps(model)
    (hook_id,) = model.head._forward_pre_hooks
    monkeypatch.setattr(RemovableHandle, "next_id", hook_id)  # as in a new process
    other = pickle.loads(data)
    other.head.register_forward_pre_hook(lambda module, args: None)
    assert ran(other, functools.partial(other, x))["head"] == "high" and len(other.head._forward_pre_hooks) == 2


class Raises(nn.Module):
    def __init__(self, error) -> None:
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()])
def test_exceptions_leave_no_override_behind(x, error):
    model = nn.Sequential(nn.Linear(16, 16), Raises(error))
    nv.set_precision(model, {"": NO_RHT, "1": None})
    with pytest.raises(type(error)), nv.nvfp4_autocast():
        model(x)
    assert nv_context.local.overrides == []
    with pytest.raises(type(error)):  # outside of all contexts
        model(x)
    with nv.nvfp4_autocast():
        assert nv.active_recipe() == nv.NVFP4BlockScaling()
    assert nv_context.local.overrides == []


def test_another_pre_hook_that_raises_does_not_end_the_outer_override(x):
    inner = nn.Linear(16, 16)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = inner, nn.Linear(16, 16)

        def forward(self, x):
            with contextlib.suppress(ZeroDivisionError):
                self.inner(x)
            return self.last(x)

    model = Outer()
    nv.set_precision(model, {"": None, "inner": NO_RHT})

    def raises(module, args):
        raise ZeroDivisionError

    inner.register_forward_pre_hook(raises, prepend=True)  # before the entry's own
    assert ran(model, lambda: model(x)) == {"last": "high"}
    inner._forward_pre_hooks.popitem(last=False)
    inner.register_forward_pre_hook(raises)  # after it
    assert ran(model, lambda: model(x)) == {"last": "high"}


def test_a_module_that_calls_itself(x):
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x, depth=2):
            return self.fc(self(x, depth - 1) if depth else x)

    model = nn.ModuleDict({"r": Recursive(), "after": nn.Linear(16, 16)})
    model.forward = lambda x: model["after"](model["r"](x))  # type: ignore[method-assign]
    nv.set_precision(model, {"r": None})
    assert ran(model, lambda: model(x)) == {"r.fc": "high", "after": "nvfp4"}


def test_a_context_entered_inside_forward_respects_the_entry(x):
    class Enters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        @nv.nvfp4_autocast()
        def forward(self, x):
            return self.fc(x)

    model = Enters()
    nv.set_precision(model, {"": None})
    assert torch.equal(model(x), nn.functional.linear(x, model.fc.weight, model.fc.bias))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_with_the_entries(reentrant):
    model = Linears()
    nv.set_precision(model, {"body.0": None, "body": NO_RHT})
    x = torch.randn(16, 16, requires_grad=True)

    def grads(segment):
        model.zero_grad()
        torch.manual_seed(0)
        with nv.nvfp4_autocast():
            y = model.head(segment(model.stem(x)))
        y.square().sum().backward()  # outside: recomputed as inside
        return [p.grad.clone() for p in model.parameters()]

    plain = grads(model.body)
    again = grads(lambda h: checkpoint(model.body, h, use_reentrant=reentrant))
    assert all(map(torch.equal, plain, again)) and nv_context.local.overrides == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_of_a_plain_forward_stays_plain_when_backward_runs_inside_a_context(reentrant):
    with nv.nvfp4_autocast():
        pass  # checkpoint is wrapped from the first entry on
    model, x = Linears(), torch.randn(16, 16, requires_grad=True)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    y = checkpoint(model, x, use_reentrant=reentrant)
    with nv.nvfp4_autocast():
        y.sum().backward()
    assert all(map(torch.equal, plain, [p.grad for p in model.parameters()]))


@pytest.mark.filterwarnings("ignore:Dynamo detected")
def test_compiled_models_keep_to_the_entries(x):
    model = Linears()
    nv.set_precision(model, {"body.0": None, "head": NO_RHT})
    with nv.nvfp4_autocast():
        y = model(x)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, backend="eager")(x), y)
    torch._dynamo.reset()


def test_shared_modules_match_by_either_name(x):
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    nv.set_precision(model, {"2": None})
    assert ran(model, lambda: model(x)) == {"0": "high"}


# ---- frozen_weights ----


def counted(monkeypatch) -> list[int]:
    """Grows by one whenever a weight is quantized; tracing a graph quantizes none."""
    count: list[int] = []
    real = operand.quantize_weight

    def quantize_weight(*args, **kwargs):
        if not isinstance(args[0], FakeTensor):
            count.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(operand, "quantize_weight", quantize_weight)
    return count


def accumulate(model, batches, inside):
    torch.manual_seed(0)
    model.zero_grad()
    with inside:
        for batch in batches:
            with nv.nvfp4_autocast():
                loss = model(batch).square().sum()
            loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def test_frozen_weights_quantize_once_with_equal_bits(monkeypatch):
    model, batches = Linears(), [torch.randn(16, 16) for _ in range(3)]
    plain = accumulate(model, batches, contextlib.nullcontext())
    count = counted(monkeypatch)
    frozen = accumulate(model, batches, nv.frozen_weights(model))
    assert len(count) == 4 and all(map(torch.equal, plain, frozen))
    assert weight_codes.frozen == {}
    accumulate(model, batches, contextlib.nullcontext())
    assert len(count) == 4 + 3 * 4


def test_frozen_weights_serve_evaluation_first(monkeypatch, x):
    model = Linears()
    count = counted(monkeypatch)
    with nv.frozen_weights(model):
        with torch.no_grad(), nv.nvfp4_autocast(NO_2D):
            model(x)
        with nv.nvfp4_autocast(NO_2D):
            model(x.requires_grad_()).sum().backward()
    assert len(count) == 4


def test_frozen_weights_keep_recipes_apart(monkeypatch, x):
    model = Linears()
    with nv.nvfp4_autocast(NO_2D):
        expected = model(x)
    with nv.frozen_weights(model):
        with nv.nvfp4_autocast():
            model(x)
        with nv.nvfp4_autocast(NO_2D):
            assert torch.equal(model(x), expected)


def test_frozen_weights_nest(monkeypatch, x):
    model = Linears()
    count = counted(monkeypatch)
    with nv.frozen_weights(model):
        with nv.frozen_weights(model.body), nv.nvfp4_autocast():
            model(x)
        with nv.nvfp4_autocast():
            model(x)
    assert len(count) == 4 and weight_codes.frozen == {}


def test_a_counted_change_raises_at_the_next_use(x):
    model = Linears()
    with pytest.raises(RuntimeError, match="'stem.weight' changed inside"), nv.frozen_weights(model):
        with nv.nvfp4_autocast():
            model(x)
            with torch.no_grad():
                model.stem.weight.add_(1)
            model(x)
    assert weight_codes.frozen == {}


@pytest.mark.parametrize("how", ["optimizer", "fused", "data", "replace", "load"])
def test_a_change_raises_at_the_end(x, how):
    model = Linears()

    def change():
        if how in ("optimizer", "fused"):
            torch.optim.AdamW(model.parameters(), fused=how == "fused").step()
        elif how == "data":
            model.head.weight.data[3, 3] += 1e-3
        elif how == "replace":
            model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        else:
            model.load_state_dict({key: value + 1 for key, value in model.state_dict().items()})

    with pytest.raises(RuntimeError, match=r"changed inside[\s\S]*fix:"), nv.frozen_weights(model):
        with nv.nvfp4_autocast():
            model(x).sum().backward()
        change()
    assert weight_codes.frozen == {}


@pytest.mark.filterwarnings("ignore:Dynamo detected")
def test_frozen_weights_of_a_compiled_model(monkeypatch, x):
    torch._dynamo.reset()
    model = Linears()
    compiled = torch.compile(model, backend="eager")
    with nv.nvfp4_autocast():
        expected = model(x)
        count = counted(monkeypatch)
        with nv.frozen_weights(compiled):
            assert torch.equal(compiled(x), expected) and torch.equal(compiled(x), expected)
        assert len(count) == 4 and torch.equal(compiled(x), expected) and len(count) == 8
    torch._dynamo.reset()


def test_an_error_inside_is_the_error_that_comes_out(x):
    model = Linears()
    with pytest.raises(ZeroDivisionError), nv.frozen_weights(model):
        model.head.weight.data.add_(1)
        raise ZeroDivisionError
    assert weight_codes.frozen == {}
    with pytest.raises(TypeError, match="frozen_weights"), nv.frozen_weights(x):
        pass


# ---- extra_state ----


def step(model, x):
    with nv.nvfp4_autocast():
        loss = model(x).square().sum()
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def test_extra_state_resumes_bit_exactly(x, tmp_path):
    model = Linears()
    step(model, x)
    torch.save({"nvfp4": nv.extra_state(model), "rng": torch.get_rng_state()}, tmp_path / "c.pt")
    expected = step(model, x)
    other = step(model, x)
    assert not all(map(torch.equal, expected, other))  # the stream moves on
    torch.manual_seed(7)
    step(model, x)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    torch.set_rng_state(saved["rng"])
    now = nv.extra_state(model, load=saved["nvfp4"])
    assert now == saved["nvfp4"]
    assert all(map(torch.equal, step(model, x), expected))


@pytest.mark.slow
def test_extra_state_in_a_new_process(tmp_path, monkeypatch):
    code = """
import sys, torch, te_nvfp4_cv as nv
torch.manual_seed(3)
model, x = torch.nn.Linear(32, 32), torch.randn(16, 32)
def step():
    model.zero_grad()
    with nv.nvfp4_autocast():
        model(x).square().sum().backward()
    return model.weight.grad.clone()
if sys.argv[1] == "save":
    step(); torch.save(nv.extra_state(model), "s.pt"); torch.save(step(), "g.pt")
else:
    nv.extra_state(model, load=torch.load("s.pt", weights_only=True))
    assert torch.equal(step(), torch.load("g.pt"))
    print("equal")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["", "save"])
        exec(code, {})
    command = [sys.executable, "-c", code, "load"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.stdout.strip() == "equal", result.stderr


@pytest.mark.parametrize(
    "foreign",
    [{}, {"state": {}}, [1], {"format": "te_nvfp4_cv", "version": 1, "sr_seed": 0}, {"format": "te", "version": 1}],
)
def test_a_foreign_state_is_refused(foreign):
    with pytest.raises(ValueError, match="not what extra_state saved"):
        nv.extra_state(Linears(), load=foreign)


def test_states_of_another_version_or_seed_are_refused(x):
    model = Linears()
    step(model, x)
    state = nv.extra_state(model)
    with pytest.raises(ValueError, match="version 99"):
        nv.extra_state(model, load=state | {"version": 99})
    torch.manual_seed(1)
    with pytest.raises(RuntimeError, match="torch.manual_seed"):
        nv.extra_state(model, load=state)
    with pytest.raises(TypeError, match="extra_state"):
        nv.extra_state(state)
