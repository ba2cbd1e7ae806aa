"""Stopped, killed and resumed on several processes, another number of them, and sharded or not."""

import os
import signal
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

import trainmerge as tm
from tests.bounds import fitted_bound
from tests.fitting.test_ranks import RATE, world_fit
from tests.ranks import Failed, Ranks, run
from tests.world import write_world
from trainmerge.data.batch import Step
from trainmerge.run.folder import RunFolder

pytestmark = pytest.mark.long

STEPS = 6
ENDS_WITHIN = 900  # seconds: the two that it takes, on any machine; a group that notices nothing waits 1800


class Signal(pl.Callback):
    """Sends this process a signal, in one step on one rank."""

    def __init__(self, rank: int, number: int, step: int) -> None:
        self.rank, self.number, self.step = rank, number, step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


class Seen(pl.Callback):
    """Which examples this process was given: step -> expert -> numbers."""

    def __init__(self) -> None:
        self.ids: dict[int, list[list[int]]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, _: object, batch: Step, *__: int) -> None:
        self.ids[trainer.global_step] = [part.ids.tolist() for part in batch]


def part_of_a_fit(
    root: Path, folder: Path, processes: int, sharded: bool = False, stop: Signal | None = None, **more: Any
) -> tuple[torch.Tensor, dict[int, list[list[int]]]]:
    seen = Seen()
    coefficients = world_fit(
        root, folder, processes, sharded=sharded, steps=STEPS, batch_size=7,
        objective=tm.Entropy(agreement=1.0), callbacks=[seen, *([stop] if stop else [])], **more,
    )  # fmt: skip
    return coefficients, seen.ids


def together(parts: list[dict[int, list[list[int]]]]) -> dict[int, list[list[int]]]:
    """What all ranks saw in each step, expert by expert."""
    return {
        step: [sorted(chain(*of_expert)) for of_expert in zip(*(part[step] for part in parts), strict=True)]
        for step in parts[0]
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    write_world(root)
    return root


@pytest.fixture(scope="module")
def whole(world: Path) -> dict[int, Any]:
    """Number of processes -> what an uninterrupted fit on them ends with."""
    started = {count: Ranks(count, part_of_a_fit, world, world / f"whole{count}", count) for count in (1, 2)}
    return {count: ranks.join() for count, ranks in started.items()}


@pytest.mark.parametrize(
    ("rank", "number", "sharded"),
    [(0, signal.SIGUSR1, False), (1, signal.SIGTERM, False), (1, signal.SIGTERM, True)],
)
def test_a_signal_on_any_rank_stops_all_and_any_other_number_goes_on(
    world: Path, whole: dict[int, Any], tmp_path: Path, rank: int, number: int, sharded: bool
) -> None:
    folder = RunFolder(tmp_path / "run")
    stopped = Ranks(2, part_of_a_fit, world, folder.path, 2, sharded, Signal(rank, number, 2)).join()
    assert [result.kind for result in stopped] == ["Preempted", "Preempted"]
    assert list(folder.snapshots()) == [3]
    assert torch.load(folder.latest(), weights_only=True)["global_step"] == 3
    (teachers,) = folder.workspace.glob("teachers-*")
    recorded = teachers.stat().st_mtime_ns
    count, then = (2, sharded) if number == signal.SIGUSR1 else (4, not sharded)
    results = run(count, part_of_a_fit, world, folder.path, count, then)
    wanted, seen = whole[1][0]
    coefficients = results[0][0]
    assert (coefficients - wanted).abs().max() < fitted_bound(STEPS, RATE)
    assert together([part for _, part in results]) == {step: together([seen])[step] for step in (3, 4, 5)}
    assert teachers.stat().st_mtime_ns == recorded  # once, for all ranks and the resumed run
    if count == 2:
        assert torch.equal(coefficients, whole[2][0][0])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others_soon_and_the_run_goes_on(
    world: Path, whole: dict[int, Any], tmp_path: Path, rank: int
) -> None:
    folder = RunFolder(tmp_path / "run")
    ranks = Ranks(2, part_of_a_fit, world, folder.path, 2, False, Signal(rank, signal.SIGKILL, 3))
    results = ranks.join(ENDS_WITHIN)
    assert results[rank] == -signal.SIGKILL
    left = results[1 - rank]
    assert isinstance(left, Failed)
    assert left.kind == "ConnectionError"
    assert f"process {1 - rank} lost another process" in left.message
    results = run(2, part_of_a_fit, world, folder.path, 2)
    assert torch.equal(results[0][0], whole[2][0][0])


def test_all_processes_have_seen_each_example_once(whole: dict[int, Any]) -> None:
    alone = together([whole[1][0][1]])
    assert together([part for _, part in whole[2]]) == alone
    first = [number for step in range(5) for number in alone[step][0]]
    assert len(first) == len(set(first)) == 35
