"""Choose the number of threads and their wait policy before torch loads, from the free cores.

OpenMP threads that spin at the barrier of each small operation become many times slower if another program
uses one of their cores, because each barrier waits for the scheduler. So we use as many threads as there are
free cores, which sleep at barriers if other programs are busy.
"""

import math
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

USERS = (  # if one of these is set, the user has chosen
    "OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_SPINCOUNT",
    "GOMP_CPU_AFFINITY", "KMP_BLOCKTIME", "KMP_AFFINITY", "MKL_NUM_THREADS",
)  # fmt: skip
FREE = 0.75  # a core that is idle for this share of the time counts as free
INTERVAL = 0.1  # seconds over which others' work is measured: ten ticks of /proc/stat


@dataclass(frozen=True)
class Machine:
    """The resources that the process may use, and others' use of them.

    Args:
        cores: Physical cores that the process may run on.
        quota: Cores' worth of time that its control groups allow; None without a limit.
        busy: Cores' worth of time that others spend on these cores.
        processes: Processes of the same command that share the machine.
    """

    cores: int
    quota: float | None = None
    busy: float = 0.0
    processes: int = 1


@dataclass(frozen=True)
class ThreadChoice:
    """Threads of one process, and whether they sleep at barriers rather than spin."""

    threads: int
    passive: bool
    why: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables that OpenMP and MKL read when they are loaded."""
        return {"OMP_NUM_THREADS": str(self.threads)} | (
            {"OMP_WAIT_POLICY": "PASSIVE"} if self.passive else {}
        )

    def __str__(self) -> str:
        return f"{self.threads} thread{'s' * (self.threads > 1)}: {self.why} (OMP_NUM_THREADS overrides)"


def threads_for(machine: Machine, earlier: int | None = None) -> ThreadChoice:
    """As many threads as free cores; for a resumed run `earlier`, its own number, if the cores allow it.

    Another number of threads changes the summation order, so bitwise equality after resuming needs the same
    number.
    """
    allowed = machine.cores if machine.quota is None else min(machine.cores, math.floor(machine.quota))
    share = max(1, allowed // machine.processes)
    free = max(1, min(share, math.floor(machine.cores - machine.busy + 1 - FREE)))
    shared = machine.busy > 1 - FREE
    why = [f"{machine.cores} core{'s' * (machine.cores > 1)}"]
    why += [f"a quota of {machine.quota:.1f}"] if machine.quota is not None else []
    why += [f"{machine.busy:.1f} busy with other work"] if shared else []
    why += [f"{machine.processes} processes"] if machine.processes > 1 else []
    threads = free
    if earlier is not None and earlier != free:
        threads = earlier if earlier <= share else free
        same = (
            "as the run had" if threads == earlier else f"the run had {earlier}, so the last bits may differ"
        )
        why.append(same)
    return ThreadChoice(threads, threads > 1 and (shared or threads > free), ", ".join(why))


def choose_threads(earlier: int | None = None) -> ThreadChoice | None:
    """Measure, choose, and set the environment for libraries loaded later.

    Returns None and sets nothing if the user has chosen, if torch is already loaded, or outside Linux.
    """
    if "torch" in sys.modules or (choice := suggested(os.environ, earlier)) is None:
        return None
    os.environ.update(choice.environment)
    return choice


def suggested(environment: Mapping[str, str], earlier: int | None = None) -> ThreadChoice | None:
    """The choice; None if `environment` has the user's, or outside Linux."""
    if sys.platform != "linux" or any(name in environment for name in USERS):
        return None
    return threads_for(this_machine(environment), earlier)


def this_machine(environment: Mapping[str, str]) -> Machine:
    """The machine's current state; other ranks of the same command do not count as busy."""
    cpus = os.sched_getaffinity(0)
    cores = physical_cores(cpus)
    ranks = any(name in environment for name in ("LOCAL_WORLD_SIZE", "SLURM_PROCID"))
    busy = 0.0 if ranks else busy_cores(cpus) * cores / len(cpus)
    return Machine(cores, quota(), busy, ranks_here(environment, len(cpus)))


def ranks_here(environment: Mapping[str, str], cpus: int) -> int:
    """Ranks that share these cores: torchrun's number, or Slurm's where it binds none of them; else 1.

    >>> slurm = {"SLURM_PROCID": "5", "SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_CPUS_ON_NODE": "64"}
    >>> ranks_here({"LOCAL_WORLD_SIZE": "4"}, 64), ranks_here(slurm, 64), ranks_here(slurm, 8)
    (4, 8, 1)
    """
    if "LOCAL_WORLD_SIZE" in environment:
        return int(environment["LOCAL_WORLD_SIZE"])
    ranks = re.match(r"\d+", environment.get("SLURM_TASKS_PER_NODE", ""))
    bound = cpus < int(environment.get("SLURM_CPUS_ON_NODE", "0"))
    return int(ranks[0]) if "SLURM_PROCID" in environment and ranks and not bound else 1


def physical_cores(cpus: Iterable[int], root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Physical cores of these logical processors: two hyperthreads share the units of matrix products."""
    siblings = [root / f"cpu{cpu}" / "topology" / "thread_siblings_list" for cpu in cpus]
    found = {file.read_text().strip() if file.is_file() else file.parent.as_posix() for file in siblings}
    return max(1, len(found))


def quota(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> float | None:
    """The least CPU limit of the process's control groups and their parents, version 1 or 2; None without."""
    found = []
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        place = Path(path.lstrip("/"))
        for folder in (place, *place.parents):
            found += limits(root / folder if not controllers else root / "cpu" / folder)
    return min(found, default=None)


def limits(folder: Path) -> list[float]:
    """The limit of one control group, in cores; empty without."""
    if (file := folder / "cpu.max").is_file():  # version 2
        most, *period = file.read_text().split()
        return [] if most == "max" else [int(most) / int(period[0] if period else 100_000)]
    if (file := folder / "cpu.cfs_quota_us").is_file():  # version 1
        limit = int(file.read_text())
        return [limit / int((folder / "cpu.cfs_period_us").read_text())] if limit > 0 else []
    return []


def busy_cores(cpus: set[int], stat: Path = Path("/proc/stat"), interval: float = INTERVAL) -> float:
    """The number of these logical processors that others use, measured while this process sleeps."""
    if not stat.is_file():
        return 0.0
    before = processor_ticks(stat.read_text(), cpus)
    time.sleep(interval)
    after = processor_ticks(stat.read_text(), cpus)
    shares = [
        (busy - before[cpu][0]) / total
        for cpu, (busy, whole) in after.items()
        if (total := whole - before[cpu][1]) > 0
    ]
    return sum(shares)


def processor_ticks(stat: str, cpus: set[int]) -> dict[int, tuple[int, int]]:
    """Processor -> (busy ticks, all ticks) since the machine started."""
    found = {}
    for line in stat.splitlines():
        name, *numbers = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cpus:
            user, nice, system, idle, iowait, *more = map(int, numbers[:8])
            busy = user + nice + system + sum(more)
            found[int(name[3:])] = (busy, busy + idle + iowait)
    return found
