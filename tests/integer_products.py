"""Random layers on the integer backend: every operand and the three products, compared with the reference in bits.

    python -m tests.integer_products --count 40 --seed 1                    prints how many tensors were equal
    python -m tests.integer_products --count 40 --guard after               with tensors that end at a forbidden page
    python -m tests.integer_products --count 40 --library build/some.so     with another build of the kernels

The tests draw cases with hypothesis, and run this file where the kernels need a process of their own: for another
machine's instructions (TE_NVFP4_CV_MACHINE), between forbidden pages, under AddressSanitizer.
"""

from __future__ import annotations

import argparse
import functools
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.backend import native
from te_nvfp4_cv.ops.conv import integer, operators
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.quantize import operand
from te_nvfp4_cv.ops.records import NONE, PACKED, RECORDS, Face, Operand, OperandSpec, WeightCodes, WeightSpec
from tests.guard_pages import SIDES, guarded, put
from tests.helpers import KINDS, make_geometry, same_bits, values

Choose = Callable[[Sequence[Any]], Any]
BATCHES = (1, 2, 5, 16, 17, 32)  # not a multiple of 16: wgrad's images are folded
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 4e6  # multiply-adds of one product: the reference is slow


@dataclass(frozen=True)
class Case:
    """One layer: its shapes, and how its operands are quantized."""

    geometry: ConvGeometry
    dtype: torch.dtype  # of the operands
    two_d: bool = True
    four_over_six: str | None = None
    rht: bool = True
    stochastic: bool = True
    bias: bool = True
    given: bool = False  # amaxes come from outside, as delayed scales do
    kind: str = "normal"
    seed: int = 0
    out: torch.dtype = torch.float32  # of the products


# ---- cases ----------------------------------------------------------------------------------------------------------


def draw_geometry(choose: Choose) -> ConvGeometry:
    """Return a random geometry, small enough for the reference."""
    while True:
        rank, groups = choose((0, 1, 2, 2, 2, 3)), choose((1, 1, 2, 3))
        channels = tuple(groups * choose((1, 3, 16, 17, 20, 32, 37, 48, 64)) for _ in range(2))
        if rank == 0:  # rows take the place of images
            rows = choose((1, 7, 16, 40, 130, 1100))
            return ConvGeometry(rows, *channels, (), (), (), (), (), (), (), groups, False)  # type: ignore[call-arg]
        image = tuple(choose((3, 5, 8, 9, 17, 24)) if rank < 3 else choose((2, 3, 4, 6)) for _ in range(rank))
        if choose((True, True, True, False)):
            kernel, stride = ([choose(sizes) for _ in range(rank)] for sizes in ((1, 2, 3, 3, 5), (1, 1, 2, 3)))
            padding, dilation = ([choose(sizes) for _ in range(rank)] for sizes in ((0, 1, 1, 2), (1, 1, 2)))
        else:  # 1x1 convolutions have code of their own
            kernel, stride, padding, dilation = [1] * rank, [1] * rank, [0] * rank, [1] * rank
        transposed = choose((True, False, False))
        # Output padding is smaller than the stride, or than the dilation.
        extra = tuple(
            choose(tuple(range(max(s, d)))) if transposed else 0 for s, d in zip(stride, dilation, strict=True)
        )
        more = (tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), extra)
        g = make_geometry(choose(BATCHES), channels, image, *more, groups, transposed)  # type: ignore[arg-type]
        if min(g.x_shape) > 0 and min(g.y_shape) > 0 and g.macs <= LARGEST:
            return g


def draw(choose: Choose) -> Case:
    """Return a random case; `choose` picks one of several values, as random.choice does."""
    return Case(
        draw_geometry(choose),
        choose(DTYPES),
        choose((True, False)),
        choose((None, None, "MAE", "MSE")),
        choose((True, True, False)),
        choose((True, False)),
        choose((True, False)),
        choose((True, False, False)),
        choose(KINDS[:4] * 2 + KINDS),
        choose(tuple(range(1000))),
        choose(DTYPES),
    )


# ---- one case on both backends --------------------------------------------------------------------------------------


def records_of(face: Face) -> Tensor:
    """Return packed blocks, data [..., 8] and scale bytes [...], as the records [..., 20] of records.py."""
    codes = formats.decode_e2m1(formats.unpack_nibbles(face.data))
    scale = face.scale.view(torch.float8_e4m3fn).float() / 2
    return torch.cat([(codes * 2 + 12).to(torch.uint8), scale.unsqueeze(-1).contiguous().view(torch.uint8)], -1)


def row_records(face: Face) -> Tensor:
    """Return a packed rowwise face [B, *image, blocks * 8] as records [B, *image, blocks * 20]."""
    blocks = Face(face.data.unflatten(-1, (-1, 8)), face.scale)
    return records_of(blocks).flatten(-2)


def column_records(face: Face) -> Tensor:
    """Return a packed columnwise face [N16, *image, C, 8] as records [*image, N16, C * 20]."""
    return records_of(face).movedim(0, -3).flatten(-2)


class Layer:
    """The operands of a case and its three products, as the reference has them."""

    def __init__(self, case: Case) -> None:
        g = self.g = case.geometry
        self.case = case
        axis0, _, axis1 = g.weight_shape
        shapes = {"x": g.x_shape, "dy": g.y_shape, "w": (axis0, axis1, *g.kernel), "bias": g.y_shape[-1:]}
        # The unusual values are in one operand: two of them would make nearly every sum overflow.
        kinds = dict.fromkeys(shapes, "normal") | {("x", "dy", "w")[case.seed % 3]: case.kind}
        made = {name: values(shape, kinds[name], case.dtype, case.seed) for name, shape in shapes.items()}
        self.x, self.dy, self.w = made["x"], made["dy"], made["w"]
        self.bias = made["bias"] if case.bias else None
        self.alpha, self.seed = torch.tensor([0.37]), torch.tensor([case.seed << 20 | 3])
        self.folds = g.folds[::-1] if g.transposed else g.folds
        self.amax = torch.tensor([2.5, 3.5]) if case.given else None
        self.truth_x, self.truth_dy = (self.operand(name, PACKED, PACKED, "reference") for name in ("x", "dy"))
        self.truth_w = self.weight("reference")
        x, dy, w = self.truth_x, self.truth_dy, self.truth_w
        self.products = {
            "fprop": self.fprop(x.row, w, "reference"),
            "dgrad": self.dgrad(dy.row, w, "reference"),
            "wgrad": self.wgrad(dy.col, x.col, "reference"),
        }

    def operand(self, name: str, row: int, col: int, backend: str) -> Operand:
        """Quantize x or dy into faces of these forms."""
        c, of_x = self.case, name == "x"
        fold, seed = self.folds[0 if of_x else 1], None if of_x or not c.stochastic else self.seed
        error = c.four_over_six if of_x else None
        spec = OperandSpec(self.g.groups, fold, row, col, c.rht, seed is not None, error)
        tensor = self.x if of_x else self.dy
        return operand.quantize_operand(put(tensor), spec, torch.float32, put(seed), put(self.amax), backend)

    def weight(self, backend: str) -> WeightCodes:
        """Quantize w into its faces."""
        spec = WeightSpec(self.g.groups, PACKED, NONE if self.case.two_d else PACKED, self.case.two_d)
        return operand.quantize_weight(put(self.w), spec, torch.float32, backend)

    def fprop(self, x: Face, w: WeightCodes, backend: str) -> Tensor:
        """Multiply x's rowwise face by the face of w that fprop takes."""
        face = w.col if self.g.transposed and not self.case.two_d else w.row
        return operators.conv_fprop(x, face, put(self.alpha), put(self.bias), self.g, self.case.out, backend)

    def dgrad(self, dy: Face, w: WeightCodes, backend: str) -> Tensor:
        """Multiply dy's rowwise face by the face of w that dgrad takes."""
        face = w.row if self.g.transposed or self.case.two_d else w.col
        return operators.conv_dgrad(dy, face, put(self.alpha), self.g, self.case.out, backend)

    def wgrad(self, dy: Face, x: Face, backend: str) -> Tensor:
        """Multiply the columnwise faces."""
        return operators.conv_wgrad(dy, x, put(self.alpha), self.g, self.case.out, backend)

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield the name of each result, the integer backend's, and the reference's."""
        w, x = self.weight("integer"), self.operand("x", RECORDS, PACKED, "integer")
        for kind, ours, truth in (("row", w.row, self.truth_w.row), ("col", w.col, self.truth_w.col)):
            yield f"w {kind}", ours.data, truth.data
            yield f"w {kind} scales", ours.scale, truth.scale
        yield "x rows", x.row.data, row_records(self.truth_x.row)
        yield "x columns", x.col.data, self.truth_x.col.data
        yield "x columns' scales", x.col.scale, self.truth_x.col.scale
        yield "x observed", x.observed, self.truth_x.observed
        yield "fprop", self.fprop(x.row, w, "integer"), self.products["fprop"]
        dy = self.operand("dy", RECORDS, RECORDS, "integer")
        yield "dy rows", dy.row.data, row_records(self.truth_dy.row)
        yield "dy columns", dy.col.data, column_records(self.truth_dy.col)
        yield "dy observed", dy.observed, self.truth_dy.observed
        yield "dgrad", self.dgrad(dy.row, w, "integer"), self.products["dgrad"]
        yield "wgrad", self.wgrad(dy.col, x.col, "integer"), self.products["wgrad"]
        # One face at a time, as inference and frozen weights ask for it; packed codes are expanded to records.
        alone = self.operand("dy", NONE, RECORDS, "integer").col.data
        yield "dy columns alone", alone, column_records(self.truth_dy.col)
        row, col = (self.operand("dy", *forms, "integer") for forms in ((PACKED, NONE), (NONE, PACKED)))
        yield "dy rows, expanded", integer.expand_records(*row.row), row_records(self.truth_dy.row)
        yield "dgrad of codes", self.dgrad(row.row, w, "integer"), self.products["dgrad"]
        yield "wgrad of codes", self.wgrad(col.col, x.col, "integer"), self.products["wgrad"]

    def compare(self, threads: int, around: Callable[[], Any] = nullcontext) -> int:
        """Compare everything with the reference, with this many threads; return how many tensors were equal.

        Args:
            around: makes a context for the run of the integer kernels.
        Raises:
            AssertionError: a tensor differs.
        """
        before, count = torch.get_num_threads(), 0
        torch.set_num_threads(threads)
        try:
            with around():
                for name, ours, truth in self.pairs():
                    assert same_bits(ours, truth), f"{name} differs with {threads} threads: {self.case}"
                    count += 1
        finally:
            torch.set_num_threads(before)
        return count


# ---- a program of its own -------------------------------------------------------------------------------------------


def use_library(path: Path) -> None:
    """Let this process run another build of the kernels."""
    native._build = lambda cxx: path  # type: ignore[assignment]
    native.load.cache_clear()


def fault(guard: str | None) -> None:
    """Let a kernel read one block beside a tensor of one block: what must end the process if such things are seen."""
    with guarded(guard) if guard else nullcontext():
        codes, scale, records = (torch.empty(size, dtype=torch.uint8) for size in (8, 1, 20))
        beside = codes.data_ptr() + (-8 if guard == "before" else 8)
        library = native.load()
        assert library is not None
        library.nvfp4_expand_records(beside, scale.data_ptr(), records.data_ptr(), 1, 1)


def main(arguments: list[str] | None = None) -> int:
    """Run random cases; an error or a difference ends the program."""
    parser = argparse.ArgumentParser(prog="python -m tests.integer_products")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--guard", nargs="+", choices=SIDES, default=[], help="forbid the page on this side of tensors")
    parser.add_argument("--library", type=Path, help="a build of the kernels to use instead")
    parser.add_argument("--fault", action="store_true", help="then read beside a tensor")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # the note that kernels are compiled
    if options.library is not None:
        use_library(options.library)
    library = native.load()
    assert library is not None, "no compiled kernels"
    choose, equal = random.Random(options.seed).choice, 0
    arounds = [functools.partial(guarded, side) for side in options.guard] or [nullcontext]
    for _ in range(options.count):
        layer = Layer(draw(choose))
        equal += sum(layer.compare(threads, around) for around in arounds for threads in options.threads)
    print(f"{equal} tensors equal on {library.nvfp4_machine().decode()}", flush=True)
    if options.fault:
        fault(options.guard[0] if options.guard else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
