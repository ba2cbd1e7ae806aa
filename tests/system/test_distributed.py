"""What processes say to each other, on two processes over gloo."""

import pytest

from tests.ranks import Ranks, join_group
from trainmerge.system import distributed
from trainmerge.system.distributed import processes_started, rank_zero_first

FULL = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "count"),
    [({}, 1), ({"WORLD_SIZE": ""}, 1), ({"WORLD_SIZE": " "}, 1), ({"WORLD_SIZE": "1"}, 1), (FULL, 2)],
)
def test_the_number_of_processes(environment: dict[str, str], count: int) -> None:
    assert processes_started(environment) == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": ""}, "WORLD_SIZE is 2, but RANK is not set: start with torchrun"),
        ({"RANK": "", "MASTER_PORT": ""}, "but RANK, MASTER_PORT are not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number of processes"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not a number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1', not a number"),
    ],
)
def test_an_environment_that_cannot_work(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processes_started({**FULL, **changes})


def after_the_first(fails: int) -> str:
    """Rank `fails` raises inside."""
    join_group()
    try:
        with rank_zero_first():
            if distributed.rank() == fails:
                raise ValueError("no room")
    except (ValueError, ChildProcessError) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        (0, ["ValueError: no room", "ChildProcessError: process 0: ValueError: no room"]),
        (1, ["done", "ValueError: no room"]),
        (2, ["done", "done"]),
    ],
)
def test_the_others_learn_of_an_error_of_the_first(fails: int, words: list[str]) -> None:
    assert Ranks(2, after_the_first, fails).join() == words


def test_one_process_needs_no_group() -> None:
    with rank_zero_first(), distributed.joined():
        assert distributed.broadcast(3) == 3
        assert distributed.all_gather("a") == distributed.gather("a") == ["a"]
        assert distributed.own_share([1, 2]) == [1, 2]
        assert distributed.merge_shares({1: 2}) == {1: 2}
