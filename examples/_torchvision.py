"""Make `import torchvision` work with a CPU-only torch: call ensure_torchvision before anything imports torchvision.

The package's command line needs the same, so the code is in the package.
"""

from te_nvfp4_cv.cli.torchvision_ops import ensure_torchvision

__all__ = ["ensure_torchvision"]
