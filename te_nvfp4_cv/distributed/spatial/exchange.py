"""Halos as codes: what one call of an NVFP4 convolution reads of other ranks' rows, quantized where it lies.

    fprop   x's rowwise face: the rows under this rank's outputs
    dgrad   dy's rowwise face: the rows of y that read this rank's inputs; the rest of what is computed is cut off
    wgrad   the columnwise face of the side with the halo (x; dy of a transposed convolution), and own rows of the other

Each rank quantizes its own rows with the amaxes of all ranks, so the codes that fprop and dgrad multiply are those of
the unsharded layer. Columnwise blocks are 16 images at one pixel. A batch that does not fill them is cut into strips of
rows (ops/geometry.py), on each rank its own rows: another grouping of the same sum than the unsharded layer's. The
strips' halos are then the rowwise codes that fprop or dgrad fetched, decoded and quantized again, and nothing more
travels. The layer's sequence is layer/forward_backward.py's.

What travels while a rank computes: the rows of x that others need are quantized first and sent, and the rank goes on
with all its rows and the weight; x's columns are sent before dy is quantized; dy's rows are on their way during wgrad.
(dy is rounded with random bits, which its rows alone would not draw alike: they are sent when all of it is quantized.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from te_nvfp4_cv.backend.answers import answer
from te_nvfp4_cv.distributed.part_plan import PartPlan
from te_nvfp4_cv.distributed.spatial.halo import Pending, fetch_parts
from te_nvfp4_cv.distributed.spatial.rows import Layout, Span, Window, piece
from te_nvfp4_cv.distributed.spatial.windows import cropped
from te_nvfp4_cv.formats import BLOCK, round_up
from te_nvfp4_cv.layer import operands
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.layouts import operand_faces
from te_nvfp4_cv.ops.quantize import rounding_seeds
from te_nvfp4_cv.ops.quantize.amax import reduce_amax
from te_nvfp4_cv.ops.quantize.operand import measure_operand, quantize_operand, unpack_columns, unpack_rows
from te_nvfp4_cv.ops.records import DEQUANTIZED, NONE, PACKED, Face, Fold, Operand, OperandSpec
from te_nvfp4_cv.recipe.fields import Role


@dataclass(frozen=True)
class Cut:
    """How the rows of one convolution lie on the ranks: those of its `a` side and of its `b` side (ops/geometry.py)."""

    geometry: ConvGeometry  # of the whole image
    ranks: int

    @answer
    def window(self) -> Window:
        """How b's rows read a's."""
        g = self.geometry
        return Window(g.kernel[0], g.stride[0], g.padding[0], g.dilation[0])

    def a(self, rank: int) -> Span:
        """Return a rank's rows of the a side."""
        return piece(self.geometry.a_size[0], self.ranks, rank)

    def b(self, rank: int) -> Span:
        """Return a rank's rows of the b side."""
        return piece(self.geometry.b_size[0], self.ranks, rank)

    # A rank that has nothing to multiply multiplies one row beyond the image, of zeros, which is cut off again: so
    # every rank takes the same steps.

    def b_made(self, rank: int) -> Span:
        """Return the rows of b that a rank multiplies: its own, or one beyond the image."""
        return self.b(rank) if self.b(rank).size else self._beyond

    def a_read(self, rank: int) -> Span:
        """Return the rows of a under these, those of the padding too."""
        return self.window.reads(self.b_made(rank))

    def b_read(self, rank: int) -> Span:
        """Return the rows of b that read a rank's rows of a, or one beyond the image."""
        found = self.window.reached_from(self.a(rank), self.geometry.b_size[0])
        return found if found.size else self._beyond

    @property
    def _beyond(self) -> Span:
        rows = self.geometry.b_size[0]
        return Span(rows, rows + 1)

    def to_b(self, rank: int) -> ConvGeometry:
        """Return the geometry of what a rank multiplies from a to b, and of its wgrad."""
        return self._part(self.a_read(rank).size, self.b_made(rank).size)

    def to_a(self, rank: int) -> ConvGeometry:
        """Return the geometry of what a rank multiplies from b to a; it makes more rows than are wanted."""
        b = self.b_read(rank)
        return self._part(self.window.reads(b).size, b.size)

    def _part(self, a: int, b: int) -> ConvGeometry:
        g = self.geometry
        return replace(
            g,
            a_size=(a, *g.a_size[1:]),
            b_size=(b, *g.b_size[1:]),
            padding=(0, *g.padding[1:]),
            output_padding=(0, *g.output_padding[1:]),
        )

    @answer
    def folds(self) -> bool:
        """True if some rank's wgrad cuts its rows into strips."""
        return any(self.to_b(rank).folds[0].strips > 1 for rank in range(self.ranks))

    @answer
    def grows(self) -> bool:
        """True if some row of a is read by no row of b: a transposed convolution writes only the bias there."""
        rows = (self.a(rank) for rank in range(self.ranks))
        made = (self.window.reads(self.b_read(rank)) for rank in range(self.ranks))
        return any(m.start > r.start or m.end < r.end for r, m in zip(rows, made, strict=True))


@functools.lru_cache(maxsize=1024)
def cut_of(geometry: ConvGeometry, ranks: int) -> Cut:
    """Return how a convolution is cut; equal calls share one object."""
    return Cut(geometry, ranks)


@dataclass(frozen=True)
class PiecePlan(PartPlan):
    """The plan by which a rank quantizes its rows.

    `late` is the role whose columnwise face is made when its halo has arrived, or None.
    """

    late: Role | None

    @answer
    def input_specs(self) -> tuple[OperandSpec, OperandSpec]:
        """The specs of x: without and with a columnwise face."""
        without, with_columns = self._input_spec(False), self._input_spec(True)
        return without, with_columns._replace(col=NONE) if self.late == Role.INPUT else with_columns

    @answer
    def gradient_specs(self) -> dict[tuple[bool, bool], OperandSpec]:
        """The specs of dy; a late columnwise face is made from rowwise codes, so these are made too."""
        late = self.late == Role.GRAD_OUTPUT

        def spec(dx: bool, dw: bool) -> OperandSpec:
            row, col = dx or (late and dw), dw and not late
            return self.operand_spec(self.grad_output, self.here[1], PACKED if row else NONE, PACKED if col else NONE)

        return {(dx, dw): spec(dx, dw) for dx in (False, True) for dw in (False, True)}


@functools.lru_cache(maxsize=4096)
def _plans(plan: Plan, ranks: int, rank: int) -> tuple[Plan, Plan, Plan, PiecePlan]:
    """Return the plans of fprop, dgrad and wgrad on one rank, and the one that quantizes its rows."""
    cut = cut_of(plan.geometry, ranks)
    to_b, to_a = (replace(plan, geometry=g) for g in (cut.to_b(rank), cut.to_a(rank)))
    transposed = plan.geometry.transposed
    a, b = cut.a(rank), cut.b(rank)
    images = round_up(plan.geometry.batch, BLOCK)
    fold_a, fold_b = (Fold(1, 0, rows.size, 0, images) for rows in (a, cut.b_made(rank)))
    if cut.folds:
        fold_b = to_b.geometry.folds[1]
    here = (fold_b, fold_a) if transposed else (fold_a, fold_b)
    late = (Role.GRAD_OUTPUT if transposed else Role.INPUT) if cut.folds else None
    own = replace(
        plan,
        geometry=replace(
            plan.geometry, a_size=(a.size, *plan.geometry.a_size[1:]), b_size=(b.size, *plan.geometry.b_size[1:])
        ),
    )
    quantizes = PiecePlan.of(own, here, late=late)
    return (to_a, to_b, to_b, quantizes) if transposed else (to_b, to_a, to_b, quantizes)


def _arrived(pending: Pending, own: Face) -> Face:
    """Return a face with the rows of others as kernels read it; rows that are all of this rank are a view so far."""
    return Face(*(t.contiguous() for t in pending.wait(parts=_parts(own))))


def _parts(face: Face) -> list[tuple[Tensor, int]]:
    return [(face.data, 1), (face.scale, 1)]


class Exchange:
    """Exchanges operands in one call of a convolution whose rows are cut; see layer/options.py, Ranks."""

    def __init__(self, plan: Plan, layout: Layout) -> None:
        self.layout = layout
        self.cut = cut_of(plan.geometry, layout.ranks)
        rank = layout.rank
        self.fprop_plan, self.dgrad_plan, self.wgrad_plan, own = _plans(plan, layout.ranks, rank)
        self.own = own
        self.input_plan: Plan = own
        self.gradient_plan: Plan = own
        self.x_shape, self.y_shape = own.geometry.x_shape, own.geometry.y_shape
        self.y_torch_shape = self.y_shape
        self.adds_bias = True
        self.wgrad_first = True
        self._rows_begun: dict[Role, Pending] = {}

    # ---- which rows

    def _side(self, role: Role) -> str:
        """Return the side, "a" or "b", of x (INPUT) or dy (GRAD_OUTPUT)."""
        return "a" if (role == Role.INPUT) != self.own.geometry.transposed else "b"

    def _rows(self, side: str) -> tuple[Layout, Callable[[int], Span]]:
        g = self.cut.geometry
        if side == "a":
            return self.layout.with_rows(g.a_size[0]), self.cut.a_read
        return self.layout.with_rows(g.b_size[0]), self.cut.b_read

    # ---- operands

    def begin(self, role: Role, operand: Tensor, spec: OperandSpec, amax: Tensor | None) -> None:
        """Send what others need of x or dy, quantized alone, before all of it is quantized."""
        layout, needs = self._rows(self._side(role))
        mine = layout.mine
        given = sum(mine.within(needs(rank)).size for rank in range(layout.ranks) if rank != layout.rank)
        # Of a thin piece most rows would be quantized twice.
        if spec.row != PACKED or spec.stochastic or amax is None or 2 * given > mine.size:
            return
        rowwise = spec._replace(col=NONE)

        def give(rows: Span) -> list[Tensor]:
            part = operand.narrow(1, rows.start - mine.start, rows.size).contiguous()
            return [*quantize_operand(part, rowwise, self.own.compute_dtype, None, amax, self.own.backend).row]

        like, _ = operand_faces(operand.narrow(1, 0, 0), rowwise, self.own.compute_dtype)
        self._rows_begun[role] = fetch_parts(_parts(like), layout, needs, give)

    def gather_rows(self, role: Role, face: Face) -> Callable[[], Face]:
        """Begin to fetch the rows of a rowwise face that this rank's product reads."""
        pending = self._begun(role, face)

        def arrived() -> Face:
            whole = _arrived(pending, face)
            self._rows_begun.pop(role, None)  # it holds the face's memory
            if role == Role.INPUT or self.own_form != DEQUANTIZED:
                return whole
            how = self.fprop_plan.compute_dtype, self.fprop_plan.backend
            return Face(unpack_rows(whole, self.y_shape[-1], self.own.geometry.groups, *how), whole.scale.new_empty(0))

        return arrived

    def _begun(self, role: Role, face: Face) -> Pending:
        if role not in self._rows_begun:
            layout, needs = self._rows(self._side(role))
            self._rows_begun[role] = fetch_parts(_parts(face), layout, needs)
        return self._rows_begun[role]

    @property
    def own_form(self) -> int:
        """The form in which the backend multiplies."""
        return self.fprop_plan.operand_form

    def gather_columns(self, role: Role, face: Face) -> Callable[[], Face]:
        """Begin to fetch the rows of a columnwise face; one that was made late, or has no halo, is complete."""
        values = role == Role.GRAD_OUTPUT and self.own_form == DEQUANTIZED
        how = self.fprop_plan.compute_dtype, self.fprop_plan.backend

        def in_form(whole: Face) -> Face:
            return Face(unpack_columns(whole, *how), whole.scale.new_empty(0)) if values else whole

        if self.own.late is not None or self._side(role) == "b":
            return lambda: in_form(face)
        pending = fetch_parts(_parts(face), *self._rows("a"))
        return lambda: in_form(_arrived(pending, face))

    def with_columns(self, role: Role, operand: Tensor, made: Operand, needed: bool) -> Operand:
        """Return the operand with its columnwise face, if that waits for the halo.

        Args:
            operand: this rank's rows [B, rows, ..., C], as they are.
            made: what they were quantized to.
        """
        if not needed or role != self.own.late:
            return made
        layout, needs = self._rows("a")
        # By all ranks: rows of the halo come as the codes that the rank multiplies, or would multiply, in its product.
        coded = _arrived(self._begun(role, made.row), made.row)
        mine, wanted = layout.mine, needs(layout.rank)
        low = mine.within(wanted)
        before, after = low.start - wanted.start, wanted.end - low.end
        plan = self.wgrad_plan
        settings = plan.input if role == Role.INPUT else plan.grad_output

        def decoded(start: int, rows: int) -> Tensor:
            part = Face(*(t.narrow(1, start, rows).contiguous() for t in coded))
            groups = plan.geometry.groups
            channels = groups, operand.shape[-1] // groups
            return operands.real_rows(part, made.row_amax, settings.e4m3_max, channels).to(operand.dtype)

        pieces = [decoded(0, before if low.size else wanted.size)] if before or not low.size else []
        if low.size:
            pieces.append(operand.narrow(1, low.start - mine.start, low.size))
            pieces += [decoded(before + low.size, after)] if after else []
        slab = torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0].contiguous()
        fold = plan.folds[0 if role == Role.INPUT else 1]
        # Delayed scales are those of whole rows; these columns have a current one, a power of two as well.
        spec = plan.operand_spec(settings, fold, NONE, PACKED)._replace(pow2=settings.pow2)
        seed = self.seed(rounding_seeds.draw_seed(slab)) if spec.stochastic else None
        amax = measure_operand(slab, spec._replace(groups=1), plan.backend)
        reduce_amax(amax, layout.group)
        columns = quantize_operand(slab, spec, plan.compute_dtype, seed, amax, plan.backend, None)
        return made._replace(col=columns.col, col_amax=columns.col_amax)

    def weight_amax(self, w: Tensor) -> Tensor | None:
        """Return None: every rank has the whole weight."""
        return None

    def seed(self, seed: Tensor) -> Tensor:
        """Return another seed on each rank: they hold different rows."""
        # An odd constant with many bits keeps the ranks' seeds far apart; the mask keeps them positive in int64.
        return seed.bitwise_xor(self.layout.rank * 0x2545F4914F6CDD1D & (1 << 62) - 1)

    # ---- results

    def _crop(self, made: Tensor) -> Tensor:
        """Cut this rank's rows of the a side out of what was made of the rows of b."""
        wanted = self.cut.a(self.layout.rank)
        start = self.cut.window.reads(self.cut.b_read(self.layout.rank)).start
        return cropped(made, 1, start, wanted).contiguous()

    def sum_output(self, y: Tensor) -> Tensor:
        """Return this rank's rows of y."""
        return self._crop(y) if self.own.geometry.transposed else y.narrow(1, 0, self.y_shape[1])

    def sum_input_gradient(self, dx: Tensor) -> Tensor:
        """Return this rank's rows of dx."""
        return dx.narrow(1, 0, self.x_shape[1]) if self.own.geometry.transposed else self._crop(dx)

    def whole_bias_gradient(self, total: Tensor) -> Tensor:
        """Return this rank's part: `use` adds the ranks' (shared.py)."""
        return total
