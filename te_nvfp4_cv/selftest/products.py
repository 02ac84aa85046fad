"""Check the three GEMMs: whole convolutions and linear layers, forward and backward, against the reference.

Rounding is to nearest here, so both sides multiply the same codes. They may differ only by the order of accumulation
and by roundings of the output's dtype; the integer backend adds in the reference's order and may not differ at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv import functional
from te_nvfp4_cv.ops.block_scales import FORMATS
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.selftest.setting import CheckFailed, Options, Setting, bound_for, close, normal, same_fields
from te_nvfp4_cv.tensor.gemm import gemm
from te_nvfp4_cv.tensor.quantizer import NVFP4Quantizer

NEAREST: Options = {"disable_stochastic_rounding": True}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def convolutions(setting: Setting) -> str:
    """Compare y, dx, dw and db of 2-D convolutions: kernel sizes, strides, batches, dtypes."""
    # Few sizes are multiples of 16, because padded channels and folded images are a part of what is compared.
    calls: list[Any] = [
        ("conv2d", (4, 32, 6, 5), (16, 32, 3, 3), {"padding": 1}, FP32, {}),
        ("conv2d", (3, 24, 7, 6), (40, 24, 3, 3), {"padding": 1, "stride": 2}, BF16, {}),
    ]
    if not setting.small:
        calls += [
            ("conv2d", (32, 64, 14, 14), (128, 64, 3, 3), {"padding": 1}, BF16, {}),
            ("conv2d", (16, 64, 15, 13), (64, 64, 1, 1), {}, BF16, {}),
            ("conv2d", (16, 64, 9, 9), (48, 64, 1, 1), {"stride": 2}, BF16, {}),
        ]
    return _compare(setting, calls)


def convolution_variants(setting: Setting) -> str:
    """Compare 2-D convolutions with dilation, groups, large kernels, fp16, and 1x16 weight blocks."""
    calls: list[Any] = [("conv2d", (4, 64, 5, 5), (64, 32, 3, 3), {"padding": 1, "groups": 2}, BF16, {})]
    if not setting.small:
        calls += [
            ("conv2d", (1, 32, 33, 20), (32, 32, 3, 3), {"padding": 2, "dilation": 2}, BF16, {}),
            ("conv2d", (2, 16, 24, 24), (32, 16, 7, 7), {"padding": 3, "stride": 2}, FP32, {}),
            ("conv2d", (16, 32, 8, 8), (32, 32, 3, 3), {"padding": 1}, FP16, {}),
            ("conv2d", (16, 32, 8, 8), (32, 32, 3, 3), {"padding": 1}, BF16, {"disable_2d_quantization": True}),
        ]
    return _compare(setting, calls)


def transposed_and_other_ranks(setting: Setting) -> str:
    """Compare transposed, 1-D and 3-D convolutions."""
    up = {"stride": 2, "padding": 1, "output_padding": 1}
    calls: list[Any] = [("conv_transpose2d", (4, 48, 3, 3), (48, 32, 2, 2), {"stride": 2}, BF16, {})]
    if not setting.small:
        calls += [
            ("conv_transpose2d", (3, 32, 5, 7), (32, 16, 3, 3), up, FP32, {}),
            ("conv1d", (8, 32, 50), (48, 32, 5), {"padding": 2}, BF16, {}),
            ("conv3d", (2, 32, 4, 6, 6), (32, 32, 3, 3, 3), {"padding": 1}, BF16, {}),
        ]
    return _compare(setting, calls)


def linear_layers(setting: Setting) -> str:
    """Compare y, dx, dw and db of linear layers."""
    calls: list[Any] = [("linear", (40, 48), (32, 48), {}, FP32, {})]
    if not setting.small:
        calls += [
            ("linear", (4, 50, 128), (256, 128), {}, BF16, {}),
            ("linear", (1, 64), (48, 64), {}, BF16, {}),  # one row, which wgrad pads to 16
            ("linear", (64, 96), (64, 96), {}, FP16, {}),
        ]
    if not setting.small and setting.backend != "integer":  # which refuses row scales
        row_scaled = {"disable_rht": True, "row_scaled_activation": True}
        calls.append(("linear", (64, 96), (64, 96), {}, BF16, row_scaled))
    return _compare(setting, calls)


def block_formats(setting: Setting) -> str:
    """Compare layers with the blocks of MXFP4 and of the other formats than NVFP4, whose kernels are a CPU's only."""
    calls: list[Any] = []
    for name in FORMATS:
        fields = {"block_format": name}
        # 72 channels are 4.5 blocks of 16: an odd number of pairs, and a tail.
        calls.append(("conv2d", (5, 72, 6, 5), (48, 72, 3, 3), {"padding": 1, "stride": 2}, FP32, fields))
        calls.append(("linear", (40, 72), (56, 72), {}, BF16, {**fields, "disable_2d_quantization": True}))
    return _compare(setting, calls)


def matrix_products(setting: Setting) -> str:
    """Compare nv.gemm in its three layouts."""
    m, k, n = (32, 48, 16) if setting.small else (200, 144, 72)
    worst = 0.0
    plain, rotated = NVFP4Quantizer(backend="reference"), NVFP4Quantizer(backend="reference", with_rht=True)
    square = NVFP4Quantizer(backend="reference", with_2d_quantization=True)
    x, w, dy = normal((m, k), seed=1), normal((n, k), seed=2), normal((m, n), seed=3)
    # As fprop, dgrad and wgrad call it.
    for layout, a, b in (("TN", plain(x), square(w)), ("NN", plain(dy), square(w)), ("NT", rotated(dy), rotated(x))):
        truth = gemm(a, b, layout, torch.float32, backend="reference")
        setting.dirty()
        here: list[Any] = [t.to(setting.device) for t in (a, b)]
        ours = gemm(here[0], here[1], layout, torch.float32, backend=setting.backend)
        worst = max(worst, close(f"gemm {layout}", ours, truth, bound_for(FP32)))
    return f"3 layouts, relative error at most {worst:.1e}"


def non_finite_values(setting: Setting) -> str:
    """Check that a NaN or inf in x reaches every output of the GEMMs that use it, so that GradScaler sees it."""
    recipe = NVFP4BlockScaling(**NEAREST)
    for bad in (float("nan"), float("inf")):
        x, w, dy = normal((16, 32, 4, 4), seed=1), normal((32, 32, 3, 3), seed=2), normal((16, 32, 4, 4), seed=3)
        # One value is enough: it makes the tensor's amax, and with it every scale, non-finite.
        x[3, 5, 1, 1] = bad
        y, dx, dw = _run("conv2d", (x, w), {"padding": 1}, recipe, setting, dy)[:3]
        # dx = dy * w uses no x, so a bad x must not reach it.
        if bool(y.isfinite().any()) or bool(dw.isfinite().any()) or not bool(dx.isfinite().all()):
            raise CheckFailed(f"{bad} in x: y and dw must be non-finite everywhere, dx finite")
    return "y and dw non-finite, dx finite"


def _compare(setting: Setting, calls: list[Any]) -> str:
    worst = {BF16: 0.0, FP16: 0.0, FP32: 0.0}
    reference = Setting(torch.device("cpu"), "reference")
    for index, (op, x_shape, w_shape, arguments, dtype, fields) in enumerate(calls):
        recipe = NVFP4BlockScaling(**{**NEAREST, **fields})
        # A transposed convolution's weight is [C, O / groups, ...], so its bias has w_shape[1] * groups elements.
        channels = w_shape[1] * arguments.get("groups", 1) if "transpose" in op else w_shape[0]
        x, w = normal(x_shape, dtype, 3 * index), normal(w_shape, dtype, 3 * index + 1, 0.2)
        bias = normal((channels,), dtype, 3 * index + 2)
        truth = _run(op, (x, w, bias), arguments, recipe, reference)
        setting.dirty()
        # The same dy: it was drawn for the reference's y.
        ours = _run(op, (x, w, bias), arguments, recipe, setting, truth[-1])
        # Both end with dy, which is no result; strict=False leaves it out.
        for name, a, b in zip(("y", "dx", "dw", "db"), ours, truth, strict=False):
            what = f"{op} {x_shape} x {w_shape} {arguments or ''} {fields or ''}"
            if setting.backend == "integer":
                same_fields(what, (name,), (a,), (b,))
            what = f"{what}: {name}"
            worst[dtype] = max(worst[dtype], close(what, a, b, bound_for(dtype)))
    if setting.backend == "integer":
        return f"{len(calls)} calls equal in bits"
    shown = (f"{str(dtype).removeprefix('torch.')} {error:.1e}" for dtype, error in worst.items() if error)
    return f"{len(calls)} calls, relative error at most: {', '.join(shown)}"


def _run(
    op: str, operands: tuple[Tensor, ...], arguments: dict[str, Any], recipe: NVFP4BlockScaling,
    setting: Setting, dy: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Run a layer on x, w and perhaps a bias, and return y, dx, dw, db if there is a bias, and dy; None draws dy."""
    leaves = [setting.put(t).requires_grad_() for t in operands]
    if leaves[0].dim() == 4:  # the layout in which networks train on a GPU
        leaves[0] = leaves[0].detach().to(memory_format=torch.channels_last).requires_grad_()
    # The explicit call, not the context: a call that cannot run in NVFP4 raises here and does not fall back.
    y = getattr(functional, op)(*leaves, **arguments, recipe=recipe, backend=setting.backend)
    dy = normal(y.shape, y.dtype, 99) if dy is None else dy
    y.backward(setting.put(dy))
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return (y.detach(), *grads, dy)
