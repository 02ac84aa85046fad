"""The integer backend against the reference, in bits: operands, products, any number of threads, non-finite values.

tests/integer_products.py draws the cases and compares; test_integer_memory.py runs it in processes of its own.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from te_nvfp4_cv import functional as NF
from te_nvfp4_cv.backend import native
from te_nvfp4_cv.ops.block_scales import FORMATS, scale_table
from te_nvfp4_cv.ops.conv import integer
from te_nvfp4_cv.ops.records import NONE, PACKED, RECORDS, Face, OperandSpec
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.recipe.files import load_recipe
from tests.helpers import make_geometry, same_bits, seeds, values
from tests.integer_products import Case, Layer, draw
from tests.layers import LAYERS, NO_SR, step, tensors

pytestmark = [
    pytest.mark.skipif(native.load() is None, reason="no compiled kernels"),
    pytest.mark.usefixtures("one_thread"),
]

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]  # a geometry that is too large is drawn again


def chosen(data: Any) -> Any:
    """Return a function that picks one of several values, for hypothesis to decide and to simplify."""
    return lambda options: data.draw(st.sampled_from(options))


@settings(max_examples=30, deadline=None, suppress_health_check=SLOW)
@given(st.data(), st.sampled_from([1, 1, 1, 2, 3]))
def test_operands_and_products_have_the_references_bits(data, threads):
    Layer(draw(chosen(data))).compare(threads)


@pytest.mark.stress
@settings(max_examples=3000, deadline=None, suppress_health_check=SLOW)
@given(st.data(), st.sampled_from([1, 1, 1, 2, 3]))
def test_operands_and_products_of_many_layers_have_the_references_bits(data, threads):
    Layer(draw(chosen(data))).compare(threads)


@pytest.mark.parametrize("seed", seeds(range(2), range(60)))
def test_the_number_of_threads_changes_no_bit(seed, poison):
    layer = Layer(draw(random.Random(seed).choice))
    for threads in (1, 2, 3, 5):
        layer.compare(threads)


def test_several_python_threads_multiply_at_once():
    # ctypes lets other threads run during a call; records above a size lie in buffers that threads share.
    layers = [Layer(Case(make_geometry(16, (64, 16), (30, 31), 1), torch.float32, seed=seed)) for seed in range(2)]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda layer: all(same_bits(a, b) for _, a, b in layer.pairs()), layers * 4))


# Each has more work than one tile, chunk, slab or band of the kernels holds, which the random layers rarely reach.
LARGE = {
    "many chunks of pixels": make_geometry(2, (16, 20), (21, 23), 3, 1, 1),
    "slabs that wrap around": make_geometry(16, (16, 16), (40, 7), 5, 2, 2),
    "slabs of a transposed layer": make_geometry(16, (16, 33), (30, 5), 3, 2, 1, transposed=True),
    "a band of several rows": make_geometry(16, (17, 16), (70, 3), 3, 1, 1),
    "rows of a 1x1 layer": make_geometry(32, (37, 48), (9, 11), 1),
    "a 1x1 layer whose output is padded": make_geometry(
        16, (37, 48), (5, 6), 1, dilation=2, output_padding=1, transposed=True
    ),
    "a 1x1 signal whose output is padded": make_geometry(
        3, (32, 48), (9,), 1, dilation=3, output_padding=2, transposed=True
    ),
    "many channels": make_geometry(3, (210, 150), (4, 5), 3, 1, 1),
    "a stride beyond the kernel": make_geometry(2, (32, 16), (13, 14), 2, 3),
    "taps that read only padding": make_geometry(5, (16, 16), (2, 3), 5, 1, 4, 2),
    "a 1x1 layer with output padding": make_geometry(2, (16, 20), (6, 5), 1, 1, 0, 2, 1, transposed=True),
    "a long signal": make_geometry(1, (32, 48), (700,), 3, 2, 1),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("two_d", [True, False])
def test_layers_beyond_the_kernels_tiles(name, two_d, poison):
    Layer(Case(LARGE[name], torch.float32, two_d)).compare(1 if two_d else 2)


def test_panels_made_before_give_the_same_product():
    for transposed in (False, True):
        layer = Layer(Case(make_geometry(3, (40, 37), (6, 5), 3, 1, 1, transposed=transposed), torch.float32))
        g, face = layer.g, layer.weight("integer").row
        made = integer.panels(face, g, not g.transposed)
        assert made.dtype == torch.uint8 and made.shape[-1] == integer.PANEL
        made = Face(made, torch.empty(0, dtype=torch.uint8))
        y = integer.fprop(layer.truth_x.row, made, layer.alpha, layer.bias, g, torch.float32)
        assert same_bits(y, layer.products["fprop"])


def test_operators_pass_opcheck():
    ops, fp32 = torch.ops.te_nvfp4_cv, torch.float32
    for transposed in (False, True):
        layer = Layer(Case(make_geometry(3, (40, 32), (5, 4), 3, 2, 1, groups=2, transposed=transposed), fp32))
        w = layer.weight("integer").row
        for name, tensor, fold in (("x", layer.x, layer.folds[0]), ("dy", layer.dy, layer.folds[1])):
            for forms in ((RECORDS, RECORDS), (NONE, RECORDS)) if transposed else ((RECORDS, PACKED), (RECORDS, NONE)):
                spec = OperandSpec(2, fold, *forms, True, name == "dy").to_ints()
                torch.library.opcheck(
                    ops.quantize_operand.default, (tensor, spec, fp32, layer.seed, layer.amax, "integer")
                )
        x, dy = (layer.operand(name, RECORDS, col, "integer") for name, col in (("x", PACKED), ("dy", RECORDS)))
        shape = layer.g.to_ints()
        torch.library.opcheck(
            ops.conv_fprop.default, ([*x.row, *w], layer.alpha, layer.bias, shape, torch.bfloat16, "integer")
        )
        torch.library.opcheck(ops.conv_dgrad.default, ([*dy.row, *w], layer.alpha, shape, fp32, "integer"))
        torch.library.opcheck(ops.conv_wgrad.default, ([*dy.col, *x.col], layer.alpha, shape, fp32, "integer"))


# ---- whole layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_layers_have_the_references_bits(layer, dtype):
    operands = tensors(layer, dtype)
    # db is torch's sum on both sides, and stochastic rounding draws the same numbers: one seed, one law.
    got, truth = (step(layer, *operands, backend=backend) for backend in ("integer", "reference"))
    for name, a, b in zip(("y", "dx", "dw", "db"), got, truth, strict=True):
        assert same_bits(a, b) and a.stride() == b.stride(), name


RECIPES = ["no_2d", "no_rht", "no_sr", "four_over_six", "delayed", "current_pow2", "pad_thin", "forward_only"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_whole_layers_of_every_recipe_have_the_references_bits(recipe):
    loaded = load_recipe(recipe)
    for layer in ("conv2d groups", "conv_transpose2d", "linear"):
        got, truth = (
            step(layer, *tensors(layer), recipe=loaded, backend=backend) for backend in ("integer", "reference")
        )
        # GEMMs in high precision are torch's on both sides, of the same operands.
        for name, a, b in zip(("y", "dx", "dw", "db"), got, truth, strict=True):
            assert same_bits(a, b), (layer, name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("operand", ["x", "w", "dy"])
@pytest.mark.parametrize("layer", ["conv2d", "conv2d 1x1", "conv2d groups", "conv_transpose2d groups", "linear"])
def test_non_finite_values_reach_every_output_that_uses_them(layer, operand, bad):
    # The strided 1x1 layer has pixels that no output reads, and they must be reached, too.
    x, w, bias = tensors(layer)
    results = {}
    for backend in ("integer", "reference"):
        leaves = {"x": x.detach().clone(), "w": w.detach().clone()}
        if operand != "dy":
            leaves[operand].view(-1)[5] = bad
        x1, w1 = (leaf.requires_grad_() for leaf in leaves.values())
        op, arguments = LAYERS[layer][0], LAYERS[layer][3]
        y = getattr(NF, op)(x1, w1, bias, **arguments, recipe=NO_SR, backend=backend)
        dy = values(y.shape, seed=7)
        if operand == "dy":
            dy.view(-1)[5] = bad
        results[backend] = dict(zip(("y", "dx", "dw"), (y, *torch.autograd.grad(y, (x1, w1), dy)), strict=True))
    uses = {"x": ("y", "dw"), "w": ("y", "dx"), "dy": ("dx", "dw")}[operand]
    for name, got in results["integer"].items():
        assert bool(got.isfinite().any()) == (name not in uses), name
        truth = results["reference"][name]
        assert torch.equal(got.isfinite(), truth.isfinite()) and torch.equal(got.isnan(), truth.isnan()), name


def test_the_check_of_first_use_finds_a_wrong_product(monkeypatch):
    assert integer.matches_reference()
    original = integer.wgrad

    def off_by_a_bit(*args):  # type: ignore[no-untyped-def]
        dw = original(*args)
        dw.view(torch.int32).view(-1)[-1] += 1
        return dw

    monkeypatch.setattr(integer, "wgrad", off_by_a_bit)
    assert not integer.matches_reference()


@pytest.mark.parametrize("fault", ["no tiles", "axis 0 of rows"])
@pytest.mark.parametrize("name", ["nvfp4", *FORMATS])
def test_the_check_of_first_use_finds_a_weight_whose_tiles_are_read_wrongly(name, fault, monkeypatch):
    """The face that the default recipe has, for each block format: one byte of scale for 16x16 codes, or 32x32."""
    original, checked = integer._panels_call, []

    def wrong(w, scale, g, to_b):  # type: ignore[no-untyped-def]
        made, q = original(w, scale, g, to_b)
        checked.append(q.tiles)
        if fault == "no tiles":
            q.tiles = False
        elif q.tiles and not q.from_axis1:
            q.axis0 -= 1
        return made, q

    monkeypatch.setattr(integer, "FORMATS", {name: FORMATS[name]} if name in FORMATS else {})
    assert integer.matches_reference()
    monkeypatch.setattr(integer, "_panels_call", wrong)
    assert not integer.matches_reference()
    assert True in checked


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kernel", ["format_expand_records", "format_expand_weight", "format_weight_product"])
def test_the_check_of_first_use_finds_a_wrong_scale_of_another_format(name, kernel, monkeypatch):
    """A table whose largest scale is read wrongly, by one kernel of one format."""
    products, original = integer.PRODUCTS[name + " integer"], integer.FormatProducts._kernel

    def wrong(self, asked):  # type: ignore[no-untyped-def]
        if self is not products or asked != kernel:
            return original(self, asked)
        table = type(scale_table(name, half=True)).from_buffer_copy(scale_table(name, half=True))
        table[115] *= 2
        return lambda *arguments: getattr(native.load(), asked)(*arguments, table)

    monkeypatch.setattr(integer.FormatProducts, "_kernel", wrong)
    assert not integer.matches_reference()


def test_row_scaled_activations_are_refused_by_name():
    recipe = NVFP4BlockScaling(row_scaled_activation=True, disable_rht=True)
    with pytest.raises(ValueError, match="row-scaled"):
        step("linear", *tensors("linear"), recipe=recipe, backend="integer")
    step("conv2d", *tensors("conv2d"), recipe=recipe, backend="integer")  # a 3x3 layer has no row scales
