"""Output layers of language models: they are merged like the rest, or refused with what to do.

Legend: `B` examples, `T` tokens.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.contracts import assert_same_bits
from tests.family_settings import ENCODER, TEXT
from tests.heads_world import make, texts, write_rows, write_tokenizer
from tests.model.test_own_head import batch_of, prepared
from tests.world import nudge
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_tasks import Expert

CAUSAL, MASKED = "LlamaForCausalLM", "BertForMaskedLM"
UNTIED = {**TEXT, "tie_word_embeddings": False}
TIED = {**TEXT, "tie_word_embeddings": True}


def world(root: Path, base: tuple[str, dict[str, Any]], expert: tuple[str, dict[str, Any]]) -> Recipe:
    """A base and one expert, another class or configuration, whose every parameter is moved."""
    for name, (kind, settings) in (("base", base), ("a", expert)):
        model = make(kind, settings)
        if name == "a":
            nudge(model, 3, 0.1)
        model.save_pretrained(root / name)
        write_tokenizer(root / name)
    rows = write_rows(root / "a.jsonl", [{"text": text} for text in texts(1, 4)])
    return Recipe(str(root / "base"), {"a": Expert(str(root / "a"), rows, rows)})


@pytest.mark.parametrize(
    ("kind", "settings", "head"),
    [
        (CAUSAL, UNTIED, {"lm_head.weight"}),
        (
            MASKED,
            ENCODER,
            {"cls.predictions.bias", "cls.predictions.transform.dense.weight",
             "cls.predictions.transform.LayerNorm.weight"},
        ),
        ("RobertaForMaskedLM", ENCODER, {"lm_head.bias", "lm_head.dense.weight"}),
    ],
)  # fmt: skip
def test_an_output_layer_is_merged_and_an_expert_keeps_its_logits(
    tmp_path: Path, kind: str, settings: dict[str, Any], head: set[str]
) -> None:
    recipe = world(tmp_path, (kind, settings), (kind, settings))
    module, data = prepared(recipe)
    assert head <= module.opened.layout.groups.keys()
    assert module.opened.own_heads == {}
    batch = batch_of(module, data, 0)
    with module.resident.merged.teacher(0), torch.no_grad():
        found = module.resident(batch).logits
    model = getattr(transformers, kind).from_pretrained(tmp_path / "a").eval()
    with torch.no_grad():
        assert_same_bits(found, model(**batch.inputs).logits)


@pytest.mark.parametrize(
    ("base", "expert", "words"),
    [
        ((CAUSAL, TIED), (CAUSAL, UNTIED), r"a: lm_head\.weight .* is untied, the base ti"),
        ((CAUSAL, UNTIED), (CAUSAL, TIED), r"lm_head\.weight .* is untied in the base"),
        (("LlamaModel", UNTIED), (CAUSAL, UNTIED), r"a has lm_head\.weight .*, which the base lacks"),
        (("BertModel", ENCODER), (MASKED, ENCODER), r"a has cls\.predictions\.bias .*the base lacks"),
        ((MASKED, ENCODER), ("BertModel", ENCODER), r"base has cls\.predictions.*the expert lacks"),
        (
            (MASKED, ENCODER), (MASKED, {**ENCODER, "tie_word_embeddings": False}),
            r"cls\.predictions\.decoder\.weight .* is untied, the base ties it to bert\.embeddings",
        ),
    ],
)  # fmt: skip
def test_output_layers_of_one_side_are_refused(
    tmp_path: Path, base: tuple[str, dict[str, Any]], expert: tuple[str, dict[str, Any]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        world(tmp_path, base, expert).open()
