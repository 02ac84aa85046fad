"""Train a UNet or a detector in high precision and in NVFP4 from the same seed, and compare them.

This is the main example. Importing the package makes `import torchvision` work with a CPU-only torch
(examples/_torchvision.py), so every module in it may import torchvision and torchmetrics at its top. It needs the
folder above (examples/) on sys.path; train.py adds it.
"""

from _torchvision import ensure_torchvision

ensure_torchvision()
