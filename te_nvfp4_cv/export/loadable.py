"""Check that torch can put a file's tensors into a model without losing or changing any of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.export.manifest import join
from te_nvfp4_cv.layer.names import plain_name


def check_loadable(model: nn.Module) -> None:
    """Refuse a model in which some tensors would stay as they are, or without values. Nothing in it changes.

    Raises:
        ValueError: A buffer on the meta device is outside of the state_dict, or a name in the state_dict means nothing
            to torch's load_state_dict.
    """
    lost = [
        join(name, key)
        for name, module in model.named_modules()
        # torch tells non-persistent buffers apart in this private set only.
        for key in module._non_persistent_buffers_set
        if (buffer := module._buffers.get(key)) is not None and buffer.is_meta
    ]
    if lost:
        raise value_error(
            "nv.export.load: buffers on the meta device are in no file.", got=listed(lost),
            needs="a model whose buffers outside of the state_dict have values", fix="build it on the CPU",
        )
    own = model.state_dict()
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    if all(name in known or name.endswith("_extra_state") for name in own):
        return
    # Hooks may give a name back its meaning, as wrappers' do. So the model's tensors are loaded into themselves.
    unknown = nn.Module.load_state_dict(model, own, strict=False).unexpected_keys
    if unknown:
        raise value_error(
            "nv.export.load: the model's state_dict has names that torch's load_state_dict does not know.",
            got=listed(unknown),
            needs="a class whose state_dict() keeps the names of Parameters and buffers, or hooks that put them back",
            fix="register_load_state_dict_pre_hook in place of a load_state_dict of the class",
        )


def other_numbers(tensors: Mapping[str, Tensor], own: Mapping[str, Any]) -> list[str]:
    """List tensors of a file that are numbers of another kind than the model's: copying would convert them silently.

    Args:
        tensors: those that are copied as they are.
        own: the model's state_dict.
    """
    kinds = {plain_name(name): _kind(value.dtype) for name, value in own.items() if isinstance(value, Tensor)}
    return [
        f"{name}: {t.dtype} in the file" for name, t in tensors.items()
        if name in kinds and kinds[name] != _kind(t.dtype)
    ]


def _kind(dtype: torch.dtype) -> str:
    return "complex" if dtype.is_complex else "real" if dtype.is_floating_point else "integer"


def listed(names: list[str], most: int = 8) -> str:
    """Return names as one text, of which the last ones are only counted."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
