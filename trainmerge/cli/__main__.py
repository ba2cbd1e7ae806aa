"""`python -m trainmerge.cli`: the same as the command `trainmerge`."""

import sys

from trainmerge.cli import main

sys.exit(main())
