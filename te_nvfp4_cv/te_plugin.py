"""Offer nv.te_plugin: NVFP4 in TransformerEngine's own layers. The code is in integrations/transformer_engine.py."""

from te_nvfp4_cv.integrations.transformer_engine import QuantizerFactory, recipe

__all__ = ["QuantizerFactory", "recipe"]
