"""What an artefact really holds: one row per convolution and linear layer, and what is wrong with it.

    Row.claimed    what the file says of the layer: its manifest, its quantization_config, or the names of its tensors
    Row.precision  what its weight's bytes are: "nvfp4", "fp8", "int8", "bf16", "fp16", "fp32", ...
    Row.problems   every reason why the claim does not hold

A layer is NVFP4 if its codes are two to a byte, each 16 along the contracted index share one E4M3 scale, no scale is
NaN and the tensor scale is a finite fp32 above 0 (or 0, of codes that are 0). Read by names: te_nvfp4_cv's and
ModelOpt's (weight, weight_scale, weight_scale_2) and compressed-tensors' (weight_packed, weight_scale,
weight_global_scale). A tensor scale claims NVFP4, and so do packed codes with E4M3 scales. Nothing is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.export import matrix
from te_nvfp4_cv.export.artifact import Artifact, LayerEntry, read
from te_nvfp4_cv.export.verify.inspection_config import Config, is_embedding, read_config
from te_nvfp4_cv.layer.plan import weight_plan
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

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
E4M3 = torch.float8_e4m3fn
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
        notes: what is worth knowing and breaks no claim.
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
    notes: list[str] = field(default_factory=list)

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
            lines += [f"    note: {note}" for note in (row.notes if row else ())]
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
        config = Config()
    else:
        origin = "another tool"
        config = read_config(opened.config, path.parent)
    rows = [_row(opened, name, config) for name in _layers(opened)]
    return Report(str(path), origin, rows, problems + config.problems)


def _layers(opened: Artifact) -> list[str]:
    """Names of what has a weight with two axes or more, or anything else of an NVFP4 layer, in the file's order."""
    names: dict[str, None] = {}
    for name, tensor in opened.tensors.items():
        prefix, _, last = name.rpartition(".")
        packed = last == "weight_packed" or last in GLOBAL or (last == "weight_scale" and tensor.dtype == E4M3)
        if packed or (last == "weight" and (tensor.dim() >= 2 or tensor.dtype == torch.uint8)):
            names[prefix] = None
    return list(names)


def _of_layer(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}." if name else ""
    keys = (*CODES, "weight_scale", *GLOBAL)
    return {key: tensors[prefix + key] for key in keys if prefix + key in tensors}


def _row(opened: Artifact, name: str, config: Config) -> Row:
    parts = _of_layer(opened.tensors, name)
    entry = opened.manifest.layers.get(name) if opened.manifest is not None else None
    codes = next((parts[key] for key in CODES if key in parts), None)
    said = config.algorithm_of(name, 2 if codes is None else codes.dim())
    if codes is not None and entry is None and not _claims_nvfp4(parts, codes, said):
        return _plain_row(name, codes, parts.get("weight_scale"), "nvfp4" in said)
    kind = "layer" if entry is None else entry.op
    shape = () if codes is None else tuple(codes.shape)
    shape = (shape[0], 2 * shape[1]) if len(shape) == 2 else shape
    count = torch.Size(shape if entry is None else entry.shape).numel()
    size = sum(t.numel() * t.element_size() for t in parts.values())
    row = Row(name, kind, "nvfp4", "nvfp4", shape, count, size)
    row.problems = ["its weight is missing"] if codes is None else _problems(parts, codes, entry)
    row.axis = _axis(entry, codes)
    scale = parts.get("weight_scale")
    if scale is not None and scale.dtype == E4M3 and scale.numel():
        values = scale.float().abs()
        row.scales = (float(values.nan_to_num(0).min()), float(values.nan_to_num(0).max()))
    if row.problems:
        row.precision = "nothing" if codes is None else _dtype(codes)
    return row


def _claims_nvfp4(parts: Mapping[str, Tensor], codes: Tensor, said: str) -> bool:
    """Whether another tool's tensors are, by their names and types, those of an NVFP4 layer.

    Args:
        said: the algorithm that the file's config has for the layer, or "".
    """
    scale = parts.get("weight_scale")
    packed = codes.dtype == torch.uint8
    return (
        "weight_global_scale" in parts
        or ("weight_scale_2" in parts and (not said or "nvfp4" in said))  # others have one too, as W4A8_AWQ
        or ("nvfp4" in said and (packed or "weight_packed" in parts))
        or (packed and scale is not None and scale.dtype == E4M3)
    )


def _plain_row(name: str, weight: Tensor, scale: Tensor | None, said_nvfp4: bool) -> Row:
    kind = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}.get(weight.dim(), f"{weight.dim()}-D weight")
    size = weight.numel() * weight.element_size()
    size += 0 if scale is None else scale.numel() * scale.element_size()
    precision = _dtype(weight)
    row = Row(name, kind, precision, precision, tuple(weight.shape), weight.numel(), size)
    if said_nvfp4 and weight.dim() == 2 and is_embedding(name):
        row.notes.append("the config says NVFP4 and does not leave it out; by its name it is an embedding")
    elif said_nvfp4:
        row.claimed = "nvfp4"
        row.problems.append(f"the config says NVFP4, the weight is {precision}")
    return row


def _dtype(tensor: Tensor) -> str:
    return DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def _problems(parts: Mapping[str, Tensor], codes: Tensor, entry: LayerEntry | None) -> list[str]:
    """Why a layer that claims NVFP4 is not."""
    found = []
    scale, tensor_scale = parts.get("weight_scale"), next((parts[key] for key in GLOBAL if key in parts), None)
    if codes.dtype != torch.uint8:
        found.append(f"its codes are {_dtype(codes)}, not packed uint8")
    if codes.dim() != 2:
        found.append(f"its codes have {codes.dim()} axes, not the 2 of a GEMM's matrix")
    elif not codes.numel():
        found.append("it has no codes")
    elif codes.shape[1] % 8:
        found.append(f"a row has {2 * codes.shape[1]} values, which is no whole number of blocks of 16")
    if scale is None:
        found.append("it has no block scales")
    else:
        if scale.dtype != E4M3:
            found.append(f"its block scales are {_dtype(scale)}, not E4M3")
        if codes.dim() == 2 and tuple(scale.shape) != (codes.shape[0], codes.shape[1] // 8):
            per = codes.numel() * 2 / max(scale.numel(), 1)
            found.append(f"{per:g} values share a block scale along the last axis, not 16")
        if scale.dtype == E4M3:
            nan = int(((scale.contiguous().view(torch.uint8) & 0x7F) == 0x7F).sum())
            found += [f"{nan} of its block scales are NaN"] if nan else []
            negative = int((scale.float() < 0).sum())
            found += [f"{negative} of its block scales are negative"] if negative else []
    if tensor_scale is None:
        found.append("it has no tensor scale")
    elif tensor_scale.dtype != torch.float32 or tensor_scale.numel() != 1:
        found.append(f"its tensor scale is {_dtype(tensor_scale)} {tuple(tensor_scale.shape)}")
    elif not bool(torch.isfinite(tensor_scale).all()) or bool((tensor_scale < 0).any()):
        found.append(f"its tensor scale is {float(tensor_scale)}")
    elif not bool(tensor_scale.any()) and ("weight_global_scale" in parts or _nonzero(codes)):
        found.append("its tensor scale is 0, its codes are not")
    if entry is not None:
        found += _against_entry(codes, entry)
    return found


def _nonzero(codes: Tensor) -> bool:
    return codes.dtype == torch.uint8 and bool((codes & 0x77).any())  # -0 is 0


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


def _axis(entry: LayerEntry | None, codes: Tensor | None) -> str:
    if entry is None:
        return "the last axis" if codes is not None and codes.dim() == 2 else ""
    return "in-features" if entry.op == "linear" else "in-channels, tap by tap"
