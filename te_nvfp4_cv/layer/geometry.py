"""layer.geometry."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from te_nvfp4_cv.errors import describe, value_error
from te_nvfp4_cv.ops.geometry import ConvGeometry, int_tuple, output_size, transposed_output_size


class Shaped(Protocol):
    """A weight, or what stands for one that is kept otherwise: only its shape is read."""

    @property
    def shape(self) -> torch.Size: ...

    def dim(self) -> int: ...


def geometry_of(
    op: str,
    x: Tensor,
    w: Shaped,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    output_padding: Any,
) -> tuple[Tensor, ConvGeometry, bool]:
    """(x with a batch axis and what padding="same" adds on one side, the call's geometry, whether x had no batch axis).

    Raises:
        ValueError: shapes that do not fit.
    """
    rank = w.dim() - 2
    _check_shapes(op, x, w, bias, rank, groups)
    unbatched = rank > 0 and x.dim() == rank + 1
    if unbatched:
        x = x.unsqueeze(0)
    if isinstance(padding, str):
        x, padding = _named_padding(op, x, w, stride, padding, dilation)
    return x, _geometry(op, x, w, stride, padding, dilation, groups, output_padding), unbatched


def _check_shapes(op: str, x: Tensor, w: Shaped, bias: Tensor | None, rank: int, groups: int) -> None:
    expected = 0 if op == "linear" else int(op[-2])
    if rank != expected or (rank and x.dim() not in (rank + 1, rank + 2)) or x.dim() < 1:
        needs = (
            "x [..., C] and weight [O, C]"
            if op == "linear"
            else f"x [B, C, {expected} image axes] and weight [., ., {expected} kernel axes]"
        )
        raise value_error(
            f"nvfp4 {op}: wrong rank.",
            got=f"x {describe(x)}, weight {describe(w)}",
            needs=needs,
            fix="reshape the input",
        )
    transposed = "transpose" in op
    channels = x.shape[-1] if rank == 0 else x.shape[x.dim() - rank - 1]
    wanted = w.shape[0] if transposed else w.shape[1] * groups
    if channels != wanted or groups < 1 or w.shape[0] % groups:
        raise value_error(
            f"nvfp4 {op}: channels do not match.",
            got=f"x {describe(x)}, weight {describe(w)}, groups={groups}: input has {channels} channels",
            needs=f"{wanted} input channels, and groups that divide the weight's first axis",
            fix="check the layer before this one",
        )
    out = w.shape[1] * groups if transposed else w.shape[0]
    if bias is not None and tuple(bias.shape) != (out,):
        raise value_error(
            f"nvfp4 {op}: bias does not match.",
            got=f"bias {describe(bias)}",
            needs=f"({out},)",
            fix="one bias per output channel",
        )
    if bias is not None and bias.device != x.device:
        raise value_error(
            f"nvfp4 {op}: bias is on another device.",
            got=f"x on {x.device}, bias on {bias.device}",
            needs="one device",
            fix="bias.to(x.device), or model.to(device)",
        )


def _geometry(
    op: str, x: Tensor, w: Shaped, stride: Any, padding: Any, dilation: Any, groups: int, output_padding: Any
) -> ConvGeometry:
    rank, transposed = w.dim() - 2, "transpose" in op
    stride, dilation = int_tuple(stride, rank, op, "stride", 1), int_tuple(dilation, rank, op, "dilation", 1)
    padding, extra = (
        int_tuple(padding, rank, op, "padding", 0),
        int_tuple(output_padding, rank, op, "output_padding", 0),
    )
    kernel = tuple(w.shape[2:])
    if rank == 0:
        batch = x.numel() // max(x.shape[-1], 1)
        size: tuple[int, ...] = ()
        out: tuple[int, ...] = ()
    else:
        batch, size = x.shape[0], tuple(x.shape[2:])
        rows = list(zip(size, kernel, stride, padding, dilation, strict=True))
        if transposed:
            out = tuple(transposed_output_size(*row, more) for row, more in zip(rows, extra, strict=True))
        else:
            out = tuple(output_size(*row) for row in rows)
        if min(out) < 0 or (min(out) == 0 and min(size) > 0 and not transposed):
            raise value_error(
                f"nvfp4 {op}: the output would be empty.",
                got=f"x {describe(x)}, kernel {kernel}, padding {padding}, dilation {dilation}",
                needs="an image at least as large as the dilated kernel, padding included",
                fix="pad the input or use a smaller kernel",
            )
        if any(more >= max(s, d) for more, s, d in zip(extra, stride, dilation, strict=True) if more):
            raise value_error(
                f"nvfp4 {op}: bad output_padding.",
                got=str(extra),
                needs="less than stride or dilation",
                fix="check output_padding",
            )
    if transposed:
        return ConvGeometry(
            batch, w.shape[1] * groups, w.shape[0], out, size, kernel, stride, padding, dilation, extra, groups, True
        )
    return ConvGeometry(
        batch, w.shape[1] * groups, w.shape[0], size, out, kernel, stride, padding, dilation, extra, groups, False
    )


def _named_padding(
    op: str, x: Tensor, w: Shaped, stride: Any, padding: str, dilation: Any
) -> tuple[Tensor, tuple[int, ...]]:
    """padding="same" / "valid" as numbers; a side that needs one more than the other is padded here."""
    rank = w.dim() - 2
    if padding == "valid":
        return x, (0,) * rank
    if padding != "same" or any(s != 1 for s in int_tuple(stride, rank, op, "stride", 1)):
        raise value_error(
            f"nvfp4 {op}: bad padding.",
            got=f"padding={padding!r}, stride={stride}",
            needs='"valid", or "same" with stride 1',
            fix="give numbers",
        )
    totals = [d * (k - 1) for d, k in zip(int_tuple(dilation, rank, op, "dilation", 1), w.shape[2:], strict=True)]
    if any(total % 2 for total in totals):
        x = F.pad(x, [n for total in reversed(totals) for n in (0, total % 2)])
    return x, tuple(total // 2 for total in totals)
