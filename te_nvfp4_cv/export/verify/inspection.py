"""Inspect a safetensors file: what each convolution and linear layer really is, and what is wrong with it.

    Row.claimed    what the file says of the layer: its manifest, its quantization_config, or the names of its tensors
    Row.precision  what its weight's bytes are: "nvfp4", "mxfp4", "fp8", "int8", "bf16", "fp16", "fp32", ...
    Row.problems   every reason why the claim does not hold

A layer is NVFP4 if its codes are packed two to a byte, each 16 values along the contracted index share one E4M3 scale,
no scale is NaN, and the tensor scale is a finite fp32 above 0 (or 0, if all codes are 0). Tensors are known by the
names of te_nvfp4_cv and ModelOpt (weight, weight_scale, weight_scale_2), of compressed-tensors (weight_packed,
weight_scale, weight_global_scale) and of torchao (torchao_names.py). A layer with a tensor scale claims to be NVFP4,
and so does one with packed codes and E4M3 scales. No code of the file or the model is executed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from te_nvfp4_cv.export import matrix
from te_nvfp4_cv.export.artifact import Artifact, kind_of, read
from te_nvfp4_cv.export.manifest import SCALES, LayerEntry, join
from te_nvfp4_cv.export.verify import torchao_names
from te_nvfp4_cv.export.verify.inspection_config import Config, is_embedding, read_config
from te_nvfp4_cv.export.verify.report import Report, Row
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.ops.block_scales import FORMATS, block_of

DTYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8 e5m2", torch.int8: "int8", torch.uint8: "uint8",
}
E4M3 = torch.float8_e4m3fn
CODES = ("weight", "weight_packed")  # this library's and ModelOpt's name, and compressed-tensors'
GLOBAL = ("weight_scale_2", "weight_global_scale")
INPUTS = ("input_scale", "input_global_scale")


def inspect_safetensors(path: Path) -> Report:
    """Inspect a packed checkpoint of this library or of another tool.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no safetensors file.
    """
    opened = read(path)
    problems: list[str] = []
    if opened.manifest is not None:
        origin = f"te_nvfp4_cv {opened.manifest.library}"
        try:
            # Caught, not raised: a wrong checksum is one finding, and the rows still show what the file holds.
            opened.check()
        except ValueError as error:
            problems.append(str(error).splitlines()[1].strip().removeprefix("got:").strip())  # the line with the reason
        lost = [name for name in opened.manifest.layers if not _of_layer(opened.tensors, name)]
        problems += [f"layer {name!r} of the manifest has no tensors" for name in lost]
        config = Config()  # our own quantization_config is for other tools: the manifest says more
    else:
        origin = "another tool"
        config = read_config(opened.config, path.parent)
    notes = []
    if opened.manifest is not None and opened.manifest.version < 2:
        notes.append("version 1 of the format: its checksums cover the bytes, not the dtypes and shapes of the tensors")
    rows = [_row(opened, name, config) for name in _layers(opened)]
    problems += config.problems
    if not rows and "nvfp4" in " ".join((config.algorithm, *config.layers.values(), *(a for a, _ in config.groups))):
        problems.append("its config says NVFP4, and no layer has the names of a known NVFP4 format")
    return Report(str(path), origin, rows, problems, notes, _unexplained(opened, [row.name for row in rows]))


def _unexplained(opened: Artifact, layers: list[str]) -> list[str]:
    """List the tensors with two axes or more that no row is about: biases and statistics of norms have one."""
    # A row is about all tensors of its module; one of another module may be weights in a format that is not known.
    known = set(layers)
    return [
        f"{name} ({kind_of(t)})" for name, t in opened.tensors.items()
        if t.dim() >= 2 and name.rpartition(".")[0] not in known
    ]


def _layers(opened: Artifact) -> list[str]:
    """List the modules with a weight of two axes or more, or with any part of an NVFP4 layer, in the file's order."""
    names: dict[str, None] = {}
    for name, tensor in opened.tensors.items():
        prefix, _, last = name.rpartition(".")
        packed = last in ("weight_packed", torchao_names.QDATA, *GLOBAL)
        packed |= last == "weight_scale" and tensor.dtype == E4M3
        if packed or (last == "weight" and (tensor.dim() >= 2 or tensor.dtype == torch.uint8)):
            names[prefix] = None  # a dict keeps the file's order
    return list(names)


def _of_layer(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    keys = (*CODES, "weight_scale", *GLOBAL)
    own = {key: tensors[join(name, key)] for key in keys if join(name, key) in tensors}
    return own or torchao_names.parts_of(tensors, name)


def _row(opened: Artifact, name: str, config: Config) -> Row:
    parts = _of_layer(opened.tensors, name)
    entry = opened.manifest.layers.get(name) if opened.manifest is not None else None
    codes = next((parts[key] for key in CODES if key in parts), None)
    # Packed codes always have 2 axes, so a layer whose codes are missing counts as a linear one.
    said = config.algorithm_of(name, 2 if codes is None else codes.dim())
    if codes is not None and entry is None and not _claims_nvfp4(parts, codes, said):
        return _plain_row(name, codes, parts.get("weight_scale"), "nvfp4" in said)
    kind = "layer" if entry is None else entry.op
    shape = () if codes is None else tuple(codes.shape)
    shape = (shape[0], 2 * shape[1]) if len(shape) == 2 else shape  # two codes to a byte
    # Of the true weight where the manifest knows it: the matrix includes padding, and bits per value should show that.
    count = torch.Size(shape if entry is None else entry.shape).numel()
    size = sum(t.numel() * t.element_size() for t in parts.values())
    block_format = "nvfp4" if entry is None else entry.block_format
    row = Row(name, kind, block_format, block_format, shape, count, size)
    block = 32 if "w4a8_nvfp4" in said else BLOCK  # ModelOpt's W4A8_NVFP4_FP8
    row.problems = ["its weight is missing"] if codes is None else list(_problems(parts, codes, entry, block))
    if block != BLOCK:
        row.claimed = row.precision = f"fp4, blocks of {block}"
    row.problems += _bad_input_scales(opened.tensors, name)
    row.axis = _axis(entry, codes)
    scale = parts.get("weight_scale")
    if scale is not None and scale.dtype == SCALES[block_format][0] and scale.numel():
        values = scale.float() if scale.dtype == E4M3 else FORMATS[block_format].decode(scale)
        values = values.abs()
        # NaN is reported as a problem of the row; the range is that of the other scales.
        row.scales = (float(values.nan_to_num(0).min()), float(values.nan_to_num(0).max()))
    if row.problems:
        # What the bytes are, if they are not the NVFP4 that they claim to be.
        row.precision = "nothing" if codes is None else _dtype(codes)
    return row


def _claims_nvfp4(parts: Mapping[str, Tensor], codes: Tensor, said: str) -> bool:
    """Tell whether another tool's tensors claim, by their names and types, to be an NVFP4 layer.

    Args:
        said: the algorithm that the file's config gives for the layer, or "".
    """
    scale = parts.get("weight_scale")
    packed = codes.dtype == torch.uint8
    return (
        "weight_global_scale" in parts
        or ("weight_scale_2" in parts and (not said or "nvfp4" in said))  # W4A8_AWQ has one, too
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


def _problems(
    parts: Mapping[str, Tensor], codes: Tensor, entry: LayerEntry | None, block: int = BLOCK
) -> Iterator[str]:
    """Yield the reasons why a layer that claims to be NVFP4, or FP4 in blocks of another size, is not."""
    kind, no_numbers = SCALES["nvfp4" if entry is None else entry.block_format]
    scale, tensor_scale = parts.get("weight_scale"), next((parts[key] for key in GLOBAL if key in parts), None)
    if codes.dtype != torch.uint8:
        yield f"its codes are {_dtype(codes)}, not packed uint8"
    if codes.dim() != 2:
        yield f"its codes have {codes.dim()} axes, not the 2 of a GEMM's matrix"
    elif not codes.numel():
        yield "it has no codes"
    elif 2 * codes.shape[1] % block:  # two codes to a byte
        yield f"a row has {2 * codes.shape[1]} values, which is no whole number of blocks of {block}"
    if scale is None:
        yield "it has no block scales"
    else:
        if scale.dtype != kind:
            yield f"its block scales are {_dtype(scale)}, not {'E4M3' if kind == E4M3 else 'uint8'}"
        # A tap of a convolution may end within a block, so that the matrix of a manifest's layer has more scales.
        scales = None if codes.dim() != 2 else 2 * codes.shape[1] // block
        if entry is not None:
            scales, block = matrix.scales_of(entry.plan()), block_of(entry.block_format)
        if codes.dim() == 2 and tuple(scale.shape) != (codes.shape[0], scales):
            per = codes.numel() * 2 / max(scale.numel(), 1)  # 32 for MXFP4, for example
            yield f"{per:g} values share a block scale along the last axis, not {block}"
        if scale.dtype == kind:
            bits = scale.contiguous().view(torch.uint8)
            if nan := sum(int((bits == byte).sum()) for byte in no_numbers):
                yield f"{nan} of its block scales are NaN"
        if scale.dtype == E4M3:
            negative = int((scale.float() < 0).sum())
            if negative:
                yield f"{negative} of its block scales are negative"
    if tensor_scale is None:
        yield "it has no tensor scale"
    elif tensor_scale.dtype != torch.float32 or tensor_scale.numel() != 1:
        yield f"its tensor scale is {_dtype(tensor_scale)} {tuple(tensor_scale.shape)}"
    elif not bool(torch.isfinite(tensor_scale).all()) or bool((tensor_scale < 0).any()):
        yield f"its tensor scale is {float(tensor_scale)}"
    # weight_global_scale is a divisor, for which 0 is never right.
    elif not bool(tensor_scale.any()) and ("weight_global_scale" in parts or _nonzero(codes)):
        yield "its tensor scale is 0, its codes are not"
    if entry is not None:
        yield from _against_entry(codes, entry)


def _bad_input_scales(tensors: Mapping[str, Tensor], name: str) -> Iterator[str]:
    """Yield what is wrong with the static scales of a layer's activations."""
    for key in INPUTS:
        scale = tensors.get(join(name, key))
        if scale is not None and not (bool(torch.isfinite(scale.float()).all()) and bool((scale.float() > 0).all())):
            yield f"its {key} is {scale.float().flatten()[:4].tolist()}"


def _nonzero(codes: Tensor) -> bool:
    return codes.dtype == torch.uint8 and bool((codes & 0x77).any())  # -0 is 0


def _against_entry(codes: Tensor, entry: LayerEntry) -> Iterator[str]:
    rows, taps, blocks = matrix.sizes(entry.plan())
    if entry.k_order != matrix.K_ORDER:
        yield f"the order of its contracted index is {entry.k_order!r}, not {matrix.K_ORDER!r}"
    elif tuple(codes.shape) != (rows, taps * blocks * 8):
        yield f"its matrix is {tuple(codes.shape)}, of a weight {entry.shape} it would be {(rows, taps * blocks * 8)}"


def _axis(entry: LayerEntry | None, codes: Tensor | None) -> str:
    if entry is None:
        return "the last axis" if codes is not None and codes.dim() == 2 else ""
    return "in-features" if entry.op == "linear" else "in-channels, tap by tap"
