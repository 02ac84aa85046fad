"""The library as the conformance vectors call it, from the repository root on the path:

    check_vectors.py tests.conformance:run_case

A case gives an input and a mode; every key of the mode is answered or refused, so that a new kind of vector can fail
but never pass unread.

    quantize cases  direction ("row", "col", "row+col"), tile, rht, four_over_six, e4m3_max, row_scaled
    GEMM cases      gemm ("fprop", "dgrad", "wgrad"), weight_tile, rht, four_over_six, e4m3_max, row_scaled

A tile is [1, 16], which is also what None means, or [16, 16]. A quantize case without one has tiles of 1x16, a GEMM
case without a weight_tile has a weight of 16x16.
The answer to a quantize case holds codes, scale_inv, amax and dequant, with the suffix _t for the columnwise face.
The vectors keep scales at the padded tile size, the library keeps the rows given: run_case pads them to compare.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.ops.quantize.matrix import quantize
from te_nvfp4_cv.tensor.gemm import gemm
from te_nvfp4_cv.tensor.quantizer import NVFP4Quantizer

NUMERIC_KEYS = {"rht", "four_over_six", "e4m3_max", "row_scaled"}
LAYOUTS = {"fprop": "TN", "dgrad": "NN", "wgrad": "NT"}


def run_case(x: Any, mode: dict[str, Any], backend: str = "reference") -> dict[str, Tensor]:
    """Answer one case with `backend`.

    Raises:
        ValueError: a key or a value of the mode that no case of its kind has.
    """
    if "gemm" in mode:
        return {"out": _gemm_case(x["a"], x["b"], mode, backend)}
    _refuse_unknown(mode, {"direction", "tile"} | NUMERIC_KEYS)
    direction = _chosen(mode, "direction", ("row", "col", "row+col")).split("+")
    e4m3_max, two_d = mode.get("e4m3_max", 448), _is_2d(mode, "tile", default=None)
    faces = quantize(
        x,
        rowwise="row" in direction,
        columnwise="col" in direction,
        rht=mode.get("rht", False),
        two_d=two_d,
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
        answer["scale_inv" + suffix] = _pad_rows(scale) if two_d else scale
        answer["amax" + suffix] = amax
        answer["dequant" + suffix] = formats.dequantize(data, scale, amax, e4m3_max)[:, :length]
    return answer


def _gemm_case(a: Tensor, b: Tensor, mode: dict[str, Any], backend: str) -> Tensor:
    """Multiply a case's operands in fp32, each quantized as a layer with this mode quantizes it."""
    _refuse_unknown(mode, {"gemm", "weight_tile"} | NUMERIC_KEYS)
    which = _chosen(mode, "gemm", tuple(LAYOUTS))
    two_d, row_scaled = _is_2d(mode, "weight_tile", default=[16, 16]), mode.get("row_scaled", False)
    four_over_six, e4m3_max = mode.get("four_over_six"), mode.get("e4m3_max", 448)
    if e4m3_max != 448 and four_over_six is None:  # NVFP4Quantizer would use 448 without a word, as TE does
        raise ValueError(f"conformance: e4m3_max={e4m3_max} needs four_over_six")
    if row_scaled and which != "fprop":  # only fprop's activation has an amax for each row
        raise ValueError(f"conformance: row_scaled has no meaning for gemm={which!r}")
    common: dict[str, Any] = {"nvfp4_e4m3_max": e4m3_max, "backend": backend}
    if four_over_six is not None:
        common |= {"nvfp4_use_4over6": True, "nvfp4_4over6_err_mode": four_over_six}
    activation = NVFP4Quantizer(
        columnwise=which != "fprop", with_rht=mode.get("rht", False), row_scaled_nvfp4=row_scaled, **common
    )
    weight = NVFP4Quantizer(with_2d_quantization=two_d, **common)
    b_quantizer = activation if which == "wgrad" else weight  # wgrad multiplies dy by x: there is no weight in it
    return gemm(activation(a), b_quantizer(b), LAYOUTS[which], torch.float32, backend=backend)


def _refuse_unknown(mode: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(set(mode) - known)
    if unknown:
        raise ValueError(f"conformance: unknown key {', '.join(unknown)} in the mode {mode}; known: {sorted(known)}")


def _chosen(mode: dict[str, Any], key: str, values: tuple[str, ...]) -> str:
    """Return the mode's value for `key` if it is one of `values`, else raise a ValueError."""
    value = mode.get(key)
    if value not in values:
        raise ValueError(f"conformance: {key}={value!r}; needs one of {', '.join(values)}")
    return str(value)


def _is_2d(mode: dict[str, Any], key: str, default: list[int] | None) -> bool:
    """Return True for a tile of 16x16 and False for 1x16 or None; raise a ValueError for anything else."""
    tile = mode.get(key, default)
    if tile is not None and tile not in ([1, 16], [16, 16]):
        raise ValueError(f"conformance: {key}={tile!r}; needs [1, 16] or [16, 16]")
    return tile == [16, 16]


def _pad_rows(scale: Tensor) -> Tensor:
    """Repeat the last row of scales until 16x16 tiles have all their 16 rows."""
    rows = -scale.shape[0] % 16
    return torch.cat((scale.view(torch.uint8), scale.view(torch.uint8)[-1:].expand(rows, -1)))
