"""The check of the trained model's ONNX file: onnxruntime computes with it what the loaded model computes.

The two add in different orders, so values differ in their last bits. Where such a value lies at a rounding tie of E2M1,
its code differs, and the layers behind it quantize the difference again: after a dozen layers the outputs of a sound
file may be half of their length apart, as they are when the model itself gets noise of 1e-7. So not only the outputs
are compared. The model runs once more, guided by the file: each layer gets the input that it has in onnxruntime, and
hands on the output that it has there.

    x of the file  against  what the model computes from the file's outputs so far: all that is not a layer in NVFP4
    y of the file  against  y of the model for the file's x: equal codes, so only the order of sums is left

Neither can grow from layer to layer, and a wrong node shows where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.cli.trial.cells import Cell, Finding, NotHere, Trial, plainly
from te_nvfp4_cv.cli.trial.subject import floats, relative, seeded
from te_nvfp4_cv.export.modules import InferenceLayer
from te_nvfp4_cv.export.onnx import runtime
from te_nvfp4_cv.export.onnx.convert import to_onnx
from te_nvfp4_cv.ops.geometry import ConvArgs

EQUAL = 1e-4  # of fp32 sums in another order
BETWEEN = 1e-3  # of what lies between layers: norms and softmax make rounding errors larger


def onnx(trial: Trial, loaded: nn.Module) -> Cell:
    """Export the loaded model to ONNX and run it in onnxruntime: each layer, and what is between, has its values."""
    args, kwargs = trial.subject.evaluation_call()
    inputs = [*args, *kwargs.values()]
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise NotHere("inputs that are no tensors")
    model = positional(loaded, len(args), tuple(kwargs))
    seeded()
    with torch.no_grad():
        expected = [y.float() for y in model(*inputs)]
    outputs = tuple(f"y{index}" for index in range(len(expected)))
    path, how = trial.folder / "model.onnx", ""
    call: dict[str, Any] = dict(form="portable", input_names=tuple(f"x{i}" for i in range(len(inputs))))
    try:
        file = to_onnx(model, tuple(inputs), path, output_names=outputs, **call)
    except Exception:  # many models fix their batch size in the trace
        how = ", this batch size only"
        try:
            file = to_onnx(model, tuple(inputs), path, output_names=outputs, dynamic_batch=False, **call)
        except Exception:
            plainly(lambda: _plain_export(trial, args, kwargs), "torch")
            raise
    error = relative(expected, runtime.run(file.files[0], inputs))
    guided(model, inputs, file.files[0])
    return Cell(True, ("equal" if error < EQUAL else f"layers equal, {error:.2g} in all") + how)


# ---- guided by the file ---------------------------------------------------------------------------------------------


def guided(model: nn.Module, inputs: Sequence[Tensor], path: Path) -> None:
    """Run the model with the inputs and outputs that its layers have in the file, and compare them on the way.

    Raises:
        Finding: Something differs.
    """
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, InferenceLayer)}
    outputs, calls = runtime.trace(path, inputs, list(layers))
    with ExitStack() as stack, torch.no_grad():
        for name, layer in layers.items():
            layer.multiply = _Guided(name, layer, calls.get(name, []))  # hides the class's own
            stack.callback(delattr, layer, "multiply")
        seeded()
        found = floats(model(*inputs))
    _agree("the output", outputs, found, BETWEEN)
    more = [name for name, left in calls.items() if left]
    if more:
        raise Finding(f"onnxruntime: {more[0]} is called more often than in the model")


class _Guided:
    """Stands for one layer's `multiply`, with the calls of it that the file makes."""

    def __init__(self, name: str, layer: Any, calls: list[tuple[Tensor, Tensor]]) -> None:
        self.name, self.layer, self.calls = name, layer, calls
        self.multiply = layer.multiply

    def __call__(self, x: Tensor, bias: Tensor | None, args: ConvArgs) -> Tensor:
        if not self.calls:  # torch.onnx leaves out what no output depends on
            y: Tensor = self.multiply(x, bias, args)
            return y
        x_file, y_file = self.calls.pop(0)
        _agree(f"the input of {self.name}", [x_file], [x], BETWEEN)
        inside = bias if self.layer.bias is not None else None  # another bias is a node behind the layer's
        _agree(self.name or "the layer", [y_file], [self.multiply(x_file, inside, args)], EQUAL)
        if bias is None or inside is not None:
            return y_file
        return y_file + bias.reshape(-1, *(1,) * max(0, len(self.layer.weight_shape) - 2))


def _agree(what: str, file: list[Tensor], model: list[Tensor], most: float) -> None:
    error = relative(model, file)
    if not error <= most:
        raise Finding(f"onnxruntime: {what} differs by {error:.2g}")


def _plain_export(trial: Trial, args: Any, kwargs: Any) -> None:
    """Export the model in high precision, by torch alone."""
    model = positional(trial.copy(), len(args), tuple(kwargs))
    torch.onnx.export(model, (*args, *kwargs.values()), dynamo=True, verbose=False)


class _Positional(nn.Module):
    """A model that takes its keyword arguments by position, and returns a tuple of its floating-point tensors."""

    def __init__(self, model: nn.Module, count: int, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.count, self.names = model, count, names

    def call(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Call the model."""
        named: dict[str, Any] = dict(zip(self.names, inputs[self.count :], strict=True))
        return tuple(floats(self.model(*inputs[: self.count], **named)))


class _One(_Positional):
    def forward(self, a: Tensor) -> tuple[Tensor, ...]:
        """Call the model with one input: torch.export reads the names of inputs from the signature."""
        return self.call(a)


class _Two(_Positional):
    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        """Call the model with two inputs."""
        return self.call(a, b)


class _Three(_Positional):
    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        """Call the model with three inputs."""
        return self.call(a, b, c)


def positional(model: nn.Module, count: int, names: tuple[str, ...]) -> nn.Module:
    """Return the model in evaluation mode, to be called with tensors by position alone.

    Raises:
        NotHere: It takes more than three.
    """
    kinds = (_One, _Two, _Three)
    if not 0 < count + len(names) <= len(kinds):
        raise NotHere(f"{count + len(names)} inputs")
    return kinds[count + len(names) - 1](model, count, names).eval()
