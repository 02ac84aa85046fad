"""Write and read the file of a packed model: safetensors, with what load needs in its metadata.

Only tensors and texts are handled here, no models. What is in a file:

    per quantized layer   NAME.weight          uint8 [N, K / 2]   E2M1 codes, the even column in the low nibble
                          NAME.weight_scale    e4m3  [N, K / 16]
                          NAME.weight_scale_2  fp32  []           amax / (6 E); value = code * both scales
                          (of other block formats: SCALES in manifest.py; weight_scale_2 is 1)
                          NAME.input_scale     fp32  []           of a static activation scale, where there is one
                          NAME.input_shift     fp32  [C]          subtracted from x, if the layer is shifted
                          NAME.output_shift    fp32  [O]          added to y then
    everything else       as in the state_dict, in its own dtype
    metadata              "te_nvfp4_cv": JSON (manifest.py);  "quantization_config": JSON as ModelOpt writes it

The names are ModelOpt's, and for linear layers the layout is, too. The rows of a convolution's matrix are output
channels; K runs over the kernel's taps, then over the channels of a group, padded to 16 (matrix.py). The manifest says
so as k_order. It also holds each layer's shape and its exact amax, of which weight_scale_2 is a rounded quotient.

A large model is written as shards BASE-00001-of-00002-DIGEST.safetensors, and BASE.safetensors.index.json after them.
A file is whole or absent: the last rename replaces what was there before, and the old shards are removed after that.
The manifest holds name, dtype, shape and the SHA-256 of the bytes of every tensor, and the SHA-256 of itself. Reading
maps the files into memory and runs no code from them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.errors import no_such_file, runtime_error, value_error
from te_nvfp4_cv.export.manifest import Manifest, damaged
from te_nvfp4_cv.files import remove_drafts, write_atomically

KEY = "te_nvfp4_cv"  # of the metadata
SUFFIX, INDEX = ".safetensors", ".safetensors.index.json"


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, in its logical order."""
    # flatten before view: a tensor without axes cannot be viewed as bytes, and numpy has no bf16 or E4M3.
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def kind_of(tensor: Tensor) -> str:
    """Return a tensor's dtype and shape as one text: bytes of one dtype may be read as those of another."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def holds(tensor: Tensor) -> bool:
    """Return True if a safetensors file can hold a tensor of this dtype and layout."""
    dense = tensor.layout == torch.strided and tensor.device.type != "meta" and not tensor.is_quantized
    return dense and tensor.dtype not in (torch.complex32, torch.complex128)


# ---- write ----------------------------------------------------------------------------------------------------------


def write(
    path: Path, tensors: Mapping[str, Tensor], manifest: Manifest, config: Mapping[str, Any], shard_bytes: int
) -> list[Path]:
    """Write a packed model. Returns the files that it is in, beginning with the one to load.

    Args:
        config: the quantization_config of the metadata.
        shard_bytes: more bytes than this are written as several files and an index.
    Raises:
        RuntimeError: A file cannot be written. What was at `path` before is unchanged.
    """
    from safetensors.torch import save

    base = base_of(path.resolve() if path.is_symlink() else path)  # shards lie beside the file, not the link
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    sums = {name: digest(t) for name, t in tensors.items()}
    kinds = {name: kind_of(t) for name, t in tensors.items()}
    manifest = Manifest(**{**vars(manifest), "sha256": sums, "kinds": kinds})
    metadata = {"format": "pt", KEY: manifest.to_json(), "quantization_config": json.dumps(config)}
    parts = _parts(tensors, shard_bytes)
    before = set(_shards(base))  # seen before anything is written, so that new shards are never taken for old ones
    if base.parent.is_dir() and os.name == "posix":
        remove_drafts(base.parent, base.name)
    # In both branches the file that load opens is written last, and what it replaces is removed after that.
    if len(parts) == 1:
        target = base.with_name(base.name + SUFFIX)
        _write_file(target, save(dict(tensors), metadata))
        written, stale = [target], base.with_name(base.name + INDEX)
    else:
        # With a digest in their names, new shards do not replace old ones, which stay valid until the index changes.
        tag = hashlib.sha256("".join(sorted(sums.values())).encode()).hexdigest()[:8]
        weight_map: dict[str, str] = {}
        shards = []
        for number, names in enumerate(parts, start=1):
            shard = base.with_name(f"{base.name}-{number:05d}-of-{len(parts):05d}-{tag}{SUFFIX}")
            # The manifest is in the index only: a shard does not know the others.
            _write_file(shard, save({name: tensors[name] for name in names}, {"format": "pt"}))
            weight_map |= dict.fromkeys(names, shard.name)
            shards.append(shard)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        content = {"metadata": {"total_size": total, **metadata}, "weight_map": weight_map}
        target = base.with_name(base.name + INDEX)
        write_atomically(target, json.dumps(content, indent=1).encode())
        written, stale = [target, *shards], base.with_name(base.name + SUFFIX)  # read() would find it before the index
    for old in before - set(written) | {stale}:
        if old.is_file():
            old.unlink(missing_ok=True)
    return written


def _write_file(path: Path, content: bytes) -> None:
    """Write what safetensors has made, with its header in one order: safetensors writes metadata in any."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata = header.pop("__metadata__")
    entries = dict(sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]))
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    write_atomically(path, memoryview(content)[8 + size :], before=len(text).to_bytes(8, "little") + text)


def base_of(path: Path) -> Path:
    """Return a path without the endings of this format."""
    ending = next((ending for ending in (INDEX, SUFFIX) if path.name.endswith(ending)), "")
    # with_suffix would cut a name such as "resnet-1.5" at its dot.
    return path.with_name(path.name.removesuffix(ending))


def _shards(base: Path) -> Iterator[Path]:
    pattern = re.compile(re.escape(base.name) + r"-\d{5}-of-\d{5}-[0-9a-f]{8}\.safetensors")
    if base.parent.is_dir():
        yield from (found for found in base.parent.iterdir() if pattern.fullmatch(found.name))


def _parts(tensors: Mapping[str, Tensor], most: int) -> list[list[str]]:
    """Return the tensors' names by file, in order. A tensor that is larger than `most` gets a file for itself."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, t in tensors.items():
        own = t.numel() * t.element_size()
        # Whole tensors only; an empty part takes any tensor, so every tensor finds a file.
        if parts[-1] and size + own > most:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += own
    return parts


# ---- read -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Artifact:
    """An open file of a packed model. Its tensors are mapped from the disk.

    Attributes:
        source: the path, for errors.
        manifest: None if another tool wrote the file.
        config: the quantization_config of the metadata, or an empty dict.
        files: all files of the model, beginning with the one that was opened.
    """

    source: str
    tensors: dict[str, Tensor]
    manifest: Manifest | None
    config: dict[str, Any]
    files: tuple[Path, ...]

    def check(self) -> None:
        """Compare every tensor with its SHA-256, which reads all bytes, and with its dtype and shape.

        Raises:
            ValueError: A tensor differs, is missing or was added.
        """
        if self.manifest is None:
            return
        sums = self.manifest.sha256
        # A tensor without a checksum was added by someone, and a checksum without a tensor says that one was lost.
        differing = self.tensors.keys() ^ sums.keys()
        differing |= {name for name, t in self.tensors.items() if name in sums and digest(t) != sums[name]}
        if differing:
            raise damaged(self.source, "wrong checksum of " + ", ".join(sorted(differing)[:4]))
        kinds = self.manifest.kinds
        unlike = [name for name, t in self.tensors.items() if kinds.get(name) != kind_of(t)]
        if unlike and self.manifest.version > 1:
            said = ", ".join(f"{name} is {kind_of(self.tensors[name])}, not {kinds.get(name)}" for name in unlike[:4])
            raise damaged(self.source, f"wrong dtype or shape: {said}")


def read(path: str | os.PathLike[str]) -> Artifact:
    """Open a packed model.

    Args:
        path: the file, the index of several files, or either without its ending.
    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file is damaged or of another kind, or a shard is missing.
        RuntimeError: A file cannot be read.
    """
    found = _find(Path(path))
    _refuse_other_kinds(found)
    if not found.name.endswith(INDEX):
        tensors, metadata = _read_file(found)
        return _artifact(found, tensors, metadata, (found,))
    try:
        content = json.loads(found.read_text(encoding="utf-8"))
        weight_map = {str(name): str(file) for name, file in content["weight_map"].items()}
        # total_size, a number, is in the same table; safetensors' own metadata are texts only.
        metadata = {key: value for key, value in content.get("metadata", {}).items() if isinstance(value, str)}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise damaged(str(found), f"{type(error).__name__}: {error}") from error
    tensors, files = {}, [found]
    for name in sorted(set(weight_map.values())):
        # An index from elsewhere must not make us read files of other folders.
        if Path(name).name != name or not name or len(name) > 255 or "\0" in name:
            raise damaged(str(found), f"a shard outside of the folder: {name[:300]!r}")
        shard = found.with_name(name)
        if not shard.is_file():
            raise value_error(
                f"{found}: a shard is missing.", got=f"no file {name}",
                needs=f"{len(set(weight_map.values()))} shards beside the index", fix="copy all of them",
            )
        tensors |= _read_file(shard)[0]
        files.append(shard)
    if tensors.keys() != weight_map.keys():
        differing = sorted(tensors.keys() ^ weight_map.keys())
        raise damaged(str(found), f"index and shards differ in {', '.join(differing[:4])}")
    return _artifact(found, tensors, metadata, tuple(files))


def is_of_torch(path: Path) -> bool:
    """Tell whether torch.save wrote a file, by its first bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:  # whoever reads the file next says why it cannot be read
        return False
    # A zip archive, or a bare pickle. Safetensors begins with a length, which may have these bytes, and then "{".
    return start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and start[8:] != b"{"


def _refuse_other_kinds(path: Path) -> None:
    """Refuse whole files of other kinds, which would be called damaged otherwise."""
    if path.suffix == ".onnx":
        kind, fix = "an ONNX file", "load the .safetensors file that it was made from"
    elif is_of_torch(path):
        kind, fix = "a checkpoint of torch.save", "model.load_state_dict(torch.load(path)); nv.export.save(model, name)"
    else:
        return
    title = f"nv.export: {path} is {kind}, not a packed file."
    raise value_error(title, got=path.name, needs=f"a file {SUFFIX} of nv.export.save", fix=fix)


def _find(path: Path) -> Path:
    endings = (SUFFIX, INDEX) if path.name else ()
    # The single file before the index, as `write` expects when it removes the stale one of the two.
    candidates = (path, *(base_of(path).with_name(base_of(path).name + ending) for ending in endings))
    found = next((p for p in candidates if p.is_file()), None)
    if found is None:
        raise no_such_file(
            "nv.export: no such exported file.",
            got=f"{str(path)!r}{': a folder' if path.is_dir() else ''}",
            needs=f"a file {SUFFIX}, or the {INDEX} of several files",
            fix="correct the path",
        )
    return found


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    # In the function: the package is needed for files only, and training should start without it.
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise damaged(str(path), str(error)) from error
    except OSError as error:
        raise runtime_error(
            f"{path} cannot be read.", got=str(error), needs="a readable file", fix="check its rights"
        ) from error
    except Exception as error:  # a malicious header fails in torch, with any class of error
        raise damaged(str(path), f"{type(error).__name__}: {error}") from error


def _artifact(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], files: tuple[Path, ...]) -> Artifact:
    manifest = Manifest.from_json(metadata[KEY], str(path)) if KEY in metadata else None
    try:
        config = json.loads(metadata.get("quantization_config", "{}"))
    except (ValueError, RecursionError) as error:
        raise damaged(str(path), f"its quantization_config: {error}") from error
    return Artifact(str(path), tensors, manifest, config if isinstance(config, dict) else {}, files)


def damaged_layer(opened: Artifact, name: str, why: str) -> ValueError:
    """Return the error for a layer whose tensors are not what the manifest says."""
    return damaged(opened.source, f"layer {name!r}: {why}")
