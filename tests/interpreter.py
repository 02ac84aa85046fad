"""Triton's interpreter with the arithmetic of a GPU: without these repairs, tests of kernels test the interpreter.

Found wrong in triton 3.6 to 3.9: fp32 to bf16 truncates; fp32 to E4M3 loses the carry of rounding and does not
saturate; an E4M3 NaN reads as 480; tl.dot multiplies the bit patterns of bf16; tl.dot_scaled fails (3.6) or reads E4M3
scales as E8M0 (3.8, 3.9); ~ on unsigned integers overflows; range() over a runtime size fails with NumPy 2.4; the & of
a block's mask and a scalar's is no mask (3.9); an argument from 2^31 to 2^32 becomes negative when it is shifted.
It also spends a third of its time on checks of integer overflow that nobody reads without its debug option, and on a
table of dtypes that it makes anew at every question.
install() patches private names of the interpreter, once, after triton is imported and before the first launch.
tests/ops/kernels/test_interpreter.py checks each repair.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
SIGNED = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
INTEGER = {8: np.uint8, 16: np.int16, 32: np.int32, 64: np.int64}


def install() -> None:
    """Repair the interpreter of this process."""
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "_repaired", False):
        return
    floats = {
        tl.float64: torch.float64,
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
    }
    largest = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
    convert_before, ones_before = interpreter._convert_float, builder.get_all_ones_value
    patch_before = interpreter._patch_lang_tensor
    native = interpreter._ir
    patched: set[int] = set()

    def as_torch(data: Any, dtype: Any) -> torch.Tensor:
        bits = np.array(data, copy=True).view(INTEGER[dtype.primitive_bitwidth])
        return torch.from_numpy(bits).view(floats[dtype])

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source not in floats or target not in floats or mode == native.ROUNDING_MODE.RTZ:
            return convert_before(data, source, target, mode)
        values = as_torch(data, source)
        if target in largest:
            values = values.float().clamp(-largest[target], largest[target])
        width = target.primitive_bitwidth
        return values.to(floats[target]).view(SIGNED[width]).numpy().view(UNSIGNED[width]).reshape(data.shape)

    def in_fp32(operand: Any) -> Any:
        dtype = operand.dtype.scalar
        return as_torch(operand.data, dtype).float().numpy() if dtype in floats else operand.data

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if a.dtype.scalar.is_floating():
            return handle(np.matmul(in_fp32(a), in_fp32(b)).astype(d.data.dtype) + d.data, d.dtype.scalar)
        return handle(np.matmul(a.data, b.data, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def scaled(operand: Any, scale: Any, kind: Any, k_packed: bool, is_rhs: bool) -> Any:
        if kind == native.ScaleDotElemTypeTY.E2M1:
            axis = (-2 if k_packed else -1) if is_rhs else (-1 if k_packed else -2)
            packed = np.moveaxis(operand.data.view(np.uint8), axis, -1)
            codes = np.stack([E2M1[packed & 15], E2M1[packed >> 4]], -1)
            values = np.moveaxis(codes.reshape(*packed.shape[:-1], -1), -1, axis)
        else:
            values = in_fp32(operand)
        if scale is None:
            return values
        is_float = scale.dtype.scalar in floats
        factor = in_fp32(scale) if is_float else np.exp2(scale.data.view(np.uint8).astype(np.float32) - 127)
        factor = np.repeat(factor, values.shape[-2 if is_rhs else -1] // factor.shape[-1], axis=-1)
        return values * (np.swapaxes(factor, -1, -2) if is_rhs else factor)

    def dot_scaled(
        self: Any, a: Any, a_scale: Any, a_kind: Any, b: Any, b_scale: Any, b_kind: Any, fast: Any, *packed: Any
    ) -> Any:
        a_packed, b_packed, acc = packed
        left, right = scaled(a, a_scale, a_kind, a_packed, False), scaled(b, b_scale, b_kind, b_packed, True)
        return handle((np.matmul(left, right) + acc.data).astype(np.float32), tl.float32)

    def all_ones(self: Any, kind: Any) -> Any:
        dtype = np.dtype(interpreter._get_np_dtype(kind))
        if dtype.kind != "u":
            return ones_before(self, kind)
        return handle(np.full(1, np.iinfo(dtype).max, dtype), kind.scalar)

    def patch_tensor(tensor: Any, scope: Any, *rest: Any) -> None:
        patch_before(tensor, scope, *rest)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def call_nested(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in patched:  # the interpreter patches triton.language at every call, which takes most of its time
            patched.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def with_bool_mask(access: Any, place: int) -> Any:
        def masked(self: Any, *arguments: Any) -> Any:
            mask = arguments[place]
            if mask.data.dtype != bool:
                arguments = (*arguments[:place], handle(mask.data != 0, tl.int1), *arguments[place + 1 :])
            return access(self, *arguments)

        return masked

    argument_before = interpreter._implicit_cvt

    def argument(value: Any) -> Any:
        made = argument_before(value)
        if isinstance(value, int) and 2**31 <= value < 2**32:  # whose type is int64, but not NumPy's
            made.handle.data = made.handle.data.astype(np.int64)
        return made

    dtypes: dict[Any, Any] = {}
    dtype_before = interpreter._get_np_dtype

    def np_dtype(kind: Any) -> Any:
        element = kind.element_ty if isinstance(kind, tl.block_type) else kind
        if isinstance(element, tl.pointer_type):  # has no hash
            return np.dtype(np.uint64)
        if element not in dtypes:
            dtypes[element] = dtype_before(element)
        return dtypes[element]

    if not interpreter.interpreter_builder.options.debug:
        options = interpreter.interpreter_builder.options
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    interpreter._implicit_cvt = argument
    interpreter._get_np_dtype = np_dtype
    builder.create_masked_load = with_bool_mask(builder.create_masked_load, 1)
    builder.create_masked_store = with_bool_mask(builder.create_masked_store, 2)
    interpreter._convert_float = convert
    interpreter.InterpretedFunction.__call__ = call_nested
    builder.create_dot, builder.create_dot_scaled = dot, dot_scaled
    builder.get_all_ones_value = all_ones
    interpreter._patch_lang_tensor = patch_tensor
    if tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 7):
        _formats_as_constexpr(tl, interpreter)
    builder._repaired = True


def _formats_as_constexpr(tl: Any, interpreter: Any) -> None:
    """tl.dot_scaled of 3.6 and 3.7 reads `.value` of formats that the interpreter hands over as plain strings."""
    import triton.language.semantic as semantic

    instance = getattr(interpreter, "interpreter_semantic", None)
    kind = semantic.TritonSemantic if instance is None else type(instance)
    before = kind.dot_scaled

    def wrap(name: Any) -> Any:
        return name if isinstance(name, tl.constexpr) else tl.constexpr(name)

    def dot_scaled(self: Any, a: Any, a_scale: Any, a_kind: Any, b: Any, b_scale: Any, b_kind: Any, *rest: Any) -> Any:
        return before(self, a, a_scale, wrap(a_kind), b, b_scale, wrap(b_kind), *rest)

    kind.dot_scaled = dot_scaled
