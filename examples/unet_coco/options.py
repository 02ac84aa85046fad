"""Read the options of train.py, from the command line and from a YAML file, into one frozen object.

    --config FILE.yaml    any options by their names with underscores (epochs: 20, image_size: [96, 128]); the command
                          line wins over the file. Every run writes what it ran with as config.yaml in its folder

`--epochs` sets the length of the cosine schedule, lr(t) = lr / 2 * (1 + cos(pi t / T)) with T = epochs * steps per
epoch (or --schedule-steps); `--steps` only says where to stop. So a run that is stopped by --steps and continued by
--resume takes exactly the steps of an uninterrupted one. Values that cannot train are refused before any data is read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from te_nvfp4_cv.backend.dispatch import bf16_is_native
from te_nvfp4_cv.errors import runtime_error, value_error

from .augmentation import AUGMENTATIONS
from .command_line import read_values

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
    backbone_weights: str | None
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
    ema: float
    augment: tuple[str, ...]

    def changed_loss(self) -> dict[str, str | float]:
        """Return the options of the loss that are not at their defaults."""
        return {name: getattr(self, name) for name, usual in LOSS_DEFAULTS.items() if getattr(self, name) != usual}


def parse_options(arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line, and the file of --config.

    Raises:
        ValueError: If a value is out of its range, or the file cannot be used.
        SystemExit: If the command line is no command line of the trainer, and for --help and --version.
    """
    values = read_values(sys.argv[1:] if arguments is None else arguments)
    for key in ("data", "out", "init_from", "recipe", "backbone_weights"):  # a shell expands ~, a file has none
        if values[key] is not None:
            values[key] = type(values[key])(os.path.expanduser(values[key]))
    values["classes"] = _names(values["classes"]) or None
    values["init_skip"] = _names(values["init_skip"])
    if values["compute"] == "auto":
        values["compute"] = fast_dtype(values["device"])
    values["precisions"] = _names(values["precisions"]) or (values["compute"], "nvfp4")
    values["image_size"] = tuple(values["image_size"])
    values["augment"] = tuple(name for name in AUGMENTATIONS if name in values["augment"])
    values["recipe"] = values["recipe"] or ("detection" if values["task"] == "detection" else "unet")
    settings = Settings(**values)
    _check(settings)
    if "bf16" in (*settings.precisions, settings.compute) and fast_dtype(settings.device) != "bf16":
        print(
            "note: this device has no units for bf16, which takes several times as long as fp32 here; compare by "
            "accuracy, not by time. Faster: --precisions fp32 nvfp4 --compute fp32",
            file=sys.stderr,
        )
    return settings


def as_yaml(settings: Settings) -> str:
    """Return the file that repeats a run: train.py --config FILE."""
    values = {key: _plain(value) for key, value in vars(settings).items()}
    values["resume"] = False  # a repetition begins at the beginning
    return yaml.safe_dump(values, sort_keys=False)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def _names(value: Any) -> tuple[str, ...]:
    """Return names that come with commas between them, or as a list."""
    listed = value.split(",") if isinstance(value, str) else value or ()
    return tuple(name for item in listed if (name := str(item).strip()))


def _check(settings: Settings) -> None:
    if not settings.dice_weight and not settings.ce_weight:
        raise value_error(
            "--dice-weight or --ce-weight is out of range.",
            got="0, 0",
            needs="one that is not 0",
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
    if settings.backbone_weights and settings.task != "detection":
        raise value_error(
            "--backbone-weights has no backbone to go to.",
            got=f"--task {settings.task}, whose UNet has none",
            needs="--task detection",
            fix="leave it out; --init-from FILE takes weights of a whole UNet",
        )
    if settings.init_skip and settings.init_from is None:
        raise value_error(
            "--init-skip has nothing to skip.",
            got=f"--init-skip {','.join(settings.init_skip)} without --init-from",
            needs="--init-from FILE",
            fix="name the file to start from, or leave --init-skip out",
        )
    if settings.parallel == "fsdp" and settings.learn_scales != "none":
        raise value_error(
            "--parallel fsdp does not go with --learn-scales.",
            got=f"--learn-scales {settings.learn_scales}",
            needs="whole weights on each rank",
            fix="--parallel ddp",
        )
    if settings.parallel == "fsdp" and settings.ema:
        raise value_error(
            "--parallel fsdp does not go with --ema.",
            got=f"--ema {settings.ema:g}",
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
    if len(settings.image_size) != 2 or min(settings.image_size) < 16:
        raise value_error(
            "--image-size is too small.",
            got=" ".join(map(str, settings.image_size)),
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
