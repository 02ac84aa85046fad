"""te_nvfp4_cv: NVFP4 training for convolutional networks.

import te_nvfp4_cv as nv;   with nv.nvfp4_autocast(nv.NVFP4BlockScaling()): loss = criterion(model(x), y)
"""

import importlib

from te_nvfp4_cv import distributed, fsdp, functional
from te_nvfp4_cv.autocast import active_recipe, nvfp4_autocast
from te_nvfp4_cv.coverage import coverage
from te_nvfp4_cv.fuse import fuse
from te_nvfp4_cv.learned import learn_scales
from te_nvfp4_cv.modules import (
    NVFP4Conv1d,
    NVFP4Conv2d,
    NVFP4Conv3d,
    NVFP4ConvTranspose1d,
    NVFP4ConvTranspose2d,
    NVFP4ConvTranspose3d,
    NVFP4Linear,
    convert_model,
)
from te_nvfp4_cv.norm_modules import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, GroupNormAct
from te_nvfp4_cv.ops.gemm import gemm
from te_nvfp4_cv.ops.quantize.quantizer import NVFP4Quantizer
from te_nvfp4_cv.policy import extra_state, frozen_weights, saturated_blocks, set_precision
from te_nvfp4_cv.recipe import NVFP4BlockScaling, QParams
from te_nvfp4_cv.recipe_files import list_recipes, load_recipe, save_recipe
from te_nvfp4_cv.tensor import NVFP4Tensor
from te_nvfp4_cv.version import __version__ as __version__

# imported when they are asked for: what needs more than the core
_LAZY = ("export", "lightning", "sensitivity", "telemetry", "tensor_parallel", "te_plugin")


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    "NVFP4Linear",
    "NVFP4Quantizer",
    "NVFP4Tensor",
    "QParams",
    "active_recipe",
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
    "saturated_blocks",
    "save_recipe",
    "set_precision",
]
