"""NVFP4 modules: torch's convolutions and nn.Linear with a recipe of their own; convert_model makes them, in place.

    which recipe:   set_precision's entry (in an enabled context)  >  the module's  >  the context's  >  the default
    which backend:  the context's inside of one, else the module's

They quantize without a context; nvfp4_autocast(enabled=False) turns them off. Parameters, their names and the
state_dict are the plain module's. Refused, at the call: what NVFP4 cannot do (thin layers, depthwise convolutions,
fp64), which a plain module under nvfp4_autocast does in high precision.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.context import state
from te_nvfp4_cv.layer.execute import execute_explicit
from te_nvfp4_cv.ops.geometry import ConvArgs
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, as_recipe

Size = int | tuple[int, ...]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class NVFP4Module(nn.Module):
    """What the NVFP4 layers share: `recipe` (None: the context's, or the default) and `backend`."""

    op: ClassVar[str]
    recipe: NVFP4BlockScaling | None
    backend: str

    def __init__(self, *args: Any, recipe: Any = None, backend: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        dispatch.check_backend(backend)
        self.recipe, self.backend = _checked(recipe), backend

    def chosen(self) -> tuple[NVFP4BlockScaling | None, str]:
        """(recipe or None for high precision, backend) for a call now."""
        current = state.state()
        if current is None or current.passive:
            return self.recipe or NVFP4BlockScaling(), self.backend
        if not current.enabled:
            return None, current.backend
        if state.has_override() or self.recipe is None:
            recipe = state.active_recipe()
            return (recipe if recipe is not None and recipe.nvfp4_gemms else None), current.backend
        return self.recipe, current.backend

    def extra_repr(self) -> str:
        """The plain module's, then the recipe."""
        backend = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return f"{super().extra_repr()}, recipe={self.recipe!r}{backend}"


class _Conv(NVFP4Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Any = None,
        backend: str = "auto",
    ) -> None:
        # Written out, not *args: help(), completion and type checkers then know torch's parameters.
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
            recipe=recipe,
            backend=backend,
        )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        recipe, backend = self.chosen()
        if recipe is None:
            return super()._conv_forward(input, weight, bias)  # type: ignore[misc]
        args = ConvArgs.of(self)
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)  # type: ignore
            args = args._replace(padding=0)
        return execute_explicit(self.op, input, weight, bias, args, recipe, backend, state.reduction_group())


class _ConvTranspose(NVFP4Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Any = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
            recipe=recipe,
            backend=backend,
        )

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As the plain module's."""
        recipe, backend = self.chosen()
        if recipe is None:
            return super().forward(input, output_size)  # type: ignore[misc]
        rank = len(self.kernel_size)  # type: ignore[arg-type]
        more = self._output_padding(  # type: ignore[operator]
            input, output_size, self.stride, self.padding, self.kernel_size, rank, self.dilation
        )
        w: Any = self.weight
        bias: Any = self.bias
        args = ConvArgs.of(self)._replace(output_padding=more)
        return execute_explicit(self.op, input, w, bias, args, recipe, backend, state.reduction_group())


class NVFP4Conv1d(_Conv, nn.Conv1d):
    """Compute nn.Conv1d in NVFP4. Beside torch's parameters: `recipe` (None: the context's) and `backend`."""

    op = "conv1d"


class NVFP4Conv2d(_Conv, nn.Conv2d):
    """Compute nn.Conv2d in NVFP4. Beside torch's parameters: `recipe` (None: the context's) and `backend`."""

    op = "conv2d"


class NVFP4Conv3d(_Conv, nn.Conv3d):
    """Compute nn.Conv3d in NVFP4. Beside torch's parameters: `recipe` (None: the context's) and `backend`."""

    op = "conv3d"


class NVFP4ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """Compute nn.ConvTranspose1d in NVFP4. Beside torch's parameters: `recipe` (None: the context's) and `backend`."""

    op = "conv_transpose1d"


class NVFP4ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """Compute nn.ConvTranspose2d in NVFP4. Beside torch's parameters: `recipe` (None: the context's) and `backend`."""

    op = "conv_transpose2d"


class NVFP4ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """Compute nn.ConvTranspose3d in NVFP4. Beside torch's parameters: `recipe` (None: the context's) and `backend`."""

    op = "conv_transpose3d"


class NVFP4Linear(NVFP4Module, nn.Linear):
    """Compute nn.Linear in NVFP4. Beside torch's parameters: `recipe` (None: the context's) and `backend`."""

    op = "linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Any = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype, recipe=recipe, backend=backend)

    def forward(self, input: Tensor) -> Tensor:
        """As the plain module's."""
        recipe, backend = self.chosen()
        if recipe is None:
            return super().forward(input)
        group = state.reduction_group()
        return execute_explicit("linear", input, self.weight, self.bias, ConvArgs(), recipe, backend, group)


NVFP4_CLASSES: dict[type[nn.Module], type[NVFP4Module]] = {
    nn.Conv1d: NVFP4Conv1d,
    nn.Conv2d: NVFP4Conv2d,
    nn.Conv3d: NVFP4Conv3d,
    nn.ConvTranspose1d: NVFP4ConvTranspose1d,
    nn.ConvTranspose2d: NVFP4ConvTranspose2d,
    nn.ConvTranspose3d: NVFP4ConvTranspose3d,
    nn.Linear: NVFP4Linear,
}


def _checked(recipe: Any) -> NVFP4BlockScaling | None:
    if recipe is None:
        return None
    recipe = as_recipe(recipe)
    recipe.validate_for_use()
    return recipe












