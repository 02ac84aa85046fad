"""The main job: a UNet or a detector, trained in high precision and in NVFP4 from the same seed.

Importing this package makes `import torchvision` work beside a CPU-only torch (examples/_torchvision.py), so every
module in here may import torchvision and torchmetrics at its top. It needs the folder above (examples/) on sys.path,
which train.py adds.
"""

from _torchvision import ensure_torchvision

ensure_torchvision()
