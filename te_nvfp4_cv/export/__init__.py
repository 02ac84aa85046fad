"""Turn a trained model into files for deployment, and into an NVFP4 inference model again.

    nv.export.save(model, path, recipe)       write packed safetensors: 4-bit codes and scales, checksums, the recipe
    nv.export.load(path, model)               make the NVFP4 inference model, bit-equal to the model that was saved
    nv.export.quantize(model, loader)         make one from a network that was trained in high precision
    nv.export.to_onnx(model, example, path)   write an inference model as an ONNX file
    python -m te_nvfp4_cv.export.verify FILE  show what each layer of an exported file really is

The extra [export] is needed: pip install 'te_nvfp4_cv[export]'.
"""

from te_nvfp4_cv.export import experts as experts  # renamed to itself: imported for the class that it adds to a table
from te_nvfp4_cv.export.checkpoints import Saved, load, save
from te_nvfp4_cv.export.modules import InferenceLayer
from te_nvfp4_cv.export.onnx.convert import to_onnx
from te_nvfp4_cv.export.ptq.drift import Drift
from te_nvfp4_cv.export.ptq.post_training import quantize

__all__ = ["Drift", "InferenceLayer", "Saved", "load", "quantize", "save", "to_onnx"]
