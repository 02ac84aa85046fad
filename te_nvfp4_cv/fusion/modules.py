"""Define torch's norm modules with an activation and a residual: BatchNormAct1d/2d/3d, GroupNormAct.

    BatchNormAct2d(64, activation="relu")(z, residual)    ==    relu(BatchNorm2d(64)(z) + residual)

Constructor arguments, Parameters, buffers, their names and the state_dict are the plain module's. Without an activation
they compute what the plain module does. If the fused operator cannot serve a call (complex or integer inputs, tensor
subclasses, torch.func transforms, a residual that must be broadcast), torch's own calls run one after another.
nn.SyncBatchNorm.convert_sync_batchnorm puts a plain norm in the place of any of these, so that an activation which was
given to the constructor is lost; convert the plain model first, or let nv.fuse rewrite it, which keeps activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.context import state
from te_nvfp4_cv.errors import no_script
from te_nvfp4_cv.fusion.norm_act import batch_norm_act, check_activation, group_norm_act
from te_nvfp4_cv.layer.check import transformed
from te_nvfp4_cv.ops.norm import reference

ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.ReLU6: "relu6",
    nn.GELU: "gelu",
    nn.LeakyReLU: "leaky_relu",
}
OWN: Any = object()  # "the module's own activation"; None means without one


class NormActModule(nn.Module):
    """The base of the fused norms. `activation` is one of ACTIVATIONS or None, and a call may override it."""

    activation: str | None = None  # on the class, because nv.fuse changes classes without calling __init__

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if activation is not None:
            check_activation(type(self).__name__, activation)
        self.activation = activation

    def forward(self, z: Tensor, residual: Tensor | None = None, activation: str | None = OWN) -> Tensor:
        """Return activation(norm(z) + residual), with the module's own activation unless the call gives one."""
        activation = self.activation if activation is OWN else activation
        if activation is None or not fusable(z, residual, activation):
            u = super().forward(z)  # type: ignore[misc]
            return activate(u if residual is None else u + residual, activation)
        return self.fused(z, residual, activation)

    def __prepare_scriptable__(self) -> None:
        raise no_script(self, "torch's own norm", "torch.compile or torch.export; or script the model before nv.fuse")

    def fused(self, z: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        """Call the fused operator."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return what torch's module shows, then the activation."""
        own = "" if self.activation is None else f", activation={self.activation!r}"
        return super().extra_repr() + own


class _BatchNormAct(NormActModule):
    def fused(self, z: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        self._check_input_dim(z)  # type: ignore[operator]
        momentum: Any = self.momentum
        # From here on as in torch's _BatchNorm.forward.
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)  # type: ignore[operator]
            if momentum is None:  # the cumulative average; torch too reads the counter on the host here
                momentum = 1.0 / float(self.num_batches_tracked)  # type: ignore[arg-type]
        batch_stats = self.training or (self.running_mean is None and self.running_var is None)
        running = not self.training or self.track_running_stats
        return batch_norm_act(
            z,
            self.running_mean if running else None,  # type: ignore[arg-type]
            self.running_var if running else None,  # type: ignore[arg-type]
            self.weight,  # type: ignore[arg-type]
            self.bias,  # type: ignore[arg-type]
            batch_stats,
            0.0 if momentum is None else momentum,
            self.eps,  # type: ignore[arg-type]
            residual=residual,
            activation=activation,
            backend=_backend(z),
        )


class _GroupNormAct(NormActModule):
    def fused(self, z: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        return group_norm_act(
            z,
            self.num_groups,  # type: ignore[arg-type]
            self.weight,  # type: ignore[arg-type]
            self.bias,  # type: ignore[arg-type]
            self.eps,  # type: ignore[arg-type]
            residual=residual,
            activation=activation,
            backend=_backend(z),
        )


class BatchNormAct1d(_BatchNormAct, nn.BatchNorm1d):
    """Compute nn.BatchNorm1d, a residual and an activation in one operator.

    The parameters are torch's, and `activation`: "relu", "silu", "hardswish", "relu6", "gelu", "gelu_tanh",
    "leaky_relu" (with another slope: "leaky_relu:0.2"), or None.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> norm = nv.BatchNormAct1d(16, activation="relu")
        >>> z, residual = torch.randn(2, 4, 16, 8)
        >>> norm(z, residual).shape
        torch.Size([4, 16, 8])
    """


class BatchNormAct2d(_BatchNormAct, nn.BatchNorm2d):
    """Compute nn.BatchNorm2d, a residual and an activation in one operator.

    The parameters are torch's, and `activation`: "relu", "silu", "hardswish", "relu6", "gelu", "gelu_tanh",
    "leaky_relu" (with another slope: "leaky_relu:0.2"), or None.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> norm = nv.BatchNormAct2d(16, activation="relu")
        >>> z, residual = torch.randn(2, 4, 16, 8, 8)
        >>> norm(z, residual).shape
        torch.Size([4, 16, 8, 8])
    """


class BatchNormAct3d(_BatchNormAct, nn.BatchNorm3d):
    """Compute nn.BatchNorm3d, a residual and an activation in one operator.

    The parameters are torch's, and `activation`: "relu", "silu", "hardswish", "relu6", "gelu", "gelu_tanh",
    "leaky_relu" (with another slope: "leaky_relu:0.2"), or None.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> norm = nv.BatchNormAct3d(16, activation="relu")
        >>> z, residual = torch.randn(2, 4, 16, 4, 4, 4)
        >>> norm(z, residual).shape
        torch.Size([4, 16, 4, 4, 4])
    """


class GroupNormAct(_GroupNormAct, nn.GroupNorm):
    """Compute nn.GroupNorm, a residual and an activation in one operator.

    The parameters are torch's, and `activation`: "relu", "silu", "hardswish", "relu6", "gelu", "gelu_tanh",
    "leaky_relu" (with another slope: "leaky_relu:0.2"), or None.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> norm = nv.GroupNormAct(4, 16, activation="silu")
        >>> norm(torch.randn(4, 16, 8, 8)).shape
        torch.Size([4, 16, 8, 8])
    """


NORM_CLASSES: dict[type[nn.Module], type[NormActModule]] = {
    nn.BatchNorm1d: BatchNormAct1d,
    nn.BatchNorm2d: BatchNormAct2d,
    nn.BatchNorm3d: BatchNormAct3d,
    nn.GroupNorm: GroupNormAct,
}


def activation_of(module: nn.Module | None) -> str | None:
    """Return the name of the activation that this module is, for the fused operators, or None if they serve it not."""
    name = ACTIVATION_MODULES.get(type(module))  # type: ignore[arg-type]
    if isinstance(module, nn.GELU) and name is not None:
        return name_of_gelu(module.approximate)
    if isinstance(module, nn.LeakyReLU) and name is not None:
        return f"{name}:{module.negative_slope}"
    return name


def name_of_gelu(approximate: str) -> str | None:
    """Return the name of the form of GELU that torch calls so."""
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)


def activate(u: Tensor, activation: str | None) -> Tensor:
    """Return the activation of u, or u itself without one."""
    return u if activation is None else reference.activate(u, activation)


def fusable(z: Tensor, residual: Tensor | None, activation: str) -> bool:
    """Return True if the fused operator can serve this call. Torch gets the shapes that it rejects, for its error."""
    plain = all(type(t) in (Tensor, nn.Parameter) for t in (z, residual) if t is not None)
    return (
        plain
        and z.is_floating_point()
        and z.dim() >= 2
        and z.numel() > 0
        and z.device.type in ("cpu", "cuda")
        and z.layout == torch.strided
        and (residual is None or (activation == "relu" and _fits(z, residual)))
        and not transformed()
    )


def _fits(z: Tensor, residual: Tensor) -> bool:
    return residual.shape == z.shape and residual.device == z.device and residual.is_floating_point()


def _backend(z: Tensor) -> str:
    """Return the backend that the context asks for, or "auto" outside of an enabled one."""
    current = state.state()
    return "auto" if current is None or not current.enabled else current.backend
