"""Run te-nvfp4-cv coverage, try, scan, project and bench: what runs in NVFP4, what it survives, what suffers, how fast.

Each function imports what its own command needs, to keep the other commands quick.
"""

from __future__ import annotations

import argparse

from te_nvfp4_cv.cli.loading import example, model_of, model_options, recipe_of, subject_of
from te_nvfp4_cv.cli.shape import Command, show


def _coverage_options(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    text = "images in the step: padding and memory depend on it (default: 16)"
    parser.add_argument("--batch", type=int, default=16, metavar="N", help=text)


def _coverage(options: argparse.Namespace) -> int:
    from te_nvfp4_cv.report.watch import coverage

    report = coverage(model_of(options), example(options, options.batch), recipe=recipe_of(options))
    show(report.to_dict(), str(report), options.json)
    return 0


def _project_options(parser: argparse.ArgumentParser) -> None:
    from te_nvfp4_cv.report.memory import OPTIMIZERS
    from te_nvfp4_cv.report.projection import EFFICIENCY, GPUS

    model_options(parser)
    parser.add_argument("--gpu", default="b200", choices=GPUS, help="default: b200")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images a step (default: 32)")
    text = f"share of peak and bandwidth that kernels reach (default: {EFFICIENCY})"
    parser.add_argument("--efficiency", type=float, default=EFFICIENCY, metavar="F", help=text)
    text = "also what a training step keeps in memory with this optimizer; runs the model on 32 images"
    parser.add_argument("--memory", choices=OPTIMIZERS, metavar="OPTIMIZER", help=f"{text} ({', '.join(OPTIMIZERS)})")


def _project(options: argparse.Namespace) -> int:
    from te_nvfp4_cv.report.memory import estimate_memory
    from te_nvfp4_cv.report.projection import project

    model, recipe = model_of(options), recipe_of(options)
    report = project(
        model,
        example(options, 1),  # one image is enough: sizes are multiplied by --batch
        gpu=options.gpu,
        batch=options.batch,
        recipe=recipe,
        efficiency=options.efficiency,
    )
    told, text = report.to_dict(), str(report)
    if options.memory is not None:
        image, name = example(options, 1), options.memory
        memory = estimate_memory(model, image, batch=options.batch, recipe=recipe, optimizer=name)
        told["memory"], text = memory.to_dict(), f"{text}\n{memory}"
    show(told, text, options.json)
    return 0


def _bench_options(parser: argparse.ArgumentParser) -> None:
    from te_nvfp4_cv.cli.bench import DTYPES

    model_options(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N", help="batch sizes (default: 1 8)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    text = (
        "of activations and of the plain model that the others are compared with (default: auto, bf16 where the "
        "device has units for it, else fp32)"
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help=text)
    parser.add_argument("--channels-last", action="store_true", help="images and plain weights in torch.channels_last")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="timed passes of each form (default: 10)")


def _bench(options: argparse.Namespace) -> int:
    from te_nvfp4_cv.cli.bench import measure

    inputs = [example(options, batch) for batch in options.batch]
    report = measure(
        model_of(options), inputs, recipe_of(options), options.device, options.rounds, options.dtype,
        options.channels_last,
    )
    show(report.to_dict(), str(report), options.json)
    return 0


def _try_options(parser: argparse.ArgumentParser) -> None:
    from te_nvfp4_cv.cli.trial.run import CHECKS

    parser.add_argument(
        "model",
        metavar="MODEL",
        help="MODULE:FUNCTION or FILE.py:FUNCTION that returns the model, or (model, inputs) with a tuple or dict of "
        "inputs, or (model, inputs, loss) with a function of the model's output; its code runs",
    )
    text = "shape of an input without its batch axis, if FUNCTION returns no inputs (default: 3 224 224)"
    parser.add_argument("--input", type=int, nargs="+", default=[3, 224, 224], metavar="N", help=text)
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="images in the step (default: 4)")
    text = f"run these alone, of: {', '.join(CHECKS)}"
    parser.add_argument("--checks", nargs="+", choices=tuple(CHECKS), metavar="CHECK", help=text)
    parser.add_argument("--recipe", metavar="NAME_OR_FILE", help="default: TransformerEngine's default recipe")


def _try(options: argparse.Namespace) -> int:
    from te_nvfp4_cv.cli.trial.run import try_model

    row = try_model(subject_of(options), recipe_of(options), options.checks)
    show(row.to_dict(), str(row), options.json)
    return 0 if row.passed else 1


def _scan_options(parser: argparse.ArgumentParser) -> None:
    from te_nvfp4_cv.cli.scan import scan_options

    scan_options(parser)


def _scan(options: argparse.Namespace) -> int:
    from te_nvfp4_cv.cli.scan import run_scan

    return run_scan(options)


COMMANDS = (
    Command("coverage", "list a model's layers: NVFP4 or not, why, FLOPs, memory", _coverage_options, _coverage),
    Command("try", "train, compile, save, export and fuse a model: does all of it hold?", _try_options, _try),
    Command("scan", "rank layers by what NVFP4 changes: a table, a recipe, a page with pictures", _scan_options, _scan),
    Command("project", "estimate a model's time on a GPU that is not here, by a roofline", _project_options, _project),
    Command("bench", "measure size, load time and latency: fp32, bf16, packed, cached", _bench_options, _bench),
)
