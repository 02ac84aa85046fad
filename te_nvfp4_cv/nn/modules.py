"""Define the NVFP4 modules: torch's convolutions and nn.Linear with a recipe. convert_model makes them in place.

They quantize without a context, and nvfp4_autocast(enabled=False) turns them off; base.py says which recipe a call
uses. Parameters, their names and the state_dict are the plain module's.
Refused, when the layer is called: what NVFP4 cannot do (thin layers, depthwise convolutions, fp64). A plain module
under nvfp4_autocast runs such a layer in high precision instead. NVFP4GroupedLinear has no module of torch beside it:
torch has the function only, torch.nn.functional.grouped_mm.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from te_nvfp4_cv.context import state
from te_nvfp4_cv.layer import grouped
from te_nvfp4_cv.layer.execute import execute_explicit
from te_nvfp4_cv.nn.base import NVFP4_CLASSES as NVFP4_CLASSES  # whole only after this file is imported
from te_nvfp4_cv.nn.base import NVFP4Module, as_node
from te_nvfp4_cv.nn.walk import for_output_size, padded
from te_nvfp4_cv.ops.geometry import ConvArgs

Size = int | tuple[int, ...]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


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
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode),
            *(device, dtype),
            recipe=recipe,
            backend=backend,
        )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(input, Proxy):
            return as_node(self, input)  # type: ignore[return-value]
        recipe, backend = self.chosen()
        if recipe is None:
            return super()._conv_forward(input, weight, bias)  # type: ignore[misc]
        input, args = padded(self, input)
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
            *(in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation),
            *(padding_mode, device, dtype),
            recipe=recipe,
            backend=backend,
        )

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Compute the layer in NVFP4, or as torch does where the context says high precision."""
        if isinstance(input, Proxy):
            return as_node(self, input, output_size)  # type: ignore[return-value]
        recipe, backend = self.chosen()
        if recipe is None:
            return super().forward(input, output_size)  # type: ignore[misc]
        w: Any = self.weight
        bias: Any = self.bias
        args = for_output_size(self, input, output_size)
        return execute_explicit(self.op, input, w, bias, args, recipe, backend, state.reduction_group())


class NVFP4Conv1d(_Conv, nn.Conv1d, plain=nn.Conv1d):
    """Compute nn.Conv1d in NVFP4. The parameters are torch's, and `recipe` and `backend`: see NVFP4Module.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> layer = nv.NVFP4Conv1d(16, 32, 3, padding=1)
        >>> layer(torch.randn(16, 16, 8)).shape
        torch.Size([16, 32, 8])
    """


class NVFP4Conv2d(_Conv, nn.Conv2d, plain=nn.Conv2d):
    """Compute nn.Conv2d in NVFP4. The parameters are torch's, and `recipe` and `backend`: see NVFP4Module.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> layer = nv.NVFP4Conv2d(16, 32, 3, padding=1)
        >>> layer(torch.randn(16, 16, 8, 8)).shape
        torch.Size([16, 32, 8, 8])
    """


class NVFP4Conv3d(_Conv, nn.Conv3d, plain=nn.Conv3d):
    """Compute nn.Conv3d in NVFP4. The parameters are torch's, and `recipe` and `backend`: see NVFP4Module.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> layer = nv.NVFP4Conv3d(16, 32, 3, padding=1)
        >>> layer(torch.randn(16, 16, 8, 8, 8)).shape
        torch.Size([16, 32, 8, 8, 8])
    """


class NVFP4ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d, plain=nn.ConvTranspose1d):
    """Compute nn.ConvTranspose1d in NVFP4. The parameters are torch's, and `recipe` and `backend`: see NVFP4Module.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> layer = nv.NVFP4ConvTranspose1d(16, 32, 2, stride=2)
        >>> layer(torch.randn(16, 16, 8)).shape
        torch.Size([16, 32, 16])
    """


class NVFP4ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d, plain=nn.ConvTranspose2d):
    """Compute nn.ConvTranspose2d in NVFP4. The parameters are torch's, and `recipe` and `backend`: see NVFP4Module.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> layer = nv.NVFP4ConvTranspose2d(16, 32, 2, stride=2)
        >>> layer(torch.randn(16, 16, 8, 8)).shape
        torch.Size([16, 32, 16, 16])
    """


class NVFP4ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d, plain=nn.ConvTranspose3d):
    """Compute nn.ConvTranspose3d in NVFP4. The parameters are torch's, and `recipe` and `backend`: see NVFP4Module.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> layer = nv.NVFP4ConvTranspose3d(16, 32, 2, stride=2)
        >>> layer(torch.randn(16, 16, 8, 8, 8)).shape
        torch.Size([16, 32, 16, 16, 16])
    """


class NVFP4Linear(NVFP4Module, nn.Linear, plain=nn.Linear):
    """Compute nn.Linear in NVFP4. The parameters are torch's, and `recipe` and `backend`: see NVFP4Module.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> layer = nv.NVFP4Linear(64, 32)
        >>> layer(torch.randn(16, 64)).shape
        torch.Size([16, 32])
    """

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
        """Compute the layer in NVFP4, or as torch does where the context says high precision."""
        if isinstance(input, Proxy):
            return as_node(self, input)  # type: ignore[return-value]
        recipe, backend = self.chosen()
        if recipe is None:
            return super().forward(input)
        group = state.reduction_group()
        return execute_explicit("linear", input, self.weight, self.bias, ConvArgs(), recipe, backend, group)


class Experts(nn.Module):
    """Hold the weights of E linear layers, with nn.Linear's initialization of each."""

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, **made))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, **made)) if bias else None
        self.reset_parameters()

    @property
    def groups(self) -> int:
        """The number of experts, under the name that says how a weight's codes are laid out."""
        return self.num_experts

    def reset_parameters(self) -> None:
        """Initialize each expert as nn.Linear does."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        """Return the sizes."""
        sizes = f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


class NVFP4GroupedLinear(NVFP4Module, Experts):
    """Multiply each expert's rows by that expert's weight in NVFP4: the linear layers of a mixture of experts.

    Args:
        num_experts: E.
        in_features: C.
        out_features: O.
        bias: Learn a bias [E, O].
        device: Of the parameters.
        dtype: Of the parameters.
        recipe: See NVFP4Module.
        backend: See NVFP4Module.
    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> layer = nv.NVFP4GroupedLinear(4, 64, 32)
        >>> expert = torch.randint(4, (100,)).sort().values  # tokens come sorted by expert
        >>> layer(torch.randn(100, 64), torch.bincount(expert, minlength=4).cumsum(0)).shape
        torch.Size([100, 32])
    """

    op = grouped.OP

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Any = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            num_experts, in_features, out_features, bias, device, dtype, recipe=recipe, backend=backend
        )

    def forward(self, input: Tensor, offsets: Tensor) -> Tensor:
        """Compute the layer in NVFP4, or in high precision where the context says so.

        Args:
            input: [T, C], sorted by expert.
            offsets: int32 or int64 [E]: where each expert's rows end.
        """
        if isinstance(input, Proxy):
            return as_node(self, input, offsets)  # type: ignore[return-value]
        recipe, backend = self.chosen()
        if recipe is None:
            return grouped.plain(input, self.weight, offsets, self.bias)
        group = state.reduction_group()
        return grouped.execute_explicit(input, self.weight, offsets, self.bias, recipe, backend, group)
