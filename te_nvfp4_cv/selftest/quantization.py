"""Check quantization: codes, scales and amax against the reference in bits, and stochastic rounding by its law.

Stochastic rounding has no reference bits. So these are tested: scales equal the reference's; every value is one of its
two neighbours; the mean is right over all elements and over each of the 16 places that share one draw of random bits;
neighbours and images are not correlated; one seed gives one result, and another seed another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.ops.quantize import operand, reference_matrix
from te_nvfp4_cv.ops.records import (
    DEQUANTIZED,
    NONE,
    PACKED,
    Face,
    Fold,
    Operand,
    OperandSpec,
    WeightLayout,
    WeightSpec,
)
from te_nvfp4_cv.selftest.setting import CheckFailed, Options, Setting, normal, same_fields
from te_nvfp4_cv.tensor import layouts

OPERAND = ("row data", "row scale", "row amax", "column data", "column scale", "column amax", "observed")
FACES = ("row data", "row scale", "column data", "column scale")
FORMS = ((PACKED, PACKED), (DEQUANTIZED, PACKED), (DEQUANTIZED, DEQUANTIZED), (NONE, PACKED), (PACKED, NONE))


class OperandCase(NamedTuple):
    """An activation to quantize: how its images are folded, options that differ from TE's, and forms of both faces."""

    name: str
    x: Tensor
    fold: Fold
    options: Options
    forms: tuple[tuple[int, int], ...]


def plain_fold(x: Tensor) -> Fold:
    """Return the fold that cuts no strips, but adds zero images up to a multiple of 16."""
    return Fold(1, 0, x.shape[1] if x.dim() > 2 else 1, 0, -(-x.shape[0] // 16) * 16)


def quantize(x: Tensor, backend: str, row: int, col: int, fold: Fold, **options: Any) -> Operand:
    """Call quantize_operand with TransformerEngine's settings of x, but for `options`."""
    seed, amax = options.pop("seed", None), options.pop("amax", None)
    spec = OperandSpec(**{"groups": 1, "fold": fold, "row": row, "col": col, "rht": True, **options})
    return operand.quantize_operand(x, spec, torch.bfloat16, seed, amax, backend)


def activations(setting: Setting) -> str:
    """Compare activations, rounded to nearest: every form of both faces, with the current tensor scale."""
    return _compare(setting, _operands(setting.small)[:3])


def unusual_activations(setting: Setting) -> str:
    """Compare activations with groups, NaN, other ranks and dtypes, 4over6, and one tensor scale a row."""
    return _compare(setting, _operands(setting.small)[3:])


def _compare(setting: Setting, cases: list[OperandCase]) -> str:
    checked = 0
    for name, x, fold, options, forms in cases:
        for row, col in forms:
            setting.dirty()
            truth = quantize(x, "reference", row, col, fold, **options)
            ours = quantize(setting.put(x), setting.backend, row, col, fold, **options)
            checked += _same_faces(f"{name}, forms {row} and {col}", row, col, ours, truth)
    return f"{checked} elements equal in bits"


def _same_faces(what: str, row: int, col: int, ours: Operand, truth: Operand) -> int:
    """Compare what was asked for: the amax of a face that is not written has no meaning."""
    wanted = [0, 1, 2] * (row != NONE) + [3, 4, 5] * (col != NONE) + [6]
    names, a, b = [OPERAND[i] for i in wanted], ours.flat(), truth.flat()
    return same_fields(what, names, [a[i] for i in wanted], [b[i] for i in wanted])


def delayed(setting: Setting) -> str:
    """Compare codes under given power-of-two tensor scales, and what is measured for the next step."""
    checked = 0
    for name, x, fold, options, _ in _operands(setting.small)[:2]:
        spec = OperandSpec(1, fold, rht=True)
        measured = operand.measure_operand(x, spec, "reference")
        ours = operand.measure_operand(setting.put(x), spec, setting.backend)
        checked += same_fields(f"{name}, measured", ("amax",), (ours,), (measured,))
        for factor in (2.0, 0.25):  # a scale with room above, and one that saturates
            # An operand with NaN or inf needs some scale, too.
            exponent = torch.ceil(torch.log2(measured.nan_to_num(1.0, 1.0, 1.0).clamp(min=1e-30) / 2688.0))
            # 2688 = 6 * 448: the tensor scale amax / 2688 is then a power of two.
            amax = 2688.0 * torch.exp2(exponent) * factor
            truth = quantize(x, "reference", DEQUANTIZED, PACKED, fold, amax=amax, **options)
            setting.dirty()
            given = setting.put(amax)
            ours_q = quantize(setting.put(x), setting.backend, DEQUANTIZED, PACKED, fold, amax=given, **options)
            checked += _same_faces(f"{name}, scale x {factor}", DEQUANTIZED, PACKED, ours_q, truth)
    return f"{checked} elements equal in bits"


def weights(setting: Setting) -> str:
    """Compare weights: 16x16 and 1x16 scales, groups, power-of-two tensor scales."""
    checked = 0
    for name, w, options in _weights(setting.small):
        dtype = options.pop("dtype", torch.bfloat16)
        spec = WeightSpec(**{"groups": 1, **options})
        # With 16x16 scales the row face serves fprop and dgrad, so no layer asks for the other.
        for row, col in ((PACKED, NONE), (DEQUANTIZED, NONE)) if spec.two_d else ((PACKED, PACKED),):
            setting.dirty()
            spec = spec._replace(row=row, col=col)
            truth = operand.quantize_weight(w, spec, dtype, "reference")
            ours = operand.quantize_weight(setting.put(w), spec, dtype, setting.backend)
            checked += same_fields(f"{name}, forms {row} and {col}", (*FACES, "amax"), ours.flat(), truth.flat())
    return f"{checked} elements equal in bits"


def _put(arg: Any, setting: Setting) -> Any:
    """Move a tensor, or both tensors of a face, to the device under test."""
    if isinstance(arg, Face):
        return Face(*map(setting.put, arg))
    return setting.put(arg) if isinstance(arg, Tensor) else arg


def unpacking(setting: Setting) -> str:
    """Compare packed faces that are turned back to code * scale."""

    def compared(name: str, unpack: Callable[..., Tensor], *args: Any) -> int:
        truth = unpack(*args, "reference")
        setting.dirty()
        ours = unpack(*(_put(arg, setting) for arg in args), setting.backend)
        return same_fields(name, ("values",), (ours,), (truth,))

    checked = 0
    x = normal((5, 3, 4, 40), seed=5)
    # From the reference in any case: what is tested here is the way back.
    packed = quantize(x, "reference", PACKED, PACKED, Fold(2, 2, 4, 1, 16))
    w = normal((40, 24, 3, 3), seed=6)
    specs = {two_d: WeightSpec(1, PACKED, NONE if two_d else PACKED, two_d) for two_d in (True, False)}
    weight = {two_d: operand.quantize_weight(w, spec, torch.bfloat16, "reference") for two_d, spec in specs.items()}
    for dtype in (torch.bfloat16, torch.float32):
        checked += compared(f"columns to {dtype}", operand.unpack_columns, packed.col, dtype)
        checked += compared(f"rows to {dtype}", operand.unpack_rows, packed.row, 40, 1, dtype)
        for two_d, name in ((True, "row"), (False, "row"), (False, "col")):
            layout = WeightLayout(40, 24, 1, columnwise=name == "col")
            for factor in (None, torch.tensor([0.125])):
                args = (weight[two_d].face(name), layout, factor, dtype)
                checked += compared(f"weight to {dtype}", operand.unpack_weight, *args)
    return f"{checked} elements equal in bits"


def stochastic_rounding(setting: Setting) -> str:
    """Check the law of stochastic rounding of gradients, on both faces."""
    shape = (32, 2, 2, 16) if setting.small else (64, 4, 4, 64)
    x, draws = normal(shape, seed=9), 8
    x_MC = x.movedim(0, -2).reshape(-1, shape[-1])
    # Columns are rotated before they are rounded, so their law is one of the rotated values.
    rotated = formats.rht16(formats.blocks(x_MC.t())).flatten(-2)
    truth = reference_matrix.quantize_2d(x_MC, columnwise=True, rht=True)
    results = [_faces(x, seed, setting) for seed in (0, 0, *range(1, draws))]  # seed 0 twice: it must repeat itself
    for name, a, b in zip(FACES, results[0], results[1], strict=True):
        if not torch.equal(a, b):
            raise CheckFailed(f"one seed gave two results: {name}")
    worst = 0.0
    for face, v, scale, amax, picks in (
        ("rowwise", x_MC.float(), truth.row_scale, truth.row_amax, (0, 1)),
        ("columnwise", rotated.float(), truth.col_scale, truth.col_amax, (2, 3)),
    ):
        enc = formats.encode_multiplier(scale, formats.encode_scale(amax).unsqueeze(-1))
        y = (formats.blocks(v) * enc.unsqueeze(-1)).flatten(-2)
        # Random bytes of 0 round nothing up, and bytes of 255 all that can be: these are a value's two neighbours.
        low = formats.encode_e2m1_stochastic(y, torch.zeros_like(y, dtype=torch.uint8))
        high = formats.encode_e2m1_stochastic(y, torch.full_like(y, 255, dtype=torch.uint8))
        errors = []
        for result in results[1:]:
            data, block_scale = result[picks[0]], result[picks[1]]
            same_fields(f"stochastic {face}", ("scale",), (block_scale,), (scale.view(torch.uint8),))
            codes = formats.unpack_nibbles(data)
            if not bool(((codes == low) | (codes == high)).all()):
                raise CheckFailed(f"stochastic {face}: a value is none of its two neighbours")
            errors.append(_error(codes, y, low, high))
        worst = max(worst, _law(face, torch.stack(errors), low != high))
    return f"{draws} seeds, bias at most {worst:.1e} of a step"


def _faces(x: Tensor, seed: int, setting: Setting) -> tuple[Tensor, ...]:
    """Quantize x with a seed, and return data and scale of rows, then of columns, as matrices.

    Their shapes are [M, C / 2], [M, C / 16], [C, M / 2], [C, M / 16].
    """
    setting.dirty()
    key = setting.put(torch.tensor([seed], dtype=torch.int64))
    made = quantize(setting.put(x), setting.backend, PACKED, PACKED, plain_fold(x), stochastic=True, seed=key)
    row, row_scale, col, col_scale = (tensor.cpu() for tensor in (*made.row, *made.col))
    col, col_scale = layouts.ntile_to_te(col, col_scale)
    return (
        row.movedim(0, -2).reshape(-1, row.shape[-1]),
        row_scale.movedim(0, -2).reshape(-1, row_scale.shape[-1]), col, col_scale,
    )


def _error(codes: Tensor, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the rounding error in steps, without the 1/512 that 8 random bits leave, so that its mean is 0."""
    below, above = formats.decode_e2m1(low).abs(), formats.decode_e2m1(high).abs()
    step = torch.where(above > below, above - below, torch.ones_like(above))  # 1 where the value cannot move
    moved = (formats.decode_e2m1(codes).abs() - y.abs().clamp(max=6.0)) / step
    return torch.where(low != high, moved + 1.0 / 512, torch.zeros_like(moved))


def _law(face: str, errors: Tensor, between: Tensor) -> float:
    """Check mean and correlations of rounding errors, and return |mean| in steps.

    Args:
        face: the name of the face, for messages.
        errors: [draws, R, L], in steps.
        between: [R, L], which values lie between two codes and so can move.
    Raises:
        CheckFailed: a figure beyond what chance explains, 6 standard errors.
    """
    spread = float(errors.square().sum().sqrt() / max(int(between.sum()) * len(errors), 1) ** 0.5)
    if spread < 0.2:
        raise CheckFailed(f"stochastic {face}: errors of {spread:.3f} of a step, as of rounding down or to nearest")
    count = max(int(between.sum()) * len(errors), 1)
    mean = float(errors.sum()) / count
    # The standard deviation of one error is at most 0.5 of a step: that of a value halfway between two codes.
    if abs(mean) > 6 * 0.5 / count**0.5 + 2.0**-9:
        raise CheckFailed(f"stochastic {face}: rounding is biased by {mean:.4f} of a step")
    # Kernels draw random bits for a block, or a row of 16 blocks, at a time: each place must be right by itself.
    for name, axis, others in (("place in a block", 2, (0, 1, 2)), ("row of 16", 1, (0, 1, 3))):
        lane = float(errors.unflatten(axis, (errors.shape[axis] // 16, 16)).sum(others).abs().max()) * 16 / count
        if lane > 6 * 0.5 * (16 / count) ** 0.5 + 2.0**-8:
            raise CheckFailed(f"stochastic {face}: one {name} is biased by {lane:.4f} of a step")
    # Neighbours along each axis: draws of two seeds, rows, and columns.
    for axis in (0, 1, 2):
        a, b = errors.narrow(axis, 0, errors.shape[axis] - 1), errors.narrow(axis, 1, errors.shape[axis] - 1)
        pairs = max(int(((a != 0) & (b != 0)).sum()), 1)
        correlation = float((a * b).sum()) / pairs / spread**2
        if abs(correlation) > 6 / pairs**0.5 + 0.02:
            where = ("draws", "rows", "columns")[axis]
            raise CheckFailed(f"stochastic {face}: neighbouring {where} are correlated ({correlation:.3f})")
    return abs(mean)


def _operands(small: bool) -> list[OperandCase]:
    """List the cases: channel tails, groups, strips with a halo, special values, other recipes.

    Every form and dtype takes a compilation of seconds, so only the first case has all forms.
    """
    size = 1 if small else 2
    shape = (16, 2 * size, 2 * size, 32 * size)
    # Blocks of very different size, so that scales from the smallest to the largest occur in one tensor.
    wide = normal(shape, seed=1) * torch.exp2(normal(shape, torch.float32, 2) * 8).bfloat16()
    tails = normal((5, 6, 3 if small else 26, 40), torch.float32, 4)
    zeros = normal(shape, torch.float32, 3)
    zeros[:, 0] = 0
    zeros[:, :, 0] *= 1e-39  # subnormal numbers
    both, used = FORMS[:1], FORMS[:2]  # both faces packed; also x as a training step has it, fprop's dequantized
    cases: list[tuple[str, Tensor, Fold | None, Options, tuple[tuple[int, int], ...]]] = [
        ("bf16, values of many sizes", wide, None, {}, used if small else FORMS),
        ("fp32, 40 channels, 5 images in strips", tails, Fold(3, 2, 4, 1, 16), {}, used),
        ("bf16, zeros and tiny numbers", zeros.bfloat16(), None, {}, both),
    ]
    if small:
        cases += [
            ("bf16, two groups of 24 channels", normal((16, 2, 3, 48), seed=5), None, {"groups": 2}, both),
            ("fp16, no rotation", normal((20, 2, 3, 16), torch.float16, 6), None, {"rht": False}, both),
        ]
    else:
        plain: Options = {"rht": False}
        for bad in (float("nan"), float("inf")):
            x = wide.clone()
            x[3, 2, 1, 5] = bad
            cases.append((f"bf16 with {bad}", x, None, {}, both))
        mae, mse = ({**plain, "four_over_six": error, "e4m3_max": 256} for error in ("MAE", "MSE"))
        cases += [
            ("bf16, large", normal((48, 17, 19, 96), seed=8), None, {}, used),
            ("bf16, two groups of 24 channels", normal((16, 5, 5, 48), seed=5), None, {"groups": 2}, both),
            ("fp16, no rotation", normal((20, 8, 8, 16), torch.float16, 6), None, plain, both),
            ("bf16, linear layer", normal((300, 1040), seed=9), None, {}, both),
            ("bf16, volume", normal((16, 4, 4, 4, 64), seed=10), None, {}, both),
            ("fp32, huge", normal(shape, torch.float32, 11, 1e37), None, {}, both),
            ("4over6, MAE", normal((16, 3, 3, 48), seed=12), None, mae, both),
            ("4over6, MSE", normal((16, 3, 3, 48), seed=13), None, mse, both),
            ("row-scaled", normal((16, 3, 3, 48), seed=14), None, {**plain, "row_scaled": True}, both),
        ]
    return [OperandCase(name, x, fold or plain_fold(x), options, forms) for name, x, fold, options, forms in cases]


def _weights(small: bool) -> list[tuple[str, Tensor, Options]]:
    """List the cases: name, weight, and options that differ from TE's."""
    last = normal((32, 48, 3, 3), torch.float32, 23).to(memory_format=torch.channels_last)
    cases: list[tuple[str, Tensor, Options]] = [
        ("fp32, 40 to 24 channels, 2x2", normal((24, 40, 2, 2), torch.float32, 20), {}),
        ("bf16, power-of-two scale", normal((32, 16, 1, 1), seed=21), {"pow2": True}),
        ("fp32, 1x16 blocks", normal((24, 40, 2, 1), torch.float32, 22), {"two_d": False}),
    ]
    if not small:
        cases += [
            ("channels_last", last, {"dtype": torch.float32}),
            ("two groups", normal((40, 24, 3, 3), seed=24), {"groups": 2}),
            ("linear", normal((100, 70), seed=25), {}),
            ("volume", normal((32, 16, 2, 2, 2), seed=26), {}),
            ("4over6", normal((64, 64, 3, 3), seed=27), {"four_over_six": "MAE", "e4m3_max": 256}),
            ("zeros", torch.zeros(32, 32, 1, 1), {}),
        ]
    return cases
