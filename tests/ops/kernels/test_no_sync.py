"""A step of the CUDA paths reads no tensor's value on the host and copies none to the device, as far as a CPU can tell.

The steps take the path of CUDA up to each launch, which computes nothing: what a kernel would write must not matter to
the host. They run inside of a dispatch mode that sees every ATen operator, also those within this package's custom
operators, and refuses what would wait for a GPU: .item() and its relatives, data-dependent shapes, tensors made from
Python numbers, copies to another device. tests/gpu/test_graphs.py asks a real GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

import te_nvfp4_cv as nv
from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.fusion.fuse import fuse
from te_nvfp4_cv.ops.geometry import Fold
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.records import PACKED, OperandSpec

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU asks itself: tests/gpu/test_graphs.py"),
]
WAITING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "lift_fresh", "item")


class Waits(AssertionError):
    """An operator that makes the host wait for the GPU."""


class NoWaiting(TorchDispatchMode):
    """Raises Waits for operators that would synchronise on CUDA; looks inside custom operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        self.seen.add(func._schema.name)
        if func.namespace == "te_nvfp4_cv":
            if name == "draw_seed":  # on CUDA it asks the generator there, on a CPU a Python counter
                return torch.full((1,), 7, dtype=torch.int64)
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        if name in WAITING:
            raise Waits(f"{func} waits for the GPU")
        if name.startswith("index") and any(t is not None and t.dtype == torch.bool for t in _indices(args)):
            raise Waits(f"{func} with a mask waits for the GPU")
        if "device" in (kwargs or {}) and name == "_to_copy" and kwargs["device"] not in (None, args[0].device):
            raise Waits(f"{func} copies between devices")
        return func(*args, **(kwargs or {}))


def _indices(args: Any) -> list[Tensor | None]:
    return list(args[1]) if len(args) > 1 and isinstance(args[1], (list, tuple)) else []


@pytest.fixture
def launches(kernel_device, monkeypatch):
    """The names of the kernels that were launched, none of which ran: the interpreter takes long, and reads tensors."""
    from triton.runtime import interpreter

    names: list[str] = []
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *_, **__: names.append(self.fn.__name__))
    monkeypatch.setattr(dispatch, "KERNELS_ON_CPU", True)
    return names


def network(fused: bool) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 16, 3, stride=2, padding=1),
        nn.GroupNorm(4, 16),
        nn.SiLU(),
        nn.ConvTranspose2d(16, 16, 2, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 16),
    ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return fuse(net) if fused else net


def step(net: nn.Module, x: Tensor, recipe: nv.NVFP4BlockScaling, backend: str) -> None:
    with torch.autocast("cpu", torch.bfloat16), nv.nvfp4_autocast(recipe, backend=backend):
        loss = net(x).float().square().mean()
    loss.backward()


RECIPES = {
    "current": nv.NVFP4BlockScaling(),
    "delayed": nv.NVFP4BlockScaling(tensor_scale="delayed"),
    "others": nv.NVFP4BlockScaling(
        nvfp4_4over6="weights", disable_2d_quantization=True, disable_rht=True, high_precision_gemms=("dgrad",)
    ),
}
CASES = [
    ("vendor", "current", 4, False),
    ("vendor", "delayed", 16, True),
    ("vendor", "others", 4, False),
    ("triton", "current", 16, False),
    ("triton", "delayed", 4, True),
]


@pytest.mark.parametrize(("backend", "name", "batch", "fused"), CASES, ids=lambda case: str(case))
def test_no_step_waits_for_the_gpu(launches, backend, name, batch, fused):
    net, x = network(fused), torch.randn(batch, 16, 4, 4).to(memory_format=torch.channels_last)
    for _ in range(2 if name == "delayed" else 1):  # tables and states are made in the first steps
        net.zero_grad(set_to_none=True)
        step(net, x, RECIPES[name], backend)
    launches.clear()
    with NoWaiting() as mode:
        step(net, x, RECIPES[name], backend)
    assert len(launches) >= 49 and "quantize_kernel" in launches
    custom = {op for op in mode.seen if op.startswith("te_nvfp4_cv::")}
    assert {"te_nvfp4_cv::quantize_operand", "te_nvfp4_cv::conv_wgrad", "te_nvfp4_cv::quantize_weight"} <= custom


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: torch.equal(x, x),
        lambda x: x.to("meta"),
    ],
)
def test_the_detector_finds_what_waits(wait):
    x = torch.randn(4)
    with pytest.raises(Waits), NoWaiting():
        wait(x)


def test_the_detector_looks_inside_custom_operators():
    x, seed = torch.randn(16, 2, 2, 16), torch.tensor([3])
    spec = OperandSpec(1, Fold(1, 0, 2, 0, 16), PACKED, PACKED, True, True)
    with pytest.raises(Waits), NoWaiting():  # the CPU's compiled kernels read the seed
        operand.quantize_operand(x, spec, torch.float32, seed, None, "vendor")
