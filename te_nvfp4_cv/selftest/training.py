"""Check training: a small CNN in NVFP4 beside bf16, norm + activation in one pass, and a step as a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.context.context_manager import nvfp4_autocast
from te_nvfp4_cv.fusion.fuse import fuse
from te_nvfp4_cv.ops.norm import operators
from te_nvfp4_cv.ops.norm.spec import NormSpec, norm_of
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.selftest.setting import CheckFailed, Setting, bound_for, close, normal

CLASSES, STEPS, BATCH = 16, 50, 32


def small_network(width: int) -> nn.Module:
    """Make a small CNN: a stem in high precision (3 channels), two 3x3 convolutions, a 1x1 one, and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(inplace=True),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
        nn.GroupNorm(4, 2 * width),
        nn.SiLU(),
        nn.Conv2d(2 * width, 2 * width, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, CLASSES),
    )


def batches(steps: int, batch: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Make batches of noisy pictures of 16 prototypes, the same in every run."""
    prototypes = normal((CLASSES, 3, size, size), torch.float32, 1)
    labels = [torch.randint(CLASSES, (batch,), generator=torch.Generator().manual_seed(step)) for step in range(steps)]
    noise = [normal((batch, 3, size, size), torch.float32, 1000 + step) for step in range(steps)]
    return [(prototypes[label] + 0.4 * more, label) for label, more in zip(labels, noise, strict=True)]


def train(
    setting: Setting, recipe: NVFP4BlockScaling | None, backend: str, steps: int, fused: bool = False
) -> list[float]:
    """Return the losses of a short run under bf16 autocast, in NVFP4 if there is a recipe, perhaps with fused norms."""
    width, batch, size = (16, 16, 8) if setting.small else (32, BATCH, 16)
    # The same seed in every run, so losses differ by precision only.
    net = small_network(width).to(setting.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net = fuse(net) if fused else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for x, label in batches(steps, batch, size):
        x, label = x.to(setting.device, memory_format=torch.channels_last), label.to(setting.device)
        context: Any = contextlib.nullcontext() if recipe is None else nvfp4_autocast(recipe, backend=backend)
        with torch.autocast(setting.device.type, torch.bfloat16), context:
            loss = F.cross_entropy(net(x).float(), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())  # .item() would wait for the GPU in every step
    return torch.stack(losses).cpu().tolist()


def training(setting: Setting) -> str:
    """Train shortly in NVFP4, with each tensor scale and with fused norms: losses must fall, and stay near bf16's."""
    steps = 2 if setting.small else STEPS  # Triton's interpreter takes seconds for a step
    ends = {"bf16": _end(train(setting, None, "auto", steps))}
    for scale, fused in (("current", False), ("delayed", False), ("delayed", True)):
        # Triton's interpreter takes too long for the others.
        if setting.small and scale != "current":
            continue
        losses = train(setting, NVFP4BlockScaling(tensor_scale=scale), setting.backend, steps, fused)
        name = f"NVFP4 {scale}{' fused' if fused else ''}"
        end = ends[name] = _end(losses)
        if not all(abs(loss) < float("inf") for loss in losses):
            raise CheckFailed(f"training, {name}: the loss is not finite")
        # Wide limits: this finds a broken GEMM, not a small loss of accuracy.
        if end > 1.1 * ends["bf16"] + 0.25 or (not setting.small and end > 0.5 * losses[0]):
            at_start = f"{losses[0]:.3f} at the start"
            raise CheckFailed(f"training, {name}: loss {end:.3f}, bf16 {ends['bf16']:.3f}, {at_start}")
    return f"{steps} steps, losses at the end: " + ", ".join(f"{name} {end:.3f}" for name, end in ends.items())


def _end(losses: list[float]) -> float:
    last = losses[-max(len(losses) // 5, 1) :]
    return sum(last) / len(last)  # the mean of the last fifth: a single loss is noisy


def norms(setting: Setting) -> str:
    """Compare norm + activation in one pass, forward and backward, with ATen's operators one after the other."""
    cases = [(torch.float32, 0, "relu", True), (torch.bfloat16, 4, "silu", False)]
    if not setting.small:
        cases += [
            (torch.bfloat16, 0, "relu", False),
            (torch.bfloat16, 8, "relu", True),
            (torch.float16, 4, "silu", False),
        ]
    worst = 0.0
    for dtype, groups, activation, with_residual in cases:
        shape = (4, 16, 4, 4) if setting.small else (8, 48, 13, 11)
        z, dy, residual = (normal(shape, dtype, seed) for seed in (1, 2, 3))
        weight, bias = normal(shape[1:2], torch.float32, 4) + 1, normal(shape[1:2], torch.float32, 5)
        tensors = (z, dy, weight, bias, residual if with_residual else None)
        truth = _norm(tensors, groups, activation, torch.device("cpu"), "reference")
        setting.dirty()
        # Triton's kernels are what is tested, whichever backend the setting names.
        ours = _norm(tensors, groups, activation, setting.device, "triton")
        what = f"{'group' if groups else 'batch'} norm + {activation}, {str(dtype).removeprefix('torch.')}"
        names = ("y", "mean", "rstd", "dz", "dresidual", "dweight", "dbias")
        for name, a, b in zip(names, ours, truth, strict=True):
            if b.numel():  # dresidual is empty without a residual
                worst = max(worst, close(f"{what}: {name}", a, b, bound_for(dtype)))
    return f"{len(cases)} cases, relative error at most {worst:.1e}"


def _norm(
    tensors: tuple[Tensor | None, ...], groups: int, activation: str, device: torch.device, backend: str
) -> tuple[Tensor, ...]:
    """Run z, dy, weight, bias and perhaps a residual; return y, mean, rstd, dz, dresidual, dweight and dbias."""
    z, dy, weight, bias, residual = (None if t is None else t.to(device) for t in tensors)
    assert z is not None and dy is not None
    spec = NormSpec(groups, activation, True, 0.1, 1e-5, True, residual is not None, backend).encode()
    y, mean, rstd, mask = operators.norm_forward(z, residual, weight, bias, None, None, spec)
    gradients = operators.norm_backward(dy, z, norm_of(mean, rstd, weight, bias), mask, spec)
    return (y, mean, rstd, *gradients)


def graph(setting: Setting) -> str:
    """Capture a training step as a CUDA graph: replays must equal eager steps, and draw new random numbers."""
    results = {}
    for name, fields in (("nearest", {"disable_stochastic_rounding": True}), ("stochastic", {})):
        recipe = NVFP4BlockScaling(**fields)  # type: ignore[arg-type]
        net = small_network(32).to(setting.device).eval()
        x, label = (t.to(setting.device) for t in batches(1, BATCH, 16)[0])

        # Values of this turn of the loop as defaults: a closure would see the last turn's.
        def step(net: nn.Module = net, x: Tensor = x, label: Tensor = label, recipe: Any = recipe) -> None:
            with torch.autocast("cuda", torch.bfloat16), nvfp4_autocast(recipe, backend=setting.backend):
                loss = F.cross_entropy(net(x).float(), label)
            loss.backward()

        replay, gradients = captured(step, net)
        seen = []
        for _ in range(2):
            replay()
            seen.append([gradient.clone() for gradient in gradients])  # the next replay writes into the same tensors
        net.zero_grad(set_to_none=True)
        step()
        eager = [p.grad.detach() for p in net.parameters() if p.grad is not None]
        results[name] = (seen, eager)
    (first, second), eager = results["nearest"]
    for a, b, c in zip(first, second, eager, strict=True):
        # Not in bits: cuDNN's gradients may be added up in another order each time.
        close("graph: two replays without stochastic rounding", a, b, 1e-2)
        close("graph: a replay against an eager step", a, c, 1e-2)
    # A seed that was frozen into the graph would round alike at every replay, and so would be biased.
    first, second = results["stochastic"][0]
    if all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        raise CheckFailed("graph: two replays drew the same random numbers")
    return "replays equal eager steps; stochastic rounding draws new numbers"


def captured(step: Callable[[], None], net: nn.Module) -> tuple[Callable[[], None], list[Tensor]]:
    """Capture a step that leaves gradients in `net`; return its replay, and the gradients that replays write."""
    # CUDA wants a few steps on a side stream first, so that nothing is compiled or allocated during the capture.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            net.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(side)
    net.zero_grad(set_to_none=True)
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        step()
    # Made during the capture, so every replay writes these.
    return recording.replay, [p.grad for p in net.parameters() if p.grad is not None]
