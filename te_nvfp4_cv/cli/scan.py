"""Run te-nvfp4-cv scan: which layers suffer from NVFP4, as a table, a recipe and a page with pictures.

The loss is the one that MODEL returns, or how far the outputs move from those in high precision, as a share of what
tells one image from another. For the second no labels are needed.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.cli.loading import function_of, model_of, model_options, new_file, note_weights, parts_of, recipe_of
from te_nvfp4_cv.cli.pictures import check_pictures, picture_options, read_pictures
from te_nvfp4_cv.cli.shape import show
from te_nvfp4_cv.cli.weights import load_weights
from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.export.ptq.drift import compare
from te_nvfp4_cv.export.ptq.norm_folding import tensors_of
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.sensitivity.scan_report import Scan


def scan_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `scan` to its parser."""
    from te_nvfp4_cv.sensitivity.scanning import MODES

    model_options(parser)
    picture_options(parser, required=False)
    parser.set_defaults(input=None)
    text = "quantize each layer alone (one), all but that one, or both (default: one)"
    parser.add_argument("--mode", choices=MODES, default="one", help=text)
    text = "share of the FLOPs that --out leaves in high precision at most (default: 0.1)"
    parser.add_argument("--budget", type=float, default=0.1, metavar="SHARE", help=text)
    parser.add_argument("--out", type=Path, metavar="RECIPE.toml", help="write a recipe that spares the worst layers")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="write a page with pictures")
    parser.add_argument("--force", action="store_true", help="replace existing files")


def run_scan(options: argparse.Namespace) -> int:
    """Scan the model that the options name. Returns the exit status."""
    from te_nvfp4_cv.files import write_atomically
    from te_nvfp4_cv.report.budget import check_share
    from te_nvfp4_cv.sensitivity import scan

    check_share("scan", "--budget", options.budget)
    # Asked before the measurement, which may take minutes.
    out, page = (None if path is None else new_file(path, suffix, options.force, options.checkpoint)
                 for path, suffix in ((options.out, ".toml"), (options.html, ".html")))
    model, batches, loss = _pictured(options) if options.images is not None else _returned(options)
    note_weights(options)
    found = scan(model, loss, batches, recipe_of(options), options.mode)
    show(found.to_dict(), str(found), options.json)
    if out is not None:
        recipe = found.save(out, budget=options.budget, overwrite=options.force)
        print(f"recipe: {out}: {_left_high(found, recipe, options.budget)}", file=sys.stderr)
    if page is not None:
        write_atomically(page, found.to_html(options.model, options.budget).encode())
    return 0


def _left_high(found: Scan, recipe: NVFP4BlockScaling, budget: float) -> str:
    """Say what the recipe leaves in high precision: in a small network every layer may be larger than the budget."""
    names = [name or "(the model)" for name, own in recipe.precision if own is None]
    if names:
        return f"high precision for {', '.join(names)}"
    suffer = [row.flops for row in found.rows if found.score(row) > 0]
    if not suffer:
        return "no layer in high precision, because none has a score above 0"
    share = min(suffer) / sum(row.flops for row in found.rows)
    smallest = f"the smallest layer that suffers takes {share:.2g} of the FLOPs"
    return f"no layer in high precision: {smallest}, more than --budget {budget:g}"


def _pictured(options: argparse.Namespace) -> tuple[nn.Module, list[Any], Any]:
    """Return the model, batches of pictures with the outputs in high precision, and the distance from these."""
    check_pictures("scan", options)
    model = model_of(options, False)
    return model, _with_outputs(model, [((batch,), {}) for batch in read_pictures(options, model)]), moved


def _returned(options: argparse.Namespace) -> tuple[nn.Module, list[Any], Any]:
    """Return the model, inputs and loss that the user's function returned."""
    model, inputs, loss = parts_of(function_of(options.model, "MODEL")())
    if inputs is None:
        raise value_error(
            "scan: no inputs.", got=f"neither --images nor inputs of {options.model}",
            needs="inputs like those that the model was trained on",
            fix="--images FOLDER, or let MODEL return (model, inputs) or (model, inputs, loss)",
        )
    if options.checkpoint is not None:
        load_weights(model, options.checkpoint, options.key)
    model, call = model.eval(), ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})
    if loss is None:
        return model, _with_outputs(model, [call]), moved
    return model, [call], lambda model, call: loss(model(*call[0], **call[1]))


@torch.no_grad()
def _with_outputs(model: nn.Module, calls: list[Any]) -> list[Any]:
    return [(call, [t.clone() for t in tensors_of(model(*call[0], **call[1]))]) for call in calls]


@torch.no_grad()
def moved(model: nn.Module, batch: tuple[Any, list[Tensor]]) -> Tensor:
    """Return how far the outputs are from the expected ones: the power of the error over that of the signal.

    Args:
        batch: (arguments, keywords) of the call, and the outputs in high precision.
    Raises:
        ValueError: The outputs cannot be compared.
    """
    (args, kwargs), expected = batch
    sqnr = compare(tensors_of(model(*args, **kwargs)), expected)[0]
    if math.isnan(sqnr):
        raise value_error(
            "scan: the outputs cannot be compared.", got="no floating-point output, or the same for every image",
            needs="outputs that differ from image to image, or a loss",
            fix="let MODEL return (model, inputs, loss)",
        )
    return torch.tensor(10 ** (-sqnr / 10))
