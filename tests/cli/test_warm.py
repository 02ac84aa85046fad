"""te-nvfp4-cv warm: kernels compiled for a GPU that is not here, moved, and found again without the compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from te_nvfp4_cv import cli
from te_nvfp4_cv.cli import warm
from te_nvfp4_cv.ops.conv import vendor

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[2]
MODEL = "import torch.nn as nn\ndef build():\n    return nn.Sequential(nn.Linear(16, 16), nn.ReLU())\n"


def run(*arguments: str, cache: Path) -> dict[str, object]:
    """The command in a process of its own, with a cache of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "te_nvfp4_cv.cli", "warm", "--json", *arguments]
    environment["TRITON_CACHE_DIR"] = str(cache)
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
def test_kernels_compile_here_and_are_found_elsewhere(tmp_path):
    (tmp_path / "net.py").write_text(MODEL)
    model = (f"{tmp_path}/net.py:build", "--input", "16", "--recipe", "delayed", "--capability", "9.0")
    file, first, second = tmp_path / "kernels.tar.xz", tmp_path / "first", tmp_path / "second"
    made = run(*model, "--save", str(file), cache=first)
    assert made["saved"] == made["compiled"] > 8 and made["launches"] > made["compiled"]
    with tarfile.open(file) as archive:
        content = b"".join(archive.extractfile(member).read() for member in archive if member.name.endswith(".cubin"))
        assert b"sm_90" in content
        owners = {(member.uname, member.uid, member.mtime) for member in archive}
    assert owners == {("", 0, 0)} and file.stat().st_size < 400_000
    first.rename(tmp_path / "gone")  # a list of files that still named the first place would find nothing
    moved = run(*model, "--load", str(file), cache=second)
    assert moved["fits"] is True and moved["loaded"] == made["saved"] and moved["compiled"] == made["compiled"]
    # Triton 3.9 compiles anew where one of the listed files is missing.
    lists = [json.loads(path.read_text())["child_paths"] for path in second.rglob("__grp__*")]
    assert len(lists) == made["saved"] and all(Path(path).is_file() for files in lists for path in files.values())
    # The compiler leaves its intermediate code; what was loaded has none.
    assert not list(second.rglob("*.ttir")) and len(list(second.rglob("*.cubin"))) == made["saved"]


def test_another_build_of_triton_is_told(tmp_path, monkeypatch, capsys):
    entry = tmp_path / "cache" / "KEY"
    entry.mkdir(parents=True)
    for name, content in (("k.cubin", "code"), ("k.json", "{}"), ("k.ptx", "text")):
        (entry / name).write_text(content)
    assert warm.pack(tmp_path / "cache", tmp_path / "k.tar.xz") == 1
    assert warm.load(tmp_path / "k.tar.xz", tmp_path / "new")["fits"] is True
    assert sorted(path.name for path in (tmp_path / "new" / "KEY").iterdir()) == ["k.cubin", "k.json"]
    monkeypatch.setattr(warm, "version", lambda package: "0.0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "newer"))
    assert cli.main(["warm", "--load", str(tmp_path / "k.tar.xz")]) == 1
    assert "fits False" in capsys.readouterr().out


def wheel(tmp_path: Path, change: str = "", tag: str = "cp399") -> Path:
    """Another Python's wheel of the Triton that is installed: the same Python files, and a library of its own."""
    import triton

    here = Path(triton.__file__).parent
    file = tmp_path / f"triton-{triton.__version__}-{tag}-{tag}-manylinux.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(here.rglob("*.py")):
            name = str(path.relative_to(here.parent))
            archive.writestr(name, path.read_bytes() + (b"#" if name == change else b""))
        archive.writestr("triton/_C/libtriton.so", b"library")
    return file


def test_kernels_are_named_for_another_python(tmp_path, monkeypatch):
    """The key that is taken is the one which Triton computes where the wheel is installed."""
    from triton.runtime import cache

    from te_nvfp4_cv.ops.triton import ahead

    before, key = cache.triton_key(), cache.triton_key
    monkeypatch.setattr(cache, "triton_key", key)  # put back after the test
    file = wheel(tmp_path)
    assert ahead.take_key_of(file) == "3.99"
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path / "installed")
    code = (
        "import importlib.util, sys\n"
        "folder = sys.argv[1]\n"
        "spec = importlib.util.spec_from_file_location('other', folder + '/triton/runtime/cache.py')\n"
        "source = open(spec.origin).read()\n"
        "text = source[source.index('def triton_key'):source.index('def get_cache_key')]\n"
        "import hashlib, os, sysconfig\n"
        "from triton import __version__\n"
        "names = {'__file__': spec.origin, '__version__': __version__}\n"
        "names |= {'hashlib': hashlib, 'os': os, 'sysconfig': sysconfig}\n"
        "exec(text, names)\n"
        "print(names['triton_key']())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "installed")], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert cache.triton_key() == found.stdout.strip() != before
    assert warm.versions("3.99")["python"] == "3.99"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_have_the_dtype_that_they_have_on_a_gpu(dtype):
    """It decides which kernel of tensor scales follows. torch's fake tensors answer for CUDA without one."""
    with FakeTensorMode():
        x, w, bias = (torch.empty(shape, dtype=dtype, device="cuda") for shape in ((32, 16), (8, 16), (8,)))
        for scaled in (True, False):
            for ours, theirs in (
                (warm._product(x, w.t(), scaled), vendor.product(x, w.t(), scaled)),
                (warm._linear(x, w, None, scaled), vendor.linear(x, w, None, scaled)),
                (warm._linear(x, w, bias, scaled), vendor.linear(x, w, bias, scaled)),
            ):
                assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)


@pytest.mark.parametrize("change", [{"change": "triton/language/core.py"}, {"tag": "py3"}], ids=str)
def test_a_wheel_of_another_triton_is_refused(tmp_path, change):
    from te_nvfp4_cv.ops.triton import ahead

    with pytest.raises(ValueError, match="not another build"):
        ahead.take_key_of(wheel(tmp_path, **change))
    with pytest.raises(ValueError, match="not another build"):
        ahead.take_key_of(tmp_path / "nothing.whl")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "nothing to do"),
        (["m:f", "--capability", "7.5"], "--capability"),
        (["m:f", "--capability", "sm_90"], "--capability"),
        (["--load", "nothing.tar.xz"], "nothing.tar.xz"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(arguments, told, capsys):
    assert cli.main(["warm", *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/b/c"])
def test_an_archive_writes_nothing_elsewhere(tmp_path, name):
    file = tmp_path / "k.tar.xz"
    with tarfile.open(file, "w:xz") as archive:
        warm._add(archive, name, b"x")
    with pytest.raises(ValueError, match="not an archive"):
        warm.load(file, tmp_path / "cache")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.tar.xz"]
