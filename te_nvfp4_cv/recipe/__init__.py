"""What is computed: the recipe and its files. The three names here are where files saved by version 0.1 look for them."""

from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, QParams, RoleSettings

__all__ = ["NVFP4BlockScaling", "QParams", "RoleSettings"]
