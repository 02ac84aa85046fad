"""Compare onnxruntime with OpenVINO on files in the portable form: the same codes, and the same outputs up to rounding.

    python -m tests.runtimes [--networks resnet18 ...]        needs the extra [openvino]; about a minute

Layers: each layer of a network gets what it reads in PyTorch, as a graph of that layer alone. Dequantized activations
must have equal bits in both runtimes, and outputs differ by at most BOUND of the largest one.
Networks: with activations in high precision, by value, as the mean over IMAGES images (of one image it is the largest
of many roundings): BOUND, and not more than PEER times what the runtimes differ by on a plain network of the same
values. Deep networks amplify the last bits of fp32 sums, which this shows to be all. With 4-bit activations a last bit
that differs moves codes in the layers after it, so whole networks are not compared by value there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.nn.walk import padded
from tests.helpers import same_bits, values
from tests.networks import Net

BOUND = 1e-5  # of the largest output
PEER = 1.25  # two means over IMAGES images of the same network differ by as much
IMAGES = 16
EXACT = 1e-6  # below this a mean is a few roundings, of which a ratio says nothing


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from te_nvfp4_cv.cli.torchvision_ops import ensure_torchvision

        ensure_torchvision()
        import torchvision

        return getattr(torchvision.models, name)()  # type: ignore[no-any-return]

    return build


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "small": (Net, (2, 3, 8, 8)),
    "resnet18": (_torchvision("resnet18"), (2, 3, 64, 64)),
    "mobilenet_v2": (_torchvision("mobilenet_v2"), (2, 3, 64, 64)),
}


class Difference(NamedTuple):
    """What two runtimes give: the largest difference as a share of the largest output, and whether codes are equal."""

    name: str
    output: float
    codes: bool


def onnxruntime(path: Path, inputs: list[Tensor]) -> list[Tensor]:
    """Return a file's outputs by onnxruntime."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    named = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, named)]


def openvino(path: Path, inputs: list[Tensor]) -> list[Tensor]:
    """Return a file's outputs by OpenVINO, in fp32: on some processors it would choose bf16."""
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([x.numpy() for x in inputs])
    return [torch.from_numpy(np.array(found[output])) for output in compiled.outputs]


def share(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    return float((ours - theirs).abs().max() / ours.abs().max())


def layer_graph(layer: Any, x: Tensor, path: Path) -> None:
    """Write a graph of one layer with two outputs: y, and the dequantized activations."""
    import onnx

    from te_nvfp4_cv.export.onnx import nodes

    made, helper, rank = nodes.Nodes("layer"), onnx.helper, x.dim()
    y = nodes.build(made, layer, "x", rank, "portable")
    again = nodes.Nodes("codes")
    last = "x" if isinstance(layer, nn.Linear) else nodes._image_last(again, "x", rank)
    q = nodes.quantized_input(again, layer, last, rank, True)
    ends = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(x.shape))]
    outputs = [helper.make_empty_tensor_value_info(name) for name in (y, q)]
    for output in outputs:
        output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    constants = {**made.initializers, **again.initializers}
    graph = helper.make_graph(made.nodes + again.nodes, "g", ends, outputs, list(constants.values()))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), str(path))


class _Keep:
    """Keep what a layer reads at its first call."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name, self.layer = name, layer
        self.x: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.x is None:
            self.x = args[0].detach().clone()


def unquantized(name: str) -> nn.Module:
    """Return a network with random weights, in eval mode."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    net = make()
    nv.sensitivity.update_bn(net, [values(shape, seed=seed) for seed in (1, 2)])
    return net.eval()


def quantized(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network with random weights, quantized, and an input."""
    x = values(NETWORKS[name][1])
    return nv.export.quantize(unquantized(name), [x], method="nearest", fold_bn=False, shift=False), x


def padded_input(layer: Any, x: Tensor) -> Tensor:
    """Return what a layer's nodes read: x, padded where the padding is not by zeros."""
    return x if isinstance(layer, nn.Linear) else padded(layer, x)[0]


def compared(name: str, layer: nn.Module, x: Tensor, folder: Path) -> Difference:
    """Compare one layer on an input."""
    path = folder / "layer.onnx"
    layer_graph(layer, x, path)
    (y, q), (other, other_q) = onnxruntime(path, [x]), openvino(path, [x])
    return Difference(name, share(y, other), same_bits(q, other_q))


def layers(model: nn.Module, x: Tensor, folder: Path) -> Iterator[Difference]:
    """Compare each layer of a model on what it reads in PyTorch."""
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nv.export.InferenceLayer)]
    keeps = [_Keep(name, layer) for name, layer in found]
    hooks = [keep.layer.register_forward_pre_hook(keep, with_kwargs=True) for keep in keeps]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    for keep in keeps:
        assert keep.x is not None
        yield compared(keep.name, keep.layer, keep.x, folder)


def network(name: str, model: nn.Module, folder: Path) -> tuple[float, float]:
    """Compare a whole model with activations in high precision, and its plain peer: mean shares over images."""
    x = values((IMAGES, *NETWORKS[name][1][1:]), seed=3)
    for layer in model.modules():
        if isinstance(layer, nv.export.InferenceLayer):
            layer.set_mode(activations="high")
    path = nv.export.to_onnx(model, x, folder / "net.onnx", form="portable", dynamic_batch=False).files[0]
    peer = folder / "peer.onnx"
    torch.onnx.export(peer_of(name, model), (x,), peer, dynamo=True, opset_version=18, verbose=False)
    return mean_share(path, x), mean_share(peer, x)


def peer_of(name: str, model: nn.Module) -> nn.Module:
    """Return a network of plain layers whose weights have the values of a model's codes."""
    peer = unquantized(name)
    state = {key: value for key, value in model.state_dict().items() if key in peer.state_dict()}
    for key, layer in model.named_modules():
        if isinstance(layer, nv.export.InferenceLayer):
            state[f"{key}.weight"] = layer.weight.detach()
    peer.load_state_dict(state)
    return peer


def mean_share(path: Path, x: Tensor) -> float:
    """Return what two runtimes differ by on a file, as the mean over images."""
    (ours,), (theirs,) = onnxruntime(path, [x]), openvino(path, [x])
    return sum(share(*pair) for pair in zip(ours, theirs, strict=True)) / len(x)


def main() -> int:
    """Print one line a network. Returns 1 if a bound is exceeded."""
    parser = argparse.ArgumentParser(prog="tests.runtimes", description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    good = True
    for name in parser.parse_args().networks:
        with tempfile.TemporaryDirectory() as folder:
            model, x = quantized(name)
            rows = list(layers(model, x, Path(folder)))
            whole, peer = network(name, model, Path(folder))
        worst, unlike = max(rows, key=lambda row: row.output), [row.name for row in rows if not row.codes]
        print(f"{name}: {len(rows)} layers, codes differ in {len(unlike)} {unlike[:4]}; outputs of a layer differ by "
              f"{worst.output:.1e} at most ({worst.name}); the whole network, activations high, by {whole:.1e}, "
              f"plain layers of the same values by {peer:.1e}")
        good &= not unlike and worst.output <= BOUND and whole <= BOUND and whole <= max(PEER * peer, EXACT)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
