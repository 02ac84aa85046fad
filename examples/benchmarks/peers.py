"""Time a training step of a small network beside other libraries' 4-bit formats, where they are installed.

    python examples/benchmarks/peers.py [--rounds 5] [--threads 1] [--microxcaling FOLDER]

    te_nvfp4_cv     NVFP4, forward and both gradients quantized (backend auto, fp32 between layers)
    modelopt        NVIDIA ModelOpt's NVFP4 fake quantization; gradients stay in high precision. Its kernel for
                    dynamic blocks needs a GPU; its own tensor class in plain torch stands in for it
    brevitas        MXFP4 fake quantization of weights and activations; gradients stay in high precision
    microxcaling    MXFP4 convolutions with quantized gradients; no package: --microxcaling names its source folder

The formats differ, and so does what is quantized: the table says how long a user of each waits for a step, not how good
it is. What is absent is named. Before any time is printed, each network's gradients must be finite, must differ from
fp32's (something was quantized) and point the same way: a cosine above 0.3, where chance gives less than 0.01. Times
are medians of rounds in turn.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve()
sys.path[:0] = [str(_HERE.parents[2])]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import te_nvfp4_cv as nv  # noqa: E402

CHANNELS, SIZE, BATCH = 64, 32, 16
Peer = tuple[nn.Module, Callable[[], AbstractContextManager[Any]]]


def network() -> nn.Module:
    """Build a stem and four convolutions of 64 channels, with batch norms: every library quantizes the four."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, CHANNELS, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 10))


def replaced(net: nn.Module, make: Callable[[nn.Conv2d], nn.Module]) -> nn.Module:
    """Return a copy in which `make` has replaced all convolutions but the stem."""
    net = copy.deepcopy(net)
    for name, layer in list(net.named_children())[1:]:
        if isinstance(layer, nn.Conv2d):
            setattr(net, name, make(layer))
    return net


# ---- the libraries --------------------------------------------------------------------------------------------------


def ours(net: nn.Module, x: Tensor, folder: Path | None) -> Peer:
    """Make this library's network."""
    net = copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net, nv.nvfp4_autocast


def modelopt(net: nn.Module, x: Tensor, folder: Path | None) -> Peer:
    """Make ModelOpt's network, with its default NVFP4 configuration for the four convolutions."""
    mtq: Any = importlib.import_module("modelopt.torch.quantization")
    quant: Any = importlib.import_module("modelopt.torch.quantization.tensor_quant")
    tensor: Any = importlib.import_module("modelopt.torch.quantization.qtensor.nvfp4_tensor").NVFP4QTensor

    def in_plain_torch(inputs: Tensor, block: int, amax: Tensor | None, *_: Any) -> Tensor:
        # Its blocks run along the last axis, here the width, and what is shorter is padded.
        q, scale, double_scale = tensor.quantize(F.pad(inputs, (0, -inputs.shape[-1] % block)), block)
        values = q.dequantize(dtype=inputs.dtype, scale=scale, double_scale=double_scale, block_sizes={-1: block})
        return values[..., : inputs.shape[-1]].contiguous()  # type: ignore[no-any-return]

    quant.dynamic_block_quantize_op = in_plain_torch
    made = mtq.quantize(copy.deepcopy(net), mtq.NVFP4_DEFAULT_CFG, forward_loop=lambda model: model(x))
    for name in ("0", str(len(net) - 1)):  # type: ignore[arg-type]  # stem and classifier, as everywhere else
        mtq.disable_quantizer(made, lambda module, name=name: module.startswith(f"{name}."))
    return made, nullcontext


def brevitas(net: nn.Module, x: Tensor, folder: Path | None) -> Peer:
    """Make brevitas's network: its MX formats, with the 2 exponent bits and 1 mantissa bit of E2M1."""
    layers: Any = importlib.import_module("brevitas.nn")
    formats: Any = importlib.import_module("brevitas.quant.mx_quant_ocp")
    e2m1 = {"bit_width": 4, "exponent_bit_width": 2, "mantissa_bit_width": 1, "nan_values": None, "inf_values": None}
    weight = type("E2M1Weight", (formats.MXFloat8e4m3Weight,), dict(e2m1))
    activation = type("E2M1Act", (formats.MXFloat8e4m3Act,), {**e2m1, "group_dim": 1})

    def make(layer: nn.Conv2d) -> nn.Module:
        made = layers.QuantConv2d(
            CHANNELS, CHANNELS, 3, padding=1, bias=False, weight_quant=weight, input_quant=activation
        )
        made.load_state_dict(layer.state_dict(), strict=False)
        return made  # type: ignore[no-any-return]

    return replaced(net, make), nullcontext


def microxcaling(net: nn.Module, x: Tensor, folder: Path | None) -> Peer:
    """Make microxcaling's network, with forward and backward in MXFP4."""
    if folder is not None:
        sys.path.append(str(folder))
    mx: Any = importlib.import_module("mx")
    specs = mx.finalize_mx_specs(
        {
            **{"w_elem_format": "fp4_e2m1", "a_elem_format": "fp4_e2m1", "block_size": 32, "scale_bits": 8},
            **{"bfloat": 0, "custom_cuda": False, "quantize_backprop": True},
        }
    )

    def make(layer: nn.Conv2d) -> nn.Module:
        made = mx.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False, mx_specs=specs)
        made.load_state_dict(layer.state_dict())
        return made  # type: ignore[no-any-return]

    return replaced(net, make), nullcontext


PEERS = {"te_nvfp4_cv": ours, "modelopt": modelopt, "brevitas": brevitas, "microxcaling": microxcaling}


# ---- the table ------------------------------------------------------------------------------------------------------


def step(peer: Peer, x: Tensor, target: Tensor) -> Tensor:
    """Run forward, loss and backward; return the gradients of the four convolutions as one vector."""
    net, context = peer
    net.zero_grad(set_to_none=True)
    with context():
        loss = F.cross_entropy(net(x), target)
    loss.backward()
    weights = [p for p in net.parameters() if p.shape == (CHANNELS, CHANNELS, 3, 3)]
    return torch.cat([p.grad.flatten() for p in weights if p.grad is not None]).double()


def wrong(found: Tensor, exact: Tensor) -> str:
    """Return what is wrong with a library's gradients, or ""."""
    if found.shape != exact.shape or not torch.isfinite(found).all():
        return "its gradients are missing or not finite"
    if torch.equal(found, exact):
        return "its gradients are fp32's: nothing was quantized"
    cosine = F.cosine_similarity(found, exact, dim=0).item()
    return "" if cosine > 0.3 else f"the cosine of its gradients with fp32's is {cosine:.3f}"


def main() -> int:
    """Print a row per library; return exit status 1 if this library's gradients are wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--microxcaling", type=Path, metavar="FOLDER", help="the folder that holds its package mx")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")  # of the other libraries, about their own future
    net, x = network(), torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    target = torch.randint(0, 10, (BATCH,))
    plain: Peer = (copy.deepcopy(net).to(memory_format=torch.channels_last), nullcontext)  # type: ignore[call-overload]
    exact, peers = step(plain, x, target), {"fp32": plain}
    for name, make in PEERS.items():
        try:
            peer = make(net, x, options.microxcaling)
            problem = wrong(step(peer, x, target), exact)
        except ModuleNotFoundError as error:
            print(f"{name}: absent ({error})")
            continue
        except Exception as error:  # another version of the library: its row fails, not the table
            problem = f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"
        if problem:
            print(f"{name}: not timed: {problem}")
            if name == "te_nvfp4_cv":
                return 1
            continue
        peers[name] = peer
    times: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(options.rounds):
        for name, peer in peers.items():
            start = time.perf_counter()
            step(peer, x, target)
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"{CHANNELS} channels, {SIZE}x{SIZE}, batch {BATCH}, {options.threads} thread(s), torch {torch.__version__}")
    for name, value in median.items():
        against = f"   {value / median['te_nvfp4_cv']:6.2f} times te_nvfp4_cv"
        print(f"{name:13} {value * 1e3:8.1f} ms   / fp32 {value / median['fp32']:6.2f}{against}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
