"""Precision per module, weights quantized once for gradient accumulation, and the state of a bit-exact resume.

    set_precision(model, {"stem": None, "head.*": None, "layer4.*": recipe})    None: high precision
    with frozen_weights(model): several forward and backward passes, one optimizer step after
    state = extra_state(model);   extra_state(model, load=state);   saturated_blocks(model)

set_precision's entries are pairs of module forward hooks: they survive deepcopy and pickling, put nothing into
state_dict, and act only inside an enabled nvfp4_autocast. While a module with an entry runs, its entry rules everything
that runs inside it; a child's own entry rules in the child.
Refused: a pattern that matches no module, a weight that changes while it is frozen, the state of something else.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from te_nvfp4_cv.context.state import mark_applied, pop_override, push_override
from te_nvfp4_cv.errors import check_module, runtime_error, type_error, value_error
from te_nvfp4_cv.layer import delayed_scaling, forward_backward, operands
from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.quantize import rounding_seeds
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, as_recipe

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # DDP, compile, ...


def plain_name(name: str) -> str:
    """A module's name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


# ---- set_precision --------------------------------------------------------------------------------------------------


class _Enter:
    """Forward pre-hook: the module's entry starts to rule."""

    def __init__(self, recipe: NVFP4BlockScaling | None) -> None:
        self.recipe = recipe
        self.hook_id = -1

    def __call__(self, module: nn.Module, args: Any) -> None:
        push_override(self.recipe, module)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _reserve(self.hook_id)


class _Leave:
    """Forward hook, called after an exception too: the module's entry ends."""

    def __init__(self) -> None:
        self.hook_id = -1

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        pop_override(module)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _reserve(self.hook_id)


def _reserve(hook_id: int) -> None:
    """An unpickled hook keeps its id: let torch give no other hook of this process the same one."""
    RemovableHandle.next_id = max(RemovableHandle.next_id, hook_id + 1)


def set_precision(model: nn.Module, table: Any) -> None:
    """Give modules a recipe of their own, or high precision.

    Acts inside an enabled nvfp4_autocast only, and wins over a module's recipe and the context's. A further call
    replaces the entries of the modules that it matches. A model that torch.compile has compiled already does not
    notice: call it before.

    Args:
        table: {pattern: None for high precision, or a recipe}, or a recipe whose [precision] table is applied (where it
            has one). Patterns are fnmatch patterns over model.named_modules() without the parts that wrappers add
            ("module.", "_orig_mod."). A match covers the module's children, except those with an entry of their own;
            where several patterns match a module, the last wins.
    Raises:
        ValueError: a pattern that matches nothing, a recipe inside the table that has a table itself. Nothing is
            changed then.
        TypeError: no module, neither a table nor a recipe.
    """
    check_module("set_precision", model, "set_precision(model, ...)")
    entries = matches(model, _pairs(table))
    for module, recipe in entries.items():
        _remove(module)
        enter, leave = _Enter(recipe), _Leave()
        enter.hook_id = module.register_forward_pre_hook(enter, prepend=True).id
        leave.hook_id = module.register_forward_hook(leave, always_call=True).id
    if not isinstance(table, Mapping):
        mark_applied(as_recipe(table))


def _remove(module: nn.Module) -> None:
    for hooks, kind in ((module._forward_pre_hooks, _Enter), (module._forward_hooks, _Leave)):
        for hook_id in [hook_id for hook_id, hook in hooks.items() if isinstance(hook, kind)]:
            del hooks[hook_id]
            module._forward_hooks_always_called.pop(hook_id, None)


def entries_of(module: nn.Module) -> list[NVFP4BlockScaling | None]:
    """The module's own set_precision entry, in a list; an empty one where it has none."""
    return [hook.recipe for hook in module._forward_pre_hooks.values() if isinstance(hook, _Enter)]


def _pairs(table: Any) -> list[tuple[str, NVFP4BlockScaling | None]]:
    if not isinstance(table, Mapping):
        recipe = as_recipe(table)
        recipe.validate_for_use()
        return list(recipe.precision)
    pairs: list[tuple[str, NVFP4BlockScaling | None]] = []
    for pattern, value in table.items():
        own = None if value is None else as_recipe(value)
        if not isinstance(pattern, str):
            raise type_error(
                "set_precision: a pattern is no string.",
                got=repr(pattern),
                needs='names of modules, such as "layer4.*"',
                fix="take the names of model.named_modules()",
            )
        if own is not None:
            own.validate_for_use()
            if own.precision:
                raise value_error(
                    f"set_precision: the recipe for {pattern!r} has a [precision] table of its own.",
                    got=f"{own!r}",
                    needs="a recipe without a table: one table rules the model",
                    fix="dataclasses.replace(recipe, precision=())",
                )
        pairs.append((pattern, own))
    return pairs


def matches(
    model: nn.Module, pairs: list[tuple[str, NVFP4BlockScaling | None]]
) -> dict[nn.Module, NVFP4BlockScaling | None]:
    """The modules that the patterns name, with their entries.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    named = [(name, plain_name(name), module) for name, module in model.named_modules(remove_duplicate=False)]
    entries: dict[nn.Module, NVFP4BlockScaling | None] = {}
    for pattern, recipe in pairs:
        found = [m for raw, plain, m in named if any(fnmatch.fnmatchcase(n, pattern) for n in (plain, raw))]
        if not found:
            names = list(dict.fromkeys(plain for _, plain, _ in named if plain))
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
            fix = f"did you mean {', '.join(map(repr, close))}?" if close else f"names are {', '.join(names[:6])}, ..."
            raise value_error(
                f"set_precision: the pattern {pattern!r} matches no module.",
                got=f"{pattern!r} for a model of {len(names)} named modules",
                needs="a name or fnmatch pattern of model.named_modules()",
                fix=fix if names else "the model has no submodules",
            )
        for module in found:
            entries.pop(module, None)
            entries[module] = recipe
    return entries


# ---- frozen weights -------------------------------------------------------------------------------------------------

_frozen_lock = threading.Lock()


class _FrozenWeight:
    """One Parameter inside frozen_weights: its codes, one set for each way in which the calls quantize it."""

    def __init__(self, name: str, weight: Tensor) -> None:
        self.name, self.weight, self.users = name, weight, 0
        self.version = weight._version
        self.digest: bytes | None = None
        self.sets: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}

    def codes(self, w: Tensor, plan: Plan) -> tuple[Tensor, ...]:
        """The weight's codes, made at the first use."""
        self.check_version()
        key = (
            plan.geometry.groups,
            plan.recipe.settings("weight"),
            plan.weight_faces,
            plan.compute_dtype,
            plan.backend,
        )
        if key not in self.sets:
            if self.digest is None:
                self.digest = _digest(w)
            self.sets[key] = operands.quantize_weight(w, plan, keep=True)
        return self.sets[key]

    def check_version(self) -> None:
        """Raise if torch has counted a change."""
        if self.weight._version != self.version:
            raise _changed(self.name, "it was written to (an optimizer step, an in-place operation, load_state_dict)")

    def check_contents(self) -> None:
        """Raise if anything has changed, also through .data or a fused optimizer, which torch does not count."""
        self.check_version()
        if self.digest is not None and _digest(self.weight) != self.digest:
            raise _changed(self.name, "its contents differ (written through .data, or by a fused optimizer)")


def _digest(w: Tensor) -> bytes:
    data = w.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
    return hashlib.blake2b(data.numpy().data, digest_size=16).digest()


def _changed(name: str, how: str) -> RuntimeError:
    return runtime_error(
        f"nvfp4 frozen_weights: the weight {name!r} changed inside.",
        got=how,
        needs="weights that stay as they are: their codes were made at their first use",
        fix="call optimizer.step() and load weights after the with block",
    )


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """Quantize each weight once, at its first use inside, and reuse the codes: for gradient accumulation.

    The results are the same bits as without.

    Args:
        model: its Parameters with two or more axes are meant; a weight that is computed (parametrized, a slice) is
            quantized at every use.
    Raises:
        RuntimeError: a weight changed inside: at its next use where torch counts the change, otherwise at the end.
    """
    check_module("frozen_weights", model, "frozen_weights(model)")
    weights = {id(w): (name, w) for name, w in model.named_parameters() if w.dim() >= 2}
    with _frozen_lock:
        for key, (name, w) in weights.items():
            entry = forward_backward.frozen.setdefault(key, _FrozenWeight(name, w))
            entry.users += 1  # type: ignore[attr-defined]
    try:
        yield
        present = {id(w) for w in model.parameters()}
        for key, (name, _) in weights.items():
            if key not in present:
                raise _changed(name, "the module has another Parameter now")
            forward_backward.frozen[key].check_contents()  # type: ignore[attr-defined]
    finally:
        with _frozen_lock:
            for key in weights:
                entry = forward_backward.frozen[key]
                entry.users -= 1  # type: ignore[attr-defined]
                if not entry.users:  # type: ignore[attr-defined]
                    del forward_backward.frozen[key]


# ---- resume ---------------------------------------------------------------------------------------------------------

_STATE_VERSIONS = (1, 2)  # 1 had no scales


def extra_state(model: nn.Module, load: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a bit-exact resume needs beyond the model's state_dict and torch's random state.

    That is the place in the stream of stochastic rounding on a CPU (on a GPU, torch's random state holds it), and the
    delayed tensor scales of each parameter, under its name without the parts that wrappers add.

    Args:
        load: a dict that this function gave before; that place is continued, and the scales are those. Restore torch's
            random state first (torch.manual_seed or torch.set_rng_state).
    Returns:
        A dict that torch.load(weights_only=True) reads; with `load`, the state as it is then.
    Raises:
        ValueError: a dict of another kind or version, scales that do not fit the model; RuntimeError: torch is seeded
            otherwise than it was then. Nothing is changed then.
    """
    check_module("extra_state", model, "extra_state(model, ...)")
    if load is not None:
        saved = _checked_state(load)
        before = rounding_seeds.state()
        rounding_seeds.set_state({"seed": saved["sr_seed"], "drawn": saved["sr_drawn"]})
        try:
            delayed_scaling.load(_named_weights(model), saved.get("scales", {}))
        except ValueError:
            rounding_seeds.set_state(before)
            raise
    now = rounding_seeds.state()
    return {
        "format": "te_nvfp4_cv",
        "version": _STATE_VERSIONS[-1],
        "sr_seed": now["seed"],
        "sr_drawn": now["drawn"],
        "scales": delayed_scaling.save(_named_weights(model)),
    }


def _checked_state(load: object) -> Mapping[str, Any]:
    if (
        not isinstance(load, Mapping)
        or load.get("format") != "te_nvfp4_cv"
        or any(type(load.get(key)) is not int for key in ("version", "sr_seed", "sr_drawn"))
        or not isinstance(load.get("scales", {}), Mapping)
    ):
        raise value_error(
            "extra_state: this is not what extra_state saved.",
            got=f"{load!r:.120}",
            needs='{"format": "te_nvfp4_cv", "version": int, "sr_seed": int, "sr_drawn": int, "scales": dict}',
            fix="save nv.extra_state(model) in the checkpoint beside model.state_dict()",
        )
    if load["version"] not in _STATE_VERSIONS:
        raise value_error(
            "extra_state: another version of the library wrote this.",
            got=f"version {load['version']}",
            needs=f"one of the versions {_STATE_VERSIONS}",
            fix="resume with the version of te_nvfp4_cv that wrote the checkpoint",
        )
    return load


def _named_weights(model: nn.Module) -> dict[str, Tensor]:
    """By plain name, what the state of each parameter is kept for; a shared one once, under its first name."""
    return {plain_name(name): delayed_scaling.owner(parameter) for name, parameter in model.named_parameters()}


def saturated_blocks(model: nn.Module) -> dict[str, dict[str, int]]:
    """Blocks that delayed tensor scales have clipped so far, by layer: {"conv1": {"input": 0, "grad_output": 0}}.

    A few at the start, or after a jump of the loss, are harmless; numbers that grow say that the amax of one step does
    not foretell the next one's: use tensor_scale="current" for that layer. Layers without delayed scales are left out.
    Reading waits for the GPU.
    """
    check_module("saturated_blocks", model, "saturated_blocks(model)")
    out: dict[str, dict[str, int]] = {}
    for name, parameter in _named_weights(model).items():
        if delayed_scaling.has_state(parameter):
            counts = dict(zip(delayed_scaling.ROLES, delayed_scaling.saturated(parameter), strict=True))
            out["" if name == "weight" else name.removesuffix(".weight")] = counts
    return out
