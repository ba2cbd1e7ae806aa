"""An expert's own class over the merged weights: it is the expert where the merge is, and learns elsewhere.

Legend: `K` experts, `G` coefficient groups, `B` examples, `T` tokens.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import BertModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

import trainmerge as tm
from tests.bounds import assert_within
from tests.heads_world import (
    ARCHITECTURES,
    expert_of,
    make,
    texts,
    write_heads,
    write_rows,
    write_tokenizer,
)
from trainmerge.checkpoints import output_of
from trainmerge.data.batch import Batch
from trainmerge.fitting.preflight import head_problems
from trainmerge.model.functional import merged_weights
from trainmerge.model.own_head import OwnModel
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_files import calibration_files
from trainmerge.run.recipe_tasks import Expert

TWO = {
    "a": {"task": "ForSequenceClassification", "num_labels": 2},
    "b": {"task": "ForSequenceClassification", "num_labels": 3},
}


def prepared(
    recipe: Recipe, objective: tm.Objective | None = None, **settings: object
) -> tuple[tm.MergeModule, tm.Calibration]:
    place = str(Path(recipe.base).parent / "workspace")
    module = tm.MergeModule(recipe, objective or tm.Alignment(), workspace=place, **settings)
    data = tm.Calibration(calibration_files(recipe), recipe.base, batch_size=4, max_length=16)
    module.load(data)
    return module, data


def batch_of(module: tm.MergeModule, data: tm.Calibration, k: int, count: int = 4) -> Batch:
    return module.resident.batch(k, data.examples[k][:count], data.tokenize)


@torch.no_grad()
def reloaded(folder: Path, kind: type[PreTrainedModel], batch: Batch) -> Tensor:
    """What transformers itself computes with the expert's folder."""
    inputs = {name: value for name, value in batch.inputs.items() if name != "labels"}
    output = kind.from_pretrained(folder).eval()(**inputs)
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], 1)


# transformers saves a Bart of two labels so that it does not load it again.
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "Bart"])
def test_one_hot_is_the_expert(tmp_path: Path, architecture: str) -> None:
    """Other label sets, other heads: each expert's logits are those of its own class and files."""
    recipe, models = write_heads(tmp_path, architecture, TWO)
    module, data = prepared(recipe)
    for k, name in enumerate(recipe.experts):
        batch = batch_of(module, data, k)
        with module.resident.merged.teacher(k):
            got = module.resident(batch)  # with gradients, as in a fit
        want = reloaded(tmp_path / name, type(models[name]), batch)
        assert got.kind == "classes"
        assert got.logits.shape == (4, k + 2)
        assert want.std() > 0
        if architecture == "T5":  # without a cache its decoder multiplies in another order
            torch.testing.assert_close(got.logits, want, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(got.logits, want), (got.logits - want).abs().max()


def test_a_base_that_was_saved_without_its_pooler(tmp_path: Path) -> None:
    """Its class has one, its files have none: the experts' poolers are their own."""
    recipe, models = write_heads(tmp_path, "Bert", TWO)
    base = BertModel.from_pretrained(recipe.base, add_pooling_layer=False)
    base.save_pretrained(recipe.base)
    with pytest.raises(ValueError, match=r"pooler\.dense\.bias.*name them in `ignore`"):
        prepared(recipe)
    module, data = prepared(replace(recipe, ignore=["pooler.*"]))
    assert not [name for name in module.opened.task_vectors.deltas if "pooler" in name]
    for k, name in enumerate(recipe.experts):
        batch = batch_of(module, data, k)
        with module.resident.merged.teacher(k):
            got = module.resident(batch).logits
        assert torch.equal(got, reloaded(tmp_path / name, type(models[name]), batch))


@pytest.mark.parametrize("architecture", ["Bert", "Roberta", "ModernBert", "Llama"])
def test_the_blocks_are_the_residents(tmp_path: Path, architecture: str) -> None:
    """So hooks, taps, checkpointing and shards of the resident model work below every head."""
    recipe, _ = write_heads(tmp_path, architecture, TWO)
    resident = prepared(recipe)[0].resident
    own = resident.classifiers[0]
    assert isinstance(own, OwnModel)
    blocks = [m for m in resident.merged.module.modules() if isinstance(m, GradientCheckpointingLayer)]
    there = {id(part) for part in own.module.modules()}
    assert blocks
    assert all(id(block) in there for block in blocks)
    extra = {id(p) for p in own.module.parameters()} - {id(p) for p in resident.merged.module.parameters()}
    assert 0 < len(extra) <= 6
    assert not any(p.requires_grad for p in own.module.parameters() if id(p) in extra)


@pytest.mark.parametrize("architecture", ["Bert", "Bert without a pooler", "Roberta", "Llama", "Albert"])
def test_gradient_is_autograds(tmp_path: Path, architecture: str) -> None:
    """The coefficients' gradient against one backward through the merge and the expert's class."""
    recipe, _ = write_heads(tmp_path, architecture, TWO)
    module, data = prepared(recipe, tm.Entropy(agreement=1.0), initial=0.4)
    merged = module.resident.merged
    merged.materialise()
    batch = batch_of(module, data, 1)
    module.loss(batch).backward()
    got = merged.gradient()
    own = module.resident.classifiers[1]
    assert isinstance(own, OwnModel)
    names = {id(p): name for name, p in own.module.named_parameters()}
    weights = {
        names[id(merged.parameters[name])]: weight
        for name, weight in merged_weights(merged.task_vectors, module.coefficients).items()
        if id(merged.parameters[name]) in names
    }
    logits = functional_call(own.module, weights, (), dict(own.inputs(batch))).logits
    told = module.loaded.teachers[1].of(batch.ids, torch.device("cpu")).predictions
    assert told is not None
    log_q = logits.log_softmax(-1)
    loss = -(log_q.exp() * log_q).sum(-1) + (told.log_p.exp() * (told.log_p - log_q)).sum(-1)
    (want,) = torch.autograd.grad(loss.mean(), [module.coefficients.raw])
    assert want.abs().max() > 1e-6
    assert_within(got, want, 3e-5 * want.abs().max().double())


def test_hidden_states_are_recorded_once_each(tmp_path: Path) -> None:
    """Blocks in several classes: transformers' hooks on them must not collect a state twice."""
    recipe, _ = write_heads(tmp_path, "Bert", TWO)
    module, data = prepared(recipe, tm.Alignment(logits=0.0, hidden=1.0, layers=(0, 1, 2, -1)))
    for k in range(2):
        batch = batch_of(module, data, k)
        with module.resident.merged.teacher(k), torch.no_grad():
            found = module.resident(batch, (0, 1, 2, -1)).hidden
            body = module.resident.merged.module(**batch.inputs, output_hidden_states=True).hidden_states
            loss = module.loss(batch)
        assert len(body) == 3
        for layer, state in found.items():
            assert torch.equal(state, body[layer])
        assert float(loss) < 1e-4  # bfloat16 records


def test_a_fit_learns_and_resumes(tmp_path: Path) -> None:
    recipe, _ = write_heads(tmp_path, "Roberta", TWO)

    def learn(run: Path, *steps: int) -> Tensor:
        for count in steps:
            module = tm.MergeModule(recipe, tm.Alignment(), workspace=str(run / "workspace"))
            data = tm.Calibration(calibration_files(recipe), recipe.base, batch_size=4, max_length=16)
            trainer = tm.make_trainer(run, max_steps=count, save_every=1, accelerator="cpu",
                                      enable_progress_bar=False)  # fmt: skip
            tm.fit(module, data, trainer, run)
        return module.coefficients().detach()

    whole, parts = learn(tmp_path / "whole", 4), learn(tmp_path / "parts", 2, 4)
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, torch.full_like(whole, 0.3))


def test_last_token_heads_need_a_padding_token(tmp_path: Path) -> None:
    recipe, _ = write_heads(tmp_path, "Llama", {"a": {**TWO["a"], "pad_token_id": None}})
    with pytest.raises(
        ValueError, match=r"LlamaForSequenceClassification classifies by the last token.*pad_token_id"
    ):
        prepared(recipe)


def test_a_class_that_reads_the_last_position_is_refused(tmp_path: Path) -> None:
    """XLNet's summary of a padded text would be that of its padding."""
    settings = {"vocab_size": 40, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}
    base = make("XLNetModel", settings)
    base.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    expert_of(base, "XLNetForSequenceClassification", tmp_path / "a", 1, num_labels=3)
    rows = write_rows(tmp_path / "a.jsonl", [{"text": text, "label": 0} for text in texts(1, 4)])
    recipe = Recipe(str(tmp_path / "base"), {"a": Expert(str(tmp_path / "a"), rows, rows)})
    words = (
        r"a/config\.json: XLNetForSequenceClassification classifies by the last position, which is padding"
    )
    with pytest.raises(ValueError, match=words):
        prepared(recipe)
    classifier = make("XLNetForSequenceClassification", {**settings, "num_labels": 3})
    for name in ("base", "a"):
        classifier.save_pretrained(tmp_path / name)
    module = tm.MergeModule(recipe, tm.Alignment(), workspace=str(tmp_path / "workspace"))
    words = r"base: XLNetForSequenceClassification classifies by the last position"
    assert any(re.search(words, line) for line in head_problems(module, output_of(tmp_path / "base")))
    with pytest.raises(ValueError, match=words):
        tm.evaluate_checkpoint(tmp_path / "a", recipe)


def test_padding_of_another_token(tmp_path: Path) -> None:
    """The expert was padded with another token than the base's tokenizer pads with."""
    recipe, models = write_heads(tmp_path, "Llama", {"a": {**TWO["a"], "pad_token_id": 9}})
    module, data = prepared(recipe)
    with module.resident.merged.teacher(0), torch.no_grad():
        together = module.resident(batch_of(module, data, 0)).logits
        for i, example in enumerate(data.examples[0][:4]):
            alone = models["a"](**data.tokenize([example.text])).logits
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)
