"""Compute, from a geometry, how the implicit GEMM kernels walk an image: their integer arguments.

    data_classes       fprop and dgrad: a launch for each class of outputs that the same taps reach
    weight_arguments   wgrad: lines of the b image, and where a tap reads the a image

This file knows no tensors and no Triton.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.ops.geometry import ConvGeometry


@dataclass(frozen=True)
class Axis:
    """One axis of one class of outputs: output i reads position i * stride + first + j * step for its tap j.

    `outputs` and `taps` are counts. Output i is number i * spread + phase of the result's axis; tap j is number
    first_tap + j * tap_step of the kernel's axis.
    """

    outputs: int
    taps: int
    stride: int
    first: int
    step: int
    spread: int
    phase: int
    first_tap: int
    tap_step: int


def gathering_axis(out: int, kernel: int, stride: int, padding: int, dilation: int) -> list[Axis]:
    """Return the single class of the outputs of the b side, which gather from a."""
    return [Axis(out, kernel, stride, -padding, dilation, 1, 0, 0, 1)]


def scattering_axis(out: int, kernel: int, stride: int, padding: int, dilation: int) -> list[Axis]:
    """Return the classes of the outputs of the a side, by their coordinate modulo the stride.

    Tap t reaches an output if the stride divides coordinate + padding - t * dilation, so that all outputs of a class
    have the same taps.
    """
    classes = []
    for phase in range(min(stride, out)):
        # The taps that hit are tap_step apart, so that first_tap and tap_step describe all of them.
        taps = [t for t in range(kernel) if (phase + padding - t * dilation) % stride == 0]
        # A class may have no taps (a stride above the kernel): any first tap will do then, since no step is made.
        first_tap, tap_step = (taps or [0])[0], stride // math.gcd(stride, dilation)
        first = (phase + padding - first_tap * dilation) // stride
        step = -dilation * tap_step // stride
        outputs = -(-(out - phase) // stride)  # phase, phase + stride, ... below `out`
        classes.append(Axis(outputs, len(taps), 1, first, step, stride, phase, first_tap, tap_step))
    return classes


@functools.lru_cache(maxsize=4096)
def data_classes(g: ConvGeometry, to_b: bool) -> list[dict[str, int]]:
    """Return the arguments of data_product that the geometry decides, a dict a launch."""
    g = g.with_axes(3)  # depth, height and width
    source, result = (g.a_size, g.b_size) if to_b else (g.b_size, g.a_size)
    split = gathering_axis if to_b else scattering_axis
    per_axis = [split(*row) for row in zip(result, g.kernel, g.stride, g.padding, g.dilation, strict=True)]
    pixels = (source[1] * source[2], source[2], 1)
    out_pixels = (result[1] * result[2], result[2], 1)
    taps = (g.kernel[1] * g.kernel[2], g.kernel[2], 1)
    launches = []
    # One launch for each combination of the axes' classes. Places are flat pixels: positions times the pixels between
    # neighbours along each axis.
    for axes in itertools.product(*per_axis):
        a: dict[str, int] = dict(
            rows=g.batch * math.prod(axis.outputs for axis in axes),
            x_b=math.prod(source),
            x_first=sum(axis.first * size for axis, size in zip(axes, pixels, strict=True)),
            y_b=math.prod(result),
            y_first=sum(axis.phase * size for axis, size in zip(axes, out_pixels, strict=True)),
            w_taps=g.taps,
            w_first=sum(axis.first_tap * size for axis, size in zip(axes, taps, strict=True)),
            hits=math.prod(axis.taps for axis in axes),
            CH=max(axes[1].taps, 1),  # the kernel divides by it
            CW=max(axes[2].taps, 1),
        )
        for name, axis, pixel, out_pixel, tap, size in zip("dhw", axes, pixels, out_pixels, taps, source, strict=True):
            a |= {
                f"n_{name}": axis.outputs,
                f"x_{name}": axis.stride * pixel,
                f"x_t{name}": axis.step * pixel,
                f"pos_{name}": axis.stride,
                f"first_{name}": axis.first,
                f"step_{name}": axis.step,
                f"size_{name}": size,
                f"y_{name}": axis.spread * out_pixel,
                f"w_t{name}": axis.tap_step * tap,
            }
        if a["rows"]:  # a class without taps is launched too: its outputs are zeros (plus bias), which must be written
            launches.append(a)
    return launches


@functools.lru_cache(maxsize=4096)
def weight_arguments(g: ConvGeometry) -> dict[str, int]:
    """Return the arguments of weight_product that the folded geometry decides.

    Where every output pixel reads the pixel of its own place (linear layers, 1x1 of stride 1 without padding), all
    images are one line: no step is cut short at the end of a row.
    """
    g = g.with_axes(3)
    a_size, b_size = g.a_size, g.b_size
    images = g.batch // BLOCK
    if g.taps == 1 and a_size == b_size and set(g.stride) == {1} and not any(g.padding):
        a_size = b_size = (1, 1, math.prod(b_size) * images)
        images = 1
    out: dict[str, Any] = dict(lines=images * b_size[0] * b_size[1], width=b_size[2], b_d=b_size[0], b_h=b_size[1])
    out |= dict(k_h=g.kernel[1], k_w=g.kernel[2], taps=g.taps)
    for i, name in enumerate("dhw"):
        out |= {
            f"a_{name}": a_size[i],
            f"stride_{name}": g.stride[i],
            f"first_{name}": -g.padding[i],
            f"step_{name}": g.dilation[i],
        }
    return out
