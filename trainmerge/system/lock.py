"""A lock of the operating system on a folder: one process at a time changes it.

The kernel drops the lock when its process ends, also after SIGKILL, so a dead process never blocks. The file
of the lock names its holder for the error of a second process. Rank 0 locks for all ranks.
"""

import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainmerge.system.disk_space import naming

WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
PATIENCE = 1.0  # seconds in which a holder must have written its name

_held: set[int] = set()  # descriptors of this process's locks


def _forget() -> None:
    """A forked child, a data loader's worker say, must not hold its parent's locks."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def locked(file: Path, what: str, doing: str) -> Iterator[bool]:
    """Hold the lock `file` in this context; it is removed at the end. Its folder must exist.

    Yields whether there is a lock: False, with a warning, on a file system that has none.

    Args:
        file: The lock's file.
        what: What is locked, for messages.
        doing: What this process does, for messages of others.

    Raises:
        ValueError: another process holds it; its host, process and work are named.
    """
    descriptor = _acquire(file, what)
    if descriptor is None:
        yield False
        return
    _held.add(descriptor)
    owner = os.getpid()
    try:
        with naming(file):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"{doing}, process {owner} on {socket.gethostname()}\n".encode())
        yield True
    finally:
        if os.getpid() == owner:  # a forked child has closed its copy
            file.unlink(missing_ok=True)  # before the lock is dropped: whoever opened it tries again
            _held.discard(descriptor)
            os.close(descriptor)


def _acquire(file: Path, what: str) -> int | None:
    """A descriptor of the locked file; None where the file system has no locks."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            words = _holder(descriptor) if error.errno in TAKEN else ""
            os.close(descriptor)
            if error.errno in TAKEN:
                raise ValueError(f"{what} is in use by {words}: wait until it ends, or stop it") from error
            if error.errno not in WITHOUT_LOCKS:
                raise
            file.unlink(missing_ok=True)
            warnings.warn(
                f"{what}: this file system has no locks ({error.strerror}): make sure yourself that no other "
                "process writes there",
                stacklevel=4,
            )
            return None
        if _is_at(descriptor, file):
            return descriptor
        os.close(descriptor)  # its holder ended and removed it in between


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """The holder's own words; it writes them right after it gets the lock."""
    end = time.monotonic() + PATIENCE
    while True:
        words = os.pread(descriptor, 500, 0).decode("utf-8", "replace").strip()
        if words or time.monotonic() > end:
            return words or "another process"
        time.sleep(0.01)
