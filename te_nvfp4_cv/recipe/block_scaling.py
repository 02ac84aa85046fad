"""Define the recipe: how the operands of a layer's three GEMMs are quantized.

It is frozen data with TransformerEngine's fields and defaults.

    fprop  y  = x w     x: 1x16 blocks, nearest rounding            w: 16x16 blocks (disable_2d_quantization: 1x16)
    dgrad  dx = dy w    dy: 1x16, stochastic rounding               w: the same codes, transposed
    wgrad  dw = dy x    both 1x16 along the contracted rows, after a random Hadamard transform; dy stochastic

A recipe says what is computed, never where (that is the backend). Bad values are refused when it is built, and
combinations that no quantizer can carry out when it is used (`validate_for_use`), as TransformerEngine does.
Booleans are True or False only; TransformerEngine also reads 1 and "yes", this class does not.
The NVTE_* environment variables give the defaults. They are read once, when this file is imported.
TransformerEngine's own recipe objects are recognised by class name, so nothing is imported from there.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from te_nvfp4_cv.errors import type_error, value_error, warn_once
from te_nvfp4_cv.recipe import combinations
from te_nvfp4_cv.recipe.fields import (
    ALLOWED,
    GEMMS,
    HIGH,
    PLAIN,
    ROLES,
    bad_value,
    check_choice,
    check_gemms,
    environment_flag,
    knows_removed_fields,
    one_of,
    toml_text,
    without_removed,
)
from te_nvfp4_cv.recipe.roles import MARGINS, QPARAMS, QParams, RoleSettings


@knows_removed_fields
@dataclass(frozen=True, repr=False)
class NVFP4BlockScaling:
    """The NVFP4 training recipe.

    Args:
        disable_rht: Leave out the random Hadamard transform of the two wgrad operands.
        disable_stochastic_rounding: Round dy to nearest even instead of stochastically.
        disable_2d_quantization: Quantize weights in 1x16 blocks instead of 16x16 ones. Fprop and dgrad then see
            different weights.
        row_scaled_activation: Use one tensor scale per row of x instead of one for x. Needs disable_rht. For linear
            layers and 1x1 convolutions only: elsewhere the taps of one output would have different scales.
        nvfp4_4over6: The operands whose blocks choose, by the smaller error, between a scale that maps their largest
            value to 6 and one that maps it to 4: "none", "weights", "activations" or "all". Activations need
            disable_rht; gradients never choose.
        nvfp4_4over6_e4m3_use_256: Which of those operands use 256 instead of 448 as the largest block scale.
        nvfp4_4over6_err_mode: The error that is compared, "MAE" or "MSE".
        fp4_format: "E2M1".
        fp8_format: "E4M3", the format of the block scales.
        fp8_dpa: Accepted because TransformerEngine has it; attention is never quantized here.
        fp8_mha: Like fp8_dpa.
        backward_override: If "high_precision", dgrad and wgrad run on the original operands. If "dequantized", they run
            in high precision on the dequantized fprop operands, which are saved packed.
        tensor_scale: If "current", a tensor's scale comes from its own amax, as in TransformerEngine. If "delayed", it
            is a power of two from the amax of the training step before, with a margin (input 8, grad_output 4), and a
            weight's from its own amax; then no pass over a tensor comes before its quantization. If "current_pow2",
            it is the power of two from the tensor's own amax, which backends multiply in without a pass over results.
            The last two not with row_scaled_activation.
        thin_layers: A layer with fewer than 16 channels on one side runs in "high_precision", or is padded with zero
            channels: "pad".
        kernels: The kernels that may run in NVFP4: "all" of eligible shape, computed ones too, as in torch.autocast,
            but no constants (buffers); or "parameters" only and views of them.
        high_precision_gemms: Any of "fprop", "dgrad" and "wgrad", which then do not run in NVFP4.
        precision: Pairs of a pattern of module names and a recipe or its name, or None or "high" for high precision; or
            a dictionary of them. The last match wins.
        name: What reports call the recipe. It takes no part in comparisons.
        activation_shift: If "mean", the mean of each input channel is subtracted before x is quantized, and its product
            with the weight is added in fp32, exactly, borders included. For layers whose inputs have means that are
            large beside their deviations; each batch has means of its own, in evaluation too.
        block_format: If "nvfp4", blocks of 16 have E4M3 scales under a tensor scale. Three others are there to compare
            with: "mxfp4" (32, powers of two), "nvfp4_ue5m3" (16, UE5M3) and "fp4_e4m3_only" (16, E4M3),
            none with a tensor scale: not with another tensor_scale than "current", row_scaled_activation or 4over6.
        grouped_scale: Of a grouped linear layer (mixture of experts): if "operand", x, w and dy have one tensor scale
            each; if "expert", each expert's part of them has its own. The last only with scales of one call.
    Raises:
        ValueError: A value is outside its list, fields contradict each other, or a version removed the field.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> recipe = nv.NVFP4BlockScaling(high_precision_gemms=("wgrad",), precision=(("head", None),))
        >>> recipe.nvfp4_gemms
        ('fprop', 'dgrad')
        >>> recipe
        NVFP4BlockScaling(high_precision_gemms=('wgrad',), precision=(('head', None),))
    """

    disable_rht: bool = environment_flag("disable_rht")
    disable_stochastic_rounding: bool = environment_flag("disable_stochastic_rounding")
    disable_2d_quantization: bool = environment_flag("disable_2d_quantization")
    row_scaled_activation: bool = environment_flag("row_scaled_activation")
    nvfp4_4over6: str = os.getenv("NVTE_NVFP4_4OVER6", "none")
    nvfp4_4over6_e4m3_use_256: str = os.getenv("NVTE_NVFP4_4OVER6_E4M3_USE_256", "all")
    nvfp4_4over6_err_mode: str = os.getenv("NVTE_NVFP4_4OVER6_ERR_MODE", "MAE").upper()
    fp4_format: str = "E2M1"
    fp8_format: str = "E4M3"
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = os.getenv("NVTE_BACKWARD_OVERRIDE")
    tensor_scale: str = "current"
    thin_layers: str = "high_precision"
    kernels: str = os.getenv("TE_NVFP4_CV_KERNELS", "all")
    high_precision_gemms: tuple[str, ...] = ()
    precision: tuple[tuple[str, NVFP4BlockScaling | None], ...] = ()
    name: str = dataclasses.field(default="", compare=False)
    activation_shift: str = os.getenv("TE_NVFP4_CV_ACTIVATION_SHIFT", "none")
    block_format: str = "nvfp4"
    grouped_scale: str = os.getenv("TE_NVFP4_CV_GROUPED_SCALE", "operand")

    def __post_init__(self) -> None:
        for field in ("fp4_format", "fp8_format"):  # TransformerEngine's Format enum is taken by its member's name
            object.__setattr__(self, field, getattr(getattr(self, field), "name", getattr(self, field)))
        for field in ALLOWED:
            check_choice(field, getattr(self, field))
        if not isinstance(self.name, str):
            raise bad_value("recipe", "name", self.name, "a string")
        object.__setattr__(self, "high_precision_gemms", check_gemms(self.high_precision_gemms))
        object.__setattr__(self, "precision", _check_precision(self.precision))
        # Resolved once: a layer asks about ten times a step.
        object.__setattr__(self, "_roles", {role: self._resolve(role) for role in ROLES})
        # `precision` is resolved per layer before a call, and `name` decides no numbers.
        numbers = {field: getattr(self, field) for field in PLAIN if field != "precision"}
        changed = {field: value for field, value in numbers.items() if value != PLAIN[field]}
        # Custom operators take texts and numbers, not objects: the key carries the recipe across their boundary.
        object.__setattr__(self, "_key", ";".join(f"{field}={value!r}" for field, value in changed.items()))
        if self.activation_shift != "none":  # made once: each call of a layer asks for it
            object.__setattr__(self, "_unshifted", dataclasses.replace(self, activation_shift="none"))
        if self.backward_override == "dequantized" and self.high_precision_gemms:
            raise value_error(
                "recipe fields 'backward_override' and 'high_precision_gemms' contradict each other.",
                got=f"backward_override='dequantized', high_precision_gemms={self.high_precision_gemms!r}",
                needs="high_precision_gemms=() with 'dequantized', whose backward takes fprop's NVFP4 operands",
                fix="choose one of the two",
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles hold every field that their version had. A frozen dataclass takes no setattr, so the dictionary is
        # filled, as pickle would.
        missing = {field: PLAIN[field] for field in ("kernels", "activation_shift", "block_format", "grouped_scale")}
        self.__dict__.update(missing | without_removed(state))

    @property
    def fp4_quant_fwd_inp(self) -> QParams:
        """The quantization of the role input: x in fprop and wgrad."""
        return QParams(random_hadamard_transform=not self.disable_rht)

    @property
    def fp4_quant_fwd_weight(self) -> QParams:
        """The quantization of the role weight: w in fprop and dgrad."""
        return QParams(fp4_2d_quantization=not self.disable_2d_quantization)

    @property
    def fp4_quant_bwd_grad(self) -> QParams:
        """The quantization of the role grad_output: dy in dgrad and wgrad."""
        return QParams(
            random_hadamard_transform=not self.disable_rht,
            stochastic_rounding=not self.disable_stochastic_rounding,
        )

    @property
    def nvfp4_gemms(self) -> tuple[str, ...]:
        """The GEMMs that run in NVFP4: those that neither high_precision_gemms nor backward_override takes out."""
        out = set(self.high_precision_gemms) | ({"dgrad", "wgrad"} if self.backward_override is not None else set())
        return tuple(gemm for gemm in GEMMS if gemm not in out)

    @property
    def unshifted(self) -> NVFP4BlockScaling:
        """This recipe without activation_shift."""
        found: NVFP4BlockScaling = getattr(self, "_unshifted", self)
        return found

    @property
    def key(self) -> str:
        """The fields that decide numbers, as a text that crosses an operator's boundary; recipe_of_key reads it."""
        found: str = self._key  # type: ignore[attr-defined]
        return found

    def settings(self, role: str) -> RoleSettings:
        """Return the quantizer settings of one role: "input", "weight" or "grad_output".

        Raises:
            ValueError: There is no such role.
        """
        if role not in ROLES:
            raise bad_value("recipe.settings", "role", role, one_of(ROLES))
        found: RoleSettings = self._roles[role]  # type: ignore[attr-defined]
        return found

    def _resolve(self, role: str) -> RoleSettings:
        scope = {"input": "activations", "weight": "weights", "grad_output": ""}[role]  # of 4over6
        qparams: QParams = getattr(self, QPARAMS[role])
        selected = bool(scope) and self.nvfp4_4over6 in (scope, "all")
        return RoleSettings(
            rht=qparams.random_hadamard_transform,
            stochastic_rounding=qparams.stochastic_rounding,
            two_d=qparams.fp4_2d_quantization,
            four_over_six=self.nvfp4_4over6_err_mode if selected else None,
            # 4over6 may make a block's scale 1.5 times as large: with 256 that still fits below E4M3's 448.
            e4m3_max=256 if selected and self.nvfp4_4over6_e4m3_use_256 in (scope, "all") else 448,
            row_scaled=role == "input" and self.row_scaled_activation,
            pow2=self.tensor_scale != "current",
            margin=MARGINS[role] if self.tensor_scale == "delayed" else 1,
        )

    def validate_for_use(self) -> None:
        """Refuse what no quantizer can carry out, as TransformerEngine does when it builds its quantizers.

        Raises:
            ValueError: Activations have 4over6 or row scaling together with RHT, or both at once while wgrad runs in
                NVFP4; or delayed scales, or powers of two, meet row scaling; or a block format has
                no such scales; or delayed scales meet those of experts.
        """
        combinations.check(self)
        if self.fp8_dpa or self.fp8_mha:
            warn_once("recipe fp8 attention", "recipe: fp8_dpa and fp8_mha do nothing here, attention stays as it is")
        # The table's recipes take the place of this one in some layers, so they must be usable, too.
        for _, recipe in self.precision:
            if recipe is not None:
                recipe.validate_for_use()

    def deviations(self) -> dict[str, Any]:
        """Return the fields that differ from either default, with or without environment variables; never `name`."""
        # A file must say all that the reader's defaults could change, and environment variables change them.
        values = {field: (getattr(self, field), getattr(type(self), field)) for field in PLAIN}
        return {field: value for field, (value, default) in values.items() if not value == default == PLAIN[field]}

    def __repr__(self) -> str:
        shown = ({"name": self.name} if self.name else {}) | self.deviations()
        return f"{type(self).__name__}({', '.join(f'{field}={value!r}' for field, value in shown.items())})"

    def to_toml(self) -> str:
        """Return the text of a recipe file, with deviations only. `load_recipe` gives an equal recipe back."""
        lines = [f"name = {toml_text(self.name)}", ""] if self.name else []
        fields = {field: value for field, value in self.deviations().items() if field != "precision"}
        lines += ["[recipe]", *(f"{field} = {toml_text(value)}" for field, value in fields.items())] if fields else []
        lines += ["", "[precision]"] if self.precision else []
        for pattern, recipe in self.precision:
            inner = {"name": recipe.name} | recipe.deviations() if recipe is not None else {}
            table = ", ".join(f"{field} = {toml_text(value)}" for field, value in inner.items())
            lines.append(f"{toml_text(pattern)} = " + ('"high"' if recipe is None else f"{{{table}}}"))
        return "\n".join(lines).strip() + "\n"


@functools.lru_cache(maxsize=256)
def recipe_of_key(key: str) -> NVFP4BlockScaling:
    """Return the recipe that has this `key`, without name and [precision] table."""
    # Every value comes from a closed list, and none holds ";", so the text can be cut there.
    changed = dict(pair.split("=", 1) for pair in key.split(";")) if key else {}
    # From PLAIN, because the key leaves out what equals it; the class's defaults may come from the environment.
    return NVFP4BlockScaling(**PLAIN | {field: ast.literal_eval(value) for field, value in changed.items()})


def from_te(recipe: object) -> NVFP4BlockScaling:
    """Convert TransformerEngine's NVFP4BlockScaling object. Its fp4_quant_* attributes rule, as they do there.

    Raises:
        TypeError: The object is of another class.
        ValueError: Its QParams fit no recipe of this package, such as RHT on one wgrad operand only.
    """
    # By name, because TransformerEngine need not be installed to train without it.
    if "NVFP4BlockScaling" not in {base.__name__ for base in type(recipe).__mro__}:
        raise _not_a_recipe(recipe)
    # TransformerEngine's object lacks the fields that only this package has.
    fields = {field: getattr(recipe, field, default) for field, default in PLAIN.items() if field != "precision"}
    inp, weight, grad = (getattr(recipe, attribute, None) for attribute in QPARAMS.values())
    if inp is not None and weight is not None and grad is not None:
        fields["disable_rht"] = not inp.random_hadamard_transform
        fields["disable_stochastic_rounding"] = not grad.stochastic_rounding
        fields["disable_2d_quantization"] = not weight.fp4_2d_quantization
        # The transform of x cancels against that of dy in wgrad; if wgrad is in high precision, neither is used.
        rht_differs = inp.random_hadamard_transform != grad.random_hadamard_transform
        if rht_differs and fields["backward_override"] is None:
            raise value_error(
                "recipe: RHT on one of wgrad's two operands does not cancel.",
                got=f"random_hadamard_transform {inp.random_hadamard_transform} for x, "
                f"{grad.random_hadamard_transform} for dy",
                needs="the same value in fp4_quant_fwd_inp and fp4_quant_bwd_grad",
                fix="set both, or NVFP4BlockScaling(disable_rht=True)",
            )
        refused = {
            "input": ("stochastic_rounding", "fp4_2d_quantization"),
            "weight": ("stochastic_rounding", "random_hadamard_transform"),
            "grad_output": ("fp4_2d_quantization",),
        }
        for (role, attribute), qparams in zip(QPARAMS.items(), (inp, weight, grad), strict=True):
            for field in refused[role]:
                if getattr(qparams, field):
                    raise value_error(
                        f"recipe attribute '{attribute}': {field} cannot be on for this operand.",
                        got=f"{field}=True",
                        needs=f"{field}=False",
                        fix=f"replace {attribute} by QParams without it",
                    )
            if qparams.power_2_scale or qparams.amax_epsilon:
                warn_once("qparams unused", f"recipe: NVFP4 does not use power_2_scale and amax_epsilon ({attribute})")
    return NVFP4BlockScaling(**fields)


_loaders: list[Callable[[str | os.PathLike[str]], NVFP4BlockScaling]] = []


def load_names_with(load: Callable[[str | os.PathLike[str]], NVFP4BlockScaling]) -> None:
    """Set the function by which as_recipe finds a recipe's name or path: files.py, which stands above, calls this."""
    _loaders[:] = [load]


def as_recipe(recipe: object) -> NVFP4BlockScaling:
    """Return the recipe that a user means, wherever a recipe is asked for.

    Args:
        recipe: A recipe of this package, which is returned unchanged; TransformerEngine's, which is converted; the name
            or path of one, as load_recipe takes it; or None for the default recipe.
    Raises:
        TypeError: It is none of these.
        FileNotFoundError: There is no recipe of this name. The message lists the names, and suggests close ones.
        ValueError: The file of that name is no recipe.
    """
    if isinstance(recipe, NVFP4BlockScaling):
        return recipe
    if isinstance(recipe, (str, os.PathLike)):
        return _loaders[0](recipe)
    return default_recipe() if recipe is None else from_te(recipe)


def default_recipe() -> NVFP4BlockScaling:
    """Return the recipe of a call that names none."""
    if not _default:  # not made at import: environment variables may name what the recipe refuses
        _default.append(NVFP4BlockScaling())
    return _default[0]


_default: list[NVFP4BlockScaling] = []  # made once: checking all fields takes longer than a small layer


def _not_a_recipe(recipe: object) -> TypeError:
    fix = "pass NVFP4BlockScaling(), a recipe's name or path, or None for the default"
    got = f"{type(recipe).__module__}.{type(recipe).__qualname__}: {recipe!r:.80}"
    # The usual mistakes get the line that was meant. A bool comes from nvfp4_autocast(True), as in torch.autocast.
    if isinstance(recipe, bool):
        fix = f"the first argument is the recipe: write enabled={recipe}"
    elif isinstance(recipe, type):
        fix = f"an object, not the class: {recipe.__name__}()"
    elif isinstance(recipe, Mapping):
        fix = "NVFP4BlockScaling(**fields); a table of module names goes to set_precision(model, table)"
    elif any(base.__name__ == "Recipe" for base in type(recipe).__mro__):
        got = f"TransformerEngine's {type(recipe).__name__}"
        fix = "use NVFP4BlockScaling(): other formats than NVFP4 are out of scope"
    needs = "an NVFP4BlockScaling recipe, this package's or TransformerEngine's"
    return type_error("not an NVFP4 recipe.", got=got, needs=needs, fix=fix)


def _check_precision(table: object) -> tuple[tuple[str, NVFP4BlockScaling | None], ...]:
    needs = 'pairs (pattern of module names, None or "high", or a recipe without a precision table)'
    pairs = tuple(table.items()) if isinstance(table, Mapping) else table
    if not isinstance(pairs, (tuple, list)):
        raise bad_value("recipe", "precision", table, needs)
    out: dict[str, NVFP4BlockScaling | None] = {}
    for pair in pairs:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)):
            raise bad_value("recipe", "precision", pair, needs)
        recipe = None if pair[1] in HIGH else as_recipe(pair[1])
        if recipe is not None and recipe.precision:
            raise bad_value("recipe", "precision", pair, needs, "take the inner table out: one table per recipe")
        out.pop(pair[0], None)  # the last match wins, and a TOML table has each key once
        out[pair[0]] = recipe
    return tuple(out.items())
