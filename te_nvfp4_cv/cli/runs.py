"""Run te-nvfp4-cv diagnose, heatmaps and report, which read the files that a training run left behind."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable

from te_nvfp4_cv.cli.shape import Command, progress, show


def _diagnose_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("bundle", metavar="BUNDLE", help="a file of nv.sensitivity.save_bundle")
    command.add_argument(
        "--builder",
        metavar="MODULE_OR_FILE.py:FUNCTION",
        help="build(arguments) -> (model, loss); its code runs (default: the bundle's, if it is an example's)",
    )
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    command.add_argument("--out", metavar="RECIPE.toml", help="write a recipe that avoids the problem to this new file")


def _diagnose(options: argparse.Namespace) -> int:
    from te_nvfp4_cv.cli.loading import function_of
    from te_nvfp4_cv.sensitivity import diagnose

    # Asked before the replays, which may take minutes; `save` refuses it once more.
    if options.out is not None and os.path.exists(options.out):
        raise FileExistsError(f"--out {options.out}: the file exists; name a new one")
    build = None if options.builder is None else function_of(options.builder, "--builder")
    found = diagnose(options.bundle, build, options.device)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
    if options.out is not None:
        written = found.save(options.out) is not None
        text = f"recipe: {options.out}" if written else "recipe: none written, there is nothing to suggest"
        print(text, file=sys.stderr)  # stdout may be read as JSON
    return 0 if found.finite else 1


def _telemetry_options(out: str, text: str, force: bool) -> Callable[[argparse.ArgumentParser], None]:
    def options(command: argparse.ArgumentParser) -> None:
        command.add_argument("runs", nargs="+", metavar="RUN.jsonl", help="the telemetry.jsonl of a run")
        command.add_argument("--out", default=out, metavar="PATH", help=f"{text} (default: {out})")
        if force:
            command.add_argument("--force", action="store_true", help="replace an existing report")

    return options


def _heatmaps(options: argparse.Namespace) -> int:
    from te_nvfp4_cv import telemetry

    runs = [telemetry.read(path) for path in options.runs]  # all are read before anything is written
    written = [telemetry.render_heatmaps(run, options.out) for run in progress(runs, "heatmaps")]
    # The first file is MODEL-RUN/weights/prequantize/mean.png, so this is the folder MODEL-RUN.
    folders = {str(files[0].parents[2]): len(files) for files in written}
    show(folders, "\n".join(f"{count} files in {folder}" for folder, count in folders.items()), options.json)
    return 0


def _report(options: argparse.Namespace) -> int:
    from te_nvfp4_cv import telemetry

    path = str(telemetry.write_report(options.runs, options.out, options.force))
    show({"report": path}, path, options.json)
    return 0


COMMANDS = (
    Command(
        "diagnose", "replay the training step of a bundle: what made it go wrong, layer by layer and GEMM by GEMM",
        _diagnose_options, _diagnose,
    ),
    Command(
        "heatmaps", "draw telemetry: layers over steps, as PNG, HTML and JSON",
        _telemetry_options("plots", "folder to write to", False), _heatmaps,
    ),
    Command(
        "report", "put telemetry of several runs side by side in one HTML file",
        _telemetry_options("report.html", "file to write", True), _report,
    ),
)
