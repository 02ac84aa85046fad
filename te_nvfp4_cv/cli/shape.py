"""Give all commands one shape: --json, errors on stderr, exit status 0, 1 (a finding) or 2 (it cannot run)."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# With an explanation if they are ours, which need no traceback.
ERRORS = (ValueError, TypeError, RuntimeError, OSError)
_LIBRARIES = (str(Path(__file__).parents[1]), sys.prefix, sys.base_prefix, "<")  # "<": no file


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
        except Exception as error:
            text = str(error)
            if not isinstance(error, ERRORS) or _passed_other_code(error):  # its author needs the traceback
                traceback.print_exc()
                text = f"{type(error).__name__}: {error}"
            print(f"error: {text}", file=sys.stderr)
        return 2


def _passed_other_code(error: Exception) -> bool:
    """Return True if an error came through code that is no installed library: the user's model."""
    files = (frame.filename for frame in traceback.extract_tb(error.__traceback__))
    return any(not file.startswith(_LIBRARIES) for file in files)


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
