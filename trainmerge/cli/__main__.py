"""`python -m trainmerge.cli`: the same as the command `trainmerge`."""

import sys
from pathlib import Path

from trainmerge.cli import main

# `-m` puts the current folder, which may be a stranger's, before the installed packages. At the end it still
# has the modules that a configuration names.
if not sys.flags.safe_path and sys.path[:1] == [str(Path.cwd())]:
    sys.path.append(sys.path.pop(0))

sys.exit(main())
