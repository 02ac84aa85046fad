"""nv.export.to_onnx takes torch.onnx.export's arguments: with their meaning, or with an error that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.export.onnx.arguments import REFUSED, TorchOptions
from tests.helpers import values

onnx = pytest.importorskip("onnx", reason="the extra [export]")
ort = pytest.importorskip("onnxruntime", reason="the extra [export]")
to_onnx = nv.export.to_onnx


class Net(nn.Module):
    """A convolution of a picture, another with half the size, and a mask that only goes by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2, padding=1)

    def forward(self, image: Tensor, factor: float = 1.0, *, mask: Tensor | None = None) -> Tensor:
        y = self.second(self.first(image)) * factor
        return y if mask is None else y * mask[:, None, None, None]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nv.export.quantize(Net(), [values((4, 16, 8, 8))])


def shapes_of(path: Path) -> list[list[Any]]:
    graph = onnx.load(str(path)).graph
    dims = [value.type.tensor_type.shape.dim for value in (*graph.input, *graph.output)]
    return [[dim.dim_param or dim.dim_value for dim in some] for some in dims]


@pytest.mark.parametrize("how", ["dynamic_axes", "a list of axes", "dynamic_shapes", "by position"])
def test_open_axes_as_torch_names_them(how, model, tmp_path):
    """A call that was written for torch.onnx.export: one picture as the example, a file for pictures of any size."""
    named = {0: "batch", 2: "height", 3: "width"}
    options: dict[str, Any] = {
        "dynamic_axes": {"dynamic_axes": {"pictures": named, "scores": {0: "batch"}}},
        "a list of axes": {"dynamic_axes": {"pictures": [0, 2, 3]}},
        "dynamic_shapes": {"dynamic_shapes": {"image": named}},
        "by position": {"dynamic_shapes": (("batch", None, "height", "width"),)},
    }[how]
    made = to_onnx(
        model, (values((1, 16, 8, 8)),), tmp_path / "net.onnx", "portable", input_names=["pictures"],
        output_names=["scores"], export_params=True, do_constant_folding=True, opset_version=23, **options,
    )  # fmt: skip
    first, last = shapes_of(made.files[0])
    if how != "a list of axes":
        assert first == ["batch", 16, "height", "width"] and last[0] == "batch" and "height" in last[2]
    for shape in ((1, 16, 8, 8), (3, 16, 6, 10)):
        x = values(shape, seed=1)
        (found,) = ort.InferenceSession(str(made.files[0])).run(["scores"], {"pictures": x.numpy()})
        expected = model(x).detach().numpy()
        assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


def test_the_example_by_keyword(model, tmp_path):
    x, mask = values((2, 16, 8, 8)), torch.tensor([1.0, 0.0])
    names = ["image", "mask"]
    for args, kwargs in (((x, 2.0), {"mask": mask}), ((), {"mask": mask, "image": x, "factor": 2.0})):
        made = to_onnx(model, args, tmp_path / "net.onnx", "portable", kwargs=kwargs, input_names=names)
        assert [shape[0] for shape in shapes_of(made.files[0])[:2]] == ["batch", "batch"]
        given = {"image": x.numpy(), "mask": mask.numpy()}
        (found,) = ort.InferenceSession(str(made.files[0])).run(None, given)
        expected = model(x, 2.0, mask=mask).detach().numpy()
        assert not found[1].any() and np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


def test_the_names_of_earlier_versions(model, tmp_path):
    made = to_onnx(model, example_input=values((2, 16, 8, 8)), path=tmp_path / "net", dynamic_batch=False)
    assert made.files[0].name == "net.onnx" and shapes_of(made.files[0]) == [[2, 16, 8, 8], [2, 16, 4, 4]]


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_here_is_refused_with_what_does_the_same(name, tmp_path):
    fine, instead = REFUSED[name]
    value = next(v for v in (True, False, "other") if v not in fine)
    with pytest.raises(ValueError, match=rf"{name} is not taken[\s\S]*got: .*{name}={value!r}[\s\S]*fix: ") as caught:
        to_onnx(nn.Linear(16, 16), values((4, 16)), tmp_path / "m.onnx", **{name: value})
    assert instead in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (TypeError, "unexpected keyword argument 'opset'", {"opset": 23}),
        (ValueError, "shapes are given twice", {"dynamic_axes": {}, "dynamic_shapes": ({},)}),
        (ValueError, "dynamic_axes names no input or output.*\n.*scores", {"dynamic_axes": {"scores": [0]}}),
        (ValueError, "dynamic_shapes does not fit.*\n.*\n.*input", {"dynamic_shapes": {"images": {0: "batch"}}}),
        (ValueError, "does not fit the model.*\n.*TypeError", {"kwargs": {"mask": torch.ones(2)}}),
    ],
)
def test_arguments_that_do_not_fit_are_refused(error, words, options, tmp_path):
    with pytest.raises(error, match=words):
        to_onnx(nn.Linear(16, 16), values((4, 16)), tmp_path / "m.onnx", **options)


def test_every_argument_of_torch_is_known():
    import inspect

    ours = {"model", "args", "f", "external_data"} | TorchOptions.__annotations__.keys() | REFUSED.keys()
    assert inspect.signature(torch.onnx.export).parameters.keys() <= ours
