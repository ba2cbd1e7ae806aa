"""Experts' own heads on two processes: data parallel and sharded fits end where one process ends."""

from pathlib import Path

import torch

import trainmerge as tm
from tests.bounds import fitted_bound
from tests.fitting.test_ranks import RATE, STEPS, world_fit
from tests.heads_world import write_heads
from tests.ranks import run
from trainmerge.run.recipe import Recipe

EXPERTS = {
    "a": {"task": "ForSequenceClassification", "num_labels": 2},
    "b": {"task": "ForTokenClassification", "num_labels": 3},
    "c": {"task": "ForQuestionAnswering"},
}


def fit_of(recipe: Recipe, folder: Path, processes: int, sharded: bool) -> torch.Tensor:
    objective = tm.Alignment(hidden=0.5, layers=(0, -1), record="float32")
    return world_fit(
        folder, folder, processes, recipe=recipe, objective=objective, sharded=sharded, batch_size=4
    )


def test_two_processes_end_where_one_does(tmp_path: Path) -> None:
    recipe, _ = write_heads(tmp_path, "Bert without a pooler", EXPERTS)
    want = fit_of(recipe, tmp_path / "one", 1, False)
    assert (want - 0.3).abs().max() > 1e-3
    for sharded in (False, True):
        for got in run(2, fit_of, recipe, tmp_path / f"two-{sharded}", 2, sharded):
            assert (got - want).abs().max() < fitted_bound(STEPS, RATE), sharded
