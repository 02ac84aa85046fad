"""Quantize the operands of a grouped linear layer: each expert's rows as an operand of their own.

    quantize_operand   x or dy [T, C]: a rowwise face of all rows, a columnwise one whose blocks end with each expert
    measure_operand    the two amaxes that it would use

Rows are quantized where they lie: an expert's are a part of x, and the faces of all experts are parts of one face.
Experts have one amax together, that of all their rows, or with experts.own_scales each its own, and amaxes are then
[E]. Stochastic rounding of expert e uses the seed of the call plus e; the Triton kernels, which write the faces of all
experts at once, use one seed. Rows that belong to nobody are not read, but for what kernels with given amaxes observe.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.backend import dispatch, native
from te_nvfp4_cv.formats import BLOCK
from te_nvfp4_cv.ops import layouts
from te_nvfp4_cv.ops.experts import Experts, Rows
from te_nvfp4_cv.ops.quantize import cpu, reference
from te_nvfp4_cv.ops.quantize.amax import collect
from te_nvfp4_cv.ops.records import Collector, Fold, Operand, OperandSpec


def _kernels(backend: str, device: torch.device) -> Any:
    """Return the module that launches Triton kernels, or None where another one serves the backend."""
    if dispatch.kernels_quantize(backend, device):
        from te_nvfp4_cv.ops.quantize.triton import launch

        return launch
    return None


def quantize_operand(
    x: Tensor,
    experts: Experts,
    spec: OperandSpec,
    dtype: torch.dtype,
    seed: Tensor | None,
    amax: Tensor | None,
    backend: str,
    collector: Collector | None = None,
) -> Operand:
    """Quantize as operand.quantize_operand does, expert by expert; `x` and the faces are those of all experts.

    Args:
        spec: of the whole operand, with room for as many blocks as the experts may need.
    Returns:
        The faces. Blocks of the columnwise face that no expert has are not written, or zeros.
    """
    if not dispatch.runs_directly(x):
        return _shapes(x, experts, spec, dtype)
    kernels = _kernels(backend, x.device)
    if kernels is not None and not experts.own_scales:
        found: Operand = kernels.quantize_operand(x, spec, dtype, seed, amax, collector, experts.source_rows)
        return found
    module = kernels or (reference if backend == "reference" else cpu)
    if module is cpu and not experts.own_scales and _at_once(x, experts):
        faces = layouts.operand_faces(x, spec, dtype, layouts.for_one_call)
        whole = cpu.quantize_operand(x, _together(spec, experts), dtype, seed, amax, faces, experts=experts)
        if collector is not None:
            collect(collector, whole.observed)
        return whole._replace(observed=x.new_empty(0, dtype=torch.float32))
    own = None
    if amax is None and not experts.own_scales:
        own = amax = measure_operand(x, experts, spec, backend)
    row, col = layouts.operand_faces(x, spec, dtype, layouts.for_one_call)
    size = experts.number if experts.own_scales else 1
    used = torch.zeros(2, size, dtype=torch.float32, device=x.device)
    if amax is not None:
        used += (formats.power_of_two_amax(amax, spec.e4m3_max) if spec.pow2 else amax).unsqueeze(1)
    for rows in experts.rows:
        mine = cpu.part_of((row, col), rows, spec)
        how, key = _alone(spec, rows), None if seed is None else seed + rows.expert
        more = (mine, own is None) if module is cpu else ()
        made = module.quantize_operand(x[rows.here], how, dtype, key, amax, *more)
        for target, part in zip((*mine[0], *mine[1]), (*made.row, *made.col), strict=True):
            if part.numel() and part.data_ptr() != target.data_ptr():
                target.copy_(part)
        if experts.own_scales:
            used[0, rows.expert], used[1, rows.expert] = made.row_amax[0], made.col_amax[0]
        elif own is None:  # NaN of one expert's rows must reach all
            used = torch.maximum(used, torch.cat((made.row_amax, made.col_amax)).unsqueeze(1))
        if collector is not None:
            collect(collector, made.observed)
    return Operand(row, used[0].clone(), col, used[1].clone(), x.new_empty(0, dtype=torch.float32))


def _shapes(x: Tensor, experts: Experts, spec: OperandSpec, dtype: torch.dtype) -> Operand:
    """Return the operand without values, while an operator that has grouped layers inside is traced."""
    row, col = layouts.operand_faces(x, spec, dtype)
    row_amax, col_amax = (
        x.new_empty(experts.number if experts.own_scales else 1, dtype=torch.float32) for _ in range(2)
    )
    return Operand(row, row_amax, col, col_amax, x.new_empty(0, dtype=torch.float32))


def measure_operand(x: Tensor, experts: Experts, spec: OperandSpec, backend: str) -> Tensor:
    """Return fp32 [2]: the amax of all experts' rows, and that of their columnwise faces."""
    kernels = _kernels(backend, x.device)
    if kernels is not None:
        measured: Tensor = kernels.measure_operand(x, spec, experts.source_rows)
        return measured
    module = reference if backend == "reference" else cpu
    if module is cpu and _at_once(x, experts):
        return cpu.measure_operand(x, _together(spec, experts), experts)
    found = [module.measure_operand(x[rows.here], _alone(spec, rows)) for rows in experts.rows]
    return torch.stack(found).amax(0) if found else torch.zeros(2, dtype=torch.float32, device=x.device)


def _at_once(x: Tensor, experts: Experts) -> bool:
    """Return True if the compiled kernels can take all experts' rows in one call: each row of x is some expert's."""
    return native.available(x.device) and x.shape[0] > 0 and experts.end == x.shape[0]


def _together(spec: OperandSpec, experts: Experts) -> OperandSpec:
    """Return how the rows of all experts are quantized in one call."""
    return spec._replace(fold=Fold(1, 0, 1, 0, experts.rows[-1].last * BLOCK))


def _alone(spec: OperandSpec, rows: Rows) -> OperandSpec:
    """Return how one expert's rows are quantized: by themselves, padded to whole blocks."""
    return spec._replace(fold=Fold(1, 0, 1, 0, (rows.last - rows.block) * BLOCK))
