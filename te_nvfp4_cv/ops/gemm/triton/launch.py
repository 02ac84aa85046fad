"""Launch the `triton` backend's product of two packed matrices, and choose tiles for every launch of a GEMM kernel.

A tile is BM x BN outputs, BK contracted elements a step. Tables hold one list of tiles per kind of GPU, the largest
first. The first tile that the problem fills is taken and cut down to the problem. The key of a problem is: FP4 tensor
cores or not, log2 of the outputs along either side, log2 of the contraction. A tile changes the order of accumulation
and nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from te_nvfp4_cv.backend import dispatch, tuning
from te_nvfp4_cv.backend.devices import on_its_device
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.ops.gemm.triton import kernels

WIDE_FROM = 2**31  # elements from which 32-bit offsets do not reach
Tile = tuple[int, int, int, int, int]  # BM, BN, BK, num_warps, num_stages
Key = tuple[int, ...]


@dataclass(frozen=True)
class Gpu:
    """The properties of a device that a launch depends on.

    Args:
        arch: the architecture whose tiles it takes; 0 for the interpreter.
        native: it has FP4 tensor cores.
        processors: how many multiprocessors it has.
    """

    arch: int
    native: bool
    processors: int

    @property
    def quads(self) -> bool:
        """Tell if decoded operands take the order of decode.quad_place: where wgmma reads one from registers."""
        return self.arch == 90

    @property
    def how(self) -> dict[str, bool]:
        """The arguments of a product's kernel: how it multiplies. PTX: it may hold inline assembly."""
        return dict(NATIVE=self.native, QUADS=self.quads, PTX=self.arch > 0)


def gpu_of(device: torch.device) -> Gpu:
    """Describe the device as a Gpu; a CPU is the interpreter."""
    if device.type != "cuda":
        return Gpu(0, False, 2)
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.lru_cache(maxsize=64)
def _gpu(index: int) -> Gpu:
    device = torch.device("cuda", index)
    native = dispatch.native_fp4(device)
    arch = arch_of(torch.cuda.get_device_capability(device), native)
    return Gpu(arch, native, torch.cuda.get_device_properties(device).multi_processor_count)


def arch_of(capability: tuple[int, int], native: bool) -> int:
    """Return the architecture whose tiles a compute capability takes.

    Tiles of 80 fit the 99 KB of shared memory that every GPU from 8.0 on has, and need nothing but mma.sync and
    inline integer PTX: they serve what has neither wgmma nor FP4 tensor cores that the compiler knows.
    """
    if native:
        return 100 if capability[0] == 10 else 120
    return 90 if capability[0] == 9 else 80


def key_of(gpu: Gpu, rows: int, columns: int, depth: int) -> Key:
    """Return the key of a product of [rows, depth] and [columns, depth]."""
    return (int(gpu.native), *(tuning.bucket(size) for size in (rows, columns, depth)))


def fitted(tile: Tile, key: Key) -> tuning.Config:
    """Cut a tile down to the problem.

    FP4 tensor cores take BM 128 and BK from 64 on; others take BM from 64 (wgmma), BN and BK from 32 on. Small tiles
    take four warps, where those have the registers for it.
    """
    native, *sizes = key[:4]
    least = (128, 32, 64) if native else (64, 32, 32)
    BM, BN, BK = (min(n, max(low, 1 << size)) for n, size, low in zip(tile[:3], sizes, least, strict=True))
    warps = min(tile[3], 4) if BM * BN <= 128 * 64 and not native else tile[3]
    return {"BM": BM, "BN": BN, "BK": BK, "num_warps": warps, "num_stages": tile[4]}


def rule_of(*tiles: Tile) -> Callable[[Key], tuning.Config]:
    """Make a rule that picks the first tile which the problem fills along BN and BK, or the last tile."""

    def rule(key: Key) -> tuning.Config:
        columns, depth = 1 << key[2], 1 << key[3]
        filled = (tile for tile in tiles if tile[1] <= columns and tile[2] <= depth)
        return fitted(next(filled, tiles[-1]), key)

    return rule


def candidates_of(native: Sequence[Tile], other: Sequence[Tile]) -> Callable[[Key], list[tuning.Config]]:
    """Make a function that lists the tiles which a search may try for a key, each once."""

    def candidates(key: Key) -> list[tuning.Config]:
        found: list[tuning.Config] = []
        for tile in native if key[0] else other:
            cut = fitted(tile, key)
            found += [] if cut in found else [cut]
        return found

    return candidates


# Four warps where eight would leave a thread less than four scale bytes: cp.async takes no fewer, and a plain load
# waits in every step.
NATIVE_TILES: tuple[Tile, ...] = (
    (128, 128, 128, 8, 3),
    (128, 128, 256, 8, 3),
    (128, 128, 256, 4, 3),
    (128, 256, 256, 8, 3),
    (128, 64, 256, 8, 4),
)
OTHER_TILES: tuple[Tile, ...] = (
    (128, 128, 64, 8, 3),
    (128, 128, 64, 4, 3),
    (128, 128, 128, 8, 3),
    (128, 256, 128, 8, 3),
    (128, 64, 128, 8, 3),
    (64, 64, 128, 4, 3),
)
TWO_PACKED: dict[int, tuning.Rule] = {  # both operands are decoded, or both are multiplied as they are
    80: rule_of((128, 128, 64, 4, 3), (64, 64, 128, 4, 3)),
    90: rule_of((128, 256, 128, 8, 3), (128, 128, 128, 8, 3), (64, 64, 128, 4, 3)),
    100: rule_of((128, 256, 256, 8, 3), (128, 128, 256, 8, 3), (128, 64, 256, 8, 3)),
    120: rule_of((128, 128, 128, 8, 3), (128, 64, 256, 8, 3)),
}
tuning.register("gemm", {0: rule_of((256, 256, 256, 4, 1)), **TWO_PACKED}, candidates_of(NATIVE_TILES, OTHER_TILES))


def unit_of(blocks: int) -> int:
    """Return the largest power of two, at most 16, that divides a row's blocks: the rows' alignment."""
    # Kernels multiply it into offsets as a constant, and the compiler sees from it how wide a load may be.
    return math.gcd(blocks, 16)


@on_its_device
def multiply(a_data: Tensor, a_scale: Tensor, b_data: Tensor, b_scale: Tensor) -> Tensor:
    """Return the sums of products of code * scale, fp32 [I, J]; the arguments are those of reference.multiply."""
    rows, columns, blocks = a_data.shape[0], b_data.shape[0], a_scale.shape[-1]
    out = torch.empty((rows, columns), dtype=torch.float32, device=a_data.device)
    if not out.numel():  # CUDA refuses an empty grid
        return out
    gpu = gpu_of(a_data.device)
    unit = unit_of(blocks)
    # Scales as bytes: kernels decode them by integer operations, and GPUs before sm_89 know no fp8.
    operands = [t.contiguous().view(torch.uint8) for t in (a_data, a_scale, b_data, b_scale)]

    def run(tile: tuning.Config) -> None:
        kernels.packed_product[(triton.cdiv(rows, tile["BM"]) * triton.cdiv(columns, tile["BN"]),)](
            *operands,
            out,
            rows,
            columns,
            blocks // unit,
            UNIT=unit,
            FULL=blocks * BLOCK % tile["BK"] == 0,
            WIDE=max(a_data.numel(), b_data.numel()) >= WIDE_FROM,
            **gpu.how,
            **tile,
        )

    run(tuning.config("gemm", gpu.arch, key_of(gpu, rows, columns, blocks * BLOCK), run))
    return out
