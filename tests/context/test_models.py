"""Unmodified models train a step under the context; coverage splits their layers as their shapes say; memory falls."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import te_nvfp4_cv as nv

torchvision = pytest.importorskip("torchvision")
ROOT = Path(__file__).resolve().parents[2]


def groupnorm_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.GroupNorm(4, 32),
        nn.SiLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.GroupNorm(4, 32),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 48, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(4, 48),
        nn.ReLU(),
        nn.ConvTranspose2d(48, 32, 2, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def deeplab() -> nn.Module:
    return torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, aux_loss=True)


MODELS = {
    "resnet18": (lambda: torchvision.models.resnet18(), 32),
    "resnet50": (lambda: torchvision.models.resnet50(), 32),
    "deeplabv3_resnet50": (deeplab, 32),
    "mobilenet_v3_large": (lambda: torchvision.models.mobilenet_v3_large(), 32),
    "convnext_tiny": (lambda: torchvision.models.convnext_tiny(), 32),
    "swin_t": (lambda: torchvision.models.swin_t(), 32),
    "densenet121": (lambda: torchvision.models.densenet121(), 32),
    "groupnorm": (groupnorm_net, 16),
}


def eligible(module: nn.Module) -> bool:
    """From the shapes alone: at least 16 channels per group on both sides."""
    if isinstance(module, nn.Linear):
        return min(module.in_features, module.out_features) >= 16
    return min(module.in_channels, module.out_channels) // module.groups >= 16


@pytest.mark.parametrize("name", MODELS)
def test_a_step_and_the_split(name):
    build, size = MODELS[name]
    model, x = build(), torch.randn(4, 3, size, size)
    expected = {
        key: eligible(module)
        for key, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
    }
    with torch.autocast("cpu", torch.bfloat16):
        report = nv.coverage(model, x)
    assert {row.name: row.nvfp4 for row in report.rows} == expected
    assert all(row.calls == 1 and bool(row.reason) != row.nvfp4 for row in report.rows)
    assert sum(row.flops for row in report.rows) > 0 and 0.5 < report.nvfp4_flops_share < 1
    with nv.nvfp4_autocast(), torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        outputs = list(y.values()) if isinstance(y, dict) else [y]
        loss = sum(out.float().square().mean() for out in outputs)
    loss.backward()
    assert loss.isfinite() and len(outputs) == (2 if "deeplab" in name else 1)
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.shape == p.shape for p in model.parameters())
    layer = next(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and eligible(m))
    assert layer.weight.grad.abs().sum() > 0


def benchmark():
    spec = importlib.util.spec_from_file_location("memory", ROOT / "examples" / "benchmarks" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["conv input", "resnet50", "deeplabv3_resnet50", "densenet121"])
def test_bytes_kept_for_backward(name):
    memory = benchmark()
    bf16, ours = memory.measure(name, 16, 48)
    small_bf16, small = memory.measure(name, 16, 32)
    assert ours <= memory.BOUNDS[name] * bf16
    assert ours - small <= memory.BOUNDS[name] * (bf16 - small_bf16)  # activations alone, without copies of weights


def test_coverage_counts_what_the_benchmark_counts():
    memory = benchmark()
    model, x = groupnorm_net(), torch.randn(16, 3, 16, 16)
    expected = memory.saved_bytes(model, (x,), nv.NVFP4BlockScaling())
    with torch.autocast("cpu", torch.bfloat16):
        assert nv.coverage(model, x).saved_bytes == expected


def test_the_benchmark_prints_its_table(capsys):
    ratios = benchmark().main(["--models", "resnet18", "--size", "32"])
    assert list(ratios) == ["conv input", "resnet18"] and ratios["conv input"] <= 0.30
    assert "resnet18" in capsys.readouterr().out
