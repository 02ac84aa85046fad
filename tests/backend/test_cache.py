"""Which passed self-tests count: this GPU, this driver, these versions, these kernels, and a sound file."""

from __future__ import annotations

import json

import pytest
import torch

from te_nvfp4_cv.backend import cache, dispatch
from tests.backend import fake_gpu

GPU = fake_gpu.DEVICE


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    fake_gpu.install(monkeypatch, tmp_path, capability=(10, 0))
    yield
    fake_gpu.new_process()


def test_a_pass_is_remembered_across_processes(tmp_path):
    assert not cache.selftest_passed(GPU)
    cache.remember_selftest(GPU, True)
    assert cache.selftest_passed(GPU) and cache.selftest_passed(torch.device("cuda"))
    fake_gpu.new_process()
    assert cache.selftest_passed(GPU)
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["identity"]["device"] == "Fake GPU"


def test_a_failure_takes_a_pass_back():
    cache.remember_selftest(GPU, True)
    cache.remember_selftest(GPU, False)
    assert not cache.selftest_passed(GPU)
    fake_gpu.new_process()
    assert not cache.selftest_passed(GPU)


def test_it_is_read_once_a_process(monkeypatch):
    assert not cache.selftest_passed(GPU)
    monkeypatch.setattr(cache, "read", lambda *_: pytest.fail("read again"))
    assert not cache.selftest_passed(GPU)


@pytest.mark.parametrize("what", ["name", "capability", "driver", "torch", "triton", "source"])
def test_a_pass_of_something_else_does_not_count(monkeypatch, tmp_path, what):
    cache.remember_selftest(GPU, True)
    if what == "name":
        fake_gpu.install(monkeypatch, tmp_path, (10, 0), "Another GPU")
    elif what == "capability":
        fake_gpu.install(monkeypatch, tmp_path, (12, 0))
    elif what == "driver":
        monkeypatch.setattr(cache, "driver_version", lambda: "590.1")
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "2.15.0")
    elif what == "triton":
        monkeypatch.setattr(cache, "version", lambda package: "3.9.0")
    else:
        monkeypatch.setattr(cache, "source_digest", lambda: "0" * 12)
    fake_gpu.new_process()
    assert not cache.selftest_passed(GPU)


@pytest.mark.parametrize("text", ["", "{", "[]", "true", '{"content": {"passed": true}}', "\xff"], ids=repr)
def test_a_damaged_file_is_no_pass(tmp_path, text):
    cache.remember_selftest(GPU, True)
    (path,) = tmp_path.iterdir()
    path.write_bytes(text.encode("latin-1"))
    fake_gpu.new_process()
    assert not cache.selftest_passed(GPU)


@pytest.mark.parametrize("value", [1, "true", None, {}], ids=repr)
def test_only_true_is_a_pass(tmp_path, value):
    cache.remember_selftest(GPU, True)
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "content": {"passed": value}}))
    fake_gpu.new_process()
    assert not cache.selftest_passed(GPU)


def test_a_cpu_has_no_self_test_to_remember():
    assert not cache.selftest_passed(torch.device("cpu"))
    with pytest.raises(ValueError, match="GPUs only"):
        cache.remember_selftest(torch.device("cpu"), True)


def test_a_pass_makes_triton_the_default_on_blackwell(monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    assert dispatch.resolve("auto", GPU) == "vendor"
    cache.remember_selftest(GPU, True)
    assert dispatch.resolve("auto", GPU) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert dispatch.resolve("auto", GPU) == "vendor", "not on Hopper"


def test_the_driver_is_named_without_a_gpu(monkeypatch):
    monkeypatch.undo()
    assert cache.driver_version()
    assert len(cache.source_digest()) == 12 and cache.version("torch").startswith("2.")
    assert cache.version("no_such_package_here") == "absent"


def test_the_driver_is_asked_where_the_kernel_module_is_hidden(monkeypatch):
    class Library:
        def cuDriverGetVersion(self, number):  # noqa: N802
            number._obj.value = 13010

    monkeypatch.undo()
    monkeypatch.setattr(cache.Path, "read_text", lambda *_: (_ for _ in ()).throw(PermissionError()))
    monkeypatch.setattr(cache.ctypes, "CDLL", lambda name: Library())
    assert cache.driver_version() == "CUDA 13.1"
