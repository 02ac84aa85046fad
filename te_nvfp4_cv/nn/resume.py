"""nn.resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from te_nvfp4_cv.errors import check_module, value_error
from te_nvfp4_cv.layer import delayed_scaling
from te_nvfp4_cv.nn.names import plain_name
from te_nvfp4_cv.ops.quantize import rounding_seeds

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
            clipped = zip(delayed_scaling.ROWS, delayed_scaling.saturated(parameter), strict=True)
            counts = {role.value: n for role, n in clipped}
            out["" if name == "weight" else name.removesuffix(".weight")] = counts
    return out
