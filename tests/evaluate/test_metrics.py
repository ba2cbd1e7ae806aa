"""Means, normalised scores and forgetting of accuracies and perplexities; a second stage by command."""

import json
import math
from pathlib import Path

import pytest

from tests.objectives.test_alignment import languages  # noqa: F401 - a fixture
from tests.world import languages_recipe
from trainmerge.cli import main
from trainmerge.evaluate import metric_of
from trainmerge.run.scores import ACCURACY, PERPLEXITY


def test_accuracy() -> None:
    rows = {"learned": {"a": 0.4, "b": 0.9}, "expert": {"a": 0.8, "b": 0.9}}
    assert ACCURACY.mean(rows["learned"]) == pytest.approx(0.65)
    assert ACCURACY.normalised(rows) == pytest.approx({"learned": 0.75, "expert": 1.0})
    assert ACCURACY.best(rows, ["learned", "expert"]) == "expert"
    assert ACCURACY.normalised({"learned": {"a": 1.0}}) == {}


def test_perplexity_is_geometric_and_closes_a_gap_in_logs() -> None:
    rows = {"base": {"a": 100.0, "b": 1.0}, "learned": {"a": 10.0, "b": 1.0}, "expert": {"a": 1.0, "b": 1.0}}
    assert PERPLEXITY.mean(rows["base"]) == pytest.approx(10)
    assert PERPLEXITY.normalised(rows) == pytest.approx({"base": 0.0, "learned": 0.5, "expert": 1.0})
    assert PERPLEXITY.best(rows, ["base", "learned"]) == "learned"


def test_forgetting_is_how_much_worse_than_the_base() -> None:
    rows = {"base": {"x": 0.8, "y": 0.5}, "learned": {"x": 0.7, "y": 0.7}}
    assert ACCURACY.forgetting(rows) == pytest.approx({"base": 0.0, "learned": -0.05})
    rows = {"base": {"x": 10.0}, "learned": {"x": 10.0 * math.e}}
    assert PERPLEXITY.forgetting(rows) == pytest.approx({"base": 0.0, "learned": 1.0})
    assert ACCURACY.forgetting({"learned": {"x": 0.7}}) == {}


def test_a_second_stage_from_the_command_line(languages: Path, tmp_path: Path) -> None:  # noqa: F811
    import yaml

    from trainmerge.run.config import to_config

    assert metric_of(languages_recipe(languages)) == PERPLEXITY
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "recipe": to_config(languages_recipe(languages)),
                "model": {
                    "objective": {"class_path": "trainmerge.Alignment"},
                    "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.02}},
                    "keep_better": True,
                },
                "data": {"batch_size": 3, "max_length": 16},
                "trainer": {"max_steps": 6, "accelerator": "cpu", "enable_progress_bar": False},
                "report": False,
            }
        )
    )
    one, two, chunks = str(tmp_path / "one"), str(tmp_path / "two"), str(tmp_path / "chunks.json")
    assert main(["fit", "--config", str(config), "--run", one]) == 0
    assert main(["allocate", one, chunks, "--budget", "2", "--by", "energy"]) == 0
    by_energy = json.loads(Path(chunks).read_text())
    assert main(["allocate", one, chunks, "--budget", "2"]) == 0
    by_magnitude = json.loads(Path(chunks).read_text())
    assert by_energy["realised"] == by_magnitude["realised"] == 2
    assert by_energy["importance"] != by_magnitude["importance"]
    more = ["--recipe.grouping.granularity=chunk", f"--recipe.grouping.chunks={chunks}"]
    start = f"--model.initial={one}/coefficients.safetensors"
    assert main(["fit", "--config", str(config), "--run", two, *more, start]) == 0
    assert main(["inspect", two]) == 0
    assert main(["evaluate", two]) == 0
    scores = yaml.safe_load((tmp_path / "two" / "scores.json").read_text())
    assert scores["expert"]["normalised"] == 1.0
    assert main(["allocate", one, chunks, "--budget", "-1"]) == 1
