"""Real processes over gloo, forked from a server that has imported everything once: a rank costs little.

A rank that hangs is killed when the time is up; its result, or its traceback, comes back in a file.
"""

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import SystemRandom
from time import monotonic
from typing import Any

TIMEOUT = 1800  # seconds: only a hang takes so long, however busy the machine
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.ranks_imports"])


def free_port() -> int:
    """A port that the system gives to nobody unasked, so that none takes it before the ranks do."""
    for port in SystemRandom().sample(range(10_000, 32_000), 100):
        with socket.socket() as place, suppress(OSError):
            place.bind(("127.0.0.1", port))
            return port
    raise OSError("100 ports are taken")


def exit_code(function: Callable[..., Any], *arguments: Any) -> int | None:
    """That of a process that runs function(*arguments).

    It is no fork of this one, whose OpenMP threads a fork would wait for at its first parallel loop.
    """
    process = SERVER.Process(target=_alone, args=(function, arguments))
    process.start()
    process.join()
    return process.exitcode


def _alone(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    from tests.threads import limit_threads

    limit_threads()
    function(*arguments)


class Ranks:
    """`count` processes that run function(*arguments), with the environment that torchrun gives them."""

    def __init__(self, count: int, function: Callable[..., Any], *arguments: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.results = [Path(self._folder.name) / str(rank) for rank in range(count)]
        port = free_port()
        self.processes: list[BaseProcess] = [
            SERVER.Process(
                target=_work, args=(rank, count, port, self.results[rank], function, arguments), daemon=True
            )
            for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    def join(self, timeout: float = TIMEOUT) -> list[Any]:
        """Each rank's result, exception or exit code; TimeoutError if they do not end in time."""
        end = monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        if hanging:
            said = "\n".join(path.with_suffix(".log").read_text()[-2000:] for path in self.results)
            self._folder.cleanup()
            raise TimeoutError(f"ranks {hanging} did not end within {timeout} s:\n{said}")
        results = [
            pickle.loads(path.read_bytes()) if path.exists() else process.exitcode
            for path, process in zip(self.results, self.processes, strict=True)
        ]
        self._folder.cleanup()
        return results


def run(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Each rank's result; raises if one failed."""
    return sound(Ranks(count, function, *arguments).join())


def sound(results: list[Any]) -> list[Any]:
    """The same; raises if a rank failed."""
    for rank, result in enumerate(results):
        if isinstance(result, Failed):
            raise AssertionError(f"rank {rank} of {len(results)}:\n{result.traceback}")
    return results


class Failed:
    """What a rank raised."""

    def __init__(self, error: BaseException) -> None:
        self.kind, self.message = type(error).__name__, str(error)
        self.traceback = "".join(traceback.format_exception(error))


def _work(rank: int, count: int, port: int, place: Path, function: Callable, arguments: tuple) -> None:
    from tests.threads import limit_threads  # torch is not for the process that starts the server

    limit_threads()
    log = os.open(place.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",
    }  # fmt: skip
    try:
        result = function(*arguments)
    except BaseException as error:  # SystemExit too: whatever ended it is the result
        result = Failed(error)
    aside = place.with_suffix(".tmp")
    aside.write_bytes(pickle.dumps(result))
    aside.rename(place)


def join_group() -> None:
    """Make the process group, for checks without Lightning; no rank goes on before all are in.

    Rank 0 holds the store: if it ended while another still asks the store for the group, that one would fail.
    """
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
