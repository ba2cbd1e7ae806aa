"""Tiny experts with heads of their own: a base, classifiers of many architectures, a tokenizer and texts.

Legend: `B` examples.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.family_settings import BART, DEBERTA, DISTILBERT, ENCODER, GPT, MODERNBERT, T5, TEXT
from tests.world import WORDS, nudge
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_tasks import Expert

ENDS = {"eos_token_id": 3, "bos_token_id": 2}
# Architecture -> its base's class, and the arguments of its configuration
ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Bert": ("BertModel", ENCODER),
    "Bert without a pooler": ("BertForMaskedLM", ENCODER),
    "Roberta": ("RobertaForMaskedLM", ENCODER),
    "XLMRoberta": ("XLMRobertaModel", ENCODER),
    "DistilBert": ("DistilBertForMaskedLM", DISTILBERT),
    "Electra": ("ElectraModel", {**ENCODER, "embedding_size": 16}),
    "Albert": ("AlbertForMaskedLM", {**ENCODER, "embedding_size": 16}),
    "DebertaV2": ("DebertaV2Model", {**ENCODER, **DEBERTA}),
    "ModernBert": ("ModernBertForMaskedLM", {**ENCODER, **MODERNBERT}),
    "MPNet": ("MPNetModel", ENCODER),
    "Llama": ("LlamaForCausalLM", TEXT),
    "Qwen2": ("Qwen2Model", {**TEXT, "tie_word_embeddings": True}),
    "GPT2": ("GPT2LMHeadModel", GPT),
    "T5": ("T5ForConditionalGeneration", {**T5, **ENDS, "pad_token_id": 0}),
    "Bart": ("BartModel", {**BART, **ENDS, "pad_token_id": 0}),
}


def write_tokenizer(folder: Path, padding: str = "[PAD]") -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=padding, unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip


def make(kind: str, settings: Mapping[str, Any], seed: int = 0, **more: Any) -> PreTrainedModel:
    """A model of a class of transformers, its weights drawn wide enough that its outputs differ."""
    made = getattr(transformers, kind)
    config = made.config_class(**{**settings, **more})
    torch.manual_seed(seed)
    model: PreTrainedModel = made(config).eval()
    return model


def expert_of(base: PreTrainedModel, kind: str, folder: Path, seed: int, **labels: Any) -> PreTrainedModel:
    """A fine-tuned model of another class: the base's weights and a new head, all moved, and saved."""
    config = copy.deepcopy(base.config)
    for key, value in labels.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    place = folder.parent / f"{folder.name}-start"
    base.save_pretrained(place)
    expert: PreTrainedModel = getattr(transformers, kind).from_pretrained(place, config=config).eval()
    nudge(expert, seed + 5, 0.15)
    expert.save_pretrained(folder)
    return expert


def texts(seed: int, count: int) -> list[str]:
    """Texts of two to eight words."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 9, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator)) for n in sizes]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_heads(
    root: Path, architecture: str, experts: Mapping[str, Mapping[str, Any]], count: int = 8
) -> tuple[Recipe, dict[str, PreTrainedModel]]:
    """A base of this architecture and one expert per entry: its class's ending as `task`, and its labels."""
    kind, settings = ARCHITECTURES[architecture]
    base = make(kind, settings)
    base.save_pretrained(root / "base")
    write_tokenizer(root / "base")
    models, listed = {}, {}
    for k, (name, labels) in enumerate(experts.items()):
        given = dict(labels)
        task = architecture.split()[0] + given.pop("task")
        models[name] = expert_of(base, task, root / name, k + 1, **given)
        calibration = write_rows(root / f"{name}.jsonl", [{"text": text} for text in texts(k, count)])
        listed[name] = Expert(str(root / name), calibration)
    return Recipe(str(root / "base"), listed), models
