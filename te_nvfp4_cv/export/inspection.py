"""What an artefact really holds: one row per convolution and linear layer, and what is wrong with it.

    Row.claimed    what the file says of the layer: its manifest, its quantization_config, or the names of its tensors
    Row.precision  what its weight's bytes are: "nvfp4", "fp8", "int8", "bf16", "fp16", "fp32", ...
    Row.problems   every reason why the claim does not hold

A layer is NVFP4 if its codes are two to a byte, each 16 along the contracted index share one E4M3 scale, no scale is
NaN and the tensor scale is a finite fp32. Read by names: te_nvfp4_cv's and ModelOpt's (weight, weight_scale,
weight_scale_2) and compressed-tensors' (weight_packed, weight_scale, weight_global_scale). Nothing is executed.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.export import matrix
from te_nvfp4_cv.export.artifact import Artifact, LayerEntry, read
from te_nvfp4_cv.plan import weight_plan
from te_nvfp4_cv.recipe import NVFP4BlockScaling

DTYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8 e5m2",
    torch.int8: "int8",
    torch.uint8: "uint8",
}
CODES = ("weight", "weight_packed")
GLOBAL = ("weight_scale_2", "weight_global_scale")


@dataclass
class Row:
    """One layer.

    Attributes:
        shape: of the weight as stored; of NVFP4, the matrix [N, K] of its values.
        count: values; bytes: of codes and scales, or of the plain weight.
        axis: what the blocks of 16 run along, in words; scales: smallest and largest block scale, as stored.
        activations: of an ONNX graph, how the layer's input is quantized.
    """

    name: str
    kind: str
    claimed: str
    precision: str
    shape: tuple[int, ...]
    count: int
    bytes: int
    axis: str = ""
    scales: tuple[float, float] | None = None
    activations: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def bits(self) -> float:
        """Bits per value."""
        return 8 * self.bytes / max(self.count, 1)


@dataclass
class Report:
    """All layers of a file, and what is wrong with the file itself."""

    source: str
    origin: str
    rows: list[Row]
    problems: list[str]

    @property
    def sound(self) -> bool:
        """Whether every claim holds."""
        return not self.problems and not any(row.problems for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [asdict(row) | {"bits": round(row.bits, 3)} for row in self.rows]
        totals = {"layers": len(rows), "nvfp4": sum(row.precision == "nvfp4" for row in self.rows)}
        return {
            "source": self.source,
            "origin": self.origin,
            "sound": self.sound,
            "problems": self.problems,
            **totals,
            "rows": rows,
        }

    def __str__(self) -> str:
        head = (
            "layer",
            "kind",
            "claimed",
            "precision",
            "shape",
            "bytes",
            "bits",
            "blocks along",
            "scales",
            "activations",
        )
        cells = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
        lines = [f"{self.source} ({self.origin})"]
        for line, row in zip(cells, [None, *self.rows], strict=True):
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
            lines += [f"    PROBLEM: {problem}" for problem in (row.problems if row else ())]
        lines += [f"PROBLEM: {problem}" for problem in self.problems]
        nvfp4 = [row for row in self.rows if row.precision == "nvfp4"]
        size, packed = sum(row.bytes for row in self.rows), sum(row.bytes for row in nvfp4)
        lines.append(
            f"{len(nvfp4)} of {len(self.rows)} layers are NVFP4; their weights take {packed / 1e6:.2f} of "
            f"{size / 1e6:.2f} MB. " + ("Every claim holds." if self.sound else "NOT what it claims to be.")
        )
        return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    scales = "" if row.scales is None else f"{row.scales[0]:.3g} .. {row.scales[1]:.3g}"
    shape = "x".join(map(str, row.shape))
    return (
        row.name,
        row.kind,
        row.claimed,
        row.precision,
        shape,
        str(row.bytes),
        f"{row.bits:.2f}",
        row.axis,
        scales,
        row.activations,
    )


# ---- safetensors ----------------------------------------------------------------------------------------------------


def inspect_safetensors(path: Path) -> Report:
    """The rows of a packed checkpoint, this library's or another's.

    Raises:
        FileNotFoundError, ValueError: no such file, or one that is no safetensors file.
    """
    opened = read(path)
    problems: list[str] = []
    if opened.manifest is not None:
        origin = f"te_nvfp4_cv {opened.manifest.library}"
        try:
            opened.check()
        except ValueError as error:
            problems.append(str(error).splitlines()[1].strip().removeprefix("got:").strip())
        lost = [name for name in opened.manifest.layers if not _of_layer(opened.tensors, name)]
        problems += [f"layer {name!r} of the manifest has no tensors" for name in lost]
    else:
        origin = "another tool"
    config = _config(opened, path)
    rows = [_row(opened, name, config) for name in _layers(opened)]
    return Report(str(path), origin, rows, problems)


def _layers(opened: Artifact) -> list[str]:
    """Names of what has a weight with two axes or more, in the file's order."""
    names: dict[str, None] = {}
    for name, tensor in opened.tensors.items():
        prefix, _, last = name.rpartition(".")
        if last == "weight_packed" or (last == "weight" and tensor.dim() >= 2):
            names[prefix] = None
    return list(names)


def _of_layer(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}." if name else ""
    keys = (*CODES, "weight_scale", *GLOBAL)
    return {key: tensors[prefix + key] for key in keys if prefix + key in tensors}


def _config(opened: Artifact, path: Path) -> dict[str, Any]:
    """The quantization config of the file, or of the files that other tools put beside it."""
    if opened.config:
        return opened.config
    for name, key in (("hf_quant_config.json", "quantization"), ("config.json", "quantization_config")):
        beside = path.parent / name
        if beside.is_file():
            try:
                found = json.loads(beside.read_text(encoding="utf-8")).get(key)
            except (ValueError, OSError, AttributeError, RecursionError):
                continue
            if isinstance(found, dict):
                return found
    return {}


def _claims_nvfp4(name: str, config: Mapping[str, Any]) -> bool:
    text = json.dumps(config).lower()
    if "nvfp4" not in text:
        return False
    ignored = [str(p) for key in ("ignore", "exclude_modules") for p in config.get(key) or []]
    return not any(_matches(name, pattern) for pattern in ignored)


def _matches(name: str, pattern: str) -> bool:
    """Whether a name is one that other tools' configs leave out: a module above it, a wildcard, or "re:" and a regular
    expression.
    """
    if pattern.startswith("re:"):
        try:
            return len(pattern) < 200 and re.match(pattern[3:], name) is not None
        except re.error:
            return False
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _row(opened: Artifact, name: str, config: Mapping[str, Any]) -> Row:
    parts = _of_layer(opened.tensors, name)
    entry = opened.manifest.layers.get(name) if opened.manifest is not None else None
    codes = next(parts[key] for key in CODES if key in parts)
    named = any(key in parts for key in GLOBAL) or "weight_packed" in parts
    if entry is None and not named:
        claimed = "nvfp4" if opened.manifest is None and _claims_nvfp4(name, config) else ""
        row = _plain_row(name, codes, parts.get("weight_scale"), claimed)
        if claimed == "nvfp4":
            row.problems.append(f"the config says NVFP4, the weight is {row.precision}")
        return row
    kind = "layer" if entry is None else entry.op
    rows, columns = codes.shape[0], codes.shape[-1] * 2
    count = codes.numel() * 2 if entry is None else torch.Size(entry.shape).numel()
    size = sum(t.numel() * t.element_size() for t in parts.values())
    row = Row(name, kind, "nvfp4", "nvfp4", (rows, columns), count, size)
    row.problems = _problems(parts, codes, entry)
    row.axis = _axis(entry, codes)
    scale = parts.get("weight_scale")
    if scale is not None and scale.dtype == torch.float8_e4m3fn and scale.numel():
        values = scale.float().abs()
        row.scales = (float(values.nan_to_num(0).min()), float(values.nan_to_num(0).max()))
    if row.problems:
        row.precision = DTYPES.get(codes.dtype, str(codes.dtype).removeprefix("torch."))
    return row


def _plain_row(name: str, weight: Tensor, scale: Tensor | None, claimed: str) -> Row:
    kind = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}.get(weight.dim(), f"{weight.dim()}-D weight")
    size = weight.numel() * weight.element_size()
    size += 0 if scale is None else scale.numel() * scale.element_size()
    precision = DTYPES.get(weight.dtype, str(weight.dtype).removeprefix("torch."))
    return Row(name, kind, claimed or precision, precision, tuple(weight.shape), weight.numel(), size)


def _problems(parts: Mapping[str, Tensor], codes: Tensor, entry: LayerEntry | None) -> list[str]:
    """Why a layer that claims NVFP4 is not."""
    found = []
    scale, tensor_scale = parts.get("weight_scale"), next((parts[key] for key in GLOBAL if key in parts), None)
    if codes.dtype != torch.uint8:
        found.append(f"its codes are {DTYPES.get(codes.dtype, codes.dtype)}, not packed uint8")
    if codes.dim() != 2:
        found.append(f"its codes have {codes.dim()} axes, not the 2 of a GEMM's matrix")
    if scale is None:
        found.append("it has no block scales")
    else:
        if scale.dtype != torch.float8_e4m3fn:
            found.append(f"its block scales are {DTYPES.get(scale.dtype, scale.dtype)}, not E4M3")
        if codes.dim() == 2 and tuple(scale.shape) != (codes.shape[0], codes.shape[1] // 8):
            per = codes.numel() * 2 / max(scale.numel(), 1)
            found.append(f"{per:g} values share a block scale along the last axis, not 16")
        if scale.dtype == torch.float8_e4m3fn:
            nan = int(((scale.contiguous().view(torch.uint8) & 0x7F) == 0x7F).sum())
            found += [f"{nan} of its block scales are NaN"] if nan else []
            negative = int((scale.float() < 0).sum())
            found += [f"{negative} of its block scales are negative"] if negative else []
    if tensor_scale is None:
        found.append("it has no tensor scale")
    elif tensor_scale.dtype != torch.float32 or tensor_scale.numel() != 1:
        found.append(
            f"its tensor scale is {DTYPES.get(tensor_scale.dtype, tensor_scale.dtype)} {tuple(tensor_scale.shape)}"
        )
    elif not bool(torch.isfinite(tensor_scale).all()) or bool((tensor_scale < 0).any()):
        found.append(f"its tensor scale is {float(tensor_scale)}")
    if entry is not None:
        found += _against_entry(codes, entry)
    return found


def _against_entry(codes: Tensor, entry: LayerEntry) -> list[str]:
    plan = weight_plan(torch.Size(entry.shape), entry.groups, entry.transposed, NVFP4BlockScaling(), "reference")
    rows, taps, blocks = matrix.sizes(plan)
    if entry.k_order != matrix.K_ORDER:
        return [f"the order of its contracted index is {entry.k_order!r}, not {matrix.K_ORDER!r}"]
    if tuple(codes.shape) != (rows, taps * blocks * 8):
        return [
            f"its matrix is {tuple(codes.shape)}, of a weight {entry.shape} it would be {(rows, taps * blocks * 8)}"
        ]
    return []


def _axis(entry: LayerEntry | None, codes: Tensor) -> str:
    if entry is None:
        return "the last axis" if codes.dim() == 2 else ""
    return "in-features" if entry.op == "linear" else "in-channels, tap by tap"
