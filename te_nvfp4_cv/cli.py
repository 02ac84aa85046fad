"""The command line: te-nvfp4-cv doctor, recipes, selftest, diagnose, heatmaps, report.

doctor says what this machine would do: devices, the backend chosen on each and why, compiler, triton, the dtype for
autocast and the memory format to use. It changes nothing and needs no GPU. recipes lists the recipes that come with
the package. Both print text, or JSON with --json.
selftest computes what the reference computes and compares, on the GPU if there is one (selftest/), and writes a report
to share to the file of --json.
diagnose replays the training step of a bundle in high precision and in NVFP4 (sensitivity/diagnose.py).
heatmaps draws each telemetry file's layers over steps into a folder; report puts several such runs side by side into
one HTML file (telemetry/heatmaps.py, telemetry/report.py).
Exit status: 0; 1 for a self-test that failed or a step that is not finite; 2 for a wrong command line or an
installation that cannot run (torch outside the supported versions, a device or backend that is not there, a file that
is no bundle).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

from te_nvfp4_cv.ops import dispatch, native
from te_nvfp4_cv.recipe_files import list_recipes, recipe_folder

TORCH_FROM, TORCH_BELOW = (2, 11), (2, 16)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="te-nvfp4-cv", description="NVFP4 training for convolutional networks")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("doctor", "what this machine would do, and why"), ("recipes", "the recipes that come with it")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="print JSON")
    _selftest_options(commands)
    _diagnose_options(commands)
    _telemetry_options(commands)
    options = parser.parse_args(arguments)
    if options.command == "diagnose":
        return _diagnose(options)
    if options.command == "selftest":
        return _selftest(options)
    if options.command in ("heatmaps", "report"):
        return _telemetry(options)
    report: dict[str, Any] = {"doctor": doctor, "recipes": recipes}[options.command]()
    print(json.dumps(report, indent=2) if options.json else "\n".join(_lines(report)))
    return 2 if report.get("problems") else 0


def _selftest_options(commands: Any) -> None:
    text = "compare what this machine computes with the reference; a GPU takes up to two minutes"
    command = commands.add_parser("selftest", help=text, description=text)
    command.add_argument("--json", metavar="PATH", help="write a report to share: GPU and versions, no names or paths")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    command.add_argument("--backend", default="auto", choices=dispatch.BACKENDS, help="default: all that can run there")


def _selftest(options: argparse.Namespace) -> int:
    from te_nvfp4_cv import selftest

    try:
        return selftest.main(options.device, options.backend, options.json)
    except (ValueError, RuntimeError, OSError) as refusal:  # checks never raise: this is the device, backend or file
        print(f"error: {refusal}", file=sys.stderr)
        return 2


def _diagnose_options(commands: Any) -> None:
    text = "replay the training step of a bundle: what made it go wrong, layer by layer and GEMM by GEMM"
    command = commands.add_parser("diagnose", help=text, description=text)
    command.add_argument("bundle", metavar="CHECKPOINT", help="a file of nv.sensitivity.save_bundle")
    command.add_argument(
        "--builder",
        metavar="MODULE_OR_FILE.py:FUNCTION",
        help="build(arguments) -> (model, loss); its code runs (default: the bundle's, if it is an example's)",
    )
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    command.add_argument("--out", metavar="RECIPE.toml", help="write a recipe that avoids it to this new file")
    command.add_argument("--json", action="store_true", help="print JSON")


def _diagnose(options: argparse.Namespace) -> int:
    from te_nvfp4_cv.sensitivity import builder, diagnose

    try:
        if options.out is not None and os.path.exists(options.out):
            raise FileExistsError(f"--out {options.out}: the file exists; name a new one")
        build = None if options.builder is None else builder.given(options.builder)
        found = diagnose(options.bundle, build, options.device)
        print(json.dumps(found.to_dict(), indent=2) if options.json else found)
        written = None if options.out is None else found.save(options.out)
    except (ValueError, TypeError, RuntimeError, OSError) as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    if options.out is not None:
        text = f"recipe: {options.out}" if written is not None else "recipe: none written, there is nothing to suggest"
        print(text, file=sys.stderr)
    return 0 if found.finite else 1


def _telemetry_options(commands: Any) -> None:
    for name, text, out in (
        ("heatmaps", "draw telemetry: layers over steps, as PNG, HTML and JSON", "plots"),
        ("report", "put telemetry of several runs side by side in one HTML file", "report.html"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("runs", nargs="+", metavar="RUN.jsonl", help="the telemetry.jsonl of a run")
        command.add_argument("--out", default=out, help=f"default: {out}")
    command.add_argument("--force", action="store_true", help="replace a report that is there")


def _telemetry(options: argparse.Namespace) -> int:
    from te_nvfp4_cv import telemetry

    try:
        if options.command == "report":
            print(telemetry.write_report(options.runs, options.out, options.force))
        else:
            for run in [telemetry.read(path) for path in options.runs]:  # all are read before anything is written
                written = telemetry.render_heatmaps(run, options.out)
                print(f"{len(written)} files in {written[0].parents[2]}")
        return 0
    except (ValueError, RuntimeError, OSError) as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2


def recipes() -> dict[str, Any]:
    """The names of the shipped recipes and what each is for."""
    return dict(list_recipes())


def doctor() -> dict[str, Any]:
    """What this machine would do: versions, devices with their backend, compiler, dtype and memory format, problems."""
    devices = [torch.device("cpu")] + [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "te_nvfp4_cv": _version("te_nvfp4_cv"),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "triton": _version("triton"),
        "compiler": native.compiler() or "none: quantization on the CPU runs in plain torch, slower",
        "devices": {str(device): _device(device) for device in devices},
        "memory format": "torch.channels_last for model and images (channels_last_3d for 3-D): channels are the GEMMs' "
        "contracted index",
        "recipes": ", ".join(list_recipes()) or "none",
    }
    report["problems"] = _problems(recipe_folder().is_dir())
    return report


def _device(device: torch.device) -> dict[str, Any]:
    choice = dispatch.explain(device)  # backend, why, and what the others need
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
    return {
        "name": name,
        **choice,
        "autocast dtype": _autocast_dtype(device),
    }


def _autocast_dtype(device: torch.device) -> str:
    """The dtype to give torch.autocast on this device, and what speaks for it."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16 with GradScaler: no bfloat16 here"
    units = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return (
        "bfloat16: in hardware"
        if any(getattr(torch.cpu, unit, bool)() for unit in units)
        else "none: this CPU has no bfloat16 units, float32 is faster"
    )


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "absent"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed, found on the path"


def _problems(has_recipes: bool) -> list[str]:
    problems = []
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if not TORCH_FROM <= version < TORCH_BELOW:
        problems.append(f"torch {torch.__version__} is outside >=2.11,<2.16: install a version in that range")
    if not has_recipes:
        problems.append("no recipes folder: install the package again with pip install .")
    return problems


def _lines(report: dict[str, Any], indent: str = "") -> list[str]:
    width = max((len(key) for key in report), default=0)
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        else:
            shown = "; ".join(str(item) for item in value) or "none" if isinstance(value, (list, tuple)) else value
            lines.append(f"{indent}{key.ljust(width)}  {shown}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
