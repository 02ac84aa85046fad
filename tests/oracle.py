"""Brute force, to compare with: it imports nothing from the package, and loops where the package computes.

E2M1, E4M3        nearest table entry, ties to the even code
quantize_rows     the two-level scale chain of one face, element by element in numpy float32
hadamard16        the 16x16 matrix of the RHT, written out
conv*, any rank   loop nests over output positions and taps in float64, grouped, strided, padded, dilated
"""

from __future__ import annotations

from itertools import product

import numpy as np

f32 = np.float32
FLT_MAX = np.finfo(np.float32).max
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def e4m3_value(byte: int) -> float:
    """Value of an E4M3 (fn) byte: 4 exponent bits with bias 7, 3 mantissa bits, NaN at 0x7F and 0xFF."""
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if sign else magnitude


E4M3 = tuple(e4m3_value(byte) for byte in range(0x7F))


def nearest(table: tuple[float, ...], value: float) -> int:
    """Index of the entry nearest to value >= 0; of two as near, the even index; beyond the table, the last."""
    distance = [abs(entry - min(value, table[-1])) for entry in table]
    best = min(distance)
    candidates = [i for i, d in enumerate(distance) if d == best]
    return next((i for i in candidates if i % 2 == 0), candidates[0])


def encode_e2m1(value: float) -> int:
    """E2M1 code of one number."""
    if np.isnan(value):
        return 7
    magnitude = 7 if np.isinf(value) else nearest(E2M1, abs(float(value)))
    return magnitude | (8 if np.signbit(value) else 0)


def encode_e4m3(value: float) -> int:
    """E4M3 byte of one number >= 0, saturating; NaN saturates too."""
    return 0x7E if np.isnan(value) or value >= 448 else nearest(E4M3, float(value))


def encode_scale(amax: np.float32, e4m3_max: int = 448) -> np.float32:
    """S_enc of a tensor."""
    with np.errstate(all="ignore"):
        s_enc = min(f32(6 * e4m3_max) / f32(amax), FLT_MAX)
    return f32(1) if amax == 0 or not np.isfinite(amax) else f32(s_enc)


def quantize_rows(x: np.ndarray, tile_rows: int = 1) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Codes [R, L], scale bytes [R, L/16] and amax of float32 x [R, L], L a multiple of 16; tile_rows 1 or 16."""
    rows, length = x.shape
    amax = f32(np.abs(x).max())
    s_enc = encode_scale(amax)
    codes, scales = np.zeros((rows, length), np.uint8), np.zeros((rows, length // 16), np.uint8)
    with np.errstate(all="ignore"):
        s_dec = f32(1) / s_enc
        for r, b in product(range(rows), range(length // 16)):
            first = r // tile_rows * tile_rows
            tile = x[first : first + tile_rows, 16 * b : 16 * b + 16]
            scale = encode_e4m3(min(f32(np.abs(tile).max()) * (s_enc * (f32(1) / f32(6))), FLT_MAX))
            enc = min(f32(1) / (f32(E4M3[scale]) * s_dec), FLT_MAX)
            scales[r, b] = scale
            for i in range(16 * b, 16 * b + 16):
                codes[r, i] = encode_e2m1(x[r, i] * f32(enc))
    return codes, scales, amax


def hadamard16(with_sign: bool = True) -> np.ndarray:
    """R, float64 [16, 16]: y = x @ R; diag(signs) @ Sylvester / 4."""
    h = np.array([[(-1) ** (i & j).bit_count() for j in range(16)] for i in range(16)], np.float64)
    return (np.array(SIGNS)[:, None] * h if with_sign else h) / 4


# ---- convolutions, channels first, any rank -------------------------------------------------------------------------


def _positions(image: tuple[int, ...], out: tuple[int, ...], kernel: tuple[int, ...], stride, padding, dilation):
    """(output position, tap, image position) of every product whose image position is inside the image."""
    for p in product(*map(range, out)):
        for r in product(*map(range, kernel)):
            q = tuple(p[d] * stride[d] - padding[d] + r[d] * dilation[d] for d in range(len(image)))
            if all(0 <= q[d] < image[d] for d in range(len(image))):
                yield p, r, q


def out_size(image: tuple[int, ...], kernel: tuple[int, ...], stride, padding, dilation) -> tuple[int, ...]:
    """The image of a convolution's output."""
    return tuple(
        (image[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(len(image))
    )


def _split(channels: int, groups: int, g: int) -> slice:
    return slice(g * (channels // groups), (g + 1) * (channels // groups))


def conv(x: np.ndarray, w: np.ndarray, stride, padding, dilation, groups: int = 1) -> np.ndarray:
    """y [B, O, *out] of x [B, C, *image] and w [O, C/groups, *kernel]."""
    out = out_size(x.shape[2:], w.shape[2:], stride, padding, dilation)
    y = np.zeros((x.shape[0], w.shape[0], *out))
    for p, r, q in _positions(x.shape[2:], out, w.shape[2:], stride, padding, dilation):
        for g in range(groups):
            o, c = _split(w.shape[0], groups, g), _split(x.shape[1], groups, g)
            y[(slice(None), o, *p)] += x[(slice(None), c, *q)] @ w[(o, slice(None), *r)].T
    return y


def conv_dx(
    dy: np.ndarray, w: np.ndarray, image: tuple[int, ...], stride, padding, dilation, groups: int = 1
) -> np.ndarray:
    """dx [B, C, *image]."""
    dx = np.zeros((dy.shape[0], w.shape[1] * groups, *image))
    for p, r, q in _positions(image, dy.shape[2:], w.shape[2:], stride, padding, dilation):
        for g in range(groups):
            o, c = _split(w.shape[0], groups, g), _split(dx.shape[1], groups, g)
            dx[(slice(None), c, *q)] += dy[(slice(None), o, *p)] @ w[(o, slice(None), *r)]
    return dx


def conv_dw(
    dy: np.ndarray, x: np.ndarray, kernel: tuple[int, ...], stride, padding, dilation, groups: int = 1
) -> np.ndarray:
    """dw [O, C/groups, *kernel]."""
    dw = np.zeros((dy.shape[1], x.shape[1] // groups, *kernel))
    for p, r, q in _positions(x.shape[2:], dy.shape[2:], kernel, stride, padding, dilation):
        for g in range(groups):
            o, c = _split(dy.shape[1], groups, g), _split(x.shape[1], groups, g)
            dw[(o, slice(None), *r)] += dy[(slice(None), o, *p)].T @ x[(slice(None), c, *q)]
    return dw


def conv_transpose(
    x: np.ndarray, w: np.ndarray, stride, padding, output_padding, dilation, groups: int = 1
) -> np.ndarray:
    """y [B, O, *out] of x [B, C, *image] and w [C, O/groups, *kernel]: the dx of the convolution with the same w."""
    rank = x.ndim - 2
    out = tuple(
        (x.shape[2 + d] - 1) * stride[d] - 2 * padding[d] + dilation[d] * (w.shape[2 + d] - 1) + output_padding[d] + 1
        for d in range(rank)
    )
    return conv_dx(x, w, out, stride, padding, dilation, groups)


def conv_transpose_dx(dy: np.ndarray, w: np.ndarray, stride, padding, dilation, groups: int = 1) -> np.ndarray:
    """dx of conv_transpose: the convolution of dy, cut to x's image by the caller if output_padding made it longer."""
    return conv(dy, w, stride, padding, dilation, groups)


def conv_transpose_dw(
    dy: np.ndarray, x: np.ndarray, kernel: tuple[int, ...], stride, padding, dilation, groups: int = 1
) -> np.ndarray:
    """dw [C, O/groups, *kernel] of conv_transpose: x and dy swap roles."""
    return conv_dw(x, dy, kernel, stride, padding, dilation, groups)
