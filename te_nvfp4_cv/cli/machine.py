"""Run te-nvfp4-cv doctor, recipes, selftest and warm: what this machine would do, and whether it computes correctly."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from typing import Any

import torch

from te_nvfp4_cv.backend import dispatch, native
from te_nvfp4_cv.backend.cache import version
from te_nvfp4_cv.backend.explain import explain
from te_nvfp4_cv.backend.torch_private import cpu_multiplies_bf16
from te_nvfp4_cv.cli.shape import Command, show
from te_nvfp4_cv.recipe.files import list_recipes, recipe_folder

TORCH_FROM, TORCH_BELOW = (2, 11), (2, 16)  # as in pyproject.toml


def _no_options(parser: argparse.ArgumentParser) -> None:
    """Add no option: --json is all that the command takes."""


def _doctor(options: argparse.Namespace) -> int:
    report = doctor()
    show(report, "\n".join(_lines(report)), options.json)
    return 2 if report["problems"] else 0


def _recipes(options: argparse.Namespace) -> int:
    report = dict(list_recipes())
    show(report, "\n".join(_lines(report)), options.json)
    return 0


def _selftest_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="PATH", help="write a report to share: GPU and versions, no names or paths")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--backend", default="auto", choices=dispatch.BACKENDS, help="default: all that can run there")


def _selftest(options: argparse.Namespace) -> int:
    from te_nvfp4_cv import selftest

    return selftest.main(options.device, options.backend, options.json)


def _warm_options(parser: argparse.ArgumentParser) -> None:
    from te_nvfp4_cv.cli.warm import warm_options

    warm_options(parser)


def _warm(options: argparse.Namespace) -> int:
    from te_nvfp4_cv.cli.warm import warm

    return warm(options)


COMMANDS = (
    Command("doctor", "what this machine would do, and why", _no_options, _doctor),
    Command("recipes", "the recipes that come with it", _no_options, _recipes),
    Command(
        "selftest",
        "compare what this machine computes with the reference; a GPU takes up to two minutes",
        _selftest_options,
        _selftest,
        own_json=True,  # its --json takes a path
    ),
    Command("warm", "compile a training step's GPU kernels beforehand, and move them", _warm_options, _warm),
)


# ---- reports --------------------------------------------------------------------------------------------------------


def doctor() -> dict[str, Any]:
    """Describe what this machine would do: versions, devices with their backends, compiler, memory format, problems."""
    devices = [torch.device("cpu")] + [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "te_nvfp4_cv": _version("te_nvfp4_cv"),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "triton": _version("triton"),
        "compiler": native.compiler() or _without_compiler(),
        "devices": {str(device): _device(device) for device in devices},
        "memory format": "torch.channels_last for model and images (channels_last_3d for 3-D): channels are the GEMMs' "
        "contracted index",
        "recipes": ", ".join(list_recipes()) or "none",
    }
    report["problems"] = list(_problems(recipe_folder().is_dir()))
    return report


def _without_compiler() -> str:
    if native.load() is None:
        return "none: quantization on the CPU runs in plain torch, slower"
    return "none: the CPU kernels are there without it"


def _device(device: torch.device) -> dict[str, Any]:
    choice = explain(device)  # the backend, why it was chosen, and what the other backends need
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
    return {"name": name, **choice, "autocast dtype": _autocast_dtype(device)}


def _autocast_dtype(device: torch.device) -> str:
    """Return the dtype to give torch.autocast on this device, and the reason."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16 with GradScaler: no bfloat16 here"
    if cpu_multiplies_bf16():
        return "bfloat16: in hardware"
    # Without such units torch converts bfloat16 to float32 and back, around each operation.
    return "none: this CPU has no bfloat16 units, float32 is faster"


def _version(package: str) -> str:
    found = version(package)
    return "not installed, found on the path" if found == "unknown" else found


def _problems(has_recipes: bool) -> Iterator[str]:
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])  # "2.11.0+cpu" -> (2, 11)
    if not TORCH_FROM <= release < TORCH_BELOW:
        yield f"torch {torch.__version__} is outside >=2.11,<2.16: install a version in that range"
    if not has_recipes:
        yield "no recipes folder: install the package again with pip install ."


def _lines(report: dict[str, Any], indent: str = "") -> list[str]:
    """Show a report as text, a line per entry; a table inside it is indented."""
    width = max((len(key) for key in report), default=0)
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        else:
            shown = "; ".join(str(item) for item in value) or "none" if isinstance(value, (list, tuple)) else value
            lines.append(f"{indent}{key.ljust(width)}  {shown}")
    return lines
