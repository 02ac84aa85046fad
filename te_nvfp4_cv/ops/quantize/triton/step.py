"""The quantization launches of one layer's training step, looked up once for all calls that are alike.

    forward    w's amax, x's own amaxes, both faces of x, w as codes and values
    backward   dy's own amaxes, both faces of dy, w and x unpacked
    scale      the pass over a result that takes alpha, where no operand carries it

These are launch.py's kernels, with the grids and constants of grids.py. What is left for a call are addresses: a small
layer in eager mode takes as long as Python needs to make its tensors, so the packed operands that backward needs lie in
one tensor, `saved`, and nobody makes views of it. With delayed scales w is measured and x quantized in one launch: for
this the backward pass has left what the scales will be after they move.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from te_nvfp4_cv.formats import E4M3_MAX
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.quantize.triton import grids, joint_kernels, operand_kernels, tiles
from te_nvfp4_cv.ops.records import Face, OperandSpec, WeightSpec
from te_nvfp4_cv.ops.triton.elementwise import scale_bias_of
from te_nvfp4_cv.ops.triton.launching import Bound
from te_nvfp4_cv.ops.triton.workspace import zeros

ALIGN = 64  # bytes: pieces of `saved` begin at multiples, where Triton loads them as it loads a tensor's beginning
# Amaxes are the last NUMBERS fp32 of `saved`, and those of a backward pass: first an operand's, then w's.
NUMBERS, W_AMAX = 16, 8
F32, U8, I32, I64 = torch.float32, torch.uint8, torch.int32, torch.int64


class State(Protocol):
    """The delayed scales of one weight: layer/delayed_scaling.py. `next` is right if `foreseen`."""

    used: Tensor
    collected: Tensor
    saturated: Tensor
    next: Tensor
    foreseen: bool


class Parts(NamedTuple):
    """All that decides the launches.

    Attributes:
        x, y: shapes [B, *image, channels], of a linear layer [rows, channels]; nothing is folded.
        dtype: of x, y, dy and of dequantized values.
        w: the weight's shape [axis 0, axis 1, taps]; it is dense.
        strides: of its rows, taps and channels.
        w_dtype: its dtype.
        specs: of x and dy, without 4over6.
        weight: the spec of w, in 16x16 tiles; with pow2 its amax is raised.
        numbers: by GEMM, the factor of the two amaxes.
        carried: the GEMMs of which a dequantized operand carries alpha.
        rule: e4m3_max and margin of delayed scales, or None where each tensor's own amax rules.
    """

    x: torch.Size
    y: torch.Size
    dtype: torch.dtype
    w: torch.Size
    strides: tuple[int, int, int]
    w_dtype: torch.dtype
    specs: tuple[OperandSpec, OperandSpec]
    weight: WeightSpec
    numbers: dict[str, float]
    carried: frozenset[str]
    rule: tuple[tuple[int, ...], tuple[int, ...]] | None


class Step:
    """The launches for tensors on one device, which the caller has made the current one."""

    def __init__(self, p: Parts, device: torch.device) -> None:
        self.parts, self.device, self.delayed = p, device, p.rule is not None
        x, w = torch.empty(p.x, dtype=p.dtype, device="meta"), torch.empty(p.w, dtype=p.w_dtype, device="meta")
        columns, codes = layouts.operand_faces(x, p.specs[0], p.dtype)[1], layouts.weight_faces(w, p.weight, p.dtype)[0]
        self.places: list[tuple[int, torch.Size]] = []  # of the columns' data and scale, and of the weight's
        end = 0
        for piece in (*columns, *codes):
            self.places.append((end, piece.shape))
            end += -(-piece.numel() // ALIGN) * ALIGN
        self.numbers, self.bytes = end, end + 4 * NUMBERS
        # Where an operand's rowwise and columnwise amax are: of given ones those that finish_observed has marked.
        self.row, self.col = (4 * 3, 4 * 4) if self.delayed else (0, 4)
        n, raised = math.prod(p.w), p.weight.e4m3_max if p.weight.pow2 else 0
        self.measure = tiles.amax_flat_of(n, p.w_dtype, device, 1, raised, p.rule or ()).usual
        shapes = (p.x, p.y)
        self.amaxes = () if self.delayed else tuple(map(self._amaxes_of, shapes, p.specs))
        self.tiles = tuple(map(self._tiles_of, shapes, p.specs))
        # By whether the scales move.
        self.joint = [self._joint(n, raised, moves) for moves in (False, True)] if self.delayed else []
        numbers = {gemm: (gemm in p.carried, p.numbers[gemm] if gemm in p.carried else 1.0) for gemm in p.numbers}
        carried, number = numbers["fprop"]
        kinds = (p.w_dtype, p.dtype, p.weight._replace(pow2=False), True, carried)
        self.weight = grids.weight_tiles_of(p.w, p.strides, device, number, kinds)
        factors = (2 * numbers["dgrad"][0], numbers["dgrad"][1], 2 * numbers["wgrad"][0], numbers["wgrad"][1])
        values, rows = torch.Size((p.w[0], p.w[2], p.w[1])), p.w[0] // p.weight.groups
        how = (p.dtype, device, factors, p.rule or ())
        self.unpack = tiles.unpack_both_of(values, rows, columns.scale.shape, *how).usual

    def _amaxes_of(self, shape: torch.Size, spec: OperandSpec) -> Bound:
        raised = spec.e4m3_max if spec.pow2 else 0
        if spec.rht:
            return grids.amaxes_of(shape, self.parts.dtype, self.device, spec.fold, raised, False)[0].usual
        return tiles.amax_flat_of(math.prod(shape), self.parts.dtype, self.device, 2, raised, ()).usual

    def _tiles_of(self, shape: torch.Size, spec: OperandSpec) -> Bound:
        k = operand_kernels
        observe = k.FINISH.value + (not spec.rht) * k.SAME.value + k.COLLECT.value + k.COUNT.value
        how = (spec, (spec.row, spec.col), observe * self.delayed, False)
        return grids.tiles_of(shape, self.parts.dtype, self.device, *how)[0].usual

    def _joint(self, n: int, raised: int, moves: bool) -> Bound:
        """Return the launch of quantize_and_measure_kernel: quantize_kernel's, and more programs for w's n values."""
        alone = self.tiles[0]
        images, rows, run, per_row, _ = alone.numbers
        names = ("ROW", "COL", "RHT", "OBSERVE", "MASKED", "CHANNELS", "BLOCKS", "E4M3_MAX", "BLOCK")
        constants = {name: value for name, value in alone.constants.items() if name in names or name.islower()}
        block, programs = self.measure.constants["BLOCK"], self.measure.grid[0]
        constants |= dict(POW2=raised > 0, W_E4M3_MAX=raised or E4M3_MAX, MOVES=moves, W_BLOCK=block)
        numbers = (images, rows, run, per_row, alone.grid[0], n)
        kernel = joint_kernels.quantize_and_measure_kernel
        # Places of codes, without the two tensors that quantize_kernel has before them and this one has not.
        views = [(place - 2, dtype) for place, dtype in alone.views]
        return Bound(kernel, (alone.grid[0] + programs,), numbers, constants, views)

    # ---- the two passes

    def forward(self, x: Tensor, w: Tensor, values: tuple[Tensor, Tensor], state: State | None, moves: bool) -> Tensor:
        """Quantize x and w, and return what backward needs of them.

        Args:
            x: contiguous as [B, *image, C].
            w: of the strides of the parts.
            values: where code * scale of x's rows and of w goes, the latter times alpha where it carries that.
            state: the delayed scales, or None.
            moves: they move first.
        """
        p, device, work = self.parts, x.get_device(), zeros(x)
        saved = torch.empty(self.bytes, dtype=U8, device=self.device)
        begin, at_work, at_w = saved.data_ptr(), work.data_ptr(), w.data_ptr()
        col_data, col_scale, w_data, w_scale = [begin + place for place, _ in self.places]
        amaxes = begin + self.numbers
        w_amax = amaxes + 4 * W_AMAX
        at: tuple[int, ...]
        faces = (values[0].data_ptr(), 0, col_data, col_scale)
        if state is None or (moves and not state.foreseen):
            used, seen = (work, work) if state is None else (state.used, state.collected)
            at, kind = (at_w, at_work, w_amax, used.data_ptr(), seen.data_ptr()), used.dtype
            self.measure.at(device, at, (p.w_dtype, I32, F32, kind, kind), (w, work, saved, used, seen))
            self._quantize(0, (x, work, saved, values[0]), faces, amaxes, None, state)
        else:
            used, seen, after = state.used, state.collected, state.next
            now, at_x = (after if moves else used).data_ptr(), x.data_ptr()
            watched = (at_work, amaxes, seen.data_ptr(), state.saturated.data_ptr())
            at = (at_x, now, *faces, *watched, at_w, w_amax, used.data_ptr(), after.data_ptr())
            kinds = (p.dtype, F32, p.dtype, U8, U8, U8, I32, F32, F32, torch.float64, p.w_dtype, F32, F32, F32)
            owners = (x, values[0], saved, work, w, used, seen, after, state.saturated)
            self.joint[moves].at(device, at, kinds, owners)
        a = amaxes + self.row if "fprop" in p.carried else w_amax
        at = (at_w, w_amax, w_data, w_scale, values[1].data_ptr(), a, w_amax)
        self.weight.at(device, at, (p.w_dtype, F32, U8, U8, p.dtype, F32, F32), (w, saved, values[1]))
        return saved

    def backward(
        self,
        dy: Tensor,
        saved: Tensor,
        faces: tuple[Tensor, Tensor],
        values: tuple[Tensor, Tensor],
        seed: Tensor | None,
        state: State | None,
    ) -> Tensor:
        """Quantize dy, unpack w and x, and foresee the scales. Returns dy's amaxes.

        Args:
            dy: contiguous as [B, *image, O].
            saved: of `forward`.
            faces: where code * scale of dy's rows and of its columns goes.
            values: where that of w and of x's columns goes, times alpha where they carry it.
            seed: for stochastic rounding.
            state: as for `forward`.
        """
        p, device, work = self.parts, dy.get_device(), zeros(dy)
        mine = torch.empty(NUMBERS, dtype=F32, device=self.device)
        amaxes, begin = mine.data_ptr(), saved.data_ptr()
        rows, columns = faces
        at: tuple[int, ...] = (rows.data_ptr(), 0, columns.data_ptr(), 0)
        self._quantize(1, (dy, work, mine, rows, columns), at, amaxes, seed, state)
        col_data, col_scale, w_data, w_scale = [begin + place for place, _ in self.places]
        of_x, of_w = begin + self.numbers + self.col, begin + self.numbers + 4 * W_AMAX
        w_parts = (amaxes + self.row, of_w) if "dgrad" in p.carried else (w_scale, w_scale)
        x_parts = (amaxes + self.col, of_x) if "wgrad" in p.carried else (col_scale, col_scale)
        kinds = [F32 if gemm in p.carried else U8 for gemm in ("dgrad", "dgrad", "wgrad", "wgrad")]
        scales = (values[0],) * 3 if state is None else (state.used, state.collected, state.next)
        at = (w_data, w_scale, col_data, col_scale, values[0].data_ptr(), values[1].data_ptr(), *w_parts, *x_parts)
        kinds = [U8, U8, U8, U8, p.dtype, p.dtype, *kinds, *[t.dtype for t in scales]]
        self.unpack.at(device, (*at, *[t.data_ptr() for t in scales]), kinds, (saved, mine, *values, *scales))
        return mine

    def _quantize(
        self,
        side: int,
        owners: tuple[Tensor, ...],
        faces: tuple[int, ...],
        amaxes: int,
        seed: Tensor | None,
        state: State | None,
    ) -> None:
        """Quantize x (side 0) or dy (1), the first of the owners; the second is the workspace, the third has amaxes."""
        p, x, work = self.parts, owners[0], owners[1]
        device, at_x, at_work = x.get_device(), x.data_ptr(), work.data_ptr()
        if state is None:
            used, watched, kinds = amaxes, (amaxes,) * 4, (F32,) * 4
            if p.specs[side].rht:
                self.amaxes[side].at(device, (at_x, at_x, at_work, amaxes), (p.dtype, p.dtype, I32, F32), owners)
            else:
                at = (at_x, at_work, amaxes, at_work, at_work)
                self.amaxes[side].at(device, at, (p.dtype, I32, F32, I32, I32), owners)
        else:
            used, kinds = state.used.data_ptr() + 8 * side, (I32, F32, F32, torch.float64)
            owners = (*owners, state.used, state.collected, state.saturated)
            watched = (at_work, amaxes, state.collected.data_ptr() + 8 * side, state.saturated.data_ptr() + 8 * side)
        at_seed, seed_kind = (used, F32) if seed is None else (seed.data_ptr(), I64)
        owners = owners if seed is None else (*owners, seed)
        types = (p.dtype, p.dtype, F32, seed_kind, p.dtype, U8, U8 if side == 0 else p.dtype, U8, *kinds)
        self.tiles[side].at(device, (at_x, at_x, used, at_seed, *faces, *watched), types, owners)

    def scale(
        self, gemm: str, y: Tensor, dtype: torch.dtype, amaxes: tuple[Tensor, Tensor | None], bias: Tensor | None
    ) -> Tensor:
        """Return round(y * alpha + bias) in `dtype`, in y's memory where that is its dtype.

        Args:
            y: [B, C, *image], in memory [B, *image, C].
            amaxes: `saved`, and for a gradient what `backward` returned.
        """
        out = y if y.dtype == dtype else torch.empty_like(y, dtype=dtype)
        saved, mine = amaxes
        kept = saved.data_ptr() + self.numbers
        if mine is None:
            a, b = kept + self.row, kept + 4 * W_AMAX
        elif gemm == "dgrad":
            a, b = mine.data_ptr() + self.row, kept + 4 * W_AMAX
        else:
            a, b = mine.data_ptr() + self.col, kept + self.col
        bias = None if bias is None else bias.contiguous()
        third, number = F32 if bias is None else bias.dtype, self.parts.numbers[gemm]
        at = (y.data_ptr(), out.data_ptr(), a, b, a if bias is None else bias.data_ptr())
        run = scale_bias_of(y.numel(), y.shape[1], (y.dtype, dtype, third), 2, number, bias is not None)
        owners = [t for t in (y, out, saved, mine, bias) if t is not None]
        run.at(y.get_device(), at, (y.dtype, dtype, F32, F32, third), owners)
        return out

    # ---- for those that take the usual way

    def faces(self, saved: Tensor) -> tuple[Face, Tensor, Face, Tensor]:
        """Return x's columns and their amax, w's codes and their amax, as views of `saved`."""
        data, scale, w_data, w_scale = [
            saved[place : place + math.prod(shape)].view(shape) for place, shape in self.places
        ]
        amaxes = saved[self.numbers :].view(F32)
        at = self.col // 4
        return Face(data, scale), amaxes[at : at + 1], Face(w_data, w_scale), amaxes[W_AMAX : W_AMAX + 1]
