"""Which compiled kernels a processor gets from a wheel or compiles here, where they are kept, and what doctor says."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from te_nvfp4_cv.backend import cache, compilation, dispatch, native
from te_nvfp4_cv.backend.explain import INSTRUCTIONS, explain

CPU = torch.device("cpu")
V3 = "fpu sse2 ssse3 avx avx2 bmi1 bmi2 f16c fma abm movbe"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Pretend that a wheel has brought kernels for every machine; their content is never loaded."""
    monkeypatch.delenv("TE_NVFP4_CV_MACHINE", raising=False)
    folder = tmp_path / "backend"
    folder.mkdir()
    monkeypatch.setattr(compilation, "_FOLDER", folder)
    for machine in compilation.WHEEL_MACHINES:
        compilation.wheel_object(machine).touch()
    return folder


@pytest.mark.parametrize(
    ("flags", "machine"),
    [
        ("flags : fpu sse2 avx", "plain"),
        ("", "plain"),
        (f"flags : {V3}", "avx2"),
        (f"flags : {V4}", "avx2"),
        (f"flags : {V3} avx_vnni", "avx_vnni"),
        (f"flags : {V4} avx512_vnni", "avx512_vnni"),
        (f"flags : {V4} avx512_vnni avx_vnni", "avx512_vnni"),
        (f"flags : {V3} avx512f avx512_vnni", "avx2"),
    ],
    ids=["2011", "nothing known", "Zen 3", "Skylake-X", "Alder Lake", "Zen 4", "Sapphire Rapids", "part of AVX-512"],
)
def test_the_best_kernels_that_the_processor_runs_are_chosen(wheel, monkeypatch, flags, machine):
    monkeypatch.setattr(compilation, "features", lambda: flags)
    assert native._in_wheel() == compilation.wheel_object(machine)


def test_a_machine_that_is_asked_for_is_taken(wheel, monkeypatch):
    monkeypatch.setattr(compilation, "features", lambda: f"flags : {V4} avx512_vnni")
    monkeypatch.setenv("TE_NVFP4_CV_MACHINE", "avx2")
    assert native._in_wheel() == compilation.wheel_object("avx2")
    monkeypatch.setenv("TE_NVFP4_CV_MACHINE", "neon_dotprod")
    assert native._in_wheel() is None
    monkeypatch.setenv("TE_NVFP4_CV_MACHINE", "z80")
    with pytest.raises(ValueError, match="unknown machine"):
        native._in_wheel()


def test_kernels_of_other_sources_are_not_taken(wheel, monkeypatch, tmp_path):
    edited = tmp_path / "integer.cpp"
    edited.write_text(compilation.SOURCES[1].read_text() + "\n")
    monkeypatch.setattr(compilation, "SOURCES", [compilation.SOURCES[0], edited])
    assert native._in_wheel() is None


def test_doctor_says_which_kernels_run_and_what_goes_to_vendor(monkeypatch):
    if native.load() is None:
        pytest.skip("no compiler here")
    loop = native.load().nvfp4_machine().decode()
    for passed, tiles in ((True, False), (True, True), (False, False)):
        monkeypatch.setattr(dispatch, "_integer_passes", passed)
        monkeypatch.setattr("te_nvfp4_cv.backend.explain.torch_private.cpu_has_tiles", lambda tiles=tiles: tiles)
        said = explain(CPU)
        assert INSTRUCTIONS[loop] in said["kernels"] and "compiled on this machine" in said["kernels"]
        assert ("DO NOT match" in said["kernels"]) == (not passed)
        assert said["backend"] == (dispatch.BY_LAYER if passed else "vendor")
        assert ("row-scaled" in said["why"]) == passed and ("AMX" in said["why"]) == tiles


def test_doctor_without_kernels(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(dispatch, "_integer_passes", None)
    said = explain(CPU)
    assert said["backend"] == "vendor" and "plain torch" in said["why"] and said["kernels"].startswith("none: ")


def test_doctor_knows_every_loop(tmp_path):
    """Each name that integer.cpp gives its loop has words."""
    assert set(INSTRUCTIONS) == set(compilation.MACHINES) - {"native"}
    library = ctypes.CDLL(None)
    library._name = str(compilation.wheel_object("avx2"))
    assert native.of_wheel(library)
    library._name = str(tmp_path / "native_0.so")
    assert not native.of_wheel(library)


# ---- what is compiled here ------------------------------------------------------------------------------------------


def test_odd_compilers_raise_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "g++ '")  # a quote that does not close
    compilation.compiler()
    silent = tmp_path / "silent compiler"
    silent.write_text("#!/bin/sh\n")
    silent.chmod(0o755)
    monkeypatch.setenv("CXX", shlex.quote(str(silent)))
    cxx = compilation.compiler()
    assert compilation.cached(cxx, "native").suffix == ".so"
    with pytest.raises(OSError):  # it makes nothing, and nothing gets the name
        compilation.compile_here(cxx, "native", tmp_path / "kernels.so")
    assert [path.name for path in tmp_path.iterdir()] == [silent.name]


def test_other_users_may_read_what_is_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(compilation, "_build", lambda cxx, flags, link, target: Path(target).write_text("made") and "")
    before = os.umask(0o022)
    try:
        compilation.compile_here("g++", "native", tmp_path / "kernels.so")
    finally:
        os.umask(before)
    (made,) = tmp_path.iterdir()
    assert made.stat().st_mode & 0o777 == 0o644


@pytest.fixture
def only_read(monkeypatch, tmp_path):
    """Make a cache folder that cannot be written, as a container's image brings it."""
    folder = tmp_path / "image"
    folder.mkdir()
    may = os.access
    monkeypatch.setenv("TE_NVFP4_CV_CACHE", str(folder))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and may(path, mode))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache.forget()
    yield folder
    cache.forget()


def test_a_folder_that_is_only_read_serves(monkeypatch, only_read):
    cxx = compilation.compiler() or "g++"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "g++ 1", ""))
    name = compilation.cached(cxx, "native").name
    assert compilation.cached(cxx, "native").parent != only_read
    (only_read / name).write_text("kernels")
    assert compilation.cached(cxx, "native") == only_read / name
    device = torch.device("cpu")
    assert cache.write("check", device, {"passed": True})
    (answer,) = compilation.cache_folder().glob("check_*.json")
    answer.rename(only_read / answer.name)
    assert cache.read("check", device) == {"passed": True}


def test_without_any_folder_nothing_is_kept_and_nothing_raised(monkeypatch, only_read):
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: (_ for _ in ()).throw(FileNotFoundError("no usable folder")))
    device = torch.device("cpu")
    assert cache.passes("check", device, lambda: True) and cache.read("check", device) is None


def test_a_temporary_folder_goes_with_the_process(tmp_path):
    code = "import compilation; print(compilation.cache_folder())"
    variables = {"TE_NVFP4_CV_CACHE": str(tmp_path / "a file" / "cache"), "TMPDIR": str(tmp_path)}
    (tmp_path / "a file").write_text("")
    folder = Path(compilation.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=os.environ | variables, capture_output=True, text=True
    )
    assert Path(done.stdout.strip()).parent == tmp_path and not Path(done.stdout.strip()).exists()
