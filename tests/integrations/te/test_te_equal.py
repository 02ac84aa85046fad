"""te_plugin against TransformerEngine's own reference in Python, in its own te.Linear: equal bits, SR off.

Equal are the codes, scales and amaxes of every operand, and y, dx and dw of whole steps, where alpha is rounded as
TransformerEngine's kernels round it (reference.KernelAlpha). Its reference rounds alpha otherwise: against that one, as
it is, a result has equal bits where the two alphas are equal and is one unit in the last place away elsewhere.
Not equal: dw of fp32 tensors with RHT, whose sums of 16 this package orders itself (NUMERICS.md).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.integrations.te.process import with_te
from tests.integrations.te.recipes import SR_OFF, recipe

DTYPES = [torch.bfloat16, torch.float32]
SHAPES = [((32, 64), 96), ((4, 16, 128), 32), ((96, 160), 64)]
ON = {"rht": True, "two_d": True}


def ours(rht: bool = True, two_d: bool = True, **fields: Any) -> Any:
    """The plug-in's recipe, SR off."""
    return recipe(disable_rht=not rht, disable_2d_quantization=not two_d, **SR_OFF, **fields)


OPERANDS = [
    ("input", torch.bfloat16, {}, {}),
    ("input", torch.float32, {"rht": False}, {}),
    ("input", torch.bfloat16, {"rht": False, "row_scaled_activation": True}, {"row_scaled_nvfp4": True}),
    ("input", torch.bfloat16, {"rht": False, "nvfp4_4over6": "all"}, {"nvfp4_use_4over6": True, "nvfp4_e4m3_max": 256}),
    ("weight", torch.bfloat16, {}, {}),
    ("weight", torch.float32, {}, {}),
    ("weight", torch.float32, {"two_d": False}, {}),
    (
        "weight",
        torch.bfloat16,
        {"nvfp4_4over6": "weights", "nvfp4_4over6_err_mode": "MSE", "nvfp4_4over6_e4m3_use_256": "none"},
        {"nvfp4_use_4over6": True, "nvfp4_4over6_err_mode": "MSE"},
    ),
    ("grad_output", torch.bfloat16, {}, {}),
    ("grad_output", torch.float32, {"rht": False}, {}),
]


@pytest.mark.parametrize("shape", [(32, 64), (48, 80), (2, 16, 112)])
@pytest.mark.parametrize(("role", "dtype", "fields", "options"), OPERANDS)
@with_te
def test_operand(role: str, dtype: torch.dtype, fields: dict, options: dict, shape: tuple[int, ...]) -> None:
    """Codes, block scales and amax of both faces are the reference's, byte for byte."""
    from transformer_engine.pytorch.quantization import QuantizerRole

    from tests.integrations.te import reference

    x = torch.randn(shape).to(dtype)
    x[..., :16] *= 2.0**-14  # blocks whose scales are small
    quantizer = ours(**fields).qfactory(QuantizerRole("linear", role))
    got = quantizer(x)
    wanted = reference.quantizer(role, **ON | {k: v for k, v in fields.items() if k in ON}, **options)(x)
    row, column = got.rowwise_sub_storage, got.columnwise_sub_storage
    pairs = {
        "data": (row.data.flatten(0, -2), wanted.data),
        "scale": (row.scale, wanted.scale),
        "amax": (row.tensor.amax_rowwise, wanted.global_amax_row),
        "columnwise data": (column.data_t, wanted.data_t),
        "columnwise scale": (column.scale_t, wanted.scale_t),
        "columnwise amax": (column.tensor.amax_columnwise, wanted.global_amax_col),
    }
    for name, (a, b) in pairs.items():
        assert a.shape == b.shape and a.dtype == b.dtype, f"{name}: {a.dtype} {a.shape}, reference {b.dtype} {b.shape}"
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"{name} differs"
    assert tuple(got.size()) == shape

    quantizer.set_usage(columnwise=False)
    alone = quantizer(x)
    assert alone.columnwise_sub_storage is None and torch.equal(alone.rowwise_sub_storage.data, row.data)
    for storage, face in ((row, "rowwise"), (column, "columnwise"), (alone.rowwise_sub_storage, "rowwise")):
        usages = storage.tensor.get_usages()
        assert [name for name, there in usages.items() if there] == [face], "a storage keeps more than its face"


# rht, two_d: another path of quantization each; shape, n: leading axes and other numbers of blocks, whatever the path
@pytest.mark.parametrize(
    ("shape", "n", "rht", "two_d"),
    [(*SHAPES[0], rht, two_d) for rht in (True, False) for two_d in (True, False)]
    + [(*case, True, True) for case in SHAPES[1:]],
)
@pytest.mark.parametrize("dtype", DTYPES)
@with_te
def test_three_steps(dtype: torch.dtype, shape: tuple[int, ...], n: int, rht: bool, two_d: bool) -> None:
    """y, dx, dw of each of three optimizer steps, and the weights after them."""
    from tests.integrations.te import composed, reference

    layers = [composed.linear(composed.operands(shape, n, dtype)[1]) for _ in range(2)]
    recipes = [ours(rht, two_d), reference.recipe(rht, two_d)]
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9) for layer in layers]
    for number in range(3):
        x, _, dy, _ = composed.operands(shape, n, dtype, seed=number)
        got, wanted = (composed.step(*pair[:1], x, dy, pair[1]) for pair in zip(layers, recipes, strict=True))
        if dtype == torch.float32 and rht:  # the order of the RHT's sums
            assert (got.dw - wanted.dw).norm() <= 2e-3 * wanted.dw.norm()
            layers[0].weight.grad.copy_(wanted.dw)
            got = got._replace(dw=wanted.dw)
        composed.same(got, wanted, f"step {number}")
        assert wanted.dw.abs().max() > 0
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(layers[0].weight, layers[1].weight)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"nvfp4_4over6": "weights"}, {"weight": {"nvfp4_use_4over6": True, "nvfp4_e4m3_max": 256}}),
        ({"rht": False, "row_scaled_activation": True}, {"input": {"row_scaled_nvfp4": True}}),
    ],
)
@with_te
def test_other_recipes(fields: dict, options: dict) -> None:
    """4over6 and row scaling, one step."""
    from transformer_engine.common.recipe import CustomRecipe

    from tests.integrations.te import composed, reference

    def factory(role: Any) -> Any:
        tensor = getattr(role, "tensor_type", "")
        return reference.quantizer(
            tensor, fields.get("rht", True), cls=reference.KernelAlpha, **options.get(tensor, {})
        )

    x, w, dy, _ = composed.operands((64, 96), 128)
    got = composed.step(composed.linear(w), x, dy, ours(**fields))
    wanted = composed.step(composed.linear(w), x, dy, CustomRecipe(qfactory=factory))
    plain = composed.step(composed.linear(w), x, dy, ours(rht=fields.get("rht", True)))
    assert not torch.equal(wanted.y, plain.y), "the recipe changes nothing: the case shows nothing"
    composed.same(got, wanted)


@with_te
def test_the_factory_as_it_is() -> None:
    """nvfp4_ref_rht_2d_factory itself: equal bits where its alpha is the kernels', one last place elsewhere."""
    from unittest import mock

    from transformer_engine.common.recipe import CustomRecipe
    from transformer_engine.pytorch.custom_recipes import reference_nvfp4

    from tests.integrations.te import composed

    equal_alphas: list[bool] = []
    qgemm = reference_nvfp4.NVFP4QuantizerRef.qgemm

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        x, w, kind = kwargs["qresult_x"], kwargs["qresult_w"], kwargs["gemm_type"].value
        face = "global_amax_col" if kind == "wgrad" else "global_amax_row"
        amaxes = getattr(x, face) * getattr(w, face)
        c = 36.0 * 448.0 * 448.0
        equal_alphas.append(torch.equal(torch.div(amaxes, c), amaxes * (1.0 / c)))
        return qgemm(self, *args, **kwargs)

    counts = {True: 0, False: 0}
    for seed in range(12):
        x, w, dy, _ = composed.operands((64, 128), 96, seed=seed)
        got = composed.step(composed.linear(w), x, dy, ours())
        equal_alphas.clear()
        with mock.patch.object(reference_nvfp4.NVFP4QuantizerRef, "qgemm", watched):
            recipe = CustomRecipe(qfactory=reference_nvfp4.nvfp4_ref_rht_2d_factory)
            wanted = composed.step(composed.linear(w), x, dy, recipe)
        assert len(equal_alphas) == 3
        for equal, name in zip(equal_alphas, ("y", "dx", "dw"), strict=True):
            a, b = getattr(got, name), getattr(wanted, name)
            places = (a.view(torch.int16).int() - b.view(torch.int16).int()).abs()
            assert places.max() <= (0 if equal else 1), (
                f"seed {seed} {name}: alphas equal: {equal}, {places.max()} places"
            )
            counts[equal] += 1
    assert counts[True] >= 12 and counts[False] >= 3, f"too few of one kind to show anything: {counts}"


@pytest.mark.parametrize("backend", ["auto", "vendor"])
@with_te
def test_other_backends(backend: str) -> None:
    """Sums in another order: as close to the reference as fp32 rounding and one bf16 rounding allow."""
    from tests.integrations.te import composed

    x, w, dy, bias = composed.operands((64, 128), 96)
    got = composed.step(composed.linear(w, bias), x, dy, recipe(backend, **SR_OFF))
    wanted = composed.step(composed.linear(w, bias), x, dy, ours())
    for name, a, b in zip(composed.Step._fields, got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-5 * b.abs().max().item(), msg=name)


@pytest.mark.parametrize("backend", ["reference", "vendor"])
@with_te
def test_backend_is_handed_on(backend: str) -> None:
    """To the quantizers of the three operands and to the three GEMMs."""
    from unittest import mock

    from te_nvfp4_cv.integrations import transformer_engine_faces
    from te_nvfp4_cv.ops.quantize import matrix
    from tests.integrations.te import composed

    x, w, dy, _ = composed.operands((32, 64), 96)
    with (
        mock.patch.object(transformer_engine_faces, "gemm", wraps=transformer_engine_faces.gemm) as gemm,
        mock.patch.object(matrix, "quantize", wraps=matrix.quantize) as quantized,
    ):
        composed.step(composed.linear(w), x, dy, recipe(backend))
    assert [call.args[2] for call in gemm.call_args_list] == ["TN", "NN", "NT"]
    assert [call.args[-1] for call in gemm.call_args_list] == [backend] * 3
    assert [call.kwargs["backend"] for call in quantized.call_args_list] == [backend] * 3


@with_te
def test_recipe_of_transformer_engine() -> None:
    """Its recipe object, with its switches, is the same recipe; no recipe is the default one."""
    from transformer_engine.common.recipe import NVFP4BlockScaling

    import te_nvfp4_cv as nv
    from te_nvfp4_cv import te_plugin

    theirs = NVFP4BlockScaling(disable_rht=True, disable_stochastic_rounding=True, backward_override="dequantized")
    own = nv.NVFP4BlockScaling(disable_rht=True, disable_stochastic_rounding=True, backward_override="dequantized")
    assert te_plugin.recipe(theirs) is te_plugin.recipe(own)
    assert te_plugin.recipe(theirs).backward_override == "dequantized"
    assert te_plugin.recipe() is te_plugin.recipe(nv.NVFP4BlockScaling())
    assert te_plugin.recipe() is not te_plugin.recipe(own)
    assert te_plugin.recipe().custom() and te_plugin.recipe().backward_override is None
