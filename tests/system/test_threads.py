"""Threads are chosen from facts about the machine; here the facts are made up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainmerge.system.threads import (
    USERS,
    Machine,
    limits,
    physical_cores,
    processor_ticks,
    quota,
    suggested,
    threads_for,
)


@pytest.mark.parametrize(
    ("machine", "threads", "passive"),
    [
        (Machine(cores=2), 2, False),
        (Machine(cores=2, busy=0.1), 2, False),
        (Machine(cores=2, busy=1.0), 1, False),
        (Machine(cores=2, busy=2.0), 1, False),
        (Machine(cores=1, busy=1.0), 1, False),
        (Machine(cores=8, busy=1.0), 7, True),  # threads are fewer, and may still meet the neighbour
        (Machine(cores=8, busy=7.9), 1, False),
        (Machine(cores=64, quota=4.0), 4, False),
        (Machine(cores=64, quota=4.5, busy=30.0), 4, True),
        (Machine(cores=64, quota=0.5), 1, False),
        (Machine(cores=16, processes=4), 4, False),
        (Machine(cores=2, processes=4), 1, False),
        (Machine(cores=16, quota=8.0, processes=2), 4, False),
    ],
)
def test_choose(machine: Machine, threads: int, passive: bool) -> None:
    choice = threads_for(machine)
    assert (choice.threads, choice.passive) == (threads, passive)
    assert choice.environment["OMP_NUM_THREADS"] == str(threads)
    assert ("OMP_WAIT_POLICY" in choice.environment) == passive
    assert "\n" not in str(choice)


def test_a_run_goes_on_with_its_own_number() -> None:
    assert threads_for(Machine(cores=4), earlier=2).threads == 2
    beside = threads_for(Machine(cores=2, busy=1.0), earlier=2)
    assert (beside.threads, beside.passive) == (2, True)  # more than are free: they must not spin
    assert "as the run had" in str(beside)
    fewer = threads_for(Machine(cores=2), earlier=8)
    assert fewer.threads == 2
    assert "the run had 8, so the last bits may differ" in str(fewer)


@pytest.mark.parametrize("name", USERS)
def test_what_a_user_has_set_is_left_alone(name: str) -> None:
    assert suggested({name: "3"}) is None


def test_control_groups_of_both_versions(tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    groups.write_text("0::/jobs/mine\n")
    (tmp_path / "jobs" / "mine").mkdir(parents=True)
    assert quota(tmp_path, groups) is None
    (tmp_path / "jobs" / "mine" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "jobs" / "cpu.max").write_text("150000 100000\n")
    assert quota(tmp_path, groups) == 1.5  # of the group above
    groups.write_text("7:memory:/x\n3:cpu,cpuacct:/old\n")
    (tmp_path / "cpu" / "old").mkdir(parents=True)
    (tmp_path / "cpu" / "old" / "cpu.cfs_quota_us").write_text("300000\n")
    (tmp_path / "cpu" / "old" / "cpu.cfs_period_us").write_text("100000\n")
    assert quota(tmp_path, groups) == 3.0
    (tmp_path / "cpu" / "old" / "cpu.cfs_quota_us").write_text("-1\n")
    assert limits(tmp_path / "cpu" / "old") == []
    assert quota(tmp_path, tmp_path / "nowhere") is None


def test_hyperthreads_are_one_core(tmp_path: Path) -> None:
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(f"{siblings}\n")
    assert physical_cores({0, 1, 2, 3}, tmp_path) == 2
    assert physical_cores({0, 2}, tmp_path) == 1
    assert physical_cores({0, 1, 2}, tmp_path / "nowhere") == 3


def test_ticks_of_our_processors_only() -> None:
    stat = "cpu  9 9 9 9 9\ncpu0 10 1 2 80 7 0 0 0 0 0\ncpu1 1 1 1 1 1 1 1 1 0 0\nintr 5\n"
    assert processor_ticks(stat, {0}) == {0: (13, 100)}


def test_a_command_says_what_it_chose_before_torch_is_loaded(tmp_path: Path) -> None:
    free = {name: value for name, value in os.environ.items() if name not in USERS}
    command = [sys.executable, "-m", "trainmerge.cli", "export", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, env=free, capture_output=True, text=True, check=False)
    first, *_ = done.stderr.splitlines()
    assert first.startswith("trainmerge: ")
    assert "(OMP_NUM_THREADS overrides)" in first
    done = subprocess.run(
        command, env={**free, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.stderr.startswith("trainmerge export: ")  # the error, and nothing before it
