"""The verifier on ONNX files: what it sees in a graph, of this library or another, and which changes it finds."""

import functools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.export.codes import quantize_layer
from te_nvfp4_cv.export.modules import become
from te_nvfp4_cv.export.onnx import file
from te_nvfp4_cv.export.onnx.convert import to_onnx
from te_nvfp4_cv.export.verify import __main__ as verify
from tests.helpers import values

onnx = pytest.importorskip("onnx", reason="the extra [export]")
pytest.importorskip("onnxscript", reason="the extra [export]")

RECIPE = nv.NVFP4BlockScaling()


def inference_linear(*after: nn.Module) -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), *after)
    become(model[0], quantize_layer(model[0], RECIPE), RECIPE)
    return model


@functools.cache
def content(form: str) -> bytes:
    """The bytes of one exported layer: an export takes longer than what the tests do with its file."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        return to_onnx(inference_linear(), values((4, 16)), Path(folder) / "m.onnx", form).files[0].read_bytes()


def exported(folder: Path, form: str = "qdq") -> Path:
    path = folder / "m.onnx"
    path.write_bytes(content(form))
    return path


def changed(path: Path, change: Callable[[Any], object], checksums: bool = False) -> Path:
    """The file after a change, without its checksums: what is found is found in the graph."""
    proto = onnx.load(str(path))
    change({tensor.name: tensor for tensor in proto.graph.initializer} | {"": proto})
    if not checksums:
        (sums,) = [entry for entry in proto.metadata_props if entry.key == file.SUMS]
        proto.metadata_props.remove(sums)
    onnx.save(proto, str(path))
    return path


def blocks_along_rows(parts: dict[str, Any]) -> None:
    """The matrix product takes the transpose of the dequantized weight: blocks now run along output channels."""
    nodes = parts[""].graph.node
    transpose = next(n for n in nodes if n.op_type == "Transpose")
    transpose.attribute[0].ints[:] = [0, 1]


def residual(parts: dict[str, Any]) -> None:
    """The weight is the dequantized one plus a whole fp32 matrix."""
    proto = parts[""]
    product = next(n for n in proto.graph.node if n.op_type == "MatMul")
    rest = np.full((16, 16), 0.01, dtype=np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(rest, "0.weight_rest"))
    added = onnx.helper.make_node("Add", [product.input[1], "0.weight_rest"], ["0.weight_sum"])
    proto.graph.node.insert(list(proto.graph.node).index(product), added)
    product.input[1] = "0.weight_sum"


def nan_scale(parts: dict[str, Any]) -> None:
    raw = bytearray(parts["0.weight_scale"].raw_data)
    raw[0] = 0x7F
    parts["0.weight_scale"].raw_data = bytes(raw)


def constant_folded(parts: dict[str, Any]) -> None:
    """An optimizer has computed the weight: fp32 under the name of an NVFP4 layer."""
    proto = parts[""]
    product = next(n for n in proto.graph.node if n.op_type == "MatMul")
    weight = onnx.numpy_helper.from_array(np.zeros((16, 16), np.float32), "0.weight_folded")
    proto.graph.initializer.append(weight)
    product.input[1] = weight.name


def tensor_scale(value: float) -> Callable[[dict[str, Any]], None]:
    def change(parts: dict[str, Any]) -> None:
        parts["0.weight_scale_2"].CopyFrom(onnx.numpy_helper.from_array(np.float32(value), "0.weight_scale_2"))

    return change


PRETENDERS: list[tuple[Callable[[Any], object], str]] = [
    (blocks_along_rows, "do not run along the contracted index"),
    (nan_scale, "1 of its block scales are NaN"),
    (constant_folded, "named as NVFP4, its weight is fp32"),
    (tensor_scale(float("nan")), "its tensor scale is nan"),
    (tensor_scale(float("inf")), "its tensor scale is inf"),
    (tensor_scale(-1.0), "its tensor scale is -1.0"),
    (tensor_scale(0.0), "its tensor scale is 0, its codes are not"),
    (residual, "its weight is made of fp32 values, too: 0.weight_rest"),
]


@pytest.mark.parametrize("form", ["qdq", "portable"])
@pytest.mark.parametrize(("change", "told"), PRETENDERS)
def test_a_graph_that_pretends(change: Callable[[Any], object], told: str, form: str, tmp_path: Path) -> None:
    path = exported(tmp_path, form)
    assert verify.main([str(path)]) == 0
    report = verify.verify(changed(path, change))
    assert not report.sound and told in str(report) and report.rows[0].precision != "nvfp4"
    assert verify.main([str(path)]) == 1


def test_a_weight_of_zeros_has_a_tensor_scale_of_zero(tmp_path: Path) -> None:
    layer = nn.Linear(16, 16)
    nn.init.zeros_(layer.weight)
    become(layer, quantize_layer(layer, RECIPE), RECIPE)
    for form in ("qdq", "portable"):
        path = to_onnx(nn.Sequential(layer), values((4, 16)), tmp_path / "m.onnx", form).files[0]
        report = verify.verify(path)
        assert report.sound and report.rows[0].scales == (0.0, 0.0)


def test_a_layer_that_is_gone_is_a_problem(tmp_path: Path) -> None:
    def rename(parts: dict[str, Any]) -> None:
        parts[""].metadata_props[-1].value = '["0", "7"]'

    assert (
        "'7' is named as NVFP4 and is not in the graph"
        in verify.verify(changed(exported(tmp_path), rename)).problems[0]
    )


@pytest.mark.parametrize("claims", ["5", "[", "null", '"abc"', '{"a": 1}', "[3]", ""])
def test_claims_that_cannot_be_read_are_a_problem(claims: str, tmp_path: Path) -> None:
    def change(parts: dict[str, Any]) -> None:
        constant_folded(parts)
        parts[""].metadata_props[-1].value = claims

    path = changed(exported(tmp_path), change)
    assert verify.verify(path).problems == ["its list of layers in NVFP4 cannot be read"]
    assert verify.main([str(path)]) == 1


@pytest.mark.parametrize("form", ["qdq", "portable"])
def test_the_shape_is_that_of_the_values(form: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(32, 64, 3))
    become(model[0], quantize_layer(model[0], RECIPE), RECIPE)
    (row,) = verify.verify(to_onnx(model, values((2, 32, 5, 5)), tmp_path / "m.onnx", form).files[0]).rows
    assert row.shape == (64, 288) and row.count == 64 * 288 and row.bytes == 64 * 288 // 2 + 64 * 18 + 4


# ---- checksums ------------------------------------------------------------------------------------------------------


def flip_signs(parts: dict[str, Any]) -> None:
    parts["0.weight"].raw_data = bytes(byte ^ 0x88 for byte in parts["0.weight"].raw_data)


def other_bias(parts: dict[str, Any]) -> None:
    parts["0.bias"].raw_data = b"\0" * len(parts["0.bias"].raw_data)


def other_axis(parts: dict[str, Any]) -> None:
    transpose = next(n for n in parts[""].graph.node if n.op_type == "Transpose")
    transpose.name = "another"


def unreadable(parts: dict[str, Any]) -> None:
    parts[""].metadata_props[-2].value = '{"initializers": 5}'


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (flip_signs, "wrong checksum of 0.weight"),
        (other_bias, "wrong checksum of 0.bias"),
        (other_axis, "its graph is not the one that was written"),
        (unreadable, "its checksums cannot be read"),
    ],
)
def test_a_change_of_what_was_written_is_a_problem(change: Callable[[Any], object], told: str, tmp_path: Path) -> None:
    path = exported(tmp_path)
    assert verify.verify(changed(path, lambda _: None, checksums=True)).sound
    assert verify.verify(changed(path, change, checksums=True)).problems == [told]


def test_external_data_have_checksums(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    become(model[0], quantize_layer(model[0], RECIPE), RECIPE)
    path, data = to_onnx(model, values((4, 64)), tmp_path / "m.onnx", external_data=True).files
    assert verify.verify(path).sound
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(bytes(content))
    assert verify.verify(path).problems == ["wrong checksum of 0.weight"]


def test_bits_that_flip(tmp_path: Path) -> None:
    """Anywhere but in the metadata's entry of checksums itself."""
    path = exported(tmp_path)
    whole = path.read_bytes()
    end = whole.index(file.SUMS.encode()) - 8
    chance = random.Random(0)
    for _ in range(60):
        content = bytearray(whole)
        content[chance.randrange(end)] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(content))
        assert verify.main([str(path)]) == 1


def test_damaged_onnx_files(tmp_path: Path) -> None:
    path = exported(tmp_path)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole.replace(b"pytorch", b"\xffytorch")):
        path.write_bytes(content)
        assert verify.main([str(path)]) == 1
    assert verify.main([str(tmp_path / "none.onnx")]) == 2


def test_types_of_an_own_file_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def bf16_input(parts: dict[str, Any]) -> None:
        parts[""].graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16

    assert verify.main([str(changed(exported(tmp_path), bf16_input))]) == 1
    assert "is damaged" in capsys.readouterr().out


# ---- other tools' graphs --------------------------------------------------------------------------------------------


def foreign(path: Path, constants: bool, raw: bool) -> Path:
    """y = x W^T, W dequantized from FLOAT4E2M1 in initializers or Constant nodes, as raw bytes or as int32_data."""
    helper, types = onnx.helper, onnx.TensorProto
    packed = {
        "codes": (types.FLOAT4E2M1, (16, 32), b"\x22" * 256 if raw else [1.0] * 512),
        "scales": (types.FLOAT8E4M3FN, (16, 2), b"\x38" * 32 if raw else [1.0] * 32),
    }
    tensors = [helper.make_tensor(name, *rest, raw=raw) for name, rest in packed.items()]
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in tensors] if constants else []
    nodes.append(helper.make_node("Constant", [], ["one"], value_float=1.0))
    nodes.append(helper.make_node("DequantizeLinear", ["scales", "one"], ["real"]))
    nodes.append(helper.make_node("DequantizeLinear", ["codes", "real"], ["w"], axis=1, block_size=16))
    nodes.append(helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]))
    nodes.append(helper.make_node("MatMul", ["x", "wt"], ["y"], name="product"))
    ends = [helper.make_tensor_value_info(name, types.FLOAT, shape) for name, shape in (("x", (2, 32)), ("y", (2, 16)))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [] if constants else tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), str(path))
    return path


@pytest.mark.parametrize("constants", [False, True])
@pytest.mark.parametrize("raw", [False, True])
def test_every_way_to_store_a_weight_is_read(constants: bool, raw: bool, tmp_path: Path) -> None:
    report = verify.verify(foreign(tmp_path / "m.onnx", constants, raw))
    (row,) = report.rows
    assert report.sound and (row.name, row.precision, row.shape) == ("product", "nvfp4", (16, 32))
    assert row.bytes == 256 + 32 + 4 and row.axis == "in-channels" and row.scales == (1.0, 1.0)


def test_layers_inside_of_an_if_are_seen(tmp_path: Path) -> None:
    path = foreign(tmp_path / "m.onnx", False, True)
    model = onnx.load(str(path))
    helper, types = onnx.helper, onnx.TensorProto
    result = helper.make_tensor_value_info("inside", types.FLOAT, (2, 16))
    inner = list(model.graph.node)
    inner[-1].output[0] = "inside"
    branch = helper.make_graph(inner, "then", [], [result])
    other = helper.make_graph([helper.make_node("Identity", ["zeros"], ["inside"])], "else", [], [result])
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=other))
    model.graph.initializer.append(helper.make_tensor("yes", types.BOOL, (), [True]))
    model.graph.initializer.append(helper.make_tensor("zeros", types.FLOAT, (2, 16), [0.0] * 32))
    onnx.save(model, str(path))
    (row,) = verify.verify(path).rows
    assert row.precision == "nvfp4"


def test_products_of_another_domain_are_noted(tmp_path: Path) -> None:
    helper, types = onnx.helper, onnx.TensorProto
    node = helper.make_node("MatMulNBits", ["x", "q", "s"], ["y"], domain="com.microsoft", K=32, N=16, bits=4)
    ends = [helper.make_tensor_value_info(name, types.FLOAT, shape) for name, shape in (("x", (2, 32)), ("y", (2, 16)))]
    parts = [helper.make_tensor("q", types.UINT8, (16, 1, 16), b"\0" * 256, raw=True),
             helper.make_tensor("s", types.FLOAT, (16,), [1.0] * 16)]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], parts)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), str(tmp_path / "m.onnx"))
    report = verify.verify(tmp_path / "m.onnx")
    assert not report.recognized and "MatMulNBits" in report.notes[0] and "Nothing recognized" in str(report)
