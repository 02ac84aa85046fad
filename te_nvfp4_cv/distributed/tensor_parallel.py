"""Share out the channels of convolutions and linear layers to ranks, in torch's plans (nv.tensor_parallel).

    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import parallelize_module

    parallelize_module(model, mesh, {
        "block.conv1": nv.tensor_parallel.ColwiseParallel(input_layouts=Shard(0)),    # images -> all images, channels
        "block.conv2": nv.tensor_parallel.RowwiseParallel(output_layouts=Shard(0)),   # channels -> images
    })
    with nv.nvfp4_autocast(recipe): loss = ...

Arguments, layouts and defaults are those of torch's styles of the same names; "the last dimension" of a linear layer is
dimension 1 of an image. Parameters become DTensors under their names. In an nvfp4 context activations cross ranks as
NVFP4 codes (tp_exchange.py), and the results of all ranks are those of a single process. Where blocks of 16 would be
cut apart, activations cross in high precision, and a warning says why. Outside of an nvfp4 context, and for layers
whose part on a rank is too thin, all runs in high precision. The ranks of a plan share one stream of stochastic
rounding, that of the first rank. torch.compile leaves these layers uncompiled. Refused are groups other than 1,
channels that the ranks do not divide, and subclasses of torch's layers.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor import parallel as torch_styles

from te_nvfp4_cv.backend.torch_private import left_alone, without_function_modes
from te_nvfp4_cv.distributed.tp_call import Sharing, run
from te_nvfp4_cv.errors import type_error, value_error
from te_nvfp4_cv.layer import deferred
from te_nvfp4_cv.nn.modules import NVFP4_CLASSES
from te_nvfp4_cv.ops.quantize import rounding_seeds

__all__ = ["ColwiseParallel", "RowwiseParallel"]


class ColwiseParallel(torch_styles.ColwiseParallel):
    """A style that shares out a layer's output channels: torch's ColwiseParallel, for convolutions too.

    Args:
        input_layouts: the input's layout; by default it is whole on every rank.
        output_layouts: the output's layout; by default it is split by channels.
        use_local_output: give a plain tensor, this rank's part, instead of a DTensor.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> plan = {"conv1": nv.tensor_parallel.ColwiseParallel(), "conv2": nv.tensor_parallel.RowwiseParallel()}
        >>> mesh = torch.distributed.init_device_mesh("cuda", (2,))  # doctest: +SKIP
        >>> model = parallelize_module(model, mesh, plan)  # doctest: +SKIP
    """

    def __init__(self, *, input_layouts: Any = None, output_layouts: Any = None, use_local_output: bool = True) -> None:
        super().__init__(input_layouts=input_layouts, output_layouts=output_layouts, use_local_output=use_local_output)
        self._layouts = _checked(input_layouts) or Replicate(), _checked(output_layouts)

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        if isinstance(module, nn.Embedding):  # it multiplies nothing: torch's own style serves
            return super()._apply(module, device_mesh)
        return _parallelize(module, Sharing(True, device_mesh, *self._layouts, self.use_local_output), self)


class RowwiseParallel(torch_styles.RowwiseParallel):
    """A style that shares out a layer's input channels: torch's RowwiseParallel, for convolutions too.

    Args:
        input_layouts: the input's layout; by default it is split by channels.
        output_layouts: the output's layout; by default it is whole on every rank.
        use_local_output: give a plain tensor, this rank's part, instead of a DTensor.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> from torch.distributed.tensor import Shard
        >>> style = nv.tensor_parallel.RowwiseParallel(output_layouts=Shard(0))  # the output is split by images
    """

    def __init__(self, *, input_layouts: Any = None, output_layouts: Any = None, use_local_output: bool = True) -> None:
        super().__init__(input_layouts=input_layouts, output_layouts=output_layouts, use_local_output=use_local_output)
        self._layouts = _checked(input_layouts), _checked(output_layouts) or Replicate()

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        if isinstance(module, nn.Embedding):
            return super()._apply(module, device_mesh)
        return _parallelize(module, Sharing(False, device_mesh, *self._layouts, self.use_local_output), self)


def _checked(layout: Any) -> Any:
    if layout is None or isinstance(layout, (Shard, Replicate)):
        return layout
    raise type_error(
        "tensor_parallel: this is not a layout.",
        got=f"{layout!r:.80}",
        needs="Shard(dim) or Replicate() of torch.distributed.tensor",
        fix="leave it out for the default",
    )


# ---- applying a plan ------------------------------------------------------------------------------------------------


class TensorParallelModule(nn.Module):
    """The class that takes the place of a layer's class: it stands in front of it among the bases."""

    sharing: Sharing
    op: str

    # Errors and layouts are decided on the host, together with the other ranks: a graph could not hold that.
    @left_alone  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Run the plain module's forward for tensors that lie as the plan says."""
        # A deferred activation has no values yet, and the ranks exchange them in more than one form.
        deferred.settle(input)
        with without_function_modes():  # the context must not take over the calls inside
            return run(self, input, output_size)

    def extra_repr(self) -> str:
        """Return the plain module's extra_repr, then how the layer is cut."""
        s = self.sharing
        return f"{super().extra_repr()}, {'columns' if s.column else 'rows'} on {s.ranks} ranks"


_classes: dict[type[nn.Module], type[nn.Module]] = {}  # made once per layer class: equal layers have one type


def _parallel_class(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _classes:
        op = next(NVFP4_CLASSES[base].op for base in kind.__mro__ if base in NVFP4_CLASSES)
        _classes[kind] = type(f"TensorParallel{kind.__name__}", (TensorParallelModule, kind), {"op": op})
    return _classes[kind]


def _parallelize(module: nn.Module, sharing: Sharing, style: Any) -> nn.Module:
    _check_module(module, sharing, type(style).__name__)
    in_front = sharing.column != ("Transpose" in type(module).__name__)  # the cut axis of the weight is its first
    places = {"weight": Shard(0 if in_front else 1), "bias": Shard(0) if sharing.column else Replicate()}
    # A list, because the loop replaces what it walks over. Not every version of torch gives styles a src_data_rank.
    for name, parameter in list(module.named_parameters(recurse=False)):
        shared = distribute_tensor(
            parameter, sharing.mesh, [places[name]], src_data_rank=getattr(style, "src_data_rank", 0)
        )
        module.register_parameter(name, nn.Parameter(shared, requires_grad=parameter.requires_grad))
    # The class changes, not the module: parameters keep their names, and hooks stay.
    module.__class__ = _parallel_class(type(module))
    module.sharing = sharing  # type: ignore[assignment]
    rounding_seeds.share_stream(dist.get_process_group_ranks(sharing.group)[0])
    return module


def _check_module(module: nn.Module, sharing: Sharing, style: str) -> None:
    kind, ranks = type(module), sharing.ranks
    if kind not in NVFP4_CLASSES and kind not in NVFP4_CLASSES.values():
        raise value_error(
            f"{style}: this module cannot be shared out.",
            got=kind.__name__,
            needs="nn.Linear, nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d, their NVFP4 modules, or nn.Embedding",
            fix="name the layers in the plan, and apply each plan once",
        )
    if sharing.mesh.ndim != 1:
        raise value_error(
            f"{style}: a mesh of several dimensions.",
            got=f"{sharing.mesh}",
            needs="the one dimension over which channels are shared out",
            fix="parallelize_module(model, mesh['tp'], plan)",
        )
    groups = getattr(module, "groups", 1)
    if groups != 1:
        raise value_error(
            f"{style}: a convolution with groups.",
            got=f"groups={groups}",
            needs="groups=1: channels of a group belong together",
            fix="leave the layer out of the plan",
        )
    w: Any = module.weight
    sides = (w.shape[1], w.shape[0]) if "Transpose" in kind.__name__ else (w.shape[0], w.shape[1])
    cut = sides[0 if sharing.column else 1]
    if cut % ranks:
        raise value_error(
            f"{style}: channels do not divide.",
            got=f"{cut} {'output' if sharing.column else 'input'} channels on {ranks} ranks",
            needs=f"a multiple of {ranks} (of {16 * ranks}, for the codes of the unsharded layer)",
            fix="leave the layer out of the plan, or use fewer ranks",
        )
