"""Run the command line te-nvfp4-cv. `te-nvfp4-cv COMMAND --help` explains each command; all have one shape (shape.py).

    doctor, recipes, selftest, warm      this machine and this installation        machine.py
    coverage, try, scan, project, bench  a model: what runs in NVFP4, how fast     models.py
    quantize, export, verify             a trained model to an exported file       deploy.py
    diagnose, heatmaps, report           a training run                            runs.py

The exit status is 0 for success, 1 for a finding (a self-test that failed, a step that is not finite, a file that is
not what it claims), and 2 for a wrong command line or something that cannot run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from te_nvfp4_cv.cli import deploy, machine, models, runs
from te_nvfp4_cv.cli.shape import Command
from te_nvfp4_cv.version import __version__

COMMANDS: tuple[Command, ...] = (*machine.COMMANDS, *models.COMMANDS, *deploy.COMMANDS, *runs.COMMANDS)


def build_parser() -> tuple[argparse.ArgumentParser, Any]:
    """Return the parser of the command line, and the action whose `choices` are the commands' parsers."""
    parser = argparse.ArgumentParser(prog="te-nvfp4-cv", description="NVFP4 training for convolutional networks")
    parser.add_argument("--version", action="version", version=f"te-nvfp4-cv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser, commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    options = build_parser()[0].parse_args(arguments)
    # Not the name but the Command: its parser puts itself there (set_defaults in shape.py).
    chosen: Command = options.command
    return chosen(options)
