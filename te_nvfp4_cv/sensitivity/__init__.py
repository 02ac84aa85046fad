"""Find out which layers suffer most from NVFP4, and why a training step went wrong.

    kurtosis(model)                 rank weights by their outliers, and say what quantization costs each; needs no data
    scan(model, loss, batches)      quantize each layer alone, or all but that one; the loss changes suggest a recipe
    update_bn(model, loader, ...)   estimate batch-norm statistics again, in the precision that runs from now on
    save_bundle, load_bundle        one training step as a file: weights, batch, seed, recipe
    diagnose(bundle)                replay it in high precision and in NVFP4, with each GEMM and layer taken out

Only update_bn changes the model that it is given: the statistics of its batch norms.
"""

from te_nvfp4_cv.sensitivity.batch_norm import update_bn
from te_nvfp4_cv.sensitivity.bundle import Bundle, load_bundle, save_bundle
from te_nvfp4_cv.sensitivity.diagnosis import Diagnosis
from te_nvfp4_cv.sensitivity.replay import diagnose
from te_nvfp4_cv.sensitivity.scan_report import Scan
from te_nvfp4_cv.sensitivity.scanning import scan
from te_nvfp4_cv.sensitivity.weights import Study, kurtosis

__all__ = [
    "Bundle", "Diagnosis", "Scan", "Study", "diagnose", "kurtosis", "load_bundle", "save_bundle", "scan",
    "update_bn",
]
