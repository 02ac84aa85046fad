"""Check from the command line whether every layer of a file is what the file says it is.

    python -m te_nvfp4_cv.export.verify FILE [--json]

The exit status is 0 if every claim holds, 1 if a layer that claims NVFP4 is something else or the file is damaged,
2 if there is no such file, and 3 if nothing in the file was recognized.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from te_nvfp4_cv.export.verify import verify

NOTHING = 3  # the status of a file in which nothing was recognized


def run(path: str, as_json: bool) -> int:
    """Print the report of one file. Returns the exit status."""
    try:
        report = verify(path)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError, OSError) as error:
        # On stdout, as a report would be: a script that asked for JSON gets JSON for a damaged file, too.
        print(json.dumps({"source": path, "sound": False, "problems": [str(error)]}) if as_json else f"error: {error}")
        return 1
    print(json.dumps(report.to_dict(), indent=2) if as_json else report)
    if not report.sound:
        return 1
    return 0 if report.recognized else NOTHING


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m te_nvfp4_cv.export.verify",
        description="list the precision that each layer of a file really has",
    )
    parser.add_argument("file", help="a .safetensors file, the index of several, or an .onnx file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    return run(options.file, options.json)


if __name__ == "__main__":
    sys.exit(main())
