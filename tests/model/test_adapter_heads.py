"""Adapters with a task's head: the class is built over the base, the head is the adapter's own.

Legend: `B` examples.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests.heads_world import ARCHITECTURES, make, texts, write_rows, write_tokenizer
from tests.model.test_own_head import batch_of, prepared
from tests.world import nudge
from trainmerge import Calibration, MergeModule
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_tasks import Expert

CASES = [
    ("Bert", "SEQ_CLS", "ForSequenceClassification", ["query", "value"]),
    ("Roberta", "TOKEN_CLS", "ForTokenClassification", ["query", "value"]),
    ("Llama", "SEQ_CLS", "ForSequenceClassification", ["q_proj", "down_proj"]),
    ("Bert", "QUESTION_ANS", "ForQuestionAnswering", ["query"]),
]


def write_adapter(
    root: Path, architecture: str, task: str, kind: str, targets: list[str], **more: Any
) -> Recipe:
    """A base, and an adapter of its class for the task, with three labels."""
    base_kind, settings = ARCHITECTURES[architecture]
    make(base_kind, settings).save_pretrained(root / "base")
    write_tokenizer(root / "base")
    adapter(root, architecture.split()[0] + kind, task, targets, **more)
    calibration = write_rows(root / "a.jsonl", [{"text": text} for text in texts(1, 6)])
    return Recipe(str(root / "base"), {"a": Expert(str(root / "a"), calibration)})


def adapter(root: Path, kind: str, task: str, targets: list[str], **more: Any) -> None:
    config = LoraConfig(r=2, lora_alpha=8, target_modules=targets, task_type=task, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(started(root, kind), config)
        nudge(wrapped, 3, 0.2)
        for name, parameter in started(root, kind).named_parameters():  # only what is trained has moved
            own = dict(wrapped.base_model.model.named_parameters())
            place = name if name in own else name.replace(".weight", ".base_layer.weight")
            if place in own and not own[place].requires_grad:
                own[place].data.copy_(parameter)
        wrapped.save_pretrained(root / "a")


def started(root: Path, kind: str) -> PreTrainedModel:
    """The class over the base's files, its head drawn at random."""
    torch.manual_seed(1)
    labels = {} if kind.endswith("QuestionAnswering") else {"num_labels": 3}
    model: PreTrainedModel = getattr(transformers, kind).from_pretrained(root / "base", **labels)
    return model.eval()


@pytest.mark.parametrize(("architecture", "task", "kind", "targets"), CASES)
def test_one_hot_is_the_adapter(
    tmp_path: Path, architecture: str, task: str, kind: str, targets: list[str]
) -> None:
    recipe = write_adapter(tmp_path, architecture, task, kind, targets)
    module, data = prepared(recipe)
    batch = batch_of(module, data, 0)
    wrapped = PeftModel.from_pretrained(
        started(tmp_path, architecture.split()[0] + kind), tmp_path / "a"
    ).eval()
    with module.resident.merged.teacher(0), torch.no_grad():
        got = module.resident(batch).logits
        output = wrapped(**batch.inputs)
    if task == "QUESTION_ANS":
        real = batch.inputs["attention_mask"].bool()
        want = torch.stack([output.start_logits, output.end_logits], 1)
        got, want = got.transpose(1, 2)[real], want.transpose(1, 2)[real]
    else:
        want = output.logits
    assert want.std() > 0.01
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def check_logits(module: MergeModule, data: Calibration, root: Path) -> None:
    """Expert a's logits are those of peft's model."""
    batch = batch_of(module, data, 0)
    wrapped = PeftModel.from_pretrained(started(root, "BertForSequenceClassification"), root / "a").eval()
    with module.resident.merged.teacher(0), torch.no_grad():
        got = module.resident(batch).logits
        torch.testing.assert_close(got, wrapped(**batch.inputs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["Bert", "Bert without a pooler"])
@pytest.mark.parametrize("pooler", ["bert.pooler.dense", "bert.pooler", "pooler"])
def test_a_module_is_saved_by_its_path(tmp_path: Path, architecture: str, pooler: str) -> None:
    """The base's class may lack the path's prefix; a pooler that the base lacks is the adapter's own."""
    recipe = write_adapter(
        tmp_path, architecture, "SEQ_CLS", "ForSequenceClassification", ["query"],
        modules_to_save=["classifier", pooler],
    )  # fmt: skip
    module, data = prepared(recipe)
    check_logits(module, data, tmp_path)
    merged = [name for name in module.opened.task_vectors.deltas if "pooler" in name]
    assert len(merged) == (2 if architecture == "Bert" else 0)


def test_a_whole_update_beside_a_head(tmp_path: Path) -> None:
    """DoRA is merged by peft, which must not look for the head in the base."""
    recipe = write_adapter(tmp_path, "Bert", "SEQ_CLS", "ForSequenceClassification", ["query"], use_dora=True)
    module, data = prepared(recipe)
    check_logits(module, data, tmp_path)


def test_another_number_of_labels_than_the_bases(tmp_path: Path) -> None:
    """The base is a classifier itself: the adapter's head has other shapes, so it is its own."""
    recipe = write_adapter(tmp_path, "Bert", "SEQ_CLS", "ForSequenceClassification", ["query"])
    config = dict(ARCHITECTURES["Bert"][1])
    body = transformers.BertModel.from_pretrained(tmp_path / "base")
    base = make("BertForSequenceClassification", config, num_labels=5)
    base.bert.load_state_dict(body.state_dict())
    base.save_pretrained(tmp_path / "base")
    module, data = prepared(recipe)
    with torch.no_grad():
        assert module.resident(batch_of(module, data, 0)).logits.shape == (4, 3)
    assert not [name for name in module.opened.task_vectors.deltas if name.startswith("classifier")]


def test_a_layer_that_nobody_saved(tmp_path: Path) -> None:
    """peft saves the classifier, not the pooler below it, which was random in training."""
    recipe = write_adapter(
        tmp_path, "Bert without a pooler", "SEQ_CLS", "ForSequenceClassification", ["query"]
    )
    with pytest.raises(ValueError, match=r"would be random: bert\.pooler\.dense\.weight"):
        prepared(recipe)


def test_a_pickled_adapter_that_peft_merges_has_its_head(tmp_path: Path) -> None:
    """Its weights are merged into the workspace; its head is read from its own file."""
    recipe = write_adapter(tmp_path, "Bert", "SEQ_CLS", "ForSequenceClassification", ["query"], use_dora=True)
    file = tmp_path / "a" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert list(replace(recipe, allow_pickle=True).open(tmp_path / "workspace").own_heads) == ["a"]
