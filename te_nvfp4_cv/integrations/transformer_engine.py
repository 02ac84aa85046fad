"""Run TransformerEngine's own layers in NVFP4, also on hardware without FP4 tensor cores.

    import transformer_engine.pytorch as te
    from te_nvfp4_cv import te_plugin

    with te.autocast(recipe=te_plugin.recipe()):    # or te_plugin.recipe(nv.load_recipe("unet")), or TE's own recipe
        y = model(x)                                # te.Linear, te.LayerNormLinear, te.LayerNormMLP

TransformerEngine's CustomRecipe asks a factory for one quantizer per role. The factory here returns this package's:

    role         rowwise face                     columnwise face
    input        fprop                            wgrad: RHT
    weight       fprop: 16x16                     dgrad: the same codes, transposed
    grad_output  dgrad: SR                        wgrad: RHT, SR
    others       high precision (TransformerEngine's IdentityQuantizer)

The quantizers are in transformer_engine_faces.py, which multiplies with nv.gemm.

Some things are decided by TransformerEngine: the product of the leading dimensions must be a multiple of 8 and the last
dimension one of 16 (what is then not a multiple of 16 is padded with zeros here); with fp32 activations it rounds the
bias to bf16. `thin_layers` has no meaning for these layers. A [precision] table is matched with the names that modules
were given, te.Linear(..., name="fc1"), because a factory learns no other.
Refused: tensor_scale="delayed" (a factory has no place in a checkpoint for the amax of earlier steps) and
"current_pow2" (scales that TransformerEngine does not have), weights that are stored in NVFP4 only
(te.quantized_model_init), and te.GroupedLinear (its GEMMs are compiled, without custom operands).
Executed on a CPU with the Python package of 2.20.2: te.Linear, LayerNormLinear, LayerNormMLP, and te.ops.Linear without
a bias (with one, te.ops calls bgrad_quantize). Not executed: a GPU, tensor and sequence parallelism, FSDP,
te.checkpoint, CUDA graphs, torch.compile. Attention stays in high precision.
transformer_engine is imported when `recipe` is called, not before.
"""

from __future__ import annotations

import fnmatch
import functools
from dataclasses import dataclass
from typing import Any

from te_nvfp4_cv import errors
from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.integrations.transformer_engine_faces import FACES, te_classes
from te_nvfp4_cv.layer.check import checked_recipe
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.recipe.fields import check_nvfp4
from te_nvfp4_cv.tensor.quantizer import NVFP4Quantizer

# The GEMM that reads each face of a role, rowwise first.
GEMMS = {"input": ("fprop", "wgrad"), "weight": ("fprop", "dgrad"), "grad_output": ("dgrad", "wgrad")}


def recipe(r: object = None, *, backend: str = "auto") -> Any:
    """Return a CustomRecipe of TransformerEngine that runs its layers with this package's quantizers and GEMM.

    Equal arguments give the same object, because TransformerEngine compares recipes by identity and makes new
    quantizers for a different one.

    Args:
        r: An NVFP4BlockScaling recipe, this package's or TransformerEngine's, or None for the default recipe.
        backend: "auto", "reference", "vendor", "triton" or "cudnn".
    Raises:
        ValueError: TransformerEngine's layers cannot follow the recipe: it has delayed scales, or several values of
            backward_override.
        TypeError: `r` is not an NVFP4 recipe.
        RuntimeError: transformer_engine with its PyTorch extension cannot be imported.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> import transformer_engine.pytorch as te  # doctest: +SKIP
        >>> with te.autocast(recipe=nv.te_plugin.recipe(nv.load_recipe("no_rht"))):  # doctest: +SKIP
        ...     y = te.Linear(64, 64)(torch.randn(32, 64))
    """
    ours = checked_recipe(r)
    for part in (ours, *(inner for _, inner in ours.precision if inner is not None)):
        _check(part, ours)
    return _recipe(ours, dispatch.check_backend(backend))


@functools.lru_cache(maxsize=64)
def _recipe(ours: NVFP4BlockScaling, backend: str) -> Any:
    factory = QuantizerFactory(ours, backend)
    return te_classes().CustomRecipe(qfactory=factory, backward_override=ours.backward_override)


def _check(part: NVFP4BlockScaling, whole: NVFP4BlockScaling) -> None:
    """Refuse what a CustomRecipe cannot express."""
    if part.tensor_scale != "current":
        delayed = part.tensor_scale == "delayed"
        why = "keeps nothing of earlier steps in a checkpoint" if delayed else "makes TransformerEngine's scales"
        raise errors.value_error(
            f"te_plugin.recipe: {'delayed scales' if delayed else 'powers of two'} do not go with TransformerEngine's "
            "layers.",
            got=f"tensor_scale={part.tensor_scale!r}",
            needs=f"tensor_scale='current': a quantizer factory {why}",
            fix="dataclasses.replace(recipe, tensor_scale='current')",
        )
    if part.backward_override != whole.backward_override:
        raise errors.value_error(
            "te_plugin.recipe: one backward_override for all layers.",
            got=f"{whole.backward_override!r}, and {part.backward_override!r} in the [precision] table",
            needs="the same value in the table: TransformerEngine's CustomRecipe has one",
            fix="use high_precision_gemms=('dgrad', 'wgrad') in the table, or te.autocast around those layers",
        )


@dataclass(frozen=True)
class QuantizerFactory:
    """A factory that TransformerEngine's CustomRecipe calls once per slot of a module. It can be pickled.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> factory = nv.te_plugin.QuantizerFactory(nv.load_recipe("no_rht"), backend="vendor")
        >>> factory.recipe.settings("input").rht
        False
    """

    recipe: NVFP4BlockScaling
    backend: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", checked_recipe(self.recipe))  # a frozen dataclass takes no assignment

    def __call__(self, role: Any) -> Any:
        """Return the quantizer of a QuantizerRole, an IdentityQuantizer for None and roles without an NVFP4 GEMM.

        Raises:
            ValueError: The module is a te.GroupedLinear, it was made inside te.quantized_model_init, or it has no name
                while the recipe has a [precision] table.
        """
        te = te_classes()
        tensor = getattr(role, "tensor_type", "")  # the role may be None
        if tensor not in GEMMS:
            return te.IdentityQuantizer()
        if role.module_type == "grouped_linear":
            raise errors.value_error(
                f"te_plugin: te.GroupedLinear {role.name!r} cannot run with custom quantizers.",
                got=f"a role of module_type 'grouped_linear', tensor_type {tensor!r}",
                needs="te.Linear, te.LayerNormLinear or te.LayerNormMLP: its grouped GEMMs are compiled",
                fix="call it inside te.autocast(enabled=False), or use one te.Linear per group",
            )
        if role.module_type != "linear":
            return te.IdentityQuantizer()
        if tensor == "weight" and te.FP8GlobalStateManager.with_fp8_parameters():
            raise errors.value_error(
                f"te_plugin: the weight of {role.name!r} cannot be stored in NVFP4 only.",
                got="a module made inside te.quantized_model_init",
                needs="weights in high precision: a custom quantizer's storage is no parameter",
                fix="make the model outside te.quantized_model_init",
            )
        chosen = self._recipe_of(role.name)
        return te.IdentityQuantizer() if chosen is None else self._operand(chosen, tensor)

    def _recipe_of(self, name: str) -> NVFP4BlockScaling | None:
        """Return the recipe for a module's name: the last match of the [precision] table, else the recipe itself."""
        if self.recipe.precision and not name:
            raise errors.value_error(
                "te_plugin: a [precision] table and a module without a name.",
                got=f"patterns {', '.join(repr(pattern) for pattern, _ in self.recipe.precision)}",
                needs="a name for each module: a factory learns no other",
                fix="te.Linear(..., name='fc1'), or a recipe with precision=()",
            )
        found: NVFP4BlockScaling | None = self.recipe
        for pattern, inner in self.recipe.precision:
            # A match covers the modules inside, too, as with set_precision.
            if not pattern or fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*"):
                found = inner  # the last match wins
        return found

    def _operand(self, chosen: NVFP4BlockScaling, tensor: str) -> Any:
        te = te_classes()
        needs, fix = "NVFP4, which TransformerEngine's GEMMs multiply", "leave block_format out"
        check_nvfp4("te_plugin", chosen.block_format, needs, fix)
        settings = chosen.settings(tensor)
        operand = NVFP4Quantizer(
            with_rht=settings.rht, with_2d_quantization=settings.two_d,
            stochastic_rounding=settings.stochastic_rounding, row_scaled_nvfp4=settings.row_scaled,
            nvfp4_use_4over6=settings.four_over_six is not None, nvfp4_e4m3_max=settings.e4m3_max,
            nvfp4_4over6_err_mode=settings.four_over_six or "MAE", backend=self.backend,
        )
        row, column = (
            # By face, not by operand: wgrad in high precision must not take fprop's codes away.
            te.IdentityQuantizer() if product in chosen.high_precision_gemms else te.FaceQuantizer(operand, face)
            for face, product in zip(FACES, GEMMS[tensor], strict=True)
        )
        return te.OperandQuantizer(rowwise_quantizer=row, columnwise_quantizer=column)
