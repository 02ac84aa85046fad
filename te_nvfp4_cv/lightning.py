"""Offer nv.lightning: the precision plugin for PyTorch Lightning. The code is in integrations/lightning.py."""

from te_nvfp4_cv.integrations.lightning import NVFP4Precision

__all__ = ["NVFP4Precision"]
