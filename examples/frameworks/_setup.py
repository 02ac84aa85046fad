"""Make the examples of this folder run from a clone: te_nvfp4_cv need not be installed, torch may be for CPUs only."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[at]) for at in (1, 2)]

from _torchvision import ensure_torchvision  # noqa: E402

ensure_torchvision()
