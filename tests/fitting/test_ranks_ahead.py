"""A sharded fit with other numbers of blocks gathered ahead: the same coefficients for the same bytes."""

from pathlib import Path

import pytest
import torch

import trainmerge as tm
from tests.collectives import CountStep
from tests.fitting.test_ranks import world_fit
from tests.ranks import run
from tests.world import languages_recipe, write_languages

AHEAD = (1, 0, 2, 3)


def fits_ahead(root: Path) -> list[tuple[torch.Tensor, dict[str, int]]]:
    """One of two processes' part of the same fit: coefficients, and bytes sent in the second step."""
    ended = []
    for ahead in AHEAD:
        count = CountStep()
        found = world_fit(
            root, root / f"ahead-{ahead}", 2, recipe=languages_recipe(root), objective=tm.Alignment(0.5),
            sharded=True, gathered_ahead=ahead, callbacks=[count], batch_size=4, tasks_per_backward=2,
        )  # fmt: skip
        ended.append((found, dict(count.count.bytes)))
    return ended


def test_coefficients_and_bytes_do_not_depend_on_what_is_gathered_ahead(tmp_path: Path) -> None:
    write_languages(tmp_path, layers=4)
    for results in run(2, fits_ahead, tmp_path):
        (wanted, sent), *others = results
        assert sent["_allgather_base_"] > 0
        assert (wanted != 0.3).all()  # they moved
        for coefficients, bytes_sent in others:
            assert torch.equal(coefficients, wanted)
            assert bytes_sent == sent


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gathered_ahead": 2}, r"model\.gathered_ahead: 2 is for model\.sharded"),
        ({"shard_over": "machine"}, r"model\.shard_over: machine is for model\.sharded"),
        ({"sharded": True, "gathered_ahead": -1}, r"model\.gathered_ahead"),
    ],
)
def test_settings_of_shards_are_refused_where_they_mean_nothing(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    write_languages(tmp_path)
    with pytest.raises(ValueError, match=message):
        tm.MergeModule(languages_recipe(tmp_path), workspace=str(tmp_path / "work"), **settings)  # type: ignore[arg-type]
