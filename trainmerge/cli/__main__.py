"""`python -m trainmerge.cli`: the same as the command `trainmerge`."""

import sys

from trainmerge.cli.main import main

sys.exit(main())
