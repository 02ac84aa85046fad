"""Every custom operator of the package: a fake implementation, autocast that casts nothing, torch.library.opcheck.

EXAMPLES names arguments for each; the test of the table fails when an operator is registered without an entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import te_nvfp4_cv as nv
from te_nvfp4_cv.layer import custom_op, forward_backward, inference, weight_codes
from te_nvfp4_cv.layer.custom_op import LayerSpec
from te_nvfp4_cv.layer.forward_backward import Like
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.norm.operators import NormSpec
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.quantize.reference_matrix import MatrixSpec
from te_nvfp4_cv.ops.records import PACKED, Operand, OperandSpec, WeightCodes, WeightSpec
from te_nvfp4_cv.recipe.block_scaling import recipe_of_key
from tests.helpers import make_geometry, same_bits, values

ops = torch.ops.te_nvfp4_cv
assert inference.layer  # its import registers the operator, in whatever order tests run
NO_SR = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)
CONV = make_geometry(2, (16, 32), (5, 4), 3, 1, 1)
SPECS = [OperandSpec(1, fold, PACKED, PACKED, True) for fold in CONV.folds]  # of x and dy
WEIGHT = WeightSpec(1, PACKED)
X, DY = values((2, 5, 4, 16)), values((2, 5, 4, 32), seed=1)
W = values((32, 16, 3, 3), seed=2)
KERNELS_ONLY = {"norm_statistics", "norm_apply", "norm_quantize"}  # opcheck in ops/kernels/test_produce_kernels.py
NO_SCHEMA_TEST = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # it multiplies float8
NORM = NormSpec(momentum=0.1, eps=1e-5, need_mask=True, need_dresidual=True)
RANDOM = ("test_schema", "test_faketensor")


def operands() -> tuple[Operand, Operand, WeightCodes]:
    """Return x, dy and w, packed."""
    x, dy = (
        operand.quantize_operand(array, spec, torch.float32, None, None, "vendor")
        for array, spec in zip((X, DY), SPECS, strict=True)
    )
    return x, dy, operand.quantize_weight(W, WEIGHT, torch.float32, "vendor")


def gemm_pair() -> tuple[Any, ...]:
    q = nv.NVFP4Quantizer(backend="reference")
    a, b = q(values((16, 32))), q(values((16, 32), seed=1))
    pair = [[t.rowwise_data, t.rowwise_scale_inv, t.amax_rowwise] for t in (a, b)]
    return *pair, [448, False, 448, False]


def layer_spec(recipe: nv.NVFP4BlockScaling = NO_SR, need: bool = True) -> LayerSpec:
    return LayerSpec(recipe.key, "vendor", torch.float32, False, need, need)


def layer_arguments(recipe: nv.NVFP4BlockScaling = NO_SR, need: bool = True) -> tuple[Any, ...]:
    x = X.movedim(-1, 1).contiguous().requires_grad_(need)
    w, bias = W.clone().requires_grad_(need), values((32,), seed=3).requires_grad_(need)
    return x, w, bias, CONV.to_ints(), layer_spec(recipe, need).to_text()


def inference_arguments() -> tuple[Any, ...]:
    x, _, bias, sizes, spec = layer_arguments(need=False)
    codes = operands()[2]
    return x, [*codes.row, codes.amax], None, bias, None, sizes, spec


def codes_arguments(need: bool = False) -> tuple[Any, ...]:
    x, _, bias, sizes, _ = layer_arguments(need=False)
    codes = operands()[2]
    return x, [*codes.row, codes.amax], bias, sizes, layer_spec(need=need).to_text()


def backward_arguments(recipe: nv.NVFP4BlockScaling = NO_SR) -> tuple[Any, ...]:
    x, w, bias, sizes, _ = layer_arguments(recipe, False)
    plan = Plan(CONV, recipe, "vendor", torch.float32, False)
    _, saved = forward_backward.forward(x, w, bias, plan, True, True)
    like = custom_op._like_text(Like.of(x, w, bias))
    spec = layer_spec(recipe)._replace(need_db=True, like=like)
    dy = DY.movedim(-1, 1).contiguous()
    return dy, list(saved), sizes, [x.dim(), *x.shape, *w.shape], spec.to_text()


def norm_arguments() -> tuple[Any, ...]:
    z, weight, bias = values((2, 8, 3, 3)), values((8,), seed=1), values((8,), seed=2)
    running = torch.zeros(8), torch.ones(8)
    return z, None, weight, bias, *running, NORM.encode()


def norm_backward_arguments() -> tuple[Any, ...]:
    forward = norm_arguments()
    y, mean, rstd, mask = ops.norm_forward(*forward)
    return y, forward[0], [mean, rstd, *forward[2:4]], mask, NORM.encode()


def conv_arguments(gemm: str) -> tuple[Any, ...]:
    x, dy, w = operands()
    first, second = {"fprop": (x.row, w.row), "dgrad": (dy.row, w.row), "wgrad": (dy.col, x.col)}[gemm]
    bias = (values((32,)),) if gemm == "fprop" else ()
    return [*first, *second], torch.ones(1), *bias, CONV.to_ints(), torch.float32, "reference"


EXAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "layer": layer_arguments,
    "layer_of_codes": codes_arguments,
    "layer_backward": backward_arguments,
    "inference_layer": inference_arguments,
    "quantize_operand": lambda: (X, SPECS[0].to_ints(), torch.float32, None, None, "vendor"),
    "measure_operand": lambda: (X, SPECS[0].to_ints(), "vendor"),
    "quantize_weight": lambda: (W, WEIGHT.to_ints(), torch.float32, "vendor"),
    "unpack_rows": lambda: (*operands()[0].row, 16, 1, torch.bfloat16, "vendor"),
    "unpack_columns": lambda: (*operands()[0].col, torch.bfloat16, "vendor"),
    "unpack_weight": lambda: (*operands()[2].row, [32, 16, 1, 0], None, torch.bfloat16, "vendor"),
    "conv_fprop": lambda: conv_arguments("fprop"),
    "conv_dgrad": lambda: conv_arguments("dgrad"),
    "conv_wgrad": lambda: conv_arguments("wgrad"),
    "gemm": lambda: (*gemm_pair(), values((16,)), None, torch.bfloat16, "reference"),
    "quantize": lambda: (
        *(values((20, 40)).bfloat16(), MatrixSpec(columnwise=True, rht=True, stochastic_rounding=True).to_ints()),
        *(None, None, torch.tensor(3), "reference"),
    ),
    "draw_seed": lambda: (torch.ones(2),),
    "masked_relu": lambda: (values((3, 5)), [1, 3]),
    "positive_mask": lambda: (values((3, 5)).clamp(min=0), [5, 1]),
    "apply_mask": lambda: (values((3, 5)), ops.positive_mask(values((3, 5)).clamp(min=0), [5, 1]), [5, 1]),
    "norm_forward": norm_arguments,
    "norm_backward": norm_backward_arguments,
}
TESTS = {"gemm": NO_SCHEMA_TEST, "draw_seed": RANDOM}


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.split("::")[1].split(".")[0] for name in names if name.startswith("te_nvfp4_cv::")}


def test_every_operator_has_an_example():
    assert registered() == set(EXAMPLES) | KERNELS_ONLY


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) | KERNELS_ONLY))
def test_every_operator_has_its_registrations(name):
    overload = getattr(ops, name).default
    assert torch._library.simple_registry.singleton.find(f"te_nvfp4_cv::{name}").fake_impl.kernel is not None
    for key in ("AutocastCPU", "AutocastCUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), key), key


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_opcheck(name):
    utilities = TESTS.get(name)
    options = {} if utilities is None else {"test_utils": utilities}
    torch.library.opcheck(getattr(ops, name).default, EXAMPLES[name](), **options)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_opcheck_of_codes_where_backward_will_need_x():
    """The graph's own backward asks for gradients: torch sees an operator that only returns more tensors."""
    arguments = codes_arguments(need=True)
    assert ops.layer_of_codes(*arguments)[1].numel() and not ops.layer_of_codes(*codes_arguments())[1].numel()
    torch.library.opcheck(ops.layer_of_codes.default, arguments)


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - {"draw_seed"}))
def test_autocast_changes_nothing(name):
    def outputs() -> list[Tensor]:
        torch.manual_seed(0)
        made = getattr(ops, name)(*EXAMPLES[name]())
        return [made] if isinstance(made, Tensor) else list(made)

    plain = outputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = outputs()
    assert plain and all(same_bits(a, b) for a, b in zip(plain, cast, strict=True))


RECIPES = [
    nv.NVFP4BlockScaling(),
    nv.NVFP4BlockScaling(disable_2d_quantization=True, disable_rht=True),
    nv.NVFP4BlockScaling(high_precision_gemms=("wgrad",)),
    nv.NVFP4BlockScaling(high_precision_gemms=("dgrad",)),
    nv.NVFP4BlockScaling(high_precision_gemms=("fprop",), disable_2d_quantization=True),
    nv.NVFP4BlockScaling(backward_override="high_precision"),
    nv.NVFP4BlockScaling(backward_override="dequantized"),
    nv.NVFP4BlockScaling(nvfp4_4over6="all", disable_rht=True),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.key or "default")
@pytest.mark.parametrize("transposed", [False, True])
def test_the_layers_operator_gives_the_bits_of_the_eager_layer(recipe, transposed):
    function = nv.functional.conv_transpose2d if transposed else nv.functional.conv2d
    shape = (16, 32, 3, 3) if transposed else (32, 16, 3, 3)
    x, w, bias = values((2, 16, 5, 4)), values(shape, seed=2), values((32,), seed=3)
    results = []
    for compiled in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, w, bias)]
        torch.manual_seed(4)
        run = torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function
        y = run(*leaves, padding=1, recipe=recipe)
        y.backward(values(tuple(y.shape), seed=5))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
        torch._dynamo.reset()
    for name, eager, traced in zip(("y", "dx", "dw", "db"), *results, strict=True):
        assert same_bits(eager, traced) and eager.stride() == traced.stride(), name
    assert recipe == recipe_of_key(recipe.key)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_needed_is_saved_and_computed(needs):
    x, w, bias, sizes, _ = layer_arguments(need=False)
    leaves = [t.detach().requires_grad_(need) for t, need in zip((x, w, bias), needs, strict=True)]
    spec = layer_spec()._replace(need_dx=needs[0], need_dw=needs[1])
    y, *saved = custom_op.layer(*leaves, sizes, spec.to_text())
    assert [bool(part.numel()) for part in saved] == [needs[1]] * 3 + [needs[0]] * 3
    y.sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == list(needs)


def test_saved_bytes_are_packed_codes():
    x, w, *_ = arguments = layer_arguments()
    _, *saved = custom_op.layer(*arguments)
    folded = math.prod((CONV.folds[0].images, CONV.folds[0].rows, 4, 16))
    assert sum(part.numel() * part.element_size() for part in saved[:3]) == folded * 9 // 16 + 4
    assert sum(part.numel() * part.element_size() for part in saved[3:]) == w.numel() // 2 + w.numel() // 256 + 4


def memory_of(results: Any) -> set[int]:
    parts = [results] if isinstance(results, Tensor) else results or ()
    return {part.untyped_storage().data_ptr() for part in parts if part.numel()}


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - KERNELS_ONLY))
def test_results_are_memory_of_one_call(name):
    # torch.compile's inductor writes into an operator's results as soon as the graph has read them.
    arguments, op = EXAMPLES[name](), getattr(ops, name)
    first, second = op(*arguments), op(*arguments)
    assert memory_of(first).isdisjoint(memory_of(second))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.key or "default")
def test_frozen_codes_are_not_given_away(recipe):
    x, w, *rest = layer_arguments(recipe)
    holder = torch.nn.ParameterList([w.detach()])
    with nv.frozen_weights(holder):
        first, second = (custom_op.layer(x, holder[0], *rest) for _ in range(2))
        (codes, _), = weight_codes.frozen[id(holder[0])].sets.values()
        assert memory_of(first).isdisjoint(memory_of(second) | memory_of(codes.flat()))
    assert all(map(torch.equal, first, custom_op.layer(x, w, *rest)))
