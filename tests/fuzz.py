"""`make fuzz`: mutated files at every door end in the project's own error, or are read; nothing else.

`python -m tests.fuzz --count 100000 --seconds 600 --only pickle`: inputs per door, as many as fit the time.
Each batch runs in its own process, so that a crash is counted; one line per door. `--keep FILE` writes the
counts to a JSON file after each batch, and goes on after the inputs that are in it.
"""

import argparse
import gc
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path

import datasets

from tests.fuzz_doors import Door, doors
from tests.fuzz_mutations import mutate
from trainmerge.system.atomic import write_whole
from trainmerge.system.text import words_of

LIMIT = 20.0  # seconds that one input may take
BATCH = 500
LONG = 6000  # characters of an error
FINE = ("read", "ValueError", "FileNotFoundError")


class Hang(BaseException):
    """One input took longer than `LIMIT`."""


def attempt(door: Door, seed: int) -> tuple[str, bytes]:
    """What the input of a seed ends in: `read`, or the name of the exception; and the input."""
    data = mutate(door.valid, random.Random(seed), door.json)
    door.file.write_bytes(data)
    try:
        with _limit():
            door.read()
    except (ValueError, FileNotFoundError) as error:
        return _judged(error), data
    except Hang:
        return f"more than {LIMIT:.0f} s", data
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}", data
    finally:
        door.file.write_bytes(door.valid)
    return "read", data


def _judged(error: Exception) -> str:
    """The kind of an error of ours, and what is wrong with its words."""
    kind = "ValueError" if isinstance(error, ValueError) else "FileNotFoundError"
    words = words_of(error).strip()
    return f"{kind} without words" if not words else kind if len(words) < LONG else f"{kind}, too long"


@contextmanager
def _limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def batch(door: Door, seeds: range, examples: Path) -> Counter[str]:
    """`attempt` for every seed, in a child process if the door allows it."""
    if not door.forks:
        return Counter(attempt(door, seed)[0] for seed in seeds)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _be_silent()
        with os.fdopen(writer, "w") as lines:
            for seed in seeds:
                ended, data = attempt(door, seed)
                if ended not in FINE:
                    (examples / f"{seed}-{door.file.name}").write_bytes(data)
                print(" ".join(ended.split()), file=lines, flush=True)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        found = Counter(line.strip() for line in lines)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        found[f"signal {os.WTERMSIG(status)} at seed {seeds[found.total()]}"] += 1
        door.file.write_bytes(door.valid)
    return found


def _be_silent() -> None:
    """Drop what this process prints from here on: parsers warn of every odd key."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def main() -> int:
    """Fuzz every door; returns 1 if an input ended in something else."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--count", type=int, default=100_000)
    options.add_argument("--seconds", type=float, default=3600.0, help="per door")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", default="", help="doors whose name contains this")
    options.add_argument("--door", action="append", default=[], help="a door's whole name, repeated")
    options.add_argument("--examples", type=Path, default=Path("build/fuzz"))
    options.add_argument("--keep", type=Path, help="a JSON file of counts, to add to")
    given = options.parse_args()
    given.examples.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    datasets.logging.set_verbosity(CRITICAL)
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        every = doors(Path(place))
        gc.freeze()  # what was made so far is no garbage, which each batch would look for anew
        for name in given.door or [name for name in every if given.only in name]:
            found = _seen(given.keep, name)
            end = time.monotonic() + given.seconds
            while found.total() < given.count and time.monotonic() < end:
                first = given.seed + found.total()
                size = min(BATCH, given.count - found.total())
                found += batch(every[name], range(first, first + size), given.examples)
                _keep(given.keep, name, found)
            failed += _said(name, found)
    return int(failed > 0)


def _seen(kept: Path | None, name: str) -> Counter[str]:
    return Counter(json.loads(kept.read_text()).get(name, {}) if kept and kept.exists() else {})


def _keep(kept: Path | None, name: str, found: Counter[str]) -> None:
    if kept:
        every = json.loads(kept.read_text()) if kept.exists() else {}
        write_whole(kept, json.dumps({**every, name: dict(found)}, indent=1))


def _said(name: str, found: Counter[str]) -> bool:
    """Print a door's counts; whether an input ended in something else."""
    others = {ended: count for ended, count in found.items() if ended not in FINE}
    fine = {ended: count for ended, count in found.items() if ended in FINE}
    print(f"{name}: {found.total()} inputs, {fine}", flush=True)
    for ended, count in others.items():
        print(f"    {count} x {ended}", flush=True)
    return bool(others)


if __name__ == "__main__":
    sys.exit(main())
