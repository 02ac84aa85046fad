"""What every test gets: a fixed seed, the --backend option, poisoned buffers on request, a torchvision that imports,
no TF32 on a GPU, Triton kernels on the GPU or, without one, in the repaired interpreter.

poison fills what torch.empty and its relatives return with bytes 0xFF: NaN in every floating dtype, 255 in uint8, -1 in
the other integers. A kernel that leaves a place unwritten then fails its comparison instead of passing by luck.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests import interpreter

ROOT = Path(__file__).resolve().parent.parent
GPU_TESTS = ROOT / "tests" / "gpu"
os.environ.setdefault("NVTE_PROJECT_BUILDING", "1")  # lets TransformerEngine's recipes import without its GPU library
os.environ.setdefault("WANDB_MODE", "offline")
if not torch.cuda.is_available():  # before triton is imported: kernels then run on the CPU, as NumPy code
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _ensure_torchvision() -> None:
    path = ROOT / "examples" / "_torchvision.py"
    if importlib.util.find_spec("torchvision") is None or not path.is_file():
        return
    spec = importlib.util.spec_from_file_location("_torchvision", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ensure_torchvision()


_ensure_torchvision()


def pytest_addoption(parser: pytest.Parser) -> None:
    choices = ("auto", "reference", "integer", "vendor", "triton")
    parser.addoption("--backend", default="auto", choices=choices, help="backend of the tests that take `backend`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "stress" not in config.option.markexpr:  # not in addopts: any other -m would take the place of that one
        long = [item for item in items if item.get_closest_marker("stress")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("stress")]
    named_by_address = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if named_by_address:  # processes that run tests side by side would not find the same names
        raise pytest.UsageError("a test's name has an object's address in it; give it ids: " + named_by_address[0])
    if torch.cuda.is_available():  # what the interpreter runs elsewhere runs on the GPU here
        for item in items:
            if "kernel_device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # a later collection then does not walk through all imported modules, which takes half a second


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def no_tf32(request: pytest.FixtureRequest) -> Iterator[None]:
    """Turn TF32 off in tests marked gpu and in tests/gpu, and restore torch's settings afterwards.

    These tests compare fp32 results with a CPU's at 1e-5; cuDNN uses TF32, ten bits of mantissa, by default.
    """
    if request.node.get_closest_marker("gpu") is None and GPU_TESTS not in request.path.parents:
        yield
        return
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    yield
    for setting, allowed in zip(settings, before, strict=True):
        setting.allow_tf32 = allowed


@pytest.fixture
def kernel_device() -> Iterator[torch.device]:
    """Where Triton kernels run: the GPU, or the CPU under the repaired interpreter (without NumPy's warnings)."""
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    interpreter.install()
    with numpy.errstate(all="ignore"):
        yield torch.device("cpu")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """The backend that --backend names."""
    return request.config.getoption("--backend")


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if type(tensor) is torch.Tensor and tensor.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
            tensor.untyped_storage().fill_(0xFF)
        return tensor

    return wrapper


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New uninitialised tensors hold NaN, 255 or -1."""
    for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes with one thread: many tiny products are faster so, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """torch.compile begins without the graphs and counts of earlier tests, and leaves none."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
