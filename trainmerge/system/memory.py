"""Memory sizes: parsing, formatting and measuring."""

import ctypes
import re
import resource
import sys
import threading
import time
from pathlib import Path

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's numbers for mallopt
LARGE = 1 << 20  # bytes of an allocation that is returned to the system at once
REUSED = 1 << 28  # bytes below which freed memory is reused


def parse_size(text: str) -> int:
    """Bytes of a size with its unit.

    >>> parse_size("8GiB"), parse_size("1.5 GB"), parse_size("300 mb")
    (8589934592, 1500000000, 300000000)

    Raises:
        ValueError: no number, or no known unit.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if not found or found[2].upper() not in UNITS:
        raise ValueError(f"{text!r} is not a size: write a number and a unit, such as 8GiB, 6GB or 500MiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def format_size(count: float) -> str:
    """Bytes in a readable unit.

    >>> format_size(8 << 30), format_size(1536), format_size(0)
    ('8.0 GiB', '1.5 KiB', '0 B')
    """
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if count >= UNITS[unit.upper()]:
            return f"{count / UNITS[unit.upper()]:.1f} {unit}"
    return f"{count:.0f} B"


def anonymous(process: int | str = "self") -> int:
    """A process's anonymous memory in bytes; 0 for a zombie process.

    Raises:
        OSError: this is not Linux.
    """
    status = Path(f"/proc/{process}/status").read_text()
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    if process != "self":
        return 0  # it is exiting: its memory is freed, but its entry still exists
    raise OSError("no RssAnon in /proc/self/status: this needs Linux")


def peak_resident() -> int:
    """The peak of this process's resident memory in bytes, mapped files included."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes per unit
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available() -> int | None:
    """Bytes that can still be allocated without swapping; None where the system does not say (not Linux).

    A container's limit counts too.
    """
    table = Path("/proc/meminfo")
    for line in table.read_text().splitlines() if table.exists() else ():
        if line.startswith("MemAvailable:"):
            return min([int(line.split()[1]) * 1024, *group_rooms()])
    return None


def group_rooms(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left below every memory limit of the process's control groups (1 or 2) and their parents."""
    found = []
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        place = Path(path.lstrip("/"))
        for folder in (place, *place.parents):
            limit, usage = (
                (root / "memory" if controllers else root) / folder / f"memory.{name}" for name in names
            )
            if limit.is_file() and usage.is_file() and (most := limit.read_text().strip()) != "max":
                found.append(max(0, int(most) - int(usage.read_text())))
    return found


def return_freed_memory() -> None:
    """Ask the C library to return large freed blocks to the system at once (glibc only).

    Otherwise freed blocks of up to 32 MiB still count as the process's memory.
    """
    _mallopt(MMAP_THRESHOLD, LARGE)


class Peak:
    """The peak anonymous memory of this process between start and stop, sampled every few milliseconds.

    Mapped files are excluded: they are in the page cache, which the kernel can reclaim.
    """

    def __init__(self, every: float = 0.002) -> None:
        self.every = every

    def __enter__(self) -> "Peak":
        self.start = self.highest = anonymous()
        self._running = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._running:
            self.highest = max(self.highest, anonymous())
            time.sleep(self.every)

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()
        self.highest = max(self.highest, anonymous())

    @property
    def grown(self) -> int:
        """Bytes above the start."""
        return self.highest - self.start


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory, because a pass allocates the same few buffers again and again.

    By default it returns each to the kernel, which must zero the pages next time.
    """
    _mallopt(TRIM_THRESHOLD, REUSED)
    _mallopt(MMAP_THRESHOLD, REUSED)


def _mallopt(option: int, value: int) -> None:
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):  # musl: none
        mallopt(option, value)


NO_MEMORY = (
    "can't start new thread",
    "can't allocate memory",
    "out of memory",
    "not enough memory",
    "bad_alloc",
    "could not create a primitive(?! descriptor)",  # oneDNN's kernels, compiled for each shape
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is full: also as torch and the interpreter's threads say it, in a RuntimeError."""
    if isinstance(error, MemoryError) or "Failed to launch worker thread" in str(error):  # pyarrow's own
        return True
    return isinstance(error, RuntimeError) and any(
        re.search(words, str(error).lower()) for words in NO_MEMORY
    )
