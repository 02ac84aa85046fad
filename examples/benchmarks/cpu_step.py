"""Time a training step, or with --eval a forward pass, on a CPU: NVFP4 beside fp32 and bf16 autocast.

    python examples/benchmarks/cpu_step.py [--case big small resnet50] [--eval] [--rounds 9] [--threads 1] [--keep]

    case                    images                                  variant    layers run in
    big                     UNet, scale 1.0, 64x64, batch 16        fp32       fp32
    small                   UNet, scale 0.25, 128x128, batch 16     bf16       bf16 autocast
    resnet50                96x96, batch 16                         integer    NVFP4, backend integer, fp32 between them
    mobilenet_v3_large,     torchvision's, 96x96, batch 16          vendor     NVFP4, backend vendor, fp32 between them
    swin_t, convnext_tiny,                                          auto       NVFP4, backend auto, bf16 autocast
    deeplabv3_resnet50                                              delayed    as auto, with delayed tensor scales
    unet3d                  a small 3-D UNet, 32^3, batch 4

A step is forward, loss and backward (no optimizer); models and images are channels_last. The variants are timed in
turn, and the table has medians and ratios. Before any time is printed, every convolution and linear layer of a case is
run alone on `integer` and on `vendor`, from the same input, output gradient and seed: y, dx and dw must agree up to the
rounding of sums. Then scores, loss and gradients of each variant must be finite, and its loss near fp32's. The cosine
of all gradients with fp32's is printed, not checked: deep networks with random weights amplify rounding, bf16's too.

--keep appends the medians to docs/results/measured.jsonl, from which examples/tables.py makes the tables.
`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1` in the environment avoids page faults, for every variant.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_HERE = Path(__file__).resolve()
sys.path[:0] = [str(_HERE.parents[2]), str(_HERE.parents[1])]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from _torchvision import ensure_torchvision  # noqa: E402
from benchmarks import measured  # noqa: E402
from torch import Tensor, nn  # noqa: E402

ensure_torchvision()

from unet_coco.backends import kernels_of, processor  # noqa: E402
from unet_coco.unet import UNet  # noqa: E402

import te_nvfp4_cv as nv  # noqa: E402

CPU = torch.device("cpu")
TORCHVISION = ("mobilenet_v3_large", "swin_t", "convnext_tiny", "deeplabv3_resnet50")
CASES = ("big", "small", "resnet50", *TORCHVISION, "unet3d")
SAME = 1e-4  # relative difference of one layer's results on two backends: fp32 sums in another order


class Case(NamedTuple):
    """A network with a batch of images and the classes of its pixels or images."""

    net: nn.Module
    x: Tensor
    target: Tensor


class Variant(NamedTuple):
    """One way to run a network: bf16 autocast or not, a recipe or None, and where its layers run."""

    autocast: bool
    recipe: nv.NVFP4BlockScaling | None = None
    backend: str = "auto"


VARIANTS = {
    "fp32": Variant(False),
    "bf16": Variant(True),
    "integer": Variant(False, nv.NVFP4BlockScaling(), "integer"),
    "vendor": Variant(False, nv.NVFP4BlockScaling(), "vendor"),
    "auto": Variant(True, nv.NVFP4BlockScaling()),
    "delayed": Variant(True, nv.NVFP4BlockScaling(tensor_scale="delayed")),
}


class UNet3d(nn.Module):
    """A UNet with two levels, for volumes."""

    def __init__(self, classes: int) -> None:
        super().__init__()

        def block(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv3d(a, b, 3, padding=1, bias=False), nn.BatchNorm3d(b), nn.ReLU())

        self.stem, self.down = block(1, 32), nn.Sequential(nn.MaxPool3d(2), block(32, 64))
        self.bottom = nn.Sequential(nn.MaxPool3d(2), block(64, 128), nn.ConvTranspose3d(128, 64, 2, stride=2))
        self.middle = nn.Sequential(block(128, 64), nn.ConvTranspose3d(64, 32, 2, stride=2))
        self.top = nn.Sequential(block(64, 32), nn.Conv3d(32, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores for each voxel."""
        high = self.stem(x)
        low = self.down(high)
        low = self.middle(torch.cat([low, self.bottom(low)], 1))
        scores: Tensor = self.top(torch.cat([high, low], 1))
        return scores


def make_case(name: str) -> Case:
    """Build a case with random weights, images and classes, all from one seed."""
    torch.manual_seed(0)
    if name == "unet3d":
        net, x = UNet3d(21), torch.randn(4, 1, 32, 32, 32)
        target, layout = torch.randint(0, 21, (4, 32, 32, 32)), torch.channels_last_3d
        return Case(net.to(memory_format=layout), x.to(memory_format=layout), target)  # type: ignore[call-overload]
    if name in ("big", "small"):
        scale, size = {"big": (1.0, 64), "small": (0.25, 128)}[name]
        net, target = UNet(21, scale=scale, dropout=0.0), torch.randint(0, 21, (16, size, size))
    elif name == "deeplabv3_resnet50":
        from torchvision.models.segmentation import deeplabv3_resnet50

        size, target = 96, torch.randint(0, 21, (16, 96, 96))
        net = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=21)
    else:
        from torchvision import models

        size, target, net = 96, torch.randint(0, 10, (16,)), getattr(models, name)(num_classes=10)
    for module in net.modules():
        if isinstance(module, nn.Dropout):  # the variants draw other numbers, and would then differ for that reason
            module.p = 0.0
        elif type(module).__name__ == "StochasticDepth":
            module.p = 0.0  # type: ignore[assignment]
    x = torch.randn(16, 3, size, size).to(memory_format=torch.channels_last)
    return Case(net.to(memory_format=torch.channels_last), x, target)  # type: ignore[call-overload]


def output_of(case: Case, variant: Variant) -> Tensor:
    """Run a forward pass; return the scores in fp32."""
    enabled = variant.recipe is not None
    context = nv.nvfp4_autocast(variant.recipe, enabled=enabled, backend=variant.backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=variant.autocast), context:
        y = case.net(case.x)
    return (y["out"] if isinstance(y, dict) else y).float()


def step(case: Case, variant: Variant, evaluate: bool) -> Tensor:
    """Run what is timed; return the scores of an evaluation, or the loss of a step, whose gradients stay in the net."""
    if evaluate:
        with torch.no_grad():
            return output_of(case, variant)
    case.net.zero_grad(set_to_none=True)
    loss = F.cross_entropy(output_of(case, variant), case.target)
    loss.backward()
    return loss.detach()


def result_of(case: Case, variant: Variant, evaluate: bool) -> tuple[float, Tensor]:
    """Run the same and return the loss, and the scores or all gradients of a step as one vector."""
    found = step(case, variant, evaluate)
    if evaluate:
        return F.cross_entropy(found, case.target).item(), found.flatten().double()
    gradients = [p.grad.flatten().double() for p in case.net.parameters() if p.grad is not None]
    return found.item(), torch.cat(gradients)


# ---- are the numbers right? -----------------------------------------------------------------------------------------


def layers_of(case: Case) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield a name, a layer and its input, once for each kind of layer and shape of the input."""
    seen: dict[str, tuple[str, nn.Module, Tensor]] = {}
    kinds = (nn.modules.conv._ConvNd, nn.Linear)

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            key = f"{module} {tuple(inputs[0].shape)}"
            seen.setdefault(key, (name, module, inputs[0].detach()))

        return hook

    hooks = [m.register_forward_pre_hook(note(name)) for name, m in case.net.named_modules() if isinstance(m, kinds)]
    with torch.no_grad():
        case.net(case.x)
    for hook in hooks:
        hook.remove()
    yield from seen.values()


def wrong_layer(case: Case) -> str:
    """Return a text that names a layer whose results differ between the backends, or "" if there is none."""
    for name, layer, x in layers_of(case):
        results = []
        for backend in ("integer", "vendor"):
            alone, own = copy.deepcopy(layer), x.clone().requires_grad_()
            torch.manual_seed(1)  # for the rounding of gradients
            with nv.nvfp4_autocast(nv.NVFP4BlockScaling(), backend=backend):
                y = alone(own)
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y))
            weight: Any = alone.weight
            results.append({"y": y.detach(), "dx": own.grad, "dw": weight.grad})
        for part, ours in results[0].items():
            other: Any = results[1][part]
            difference = ((ours - other).norm() / other.norm().clamp(min=1e-30)).item()
            if not difference < SAME:  # a NaN is not smaller
                return f"{part} of {name} differs by {difference:.1e} between integer and vendor: {layer}"
    return ""


def wrong_variant(case: Case, name: str, evaluate: bool, exact: tuple[float, Tensor]) -> tuple[str, str]:
    """Return what is wrong with a variant's result, or "", and the result in words; `exact` is fp32's result."""
    loss, found = result_of(case, VARIANTS[name], evaluate)
    cosine = F.cosine_similarity(found, exact[1], dim=0).item()
    words = f"loss {loss:.4f}, cosine of {'scores' if evaluate else 'gradients'} with fp32 {cosine:.4f}"
    if not torch.isfinite(found).all():
        return "is not finite", words
    return ("" if abs(loss - exact[0]) < 0.25 * exact[0] else f"has a loss of {loss:.3f}, fp32 {exact[0]:.3f}"), words


# ---- the table ------------------------------------------------------------------------------------------------------


def main() -> int:
    """Print a table per case; return exit status 1 if a case is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--case", nargs="+", default=list(CASES[:3]), choices=CASES)
    names = [name for name in VARIANTS if name != "delayed"]
    parser.add_argument("--variants", nargs="+", default=names, choices=list(VARIANTS), help="default: all but delayed")
    parser.add_argument("--eval", action="store_true", help="time a forward pass of the network in evaluation mode")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    measured.add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {processor()}, kernels for {kernels_of(CPU)}, {options.threads} threads")
    print(f"{'forward in evaluation' if options.eval else 'training step'}, medians of {options.rounds} rounds in turn")
    wanted = list(dict.fromkeys(["fp32", *options.variants]))  # the others are compared with it
    for name in options.case:
        case = make_case(name)
        if problem := wrong_layer(case):
            print(f"{name}: {problem}: no times printed")
            return 1
        case.net.train(not options.eval)
        exact = result_of(case, VARIANTS["fp32"], options.eval)
        for variant in wanted:
            step(case, VARIANTS[variant], options.eval)  # delayed scales need a step before
            problem, words = wrong_variant(case, variant, options.eval, exact)
            if problem:
                print(f"{name}: {variant} {problem}: no times printed")
                return 1
            print(f"{name}: {variant} {words}")
        times: dict[str, list[float]] = {variant: [] for variant in wanted}
        for _ in range(options.rounds):
            for variant in wanted:
                start = time.perf_counter()
                step(case, VARIANTS[variant], options.eval)
                times[variant].append(time.perf_counter() - start)
        median = {variant: statistics.median(values) for variant, values in times.items()}
        for variant, value in median.items():
            row = "".join(f"   / {peer} {value / median[peer]:.2f}" for peer in ("fp32", "bf16") if peer in median)
            print(f"{name:18} {variant:8} {value * 1e3:8.1f} ms{row}", flush=True)
        in_ms = {variant: round(value * 1e3, 1) for variant, value in median.items()}
        measured.keep(options.keep, "evaluation" if options.eval else "training", name, in_ms)
    return 0


if __name__ == "__main__":
    sys.exit(main())
