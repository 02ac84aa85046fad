"""What te_plugin refuses, each with got / needs / fix; and that importing it does not import transformer_engine."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch

import te_nvfp4_cv as nv
from te_nvfp4_cv import te_plugin
from te_nvfp4_cv.integrations import transformer_engine, transformer_engine_faces
from tests.integrations.te.process import with_te


def refused(error: type[Exception], *words: str) -> Any:
    """pytest.raises for an error of this package that has these words in it."""
    return pytest.raises(error, match="(?s)" + ".*".join(("", *words, "")))


def test_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer_engine_faces.te_classes.cache_clear()
    transformer_engine._recipe.cache_clear()
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", None)
    with refused(RuntimeError, "cannot be imported", "got: ", "needs: +transformer-engine 2.20", "fix: +pip install"):
        te_plugin.recipe()
    with refused(RuntimeError, "cannot be imported"):  # a failure is not remembered as a success
        te_plugin.recipe()


def test_import_is_lazy() -> None:
    code = "import sys, te_nvfp4_cv.te_plugin; sys.exit(any(m.startswith('transformer_engine') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tensor_scale": "delayed"}, ("delayed", "got: +tensor_scale='delayed'", "fix: +dataclasses.replace")),
        ({"tensor_scale": "current_pow2"}, ("powers of two", "got: +tensor_scale='current_pow2'", "fix: +dataclasses")),
        ({"nvfp4_4over6": "all"}, ("4over6", "got: ", "disable_rht=False", "fix: ")),
        ({"row_scaled_activation": True}, ("row-scaled", "got: ", "fix: ")),
        (
            {"precision": {"a": nv.NVFP4BlockScaling(backward_override="dequantized")}},
            ("one backward_override", "got: +None, and 'dequantized'", "fix: +use high_precision_gemms"),
        ),
        ({"precision": {"a": nv.NVFP4BlockScaling(tensor_scale="delayed")}}, ("delayed", "got: ", "fix: ")),
    ],
)
def test_recipes(fields: dict, words: tuple[str, ...]) -> None:
    """Refused before transformer_engine is needed."""
    with refused(ValueError, *words):
        te_plugin.recipe(nv.NVFP4BlockScaling(**fields))


@with_te
def test_the_fix_for_delayed_scales_works() -> None:
    delayed = nv.NVFP4BlockScaling(tensor_scale="delayed")
    fixed = te_plugin.recipe(dataclasses.replace(delayed, tensor_scale="current"))
    assert fixed is te_plugin.recipe()


@pytest.mark.parametrize("wrong", [True, {"disable_rht": True}, nv.NVFP4BlockScaling, 3])
def test_no_recipe(wrong: object) -> None:
    with refused(TypeError, "not an NVFP4 recipe", "got: ", "fix: "):
        te_plugin.recipe(wrong)


@with_te
def test_another_recipe_of_transformer_engine() -> None:
    from transformer_engine.common.recipe import MXFP8BlockScaling

    with refused(TypeError, "MXFP8BlockScaling", "fix: "):
        te_plugin.recipe(MXFP8BlockScaling())
    with refused(TypeError, "CustomRecipe", "fix: "):
        te_plugin.recipe(te_plugin.recipe())


@with_te
def test_unknown_backend() -> None:
    with refused(ValueError, "unknown backend", "got: +'cuda'"):
        te_plugin.recipe(backend="cuda")


@with_te
def test_another_block_format() -> None:
    """In the layer's forward, as the recipe is asked for a quantizer there."""
    import transformer_engine.pytorch as te

    recipe = te_plugin.recipe(nv.NVFP4BlockScaling(block_format="mxfp4"))
    with te.autocast(recipe=recipe), refused(ValueError, "te_plugin: no form", "block_format='mxfp4'", "fix: "):
        te.Linear(64, 64, device="cpu")(torch.zeros(16, 64))


@with_te
def test_backend_that_cannot_run() -> None:
    """An explicit backend raises where it cannot run, in the layer's forward."""
    import transformer_engine.pytorch as te

    layer = te.Linear(64, 64, device="cpu")
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="0"),
        te.autocast(recipe=te_plugin.recipe(backend="triton")),
        refused(RuntimeError, "'triton' cannot run here"),
    ):
        layer(torch.randn(32, 64))


@with_te
def test_grouped_linear() -> None:
    import transformer_engine.pytorch as te

    layer = te.GroupedLinear(2, 64, 64, device="cpu")
    with (
        te.autocast(recipe=te_plugin.recipe()),
        refused(ValueError, "te.GroupedLinear", "got: ", "grouped_linear", "fix: +call it inside te.autocast"),
    ):
        layer(torch.randn(32, 64), [16, 16])


@with_te
def test_quantized_parameters() -> None:
    import transformer_engine.pytorch as te

    with (
        te.quantized_model_init(recipe=te_plugin.recipe()),
        refused(ValueError, "cannot be stored in NVFP4", "quantized_model_init", "fix: +make the model outside"),
    ):
        te.Linear(64, 64, device="cpu")


@with_te
def test_module_without_a_name() -> None:
    from transformer_engine.pytorch.quantization import QuantizerRole

    factory = te_plugin.recipe(nv.NVFP4BlockScaling(precision={"head": None})).qfactory
    with refused(ValueError, "without a name", "got: +patterns 'head'", "fix: +te.Linear"):
        factory(QuantizerRole("linear", "input"))


@with_te
def test_other_roles_stay_in_high_precision() -> None:
    """Boundaries, attention and roles that nobody described."""
    from transformer_engine.pytorch.quantization import QuantizerRole
    from transformer_engine.pytorch.tensor.identity_tensor import IdentityQuantizer

    factory = te_plugin.recipe().qfactory
    roles = (None, QuantizerRole(), QuantizerRole("dpa", "input"), QuantizerRole("linear", "output"))
    assert all(type(factory(role)) is IdentityQuantizer for role in roles)
    assert type(factory(QuantizerRole("linear", "input"))) is not IdentityQuantizer


@with_te
def test_operands_of_two_makers() -> None:
    """One operand from here, the other from TransformerEngine's reference."""
    from transformer_engine.pytorch.custom_recipes.gemm import custom_gemm
    from transformer_engine.pytorch.quantization import QuantizerRole

    from tests.integrations.te import reference

    factory = te_plugin.recipe().qfactory
    x = factory(QuantizerRole("linear", "input"))(torch.randn(32, 64, dtype=torch.bfloat16)).rowwise_sub_storage
    w = reference.quantizer("weight")(torch.randn(64, 64, dtype=torch.bfloat16))
    with refused(TypeError, "both operands", "got: +FaceStorage and NVFP4TensorRef", "fix: "):
        custom_gemm(w, x, torch.empty(0), torch.bfloat16)


@with_te
def test_fused_gelu() -> None:
    """TransformerEngine's dispatcher would drop the GELU without a word."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm
    from transformer_engine.pytorch.quantization import QuantizerRole

    factory = te_plugin.recipe().qfactory
    t = torch.randn(64, 64, dtype=torch.bfloat16)
    w, x = (factory(QuantizerRole("linear", role))(t) for role in ("weight", "input"))
    assert general_gemm(w, x, torch.bfloat16)[0].shape == (64, 64)
    with refused(ValueError, "GELU", "got: +a GEMM fused with GELU", "fix: .*NVTE_GEMM_GELU_FUSION"):
        general_gemm(w, x, torch.bfloat16, gelu=True)
