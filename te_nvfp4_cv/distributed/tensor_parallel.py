"""Share out the channels of convolutions and linear layers to ranks, in torch's plans (nv.tensor_parallel).

    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import parallelize_module

    parallelize_module(model, mesh, {
        "block.conv1": nv.tensor_parallel.ColwiseParallel(input_layouts=Shard(0)),    # images -> all images, channels
        "block.norm1": nv.tensor_parallel.NormParallel(),                             # channels -> channels
        "block.conv2": nv.tensor_parallel.RowwiseParallel(output_layouts=Shard(0)),   # channels -> images
    })
    with nv.nvfp4_autocast(recipe): loss = ...

Arguments, layouts and defaults are those of torch's styles of the same names; "the last dimension" of a linear layer is
dimension 1 of an image. Parameters become DTensors under their names. In an nvfp4 context activations cross ranks as
NVFP4 codes (tp_exchange.py), and the results of all ranks are those of a single process. Where blocks of 16 would be
cut apart, activations cross in high precision, and a warning says why. Outside of an nvfp4 context, and for layers
whose part on a rank is too thin, all runs in high precision. The ranks of a plan share one stream of stochastic
rounding, that of the first rank. torch.compile leaves these layers uncompiled. Refused are groups other than 1,
channels that the ranks do not divide, subclasses of torch's layers, and, on every rank, inputs whose parts differ in
shape (one more small message at each call; a DTensor's parts may be uneven). `plan` (tp_plan.py) writes the plan of a
network of such blocks.
"""

from __future__ import annotations

import copy
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import parallel as torch_styles

from te_nvfp4_cv.backend.torch_private import left_alone, without_function_modes
from te_nvfp4_cv.distributed import tp_norm
from te_nvfp4_cv.distributed.tp_call import Sharing, run
from te_nvfp4_cv.errors import type_error, value_error
from te_nvfp4_cv.layer import deferred
from te_nvfp4_cv.nn.modules import NVFP4_CLASSES
from te_nvfp4_cv.ops.quantize import rounding_seeds

__all__ = ["ColwiseParallel", "NormParallel", "RowwiseParallel"]


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


class NormParallel(torch_styles.ParallelStyle):
    """A style for what keeps each channel to itself, on an input that is split by channels; so is the output.

    That is batch, instance and group norm, layer norm over channels (nn.LayerNorm of one axis, LayerNorm2d), depthwise
    convolutions and PReLU. Statistics are those of all channels. Activations without parameters need no style.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> tp = nv.tensor_parallel
        >>> plan = {"conv1": tp.ColwiseParallel(), "bn1": tp.NormParallel(), "conv2": tp.RowwiseParallel()}
    """

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        sharing = Sharing(True, device_mesh, Shard(1), Shard(1), True)
        _check_mesh(sharing, "NormParallel")
        channels = tp_norm.channels_of(module) if tp_norm.kind_of(module) else 0
        of_norm = isinstance(module, nn.GroupNorm) and type(module).forward is not nn.GroupNorm.forward
        if isinstance(module, tp_norm.ByChannel) or not channels or channels % sharing.ranks:
            raise value_error(
                "NormParallel: this module cannot be shared out.",
                got=f"{type(module).__name__}" + (f" of {channels} channels, {sharing.ranks} ranks" * bool(channels)),
                needs="a norm, depthwise convolution or PReLU by channels, whose number the ranks divide",
                fix="leave it out of the plan: let the layer before give its output whole, or in parts by images",
            )
        if of_norm and tp_norm.crosses_ranks(module, sharing.ranks):
            raise value_error(
                "NormParallel: groups of this norm would lie on several ranks.",
                got=f"{type(module).__name__} with {module.num_groups} groups, {sharing.ranks} ranks",
                needs=f"groups in a multiple of {sharing.ranks}, because the class has a forward of its own",
                fix="nn.GroupNorm, fewer ranks, or leave it out of the plan",
            )
        return _share(module, sharing, tp_norm.ByChannel, self)


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


_classes: dict[tuple[type, type[nn.Module]], type[nn.Module]] = {}  # made once: equal layers have one type


def _in_front(mixin: type[nn.Module], kind: type[nn.Module], **fields: Any) -> type[nn.Module]:
    """Return the class of a layer with `mixin` before its own."""
    if (mixin, kind) not in _classes:
        name = f"{mixin.__name__.removesuffix('Module')}{kind.__name__}"
        _classes[mixin, kind] = type(name, (mixin, kind), fields)
    return _classes[mixin, kind]


def _parallelize(module: nn.Module, sharing: Sharing, style: Any) -> nn.Module:
    _check_module(module, sharing, type(style).__name__)
    op = next(NVFP4_CLASSES[base].op for base in type(module).__mro__ if base in NVFP4_CLASSES)
    module = _share(module, sharing, TensorParallelModule, style, op=op)
    rounding_seeds.share_stream(dist.get_process_group_ranks(sharing.group)[0])
    return module


def _share(module: nn.Module, sharing: Sharing, mixin: type[nn.Module], style: Any, **fields: Any) -> nn.Module:
    """Make a module's parameters, and buffers with an entry for each channel, DTensors, and put the class in front."""
    in_front = sharing.column != ("Transpose" in type(module).__name__)  # the cut axis of the weight is its first
    if mixin is tp_norm.ByChannel:
        in_front = True
    places = {"weight": Shard(0 if in_front else 1), "bias": Shard(0) if sharing.column else Replicate()}

    def shared(name: str, tensor: Tensor) -> Any:
        # Not every version of torch gives styles a src_data_rank.
        source = getattr(style, "src_data_rank", 0)
        return distribute_tensor(tensor, sharing.mesh, [places.get(name, Shard(0))], src_data_rank=source)

    # Lists, because the loops replace what they walk over.
    for name, parameter in list(module.named_parameters(recurse=False)):
        whole = shared(name, parameter)
        module.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.dim():  # all but a norm's count of batches
            module._buffers[name] = shared(name, buffer)
    # The class changes, not the module: parameters keep their names, and hooks stay.
    module.__class__ = _in_front(mixin, type(module), **fields)
    module.sharing = sharing  # type: ignore[assignment]
    return module


MIXINS = (TensorParallelModule, tp_norm.ByChannel)


def group_of(model: nn.Module) -> Any:
    """Return the process group over which a plan of this file has shared out layers of a model, or None."""
    return next((module.sharing.group for module in model.modules() if isinstance(module, MIXINS)), None)


def whole_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which the layers that a plan of this file has shared out are plain and whole.

    Every rank must call this.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if not isinstance(module, MIXINS):
            continue
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(p.full_tensor().detach(), p.requires_grad)  # type: ignore[attr-defined]
        for name, b in module._buffers.items():
            module._buffers[name] = b.full_tensor() if isinstance(b, DTensor) else b
        module.__class__ = type(module).__mro__[2]
        del module.__dict__["sharing"]
    return model


def _check_module(module: nn.Module, sharing: Sharing, style: str) -> None:
    kind, ranks = type(module), sharing.ranks
    if kind not in NVFP4_CLASSES and kind not in NVFP4_CLASSES.values():
        raise value_error(
            f"{style}: this module cannot be shared out.",
            got=kind.__name__,
            needs="nn.Linear, nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d, their NVFP4 modules, or nn.Embedding",
            fix="name the layers in the plan, and apply each plan once",
        )
    _check_mesh(sharing, style)
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


def _check_mesh(sharing: Sharing, style: str) -> None:
    if sharing.mesh.ndim != 1:
        raise value_error(
            f"{style}: a mesh of several dimensions.",
            got=f"{sharing.mesh}",
            needs="the one dimension over which channels are shared out",
            fix="parallelize_module(model, mesh['tp'], plan)",
        )
