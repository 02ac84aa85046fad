"""What the tests of the GEMM kernels share: layers, packed faces of their random operands, all ways to multiply."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.records import NONE, PACKED, Face, OperandSpec, WeightSpec
from tests.helpers import make_geometry, values

GEOMETRIES = {
    "1x1": make_geometry(16, (16, 32), (3, 3), 1),
    "1x1 stride 2": make_geometry(3, (32, 16), (5, 4), 1, 2),
    "3x3": make_geometry(3, (16, 24), (6, 4), 3, 1, 1),
    "3x3, 320 channels": make_geometry(1, (320, 48), (3, 2), 3, 1, 1),
    "3x3 stride 2 groups": make_geometry(2, (32, 48), (7, 5), 3, 2, 1, groups=2),
    "3x3 stride 3": make_geometry(17, (17, 33), (7, 4), 3, 3, 2),
    "5x5 dilated": make_geometry(1, (16, 16), (9, 8), 5, 1, (4, 3), (2, 1)),
    "7x7 stride 2 dilated": make_geometry(1, (3, 16), (9, 15), 7, 2, (3, 3), (1, 2)),
    "1-d": make_geometry(5, (16, 17), (9,), 3, 2, 2, 2),
    "3-d": make_geometry(2, (16, 16), (3, 4, 3), (1, 3, 2), (1, 2, 1), (0, 1, 1)),
    "3-d, 36 taps": make_geometry(1, (16, 16), (5, 4, 4), (4, 3, 3), (1, 2, 1), (2, 1, 1)),
    "transposed": make_geometry(3, (24, 16), (4, 3), 2, 2, transposed=True),
    "transposed groups": make_geometry(1, (32, 48), (5, 3), 3, 2, 1, 1, 1, 2, True),
    "transposed 1-d": make_geometry(2, (16, 20), (6,), 3, 1, 1, 2, 1, transposed=True),
    "transposed 3-d": make_geometry(2, (16, 16), (2, 3, 2), 2, (2, 1, 2), 0, 1, (1, 0, 1), 1, True),
    "linear": ConvGeometry(21, 40, 24, (), (), (), (), (), (), (), 1, False),
    "wide linear": ConvGeometry(300, 272, 160, (), (), (), (), (), (), (), 1, False),
}


def packed(g: ConvGeometry, device: torch.device, two_d: bool = True) -> dict[str, Face]:
    """Return every packed face of random x, w and dy, quantized by the reference."""
    a, b = g.folds
    folds = {"x": b if g.transposed else a, "dy": a if g.transposed else b}
    out: dict[str, Face] = {}
    for seed, (name, shape) in enumerate((("x", g.x_shape), ("dy", g.y_shape))):
        spec = OperandSpec(g.groups, folds[name], PACKED, PACKED, True)
        made = operand.quantize_operand(values(shape, seed=seed), spec, torch.float32, None, None, "reference")
        out[f"{name} row"], out[f"{name} col"] = made.row, made.col
    w = values(g.weight_shape, seed=5).unflatten(1, g.kernel or (1,)).movedim(-1, 1)
    w = w if g.rank else w[..., 0]
    spec = WeightSpec(g.groups, PACKED, NONE if two_d else PACKED, two_d)
    codes = operand.quantize_weight(w, spec, torch.float32, "reference")
    out["w row"], out["w col"] = codes.row, codes.row if two_d else codes.col
    return {name: Face(data.to(device), scale.to(device)) for name, (data, scale) in out.items()}


def faces_of(g: ConvGeometry) -> dict[str, tuple[str, str]]:
    """Which faces each GEMM multiplies; blocks run along the contracted axis of both."""
    data = ("w col", "w row") if g.transposed else ("w row", "w col")
    return {"fprop": ("x row", data[0]), "dgrad": ("dy row", data[1]), "wgrad": ("dy col", "x col")}


WAYS = ("fp16", "fp16 quads", "fp4")


def multiply_as(monkeypatch: pytest.MonkeyPatch, device: torch.device, way: str, modules: tuple, **changes) -> None:
    """Make launches multiply in one of WAYS: fp16 with bytes in their order or in wgmma's, or the FP4 tensor cores.

    The interpreter runs all of them; a GPU runs FP4 products where it has the tensor cores.
    """
    from te_nvfp4_cv.ops.gemm.triton.launch import Gpu

    if way == "fp4" and device.type == "cuda" and not dispatch.native_fp4(device):
        pytest.skip("no FP4 tensor cores here")
    changes["native"] = way == "fp4"
    monkeypatch.setattr(Gpu, "quads", way == "fp16 quads")
    for module in modules:
        before = module.gpu_of
        monkeypatch.setattr(module, "gpu_of", lambda d, f=before: dataclasses.replace(f(d), **changes))


def tolerance(device: torch.device) -> float:
    """Largest relative error of an fp32 result: the interpreter rounds its sums to nearest, tensor cores truncate."""
    return 1e-5 if device.type == "cuda" else 1e-6
