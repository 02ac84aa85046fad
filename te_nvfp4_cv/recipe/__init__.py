"""Say what is computed: the recipe and its files.

Pickles made by version 0.1 look for these three names here.
"""

from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, QParams, RoleSettings

__all__ = ["NVFP4BlockScaling", "QParams", "RoleSettings"]
