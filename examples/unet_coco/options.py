"""Read the options of train.py into one frozen object.

`--epochs` sets the length of the cosine schedule, lr(t) = lr / 2 * (1 + cos(pi t / T)) with T = epochs * steps per
epoch (or --schedule-steps); `--steps` only says where to stop. So a run that is stopped by --steps and continued by
--resume takes exactly the steps of an uninterrupted one. Values that cannot train are refused before any data is read.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from te_nvfp4_cv.backend.dispatch import BACKENDS, bf16_is_native
from te_nvfp4_cv.errors import runtime_error, value_error

from .data import LAYOUTS
from .unet import ACTIVATIONS

TASKS = ("semantic", "instance", "detection")
BACKBONES = ("resnet18", "resnet34", "resnet50")
SAMPLES = 20  # columns of heatmaps that people can read, at each of which a step takes two or three times as long
LOSS_DEFAULTS = {"class_weights": "none", "dice_weight": 1.0, "ce_weight": 1.0}


@dataclass(frozen=True)
class Settings:
    """Hold the options, one attribute each."""

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
    high_precision_last: int
    telemetry_every: int | None
    save_every: int
    sharded_checkpoints: bool
    tensorboard: bool
    timeout: int
    wandb: bool
    class_weights: str
    dice_weight: float
    ce_weight: float
    init_from: Path | None
    init_skip: tuple[str, ...]
    compute: str
    backend: str
    learn_scales: str
    bundles: bool
    spike_factor: float

    def changed_loss(self) -> dict[str, str | float]:
        """Return the options of the loss that are not at their defaults."""
        return {name: getattr(self, name) for name, usual in LOSS_DEFAULTS.items() if getattr(self, name) != usual}


def parse_options(arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line.

    Raises:
        ValueError: If a value is out of its range.
        SystemExit: If argparse refuses an option, and for --help.
    """
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a UNet or a detector in each precision from the same seed and data order, and compare.",
    )
    add = parser.add_argument
    add("--task", choices=TASKS, default="semantic", help="what the model learns (default: semantic)")
    add(
        "--data",
        metavar="ROOT",
        help="root of the data; without it a set of drawn shapes is written next to --out and used",
    )
    add("--layout", choices=LAYOUTS, default="coco", help="layout of ROOT (default: coco)")
    add("--classes", metavar="NAME,...", help="classes to learn; the rest is background (default: all)")
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
        metavar="P",
        help="fp32, fp16, bf16, nvfp4 or recipes (default: that of --compute, and nvfp4)",
    )
    add(
        "--recipe",
        metavar="NAME_OR_PATH",
        help="the recipe that nvfp4 means (default: detection for --task detection, else unet)",
    )
    add(
        "--compute",
        choices=("bf16", "fp16", "fp32", "auto"),
        default="auto",
        help="dtype of the activations under nvfp4 and recipes; fp32: no torch.autocast; auto: bf16 where the device "
        "has units for it, else fp32 (default: auto)",
    )
    add(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="where NVFP4 layers run; auto: what this machine does best, and after --resume what the run began with "
        "(default: auto)",
    )
    add(
        "--epochs",
        type=int,
        default=20,
        metavar="N",
        help="passes over the training images; sets the length of the cosine schedule (default: 20)",
    )
    add("--steps", type=int, metavar="N", help="stop after N steps in total, if --epochs has not ended before")
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
    add("--backbone", choices=BACKBONES, default="resnet18", help="--task detection: the body (default: resnet18)")
    add(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="images per step, on all ranks together; a multiple of 16 on each wastes nothing in NVFP4 (default: 16)",
    )
    add("--lr", type=float, default=1e-3, metavar="F", help="highest learning rate of AdamW (default: 0.001)")
    add("--weight-decay", type=float, default=1e-2, metavar="F", help="default: 0.01")
    add(
        "--class-weights",
        choices=("none", "median"),
        default="none",
        help="weight of each class in the loss; median gives rare classes a larger weight (default: none)",
    )
    add("--dice-weight", type=float, default=1.0, metavar="F", help="factor on the Dice loss (default: 1)")
    add("--ce-weight", type=float, default=1.0, metavar="F", help="factor on the cross-entropy (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="default: 0")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--log-every", type=int, default=10, metavar="N", help="print a line every N steps (default: 10)")
    add("--eval-every", type=int, default=1, metavar="N", help="validate every N epochs (default: 1)")
    add(
        "--save-every",
        type=int,
        default=0,
        metavar="N",
        help="write a checkpoint every N steps too (default: 0, at the end of each epoch only)",
    )
    add(
        "--sharded-checkpoints",
        action="store_true",
        help="--parallel fsdp: each rank writes its part of a checkpoint, and none holds the whole",
    )
    add("--out", type=Path, default=Path("runs/unet_coco"), metavar="DIR", help="results (default: runs/unet_coco)")
    add("--resume", action="store_true", help="continue from DIR's checkpoints; a precision without one starts fresh")
    add(
        "--init-from",
        type=Path,
        metavar="FILE",
        help="start from the weights of a checkpoint of this trainer, a state_dict (.pt) or .safetensors",
    )
    add("--init-skip", metavar="PATTERN,...", help="tensors that --init-from leaves as they are, such as head.*")
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
    add("--share-amax", action="store_true", help="NVFP4 under torchrun: use one tensor scale for all ranks")
    add(
        "--timeout",
        type=int,
        default=600,
        metavar="SECONDS",
        help="how long a rank waits for another one before the job ends (default: 600)",
    )
    add(
        "--high-precision-last",
        type=int,
        default=0,
        metavar="K",
        help="turn NVFP4 off for the last K epochs (default: 0)",
    )
    add(
        "--telemetry-every",
        type=int,
        metavar="N",
        help="sample weights, activations and gradients in every Nth step and the last one; 0: never (default: as "
        f"often as gives {SAMPLES} columns in heatmaps)",
    )
    add("--tensorboard", action="store_true", help="write the telemetry for TensorBoard, too")
    add(
        "--learn-scales",
        choices=("none", "scale", "clip"),
        default="none",
        help="learn a multiplier of the block scales, or a clipping threshold, for each NVFP4 layer (default: none)",
    )
    add(
        "--no-bundles",
        dest="bundles",
        action="store_false",
        help="do not save steps whose loss jumps or is not finite for te-nvfp4-cv diagnose",
    )
    add(
        "--spike-factor",
        type=float,
        default=3.0,
        metavar="F",
        help="a loss jumps where it exceeds F times the median of the last 100 (default: 3)",
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
    values["init_skip"] = tuple(name.strip() for name in (raw.init_skip or "").split(",") if name.strip())
    if raw.compute == "auto":
        values["compute"] = fast_dtype(raw.device)
    values["precisions"] = tuple(raw.precisions or (values["compute"], "nvfp4"))
    values["image_size"] = tuple(raw.image_size or (96, 96))
    values["recipe"] = raw.recipe or ("detection" if raw.task == "detection" else "unet")
    settings = Settings(**values)
    _check(settings)
    if "bf16" in (*settings.precisions, settings.compute) and fast_dtype(settings.device) != "bf16":
        print(
            "note: this device has no units for bf16, which takes several times as long as fp32 here; compare by "
            "accuracy, not by time. Faster: --precisions fp32 nvfp4 --compute fp32",
            file=sys.stderr,
        )
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
        "high_precision_last": 0,
        "telemetry_every": 0,
        "save_every": 0,
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
    weights = settings.dice_weight, settings.ce_weight
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise value_error(
            "--dice-weight or --ce-weight is out of range.",
            got=f"{weights[0]}, {weights[1]}",
            needs="finite numbers >= 0, not both 0",
            fix="leave them out: both are 1",
        )
    if settings.task != "semantic" and settings.changed_loss():
        named = [f"--{name.replace('_', '-')}" for name in settings.changed_loss()]
        raise value_error(
            f"{' and '.join(named)} cannot be used with --task {settings.task}.",
            got=f"--task {settings.task}, whose loss is not Dice + cross-entropy over pixels",
            needs="--task semantic",
            fix=f"leave out {' and '.join(named)}",
        )
    if settings.init_skip and settings.init_from is None:
        raise value_error(
            "--init-skip has nothing to skip.",
            got=f"--init-skip {','.join(settings.init_skip)} without --init-from",
            needs="--init-from FILE",
            fix="name the file to start from, or leave --init-skip out",
        )
    if not 1 < settings.spike_factor < math.inf:
        raise value_error(
            "--spike-factor is out of range.",
            got=f"{settings.spike_factor}",
            needs="a finite factor > 1",
            fix="correct it",
        )
    if settings.parallel == "fsdp" and settings.learn_scales != "none":
        raise value_error(
            "--parallel fsdp does not go with --learn-scales.",
            got=f"--learn-scales {settings.learn_scales}",
            needs="whole weights on each rank",
            fix="--parallel ddp",
        )
    if settings.sharded_checkpoints and settings.parallel != "fsdp":
        raise value_error(
            "--sharded-checkpoints has no shards to write.",
            got=f"--parallel {settings.parallel}",
            needs="--parallel fsdp",
            fix="leave it out: a checkpoint of shards is resumed without it, too",
        )
    if settings.high_precision_last >= settings.epochs:
        raise value_error(
            "--high-precision-last leaves no epoch in NVFP4.",
            got=f"--high-precision-last {settings.high_precision_last} --epochs {settings.epochs}",
            needs="fewer than --epochs",
            fix="lower it, or --precisions bf16",
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


def fast_dtype(device: str) -> str:
    """Return bf16 if that device (as --device names it) has arithmetic for it, else fp32."""
    cpu = device.startswith("cpu") or not torch.cuda.is_available()
    return "bf16" if bf16_is_native(torch.device("cpu" if cpu else "cuda")) else "fp32"


def choose_device(name: str) -> torch.device:
    """Return the device to train on; `auto` is cuda if there is a GPU, else cpu.

    Raises:
        ValueError: If the name is not auto, cpu, cuda or cuda:N.
        RuntimeError: If the GPU does not exist.
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
            f"--device {name} does not exist.",
            got=f"{torch.cuda.device_count()} CUDA device(s)",
            needs=f"at least {int(index or 0) + 1}, and a CUDA build of torch",
            fix="--device cpu",
        )
    return torch.device(name)
