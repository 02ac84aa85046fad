"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO

from te_nvfp4_cv.errors import runtime_error


def write_atomically(path: Path, content: bytes | memoryview, fix: str = "free some space, then try again") -> None:
    """Replace `path` by `content`, or leave it as it was: temporary file beside it -> fsync -> rename -> fsync of the
    folder, which is made where it is missing.

    Args:
        fix: what to do when it fails, for the message.

    Raises:
        RuntimeError: the disk is full or the folder cannot be written; what was there before is untouched.
    """
    path = path.resolve() if path.is_symlink() else path  # the link stays
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as file:
            _write_all(file, content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException as error:  # Ctrl-C too
        with contextlib.suppress(OSError):  # a parent that is no folder
            draft.unlink()
        if not isinstance(error, OSError):
            raise
        kept = f"; the file from before is untouched: {path}" if path.exists() else ""
        raise runtime_error(
            f"{path} could not be written.",
            got=f"{error}{kept}",
            needs=f"{len(content)} bytes free in {path.parent}, and the right to write there",
            fix=fix,
        ) from error
    if os.name == "posix":
        with contextlib.suppress(OSError):  # written it is; some network folders cannot be told to sync
            _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_all(file: BinaryIO, content: bytes | memoryview, chunk: int = 1 << 24) -> None:
    for start in range(0, len(content), chunk):
        file.write(content[start : start + chunk])
