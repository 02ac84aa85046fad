"""Run te-nvfp4-cv quantize, export and verify: write a trained model to a file, and check what a file really holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from te_nvfp4_cv.cli.loading import example, model_of, model_options, new_file, note_weights, recipe_of
from te_nvfp4_cv.cli.pictures import check_pictures, picture_options, read_pictures
from te_nvfp4_cv.cli.shape import Command, show
from te_nvfp4_cv.errors import value_error


def _show(written: Any, as_json: bool, drift: Any = None) -> None:
    """Print an nv.export.Saved or OnnxFile, and what quantization has changed."""
    found = {**vars(written), "files": [str(file) for file in written.files]}
    if drift is not None:
        found["drift"] = drift.to_dict()
    show(found, str(written) if drift is None else f"{drift}\n{written}", as_json)


def _quantize_options(parser: argparse.ArgumentParser) -> None:
    # Imports of what one command needs stand in its functions: `te-nvfp4-cv --help` should not load all of it.
    from te_nvfp4_cv.export.ptq.rounding import METHODS

    model_options(parser)
    picture_options(parser)
    parser.set_defaults(input=None)  # what it is then, the model's preparation says
    parser.add_argument("--method", choices=METHODS, default="search", help="how weights are rounded (default: search)")
    text = "quantize each activation with its own amax, not with a calibrated one"
    parser.add_argument("--dynamic", action="store_true", help=text)
    text = "leave the layers in high precision that change the outputs most, up to this share of the FLOPs, such as 0.1"
    parser.add_argument("--auto-high", type=float, metavar="SHARE", help=text)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def _quantize(options: argparse.Namespace) -> int:
    from te_nvfp4_cv.export import quantize, save

    check_pictures("quantize", options)
    # Before the model runs: a name that is taken should not be found out after minutes of work.
    out = new_file(options.out, ".safetensors", options.force, options.checkpoint)
    model = model_of(options, False)
    note_weights(options)
    batches = read_pictures(options, model)
    scales = "dynamic" if options.dynamic else "static"
    recipe = recipe_of(options)
    # The [precision] table is not applied to the model: quantize and save take it from the recipe.
    model = quantize(
        model, batches, recipe, method=options.method, scales=scales, batches=None,
        auto_high=options.auto_high,
    )
    _show(save(model, out, recipe), options.json, model.nvfp4_drift)
    return 0


def _export_options(parser: argparse.ArgumentParser) -> None:
    from te_nvfp4_cv.export.onnx.convert import FORMS

    model_options(parser)
    parser.add_argument("--packed", type=Path, metavar="FILE", help="a file of export or quantize, to convert to ONNX")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="FILE.safetensors or FILE.onnx")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--form", choices=FORMS, default="qdq", help="form of an ONNX file (default: qdq)")
    text = "in an ONNX file: the largest batch, for a model that does something else for larger ones (default: any)"
    parser.add_argument("--max-batch", type=int, metavar="N", help=text)
    text = "in an ONNX file: nvfp4, or high to have only the weights in NVFP4 (default: what the file is for)"
    parser.add_argument("--activations", choices=("nvfp4", "high"), help=text)


def _export(options: argparse.Namespace) -> int:
    from te_nvfp4_cv.export import load, save, to_onnx

    onnx = options.out.suffix == ".onnx"
    # An ONNX file is made of a packed one, whose weights and recipe would contradict another checkpoint or recipe.
    given = options.checkpoint if options.checkpoint is not None else options.recipe
    if onnx != (options.packed is not None) or (onnx and given is not None):
        raise value_error(
            "export: the options do not go together.",
            got=f"--out {options.out}, --packed {options.packed}, --checkpoint {options.checkpoint}, "
            f"--recipe {options.recipe}",
            needs="--checkpoint and --recipe for a .safetensors file; --packed, which holds them, for an .onnx file",
            fix="first --checkpoint W.pt --out A.safetensors, then --packed A.safetensors --out A.onnx",
        )
    suffix = ".onnx" if onnx else ".safetensors"
    out = new_file(options.out, suffix, options.force, options.checkpoint, options.packed)
    if onnx:
        model = load(options.packed, model_of(options, False), activations=options.activations)
        # Two images: torch.export would take a batch of 1 for a constant.
        batch = True if options.max_batch is None else options.max_batch
        _show(to_onnx(model, example(options, 2), out, form=options.form, dynamic_batch=batch), options.json)
    else:
        model = model_of(options)
        note_weights(options)
        _show(save(model, out, recipe_of(options)), options.json)
    return 0


def _verify_options(parser: argparse.ArgumentParser) -> None:
    text = "a .safetensors file, the index of several, or an .onnx file; exit status 3: nothing in it was recognized"
    parser.add_argument("file", metavar="FILE", help=text)


def _verify(options: argparse.Namespace) -> int:
    from te_nvfp4_cv.export.verify.__main__ import run

    return run(options.file, options.json)


COMMANDS = (
    Command(
        "quantize", "quantize a trained network to NVFP4 with some images and no training", _quantize_options, _quantize
    ),
    Command("export", "write a network trained in NVFP4 as a packed file, or as ONNX", _export_options, _export),
    Command("verify", "list the precision that each layer of a file really has", _verify_options, _verify),
)
