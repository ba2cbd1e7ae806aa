"""A thread without memory for its first line ends the command; nobody waits for it."""

import subprocess
import sys
from threading import Thread

import pytest

from trainmerge.system.lost_threads import lost_threads

LEFT_MIB = 1
NO_ROOM = f"""
import resource
from trainmerge.cli.program import main
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, ((size << 10) + ({LEFT_MIB} << 20), -1))
raise SystemExit(main(["export", "run", "out"]))
"""


class Lost(Thread):
    """A thread whose first line meets a full memory."""

    def _bootstrap(self) -> None:
        raise MemoryError


def test_a_thread_that_never_begins_is_a_memory_error() -> None:
    for _ in range(500):  # whenever the signal comes, also just before the wait
        with pytest.raises(MemoryError, match="a thread could not begin"), lost_threads():
            Lost(daemon=True).start()


def test_an_interrupt_stays_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), lost_threads():
        raise KeyboardInterrupt


def test_other_errors_that_nobody_can_catch_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    class Closing:
        def __del__(self) -> None:
            raise ValueError("while closing")

    hook = sys.unraisablehook
    sys.unraisablehook = sys.__unraisablehook__
    try:
        with lost_threads():
            Closing()
    finally:
        sys.unraisablehook = hook
    assert "ValueError: while closing" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space")
def test_no_room_for_a_thread_is_said_at_the_start() -> None:
    done = subprocess.run([sys.executable, "-c", NO_ROOM], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("trainmerge export: memory is full (less than 16 MiB of address space")
