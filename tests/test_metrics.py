"""Means and normalised scores of accuracies and perplexities; perplexity of a model against its own loss."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.test_alignment import languages  # noqa: F401 - a fixture
from tests.world import languages_recipe, llama
from trainmerge.cli import main
from trainmerge.evaluate import Examples, metric_of, perplexity
from trainmerge.forward import forward
from trainmerge.metrics import ACCURACY, PERPLEXITY
from trainmerge.tokenizer import Tokenizer


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


@torch.no_grad()
def test_perplexity_is_exp_of_the_models_own_loss(languages: Path) -> None:  # noqa: F811
    model = llama().eval()
    tokenize = Tokenizer(str(languages / "base"), 16)
    texts = ["red blue green", "one two", "cat dog bird fish good"]
    got = perplexity(lambda b: forward(model, b, None).logits, 0, Examples(texts), tokenize, tokens=12)
    losses, count = 0.0, 0
    for text in texts:
        ids = tokenize([text])["input_ids"]
        losses += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert got == pytest.approx(math.exp(losses / count), rel=1e-5)


def test_a_second_stage_from_the_command_line(languages: Path, tmp_path: Path) -> None:  # noqa: F811
    import yaml

    from trainmerge.config import to_config

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
