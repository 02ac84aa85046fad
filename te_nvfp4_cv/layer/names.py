"""Name modules as the user wrote them, whatever wraps the model: DDP, torch.compile, FSDP, activation checkpointing."""

from __future__ import annotations

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # DDP, compile, ...


def plain_name(name: str) -> str:
    """Return a module's name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
