"""A lock is of the operating system: a dead process never blocks, and a living one is named."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainmerge.system.lock import locked

HOLDS = """
import sys
from pathlib import Path
from trainmerge.system.lock import locked
with locked(Path(sys.argv[1]), "it", "a fit"):
    print("ready", flush=True)
    sys.stdin.read()
"""


def holder(file: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_process_is_refused_with_host_and_process_and_a_dead_one_does_not_block(
    tmp_path: Path,
) -> None:
    file = tmp_path / ".lock"
    with holder(file) as process:
        words = f"runs/a is in use by a fit, process {process.pid} on {os.uname().nodename}"
        with pytest.raises(ValueError, match=words), locked(file, "runs/a", "another fit"):
            pytest.fail("the body must not run")
        process.send_signal(signal.SIGKILL)
    assert file.exists()  # what a killed holder leaves
    with locked(file, "runs/a", "another fit") as alone:
        assert alone
        assert file.read_text().startswith(f"another fit, process {os.getpid()} on ")
    assert list(tmp_path.iterdir()) == []


def test_the_same_process_does_not_lock_twice(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with locked(file, "it", "one"):
        with pytest.raises(ValueError, match="it is in use by one"), locked(file, "it", "two"):
            pytest.fail("the body must not run")
        assert file.exists()
    with locked(file, "it", "two"):
        pass


def test_whatever_the_file_holds_it_is_locked(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(b"\xff\x00{")
    with locked(tmp_path / ".lock", "it", "one"):
        assert b"\xff" not in (tmp_path / ".lock").read_bytes()


def test_a_forked_child_does_not_hold_its_parents_lock(tmp_path: Path) -> None:
    """A worker of a data loader may live on for some seconds after its parent was killed."""
    file, (read, write) = tmp_path / ".lock", os.pipe()
    with locked(file, "it", "one"):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # until the parent is done
            os._exit(0)
    os.close(read)
    with locked(file, "it", "two"):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.close(write)
    os.waitpid(child, 0)


def test_a_file_system_without_locks_is_named_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.warns(UserWarning, match=r"runs/a: this file system has no locks \(No locks available\)"),
        locked(tmp_path / ".lock", "runs/a", "a fit") as alone,
    ):
        assert not alone
    assert list(tmp_path.iterdir()) == []
