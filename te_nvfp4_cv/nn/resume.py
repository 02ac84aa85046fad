"""Save and restore what a bit-exact resume needs beyond the model's state_dict, and count what delayed scales clip.

    state = extra_state(model);   extra_state(model, load=state);   saturated_blocks(model)

Refused: a state that something else wrote, or that does not fit the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.errors import check_module, value_error
from te_nvfp4_cv.layer import delayed_scaling
from te_nvfp4_cv.layer.delayed_scaling import DelayedScales, Key, Owner
from te_nvfp4_cv.layer.names import plain_name
from te_nvfp4_cv.ops.quantize import rounding_seeds

COMPUTED = "computed kernels"  # beside a module's name: the scales of kernels that it computes anew at each call
_STATE_VERSIONS = (1, 2)  # states of version 1 have no scales


def extra_state(model: nn.Module, load: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what a bit-exact resume needs beyond the model's state_dict and torch's random state, or restore it.

    This is the position in the stream of stochastic rounding on a CPU (on a GPU, torch's random state holds it), and
    the delayed tensor scales of each parameter, under its name without the parts that wrappers add.

    Args:
        load: A dict that this function returned before. The stream goes on at that position with those scales. Restore
            torch's random state first (torch.manual_seed or torch.set_rng_state).
    Returns:
        A dict that torch.load(weights_only=True) reads; with `load`, the state after loading.
    Raises:
        ValueError: The dict is of another kind or version, or its scales do not fit the model. Nothing is changed.
        RuntimeError: Torch has another seed than it had when the state was saved. Nothing is changed.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> model = torch.nn.Conv2d(16, 16, 3)
        >>> checkpoint = {"model": model.state_dict(), "nvfp4": nv.extra_state(model)}
        >>> nv.extra_state(model, load=checkpoint["nvfp4"]) == checkpoint["nvfp4"]
        True
    """
    check_module("extra_state", model, "extra_state(model, ...)")
    if load is not None:
        saved = _checked_state(load)
        before = rounding_seeds.state()
        rounding_seeds.set_state({"seed": saved["sr_seed"], "drawn": saved["sr_drawn"]})
        try:
            _load_scales(_named_weights(model), saved.get("scales", {}))
        except ValueError:  # all or nothing: the stream was set a line above
            rounding_seeds.set_state(before)
            raise
    now = rounding_seeds.state()
    return {
        "format": "te_nvfp4_cv",
        "version": _STATE_VERSIONS[-1],
        "sr_seed": now["seed"],
        "sr_drawn": now["drawn"],
        "scales": _scales_of(_named_weights(model)),
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


def _named_weights(model: nn.Module) -> dict[str, Tensor | nn.Module]:
    """Return, by plain name, what owns scales: tensors of parameters, and modules of the kernels that they compute.

    A shared one occurs once, under its first name.
    """
    found: dict[str, Tensor | nn.Module]
    found = {plain_name(name): delayed_scaling.owner(parameter) for name, parameter in model.named_parameters()}
    computed = {f"{plain_name(name)}.{COMPUTED}".lstrip("."): module for name, module in model.named_modules()}
    return found | computed


def saturated_blocks(model: nn.Module) -> dict[str, dict[str, int]]:
    """Return how many blocks delayed tensor scales have clipped so far, by layer and role.

    A few at the start, or after a jump of the loss, are harmless. If a number keeps growing, the amax of one step does
    not predict that of the next: use tensor_scale="current" for that layer. Layers without delayed scales are left
    out. Reading the counts waits for the GPU.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3))
        >>> with nv.nvfp4_autocast(nv.NVFP4BlockScaling(tensor_scale="delayed")):
        ...     model(torch.randn(16, 16, 8, 8)).square().mean().backward()
        >>> nv.saturated_blocks(model)
        {'0': {'input': 0, 'grad_output': 0}}
    """
    check_module("saturated_blocks", model, "saturated_blocks(model)")
    out: dict[str, dict[str, int]] = {}
    for name, parameter in _named_weights(model).items():
        if delayed_scaling.has_state(parameter):
            clipped = zip(delayed_scaling.ROWS, delayed_scaling.saturated(parameter), strict=True)
            counts = {role.value: n for role, n in clipped}
            # The name of the layer, which is "" if it is the whole model.
            path, _, last = name.rpartition(".")
            out[path if last == "weight" or (last == COMPUTED and path not in out) else name] = counts
    return out


# ---- delayed scales by the names of their weights -------------------------------------------------------------------


def _scales_of(weights: Mapping[str, Owner]) -> dict[str, Any]:
    """Return the states of named weights as a dict that torch.load(weights_only=True) reads."""
    out: dict[str, Any] = {}
    for name, w in weights.items():
        entries = [
            {"view": None if view is None else [*view], "e4m3_max": e4m3_max, "rht": rht, **scales.state()}
            for (view, e4m3_max, rht), scales in delayed_scaling.states_of(w).items()
        ]
        if entries:
            out[name] = {"shape": _shape(w), "entries": entries}
    return out


def _load_scales(weights: Mapping[str, Owner], saved: Mapping[str, Any]) -> None:
    """Replace the states of named weights by saved ones; a weight without a saved one starts fresh.

    Raises:
        ValueError: a state of a weight that is not there or has another shape, or a damaged one. Nothing is changed.
    """
    # All of it is built before anything is replaced, so that an error leaves the present states as they are.
    made: dict[str, dict[Key, DelayedScales]] = {}
    for name, entry in saved.items():
        if name not in weights:
            raise value_error(
                "extra_state: a saved scale belongs to a parameter that this model lacks.",
                got=f"{name!r}, for a model of {len(weights)} parameters",
                needs="the model that the state was saved from (wrappers do not matter)",
                fix="load it into that model, or leave load= out: scales then start by measuring",
            )
        try:
            shape, entries = tuple(entry["shape"]), list(entry["entries"])
            device = _device(weights[name])
            made[name] = {_key(e): DelayedScales.from_state(e["e4m3_max"], e, device) for e in entries}
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise value_error(
                f"extra_state: the saved scales of {name!r} are damaged.",
                got=f"{type(error).__name__}: {error}",
                needs="what nv.extra_state(model) gave",
                fix="use another checkpoint, or leave load= out: scales then start by measuring",
            ) from None
        if shape != _shape(weights[name]):
            raise value_error(
                f"extra_state: the parameter {name!r} has another shape than when its scales were saved.",
                got=f"{_shape(weights[name])}",
                needs=f"{shape}",
                fix="load it into the model that it was saved from",
            )
    delayed_scaling.replace_states(weights.values(), {weights[name]: states for name, states in made.items()})


def _shape(place: Owner) -> tuple[int, ...]:
    return tuple(place.shape) if isinstance(place, Tensor) else ()


def _device(place: Owner) -> torch.device:
    if isinstance(place, Tensor):
        return place.device
    return next((p.device for p in place.parameters()), torch.device("cpu"))


def _key(entry: Mapping[str, Any]) -> Key:
    view, sizes = entry["view"], ((2, 2), (2, 2), (2,))
    for name, size in zip(("used", "collected", "saturated"), sizes, strict=True):
        if tuple(entry[name].shape) != size:
            raise ValueError(f"{name} has the shape {tuple(entry[name].shape)}, not {size}")
    place = None if view is None else (int(view[0]), tuple(view[1]), tuple(view[2]))
    return (place, int(entry["e4m3_max"]), bool(entry["rht"]))
