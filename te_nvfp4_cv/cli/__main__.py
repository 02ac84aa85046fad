"""Run the command line as python -m te_nvfp4_cv.cli COMMAND."""

import sys

from te_nvfp4_cv.cli import main

sys.exit(main())
