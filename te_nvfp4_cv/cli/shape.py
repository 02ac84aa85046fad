"""The one shape of all commands: --json, errors on stderr, exit status 0, 1 (a finding) or 2 (it cannot run)."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

ERRORS = (ValueError, TypeError, RuntimeError, OSError)  # what the library refuses with


@dataclass(frozen=True)
class Command:
    """One command. `run` returns the exit status; `own_json`: its --json means something else."""

    name: str
    text: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    own_json: bool = False

    def add(self, commands: Any) -> None:
        """Make the parser of the command."""
        parser = commands.add_parser(self.name, help=self.text, description=self.text)
        self.options(parser)
        if not self.own_json:
            parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(command=self)

    def __call__(self, options: argparse.Namespace) -> int:
        try:
            return self.run(options)
        except ERRORS as refusal:
            print(f"error: {refusal}", file=sys.stderr)
        except Exception as error:  # the user's model, mostly: its code runs
            traceback.print_exc()
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def show(report: Any, text: str, as_json: bool) -> None:
    """Print a report as it is wanted."""
    print(json.dumps(report, indent=2) if as_json else text)


def progress(items: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
    """The items, with a bar on stderr where that is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    yield from tqdm(items, what, total, file=sys.stderr, disable=None, leave=False)
