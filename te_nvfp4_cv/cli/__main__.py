"""python -m te_nvfp4_cv.cli COMMAND: the same as te-nvfp4-cv COMMAND."""

import sys

from te_nvfp4_cv.cli import main

sys.exit(main())
