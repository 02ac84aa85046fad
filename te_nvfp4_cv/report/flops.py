"""Tell torch.utils.flop_counter.FlopCounterMode the FLOPs of this package's operators: those of plain torch.

    in eager mode                                     conv_fprop, conv_dgrad, conv_wgrad, gemm
    in graphs of torch.compile and exported models    layer, layer_of_codes, layer_backward, inference_layer

torch's own formulas compute them, from the shapes that torch's layer would have. GEMMs that a recipe leaves in high
precision are torch's operators in eager mode and count as such; inside of `layer` and `layer_backward` they count with
the rest.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch

from te_nvfp4_cv.layer import inference as inference  # renamed to itself: imported for the operator that it makes
from te_nvfp4_cv.layer.custom_op import spec_of
from te_nvfp4_cv.ops.conv import operators as operators
from te_nvfp4_cv.ops.gemm import operator as operator
from te_nvfp4_cv.ops.geometry import ConvGeometry

COUNTER = "torch.utils.flop_counter"


def _shapes(sizes: Sequence[int]) -> tuple[ConvGeometry, list[int], list[int], list[int]]:
    """Return a geometry, and the shapes of x, w and y as torch's functions take them."""
    g = ConvGeometry.from_ints([int(n) for n in sizes])
    x, y = ([shape[0], shape[-1], *shape[1:-1]] for shape in (g.x_shape, g.y_shape))
    return g, x, [g.channels_b // g.routes, g.channels_a // g.groups, *g.kernel], y


def _forward(sizes: Sequence[int]) -> int:
    from torch.utils.flop_counter import conv_flop_count

    g, x, w, y = _shapes(sizes)
    return int(conv_flop_count(x, w, y, transposed=g.transposed))


def _backward(sizes: Sequence[int], dx: bool, dw: bool) -> int:
    from torch.utils.flop_counter import flop_registry

    g, x, w, y = _shapes(sizes)
    formula: Any = flop_registry[torch.ops.aten.convolution_backward]
    mask, out = [dx, dw, False], (x, w, None)
    return int(formula(y, x, w, None, None, None, None, g.transposed, None, g.groups, mask, out_val=out))


def _fprop(operands: Any, alpha: Any, bias: Any, sizes: Any, *_: Any, **__: Any) -> int:
    return _forward(sizes)


def _dgrad(operands: Any, alpha: Any, sizes: Any, *_: Any, **__: Any) -> int:
    return _backward(sizes, True, False)


def _wgrad(operands: Any, alpha: Any, sizes: Any, *_: Any, **__: Any) -> int:
    return _backward(sizes, False, True)


def _gemm(a: Any, b: Any, *_: Any, **__: Any) -> int:
    (rows, half), (columns, _half) = a[0], b[0]  # data: two codes to a byte
    return int(2 * rows * columns * 2 * half)


def _layer(x: Any, w: Any, bias: Any, sizes: Any, *_: Any, **__: Any) -> int:
    return _forward(sizes)


def _layer_backward(dy: Any, saved: Any, sizes: Any, like_sizes: Any, spec: str, **__: Any) -> int:
    needs = spec_of(spec)
    return _backward(sizes, needs.need_dx, needs.need_dw)


def _inference(x: Any, codes: Any, unpacked: Any, bias: Any, amax: Any, sizes: Any, *_: Any, **__: Any) -> int:
    return _forward(sizes)


def register() -> None:
    """Register the formulas, which every FlopCounterMode that is made from then on uses."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    ops = torch.ops.te_nvfp4_cv
    formulas: dict[Any, Any] = {
        ops.conv_fprop: _fprop,
        ops.conv_dgrad: _dgrad,
        ops.conv_wgrad: _wgrad,
        ops.gemm: _gemm,
        ops.layer: _layer,
        ops.layer_of_codes: _layer,
        ops.layer_backward: _layer_backward,
        ops.inference_layer: _inference,
    }
    for target, formula in formulas.items():
        if target not in flop_registry:
            register_flop_formula(target)(formula)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers the formulas when the counter is imported: to import it here would take most of a second.

    It stays until then, because a module may be looked for without being imported (importlib.util.find_spec).
    """

    asks = False  # while it asks the other finders

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != COUNTER or self.asks:
            return None
        self.asks = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asks = False
        loader = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def then_register(module: types.ModuleType) -> None:
                execute(module)
                with contextlib.suppress(ValueError):  # two imports that failed may have asked for it
                    sys.meta_path.remove(self)
                register()

            loader.exec_module = then_register  # type: ignore[method-assign]
        return spec


if COUNTER in sys.modules:
    register()
else:
    sys.meta_path.insert(0, _AfterImport())
