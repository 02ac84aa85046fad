"""Which backend serves a device: decided from faked capabilities, since the machine at hand has one device or none."""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import te_nvfp4_cv as nv
from te_nvfp4_cv import errors
from te_nvfp4_cv.backend import cache, dispatch, native
from te_nvfp4_cv.backend.explain import explain

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """A function that fakes a GPU of a compute capability, and whether the self-test has passed on it."""

    def fake(capability, passed=False, triton=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(cache, "selftest_passed", lambda device: passed)
        monkeypatch.setattr(dispatch, "has_triton", lambda: triton)

    return fake


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)])
def test_vendor_serves_every_gpu_from_8_0(gpu, capability):
    gpu(capability)
    assert dispatch.resolve("auto", CUDA) == dispatch.resolve("vendor", CUDA) == "vendor"
    assert dispatch.resolve("triton", CUDA) == "triton"
    assert dispatch.kernels_serve(CUDA) and explain(CUDA)["backend"] == "vendor"


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
@pytest.mark.parametrize("backend", ["auto", "vendor", "triton"])
def test_older_gpus_get_an_error_that_names_reference(gpu, capability, backend):
    gpu(capability)
    with pytest.raises(RuntimeError, match="8.0 or newer") as error:
        dispatch.resolve(backend, CUDA)
    assert "reference" in str(error.value) and f"{capability[0]}.{capability[1]}" in str(error.value)
    assert dispatch.resolve("reference", CUDA) == "reference"
    assert explain(CUDA)["backend"] == "none"


@pytest.mark.parametrize("capability", [(10, 0), (10, 3), (12, 0)])
def test_triton_is_the_default_on_blackwell_once_the_self_test_has_passed(gpu, capability):
    gpu(capability, passed=True)
    assert dispatch.native_fp4(CUDA) and dispatch.resolve("auto", CUDA) == "triton"
    assert dispatch.resolve("vendor", CUDA) == "vendor"
    assert "default" in explain(CUDA)["triton"]
    gpu(capability, passed=False)
    assert dispatch.resolve("auto", CUDA) == "vendor" and "selftest" in explain(CUDA)["triton"]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 1)])
def test_a_passed_self_test_changes_nothing_where_there_are_no_fp4_tensor_cores(gpu, capability):
    gpu(capability, passed=True)
    assert not dispatch.native_fp4(CUDA) and dispatch.resolve("auto", CUDA) == "vendor"


@pytest.mark.parametrize("backend", ["auto", "vendor", "triton"])
def test_a_gpu_without_triton_names_the_backend_that_works(gpu, backend):
    gpu((9, 0), triton=False)
    with pytest.raises(RuntimeError, match="pip install") as error:
        dispatch.resolve(backend, CUDA)
    assert "backend='reference'" in str(error.value)
    assert dispatch.resolve("reference", CUDA) == "reference"
    assert "not installed" in explain(CUDA)["triton"]


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET") as error:
        dispatch.resolve("triton", CPU)
    assert "backend='vendor'" in str(error.value)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.resolve("triton", CPU) == "triton" and dispatch.resolve("auto", CPU) == "vendor"
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="cannot run here"):
        dispatch.resolve("triton", CPU)


def test_other_devices_get_an_error_that_names_reference():
    for backend in ("auto", "vendor", "triton"):
        with pytest.raises(RuntimeError, match="backend='reference'"):
            dispatch.resolve(backend, torch.device("xpu"))


def test_the_kernels_serve_a_cpu_only_when_a_test_asks(monkeypatch):
    assert not dispatch.kernels_serve(CPU)
    monkeypatch.setattr(dispatch, "KERNELS_ON_CPU", True)
    assert dispatch.kernels_serve(CPU) and not dispatch.kernels_serve(torch.device("meta"))


def test_has_triton_asks_the_import_system(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not dispatch.has_triton()


@contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.skipif(native.load() is None, reason="the integer backend needs a C++ compiler")
@pytest.mark.parametrize(
    "around",
    [
        FakeTensorMode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: _default_dtype(torch.float64),
        lambda: torch.device("meta"),
        torch.inference_mode,
        nv.nvfp4_autocast,
    ],
    ids=["fake tensors", "autocast", "float64", "meta", "inference_mode", "nvfp4_autocast"],
)
def test_the_first_layers_surroundings_do_not_decide_whether_integer_kernels_pass(monkeypatch, around):
    """The answer is kept on the disk, so one first call under bf16 autocast would take the kernels away for good."""
    monkeypatch.setattr(dispatch, "_integer_passes", None)
    monkeypatch.setattr(cache, "passes", lambda kind, identity, check: check())
    with around():
        assert dispatch.integer_passes()
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.skipif(native.load() is None, reason="the integer backend needs a C++ compiler")
def test_integer_kernels_that_fail_say_so_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_integer_passes", None)
    monkeypatch.setattr(dispatch, "integer_check", lambda: False)
    monkeypatch.setattr(cache, "passes", lambda kind, identity, check: check())
    monkeypatch.setattr(errors, "_warned", set())
    with pytest.warns(UserWarning, match="do not match the reference"):
        assert not dispatch.integer_passes()
