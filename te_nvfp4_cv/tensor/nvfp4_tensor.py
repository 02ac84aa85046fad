"""NVFP4Tensor: a tensor whose values are NVFP4 codes and scales, in one face or two.

The logical shape is [..., K]. M is the product of the leading dimensions, Mp and Kp are M and K rounded up to 16:

    rowwise_data    uint8 [..., Kp/2]  rowwise_scale_inv    e4m3 [M, Kp/16]  amax_rowwise    fp32 [1], [M] row-scaled
    columnwise_data uint8 [K, Mp/2]    columnwise_scale_inv e4m3 [K, Mp/16]  amax_columnwise fp32 [1], [K] row-scaled

Layout "ntile" of a convolution operand [H, W, B, C] has columnwise data [B/16, H, W, C, 8], scales [B/16, H, W, C].
Scales are compact; swizzled_scale_inv gives the padded, swizzled order of the FP4 tensor cores.

An NVFP4Tensor behaves as a torch.Tensor of its nominal dtype. Views of the leading dimensions, detach, clone, to,
copy_, zero_, pickling, torch.save and deepcopy act on the codes. Every other operator sees dequantized values, and an
in-place one quantizes its result again with the quantizer that the tensor holds; so do `t[index] = v` and `t.data = v`.
Slices, transposes and other views are copies: what is written to them does not reach the tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv import errors, formats
from te_nvfp4_cv.backend.torch_private import wrapper_subclass
from te_nvfp4_cv.formats import BLOCK, E4M3_MAX
from te_nvfp4_cv.tensor import layouts, torch_operators
from te_nvfp4_cv.tensor.torch_operators import BUFFERS, SETTINGS


class NVFP4Tensor(torch.Tensor):
    """A tensor in NVFP4; an NVFP4Quantizer makes it, `quantizer(x)`.

    Args:
        shape: logical shape [..., K].
        dtype: nominal dtype, which dequantize returns.
        rowwise_data: with rowwise_scale_inv and amax_rowwise, or all three None; the same for columnwise.
        quantizer: quantizes again after an in-place operator; the tensor holds a copy.
        columnwise_rht: the columnwise face holds rotated values (with_random_sign_mask: with the fixed signs).
        columnwise_layout: "te" or "ntile".
    Raises:
        ValueError: no face at all, or one that is not complete.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> t = nv.NVFP4Quantizer(columnwise=False)(torch.ones(4, 32))
        >>> isinstance(t, nv.NVFP4Tensor), t.rowwise_data.shape, t.rowwise_scale_inv.shape
        (True, torch.Size([4, 16]), torch.Size([4, 2]))
        >>> bool((t.dequantize() == 1).all())
        True
    """

    # All operators are met in __torch_dispatch__; the default would also turn plain results into this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _rowwise_data: Tensor | None
    _rowwise_scale_inv: Tensor | None
    _columnwise_data: Tensor | None
    _columnwise_scale_inv: Tensor | None
    _amax_rowwise: Tensor | None
    _amax_columnwise: Tensor | None
    _quantizer: Any
    _row_scaled_nvfp4: bool
    _nvfp4_use_4over6: bool
    _nvfp4_e4m3_max: int
    _columnwise_rht: bool
    _with_random_sign_mask: bool
    _columnwise_layout: str

    @staticmethod
    def __new__(
        cls,
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        rowwise_data: Tensor | None = None,
        rowwise_scale_inv: Tensor | None = None,
        columnwise_data: Tensor | None = None,
        columnwise_scale_inv: Tensor | None = None,
        amax_rowwise: Tensor | None = None,
        amax_columnwise: Tensor | None = None,
        quantizer: Any = None,
        row_scaled_nvfp4: bool = False,
        nvfp4_use_4over6: bool = False,
        nvfp4_e4m3_max: int = E4M3_MAX,
        columnwise_rht: bool = False,
        with_random_sign_mask: bool = True,
        columnwise_layout: str = "te",
        requires_grad: bool = False,
    ) -> NVFP4Tensor:
        row = (rowwise_data, rowwise_scale_inv, amax_rowwise)
        col = (columnwise_data, columnwise_scale_inv, amax_columnwise)
        for name, face in (("rowwise", row), ("columnwise", col)):
            if any(part is None for part in face) and not all(part is None for part in face):
                raise errors.value_error(
                    f"NVFP4Tensor: the {name} face is not complete.",
                    got=", ".join(f"{errors.describe(part)}" for part in face),
                    needs=f"{name}_data, {name}_scale_inv and amax_{name} together, or none of them",
                    fix="make the tensor with an NVFP4Quantizer",
                )
        data = rowwise_data if rowwise_data is not None else columnwise_data
        if data is None or columnwise_layout not in ("te", "ntile"):
            raise errors.value_error(
                "NVFP4Tensor: no data, or an unknown layout of it.",
                got=f"no face, or columnwise_layout={columnwise_layout!r}",
                needs="a rowwise or a columnwise face, layout 'te' or 'ntile'",
                fix="make the tensor with an NVFP4Quantizer with rowwise=True or columnwise=True",
            )
        # A shape and a dtype without memory: the buffers below are all that is stored.
        self = wrapper_subclass(cls, tuple(shape), dtype=dtype, device=data.device, requires_grad=requires_grad)
        self._rowwise_data, self._rowwise_scale_inv, self._amax_rowwise = row
        self._columnwise_data, self._columnwise_scale_inv, self._amax_columnwise = col
        # A copy: later changes of the caller's quantizer must not change what an in-place operator does here.
        self._quantizer = quantizer.copy() if quantizer is not None else None
        self._row_scaled_nvfp4 = row_scaled_nvfp4
        self._nvfp4_use_4over6 = nvfp4_use_4over6
        self._nvfp4_e4m3_max = nvfp4_e4m3_max
        self._columnwise_rht = columnwise_rht
        self._with_random_sign_mask = with_random_sign_mask
        self._columnwise_layout = columnwise_layout
        return self

    # ---- what it holds ----------------------------------------------------------------------------------------------

    rowwise_data = property(lambda self: self._rowwise_data, doc="uint8 [..., Kp/2] or None")
    rowwise_scale_inv = property(lambda self: self._rowwise_scale_inv, doc="float8_e4m3fn [M, Kp/16] or None")
    columnwise_data = property(lambda self: self._columnwise_data, doc="uint8 [K, Mp/2] or tiles, or None")
    columnwise_scale_inv = property(lambda self: self._columnwise_scale_inv, doc="float8_e4m3fn [K, Mp/16] or None")
    amax_rowwise = property(lambda self: self._amax_rowwise, doc="fp32 [1], or [M] when row-scaled, or None")
    amax_columnwise = property(lambda self: self._amax_columnwise, doc="fp32 [1] as quantized (after RHT), or None")
    quantizer = property(lambda self: self._quantizer, doc="the quantizer that in-place operators use, or None")
    row_scaled = property(lambda self: self._row_scaled_nvfp4, doc="one amax per row instead of per tensor")
    four_over_six = property(lambda self: self._nvfp4_use_4over6, doc="block scales chosen by 4over6")
    e4m3_max = property(lambda self: self._nvfp4_e4m3_max, doc="448 or 256")
    columnwise_rht = property(lambda self: self._columnwise_rht, doc="the columnwise face is rotated")
    columnwise_layout = property(lambda self: self._columnwise_layout, doc="'te' or 'ntile'")

    def get_usages(self) -> dict[str, bool]:
        """Tell which faces are there."""
        return {"rowwise": self._rowwise_data is not None, "columnwise": self._columnwise_data is not None}

    def get_metadata(self) -> dict[str, Any]:
        """Return the keyword arguments that build this tensor again, sharing its buffers."""
        named = {name.lstrip("_"): getattr(self, name) for name in BUFFERS + SETTINGS}
        return {"shape": tuple(self.shape), "dtype": self.dtype, **named}

    def make_like(self, **changes: Any) -> NVFP4Tensor:
        """Make a tensor with the same buffers and settings but for `changes`, keyword arguments of the constructor."""
        return NVFP4Tensor(**{**self.get_metadata(), **changes})

    def columnwise_te(self) -> tuple[Tensor, Tensor]:
        """Return columnwise data [K, Mp/2] and scale_inv [K, Mp/16], converted if the tensor holds tiles."""
        data, scale, _ = face_of(self, "columnwise")
        return data, scale

    def to_columnwise_layout(self, layout: str) -> NVFP4Tensor:
        """Return this tensor with its columnwise face in layout "te" or "ntile"; "ntile" needs the shape [*S, B, C]."""
        if layout == self._columnwise_layout:
            return self
        data, scale = self.columnwise_te()
        if layout == "ntile":
            if self.dim() < 3 or self.shape[-2] % BLOCK:
                raise errors.value_error(
                    "NVFP4Tensor: this shape has no 'ntile' layout.",
                    got=f"shape {tuple(self.shape)}",
                    needs="a convolution operand [*spatial, B, C] with B a multiple of 16",
                    fix="view the leading dimension as [H, W, B], or stay in layout 'te'",
                )
            data, scale = layouts.te_to_ntile(data, scale, tuple(self.shape[:-2]), self.shape[-2])
        return self.make_like(columnwise_data=data, columnwise_scale_inv=scale, columnwise_layout=layout)

    def swizzled_scale_inv(self, face: str = "rowwise") -> Tensor:
        """Return the scales of a face, zero-padded to 128 x 4 and swizzled for the FP4 tensor cores."""
        self._need(face)
        _, scale, _ = face_of(self, face)
        return layouts.swizzle_scales(layouts.pad_scales(scale))

    def update_usage(self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None) -> None:
        """Drop a face (False), or make sure of it (True): columnwise can be made from rowwise with 16x16 scales."""
        keep = {"rowwise": rowwise_usage is not False, "columnwise": columnwise_usage is not False}
        # Asked before anything is dropped, so that an error leaves the tensor as it was.
        if not any(keep[face] and there for face, there in self.get_usages().items()) and not columnwise_usage:
            self._need("columnwise" if keep["columnwise"] else "rowwise" if keep["rowwise"] else "one remaining")
        if columnwise_usage and self._columnwise_data is None and self._is_2d():
            data, scale, amax = face_of(self, "rowwise")
            rows = data.reshape(scale.shape[0], data.shape[-1])
            self._columnwise_data, self._columnwise_scale_inv = formats.transpose_tiles(rows, scale, self.shape[-1])
            # A clone, because quantize_ writes the amax of each face in place.
            self._amax_columnwise, self._columnwise_layout = amax.clone(), "te"
        for face, usage in (("rowwise", rowwise_usage), ("columnwise", columnwise_usage)):
            if usage:
                self._need(face)
        if not keep["rowwise"]:
            self._rowwise_data = self._rowwise_scale_inv = self._amax_rowwise = None
        if not keep["columnwise"]:
            self._columnwise_data = self._columnwise_scale_inv = self._amax_columnwise = None

    def _is_2d(self) -> bool:
        return self._rowwise_data is not None and torch_operators.has_tiles(self)

    def _need(self, face: str) -> None:
        """Refuse to go on without `face`.

        Raises:
            ValueError: the face is not there.
        """
        if not self.get_usages().get(face, False):
            there = [name for name, held in self.get_usages().items() if held]
            raise errors.value_error(
                f"NVFP4Tensor: the {face} face is needed and is not there.",
                got=f"{tuple(self.shape)} with {' and '.join(there)} data only",
                needs=f"the {face} face",
                fix=f"quantize with {face}=True; only 16x16-scaled tensors can make columnwise from rowwise data",
            )

    # ---- values -----------------------------------------------------------------------------------------------------

    def dequantize(
        self, dtype: torch.dtype | None = None, face: str | None = None, undo_rht: bool | None = None
    ) -> Tensor:
        """Return the values of the logical shape; differentiable as the identity.

        Args:
            dtype: of the values; the nominal dtype by default.
            face: "rowwise" or "columnwise". If None, rowwise where it is there, else columnwise with its RHT undone.
            undo_rht: rotate the columnwise face back. By default only with face=None: with face="columnwise" the values
                stay rotated, 16 rows at a time, as the wgrad GEMM sees them.
        """
        if torch.is_grad_enabled() and self.requires_grad:
            return _Dequantize.apply(self, dtype, face, undo_rht)
        return self._dequantize(dtype, face, undo_rht)

    def _dequantize(
        self, dtype: torch.dtype | None = None, face: str | None = None, undo_rht: bool | None = None
    ) -> Tensor:
        undo_rht = face is None if undo_rht is None else undo_rht
        if face is None:
            face = "rowwise" if self._rowwise_data is not None else "columnwise"
        self._need(face)
        data, scale, amax = face_of(self, face)
        M, K = self.shape[:-1].numel(), self.shape[-1]
        if face == "rowwise":
            # The zeros with which K was padded are cut off, and below those of M.
            v_MK = formats.dequantize(data.reshape(M, data.shape[-1]), scale, amax, self._nvfp4_e4m3_max)[:, :K]
        else:
            v_KM = formats.dequantize(data, scale, amax, self._nvfp4_e4m3_max)
            if self._columnwise_rht and undo_rht:
                # Before M is cut: to rotate a block back, all of its 16 values are needed.
                v_KM = formats.inverse_rht16(formats.blocks(v_KM), self._with_random_sign_mask).flatten(-2)
            v_MK = v_KM[:, :M].t()
        return v_MK.to(dtype or self.dtype).reshape(self.shape)

    def quantize_(self, src: Tensor, noop_flag: Tensor | None = None) -> NVFP4Tensor:
        """Quantize `src` into this tensor's buffers, in place. Where the tensor noop_flag is 1, all stays as it is."""
        if self._quantizer is None:
            raise torch_operators.without_quantizer("an in-place operator on a tensor without a quantizer")
        self._quantizer.update_quantized(src, self, noop_flag=noop_flag)
        return self

    # Three methods, because the operator behind them (_to_copy) changes the nominal dtype only and moves the codes.
    def float(self, memory_format: Any = None) -> Tensor:
        """Return the values in fp32."""
        return self.dequantize(torch.float32)

    def bfloat16(self, memory_format: Any = None) -> Tensor:
        """Return the values in bf16."""
        return self.dequantize(torch.bfloat16)

    def half(self, memory_format: Any = None) -> Tensor:
        """Return the values in fp16."""
        return self.dequantize(torch.float16)

    # What torch would do without asking __torch_dispatch__.
    data = property(torch_operators.data, torch_operators.set_data)
    __setitem__ = torch_operators.set_item
    apply_ = torch_operators.apply_  # type: ignore[assignment]
    share_memory_ = torch_operators.share_memory_
    is_shared = torch_operators.is_shared
    __dlpack__ = torch_operators.dlpack

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        faces = "+".join(name for name, held in self.get_usages().items() if held)
        flags = [f"{self._columnwise_layout}"] if self._columnwise_data is not None else []
        flags += ["rht"] if self._columnwise_rht and self._columnwise_data is not None else []
        flags += ["row_scaled"] if self._row_scaled_nvfp4 else []
        flags += [f"4over6 E={self._nvfp4_e4m3_max}"] if self._nvfp4_use_4over6 else []
        grad = ", requires_grad=True" if self.requires_grad else ""
        extra = f", {', '.join(flags)}" if flags else ""
        return f"NVFP4Tensor({tuple(self.shape)}, {self.dtype}, {faces}{extra}, device='{self.device}'{grad})"

    # ---- copies and files -------------------------------------------------------------------------------------------

    def map_buffers(self, function: Callable[[Tensor], Tensor], **changes: Any) -> NVFP4Tensor:
        """Make a tensor of the same settings whose buffers are function(buffer)."""
        return self.make_like(**{n.lstrip("_"): function(b) for n, b in self._buffers().items()}, **changes)

    def _buffers(self) -> dict[str, Tensor]:
        """Return the buffers that are there, by attribute."""
        return {name: buffer for name in BUFFERS if (buffer := getattr(self, name)) is not None}

    def __deepcopy__(self, memo: dict[int, Any]) -> NVFP4Tensor:
        if id(self) in memo:
            return memo[id(self)]
        new = self.map_buffers(torch.clone, requires_grad=self.requires_grad)
        if getattr(self, "_is_param", False):  # by this mark nn.Module sees a tensor subclass as a Parameter
            new._is_param = True
        if self.grad is not None:
            new.grad = copy.deepcopy(self.grad, memo)
        memo[id(self)] = new
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {**self.get_metadata(), "requires_grad": self.requires_grad}
        for name in ("rowwise_scale_inv", "columnwise_scale_inv"):  # plain pickle cannot read float8 storages
            state[name] = None if state[name] is None else state[name].view(torch.uint8)
        return _rebuild_nvfp4_tensor, (state, bool(getattr(self, "_is_param", False)))

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        names = list(self._buffers())  # torch.compile traces these as inputs
        settings = {name.lstrip("_"): getattr(self, name) for name in SETTINGS}
        return names, {"dtype": self.dtype, "requires_grad": self.requires_grad, **settings}

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], meta: dict[str, Any], outer_size: Any, outer_stride: Any
    ) -> NVFP4Tensor:
        buffers: dict[str, Any] = {name.lstrip("_"): t for name, t in inner.items()}
        return NVFP4Tensor(shape=outer_size, **buffers, **meta)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return torch_operators.dispatch(cls, func, args, kwargs or {})


def face_of(t: NVFP4Tensor, face: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return data, scale_inv and amax of the rowwise or the columnwise face, the latter in layout "te".

    It is a function of attributes: torch.compile takes methods of a tensor subclass for operators.

    Raises:
        ValueError: the face is not there.
    """
    data, scale, amax = getattr(t, f"_{face}_data"), getattr(t, f"_{face}_scale_inv"), getattr(t, f"_amax_{face}")
    if data is None:
        t._need(face)
    if face == "columnwise" and t._columnwise_layout == "ntile":
        data, scale = layouts.ntile_to_te(data, scale)
    return data, scale, amax


class _Dequantize(torch.autograd.Function):
    """Dequantization with the identity as its gradient."""

    @staticmethod
    def forward(ctx: Any, t: NVFP4Tensor, dtype: torch.dtype | None, face: str | None, undo_rht: bool | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.dtype = t.dtype
        return t._dequantize(dtype, face, undo_rht)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        return None if grad is None else grad.to(ctx.dtype), None, None, None


def _rebuild_nvfp4_tensor(state: dict[str, Any], is_param: bool) -> NVFP4Tensor:
    """Rebuild an NVFP4Tensor from a pickle."""
    for name in ("rowwise_scale_inv", "columnwise_scale_inv"):
        state[name] = None if state[name] is None else state[name].view(torch.float8_e4m3fn)
    t = NVFP4Tensor(**state)
    if is_param:
        t._is_param = True
    return t


# For torch.load(weights_only=True), which torch's default is.
torch.serialization.add_safe_globals([NVFP4Tensor, _rebuild_nvfp4_tensor])
