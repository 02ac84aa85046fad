"""Files that were cut, changed or made up: a clear error and an untouched model, never a crash or another answer."""

import copy
import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.export import artifact
from te_nvfp4_cv.export.verify import verify
from tests.helpers import same_bits, values

safetensors = pytest.importorskip("safetensors.torch", reason="the extra [export]")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("whole") / "net"
    return (
        nv.export.save(nn.Sequential(nn.Conv2d(16, 32, 3), nn.ConvTranspose2d(32, 16, 2)), path).files[0].read_bytes()
    )


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(16, 32, 3), nn.ConvTranspose2d(32, 16, 2))


def outcome(path: Path) -> Any:
    """The outputs of the loaded model, or the error; an error leaves the model as it was."""
    net = model()
    before = copy.deepcopy(net.state_dict())
    try:
        return nv.export.load(path, net)(values((1, 16, 5, 5)))
    except ValueError as error:
        assert "\n  got:" in str(error) and "\n  fix:" in str(error)
        assert [type(layer) for layer in net] == [nn.Conv2d, nn.ConvTranspose2d]
        assert all(same_bits(before[name], value) for name, value in net.state_dict().items())
        return error


def test_truncated_anywhere(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    for length in (*range(0, 64, 7), *range(64, len(whole), 997), len(whole) - 1):
        path.write_bytes(whole[:length])
        assert isinstance(outcome(path), ValueError), length
    path.write_bytes(whole + b"\0")
    assert isinstance(outcome(path), ValueError)


def test_flipped_bits(whole: bytes, tmp_path: Path) -> None:
    """One bit anywhere: an error, or, in a part that says nothing of the model, the same outputs."""
    path, draw = tmp_path / "net.safetensors", random.Random(0)
    path.write_bytes(whole)
    expected = outcome(path)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = 0
    for number in range(400):
        position = draw.randrange(header) if number % 2 else draw.randrange(header, len(whole))
        changed = bytearray(whole)
        changed[position] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(changed))
        found = outcome(path)
        refused += isinstance(found, ValueError)
        assert isinstance(found, ValueError) or (position < header and same_bits(found, expected)), position
    assert refused > 350


BYTES = {1: ("U8", "I8", "F8_E4M3", "F8_E5M2"), 2: ("F16", "BF16", "I16"), 4: ("F32", "I32"), 8: ("F64", "I64")}
KINDS = {kind: size for size, kinds in BYTES.items() for kind in kinds}


def mutated(whole: bytes, draw: random.Random) -> bytes:
    """Return a file with another name, dtype or shape in its header, or another byte; sizes fit, so that it opens."""
    size = struct.unpack("<Q", whole[:8])[0]
    header, rest = json.loads(whole[8 : 8 + size]), bytearray(whole[8 + size :])
    names = [name for name in header if name != "__metadata__"]
    name, kind = draw.choice(names), draw.choice(("dtype", "shape", "name", "swap", "byte", "metadata"))
    entry = header[name]
    count = math.prod(entry["shape"]) * KINDS[entry["dtype"]]
    if kind == "dtype":
        entry["dtype"] = draw.choice([k for k in KINDS if k != entry["dtype"] and count % KINDS[k] == 0])
        values = count // KINDS[entry["dtype"]]
        if math.prod(entry["shape"]) != values:
            entry["shape"] = [values]
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = draw.choice([shape[::-1], [*shape, 1], [1, *shape], [math.prod(shape)]])
    elif kind == "name":
        header[name + draw.choice("x_.0")] = header.pop(name)
    elif kind == "swap":
        other = draw.choice(names)
        header[name], header[other] = header[other], header[name]
    elif kind == "byte":
        rest[draw.randrange(len(rest))] ^= 1 << draw.randrange(8)
    else:
        text = header["__metadata__"][artifact.KEY]
        place = draw.randrange(len(text))
        header["__metadata__"][artifact.KEY] = text[:place] + draw.choice("0123456789abcdef\\{") + text[place + 1 :]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(rest)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.stress)])
def test_mutations_never_load_as_something_else(count: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 8, 2, bias=False))
    with torch.no_grad():
        net[1].running_mean.uniform_(-1, 1)
        net[2].weight.mul_(3)
    whole = nv.export.save(net.eval(), tmp_path / "net").files[0].read_bytes()
    path, draw, x = tmp_path / "m.safetensors", random.Random(count), values((1, 16, 5, 5))
    path.write_bytes(whole)

    def outputs() -> Any:
        fresh = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 8, 2, bias=False))
        try:
            return nv.export.load(path, fresh)(x)
        except ValueError as error:
            return error

    expected = outputs()
    refused = 0
    for number in range(count):
        path.write_bytes(mutated(whole, draw))
        found = outputs()
        refused += isinstance(found, ValueError)
        assert isinstance(found, ValueError) or same_bits(found, expected), number
        assert isinstance(found, ValueError) or verify(path).sound
    assert refused > 0.8 * count


def edited(whole: bytes, path: Path, name: str, dtype: str) -> None:
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    header[name]["dtype"] = dtype
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])


def test_an_edited_dtype_is_refused(whole: bytes, tmp_path: Path) -> None:
    """The bytes are the same, and so are their checksums."""
    path = tmp_path / "net.safetensors"
    edited(whole, path, "0.bias", "I32")
    found = outcome(path)
    assert isinstance(found, ValueError) and "0.bias is int32 [32], not float32 [32]" in str(found)
    assert not verify(path).sound


def test_a_file_of_the_first_version_loads_and_is_told_as_such(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"

    def older(fields: dict[str, Any], tensors: Any) -> None:
        fields.update(version=1)
        del fields["kinds"]

    forged(whole, path, older)
    assert not isinstance(outcome(path), ValueError)
    report = verify(path)
    assert report.sound and "version 1 of the format" in str(report)
    # What its checksums do not cover is at least not taken for another kind of number.
    edited(path.read_bytes(), path, "0.bias", "I32")
    assert isinstance(outcome(path), ValueError)


def test_made_up_headers(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    rest = whole[8 + size :]

    def refused(change: Any) -> None:
        made = copy.deepcopy(header)
        made = change(made) or made
        text = made if isinstance(made, bytes) else json.dumps(made).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + rest)
        assert isinstance(outcome(path), ValueError)

    refused(lambda h: h["0.weight"].update(shape=[1 << 40, 1 << 40]))
    refused(lambda h: h["0.weight"].update(shape=[-1, 72]))
    refused(lambda h: h["0.weight"].update(data_offsets=[0, 1 << 62]))
    refused(lambda h: h["0.weight"].update(data_offsets=h["1.weight"]["data_offsets"]))
    refused(lambda h: h["0.weight"].update(dtype="F4096"))
    refused(lambda h: h["0.weight"].update(dtype="I8"))
    refused(lambda h: h.pop("0.weight_scale") and None)
    refused(lambda h: h["__metadata__"].pop(artifact.KEY) and None)
    refused(lambda h: h["__metadata__"].update({artifact.KEY: "["}))
    refused(lambda h: h["__metadata__"].update({artifact.KEY: "[" * 100_000}))
    refused(lambda h: h.update({"../../etc/passwd": h.pop("0.bias")}))
    refused(lambda h: b"{" * 10_000)
    refused(lambda h: b" ")
    path.write_bytes(struct.pack("<Q", (1 << 63) - 1) + whole[8:])
    assert isinstance(outcome(path), ValueError)


def forged(whole: bytes, path: Path, change: Any, sums: bool = True) -> None:
    """An exported file with another manifest, or other tensors, whose digests all fit."""
    tensors = safetensors.load(whole)
    size = struct.unpack("<Q", whole[:8])[0]
    metadata = json.loads(whole[8 : 8 + size])["__metadata__"]
    fields = json.loads(json.loads(metadata[artifact.KEY])["manifest"])
    change(fields, tensors)
    if "kinds" in fields:
        fields["kinds"] = {name: artifact.kind_of(t) for name, t in tensors.items()}
    fields["sha256"] = {name: artifact.digest(t) for name, t in tensors.items()}
    text = json.dumps(fields)
    digest = artifact.hashlib.sha256(text.encode()).hexdigest()
    metadata[artifact.KEY] = json.dumps({"digest": digest, "manifest": text})
    safetensors.save_file(tensors, path, metadata)


def test_forged_manifests(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"

    def refused(change: Any, told: str) -> None:
        forged(whole, path, change)
        found = outcome(path)
        assert isinstance(found, ValueError) and told in str(found), found

    forged(whole, path, lambda fields, tensors: None)
    assert not isinstance(outcome(path), ValueError)
    first = "0"
    refused(lambda f, t: f["layers"][first].update(shape=[1 << 40, 1 << 40, 3, 3]), "described as")
    refused(lambda f, t: f["layers"][first].update(shape=[32, 16]), "described as")
    refused(lambda f, t: f["layers"][first].update(shape="32"), "damaged")
    refused(lambda f, t: f["layers"][first].update(amax=float("nan")), "described as")
    refused(lambda f, t: f["layers"][first].update(op="__import__"), "described as")
    refused(lambda f, t: f["layers"][first].update(recipe=7), "described as")
    refused(lambda f, t: f["layers"][first].update(surprise=1), "damaged")
    refused(lambda f, t: f["layers"].update(none=f["layers"].pop(first)), "none.weight is missing")
    refused(lambda f, t: f.update(recipes=["[recipe]\nrht = 1"]), "unknown key 'rht'")
    refused(lambda f, t: f.update(layers=[]), "damaged")
    refused(lambda f, t: f.update(recipes=[3]), "a recipe is not a text")
    refused(lambda f, t: f.update(high=[]), "not names and texts")
    refused(lambda f, t: f.update(folded={"1": "0"}), "'1' is said to be folded into '0'")
    refused(lambda f, t: f.update(folded={"": "0"}), "'' is said to be folded into '0'")
    refused(lambda f, t: f["layers"][first].update(tiles="yes"), "described as")
    refused(lambda f, t: f["layers"][first].update(op="linear", shape=[32, 16], channels_last=True), "described as")
    refused(lambda f, t: f["layers"][first].update(input_amax=False), "described as")
    refused(lambda f, t: f["layers"][first].update(e4m3_max=256), "its scales reach 256")
    refused(lambda f, t: f["layers"][first].update(call={"stride": [3, 3]}), "stride [1, 1], in the file [3, 3]")
    refused(lambda f, t: f.update(settings=[]), "no settings of modules")
    refused(lambda f, t: f.update(settings={"0": 3}), "no settings of modules")
    refused(lambda f, t: f.update(version=3), "version 3")
    refused(lambda f, t: f["layers"][first].update(groups=2, shape=[32, 8, 3, 3]), "of another shape or kind")
    nan = torch.full((32, 9), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    refused(lambda f, t: t.update({"0.weight_scale": nan}), "holds NaN")
    mixed = torch.arange(1, 289).reshape(32, 9).remainder(100).to(torch.uint8).view(torch.float8_e4m3fn)
    refused(lambda f, t: t.update({"0.weight_scale": mixed}), "differs within a 16x16 tile")
    refused(lambda f, t: t.update({"0.weight": t["0.weight"][:, :8].contiguous()}), "layer '0': weight is")
    refused(lambda f, t: t.update({"0.weight_scale": t["0.weight_scale"].float()}), "layer '0': weight_scale is")


def test_an_index_that_is_damaged(tmp_path: Path) -> None:
    saved = nv.export.save(model(), tmp_path / "net", shard_bytes=2000)
    index = saved.files[0]
    whole = index.read_text()
    for change in ("", "{", whole[: len(whole) // 2], "[]", "{}", '{"weight_map": 3}'):
        index.write_text(change)
        assert isinstance(outcome(index), ValueError)
    content = json.loads(whole)
    name, file = next(iter(content["weight_map"].items()))
    for weight_map in (
        {**content["weight_map"], name: "../" + file},
        {**content["weight_map"], "extra": file},
        {key: value for key, value in content["weight_map"].items() if key != name},
    ):
        index.write_text(json.dumps({**content, "weight_map": weight_map}))
        assert isinstance(outcome(index), ValueError)
    index.write_bytes(b"\xff\xfe" + whole.encode())
    assert isinstance(outcome(index), ValueError)
    index.write_text(whole)
    assert not isinstance(outcome(index), ValueError)


def test_changed_tensors_are_noticed_unless_verification_is_off(whole: bytes, tmp_path: Path) -> None:
    changed = bytearray(whole)
    changed[-1] ^= 1
    path = tmp_path / "net.safetensors"
    path.write_bytes(bytes(changed))
    with pytest.raises(ValueError, match="wrong checksum of"):
        nv.export.load(path, model())
    nv.export.load(path, model(), verify=False)
