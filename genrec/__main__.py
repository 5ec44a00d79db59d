"""python -m genrec, where the `genrec` command is not on PATH."""

import sys

from genrec.cli import main

sys.exit(main())
