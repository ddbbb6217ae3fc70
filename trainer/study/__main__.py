"""`python -m trainer.study`; see `grid`."""

import sys

from .grid import main

sys.exit(main())
