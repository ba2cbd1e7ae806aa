"""Hidden names of files and folders that are not finished, next to what they become."""

import os
import re
import socket
import uuid
from pathlib import Path

KINDS = ("new", "old")
NAME = re.compile(rf"\.(?P<target>.+)\.(?:{'|'.join(KINDS)})-[^/]+-\d+-[0-9a-f]{{8}}")


def aside(target: Path, kind: str) -> Path:
    """A hidden name next to `target` that names the owning process."""
    mark = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return target.with_name(f".{target.name}.{kind}-{mark}")


def finished(path: Path) -> Path:
    """The path that a user knows: every name of `aside` in it is that of its target.

    >>> finished(Path("/runs/.out.new-host-12-0123abcd/a"))
    PosixPath('/runs/out/a')
    """
    return Path(*(found["target"] if (found := NAME.fullmatch(part)) else part for part in path.parts))
