"""`export --task`: an ordinary checkpoint of the expert's class, whose logits are those in memory.

Legend: `B` examples.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import trainmerge as tm
from tests.evaluate.test_own_heads import run_of
from tests.heads_world import write_heads
from tests.model.test_adapter_heads import write_adapter
from tests.model.test_own_head import TWO, batch_of, prepared
from trainmerge.cli import main
from trainmerge.run.recipe import Recipe

NAMED = {**TWO["b"], "id2label": {0: "low", 1: "mid", 2: "high"}, "label2id": {"low": 0, "mid": 1, "high": 2}}


def assert_same_logits(recipe: Recipe, run: Path, task: str, out: Path) -> None:
    """Loaded by transformers, the export gives the logits of the run's merge."""
    module, data = prepared(recipe)
    module.coefficients.load_state_dict(tm.load_coefficients(run / "coefficients.safetensors").state_dict())
    module.resident.merged.materialise()
    k = list(recipe.experts).index(task)
    batch = batch_of(module, data, k)
    inputs = {name: value for name, value in batch.inputs.items() if name != "labels"}
    with torch.no_grad():
        want = module.resident(batch).logits
        got = AutoModelForSequenceClassification.from_pretrained(out).eval()(**inputs).logits
    assert want.std() > 0
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["Bert without a pooler", "Roberta", "DistilBert", "Llama", "T5"])
def test_the_task_of_full_experts(tmp_path: Path, architecture: str) -> None:
    recipe, _ = write_heads(tmp_path, architecture, {"a": TWO["a"], "b": NAMED})
    run = run_of(recipe, tmp_path / "run", steps=1)
    out = tm.export_run(run, tmp_path / "out", task="b")
    assert_same_logits(recipe, run, "b", out)
    assert tm.verify_export(run, out) == len(load_file(out / "model.safetensors"))
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "low", "1": "mid", "2": "high"}
    assert config["architectures"] == [architecture.split()[0] + "ForSequenceClassification"]
    assert (
        AutoTokenizer.from_pretrained(out)("good").input_ids
        == AutoTokenizer.from_pretrained(tmp_path / "base")("good").input_ids
    )
    assert json.loads((out / "trainmerge_manifest.json").read_text())["task"] == "b"


def test_the_task_of_an_adapter(tmp_path: Path) -> None:
    recipe = write_adapter(tmp_path, "Bert", "SEQ_CLS", "ForSequenceClassification", ["query"])
    run = run_of(recipe, tmp_path / "run")
    out = tm.export_run(run, tmp_path / "out", task="a")
    assert_same_logits(recipe, run, "a", out)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]


def test_the_command_and_its_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, _ = write_heads(tmp_path, "Roberta", TWO)
    run, out = run_of(recipe, tmp_path / "run"), tmp_path / "out"
    assert main(["export", str(run), str(out), "--task", "a", "--verify"]) == 0
    assert "tensors are the merge of" in capsys.readouterr().out
    assert main(["export", str(run), str(tmp_path / "no"), "--task", "c"]) == 1
    assert (
        "task 'c': no expert of this name has a head of its own (those with one: a, b)"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "no").exists()
    file = out / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.out_proj.bias"] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"classifier\.out_proj\.bias \(not merged\) differs in 2 of 2"):
        tm.verify_export(run, out)
