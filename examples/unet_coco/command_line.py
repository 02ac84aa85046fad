"""Define the command line of train.py, and read it and the file of --config into plain values.

Each option is declared once, with its type, default and help; jsonargparse does the rest. It checks numbers against
the bounds of their types, from the command line and from the file alike, and reads safe YAML only.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import yaml  # type: ignore[import-untyped]
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser
from jsonargparse.typing import (
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveInt,
    restricted_number_type,
)

from te_nvfp4_cv.backend.dispatch import BACKENDS
from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.version import __version__

from .augmentation import AUGMENTATIONS
from .data import LAYOUTS
from .unet import ACTIVATIONS

TASKS = ("semantic", "instance", "detection")
BACKBONES = ("resnet18", "resnet34", "resnet50")
SAMPLES = 20  # columns of heatmaps that people can read, at each of which a step takes two or three times as long
Scale = restricted_number_type("Scale", float, [(">", 0), ("<=", 64)])
Rate = restricted_number_type("Rate", float, [(">", 0), ("<=", 1000)])
Share = restricted_number_type("Share", float, [(">=", 0), ("<", 1)])
Weight = restricted_number_type("Weight", float, [(">=", 0), ("<", math.inf)])
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**63)])  # torch's generators take no more
LISTS = {"image_size": "[96, 128]", "augment": "[flip]"}
NAMES, TEXTS = ("classes", "init_skip", "precisions"), ("data", "recipe", "device", "backbone_weights")
Factor = restricted_number_type("Factor", float, [(">", 1), ("<", math.inf)])


def read_values(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the values of all options by name, those of the command line before those of the file.

    Raises:
        ValueError: If a value is out of its range, or the file cannot be used.
        SystemExit: If the command line is no command line of the trainer, and for --help and --version.
    """
    parser = make_parser()
    words = _config_first(arguments)
    for path in words[1 : 2 * words.count("--config") : 2]:
        _check_lists(Path(path))
    try:
        values = vars(parser.parse_args(words))
    except (ArgumentError, TypeError) as error:
        text = " ".join(str(error).split())
        refusal = _refusal(parser, text)
        if refusal is None:
            print(f"{parser.prog}: error: {error} ({_perhaps(parser, text)}--help shows all options)", file=sys.stderr)
            raise SystemExit(2) from error
        raise refusal from error
    del values["config"]
    _check_kinds(values, vars(parser.get_defaults()))
    # The bounded types are subclasses of int and float, which neither a checkpoint nor YAML should have to know.
    return {key: _unbounded(value) for key, value in values.items()}


def _check_lists(path: Path) -> None:
    """Refuse single values where options are lists, before jsonargparse fails at them without naming them."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # jsonargparse says what is wrong with the file
        return
    for key, example in LISTS.items() if isinstance(values, dict) else ():
        for name in (key, key.replace("_", "-")):
            if name in values and not isinstance(values[name], list):
                raise value_error(
                    f"--config: {name} is no list.",
                    got=f"{name}: {values[name]}",
                    needs=f"a list, such as {key}: {example}",
                    fix="put it in brackets, or leave it out",
                )


def _check_kinds(values: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse values of a file that are of another kind than the option; on the command line they cannot be."""
    for key, value in values.items():
        usual = defaults[key]
        if isinstance(usual, bool) and not isinstance(value, bool):
            got = f"{key}: {value}"
            raise value_error("--config: neither true nor false.", got=got, needs="true or false", fix="correct it")
        if value is None and usual is not None:
            raise value_error(
                f"--config: {key} has no value.",
                got=f"{key}: null",
                needs=f"a value; without the line it is {usual}",
                fix="write a value, or leave the line out",
            )
        kinds = (str, list) if key in NAMES else (str,) if key in TEXTS else (object,)
        if value is not None and not isinstance(value, kinds):
            raise value_error(
                f"--config: {key} is no text{' and no list' if key in NAMES else ''}.",
                got=f"{key}: {value}",
                needs=f'{key}: "{value}" for a name that looks like a number' if key in NAMES else "one text",
                fix="correct it",
            )


def _perhaps(parser: ArgumentParser, text: str) -> str:
    """Return a hint for an option that does not exist, or nothing."""
    known = [word for action in parser._actions for word in action.option_strings]
    wrong = re.findall(r"unrecognized arguments:.*?(--[\w-]+)", text)
    near = difflib.get_close_matches(wrong[0], known, 1) if wrong else []
    return f"perhaps {near[0]}; " if near else ""


def _unbounded(value: Any) -> Any:
    kind = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
    return value if kind is None else kind(value)


def make_parser() -> ArgumentParser:
    """Return the parser of all options, in groups."""
    parser = ArgumentParser(
        prog="train.py",
        description="Train a UNet or a detector in each precision from the same seed and data order, and compare.",
        version=f"te_nvfp4_cv {__version__}",
        exit_on_error=False,
        allow_abbrev=True,
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, metavar="FILE.yaml", help="options by name; the command line wins over it"
    )
    add = parser.add_argument_group("task and data").add_argument
    add("--task", choices=TASKS, default="semantic", help="what the model learns")
    add(
        "--data",
        metavar="ROOT",
        help="root of the data; without it a set of drawn shapes is written next to --out and used",
    )
    add("--layout", choices=LAYOUTS, default="coco", help="layout of ROOT")
    add("--classes", metavar="NAME,...", help="classes to learn; the rest is background. If null, all")
    add(
        "--val-share",
        type=OpenUnitInterval,
        default=0.5,
        metavar="F",
        help="--layout mvtec: share of the test images to validate on; the others are trained on",
    )
    add("--image-size", type=int, nargs=2, default=[96, 96], metavar=("H", "W"), help="size of the model's images")
    add("--workers", type=NonNegativeInt, default=0, metavar="N", help="processes that load data; 0: the main one does")

    add = parser.add_argument_group("precision").add_argument
    add(
        "--precisions",
        nargs="+",
        metavar="P",
        help="fp32, fp16, bf16, nvfp4 or recipes. If null, that of --compute, and nvfp4",
    )
    add(
        "--recipe",
        metavar="NAME_OR_PATH",
        help="the recipe that nvfp4 means. If null, detection for --task detection, else unet",
    )
    add(
        "--compute",
        choices=("bf16", "fp16", "fp32", "auto"),
        default="auto",
        help="dtype of the activations under nvfp4 and recipes; fp32: no torch.autocast; auto: bf16 where the device "
        "has units for it, else fp32",
    )
    add(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="where NVFP4 layers run; auto: what this machine does best, and after --resume what the run began with",
    )
    add("--high-precision-last", type=NonNegativeInt, default=0, metavar="K", help="no NVFP4 in the last K epochs")
    add(
        "--learn-scales",
        choices=("none", "scale", "clip"),
        default="none",
        help="learn a multiplier of the block scales, or a clipping threshold, for each NVFP4 layer",
    )

    add = parser.add_argument_group("model").add_argument
    add(
        "--scale",
        type=Scale,
        default=0.25,
        metavar="F",
        help="factor on the UNet's widths 64 .. 1024, or the 256 of the detector's pyramid and heads",
    )
    add("--activation", choices=ACTIVATIONS, default="relu", help="of the UNet")
    add("--dropout", type=Share, default=0.1, metavar="F", help="share of bottleneck channels dropped")
    add("--instances", type=PositiveInt, default=16, metavar="N", help="--task instance: the most objects found")
    add("--backbone", choices=BACKBONES, default="resnet18", help="--task detection: the body")
    add(
        "--backbone-weights",
        metavar="NAME",
        help="--task detection: pretrained weights of the body: imagenet (torchvision's), a URL, or a file. If null, "
        "fresh ones",
    )
    add(
        "--init-from",
        type=Path,
        metavar="FILE",
        help="start from the weights of a checkpoint of this trainer, a state_dict (.pt) or .safetensors",
    )
    add("--init-skip", metavar="PATTERN,...", help="tensors that --init-from leaves as they are, such as head.*")

    add = parser.add_argument_group("training").add_argument
    add(
        "--epochs",
        type=PositiveInt,
        default=20,
        metavar="N",
        help="passes over the training images; sets the length of the cosine schedule",
    )
    count = Optional[PositiveInt]  # noqa: UP045  (jsonargparse's types are made at run time)
    add("--steps", type=count, metavar="N", help="stop after N steps in total, if --epochs has not ended before")
    add("--schedule-steps", type=count, metavar="N", help="length of the cosine in steps. If null, that of --epochs")
    add(
        "--batch-size",
        type=PositiveInt,
        default=16,
        metavar="N",
        help="images per step, on all ranks together; a multiple of 16 on each wastes nothing in NVFP4",
    )
    add("--lr", type=Rate, default=1e-3, metavar="F", help="highest learning rate of AdamW")
    add("--weight-decay", type=NonNegativeFloat, default=1e-2, metavar="F", help="of AdamW")
    add(
        "--class-weights",
        choices=("none", "median"),
        default="none",
        help="weight of each class in the loss; median gives rare classes a larger weight",
    )
    add("--dice-weight", type=Weight, default=1.0, metavar="F", help="factor on the Dice loss")
    add("--ce-weight", type=Weight, default=1.0, metavar="F", help="factor on the cross-entropy")
    add("--ema", type=Share, default=0.0, metavar="DECAY", help="validate an average of the weights; 0: the weights")
    add(
        "--augment",
        nargs="*",
        choices=AUGMENTATIONS,
        default=["flip"],
        metavar="NAME",
        help=f"change training images at random: {', '.join(AUGMENTATIONS)}; no name: not at all",
    )
    add("--seed", type=Seed, default=0, metavar="N", help="of weights, data order and dropout")

    add = parser.add_argument_group("device and ranks").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add(
        "--deterministic",
        action="store_true",
        help="on a GPU, and on more than two ranks: choose deterministic kernels and an order of summation, so that "
        "a resume is bit-exact there too",
    )
    add("--parallel", choices=("ddp", "fsdp"), default="ddp", help="how torchrun's ranks share the model")
    add("--share-amax", action="store_true", help="NVFP4 under torchrun: use one tensor scale for all ranks")
    add(
        "--timeout",
        type=PositiveInt,
        default=600,
        metavar="SECONDS",
        help="how long a rank waits for another one before the job ends",
    )

    add = parser.add_argument_group("results and checkpoints").add_argument
    add("--out", type=Path, default=Path("runs/unet_coco"), metavar="DIR", help="folder of the results")
    add("--resume", action="store_true", help="continue from DIR's checkpoints; a precision without one starts fresh")
    add("--log-every", type=PositiveInt, default=10, metavar="N", help="print a line every N steps")
    add("--eval-every", type=PositiveInt, default=1, metavar="N", help="validate every N epochs")
    add(
        "--save-every",
        type=NonNegativeInt,
        default=0,
        metavar="N",
        help="write a checkpoint every N steps too; 0: at the end of each epoch only",
    )
    add(
        "--sharded-checkpoints",
        action="store_true",
        help="--parallel fsdp: each rank writes its part of a checkpoint, and none holds the whole",
    )
    add("--pictures", type=NonNegativeInt, default=4, metavar="N", help="validation images to show predictions of")

    add = parser.add_argument_group("watching").add_argument
    add(
        "--telemetry-every",
        type=Optional[NonNegativeInt],  # noqa: UP045
        metavar="N",
        help="sample weights, activations and gradients in every Nth step and the last one; 0: never. If null, as "
        f"often as gives {SAMPLES} columns in heatmaps",
    )
    add("--tensorboard", action="store_true", help="write the telemetry for TensorBoard, too")
    add(
        "--no-wandb",
        dest="wandb",
        action="store_false",
        help="wandb: false in the file; do not write a W&B log (offline unless WANDB_MODE says otherwise)",
    )
    add(
        "--no-bundles",
        dest="bundles",
        action="store_false",
        help="bundles: false in the file; do not save steps whose loss jumps or is not finite for te-nvfp4-cv diagnose",
    )
    add(
        "--spike-factor",
        type=Factor,
        default=3.0,
        metavar="F",
        help="a loss jumps where it exceeds F times the median of the last 100",
    )
    return parser


def _config_first(arguments: Sequence[str]) -> list[str]:
    """Move --config to the front: later values win, and the command line wins wherever --config stands in it."""
    words, files, others = iter(arguments), list[str](), list[str]()
    for word in words:
        name, equals, value = word.partition("=")
        if not (len(name) > 4 and "--config".startswith(name)):  # --con is the shortest form that is not ambiguous
            others.append(word)
        elif equals:
            files += ["--config", value]
        else:
            files += ["--config", *([value] if (value := next(words, "")) else [])]
    return files + others


def _refusal(parser: ArgumentParser, text: str) -> ValueError | None:
    """Return our error for what jsonargparse says of a value or of the file; None: the command line is malformed."""
    if found := re.match(r'Parser key "(\w+)"(?: element \d+)?: (.*)', text):
        key, why = found.groups()
        if key == "config":
            return value_error("--config cannot be read.", got=why, needs="a YAML file", fix="correct the path")
        bounds = re.search(r"(\S*) ?does not conform to restriction (v\S+(?: and v\S+)?)", why)
        given = re.search(r"Given value: (.*)", why)  # of an option that may also be null
        got = given[1] if given else bounds[1] if bounds else why
        needs = bounds[2].replace("v", "value ") if bounds else "what --help says of it"
        told = "out of range" if bounds else "no value that it can have"
        return value_error(f"--{key.replace('_', '-')} is {told}.", got=got, needs=needs, fix="correct it")
    known = [key for key in vars(parser.get_defaults()) if key != "config"]
    if found := re.match(r"Option '([^']+)' is not accepted", text):
        near = difflib.get_close_matches(found[1].replace("-", "_"), known, 1, 0.0)[0]
        return value_error(
            f"--config: unknown option {found[1]!r}.", got=found[1], needs=", ".join(known), fix=f"perhaps {near!r}"
        )
    if text.startswith(("Problems parsing config", "Unexpected config", "Spaces not allowed")):
        return value_error(
            "--config cannot be read.",
            got=text,
            needs="lines such as epochs: 20 or image_size: [96, 128], plain values and lists only",
            fix="correct the file; every run writes one that works, config.yaml",
        )
    return None
