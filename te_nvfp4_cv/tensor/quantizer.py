"""NVFP4Quantizer: the settings of one operand, and the call that makes an NVFP4Tensor with them.

    t = NVFP4Quantizer(rowwise=True, columnwise=True, with_rht=True)(x)      x [..., K], quantized as the matrix [M, K]

The names are TransformerEngine's. Shapes that are no multiple of 16 are padded with zeros, not refused. The result's
scales are compact, not padded to 128 x 4. Two quantizers are equal if their settings are; pickles leave the process
group behind. Tensors made inside torch.compile hold no quantizer, so they cannot be written to. Options that
ops.quantize.matrix.check_options refuses are refused when the quantizer is built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv import errors
from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.formats import BLOCK, E4M3_MAX, round_up
from te_nvfp4_cv.ops.quantize import amax as amaxes
from te_nvfp4_cv.ops.quantize import matrix as ops
from te_nvfp4_cv.ops.quantize import reference_matrix, rounding_seeds
from te_nvfp4_cv.tensor.nvfp4_tensor import NVFP4Tensor
from te_nvfp4_cv.tensor.torch_operators import READING, has_tiles


class NVFP4Quantizer:
    """The settings of one operand; calling it quantizes a tensor.

    Args:
        rowwise: write the rowwise face (blocks along the last dimension).
        columnwise: write the columnwise face (blocks along the flattened leading dimensions).
        with_amax_reduction: take the maximum of amax over amax_reduction_group, so that shards share a tensor scale.
        with_rht: rotate the columnwise face.
        with_post_rht_amax: has no effect: amax_columnwise is always that of the rotated values, as TransformerEngine's
            is by default. It is accepted so that TransformerEngine's calls run.
        with_2d_quantization: one scale per 16x16 tile (weights).
        stochastic_rounding: needs a seed per call. If none is given, it is drawn as a layer's is (rounding_seeds.py).
        row_scaled_nvfp4: one amax per row.
        nvfp4_use_4over6: choose block scales by error, nvfp4_4over6_err_mode "MAE" or "MSE".
        nvfp4_e4m3_max: 448, or 256 with 4over6 (448 without it, whatever is given).
        with_random_sign_mask: the fixed signs of the RHT.
        backend: "auto", "reference", "integer", "vendor", "triton" or "cudnn".
    Raises:
        ValueError: options that exclude each other.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> quantizer = nv.NVFP4Quantizer(columnwise=False)
        >>> quantizer(torch.randn(8, 32))
        NVFP4Tensor((8, 32), torch.float32, rowwise, device='cpu')
        >>> quantizer
        NVFP4Quantizer(columnwise=False)
    """

    def __init__(
        self,
        *,
        rowwise: bool = True,
        columnwise: bool = True,
        with_amax_reduction: bool = False,
        amax_reduction_group: Any = None,
        with_rht: bool = False,
        with_post_rht_amax: bool = True,
        with_2d_quantization: bool = False,
        stochastic_rounding: bool = False,
        row_scaled_nvfp4: bool = False,
        nvfp4_use_4over6: bool = False,
        nvfp4_e4m3_max: int = E4M3_MAX,
        nvfp4_4over6_err_mode: str = "MAE",
        with_random_sign_mask: bool = True,
        backend: str = "auto",
    ) -> None:
        self.rowwise_usage = rowwise
        self.columnwise_usage = columnwise
        self.with_amax_reduction = with_amax_reduction
        self.amax_reduction_group = amax_reduction_group
        self.with_rht = with_rht
        self.with_post_rht_amax = with_post_rht_amax
        self.with_2d_quantization = with_2d_quantization
        self.stochastic_rounding = stochastic_rounding
        self.row_scaled_nvfp4 = row_scaled_nvfp4
        self.nvfp4_use_4over6 = nvfp4_use_4over6
        # 256 leaves room for the larger of the two scales that 4over6 compares; without it there is only one.
        self.nvfp4_e4m3_max = nvfp4_e4m3_max if nvfp4_use_4over6 else E4M3_MAX
        self.nvfp4_4over6_err_mode = nvfp4_4over6_err_mode
        self.with_random_sign_mask = with_random_sign_mask
        self.backend = backend
        ops.check_options(self._spec(rowwise, columnwise))
        # The name only: whether the backend can run depends on the device of a tensor.
        dispatch.check_backend(backend)
        if row_scaled_nvfp4 and with_amax_reduction:
            raise errors.value_error(
                "NVFP4Quantizer: a row-scaled tensor has no amax to reduce.",
                got="row_scaled_nvfp4=True, with_amax_reduction=True",
                needs="one of the two",
                fix="leave with_amax_reduction out: rows are never split over ranks",
            )

    @property
    def four_over_six(self) -> str | None:
        """The error mode of 4over6, or None without 4over6."""
        return self.nvfp4_4over6_err_mode if self.nvfp4_use_4over6 else None

    def _spec(self, rowwise: bool, columnwise: bool) -> ops.MatrixSpec:
        """Return the options of a call that writes these faces."""
        return ops.MatrixSpec(
            rowwise,
            columnwise,
            rht=self.with_rht,
            stochastic_rounding=self.stochastic_rounding,
            two_d=self.with_2d_quantization,
            four_over_six=self.four_over_six,
            e4m3_max=self.nvfp4_e4m3_max,
            row_scaled=self.row_scaled_nvfp4,
            with_sign=self.with_random_sign_mask,
        )

    # ---- quantize ---------------------------------------------------------------------------------------------------

    def __call__(
        self, tensor: Tensor, *, out: NVFP4Tensor | None = None, dtype: torch.dtype | None = None, seed: Any = None
    ) -> NVFP4Tensor:
        return self.quantize(tensor, out=out, dtype=dtype, seed=seed)

    def quantize(
        self,
        tensor: Tensor,
        *,
        out: NVFP4Tensor | None = None,
        dtype: torch.dtype | None = None,
        seed: Tensor | int | None = None,
        amax: tuple[Tensor, Tensor] | None = None,
    ) -> NVFP4Tensor:
        """Quantize a tensor [..., K].

        Args:
            out: written in place instead, in the faces that it has, and returned.
            dtype: nominal dtype of the result; by default that of the tensor.
            seed: int64 Philox key of stochastic rounding.
            amax: rowwise, and columnwise after RHT, fp32. If None, they are computed.
        """
        if out is not None:
            self.update_quantized(tensor, out, seed=seed)
            return out
        if not self.is_quantizable(tensor) or not (self.rowwise_usage or self.columnwise_usage):
            raise errors.value_error(
                "NVFP4Quantizer: nothing to quantize.",
                got=f"{errors.describe(tensor)}, rowwise={self.rowwise_usage}, columnwise={self.columnwise_usage}",
                needs="a tensor [..., K] of bfloat16, float16 or float32, and at least one face",
                fix="cast the tensor; set_usage(rowwise=True)",
            )
        faces = self._faces(tensor, self.rowwise_usage, self.columnwise_usage, seed, amax)
        return self._wrap(faces, tuple(tensor.shape), dtype or tensor.dtype)

    def update_quantized(
        self,
        src: Tensor,
        dst: NVFP4Tensor,
        *,
        noop_flag: Tensor | None = None,
        seed: Tensor | int | None = None,
    ) -> NVFP4Tensor:
        """Quantize src into dst's buffers, in the faces that dst has. Where noop_flag is 1, dst stays as it is.

        Raises:
            ValueError: shapes differ; or one of the two has a scale per row and the other has not; or, with noop_flag,
                dst's codes are to be read in another way than this quantizer's.
        """
        if tuple(src.shape) != tuple(dst.shape):
            raise errors.value_error(
                "NVFP4Quantizer: source and destination differ in shape.",
                got=f"{tuple(src.shape)} into {tuple(dst.shape)}",
                needs="equal shapes",
                fix="quantize into a new tensor: quantizer(src)",
            )
        # The faces of dst decide, not this quantizer's: its buffers are there already.
        usages = dst.get_usages()
        src = src.detach().to(dst.device)
        faces = self._faces(src, usages["rowwise"], usages["columnwise"], seed, None)
        new = self._wrap(faces, tuple(dst.shape), dst.dtype)
        # Quantizing gives TransformerEngine's layout, while dst may hold tiles.
        if usages["columnwise"]:
            new = new.to_columnwise_layout(dst.columnwise_layout)
        # Buffers of scales per row have other shapes. How codes are read is known here, the flag on the device only.
        ours, theirs = ((t.row_scaled, t.e4m3_max, *_rotation(t)) for t in (new, dst))
        if ours[0] != theirs[0] or (noop_flag is not None and ours != theirs):
            raise errors.value_error(
                "NVFP4Quantizer: it cannot write into this tensor.",
                got=f"{self!r}, a tensor {dst!r}{'' if noop_flag is None else ', noop_flag'}",
                needs="row_scaled_nvfp4 alike on both sides; with noop_flag the RHT and the largest scale, too",
                fix="quantize into a new tensor: quantizer(src)",
            )
        with torch.no_grad():
            for name, buffer in dst._buffers().items():
                # As bytes, so that the bits of float8 scales and of a NaN arrive unchanged.
                old_bytes, new_bytes = buffer.view(torch.uint8), getattr(new, name).view(torch.uint8)
                if noop_flag is not None:
                    # Chosen on the device: reading the flag would make the host wait for it.
                    new_bytes = torch.where(noop_flag.reshape(()) != 0, old_bytes, new_bytes)
                old_bytes.copy_(new_bytes)
        for name in READING:
            setattr(dst, name, getattr(new, name))
        if has_tiles(dst) and not self.with_2d_quantization:
            dst._quantizer = self.copy()  # scales of tiles are gone, and with them the way from one face to the other
        return dst

    def make_empty(
        self, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32, device: Any = None
    ) -> NVFP4Tensor:
        """Make an NVFP4Tensor of this quantizer's faces with uninitialized buffers."""
        M, K = torch.Size(shape[:-1]).numel(), shape[-1]
        spec = self._spec(self.rowwise_usage, self.columnwise_usage)
        # Only the device of the first argument is read.
        faces = reference_matrix.empty_faces(torch.empty(0, device=device), M, K, spec)
        return self._wrap(faces, tuple(shape), dtype)

    def _faces(
        self, tensor: Tensor, rowwise: bool, columnwise: bool, seed: Tensor | int | None, amax: Any
    ) -> reference_matrix.Faces:
        x_MK = self._matrix(tensor)
        if self.stochastic_rounding and seed is None:
            seed = rounding_seeds.draw_seed(x_MK)
        if amax is None and self.with_amax_reduction:
            amax = self._reduced_amax(x_MK, columnwise)
        return ops.quantize(
            x_MK,
            amax_rowwise=None if amax is None else amax[0],
            # Without a columnwise face the amax that was measured for it is empty.
            amax_columnwise=None if amax is None or not columnwise else amax[1],
            seed=seed,
            backend=dispatch.resolve(self.backend, x_MK.device),
            **self._spec(rowwise, columnwise)._asdict(),
        )

    def measure(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return this tensor's rowwise and columnwise amax on this rank alone, as quantize takes them in `amax`."""
        return reference_matrix.amax_2d(self._matrix(tensor), self._spec(True, self.columnwise_usage))

    def _reduced_amax(self, x_MK: Tensor, columnwise: bool) -> tuple[Tensor, Tensor]:
        """Return the rowwise and the columnwise amax, each the largest of all ranks; NaN wins over inf."""
        # One message for both: latency is all that a few bytes cost.
        own = reference_matrix.amax_2d(x_MK, self._spec(True, columnwise))
        both = amaxes.reduce_amax(torch.cat(own), self.amax_reduction_group)
        return both[:1], both[1:]

    @staticmethod
    def _matrix(tensor: Tensor) -> Tensor:
        """Return the values [M, K] of a tensor [..., K], without its gradient."""
        x = tensor.detach()
        x = x.dequantize() if isinstance(x, NVFP4Tensor) else x
        return x.reshape(x.shape[:-1].numel(), x.shape[-1])

    def _wrap(self, faces: reference_matrix.Faces, shape: tuple[int, ...], dtype: torch.dtype) -> NVFP4Tensor:
        # A face that was not made has an empty scale of one dimension.
        row, col = faces.row_scale.dim() == 2, faces.col_scale.dim() == 2
        row_data = faces.row_data.reshape(*shape[:-1], faces.row_data.shape[-1]) if row else None
        return NVFP4Tensor(
            shape=shape,
            dtype=dtype,
            rowwise_data=row_data,
            rowwise_scale_inv=faces.row_scale if row else None,
            amax_rowwise=faces.row_amax if row else None,
            columnwise_data=faces.col_data if col else None,
            columnwise_scale_inv=faces.col_scale if col else None,
            amax_columnwise=faces.col_amax if col else None,
            quantizer=None if torch.compiler.is_compiling() else self,  # a graph carries no such object
            row_scaled_nvfp4=self.row_scaled_nvfp4,
            nvfp4_use_4over6=self.nvfp4_use_4over6,
            nvfp4_e4m3_max=self.nvfp4_e4m3_max,
            columnwise_rht=self.with_rht,
            with_random_sign_mask=self.with_random_sign_mask,
        )

    # ---- settings ---------------------------------------------------------------------------------------------------

    def set_usage(self, *, rowwise: bool | None = None, columnwise: bool | None = None) -> None:
        """Choose the faces that later calls write."""
        self.rowwise_usage = self.rowwise_usage if rowwise is None else rowwise
        self.columnwise_usage = self.columnwise_usage if columnwise is None else columnwise

    def get_usages(self) -> dict[str, bool]:
        """Tell which faces a call writes."""
        return {"rowwise": self.rowwise_usage, "columnwise": self.columnwise_usage}

    def copy(self) -> NVFP4Quantizer:
        """Make a quantizer with the same settings, without the process group."""
        return NVFP4Quantizer(**self.settings())

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of the constructor, without the process group; they decide equality."""
        # Attributes bear the names of the arguments, but for the two usages, whose names are TransformerEngine's.
        names = {name: value for name, value in vars(self).items() if name != "amax_reduction_group"}
        usages = names.pop("rowwise_usage", None), names.pop("columnwise_usage", None)
        return {"rowwise": usages[0], "columnwise": usages[1], **names}

    def calibrate(self, tensor: Tensor) -> None:
        """Do nothing: there is nothing to learn from data, since amax is taken at each call."""

    def is_quantizable(self, tensor: Tensor) -> bool:
        """Tell if quantize takes this tensor: bf16, fp16 or fp32, at least one dimension, of any length (it pads)."""
        return tensor.dim() >= 1 and tensor.dtype in ops.DTYPES

    def is_requantization_safe(self) -> bool:
        """Tell if quantizing twice gives the same codes."""
        return not self.stochastic_rounding

    def get_scale_shape(self, shape: tuple[int, ...], columnwise: bool) -> tuple[int, int]:
        """Return the shape of scale_inv, compact."""
        M, K = torch.Size(shape[:-1]).numel(), shape[-1]
        return (K, round_up(M, BLOCK) // BLOCK) if columnwise else (M, round_up(K, BLOCK) // BLOCK)

    def get_columnwise_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return [K, M], the shape of the columnwise face before packing."""
        return shape[-1], torch.Size(shape[:-1]).numel()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NVFP4Quantizer) and self.settings() == other.settings()

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.settings().items())))

    def __repr__(self) -> str:
        default = NVFP4Quantizer().settings()
        changed = (f"{name}={value!r}" for name, value in self.settings().items() if value != default[name])
        return f"NVFP4Quantizer({', '.join(changed)})"

    def __reduce__(self) -> Any:
        return _rebuild_quantizer, (self.settings(),)


def _rotation(t: NVFP4Tensor) -> tuple[bool, bool]:
    """Return if t's columnwise face is there and rotated, and if with the fixed signs."""
    rotated = t.columnwise_rht and t.columnwise_data is not None
    return rotated, rotated and t._with_random_sign_mask


def _rebuild_quantizer(settings: dict[str, Any]) -> NVFP4Quantizer:
    """Rebuild a quantizer from a pickle."""
    return NVFP4Quantizer(**settings)


torch.serialization.add_safe_globals([NVFP4Quantizer, _rebuild_quantizer])
