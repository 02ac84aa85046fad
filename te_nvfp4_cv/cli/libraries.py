"""Build networks that timm and Hugging Face's transformers know by name, with their trained weights.

    timm:NAME              timm.create_model(NAME, pretrained=True), without weights if --checkpoint gives them
    transformers:NAME      AutoModelForImageClassification.from_pretrained(NAME); NAME may be a folder

The weights come from where the library keeps them: its cache, a folder, or the network if there is one. Nothing is
looked for elsewhere.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from torch import nn

from te_nvfp4_cv.cli.torchvision_ops import ensure_torchvision
from te_nvfp4_cv.errors import need_package, value_error

LIBRARIES = ("timm", "transformers")


def library_of(name: str) -> tuple[str, str] | None:
    """Return (library, name there) of a MODEL that names a library's network; else None."""
    library, colon, inside = name.partition(":")
    return (library, inside) if colon and library in LIBRARIES and inside else None


def builder_of(library: str, name: str, pretrained: bool = True) -> Callable[[], nn.Module]:
    """Return a function that builds a library's network.

    Args:
        pretrained: with the library's weights.
    Raises:
        RuntimeError: The library is not installed.
    """
    if importlib.util.find_spec("torchvision") is not None:
        ensure_torchvision()  # both import it, and its wheels are built for CUDA
    need_package(library, f"MODEL {library}:{name}: no {library} here.", needs="it", fix=f"pip install {library}")

    def build() -> nn.Module:
        make = _timm if library == "timm" else _transformers
        try:
            return make(name, pretrained)
        except Exception as error:  # of the library, of its hub, of the network
            raise value_error(
                f"MODEL {library}:{name} cannot be built.",
                got=" ".join(f"{type(error).__name__}: {error}".split())[:300],
                needs=f"a network that {library} knows, and its weights in the library's cache or over the network",
                fix="correct the name; --checkpoint FILE for weights that are here"
                if library == "timm" else "correct the name, or give the folder with config.json and the weights",
            ) from error

    return build


def _timm(name: str, pretrained: bool) -> nn.Module:
    import timm

    made: nn.Module = timm.create_model(name, pretrained=pretrained)
    return made


def _transformers(name: str, pretrained: bool) -> nn.Module:
    from transformers import AutoConfig, AutoModelForImageClassification

    if pretrained:
        made: nn.Module = AutoModelForImageClassification.from_pretrained(name)
    else:
        made = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(name))
    return made


def image_processor(name: str) -> Any:
    """Return how transformers prepares pictures for a network, as a dict; None if it does not say."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name).to_dict()
    except (OSError, ValueError):  # without preprocessor_config.json
        return None
