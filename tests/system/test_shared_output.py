"""One folder of several processes: all complete it or none, on two processes over gloo."""

from pathlib import Path

import pytest

from tests.ranks import Ranks, join_group, run
from trainmerge.system import distributed
from trainmerge.system.shared_output import agreed, balanced_share, staging_shared


def write_part(target: Path, fails: int) -> str:
    join_group()
    try:
        with staging_shared(target) as folder:
            if distributed.rank() == fails:
                raise OSError("no room")
            (folder / str(distributed.rank())).write_text("x")
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


@pytest.mark.parametrize(
    ("fails", "words", "files"),
    [
        (2, ["done", "done"], ["0", "1"]),
        (0, ["OSError: no room", "ChildProcessError: process 0: OSError: no room"], None),
        (1, ["ChildProcessError: process 1: OSError: no room", "OSError: no room"], None),
    ],
)
def test_a_folder_appears_if_no_process_fails(
    tmp_path: Path, fails: int, words: list[str], files: list[str] | None
) -> None:
    target = tmp_path / "out"
    assert Ranks(2, write_part, target, fails).join() == words
    assert (sorted(path.name for path in target.iterdir()) if target.exists() else None) == files
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if files else [])


def share() -> list[str]:
    join_group()
    return balanced_share({"a": 5, "b": 3, "c": 3, "d": 1})


def test_shares_are_balanced_and_disjoint() -> None:
    first, second = run(2, share)
    assert (first, second) == (["a", "d"], ["b", "c"])
    assert balanced_share({"a": 1, "b": 2}) == ["b", "a"]


def test_one_process_agrees_with_itself() -> None:
    with pytest.raises(ValueError, match="own"), agreed():
        raise ValueError("own")
