"""Give all commands one shape: --json, errors on stderr, exit status 0, 1 (a finding) or 2 (it cannot run)."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

ERRORS = (ValueError, TypeError, RuntimeError, OSError)  # these carry an explanation, and need no traceback


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    Attributes:
        text: one line of help.
        options: adds the command's options to its parser.
        run: runs the command and returns the exit status.
        own_json: `options` adds a --json of another meaning.
    """

    name: str
    text: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    own_json: bool = False

    def add(self, commands: Any) -> None:
        """Add the command's parser to the command line."""
        parser = commands.add_parser(self.name, help=self.text, description=self.text)
        self.options(parser)
        if not self.own_json:
            parser.add_argument("--json", action="store_true", help="print JSON")
        # argparse would store the command's name; with the object no second table is needed.
        parser.set_defaults(command=self)

    def __call__(self, options: argparse.Namespace) -> int:
        try:
            return self.run(options)
        except ERRORS as refusal:
            print(f"error: {refusal}", file=sys.stderr)
        except Exception as error:  # mostly raised by the user's model: its author needs the traceback
            traceback.print_exc()
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def show(report: Any, text: str, as_json: bool) -> None:
    """Print a report, as JSON or as text."""
    print(json.dumps(report, indent=2) if as_json else text)


def progress(items: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
    """Yield the items, with a progress bar on stderr if that is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    # disable=None: no bar where stderr is no terminal. stdout is left to the report.
    yield from tqdm(items, what, total, file=sys.stderr, disable=None, leave=False)
