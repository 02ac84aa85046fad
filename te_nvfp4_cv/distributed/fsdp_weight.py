"""Weights that FSDP2 sends in 4 bits: the shard that a rank has, and the whole weight as it arrives.

    ShardedWeight    a rank's rows in high precision. FSDP2 asks it what to gather: packed 16x16-scaled codes of them;
                     the tiles' amaxes are shared before, by one all-reduce: all shards have the scales of the whole
    GatheredWeight   what FSDP2 then sets as the module's parameter: codes and scales, no values. Quantized layers take
                     the codes as they are; every other operator sees dequantized values

The codes are those that a single process makes of the whole weight, bit for bit. They lie in FSDP2's own buffers, which
it frees after a layer's forward and fills again before its backward: what autograd keeps of a weight are views of them.
A shard behaves as the plain tensor that it holds; operators that FSDP2, optimizers and checkpoints apply to it keep or
drop the wrapper as KEEP says. Uneven shards, which FSDP2 gathers padded, travel in high precision, with a warning.
nv.fsdp.quantize_gathers makes both; see there for what is refused.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from te_nvfp4_cv import formats
from te_nvfp4_cv.backend import devices
from te_nvfp4_cv.backend.torch_private import tree_leaves, tree_map_only, wrapper_subclass
from te_nvfp4_cv.errors import runtime_error, warn_once
from te_nvfp4_cv.layer import custom_op
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.layouts import contiguous
from te_nvfp4_cv.ops.quantize import amax as amaxes
from te_nvfp4_cv.ops.quantize import weight_shards
from te_nvfp4_cv.ops.quantize.operand import unpack_weight
from te_nvfp4_cv.ops.records import Face, WeightCodes, WeightLayout

aten = torch.ops.aten
VIEWS = {
    *(aten.alias.default, aten.as_strided.default, aten.detach.default, aten.slice.Tensor, aten.split.Tensor),
    *(aten.view.default, aten.copy_.default),
}
KEEP = {  # of a shard: what FSDP2 does to make, move and pad it
    *VIEWS,
    *(aten.clone.default, aten._to_copy.default, aten._pin_memory.default, aten.empty_like.default),
    aten.new_zeros.default,
}
FACTORIES = {  # of a whole weight: tensors like it, without its values
    *(aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.new_empty.default),
    *(aten.new_zeros.default, aten.new_empty_strided.default),
}


@dataclass(frozen=True, eq=False)
class Form:
    """Says how a weight is quantized for its gather, and by what name errors call it.

    `owner` is a tensor of the whole shape without its memory. It stands for the weight where state is kept by identity
    (delayed scales). `routed`: the weight [E, O, C] of experts, which are its groups; FSDP2 shards whole experts.
    """

    name: str
    groups: int
    pow2: bool
    owner: Tensor
    routed: bool = False

    @property
    def settings(self) -> tuple[Any, ...]:
        """Return what the codes mean."""
        return self.groups, self.pow2, self.routed


class ShardedWeight(torch.Tensor):
    """A weight in high precision, or a rank's rows of it, that FSDP2 gathers in NVFP4."""

    plain: Tensor  # shares the memory
    form: Form

    @staticmethod
    def __new__(cls, values: Tensor, form: Form) -> ShardedWeight:
        # FSDP2 asks a parameter for strides and offset: they must be those of the values.
        self = wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=values.device,
            requires_grad=values.requires_grad,
        )
        self.plain, self.form = values, form
        return self

    def __tensor_flatten__(self) -> tuple[list[str], Form]:
        return ["plain"], self.form

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], form: Form, size: Any, stride: Any) -> ShardedWeight:
        return ShardedWeight(inner["plain"], form)

    @property
    def state_owner(self) -> Tensor:
        """The tensor that stands for the whole weight where state is kept by identity."""
        return self.form.owner

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ShardedWeight({self.form.name!r}, {self.plain!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:  # type: ignore[override]
        forms: list[Form] = []

        def plain(x: ShardedWeight) -> Tensor:
            forms.append(x.form)
            return x.plain

        of_inference = bool(args) and isinstance(args[0], Tensor) and args[0].is_inference()
        # The form of the first shard among the arguments goes to the results.
        args, kwargs = tree_map_only(ShardedWeight, plain, (args, kwargs or {}))
        out = func(*args, **kwargs)
        if func not in KEEP:
            return out
        # A view is an inference tensor only if what it views is one; a wrapper would be one by being made there.
        with torch.inference_mode(of_inference if func in VIEWS else torch.is_inference_mode_enabled()):
            return tree_map_only(Tensor, lambda t: ShardedWeight(t, forms[0]), out)

    # ---- what FSDP2 calls -------------------------------------------------------------------------------------------

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Return what FSDP2 gathers, and what it hands on.

        These are (packed codes of this rank's rows,) and (scales of all tiles, amax, the whole shape). Uneven shards
        travel as (the rows, padded,), with (None, None, the whole shape).
        """
        # The caller is FSDP2's object for this parameter. Nothing that it passes says how it will be sharded again.
        self._refuse(outer_size, mesh.size(), sys._getframe(1).f_locals.get("self"))
        # A weight that stays whole after an evaluation, as FSDP2's root does, is saved by the next training forward.
        with torch.inference_mode(False), torch.no_grad():
            group, n, ranks = mesh.get_group(), outer_size[0], mesh.size()
            if n % ranks:
                return (self._padded(-(-n // ranks), mp_policy.param_dtype, ranks),), (None, None, tuple(outer_size))
            first, rows = mesh.get_local_rank() * (n // ranks), self.plain
            if self.form.routed:  # as the weight of a grouped convolution, [E * O, C]
                first, n, rows = first * rows.shape[1], n * rows.shape[1], rows.flatten(0, 1)
            # A 16x16 tile may lie in two shards, so ranks share the amaxes of tiles; the largest is the weight's.
            tiles = amaxes.reduce_amax(weight_shards.tile_amaxes(rows, first, n, self.form.groups), group)
            amax = tiles.amax().reshape(1)
            amax = formats.power_of_two_amax(amax) if self.form.pow2 else amax
            scales = weight_shards.tile_scales(tiles, amax)
            codes = weight_shards.quantize_rows(rows, first, n, self.form.groups, scales, amax)
            # After the all-reduce every rank has the same scales, so only codes need to travel.
            return (codes,), (scales, amax, tuple(outer_size))

    def _refuse(self, whole: Any, ranks: int, parameter: Any) -> None:
        """Refuse shards that are not rows, and those that FSDP2 would cut out of codes.

        Raises:
            RuntimeError: on every rank.
        """
        after = getattr(getattr(parameter, "post_forward_mesh_info", None), "shard_mesh_size", ranks)
        got = None
        if self.plain.numel() and self.plain.shape[1:] != whole[1:]:
            got = f"a shard {tuple(self.plain.shape)} of {tuple(whole)}"
        elif after != ranks:
            got = f"reshard_after_forward={after} on {ranks} ranks"
        if got is not None:
            raise runtime_error(
                f"nvfp4: the weight {self.form.name!r} cannot be gathered in 4 bits as it is sharded.",
                got=got,
                needs="shards along axis 0, and reshard_after_forward=True or False",
                fix="leave the weight out by filter_fn of nv.fsdp.quantize_gathers, or shard it so",
            )

    def _padded(self, rows: int, dtype: torch.dtype | None, ranks: int) -> Tensor:
        """Return the rows in FSDP2's gathered dtype, with zero rows at the end."""
        warn_once(
            f"uneven {self.form.name}",
            f"nvfp4: {self.form.name!r} cannot be cut into {ranks} even shards: it is gathered in high precision",
        )
        padded = self.plain.new_zeros((rows, *self.shape[1:]), dtype=dtype or self.dtype)
        padded[: self.shape[0]] = self.plain
        return padded

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: tuple[Any, ...], param_dtype: torch.dtype, *, out: Any = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Return the whole weight in the nominal dtype that FSDP2 wants, or fill `out`, the same object, again."""
        (codes,), (scales, amax, shape) = outputs, metadata
        if scales is not None:  # made on FSDP2's copy-in stream, where the next prefetch may get their memory
            devices.used_here((scales, amax))
        if scales is None:
            return (codes[: shape[0]], ()) if out is None else None  # the values: FSDP2 has written them where they lie
        if out is not None:
            out.refill(codes, scales, amax)
            return None
        return GatheredWeight(codes, scales, amax, shape, param_dtype, self.form), ()


class GatheredWeight(torch.Tensor):
    """A whole weight [axis 0, axis 1, *kernel]: packed codes [axis 0, T, Kb * 8], scales [G, Ob, T, Kb], amax [1]."""

    _codes: Tensor
    _scales: Tensor
    _amax: Tensor
    form: Form

    @staticmethod
    def __new__(
        cls, codes: Tensor, scales: Tensor, amax: Tensor, shape: tuple[int, ...], dtype: torch.dtype, form: Form
    ) -> GatheredWeight:
        self = wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)
        self._codes, self._scales, self._amax, self.form = codes, scales, amax, form
        return self

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["_codes", "_scales", "_amax"], (tuple(self.shape), self.dtype, self.form)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], how: tuple[Any, ...], size: Any, stride: Any) -> GatheredWeight:
        return GatheredWeight(inner["_codes"], inner["_scales"], inner["_amax"], *how)

    @classmethod
    def __metadata_guard__(cls, one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
        """Return True if a graph that was made for one weight serves another: torch.compile asks for it."""
        return one[:2] == other[:2] and one[2].settings == other[2].settings

    @property
    def state_owner(self) -> Tensor:
        """The tensor that stands for the whole weight where state is kept by identity."""
        return self.form.owner

    @property
    def parts(self) -> list[Tensor]:
        """Return codes, scales and amax."""
        return [self._codes, self._scales, self._amax]

    def refill(self, codes: Tensor, scales: Tensor, amax: Tensor) -> None:
        """Take the codes of another gather; FSDP2 has written them where this weight's codes lie."""
        # The object stays: the module and autograd hold it.
        if codes.data_ptr() != self._codes.data_ptr():
            self._codes = codes
        self._scales, self._amax = scales, amax

    def codes_for(self, plan: Plan) -> WeightCodes:
        """Return the codes of the whole weight for a layer's call.

        Raises:
            RuntimeError: the layer runs with another recipe than the weight was gathered for.
        """
        s, problem = plan.weight, None
        other = plan.recipe.block_format != "nvfp4"
        if other or not s.two_d or s.four_over_six is not None or s.pow2 != self.form.pow2:
            problem = f"recipe {plan.recipe!r}"
        elif plan.expert_scales:
            problem = f"recipe {plan.recipe!r}: a tensor scale for each expert"
        elif plan.geometry.groups != self.form.groups:
            problem = f"groups={plan.geometry.groups}"
        elif not {"fprop", "dgrad"} <= set(plan.gemms):
            problem = f"recipe {plan.recipe!r}: a GEMM on the weight in high precision"
        if problem is not None:
            scales = "'delayed' or 'current_pow2'" if self.form.pow2 else "'current'"
            raise runtime_error(
                f"nvfp4: the weight {self.form.name!r} was gathered in 4 bits for another recipe.",
                got=problem,
                needs=f"NVFP4, 16x16 scales without 4over6, tensor_scale {scales}, fprop and dgrad in NVFP4, "
                f"groups={self.form.groups}",
                fix="give nv.fsdp.quantize_gathers the recipe with which the model trains",
            )
        return WeightCodes.of_face("row", Face(self._codes, self._scales), self._amax)

    def dequantized(self) -> Tensor:
        """Return the values, of the logical shape, in the nominal dtype."""
        n, channels, *kernel = self.shape
        if self.form.routed:
            n, channels, kernel = n * channels, kernel[0], []
        layout = WeightLayout(n, channels, self.form.groups, columnwise=False)
        # The reference runs on each device; this path is for readers outside of NVFP4 layers, where speed matters less.
        w = unpack_weight(Face(self._codes, self._scales), layout, None, torch.float32, "reference")
        w = w * (self._amax * (1.0 / (formats.E2M1_MAX * formats.E4M3_MAX)))
        if self.form.routed:
            return w.view(self.shape).to(self.dtype)
        return contiguous(w.view(n, *kernel, channels).movedim(-1, 1).to(self.dtype))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GatheredWeight({self.form.name!r}, {tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        first: Any = args[0] if args else None
        # FSDP2 and autograd make such aliases; they share the codes. A view to another shape would cut tiles.
        copies = func in (aten.detach.default, aten.alias.default)
        if copies or (func in (aten.as_strided.default, aten.view.default) and tuple(args[1]) == tuple(first.shape)):
            # A view is an inference tensor only if what it views is one; a wrapper would be one by being made there.
            with torch.inference_mode(first.is_inference()):
                return cls(first._codes, first._scales, first._amax, tuple(first.shape), first.dtype, first.form)
        if func is torch.ops.te_nvfp4_cv.layer.default:  # a graph of torch.compile
            return custom_op.layer_of_gathered(*args, **kwargs)
        if func is torch.ops.te_nvfp4_cv.layer_backward.default:
            return custom_op.backward_of_gathered(*args, **kwargs)
        if func in FACTORIES and isinstance(first, cls):
            like = torch.empty((), dtype=first.dtype, device=first.device).expand(first.shape)
            # Expanded from one element, `like` has strides of 0, which a result must not take over.
            if func in (aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default):
                kwargs = {"memory_format": torch.contiguous_format} | kwargs
            return func(like, *args[1:], **kwargs)
        names = ", ".join(sorted({x.form.name for x in tree_leaves((args, kwargs)) if isinstance(x, cls)}))
        warn_once(
            f"gathered {names}",
            f"nvfp4: {names} was gathered in 4 bits and is read by {func}, outside of an NVFP4 layer: that sees its "
            "dequantized values. Leave it out of nv.fsdp.quantize_gathers (its recipe's [precision] table, or "
            "filter_fn) if it must stay in high precision",
        )
        args, kwargs = tree_map_only(GatheredWeight, lambda x: x.dequantized(), (args, kwargs))
        return func(*args, **kwargs)
