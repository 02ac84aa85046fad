"""The control of a gradient: a step in high precision whose layers get noise of the size that NVFP4's rounding makes.

    x, w     ->  v + s |Q(v) - v|,   rounded to the nearest, blocks of 16 along the channels
    dy       ->  the same, rounded as the recipe says (stochastically by default)

with random signs s. The signs of x and w are drawn from their values, so that a checkpoint that recomputes a layer
recomputes its noise. In a deep network that was just initialized the gradient of NVFP4 is far from that of high
precision, because any noise of that size grows on its way through the layers. A gradient that is no farther than the
control's is what 4 bits cost; one that is much farther says that something else is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv.backend.torch_private import without_function_modes
from te_nvfp4_cv.context.context_manager import nvfp4_autocast
from te_nvfp4_cv.context.function_mode import decide
from te_nvfp4_cv.context.layer_calls import LayerCalls
from te_nvfp4_cv.layer import shortfall
from te_nvfp4_cv.layer.execute import LayerCall
from te_nvfp4_cv.layer.inside import replaced
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.tensor.quantizer import NVFP4Quantizer

SEED = 3


@contextmanager
def control(recipe: NVFP4BlockScaling, backend: str = "auto", seed: int = SEED) -> Iterator[None]:
    """Run the layers that `nvfp4_autocast(recipe)` would run in NVFP4 in high precision with noise, as above."""
    # The context is entered so that its rules decide, set_precision's too; the inner mode takes every call from it.
    # No layer runs in NVFP4 here, which is meant.
    quiet = replaced(shortfall.local, quiet=True)
    with quiet, nvfp4_autocast(recipe, backend=backend), _Noise(recipe, seed):
        yield


class _Noise(LayerCalls):
    """Adds the noise to the operands of layers. As torch's own mode, it is off inside of its handler."""

    recomputes = True  # what a checkpoint repeats in backward gets the noise again: see context/capture.py

    def __init__(self, recipe: NVFP4BlockScaling, seed: int = SEED) -> None:
        super().__init__()
        self.recipe, self.seed = recipe, seed
        # Generators of its own: the model's dropout must draw what it draws without the control.
        self.generator = torch.Generator().manual_seed(seed)
        self.by_value = torch.Generator()

    def called(self, call: LayerCall, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a call with noise, if it would run in NVFP4."""
        op, x, w = call.op, call.x, call.w
        if decide(op, x, w, call.args.groups)[0] is None:
            return function(*args, **kwargs)
        axis = -1 if op == "linear" else -1 - int(op[-2])  # channels, also of an input without a batch
        x = _Noisy.apply(x, self._drawn(x, axis, "input"))
        w = _Noisy.apply(w, self._drawn(w, 0 if "transpose" in op else 1, "weight"))
        rest = {name: value for name, value in kwargs.items() if name not in ("input", "weight")}
        with without_function_modes():  # the context would run the call in NVFP4
            y = function(x, w, *args[2:], **rest)
        return _NoisyGradient.apply(y, self, axis)

    def _drawn(self, values: Tensor, axis: int, role: str) -> Tensor:
        """Return the noise for an operand: the error of quantizing it, with random signs."""
        settings = self.recipe.settings(role)
        quantizer = NVFP4Quantizer(
            columnwise=False, with_2d_quantization=settings.two_d, stochastic_rounding=settings.stochastic_rounding
        )
        last = values.detach().movedim(axis, -1)
        matrix = last.reshape(-1, last.shape[-1]).float().contiguous()
        error = (quantizer.quantize(matrix).dequantize() - matrix).reshape(last.shape).movedim(-1, axis)
        generator = self.generator
        if not settings.stochastic_rounding:  # the same values have the same error, in each call that reads them
            generator = self.by_value.manual_seed(self.seed + int(matrix.view(torch.int32).sum(dtype=torch.int64)))
        signs = torch.randint(2, error.shape, generator=generator).to(error) * 2 - 1
        return (error * signs).to(values.dtype)


class _Noisy(torch.autograd.Function):
    """Adds noise on the way forward, and hands the gradient on, as a quantized operand does."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, noise: Tensor) -> Tensor:
        """Return values + noise."""
        ctx.set_materialize_grads(False)
        return values + noise

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradient as it is."""
        return grads[0], None


class _NoisyGradient(torch.autograd.Function):
    """Copies a layer's output, and adds noise to its gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, mode: _Noise, axis: int) -> Tensor:
        """Return a copy of y: an activation may write to it in place, which a view would refuse."""
        ctx.set_materialize_grads(False)
        ctx.mode, ctx.axis = mode, axis
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return dy + noise."""
        if grads[0] is None:
            return None, None, None
        return grads[0] + ctx.mode._drawn(grads[0], ctx.axis, "grad_output"), None, None
