"""Kill and resume at random, for SOAK_MINUTES (20 by default): `make soak`.

A run on two processes is hit again and again, by SIGKILL, SIGTERM or SIGUSR1 on a random rank at a random
moment (loading, recording, amid a step or a save), and started again until it is finished. It has to end with
the bits of a run that was left alone, every checkpoint that it leaves has to load, and no process may hang.
Every other run goes on after each hit on one process or two, sharded or not, and ends within rounding.
"""

import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy

import trainmerge as tm
from tests.bounds import fitted_bound
from tests.fitting.test_ranks import RATE, world_fit
from tests.ranks import Failed, Ranks, sound
from tests.results import FOLDER
from tests.world import write_world
from trainmerge.fitting.provenance import load_snapshot
from trainmerge.run.folder import RunFolder
from trainmerge.run.manifest import versions
from trainmerge.system.atomic import write_whole

STEPS = 12
HANG = 1800  # seconds: only a hang takes so long, however busy the machine
MEET = timedelta(seconds=60)  # what a rank waits for one that was killed before they met, as a launcher would
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
EXPECTED = {"Preempted", "ConnectionError"}


def part(root: Path, folder: Path, processes: int, sharded: bool) -> torch.Tensor:
    return world_fit(
        root,
        folder,
        processes,
        sharded=sharded,
        steps=STEPS,
        objective=tm.Entropy(agreement=1.0),
        strategy=DDPStrategy(timeout=MEET),
    )


class Soak:
    """Runs one after another, and what happened to them."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.dice = root, random.Random(seed)
        self.seen: Counter[str] = Counter()
        for name in ("first", "whole"):  # the first starts the server too, which takes longer than a run
            began = time.monotonic()
            (self.wanted, _) = sound(Ranks(2, part, root, root / name, 2, False).join(HANG))
        self.usual = time.monotonic() - began

    def run(self, number: int, mixed: bool) -> None:
        """One run, hit until it is finished."""
        folder = RunFolder(self.root / f"run{number}")
        shape, hits = (2, False), self.dice.randrange(3, 9)
        for attempt in range(hits + 1):
            ranks = Ranks(shape[0], part, self.root, folder.path, *shape)
            if attempt < hits:
                self._hit(ranks)
            results = ranks.join(HANG)
            self._check(folder, results)
            if all(isinstance(result, torch.Tensor) for result in results):
                self._compare(results[0], mixed)
                break
            if mixed:
                shape = self.dice.choice([(1, False), (2, False), (2, True)])
        else:
            raise AssertionError(f"{folder.path} was never finished")
        shutil.rmtree(folder.path)

    def _hit(self, ranks: Ranks) -> None:
        time.sleep(self.dice.uniform(0, self.usual))
        number, victim = self.dice.choice(SIGNALS), self.dice.choice(ranks.processes)
        if victim.is_alive() and victim.pid:
            os.kill(victim.pid, number)
            self.seen[signal.Signals(number).name] += 1

    def _check(self, folder: RunFolder, results: list[Any]) -> None:
        """Every rank ended in a way that was meant, and every checkpoint loads."""
        for result in results:
            if isinstance(result, Failed):
                assert result.kind in EXPECTED, result.traceback
                self.seen[result.kind] += 1
        for snapshot in folder.snapshots().values():
            load_snapshot(snapshot)
            self.seen["checkpoints loaded"] += 1
        if folder.coefficients.exists():
            tm.load_coefficients(folder.coefficients)

    def _compare(self, ended: torch.Tensor, mixed: bool) -> None:
        self.seen["runs on changing processes" if mixed else "runs"] += 1
        if mixed:
            assert (ended - self.wanted).abs().max() < fitted_bound(STEPS, RATE)
        else:
            assert torch.equal(ended, self.wanted)


def main() -> None:
    """Soak, and keep the report."""
    minutes = float(os.environ.get("SOAK_MINUTES", "20"))
    seed = int(os.environ.get("SOAK_SEED", "0"))
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_world(root)
        soak, number = Soak(root, seed), 0
        while time.monotonic() < end:
            soak.run(number, mixed=number % 2 == 1)
            number += 1
            print(dict(soak.seen), flush=True)
    seen = dict(sorted(soak.seen.items()))
    report = {"minutes": minutes, "seed": seed, "versions": versions(), "seen": seen}
    write_whole(FOLDER / "soak.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
