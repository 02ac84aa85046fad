"""Train convolutional networks in NVFP4.

    import te_nvfp4_cv as nv
    nvfp4 = nv.prepare(model, "resnet")
    with nvfp4:
        loss = criterion(model(x), y)
"""

import importlib
import importlib.util
import sys
import typing

from te_nvfp4_cv import distributed, fsdp, functional
from te_nvfp4_cv.context.context_manager import active_recipe, capture, nvfp4_autocast
from te_nvfp4_cv.fusion.fuse import fuse
from te_nvfp4_cv.fusion.modules import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, GroupNormAct
from te_nvfp4_cv.nn.convert import convert_model
from te_nvfp4_cv.nn.frozen_weights import frozen_weights
from te_nvfp4_cv.nn.learned import learn_scales
from te_nvfp4_cv.nn.modules import (
    NVFP4Conv1d,
    NVFP4Conv2d,
    NVFP4Conv3d,
    NVFP4ConvTranspose1d,
    NVFP4ConvTranspose2d,
    NVFP4ConvTranspose3d,
    NVFP4GroupedLinear,
    NVFP4Linear,
)
from te_nvfp4_cv.nn.precision import clear_precision, set_precision
from te_nvfp4_cv.nn.prepare import prepare
from te_nvfp4_cv.nn.resume import extra_state, saturated_blocks
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, QParams
from te_nvfp4_cv.recipe.files import list_recipes, load_recipe, save_recipe
from te_nvfp4_cv.report import flops as _flops  # noqa: F401  (it teaches torch's FLOP counter our operators)
from te_nvfp4_cv.report.watch import coverage
from te_nvfp4_cv.tensor.gemm import gemm
from te_nvfp4_cv.tensor.nvfp4_tensor import NVFP4Tensor
from te_nvfp4_cv.tensor.quantizer import NVFP4Quantizer
from te_nvfp4_cv.version import __version__ as __version__

autocast = nvfp4_autocast  # as torch.autocast is called

# Pickles made by version 0.1 name these modules, which have moved since. Without the old names they would not load.
sys.modules |= {
    f"{__name__}.{old}": sys.modules[f"{__name__}.{new}"]
    for old, new in {
        "coverage_report": "report.table",
        "fuse": "fusion.fuse",
        "learned": "nn.learned",
        "modules": "nn.modules",
        "norm_modules": "fusion.modules",
        "ops.quantize.quantizer": "tensor.quantizer",
        "policy": "nn.precision",
    }.items()
}

# These modules need more than the core, so each is imported when it is first asked for.
_LAZY = ("export", "lightning", "sensitivity", "spatial_parallel", "telemetry", "tensor_parallel", "te_plugin")

if typing.TYPE_CHECKING:  # type checkers and editors read this; the function below would tell them that any name exists
    from te_nvfp4_cv import export as export
    from te_nvfp4_cv import lightning as lightning
    from te_nvfp4_cv import sensitivity as sensitivity
    from te_nvfp4_cv import spatial_parallel as spatial_parallel
    from te_nvfp4_cv import te_plugin as te_plugin
    from te_nvfp4_cv import telemetry as telemetry
    from te_nvfp4_cv import tensor_parallel as tensor_parallel
else:

    def __getattr__(name: str) -> object:
        if name in _LAZY:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, for dir() and completion; `lightning` only where PyTorch Lightning is installed."""
    # help() and inspect read every name listed here, and importing nv.lightning without Lightning raises an error.
    have_lightning = any(importlib.util.find_spec(package) for package in ("lightning", "pytorch_lightning"))
    lazy = [name for name in _LAZY if name != "lightning" or have_lightning]
    return sorted([*__all__, *lazy, "__version__"])


__all__ = [
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "GroupNormAct",
    "NVFP4BlockScaling",
    "NVFP4Conv1d",
    "NVFP4Conv2d",
    "NVFP4Conv3d",
    "NVFP4ConvTranspose1d",
    "NVFP4ConvTranspose2d",
    "NVFP4ConvTranspose3d",
    "NVFP4GroupedLinear",
    "NVFP4Linear",
    "NVFP4Quantizer",
    "NVFP4Tensor",
    "QParams",
    "active_recipe",
    "autocast",
    "capture",
    "clear_precision",
    "convert_model",
    "coverage",
    "distributed",
    "extra_state",
    "frozen_weights",
    "fsdp",
    "functional",
    "fuse",
    "gemm",
    "learn_scales",
    "list_recipes",
    "load_recipe",
    "nvfp4_autocast",
    "prepare",
    "saturated_blocks",
    "save_recipe",
    "set_precision",
]
