"""A small but whole world on disk: base, experts, tokenizer, texts. Real formats, seconds to fit."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainmerge.data.heads import LabelHead
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_tasks import Expert

TEXT = "good bad happy sad great awful red blue green yellow one two three four cat dog bird fish"
WORDS = TEXT.split()
LABELS = {
    "mood": ["good happy", "bad sad"],
    "colour": ["red", "blue", "green"],
    "animal": ["cat", "dog bird"],
}


def write_tokenizer(folder: Path) -> None:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=len(WORDS) + 2, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=32,
        )
    )  # fmt: skip


def llama(tied: bool = True, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS) + 2, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=1, intermediate_size=64, max_position_embeddings=32, tie_word_embeddings=tied,
        )
    )  # fmt: skip


@torch.no_grad()
def nudge(model: nn.Module, seed: int, scale: float = 0.05) -> None:
    """Move every parameter a little, as fine-tuning would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def write_texts(folder: Path, task: str, seed: int, count: int = 40) -> None:
    """Calibration and test files of random words, and the label texts."""
    generator = torch.Generator().manual_seed(seed)

    def text() -> str:
        size = int(torch.randint(2, 9, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (size,), generator=generator).tolist())

    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "calibration.jsonl", [{"text": text()} for _ in range(count)])
    labels = LABELS[task]
    _write_lines(folder / "test.jsonl", [{"text": text(), "label": i % len(labels)} for i in range(count)])
    (folder / "labels.json").write_text(json.dumps(labels))


def _write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_world(root: Path) -> Recipe:
    """A BERT base, two full experts and a LoRA one, with a task each."""
    base = root / "base"
    bert().save_pretrained(base)
    write_tokenizer(base)
    for seed, task in enumerate(LABELS):
        write_texts(root / task, task, seed)
        if task == "animal":
            adapter = get_peft_model(bert(), LoraConfig(r=2, lora_alpha=4, target_modules=["query", "dense"]))
            nudge(adapter, seed + 10)
            adapter.save_pretrained(root / "experts" / task)
        else:
            expert = bert()
            nudge(expert, seed + 10)
            expert.save_pretrained(root / "experts" / task)
    return recipe(root)


def recipe(root: Path, **changes: object) -> Recipe:
    experts = {
        task: Expert(
            path=str(root / "experts" / task),
            calibration=str(root / task / "calibration.jsonl"),
            test=str(root / task / "test.jsonl"),
            head=LabelHead(str(root / task / "labels.json")),
        )
        for task in LABELS
    }
    return Recipe(**{"base": str(root / "base"), "experts": experts, **changes})


def write_languages(root: Path, layers: int = 2) -> Path:
    """A tiny Llama, two experts and texts: no heads."""
    llama(layers=layers).save_pretrained(root / "base")
    write_tokenizer(root / "base")
    for k, name in enumerate(("a", "b")):
        expert = llama(layers=layers)
        nudge(expert, k)
        expert.save_pretrained(root / name)
        texts = [" ".join(WORDS[(i * 7 + j * (k + 2)) % len(WORDS)] for j in range(2 + i)) for i in range(6)]
        _write_lines(root / f"{name}.jsonl", [{"text": text} for text in texts])
        _write_lines(root / f"{name}-test.jsonl", [{"text": " ".join(WORDS[3 * k :])}])
    return root


def languages_recipe(root: Path, **changes: object) -> Recipe:
    experts = {
        n: Expert(str(root / n), str(root / f"{n}.jsonl"), str(root / f"{n}-test.jsonl")) for n in "ab"
    }
    return Recipe(**{"base": str(root / "base"), "experts": experts, **changes})
