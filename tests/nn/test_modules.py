"""The explicit modules against nv.functional, bit for bit, and convert_model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import te_nvfp4_cv as nv
from te_nvfp4_cv.layer import execute, observe

NO_RHT = nv.NVFP4BlockScaling(disable_rht=True)
NO_2D = nv.NVFP4BlockScaling(disable_2d_quantization=True)
F4, F = nv.functional, torch.nn.functional
PAIRS = {
    nn.Conv1d: (nv.NVFP4Conv1d, (16, 32, 3), (4, 16, 9)),
    nn.Conv2d: (nv.NVFP4Conv2d, (16, 32, 3), (4, 16, 6, 5)),
    nn.Conv3d: (nv.NVFP4Conv3d, (16, 32, 3), (2, 16, 4, 5, 4)),
    nn.ConvTranspose1d: (nv.NVFP4ConvTranspose1d, (16, 32, 3), (4, 16, 9)),
    nn.ConvTranspose2d: (nv.NVFP4ConvTranspose2d, (16, 32, 3), (4, 16, 6, 5)),
    nn.ConvTranspose3d: (nv.NVFP4ConvTranspose3d, (16, 32, 3), (2, 16, 4, 5, 4)),
    nn.Linear: (nv.NVFP4Linear, (16, 32), (4, 5, 16)),
}
FUNCTIONS = {
    nn.Conv1d: F4.conv1d,
    nn.Conv2d: F4.conv2d,
    nn.Conv3d: F4.conv3d,
    nn.ConvTranspose1d: F4.conv_transpose1d,
    nn.ConvTranspose2d: F4.conv_transpose2d,
    nn.ConvTranspose3d: F4.conv_transpose3d,
    nn.Linear: F4.linear,
}


@pytest.fixture
def x():
    return torch.randn(16, 16, 6, 6)


@pytest.mark.parametrize("plain", PAIRS, ids=lambda c: c.__name__)
def test_each_module_is_its_function(plain):
    cls, args, shape = PAIRS[plain]
    module = cls(*args, recipe=NO_RHT)
    x = torch.randn(shape, requires_grad=True)
    y = module(x)
    expected = FUNCTIONS[plain](x, module.weight, module.bias, recipe=NO_RHT)
    assert torch.equal(y, expected) and not torch.equal(y, getattr(F, module.op)(x, module.weight, module.bias))
    y.sum().backward()
    assert module.weight.grad.shape == module.weight.shape and x.grad is not None


@pytest.mark.parametrize("plain", PAIRS, ids=lambda c: c.__name__)
def test_state_dict_and_signature_are_the_plain_modules(plain):
    cls, args, _ = PAIRS[plain]
    module, other = cls(*args, bias=False, dtype=torch.bfloat16), plain(*args, bias=False, dtype=torch.bfloat16)
    assert {k: (v.shape, v.dtype) for k, v in module.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in other.state_dict().items()
    }
    other.load_state_dict(module.state_dict())
    assert issubclass(cls, plain) and repr(module).startswith(f"NVFP4{plain.__name__}(")
    assert "disable_rht=True" in repr(cls(*args, recipe=NO_RHT)) and "'reference'" in repr(
        cls(*args, backend="reference")
    )


def test_precedence(x):
    module = nv.NVFP4Conv2d(16, 32, 3, recipe=NO_RHT)
    unset = nv.NVFP4Conv2d(16, 32, 3)
    unset.load_state_dict(module.state_dict())
    plain = F.conv2d(x, module.weight, module.bias)
    x.requires_grad_()

    def of(recipe):  # wgrad tells RHT from no RHT, fprop 2D from 1D
        return F4.conv2d(x, module.weight, module.bias, recipe=recipe)

    def seen(layer, **context):
        found = []
        with observe.observe(lambda call: found.append(call.recipe)), nv.nvfp4_autocast(**context):
            y = layer(x)
        assert len(found) == 1  # once: not handed over a second time
        return found[0], y

    assert torch.equal(unset(x), of(None))
    assert seen(module, recipe=NO_2D)[0] == NO_RHT  # module > context
    recipe, y = seen(unset, recipe=NO_2D)
    assert recipe == NO_2D and torch.equal(y, of(NO_2D))
    nv.set_precision(module, {"": NO_2D})
    assert seen(module)[0] == NO_2D  # set_precision > module
    assert torch.equal(module(x), of(NO_RHT))  # but only inside a context
    nv.set_precision(module, {"": None})
    recipe, y = seen(module)
    assert recipe is None and torch.equal(y, plain)
    assert torch.equal(seen(unset, enabled=False)[1], plain)
    with nv.nvfp4_autocast(), nv.nvfp4_autocast(enabled=False):
        assert torch.equal(unset(x), plain)


def test_backend_is_the_contexts_inside_of_one(x, monkeypatch):
    asked = []
    real = execute.dispatch.resolve

    def resolve(name, *more, **options):  # type: ignore[no-untyped-def]
        asked.append(name)
        return real(name, *more, **options)

    monkeypatch.setattr(execute.dispatch, "resolve", resolve)
    module = nv.NVFP4Conv2d(16, 16, 1, backend="reference")
    module(x)
    with nv.nvfp4_autocast(backend="vendor"):
        module(x)
    assert asked[0] == "reference" and asked[-1] == "vendor"


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same", "valid"])
def test_padding_modes(x, mode, padding):
    module = nv.NVFP4Conv2d(16, 16, 3, padding=padding, padding_mode=mode, dilation=(1, 2))
    plain = nn.Conv2d(16, 16, 3, padding=padding, padding_mode=mode, dilation=(1, 2))
    plain.load_state_dict(module.state_dict())
    y, expected = module(x), plain(x)
    assert y.shape == expected.shape
    assert (y - expected).norm() < 0.2 * expected.norm()
    with nv.nvfp4_autocast():
        assert torch.equal(plain(x), y)


@pytest.mark.parametrize("size", [(13, 13), (14, 13), (14, 14)])
def test_output_size_of_transposed_convolutions(x, size):
    module = nv.NVFP4ConvTranspose2d(16, 16, 3, stride=2)
    y = module(x, output_size=size)
    assert y.shape[2:] == size
    expected = F.conv_transpose2d(x, module.weight, module.bias, 2, 0, tuple(n - 13 for n in size))
    assert (y - expected).norm() < 0.2 * expected.norm()
    with pytest.raises(ValueError, match="output size"):
        module(x, output_size=[40, 40])


@pytest.mark.parametrize(
    ("build", "x", "told"),
    [
        (lambda: nv.NVFP4Conv2d(3, 32, 3), torch.randn(2, 3, 8, 8), "3 in-channels"),
        (lambda: nv.NVFP4Conv2d(32, 32, 3, groups=32), torch.randn(2, 32, 8, 8), "depthwise"),
        (lambda: nv.NVFP4Linear(32, 4), torch.randn(2, 32), "4 out-channels"),
        (lambda: nv.NVFP4Linear(32, 32).double(), torch.randn(2, 32).double(), "float64"),
        (lambda: nv.NVFP4Conv2d(32, 32, 3), torch.randn(2, 16, 8, 8), "channels do not match"),
    ],
)
def test_what_cannot_run_raises(build, x, told):
    module = build()
    with pytest.raises(ValueError, match=rf"(?s){told}.*got:.*needs:.*fix:"):
        module(x)
    with pytest.raises(ValueError, match=told), nv.nvfp4_autocast():
        module(x)


def test_a_recipe_without_nvfp4_gemms_is_high_precision(x):
    module = nv.NVFP4Conv2d(16, 16, 3)
    nothing = nv.NVFP4BlockScaling(high_precision_gemms=("fprop", "dgrad", "wgrad"))
    with nv.nvfp4_autocast(nothing):
        assert torch.equal(module(x), F.conv2d(x, module.weight, module.bias))


@pytest.mark.parametrize("gemm", ["fprop", "dgrad", "wgrad"])
def test_a_high_precision_gemm_of_an_explicit_module_is_not_handed_over(gemm):
    recipe = nv.NVFP4BlockScaling(high_precision_gemms=(gemm,), disable_stochastic_rounding=True)
    x = torch.randn(16, 32, requires_grad=True)
    module = nv.NVFP4Linear(32, 32, recipe=recipe)
    results = []
    for enter in (False, True):
        module.zero_grad()
        x.grad = None
        if enter:
            with nv.nvfp4_autocast():
                y = module(x)
                y.sum().backward()
        else:
            y = module(x)
            y.sum().backward()
        results.append((y.detach(), x.grad.clone(), module.weight.grad.clone()))
    assert all(map(torch.equal, *results))
    if gemm == "fprop":
        assert torch.equal(y, F.linear(x, module.weight, module.bias))


@pytest.mark.parametrize(
    ("keywords", "error"),
    [({"recipe": True}, TypeError), ({"recipe": "no such"}, FileNotFoundError), ({"backend": "cutlass"}, ValueError)],
)
def test_bad_keywords(keywords, error):
    with pytest.raises(error, match=r"(?s)got:.*needs:.*fix:"):
        nv.NVFP4Linear(16, 16, **keywords)


def test_copies(x):
    module = nv.NVFP4Conv2d(16, 16, 3, recipe=NO_2D)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.recipe == NO_2D and torch.equal(other(x), module(x))


@pytest.mark.filterwarnings("ignore:Dynamo detected")
def test_compiles(x):
    torch._dynamo.reset()
    module = nv.NVFP4Conv2d(16, 16, 3)
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:Dynamo detected")
def test_compiles_for_changing_batches():
    torch._dynamo.reset()
    module = nv.NVFP4Conv2d(16, 16, 3)
    compiled = torch.compile(module, backend="eager")
    for batch in (16, 32, 5):  # the second makes the batch a symbol
        x = torch.randn(batch, 16, 6, 6)
        assert torch.equal(compiled(x), module(x))
    torch._dynamo.reset()


# ---- convert_model ----


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 16, 2, 2),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.Flatten(),
        nn.Linear(16 * 100, 32),
    )


def classes(m: nn.Module) -> list[str]:
    return [type(child).__name__ for child in m.children()]


def test_convert_keeps_everything_but_the_class():
    m, image = model(), torch.randn(16, 3, 6, 6)
    hooked = []
    m[1].register_forward_hook(lambda *_: hooked.append(1))
    m[6].eval()
    before = dict(m.named_parameters())
    with nv.nvfp4_autocast():
        expected = m(image)
    returned = nv.convert_model(m)
    assert returned is m
    assert classes(m) == ["Conv2d", "NVFP4Conv2d", "ReLU", "NVFP4ConvTranspose2d", "Conv2d", "Flatten", "NVFP4Linear"]
    assert all(p is before[name] for name, p in m.named_parameters()) and not m[6].training and m[1].training
    assert torch.equal(m(image), expected) and len(hooked) == 2
    m(image).sum().backward()
    assert all(p.grad is not None for p in m.parameters())


def test_convert_turned_off_is_the_plain_model():
    m, image = model(), torch.randn(2, 3, 6, 6)
    expected = m(image)
    nv.convert_model(m)
    with nv.nvfp4_autocast(enabled=False):
        assert torch.equal(m(image), expected)


def test_convert_with_recipe_and_filter():
    m = nv.convert_model(model(), NO_RHT, filter_fn=lambda module, name: name != "1")
    assert classes(m)[1] == "Conv2d" and m[3].recipe is NO_RHT and m[6].recipe is NO_RHT


def test_convert_applies_the_precision_table():
    recipe = nv.NVFP4BlockScaling(precision=(("1", None), ("3", NO_2D)))
    m = nv.convert_model(model(), recipe)
    assert classes(m)[1] == "Conv2d" and m[3].recipe == NO_2D and m[6].recipe is recipe
    nested = nn.Sequential(model(), nn.Linear(32, 32))
    nv.convert_model(nested, nv.NVFP4BlockScaling(precision=(("0", None), ("0.3", NO_2D))))
    assert type(nested[0][6]) is nn.Linear and nested[0][3].recipe == NO_2D and type(nested[1]) is nv.NVFP4Linear
    with pytest.raises(ValueError, match="matches no module"):
        nv.convert_model(fresh := model(), nv.NVFP4BlockScaling(precision=(("head", None),)))
    assert classes(fresh)[1] == "Conv2d"


def test_convert_the_root_and_shared_modules(x):
    root = nv.convert_model(nn.Conv2d(16, 16, 3))
    assert type(root) is nv.NVFP4Conv2d and torch.equal(root(x), F4.conv2d(x, root.weight, root.bias))
    shared = nn.Conv2d(16, 16, 1)
    m = nv.convert_model(nn.Sequential(shared, nn.ReLU(), shared))
    assert m[0] is m[2] and type(m[0]) is nv.NVFP4Conv2d


def test_convert_twice_leaves_the_first_recipe():
    m = nv.convert_model(nn.Sequential(nn.Linear(16, 16)), NO_RHT)
    nv.convert_model(m, NO_2D)
    assert m[0].recipe is NO_RHT


class MyConv(nn.Conv2d):
    pass


def test_convert_leaves_and_reports(recwarn):
    attention = nn.MultiheadAttention(16, 2)
    m = nn.ModuleDict(
        {
            "mine": MyConv(16, 16, 1),
            "lazy": nn.LazyConv2d(16, 3),
            "attention": attention,
            "good": nn.Linear(16, 16),
            "fp64": nn.Linear(16, 16, dtype=torch.float64),
        }
    )
    kinds = {name: type(child) for name, child in m.items()}
    with pytest.warns(UserWarning, match="left these layers") as told:
        nv.convert_model(m)
    text = str(told[0].message)
    assert all(part in text for part in ("mine (MyConv", "lazy (lazy"))
    assert "attention" not in text and "fp64" not in text
    assert type(m["good"]) is nv.NVFP4Linear
    kinds.pop("good")
    assert all(type(m[name]) is kind for name, kind in kinds.items())
    assert type(attention.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    with pytest.raises(TypeError, match="convert_model"):
        nv.convert_model([m])


def test_convert_a_model_whose_weights_come_later(x):
    with torch.device("meta"):
        model = nv.convert_model(nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 8, 1)))
    assert [type(layer) for layer in model] == [nv.NVFP4Conv2d, nn.Conv2d]  # 8 channels are too few
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    assert model(x).shape[1] == 8


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["weight_norm", "old weight_norm", "spectral_norm", "old spectral_norm", "prune"])
def test_layers_whose_kernel_torch_computes_are_converted(name):
    plain = nn.Conv2d(16, 32, 3)
    change = {
        "weight_norm": nn.utils.parametrizations.weight_norm,
        "old weight_norm": nn.utils.weight_norm,
        "spectral_norm": nn.utils.parametrizations.spectral_norm,
        "old spectral_norm": nn.utils.spectral_norm,
        "prune": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    }[name]
    module = change(plain).eval()
    x, state = torch.randn(4, 16, 6, 6), {key: value.clone() for key, value in module.state_dict().items()}
    converted = nv.convert_model(module)
    assert isinstance(converted, nv.NVFP4Conv2d)
    assert all(torch.equal(value, state[key]) for key, value in converted.state_dict().items())
    with torch.no_grad():
        assert torch.equal(converted(x), F4.conv2d(x, converted.weight, converted.bias))
    converted(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in converted.parameters())
    if nn.utils.parametrize.is_parametrized(converted):
        nn.utils.parametrize.remove_parametrizations(converted, "weight")
        assert type(converted) is nv.NVFP4Conv2d and isinstance(converted.weight, nn.Parameter)


def test_computed_kernels_are_left_where_the_recipe_says_so():
    module = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    with pytest.warns(UserWarning, match="kernels='parameters'"):
        nv.convert_model(module, nv.NVFP4BlockScaling(kernels="parameters"))
    assert not isinstance(module, nv.NVFP4Linear)


def test_fx_takes_converted_layers_as_leaves():
    model = nv.convert_model(
        nn.Sequential(
            nn.Conv1d(16, 16, 3, padding=1, padding_mode="circular"),
            nn.ConvTranspose1d(16, 32, 2, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, 16),
        )
    )
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3", "4"]
    x = torch.randn(4, 16, 8)
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))


def test_torchscript_is_refused_by_what_takes_the_place_of_layers():
    x = torch.randn(2, 16, 6, 6)
    served = nv.export.quantize(nn.Sequential(nn.Conv2d(16, 16, 3)), [x])
    fused = nv.fuse(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()))
    for model, name in ((served, "InferenceConv2d"), (fused, "BatchNormAct2d")):
        with pytest.raises(RuntimeError, match=rf"torch\.jit\.script does not take an object of {name}"):
            torch.jit.script(model)


def test_torchscript_is_refused_by_name():
    model = nv.convert_model(nn.Sequential(nn.Conv2d(16, 16, 3)))
    x = torch.randn(2, 16, 6, 6)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script does not take an NVFP4Conv2d"):
        torch.jit.script(model)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace does not take an NVFP4Conv2d"):
        torch.jit.trace(model, x)
    with nv.nvfp4_autocast(enabled=False):
        traced = torch.jit.trace(model, x)
        assert torch.equal(traced(x), model(x))


def test_converted_models_train_with_autocast_and_averaging():
    m = nv.convert_model(model())
    averaged = torch.optim.swa_utils.AveragedModel(m)
    optimizer = torch.optim.SGD(m.parameters(), lr=0.01)
    image = torch.randn(4, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = m(image).float().square().mean()
    loss.backward()
    optimizer.step()
    averaged.update_parameters(m)
    assert loss.isfinite() and classes(averaged.module) == classes(m)
