"""The public names, their signatures, and that nothing else is public."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import pathlib
import pickle
import pydoc
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import te_nvfp4_cv as nv

NAMES = {
    "NVFP4BlockScaling",
    "NVFP4Conv1d",
    "NVFP4Conv2d",
    "NVFP4Conv3d",
    "NVFP4ConvTranspose1d",
    "NVFP4ConvTranspose2d",
    "NVFP4ConvTranspose3d",
    "NVFP4GroupedLinear",
    "NVFP4Linear",
    "NVFP4Quantizer",
    "NVFP4Tensor",
    "QParams",
    "active_recipe",
    "autocast",
    "capture",
    "clear_precision",
    "convert_model",
    "coverage",
    "distributed",
    "extra_state",
    "frozen_weights",
    "fsdp",
    "functional",
    "gemm",
    "learn_scales",
    "load_recipe",
    "nvfp4_autocast",
    "prepare",
    "saturated_blocks",
    "set_precision",
}
MODULES = {"distributed", "fsdp", "functional"}
CONV = ["x", "w", "bias", "stride", "padding", "dilation", "groups", "recipe", "backend"]
TRANSPOSED = ["x", "w", "bias", "stride", "padding", "output_padding", "groups", "dilation", "recipe", "backend"]


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_names():
    assert NAMES <= set(nv.__all__) and sorted(nv.__all__) == list(nv.__all__)
    assert all(hasattr(nv, name) for name in nv.__all__)
    public = {
        name
        for name, value in vars(nv).items()
        if not name.startswith("_") and not (isinstance(value, types.ModuleType) and name not in MODULES)
    }
    assert public == set(nv.__all__)


def test_dir_lists_the_public_names_and_no_internals(monkeypatch):
    lazy = {"export", "sensitivity", "spatial_parallel", "telemetry", "tensor_parallel", "te_plugin"}
    has_lightning = any(importlib.util.find_spec(name) for name in ("lightning", "pytorch_lightning"))
    expected = {*nv.__all__, "__version__", *lazy, *(["lightning"] if has_lightning else [])}
    assert dir(nv) == sorted(expected)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert set(dir(nv)) == expected - {"lightning"}, "help(nv) would try to import Lightning and fail"


def test_what_needs_more_than_torchs_core_is_imported_when_asked_for():
    code = """
import sys, te_nvfp4_cv as nv
for name in ("spatial_parallel", "tensor_parallel", "te_plugin", "sensitivity", "telemetry"):
    assert "te_nvfp4_cv." + name not in sys.modules, name
print(nv.tensor_parallel.ColwiseParallel.__name__, nv.te_plugin.recipe.__name__, nv.sensitivity.scan.__name__)
print(nv.telemetry.attach.__name__)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["ColwiseParallel", "recipe", "scan", "attach"], result.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nv.nothing


def printing_functions(source: str) -> set[str]:
    """Return the names of the functions in a source text that call print; "" stands for the module's own level."""
    found: set[str] = set()

    def walk(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.add(function)
        for child in ast.iter_child_nodes(node):
            walk(child, function)

    walk(ast.parse(source), "")
    return found


def test_only_commands_print():
    """Warnings and notes of the library go through `warnings` and `logging`, where a user can route or silence them."""
    assert printing_functions("print(1)\ndef f():\n    g(say=lambda: print(2))\ndef h(): log('print(3)')") == {"", "f"}
    package = pathlib.Path(nv.__file__).parent
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py") if "cli" not in path.parts}
    found = {name: printing_functions(path.read_text(encoding="utf-8")) for name, path in files.items()}
    printing = {(name, function) for name, functions in found.items() for function in functions}
    # The command line calls these two; they print a command's result.
    assert len(printing) == 2 and all(name.startswith(("export/", "selftest/")) for name, _ in printing), printing


def test_coverage_is_the_function_not_its_module():
    assert inspect.isfunction(nv.coverage) and inspect.isfunction(nv.gemm)


@pytest.mark.parametrize("name", sorted(NAMES - MODULES))
def test_every_name_has_a_docstring(name):
    assert inspect.getdoc(getattr(nv, name))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (nv.nvfp4_autocast, ["recipe", "enabled", "backend", "amax_reduction_group", "relu_mask"]),
        (nv.set_precision, ["model", "table"]),
        (nv.clear_precision, ["model"]),
        (nv.convert_model, ["model", "recipe", "filter_fn"]),
        (nv.coverage, ["model", "inputs", "recipe", "backend", "kwargs"]),
        (nv.active_recipe, []),
        (nv.capture, []),
        (nv.distributed.all_gather, ["t", "group", "dim", "async_op", "quantizer"]),
        (nv.extra_state, ["model", "load"]),
        (nv.fsdp.quantize_gathers, ["model", "recipe", "filter_fn"]),
        (nv.frozen_weights, ["model"]),
        (nv.saturated_blocks, ["model"]),
        (nv.functional.im2col, ["t", "kernel_size", "stride", "padding", "dilation"]),
        (nv.functional.linear, ["x", "w", "bias", "recipe", "backend"]),
        *((getattr(nv.functional, f"conv{n}d"), CONV) for n in (1, 2, 3)),
        *((getattr(nv.functional, f"conv_transpose{n}d"), TRANSPOSED) for n in (1, 2, 3)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_signatures(function, expected):
    assert parameters(function) == expected


def test_functionals_take_torchs_positional_order():
    for n in (1, 2, 3):
        for t in ("", "_transpose"):
            ours = parameters(getattr(nv.functional, f"conv{t}{n}d"))[3:-2]
            text = getattr(nn.functional, f"conv{t}{n}d").__doc__.split("->")[0]
            theirs = [part.split("=")[0].strip() for part in text[text.index("(") + 1 : text.rindex(")")].split(",")]
            assert ours == theirs[3:]


def test_quantizer_and_gemm_keywords():
    flags = ("rowwise", "columnwise", "with_rht", "stochastic_rounding", "with_2d_quantization")
    assert set(flags) <= set(parameters(nv.NVFP4Quantizer))
    assert {"layout", "out_dtype"} <= set(parameters(nv.gemm))


@pytest.mark.parametrize("name", [n for n in sorted(NAMES) if "Conv" in n or n == "NVFP4Linear"])
def test_module_keywords(name):
    cls, plain = getattr(nv, name), getattr(nn, name.removeprefix("NVFP4"))
    arguments = (16, 16) if name == "NVFP4Linear" else (16, 16, 3)
    module = cls(*arguments, recipe=nv.NVFP4BlockScaling(), backend="vendor")
    assert isinstance(module, plain) and module.recipe == nv.NVFP4BlockScaling() and module.backend == "vendor"


@pytest.mark.parametrize("name", [n for n in sorted(NAMES) if "Conv" in n or n == "NVFP4Linear"])
def test_module_signatures_are_torchs_with_recipe_and_backend(name):
    cls, plain = getattr(nv, name), getattr(nn, name.removeprefix("NVFP4"))
    ours, torchs = (list(inspect.signature(c).parameters.values()) for c in (cls, plain))
    assert [(p.name, p.kind, p.default) for p in ours[:-2]] == [(p.name, p.kind, p.default) for p in torchs]
    assert [(p.name, p.kind, p.default) for p in ours[-2:]] == [
        ("recipe", inspect.Parameter.KEYWORD_ONLY, None),
        ("backend", inspect.Parameter.KEYWORD_ONLY, "auto"),
    ]
    head = pydoc.render_doc(cls, renderer=pydoc.plaintext).split("Method resolution order")[0]
    assert "*args" not in head and f"{name}({torchs[0].name}: " in head and "*, recipe: " in head


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_constructor_argument_reaches_its_place(rank, transposed):
    """By position, as torch takes them, with values that tell the arguments apart."""
    kind = f"ConvTranspose{rank}d" if transposed else f"Conv{rank}d"
    tail = (3, 2, 1, 4, False, 2) if transposed else (3, 2, 2, 4, False)
    arguments = (32, 64, 3, *tail, "zeros", "cpu", torch.bfloat16)
    torch.manual_seed(1)
    module = getattr(nv, f"NVFP4{kind}")(*arguments, backend="vendor")
    torch.manual_seed(1)
    plain = getattr(nn, kind)(*arguments)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "dilation", "groups")
    assert all(getattr(module, name) == getattr(plain, name) for name in names)
    assert module.bias is None and torch.equal(module.weight, plain.weight) and module.weight.dtype == torch.bfloat16
    copy = pickle.loads(pickle.dumps(module))
    assert type(copy) is type(module) and copy.backend == "vendor" and copy.stride == module.stride


def test_the_ten_lines_of_the_design():
    recipe = nv.load_recipe("unet")
    model = nn.ModuleDict({"body": nn.Conv2d(16, 32, 3), "head": nn.Conv2d(32, 16, 1)})
    model.forward = lambda x: model["head"](model["body"](x))  # type: ignore[method-assign]
    images = torch.randn(16, 16, 6, 6)
    nv.set_precision(model, recipe)
    with nv.nvfp4_autocast(recipe):
        assert nv.active_recipe() == recipe
        loss = model(images).square().mean()
    loss.backward()
    report = nv.coverage(model, images, recipe=recipe)
    assert {row.name: row.nvfp4 for row in report.rows} == {"body": True, "head": False}
    assert nv.active_recipe() is None and loss.isfinite()


def test_decorator_and_disabled():
    fc, x = nn.Linear(16, 16), torch.randn(16, 16)

    @nv.nvfp4_autocast(enabled=False)
    def plain():
        return fc(x)

    assert torch.equal(plain(), fc(x)) and plain.__name__ == "plain"
    with pytest.raises(TypeError, match="first argument is the recipe"):
        nv.nvfp4_autocast(True)
