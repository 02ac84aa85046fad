"""Write files so that they are whole or absent, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import glob
import os
import time
from pathlib import Path
from typing import BinaryIO

from te_nvfp4_cv.errors import runtime_error


def write_atomically(
    path: Path, content: bytes | memoryview, fix: str = "free some space, then try again", before: bytes = b""
) -> None:
    """Replace `path` by `content`, or leave it as it was.

    The content goes to a temporary file in the same folder, which is made if it is missing. The file is synchronized
    to the disk and renamed, and the folder is synchronized.

    Args:
        fix: what the user should do if it fails, for the message.
        before: bytes to write before the content, which may be too large to be copied.
    Raises:
        RuntimeError: the disk is full or the folder cannot be written. The file from before is untouched.
    """
    path = path.resolve() if path.is_symlink() else path  # write the file behind the link, so that the link stays
    # Threads, and processes of other machines with the same number, may write the same file: each has its own draft.
    draft = path.with_name(f".{path.name}.{os.urandom(4).hex()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as file:
            file.write(before)
            _write_all(file, content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException as error:  # Ctrl-C must remove the draft too
        with contextlib.suppress(OSError):  # the draft may not exist: its parent may be no folder
            draft.unlink()
        if not isinstance(error, OSError):
            raise
        untouched = f"; the file from before is untouched: {path}" if path.exists() else ""
        raise runtime_error(
            f"{path} could not be written.",
            got=f"{error}{untouched}",
            needs=f"{len(before) + len(content)} bytes free in {path.parent}, and the right to write there",
            fix=fix,
        ) from error
    if os.name == "posix":
        with contextlib.suppress(OSError):  # it is written; some network folders cannot sync
            _sync_folder(path.parent)


def remove_drafts(folder: Path, start: str, before: float | None = None) -> None:
    """Remove temporary files that a killed process has left: those whose files' names begin with `start`.

    A draft stays if its process runs, or if it is younger than an hour: it may be that of another machine.

    Args:
        before: in a folder that is the caller's alone, when the caller began (time.time()): older drafts are removed,
            whatever runs now under the number of their process.
    """
    for draft in folder.glob(f".{glob.escape(start)}*.*.tmp"):
        pid = draft.name.removesuffix(".tmp").rpartition(".")[2]
        with contextlib.suppress(OSError):  # another process may have removed it
            written = draft.stat().st_mtime
            if not pid.isdigit():
                continue
            if written < before if before is not None else time.time() - written > 3600 and not _runs(int(pid)):
                draft.unlink()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def _sync_folder(path: Path) -> None:
    """Flush a folder to the disk: without it, a rename in it may be lost when the power fails."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_all(file: BinaryIO, content: bytes | memoryview, chunk: int = 1 << 24) -> None:
    """Write in chunks of 16 MiB."""
    for start in range(0, len(content), chunk):
        file.write(content[start : start + chunk])
