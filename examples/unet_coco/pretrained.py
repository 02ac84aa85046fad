"""Start a detector's body from trained weights (--backbone-weights).

    imagenet           torchvision's weights of that ResNet, from torch's cache or the network
    https://, file://  a state_dict that torch.hub downloads, once, into its cache
    FILE               a state_dict (.pt, .pth) or a .safetensors file, with the names that torchvision and timm use

The classifier (fc.*) is not used. Batch norms of the body are torchvision's FrozenBatchNorm2d, as in torchvision's own
detectors: their statistics were measured on large batches, and batches of detection are small. All weights are trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from te_nvfp4_cv.errors import runtime_error

from .initial import copy_all, plain_names, read_weights

UNUSED = ("fc.", ".num_batches_tracked")


def load_body(body: nn.Module, backbone: str, source: str) -> None:
    """Copy pretrained weights into a ResNet without classifier.

    Args:
        backbone: "resnet18" and so on.
        source: "imagenet", a URL, or the path of a file.
    Raises:
        ValueError: If the file cannot be read, or a tensor is missing, unexpected, of another shape or not finite.
        RuntimeError: If the weights cannot be downloaded.
    """
    what = f"--backbone-weights: {source}"
    found = plain_names(_read(backbone, source).items(), what)
    used = {name: t for name, t in found.items() if not name.startswith(UNUSED[0]) and not name.endswith(UNUSED[1])}
    wanted = plain_names(body.state_dict(keep_vars=True).items(), what)
    copy_all(wanted, used, what, f"name weights of a {backbone}, or the --backbone that they are of")


def _read(backbone: str, source: str) -> dict[str, Tensor]:
    of_torchvision: Any = get_model_weights(backbone).DEFAULT if source == "imagenet" else None
    if of_torchvision is None and "://" not in source:
        return read_weights(Path(source), "--backbone-weights")
    url = of_torchvision.url if of_torchvision is not None else source
    checked = of_torchvision is not None  # the names of torchvision's files end in a part of their digest
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=checked, weights_only=True)
    except (URLError, OSError, ValueError, RuntimeError) as error:
        cache = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
        raise runtime_error(
            f"--backbone-weights {source} cannot be had.",
            got=f"{type(error).__name__}: {error}",
            needs=f"{url}, or that file in torch's cache: {cache}",
            fix="download it where there is a network and copy it there, or name the file: --backbone-weights FILE",
        ) from error
