"""A linear layer written out with this package's quantizers and GEMM, which a TransformerEngine layer must equal bit
for bit; and one step of such a layer under a recipe. Import it where the stand-in is installed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformer_engine.pytorch as te
from torch import Tensor

import te_nvfp4_cv as nv


class Step(NamedTuple):
    """The results of one forward and backward."""

    y: Tensor
    dx: Tensor | None
    dw: Tensor
    db: Tensor | None = None


def same(got: Step, wanted: Step, what: str = "") -> None:
    """Assert equal bits, naming the result that differs and by how much."""
    for name, a, b in zip(Step._fields, got, wanted, strict=True):
        assert (a is None) == (b is None), f"{what} {name}: {a if a is None else 'a tensor'}, wanted {b}"
        if a is None or b is None:
            continue
        assert a.dtype == b.dtype and a.shape == b.shape, (
            f"{what} {name}: {a.dtype} {a.shape}, wanted {b.dtype} {b.shape}"
        )
        different = (a != b).sum().item()
        assert different == 0, (
            f"{what} {name}: {different} of {a.numel()} differ, by {(a - b).abs().max().item()} at most"
        )


def operands(shape: tuple[int, ...], n: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, ...]:
    """x, w, dy, bias of a layer."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=g) * scale).to(dtype)

    return normal(*shape), normal(n, shape[-1], scale=0.1), normal(*shape[:-1], n, scale=0.01), normal(n)


def linear(w: Tensor, bias: Tensor | None = None, **options: Any) -> Any:
    """te.Linear with that weight and bias."""
    layer = te.Linear(w.shape[1], w.shape[0], bias=bias is not None, params_dtype=w.dtype, device="cpu", **options)
    with torch.no_grad():
        layer.weight.copy_(w)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def step(layer: Any, x: Tensor, dy: Tensor, recipe: Any, **call: Any) -> Step:
    """Forward and backward of a TransformerEngine layer; gradients start from nothing."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with te.autocast(recipe=recipe):
        y = layer(x, **call)
    y.backward(dy)
    bias = getattr(layer, "bias", None)
    return Step(y.detach(), x.grad, layer.weight.grad, bias.grad if bias is not None and bias.numel() else None)


def written_out(
    x: Tensor,
    w: Tensor,
    dy: Tensor,
    bias: Tensor | None = None,
    recipe: nv.NVFP4BlockScaling | None = None,
    backend: str = "reference",
) -> Step:
    """The three GEMMs of a linear layer in NVFP4."""
    r = recipe or nv.NVFP4BlockScaling()

    def quantize(t: Tensor, role: str) -> nv.NVFP4Tensor:
        s = r.settings(role)
        return nv.NVFP4Quantizer(
            with_rht=s.rht,
            with_2d_quantization=s.two_d,
            stochastic_rounding=s.stochastic_rounding,
            row_scaled_nvfp4=s.row_scaled,
            nvfp4_use_4over6=s.four_over_six is not None,
            nvfp4_4over6_err_mode=s.four_over_six or "MAE",
            nvfp4_e4m3_max=s.e4m3_max,
            backend=backend,
        )(t)

    qx, qw, qdy = quantize(x, "input"), quantize(w, "weight"), quantize(dy.reshape(-1, dy.shape[-1]), "grad_output")
    qx2d = quantize(x.reshape(-1, x.shape[-1]), "input")
    if bias is not None and x.dtype == torch.float32:
        bias = bias.to(torch.bfloat16)  # as TransformerEngine does
    return Step(
        nv.gemm(qx, qw, "TN", x.dtype, bias=bias, backend=backend),
        nv.gemm(qdy, qw, "NN", x.dtype, backend=backend).reshape(x.shape),
        nv.gemm(qdy, qx2d, "NT", x.dtype, backend=backend),
        None if bias is None else dy.reshape(-1, dy.shape[-1]).sum(0),
    )
