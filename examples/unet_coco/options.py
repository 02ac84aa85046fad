"""The options of train.py, as one frozen object.

`--epochs` lays out the cosine schedule, lr(t) = lr / 2 * (1 + cos(pi t / T)) with T = epochs * steps per epoch (or
--schedule-steps); `--steps` only says where to stop. So a run stopped by --steps and continued by --resume takes the
very steps of an uninterrupted one. Refuses values that cannot train, before anything is read.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from te_nvfp4_cv.checks import runtime_error, value_error

from .data import LAYOUTS
from .unet import ACTIVATIONS

TASKS = ("semantic", "instance", "detection")
BACKBONES = ("resnet18", "resnet34", "resnet50")


@dataclass(frozen=True)
class Settings:
    """What was asked for; one attribute per option."""

    task: str
    data: str | None
    layout: str
    classes: tuple[str, ...] | None
    val_share: float
    precisions: tuple[str, ...]
    recipe: str
    epochs: int
    steps: int | None
    schedule_steps: int | None
    image_size: tuple[int, int]
    scale: float
    activation: str
    dropout: float
    instances: int
    backbone: str
    batch_size: int
    lr: float
    weight_decay: float
    seed: int
    device: str
    log_every: int
    eval_every: int
    out: Path
    resume: bool
    workers: int
    pictures: int
    deterministic: bool
    parallel: str
    share_amax: bool
    timeout: int
    wandb: bool


def parse_options(arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line.

    Raises:
        ValueError: a value out of its range.
        SystemExit: argparse's own refusals and --help.
    """
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a UNet or a detector in each precision from the same seed and data order, and compare.",
    )
    add = parser.add_argument
    add("--task", choices=TASKS, default="semantic", help="what to learn (default: semantic)")
    add(
        "--data",
        metavar="ROOT",
        help="root of the data; without it a set of drawn shapes is written beside --out and used",
    )
    add("--layout", choices=LAYOUTS, default="coco", help="how ROOT is laid out (default: coco)")
    add("--classes", metavar="NAME,...", help="classes to tell from the rest (default: all)")
    add(
        "--val-share",
        type=float,
        default=0.5,
        metavar="F",
        help="--layout mvtec: share of the test images to validate on; the others are trained on (default: 0.5)",
    )
    add(
        "--precisions",
        nargs="+",
        default=["bf16", "nvfp4"],
        metavar="P",
        help="fp32, fp16, bf16, nvfp4 or recipes (default: bf16 nvfp4)",
    )
    add(
        "--recipe",
        metavar="NAME_OR_PATH",
        help="the recipe that nvfp4 stands for (default: detection for --task detection, else unet)",
    )
    add(
        "--epochs",
        type=int,
        default=20,
        metavar="N",
        help="passes over the training images; lays out the cosine schedule (default: 20)",
    )
    add("--steps", type=int, metavar="N", help="stop after N steps in all, if --epochs has not ended before")
    add("--schedule-steps", type=int, metavar="N", help="length of the cosine in steps (default: that of --epochs)")
    add("--image-size", type=int, nargs=2, metavar=("H", "W"), help="size that images are resized to (default: 96 96)")
    add(
        "--scale",
        type=float,
        default=0.25,
        metavar="F",
        help="factor on the UNet's widths 64 .. 1024, or the 256 of the detector's pyramid and heads (default: 0.25)",
    )
    add("--activation", choices=ACTIVATIONS, default="relu", help="default: relu")
    add("--dropout", type=float, default=0.1, metavar="F", help="share of bottleneck channels dropped (default: 0.1)")
    add("--instances", type=int, default=16, metavar="N", help="--task instance: the most objects found (default: 16)")
    add("--backbone", choices=BACKBONES, default="resnet18", help="--task detection: its body (default: resnet18)")
    add(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="images of a step, on all ranks together; a multiple of 16 on each wastes nothing in NVFP4 (default: 16)",
    )
    add("--lr", type=float, default=1e-3, metavar="F", help="highest learning rate of AdamW (default: 0.001)")
    add("--weight-decay", type=float, default=1e-2, metavar="F", help="default: 0.01")
    add("--seed", type=int, default=0, metavar="N", help="default: 0")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--log-every", type=int, default=10, metavar="N", help="a line every N steps (default: 10)")
    add("--eval-every", type=int, default=1, metavar="N", help="validate every N epochs (default: 1)")
    add("--out", type=Path, default=Path("runs/unet_coco"), metavar="DIR", help="results (default: runs/unet_coco)")
    add("--resume", action="store_true", help="go on from DIR's checkpoints; a precision without one starts anew")
    add(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that load data (default: 0, load in the main process)",
    )
    add("--pictures", type=int, default=4, metavar="N", help="validation images to show predictions of (default: 4)")
    add(
        "--deterministic",
        action="store_true",
        help="on a GPU, and on more than two ranks: choose deterministic kernels and an order of summation, so that "
        "a resume is bit-exact there too",
    )
    add(
        "--parallel", choices=("ddp", "fsdp"), default="ddp", help="how torchrun's ranks share the model (default: ddp)"
    )
    add("--share-amax", action="store_true", help="NVFP4 under torchrun: one tensor scale for all ranks")
    add(
        "--timeout",
        type=int,
        default=600,
        metavar="SECONDS",
        help="how long a rank waits for another before the job ends (default: 600)",
    )
    add(
        "--no-wandb",
        dest="wandb",
        action="store_false",
        help="do not write a W&B log (offline unless WANDB_MODE says otherwise)",
    )
    raw = parser.parse_args(arguments)
    values = vars(raw)
    values["classes"] = tuple(name.strip() for name in raw.classes.split(",") if name.strip()) if raw.classes else None
    values["precisions"] = tuple(raw.precisions)
    values["image_size"] = tuple(raw.image_size or (96, 96))
    values["recipe"] = raw.recipe or ("detection" if raw.task == "detection" else "unet")
    settings = Settings(**values)
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    least = {
        "epochs": 1,
        "steps": 1,
        "schedule_steps": 1,
        "batch_size": 1,
        "instances": 1,
        "log_every": 1,
        "eval_every": 1,
        "timeout": 1,
        "workers": 0,
        "pictures": 0,
    }
    for name, low in {**least, "seed": 0}.items():
        value = getattr(settings, name)
        if value is not None and value < low:
            raise value_error(
                f"--{name.replace('_', '-')} is out of range.",
                got=str(value),
                needs=f"an integer >= {low}",
                fix="correct it",
            )
    for name, low_f, high in (("scale", 0.0, 64.0), ("lr", 0.0, 1e3)):
        if not low_f < getattr(settings, name) <= high:
            raise value_error(
                f"--{name} is out of range.",
                got=str(getattr(settings, name)),
                needs=f"> 0 and <= {high:g}",
                fix="correct it",
            )
    if not 0 <= settings.dropout < 1 or not settings.weight_decay >= 0:
        raise value_error(
            "--dropout or --weight-decay is out of range.",
            got=f"{settings.dropout}, {settings.weight_decay}",
            needs="0 <= dropout < 1 and weight decay >= 0",
            fix="correct it",
        )
    if not 0 < settings.val_share < 1:
        raise value_error(
            "--val-share is out of range.", got=str(settings.val_share), needs="> 0 and < 1", fix="--val-share 0.5"
        )
    if min(settings.image_size) < 16:
        raise value_error(
            "--image-size is too small.",
            got=f"{settings.image_size[0]} {settings.image_size[1]}",
            needs="at least 16 16, because the UNet halves the image four times",
            fix="--image-size 96 96",
        )


def choose_device(name: str) -> torch.device:
    """The device to train on: `auto` is cuda where there is one.

    Raises:
        ValueError: a name that is none of auto, cpu, cuda, cuda:N.
        RuntimeError: a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise value_error(
            "--device: unknown device.", got=repr(name), needs="auto, cpu, cuda or cuda:N", fix="--device auto"
        )
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise runtime_error(
            f"--device {name} is not there.",
            got=f"{torch.cuda.device_count()} CUDA device(s)",
            needs=f"at least {int(index or 0) + 1}, and a CUDA build of torch",
            fix="--device cpu",
        )
    return torch.device(name)
