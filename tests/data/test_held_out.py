"""Examples that a fit does not see."""

import json
from pathlib import Path

import pytest

import trainmerge as tm
from tests.world import LABELS, write_world
from trainmerge.data.held_out import split


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], str]:
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    return {task: str(root / task / "calibration.jsonl") for task in LABELS}, str(root / "base")


def test_a_split_is_a_partition_in_order() -> None:
    for count in (2, 3, 15, 16, 40, 1000):
        learned, held = split(list(range(count)), 0.2, seed=1, expert=2)
        assert sorted([*learned, *held]) == list(range(count))
        assert learned == sorted(learned)
        assert held == sorted(held)
        assert len(held) == min(max(8, round(0.2 * count)), count // 2)
    assert split([1, 2], 0.0, 0, 0) == ([1, 2], [])
    with pytest.raises(ValueError, match="two examples per expert"):
        split([1], 0.2, 0, 0)
    assert split(list(range(40)), 0.2, 0, 0) != split(list(range(40)), 0.2, 0, 1)


def test_the_held_out_part_shares_no_example_with_the_fit(files: tuple[dict[str, str], str]) -> None:
    whole = tm.Calibration(*files)
    data = tm.Calibration(*files, held_out=0.25)
    part = data.held_out_part()
    for k, own in enumerate(whole.examples):
        assert len(data.examples[k]) == 30
        assert len(part.examples[k]) == 10
        assert all(example in own for example in data.examples[k] + part.examples[k])
    assert len({data.identity(), part.identity(), whole.identity()}) == 3
    assert "held_out" not in whole.settings()  # runs of older versions have the same settings
    with pytest.raises(ValueError, match=r"set data\.held_out"):
        whole.held_out_part()


def test_a_held_out_text_is_a_part_of_the_identity(tmp_path: Path) -> None:
    """A fit stops by held-out examples, so it may not be resumed with others."""
    write_world(tmp_path)
    file = tmp_path / "mood" / "calibration.jsonl"

    def read() -> tm.Calibration:
        return tm.Calibration({"mood": str(file)}, str(tmp_path / "base"), held_out=0.25)

    before = read()
    held = json.dumps({"text": before.held_out_part().examples[0][0].text})
    file.write_text(file.read_text().replace(held, json.dumps({"text": "another text"}), 1))
    after = read()
    assert after.examples == before.examples
    assert after.identities() != before.identities()
    assert after.learning_part().identities() == before.learning_part().identities()


@pytest.mark.parametrize("share", [-0.1, 0.6, float("nan"), True, "a"])
def test_a_share_has_a_range(files: tuple[dict[str, str], str], share: object) -> None:
    with pytest.raises(ValueError, match=r"data\.held_out"):
        tm.Calibration(*files, held_out=share)
