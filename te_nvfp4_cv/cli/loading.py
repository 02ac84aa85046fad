"""Read what commands take: a model that the user's code builds, its weights, an input, a recipe.

The functions add the options to a parser, or return what the options name. Their errors begin with the option.
"""

from __future__ import annotations

import argparse
import glob
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.cli.libraries import builder_of, library_of
from te_nvfp4_cv.cli.weights import load_weights
from te_nvfp4_cv.errors import describe, type_error, value_error
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.recipe.files import load_recipe


def model_options(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """Add MODEL, --checkpoint, --input and --recipe to a parser; nargs "?" lets MODEL be left out."""
    parser.add_argument(
        "model",
        nargs=nargs,
        metavar="MODEL",
        help="MODULE:FUNCTION or FILE.py:FUNCTION that returns the model (torchvision.models:resnet50); its code runs. "
        "Or timm:NAME, transformers:NAME, with the weights that the library has",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="its weights: a state_dict, .pt or .safetensors"
    )
    text = "name of the state_dict in that file, if it holds several"
    parser.add_argument("--key", metavar="NAME", help=text)
    parser.add_argument(
        "--input", type=int, nargs="+", default=[3, 224, 224], metavar="N",
        help="shape of an input without its batch axis (default: 3 224 224)",
    )
    # Not `choices` of argparse: a path is allowed, too.
    parser.add_argument("--recipe", metavar="NAME_OR_FILE", help="default: TransformerEngine's default recipe")


def function_of(name: str, option: str, pretrained: bool = True) -> Any:
    """Return the function that the user names as MODULE:FUNCTION or FILE.py:FUNCTION, with torchvision made to load.

    Args:
        pretrained: a network that is named as timm:NAME or transformers:NAME gets the library's weights.
    Raises:
        ValueError: There is no such module, file or function.
    """
    from te_nvfp4_cv.sensitivity import builder

    if ":" not in name:
        fix = f"{name}:build" if name.endswith(".py") else f"torchvision.models:{name}, timm:{name}, or model.py:build"
        needs = "MODULE:FUNCTION or FILE.py:FUNCTION that returns the model; or timm:NAME, transformers:NAME"
        raise value_error(f"bad {option}.", got=repr(name), needs=needs, fix=fix)
    known = library_of(name)
    if known is not None:
        return builder_of(*known, pretrained)
    try:
        return builder.given(name, option)
    except ValueError as error:
        # torchvision's wheels are built for CUDA. Only who needs it waits for it.
        if builder.OPERATORS not in str(error):
            raise
    from te_nvfp4_cv.cli.torchvision_ops import ensure_torchvision

    ensure_torchvision()
    return builder.given(name, option)


def note_weights(options: argparse.Namespace) -> None:
    """Say where the weights come from, if no checkpoint gives them: what random ones give looks like any result."""
    if options.checkpoint is None and library_of(options.model) is None:
        print(f"note: no --checkpoint: the weights are those that {options.model} returns", file=sys.stderr)


def recipe_of(options: argparse.Namespace) -> NVFP4BlockScaling:
    """Return the recipe that --recipe names, or the default recipe."""
    return NVFP4BlockScaling() if options.recipe is None else load_recipe(options.recipe)


def model_of(options: argparse.Namespace, table: bool = True) -> nn.Module:
    """Build the model in eval mode, with its weights.

    Args:
        table: apply the recipe's [precision] table to the model, too.
    Raises:
        TypeError: The user's function returns something else than a model.
        ValueError: The weights do not fit the model.
    """
    from te_nvfp4_cv.nn.precision import set_precision

    model = function_of(options.model, "MODEL", options.checkpoint is None)()
    if not isinstance(model, nn.Module):
        fix = "return the model alone; only try, and scan without --images, take (model, inputs, loss)"
        raise type_error("MODEL: no model.", got=describe(model), needs="a function that returns one", fix=fix)
    if options.checkpoint is not None:
        load_weights(model, options.checkpoint, options.key)
    # After the weights: a table may name modules, but it adds nothing to the state_dict.
    if table and (recipe := recipe_of(options)).precision:
        set_precision(model, recipe)
    return model.eval()


def subject_of(options: argparse.Namespace) -> Any:
    """Return the Subject of `te-nvfp4-cv try`: a model with inputs and a loss, as far as the user's function says.

    Raises:
        TypeError: The user's function returns something else.
    """
    from te_nvfp4_cv.cli.trial.subject import Subject, distance

    build = function_of(options.model, "MODEL")
    model, inputs, loss = parts_of(build())
    if inputs is None:
        inputs = (example(options, options.batch),)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})
    table = recipe_of(options).precision

    def made() -> nn.Module:
        from te_nvfp4_cv.nn.precision import set_precision

        fresh = parts_of(build())[0]
        if table:
            set_precision(fresh, recipe_of(options))
        return fresh

    return Subject(options.model, made, args, kwargs, distance if loss is None else loss)


def parts_of(built: Any) -> tuple[nn.Module, Any, Any]:
    """Return model, inputs and loss of what a user's function returned; None for what it left out."""
    parts = built if isinstance(built, tuple) else (built,)
    model, inputs, loss = (*parts, None, None)[:3]
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if (
        not isinstance(model, nn.Module) or len(parts) > 3 or not isinstance(inputs, tuple | list | dict | None)
        or not (loss is None or callable(loss))
    ):
        raise type_error(
            "MODEL: no model.", got=", ".join(map(describe, parts)),
            needs="a function that returns a model, (model, inputs) or (model, inputs, loss)", fix="return one of them",
        )
    return model, inputs, loss


def new_file(path: Path, suffix: str, force: bool, *others: Path | None) -> Path:
    """Return the path that --out names, with its ending added if it is missing.

    Args:
        force: allow an existing file.
        others: files that the command reads, which it must not replace.
    Raises:
        FileExistsError: The file exists, and --force was not given.
        ValueError: The file is one of `others`.
    """
    target = path if path.name.endswith((suffix, ".safetensors.index.json")) else path.with_name(path.name + suffix)
    written = [target]  # nv.export.save replaces or removes the other files of the same name, too
    if suffix == ".safetensors":
        base = target.with_name(target.name.removesuffix(".index.json").removesuffix(suffix))
        written = [base.with_name(base.name + ending) for ending in (suffix, ".safetensors.index.json")]
        written += base.parent.glob(f"{glob.escape(base.name)}-*-of-*{suffix}") if base.parent.is_dir() else []
    there = [file for file in written if file.exists()]
    for other in others:
        # samefile sees through links and other spellings of a path.
        read = [] if other is None else [file for file in there if other.exists() and other.samefile(file)]
        if read:
            raise value_error(
                f"--out {target} is what is read.", got=str(other), needs="another file", fix="give --out another name"
            )
    # After the check of `others`: not even --force may replace what is read.
    if there and not force:
        raise FileExistsError(f"--out {target}: the file {there[0]} exists; name a new one, or give --force")
    return target


def example(options: argparse.Namespace, batch: int) -> Tensor:
    """Return an input [batch, *--input] of normally distributed numbers."""
    if batch < 1 or min(options.input) < 1:
        raise value_error(
            "--input or --batch is out of range.",
            got=f"{options.input}, {batch}", needs="sizes of at least 1", fix="--input 3 224 224"
        )
    # Of a fixed seed: two reports of one model agree.
    return torch.randn((batch, *options.input), generator=torch.Generator().manual_seed(0))
