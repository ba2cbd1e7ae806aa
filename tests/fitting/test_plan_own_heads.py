"""A plan of a fit with experts' own heads, of every kind: the dry run passes through their classes."""

from pathlib import Path

import pytest

import trainmerge as tm
from tests.heads_world import write_heads
from trainmerge.run.recipe_files import calibration_files

CLASSIFIER = "ForSequenceClassification"
KINDS = {
    "classes": {"task": CLASSIFIER, "num_labels": 3},
    "labels": {"task": CLASSIFIER, "num_labels": 3, "problem_type": "multi_label_classification"},
    "values": {"task": CLASSIFIER, "num_labels": 1},
    "tokens": {"task": "ForTokenClassification", "num_labels": 3},
    "spans": {"task": "ForQuestionAnswering"},
}


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_every_kind_is_planned(tmp_path: Path, hidden: float) -> None:
    recipe, _ = write_heads(tmp_path, "Bert without a pooler", KINDS, count=4)
    data = tm.Calibration(calibration_files(recipe), recipe.base, batch_size=2, max_length=16)
    module = tm.MergeModule(recipe, tm.Alignment(hidden=hidden), workspace=str(tmp_path / "workspace"))
    plan = tm.plan_fit(module, data)
    assert plan.dry_run.flops > 0
    assert plan.memory.activations > 0
