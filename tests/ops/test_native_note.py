"""The note that the CPU kernels are being compiled: a log record that reaches stderr unless the user says otherwise."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from te_nvfp4_cv.backend import native

NOTE = "compiling the CPU kernels"


@pytest.fixture
def broken_compiler(tmp_path) -> str:
    """A compiler that names its version and fails at once: the note comes before the work."""
    path = tmp_path / "compiler"
    path.write_text('#!/bin/sh\ncase "$1" in --version) echo broken 1.0;; *) exit 1;; esac\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("setting", "count"),
    [("", 1), ("import logging; logging.getLogger('te_nvfp4_cv').setLevel(logging.ERROR); ", 0)],
    ids=["no logging set up", "turned off"],
)
def test_the_note_is_seen_once_on_stderr_and_can_be_turned_off(broken_compiler, tmp_path, setting, count):
    code = setting + "from te_nvfp4_cv.backend import native; native.load(); native.load(); print('end')"
    environment = os.environ | {"CXX": broken_compiler, "TE_NVFP4_CV_CACHE": str(tmp_path / "cache")}
    environment.pop("TE_NVFP4_CV_NATIVE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "end\n", done.stderr
    assert done.stderr.count(NOTE) == count


def test_the_library_sets_up_no_logging_of_its_own(broken_compiler, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TE_NVFP4_CV_CACHE", str(tmp_path / "cache"))
    root_handlers = list(logging.getLogger().handlers)
    with pytest.raises(OSError, match="could not build"):
        native._build(broken_compiler)
    (record,) = [record for record in caplog.records if NOTE in record.getMessage()]
    assert record.name == "te_nvfp4_cv" and record.levelno == logging.WARNING
    assert logging.getLogger().handlers == root_handlers and logging.getLogger("te_nvfp4_cv").handlers == []
