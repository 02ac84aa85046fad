"""Seal and write the ONNX file of nv.export.to_onnx, with external data beside it. The verifier reads the seal.

The metadata hold two entries:

    "te_nvfp4_cv.sha256"   JSON: SHA-256 of each initializer ("initializers"), and of all else in the model ("model")
    "te_nvfp4_cv.layers"   JSON: names of the layers in NVFP4

A model is checked in full before anything is written. External data lie in NAME.onnx.DIGEST.data, so a reader of the
old file finds the old data until the new file is in its place. After that, data that it does not use are removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.files import write_atomically

CLAIMS, SUMS = "te_nvfp4_cv.layers", "te_nvfp4_cv.sha256"
EXTERNAL_BYTES = 1_500_000_000  # a protobuf file holds less than 2 GB
SMALL = 1024  # bytes; smaller initializers stay in the model's own file


# ---- metadata -------------------------------------------------------------------------------------------------------


def seal(proto: Any, layers: Iterable[str]) -> None:
    """Write into the metadata which layers are in NVFP4, and checksums of everything in the model."""
    # The entry exists before its value: _digest_of_rest leaves it out by its name, in writing and in checking.
    sums = proto.metadata_props.add(key=SUMS)
    proto.metadata_props.add(key=CLAIMS, value=json.dumps(list(layers)))
    found = {tensor.name: _digest(tensor) for tensor in proto.graph.initializer}
    sums.value = json.dumps({"initializers": found, "model": _digest_of_rest(proto)})


def remove_stack_traces(part: Any) -> None:
    """Remove torch's stack traces from a model, in place: they hold the paths of files on the machine that exports.

    Args:
        part: the model, or any message in it; subgraphs and functions are searched, too.
    """
    # Recursive, because nodes, functions, subgraphs and values carry metadata of their own.
    for kind, value in part.ListFields():
        if kind.type != kind.TYPE_MESSAGE:
            continue
        if kind.name == "metadata_props":
            shown = [prop for prop in value if not prop.key.endswith("stack_trace")]
            if len(shown) < len(value):
                del value[:]
                value.extend(shown)
            continue
        # A single message has ListFields; a repeated field is a sequence of messages.
        for inner in [value] if hasattr(value, "ListFields") else value:
            remove_stack_traces(inner)


def entry(proto: Any, key: str) -> str | None:
    """Return the metadata's entry of that name, or None."""
    return next((prop.value for prop in proto.metadata_props if prop.key == key), None)


def changes(proto: Any) -> list[str]:
    """List what differs from the checksums in the metadata; external data must be loaded. Empty without checksums."""
    text = entry(proto, SUMS)
    if text is None:
        return []
    try:
        told = json.loads(text)
        sums, model = dict(told["initializers"]), told["model"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ["its checksums cannot be read"]
    found = {tensor.name: _digest(tensor) for tensor in proto.graph.initializer}
    differing = sorted(name for name in found.keys() | sums.keys() if found.get(name) != sums.get(name))
    problems = ["wrong checksum of " + ", ".join(differing[:4])] if differing else []
    return problems + ([] if _digest_of_rest(proto) == model else ["its graph is not the one that was written"])


def _digest(tensor: Any) -> str:
    # Not the whole message: moving the bytes into a file beside the model must not change the digest.
    content = hashlib.sha256(f"{tensor.data_type} {list(tensor.dims)} ".encode())
    content.update(tensor.raw_data or tensor.SerializeToString(deterministic=True))
    return content.hexdigest()


def _digest_of_rest(proto: Any) -> str:
    """Return the SHA-256 of everything in a model but the initializers and the checksums."""
    rest = type(proto)()
    rest.CopyFrom(proto)
    del rest.graph.initializer[:]
    del rest.metadata_props[:]
    rest.metadata_props.extend(prop for prop in proto.metadata_props if prop.key != SUMS)
    return hashlib.sha256(rest.SerializeToString(deterministic=True)).hexdigest()


# ---- writing --------------------------------------------------------------------------------------------------------


def write(proto: Any, path: Path, external: bool | None) -> tuple[Path, ...]:
    """Write a model. Returns its files, beginning with the one to load.

    Args:
        external: write the weights into a file beside the model. If None, this is done if they do not fit into one.
    Raises:
        ValueError: The model is not valid ONNX.
        RuntimeError: A file cannot be written. What was there before is unchanged.
    """
    path = path.resolve() if path.is_symlink() else path  # data lie beside the file, not the link
    if external is None:
        # Below protobuf's limit, since nodes and names need room as well.
        external = sum(len(t.raw_data) for t in proto.graph.initializer) > EXTERNAL_BYTES
    content = _move_out(proto, path.name) if external else bytearray()
    _check(proto)
    written: tuple[Path, ...] = (path,)
    if external:
        # Data before the model that refers to them: a crash in between leaves the old model with its old data.
        beside = path.with_name(_data_name(path.name, content))
        new = not beside.exists()
        write_atomically(beside, memoryview(content))
        written = (path, beside)
    try:
        write_atomically(path, proto.SerializeToString())
    except RuntimeError:
        if external and new:  # data with this digest may be those of the old file
            beside.unlink()
        raise
    _remove_old(path, written)
    return written


def _data_name(name: str, content: bytearray) -> str:
    return f"{name}.{hashlib.sha256(content).hexdigest()[:8]}.data"


def _move_out(proto: Any, name: str) -> bytearray:
    """Move the large initializers out of a model, which then refers to a file. Returns the content of that file."""
    import onnx

    content = bytearray()
    moved = [tensor for tensor in proto.graph.initializer if len(tensor.raw_data) >= SMALL]
    for tensor in moved:
        content += b"\0" * (-len(content) % 4096)  # runtimes map the file: offsets should be those of pages
        place = {"offset": len(content), "length": len(tensor.raw_data)}
        content += tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.extend(
            onnx.StringStringEntryProto(key=key, value=str(value)) for key, value in place.items()
        )
    # Known only now: the digest in the name is that of the whole content.
    location = _data_name(name, content)
    for tensor in moved:
        tensor.external_data.append(onnx.StringStringEntryProto(key="location", value=location))
    return content


def _check(proto: Any) -> None:
    """Check a model in full, as ONNX does. Initializers whose file is not there yet take part as inputs."""
    import onnx

    outside = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        whole = onnx.ModelProto()
        whole.CopyFrom(proto)
        inside = [t for t in proto.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        del whole.graph.initializer[:]
        whole.graph.initializer.extend(inside)
        whole.graph.input.extend(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in outside)
        # The checker would open the external file, which is written only if the model is valid.
        proto = whole
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise value_error(
            "nv.export.to_onnx: the model's graph is no valid ONNX.",
            got=" ".join(str(error).split())[:400],
            needs="a model whose operators agree in their types, all in fp32",
            fix="take casts to half precision out of the model's forward",
        ) from error


def _remove_old(path: Path, written: tuple[Path, ...]) -> None:
    """Remove files of external data that belonged to an older file of this name."""
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.data")
    for found in path.parent.iterdir():
        if pattern.fullmatch(found.name) and found not in written:
            with contextlib.suppress(OSError):  # the file of another user, or an open one on Windows
                found.unlink()
