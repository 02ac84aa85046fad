"""The table of all models, by library, and those that need no package beside this project's own."""

from __future__ import annotations

import itertools

from te_nvfp4_cv.cli.trial.subject import Subject
from zoo import from_medical, from_others, from_timm, from_torchvision, from_transformers

TABLES = (from_torchvision, from_timm, from_transformers, from_medical, from_others)
MODELS: dict[str, Subject] = {name: subject for table in TABLES for name, subject in table.MODELS.items()}

# Each takes a few seconds and needs torchvision alone, so the tests run them.
LIGHT = tuple(
    f"torchvision/{name}"
    for name in (
        "resnet18", "squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5",
        "regnet_y_400mf", "densenet", "densenet, memory_efficient", "vit", "swin", "lraspp_mobilenet_v3_large",
    )
)


def library_of(name: str) -> str:
    """Return the library that a model is from: what stands before the slash."""
    return name.partition("/")[0]


def in_turn(names: list[str]) -> list[str]:
    """Sort names so that libraries take turns: a run that is cut short has seen something of each."""
    by_library: dict[str, list[str]] = {}
    for name in names:
        by_library.setdefault(library_of(name), []).append(name)
    return [name for turn in itertools.zip_longest(*by_library.values()) for name in turn if name is not None]
