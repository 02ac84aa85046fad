"""FlopCounterMode counts for layers in NVFP4 what it counts for torch's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import te_nvfp4_cv as nv
from tests.helpers import values

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(16, 32, 3, padding=1), (4, 16, 9)),
    "conv2d": (lambda: nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), (4, 16, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(16, 32, 2, dilation=2), (4, 16, 5, 5, 5)),
    "groups": (lambda: nn.Conv2d(32, 64, 3, groups=2), (4, 32, 6, 6)),
    "same": (lambda: nn.Conv2d(16, 16, 4, padding="same"), (4, 16, 6, 6)),
    "unbatched": (lambda: nn.Conv2d(16, 16, 3), (16, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(16, 32, 2, stride=2, output_padding=1), (4, 16, 5, 5)),
    "transposed groups": (lambda: nn.ConvTranspose2d(32, 64, 3, groups=2), (4, 32, 5, 5)),
    "linear": (lambda: nn.Linear(32, 48), (16, 32)),
    "linear of tokens": (lambda: nn.Linear(32, 48, bias=False), (4, 7, 32)),
}
RECIPES = {
    "nvfp4": nv.NVFP4BlockScaling(),
    "wgrad in high precision": nv.NVFP4BlockScaling(high_precision_gemms=("wgrad",)),
    "dequantized": nv.NVFP4BlockScaling(backward_override="dequantized"),
}


def flops(run: Callable[[Tensor], Tensor], shape: tuple[int, ...], context: Any, backward: bool = True) -> int:
    x = values(shape).requires_grad_(backward)
    with FlopCounterMode(display=False) as counter, context:
        y = run(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("backend", ["vendor", "integer", "reference"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_step_counts_as_in_torch(kind, backend):
    make, shape = LAYERS[kind]
    layer = make()
    expected = flops(layer, shape, nv.nvfp4_autocast(enabled=False))
    assert expected == flops(layer, shape, nv.nvfp4_autocast(backend=backend)) > 0


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_gemms_in_high_precision_count_too(kind, recipe):
    make, shape = LAYERS[kind]
    layer = make()
    expected = flops(layer, shape, nv.nvfp4_autocast(enabled=False))
    assert expected == flops(layer, shape, nv.nvfp4_autocast(RECIPES[recipe]))


def test_only_what_is_computed_counts():
    make, shape = LAYERS["conv2d"]
    layer = make()
    layer.weight.requires_grad_(False)
    counts = [flops(layer, shape, nv.nvfp4_autocast(enabled=on)) for on in (False, True)]
    assert counts[0] == counts[1] == 2 * flops(layer, shape, nv.nvfp4_autocast(), backward=False)


@pytest.mark.parametrize("kind", ["groups", "transposed", "linear of tokens"])
def test_operators_of_a_graph(kind):
    """`layer` and `layer_backward` stand in graphs of torch.compile."""
    make, shape = LAYERS[kind]
    layer = make()
    expected = flops(layer, shape, nv.nvfp4_autocast(enabled=False))
    graphs: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def keep(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        def run(*given: Any) -> Any:
            graphs.append((module, list(given)))
            return module(*given)

        return run

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    with nv.nvfp4_autocast():
        y = torch.compile(layer, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))(
            values(shape).requires_grad_()
        )
    y.sum().backward()
    with FlopCounterMode(display=False) as counter:
        for module, inputs in graphs:
            module(*inputs)
    assert counter.get_total_flops() == expected and len(graphs) == 2


def test_inference_layers_and_matrix_products(tmp_path):
    layer, x = nn.Sequential(nn.Conv2d(16, 32, 3)), values((4, 16, 6, 6))
    expected = flops(layer, (4, 16, 6, 6), nv.nvfp4_autocast(enabled=False), backward=False)
    nv.export.save(layer, tmp_path / "net.safetensors", nv.NVFP4BlockScaling())
    loaded = nv.export.load(tmp_path / "net.safetensors", nn.Sequential(nn.Conv2d(16, 32, 3)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loaded(x)
    assert counter.get_total_flops() == expected
    quantizer = nv.NVFP4Quantizer()
    a, b = (quantizer(values((rows, 64))) for rows in (32, 48))
    with FlopCounterMode(display=False) as counter:
        nv.gemm(a, b)
    assert counter.get_total_flops() == 2 * 32 * 48 * 64


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(32, 16)

    def forward(self, x):
        return self.lstm(hx=None, input=x)[0]


def test_a_recurrent_layer_that_gets_its_input_by_name_has_flops():
    (row,) = nv.coverage(ByName(), values((5, 16, 32))).rows
    assert row.name == "lstm" and row.flops == 6 * 80 * (32 * 64 + 16 * 64)


def test_the_counter_is_not_imported_for_it():
    """It imports Triton, which takes most of a second. Whichever comes first, the formulas are there.

    Also if somebody has only asked before whether there is a counter.
    """
    code = (
        "import importlib.util, sys, te_nvfp4_cv, torch; assert 'torch.utils.flop_counter' not in sys.modules; "
        "before = len(sys.meta_path); assert importlib.util.find_spec('torch.utils.flop_counter') is not None; "
        "from torch.utils.flop_counter import flop_registry; assert torch.ops.te_nvfp4_cv.layer in flop_registry; "
        "assert len(sys.meta_path) == before - 1"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
