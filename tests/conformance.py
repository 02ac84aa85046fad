"""The library as the conformance vectors call it, from the repository root on the path:

    check_vectors.py tests.conformance:run_case

A case gives an input and a mode ("direction" row, col or row+col; "tile"; "rht"; "four_over_six"; "e4m3_max";
"row_scaled"; "gemm"); the answer holds codes, scale_inv, amax and dequant, with the suffix _t for the columnwise face.
The vectors keep scales at the padded tile size, the library keeps the rows given: run_case pads them to compare.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.ops.gemm import gemm
from te_nvfp4_cv.ops.quantize import quantize
from te_nvfp4_cv.ops.quantize.quantizer import NVFP4Quantizer


def run_case(x: Any, mode: dict[str, Any], backend: str = "reference") -> dict[str, Tensor]:
    """Answer one case with `backend`."""
    if "gemm" in mode:
        return {"out": _gemm_case(x["a"], x["b"], mode, backend)}
    direction = mode["direction"].split("+")
    e4m3_max, tile = mode.get("e4m3_max", 448), mode.get("tile") is not None
    faces = quantize(
        x,
        rowwise="row" in direction,
        columnwise="col" in direction,
        rht=mode.get("rht", False),
        two_d=tile,
        four_over_six=mode.get("four_over_six"),
        e4m3_max=e4m3_max,
        row_scaled=mode.get("row_scaled", False),
        backend=backend,
    )
    answer: dict[str, Tensor] = {}
    for name, suffix, length in (("row", "", x.shape[1]), ("col", "_t", x.shape[0])):
        if name not in direction:
            continue
        data, scale, amax = (getattr(faces, f"{name}_{field}") for field in ("data", "scale", "amax"))
        answer["codes" + suffix] = data[:, : length // 2].contiguous()
        answer["scale_inv" + suffix] = _pad_rows(scale) if tile else scale
        answer["amax" + suffix] = amax
        answer["dequant" + suffix] = formats.dequantize(data, scale, amax, e4m3_max)[:, :length]
    return answer


def _gemm_case(a: Tensor, b: Tensor, mode: dict[str, Any], backend: str) -> Tensor:
    """One of the three products, its operands quantized as a layer's are; fp32."""
    which, rht = mode["gemm"], mode.get("rht", False)
    weight = NVFP4Quantizer(with_2d_quantization=True, backend=backend)
    other = NVFP4Quantizer(with_rht=rht, backend=backend)
    layout = {"fprop": "TN", "dgrad": "NN", "wgrad": "NT"}[which]
    return gemm(other(a), (other if which == "wgrad" else weight)(b), layout, torch.float32, backend=backend)


def _pad_rows(scale: Tensor) -> Tensor:
    """Scales of 16x16 tiles with all 16 rows of the last tile."""
    rows = -scale.shape[0] % 16
    return torch.cat((scale.view(torch.uint8), scale.view(torch.uint8)[-1:].expand(rows, -1)))
