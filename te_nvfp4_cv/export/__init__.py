"""From a trained model to what is deployed.

    nv.export.save(model, path, recipe)      packed safetensors: 4-bit codes and scales, checksums, the recipe
    nv.export.load(path, model)              an NVFP4 inference model, bit-equal to the one that was saved
    nv.export.quantize(model, loader)        one from a network that was trained in high precision
    nv.export.to_onnx(model, example, path)  such a model as an ONNX file
    python -m te_nvfp4_cv.export.verify FILE what each layer of an artefact really is

Needs the extra [export]: pip install 'te_nvfp4_cv[export]'.
"""

from te_nvfp4_cv.export.checkpoints import Saved, load, save
from te_nvfp4_cv.export.modules import InferenceLayer
from te_nvfp4_cv.export.onnx.convert import to_onnx
from te_nvfp4_cv.export.ptq.post_training import quantize

__all__ = ["InferenceLayer", "Saved", "load", "quantize", "save", "to_onnx"]
