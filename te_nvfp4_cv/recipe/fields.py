"""Define the recipe's fields: their values, the environment variables of their defaults, and how they are written.

A value outside a field's list is refused with a message that names the field and the list.
"""

from __future__ import annotations

import difflib
import enum
import functools
import os
from collections.abc import Mapping
from typing import Any, TypeVar

from te_nvfp4_cv.errors import value_error

Recipe = TypeVar("Recipe")

GEMMS = ("fprop", "dgrad", "wgrad")
HIGH = (None, "high")
"""The entries of a table of precision that stand for high precision: in Python, and in files, which have no None."""


class Role(enum.StrEnum):
    """The role of an operand in a layer's GEMMs. Members equal their texts, which users and files write."""

    INPUT = "input"
    WEIGHT = "weight"
    GRAD_OUTPUT = "grad_output"


ROLES = tuple(role.value for role in Role)
SCOPES = ("none", "weights", "activations", "all")

ALLOWED: dict[str, tuple[object, ...]] = {
    "disable_rht": (False, True),
    "disable_stochastic_rounding": (False, True),
    "disable_2d_quantization": (False, True),
    "row_scaled_activation": (False, True),
    "nvfp4_4over6": SCOPES,
    "nvfp4_4over6_e4m3_use_256": SCOPES,
    "nvfp4_4over6_err_mode": ("MAE", "MSE"),
    "fp4_format": ("E2M1",),
    "fp8_format": ("E4M3",),
    "fp8_dpa": (False, True),
    "fp8_mha": (False, True),
    "backward_override": (None, "high_precision", "dequantized"),
    "tensor_scale": ("current", "delayed", "current_pow2"),
    "thin_layers": ("high_precision", "pad"),
    "kernels": ("all", "parameters"),
    "activation_shift": ("none", "mean"),
    "block_format": ("nvfp4", "mxfp4", "nvfp4_ue5m3", "fp4_e4m3_only"),
    "grouped_scale": ("operand", "expert"),
}
"""Fields with a closed list of values. The first value is the default, but see PLAIN."""

REMOVED: dict[str, tuple[object, str, str]] = {
    "wgrad_block": (
        "batch",
        "0.2.0",
        "blocks along pixels took up to 3.5 times the time and gained nothing measurable; "
        "blocks of wgrad now always lie along the batch",
    ),
    "activation_rounding": (
        "nearest",
        "0.2.0",
        "rounding x stochastically made forward noisy and gained nothing measurable; x now always rounds to nearest",
    ),
}
"""Fields of earlier versions: the default that they had, the version that removed them, and why."""

# TransformerEngine's variables, so that a script that sets them trains the same recipe with either package. Fields
# that only this package has get variables of this package.
ENVIRONMENT = {
    "disable_rht": "NVTE_NVFP4_DISABLE_RHT",
    "disable_stochastic_rounding": "NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING",
    "disable_2d_quantization": "NVTE_NVFP4_DISABLE_2D_QUANTIZATION",
    "row_scaled_activation": "NVTE_NVFP4_ROW_SCALED_ACTIVATION",
    "nvfp4_4over6": "NVTE_NVFP4_4OVER6",
    "nvfp4_4over6_e4m3_use_256": "NVTE_NVFP4_4OVER6_E4M3_USE_256",
    "nvfp4_4over6_err_mode": "NVTE_NVFP4_4OVER6_ERR_MODE",
    "backward_override": "NVTE_BACKWARD_OVERRIDE",
    "kernels": "TE_NVFP4_CV_KERNELS",
    "activation_shift": "TE_NVFP4_CV_ACTIVATION_SHIFT",
    "grouped_scale": "TE_NVFP4_CV_GROUPED_SCALE",
}
PLAIN: dict[str, Any] = {field: values[0] for field, values in ALLOWED.items()}
# Two fields without a list of values, and one whose default is not the first of its list.
PLAIN |= {"nvfp4_4over6_e4m3_use_256": "all", "high_precision_gemms": (), "precision": ()}
"""The defaults of all fields as they are without environment variables."""


def environment_flag(field: str) -> bool:
    """Return the default of a boolean field, from its environment variable."""
    return os.getenv(ENVIRONMENT[field], "0") == "1"


def one_of(values: tuple[object, ...]) -> str:
    """Return a list of values as an error message shows it."""
    return "one of: " + ", ".join(repr(value) for value in values) if len(values) > 1 else f"{values[0]!r}"


def bad_value(owner: str, field: str, value: object, needs: str, fix: str = "") -> ValueError:
    """Return the error for a value that a field does not take."""
    title = f"{owner} field '{field}': bad value."
    return value_error(title, got=f"{field}={value!r}", needs=needs, fix=fix or f"set {field} to {needs}")


def check_choice(field: str, value: object) -> None:
    """Refuse a value outside the field's list.

    Raises:
        ValueError: The value is not in the list.
    """
    allowed = ALLOWED[field]
    # The type is compared, too: 1 == True, and a recipe file with 1 would not be written back as it was read.
    if any(value == choice and type(value) is type(choice) for choice in allowed):
        return
    fix = ""
    if isinstance(value, str):
        choices = {choice.lower(): choice for choice in allowed if isinstance(choice, str)}
        close = difflib.get_close_matches(value.lower(), choices, 1)
        fix = f"did you mean {choices[close[0]]!r}?" if close else ""
    variable = ENVIRONMENT.get(field, "")
    # A default from the environment may be wrong, too, and the user has not written the field anywhere then.
    # Where the variable is not set, "\0" stands in, which equals no value.
    if value is not None and str(value).lower() == os.getenv(variable, "\0").lower():
        fix = f"correct the environment variable {variable}, where this value comes from"
    raise bad_value("recipe", field, value, one_of(allowed), fix)


def check_nvfp4(caller: str, block_format: str, needs: str, fix: str) -> None:
    """Refuse what only NVFP4's blocks have a form for.

    Raises:
        ValueError: The block format is another one.
    """
    if block_format != "nvfp4":
        title = f"{caller}: no form for this block format."
        raise value_error(title, got=f"a recipe with block_format={block_format!r}", needs=needs, fix=fix)


def check_gemms(gemms: object) -> tuple[str, ...]:
    """Return the named GEMMs in the order fprop, dgrad, wgrad.

    Raises:
        ValueError: A name is not a GEMM's, or `gemms` is not a tuple, list or set.
    """
    given = tuple(gemms) if isinstance(gemms, (tuple, list, set, frozenset)) else None
    if given is None or any(gemm not in GEMMS for gemm in given):
        needs = "a tuple of any of: " + ", ".join(repr(gemm) for gemm in GEMMS)
        # The usual mistake is a tuple without its comma, which is a text.
        fix = f"write ({gemms!r},)" if gemms in GEMMS else ""
        raise bad_value("recipe", "high_precision_gemms", gemms, needs, fix)
    return tuple(gemm for gemm in GEMMS if gemm in given)


def without_removed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields without the removed ones, so that what earlier versions saved can still be read.

    Raises:
        ValueError: A removed field has another value than its old default, which nothing computes any more.
    """
    for field, (default, since, why) in REMOVED.items():
        if field in fields and fields[field] != default:
            raise value_error(
                f"recipe field '{field}' was removed in version {since}: {why}.",
                got=f"{field}={fields[field]!r}",
                needs=f"no {field}, or its old default {default!r}",
                fix=f"remove {field} from the recipe",
            )
    return {field: value for field, value in fields.items() if field not in REMOVED}


def toml_text(value: object) -> str:
    """Return a value as TOML text. None, which TOML lacks, becomes "none"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_text(item) for item in value) + "]"
    text = "none" if value is None else str(value)
    # A TOML string on one line takes no control characters, and only some of them have short names.
    special = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(special.get(c, c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}") for c in text) + '"'


def knows_removed_fields(cls: type[Recipe]) -> type[Recipe]:
    """Let the constructor take keywords that earlier versions had, as far as they still mean something.

    dataclass writes the constructor, and a keyword that it does not know is a TypeError without a reason. This way
    every path that builds a recipe from saved fields gives the reason, `**fields` and dataclasses.replace included.
    """
    init = cls.__init__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **fields: Any) -> None:
        init(self, *args, **without_removed(fields))

    cls.__init__ = checked  # type: ignore[assignment]
    return cls
