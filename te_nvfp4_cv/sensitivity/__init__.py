"""Which layers bear NVFP4 badly, and why a step went wrong.

    kurtosis(model)                 weights alone: outliers, and what quantization costs each; seconds, no data
    scan(model, loss, batches)      each layer quantized alone, and all but that one: the loss change -> a recipe
    update_bn(model, loader, ...)   batch-norm statistics in the precision that runs from now on
    save_bundle, load_bundle        one training step as a file: weights, batch, seed, recipe
    diagnose(bundle)                replay it in high precision and in NVFP4, with each GEMM and layer taken out

Nothing here changes a model that it is given, but update_bn its statistics.
"""

from te_nvfp4_cv.sensitivity.batch_norm import update_bn
from te_nvfp4_cv.sensitivity.bundle import Bundle, load_bundle, save_bundle
from te_nvfp4_cv.sensitivity.diagnosis import Diagnosis
from te_nvfp4_cv.sensitivity.replay import diagnose
from te_nvfp4_cv.sensitivity.scan_report import Scan
from te_nvfp4_cv.sensitivity.scanning import scan
from te_nvfp4_cv.sensitivity.weights import Study, kurtosis

__all__ = [
    "Bundle",
    "Diagnosis",
    "Scan",
    "Study",
    "diagnose",
    "kurtosis",
    "load_bundle",
    "save_bundle",
    "scan",
    "update_bn",
]
