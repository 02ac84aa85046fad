"""The quantizers and storages that TransformerEngine's layers get: one for each face of an operand.

The three GEMMs are nv.gemm's: alpha and the bias in fp32, the bias last, then the cast. An operand is a HybridQuantizer
of two faces. In that form TransformerEngine's modules handle bias gradients, micro-batches and high-precision faces; a
bare custom quantizer fails in the compiled bgrad_quantize as soon as a layer has a bias.

The classes here are mixins, because TransformerEngine's base classes exist only once it is imported: `te_classes`
imports it, and puts each mixin in front of its base class.
"""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv import errors
from te_nvfp4_cv.tensor.gemm import LAYOUTS as FACES_OF_LAYOUT
from te_nvfp4_cv.tensor.gemm import gemm
from te_nvfp4_cv.tensor.nvfp4_tensor import NVFP4Tensor
from te_nvfp4_cv.tensor.quantizer import NVFP4Quantizer

FACES = ("rowwise", "columnwise")
LAYOUTS = {faces: layout for layout, faces in FACES_OF_LAYOUT.items()}  # the pair of faces tells fprop, dgrad or wgrad


class _FaceStorage:
    """One face of an NVFP4Tensor, with the attributes that TransformerEngine's custom GEMMs look for.

    data and data_t are the same buffer. The face is chosen when it is taken out of its pair, before custom_gemm asks
    for one of the two, and custom_gemm takes LayerNormMLP's wgrad for an fprop.
    """

    custom = True
    survives_saving = False  # the buffers stay here, too, when autograd saves them
    _quantizer: Any

    def __init__(self, tensor: NVFP4Tensor, quantizer: Any) -> None:
        self._quantizer = quantizer
        self._tensor: NVFP4Tensor | None = tensor
        self._dtype = tensor.dtype
        self._buffers = tuple(part.format(quantizer.face) for part in ("{}_data", "{}_scale_inv", "amax_{}"))
        # Without the buffers: metadata stays here while autograd holds the tensors, or both would keep the memory.
        self._metadata = tensor.get_metadata() | dict.fromkeys(self._buffers)

    @property
    def tensor(self) -> NVFP4Tensor:
        """The NVFP4Tensor, which exists while its buffers are here and not with autograd."""
        assert self._tensor is not None, "the buffers were saved for backward, or cleared"
        return self._tensor

    data = data_t = property(lambda self: self.get_data_tensors()[0])
    scale = scale_t = property(lambda self: self.get_data_tensors()[1])
    dtype = property(lambda self: self._dtype)
    device = property(lambda self: self.tensor.device)
    original_shape = property(lambda self: (self.size()[:-1].numel(), self.size(-1)))  # custom_gemm knows 3 at most

    def size(self, dim: int | None = None) -> Any:
        """Return the logical shape, or the length of one of its axes."""
        shape = torch.Size(self._metadata["shape"])
        return shape if dim is None else shape[dim]

    def dequantize(self, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values. Those of a columnwise face are before the RHT."""
        return self.tensor.dequantize(dtype)

    def get_data_tensors(self) -> tuple[Tensor | None, ...]:
        """Return data, scale_inv and amax. Each is None while its buffer is not here."""
        return tuple(getattr(self._tensor, name, None) for name in self._buffers)

    def prepare_for_saving(self) -> tuple[list[Tensor | None], Any]:
        """Return the buffers, which autograd saves, and this object, which lets go of them unless they must survive."""
        buffers = list(self.get_data_tensors())
        if not self.survives_saving:
            self.clear()
        return buffers, self

    def restore_from_saved(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """Take this object's buffers from the front of the list and return the rest."""
        self._tensor = NVFP4Tensor(**self._metadata | dict(zip(self._buffers, tensors[:3], strict=True)))
        return tensors[3:]

    def clear(self) -> None:
        """Drop the buffers."""
        self._tensor = None


class _FaceQuantizer:
    """The quantizer of one face. Both faces of an operand share one NVFP4Quantizer, which writes them in one pass."""

    custom = True

    def __init__(self, operand: NVFP4Quantizer, face: str) -> None:
        # The next class is TransformerEngine's Quantizer: te_classes() puts it behind this one.
        super().__init__(rowwise=face == "rowwise", columnwise=face == "columnwise")  # type: ignore[call-arg]
        self.operand, self.face = operand, face
        self.with_amax_reduction, self.amax_reduction_group = False, None  # set from outside, for one call

    def ready(self, *faces: str) -> NVFP4Quantizer:
        """Return the operand's quantizer, set to write these faces and to reduce amax as this one was told."""
        self.operand.with_amax_reduction = self.with_amax_reduction
        self.operand.amax_reduction_group = self.amax_reduction_group
        self.operand.set_usage(**{face: face in faces for face in FACES})
        return self.operand

    def quantize(self, tensor: Tensor, *, out: Any = None, dtype: torch.dtype | None = None) -> Any:
        """Return a new storage of this face, or `out` rewritten."""
        if out is not None:
            return self.update_quantized(tensor, out)
        return te_classes().FaceStorage(self.ready(self.face).quantize(tensor, dtype=dtype), self)

    def update_quantized(self, src: Tensor, dst: Any, *, noop_flag: Tensor | None = None) -> Any:
        """Quantize into the buffers of `dst`, and return it. A noop_flag of 1 leaves them as they are."""
        self.ready(self.face).update_quantized(src, dst.tensor, noop_flag=noop_flag)
        return dst

    def copy(self) -> Any:
        """Return a quantizer with the same settings, without the process group."""
        return te_classes().FaceQuantizer(self.operand.copy(), self.face)

    def is_requantization_safe(self) -> bool:
        """Return True if quantizing twice gives the same codes."""
        return self.operand.is_requantization_safe()

    def qgemm(
        self,
        qx: Tensor,
        qw: Tensor,
        m_params: Any,
        out_dtype: torch.dtype,
        sx: Tensor,
        sw: Tensor,
        bias: Tensor | None = None,
        out: Tensor | None = None,
        accumulate: bool = False,
        gemm_type: Any = None,
        qresult_x: Any = None,
        qresult_w: Any = None,
    ) -> Tensor:
        """Multiply two storages with nv.gemm, in the layout that their faces imply.

        The parameters are those of TransformerEngine's custom GEMMs. The plain tensors in front are parts of the two
        storages. custom_gemm of TransformerEngine 2.20 receives `out`, `accumulate` and `gelu` and passes none of them
        on, so a weight gradient to be accumulated would be lost; they are taken from its frame.

        Raises:
            TypeError: An operand comes from another quantizer.
            ValueError: The GEMM is fused with GELU.
        """
        if not (isinstance(qresult_x, _FaceStorage) and isinstance(qresult_w, _FaceStorage)):
            raise errors.type_error(
                "te_plugin: both operands of a GEMM must come from its quantizers.",
                got=f"{type(qresult_x).__name__} and {type(qresult_w).__name__}",
                needs="two operands quantized by one te_plugin.recipe()",
                fix="use one recipe for input, weight and grad_output of a layer",
            )
        # See the docstring: 2.20 has no other way to these arguments. A direct call passes them itself.
        caller = sys._getframe(1)
        if caller.f_code.co_name == "custom_gemm":
            out, accumulate = caller.f_locals["out"], caller.f_locals["accumulate"]
            if caller.f_locals["gelu"]:
                raise errors.value_error(
                    "te_plugin: GELU cannot be part of this GEMM.",
                    got="a GEMM fused with GELU",
                    needs="a plain GEMM",
                    fix="leave TransformerEngine's GEMM + GELU fusion off (NVTE_GEMM_GELU_FUSION=0)",
                )
        x, w = qresult_x.tensor, qresult_w.tensor
        layout = LAYOUTS[qresult_x._quantizer.face, qresult_w._quantizer.face]
        return gemm(x, w, layout, out_dtype, bias, accumulate, out, self.operand.backend)


class _OperandQuantizer:
    """TransformerEngine's HybridQuantizer, except that two NVFP4 faces are written in one pass.

    Its result is never a subclass of torch.Tensor. If one was asked for (`internal` is False, for a weight that is
    reused over micro-batches), the faces hold on to their buffers when autograd saves them.
    """

    rowwise_quantizer: Any
    columnwise_quantizer: Any
    internal: bool

    def quantize(self, tensor: Tensor, *, out: Any = None, dtype: torch.dtype | None = None) -> Any:
        """Return the faces that are in use, or `out` rewritten."""
        if out is not None:
            return self.update_quantized(tensor, out)  # type: ignore[attr-defined]
        te = te_classes()
        row, column = self.rowwise_quantizer, self.columnwise_quantizer
        used = tuple(face for face, wanted in self.get_usages().items() if wanted)  # type: ignore[attr-defined]
        # One pass over the tensor writes both faces; a face in high precision is made by itself.
        if used == FACES and isinstance(row, _FaceQuantizer) and isinstance(column, _FaceQuantizer):
            t = row.ready(*FACES).quantize(tensor)
            x = te.FaceStorage(t.make_like(columnwise_data=None, columnwise_scale_inv=None, amax_columnwise=None), row)
            y = te.FaceStorage(t.make_like(rowwise_data=None, rowwise_scale_inv=None, amax_rowwise=None), column)
        else:
            x = row.quantize(tensor) if "rowwise" in used else None
            y = column.quantize(tensor) if "columnwise" in used else None
        for face in (x, y):
            if isinstance(face, _FaceStorage):
                face.survives_saving = not self.internal
        faces = {"rowwise_storage": x, "columnwise_storage": y}
        return te.HybridQuantizedTensorStorage(**faces, quantizer=self, fake_dtype=tensor.dtype)


@functools.cache
def te_classes() -> SimpleNamespace:
    """Import TransformerEngine, and return its classes and those that are made from the mixins.

    Raises:
        RuntimeError: It cannot be imported.
    """
    try:
        from transformer_engine.common.recipe import CustomRecipe
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager
        from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage, Quantizer
        from transformer_engine.pytorch.tensor.hybrid_tensor import HybridQuantizer
        from transformer_engine.pytorch.tensor.identity_tensor import IdentityQuantizer
        from transformer_engine.pytorch.tensor.storage.hybrid_tensor_storage import HybridQuantizedTensorStorage
    except Exception as error:  # ImportError, or whatever its own search for compiled libraries raises
        raise errors.runtime_error(
            "te_plugin: TransformerEngine cannot be imported.",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            needs="transformer-engine 2.20 or newer with its PyTorch extension",
            fix="pip install --no-build-isolation 'transformer-engine[pytorch]>=2.20'; "
            "without it, nvfp4_autocast runs plain torch layers",
        ) from error

    # TransformerEngine's base classes exist only after this import, so the classes are made here.
    def mixed(mixin: type, base: type) -> type:
        name = mixin.__name__.lstrip("_")
        return type(name, (mixin, base), {"__module__": __name__, "__doc__": mixin.__doc__})

    return SimpleNamespace(
        CustomRecipe=CustomRecipe, FP8GlobalStateManager=FP8GlobalStateManager,
        IdentityQuantizer=IdentityQuantizer, HybridQuantizedTensorStorage=HybridQuantizedTensorStorage,
        FaceStorage=mixed(_FaceStorage, QuantizedTensorStorage), FaceQuantizer=mixed(_FaceQuantizer, Quantizer),
        OperandQuantizer=mixed(_OperandQuantizer, HybridQuantizer),
    )
