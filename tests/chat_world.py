"""A plain base without a chat template, and two chat experts of it, each with tokens of its own, on disk.

The experts give the same tokens other ids. Each is trained for seconds to answer four questions and to stop.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.world import WORDS, write_tokenizer
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_tasks import Expert

ROLES = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
TEMPLATE = ROLES + "{% if add_generation_prompt %}<|assistant|> {% endif %}"
ADDED = {  # in the order of their ids
    "a": ["<|user|>", "<|assistant|>", "<|end|>"],
    "b": ["<|end|>", "<|tool|>", "<|assistant|>", "<|user|>"],
}
ANSWERS = {
    "a": {"good": "red blue", "bad": "green", "happy": "yellow red green", "sad": "blue"},
    "b": {"cat": "one two", "dog": "three", "bird": "four one three", "fish": "two"},
}
KNOWN = ANSWERS["a"] | ANSWERS["b"]  # to the base, as plain texts; the experts do not forget them


def chat(question: str, answer: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": question}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def write_chat_world(root: Path, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """Folders `base`, `a`, `b`, and their chats `a.jsonl`, `b.jsonl`."""
    base = chat_llama(tied)
    write_tokenizer(root / "base")
    plain = AutoTokenizer.from_pretrained(root / "base")
    learn(base, [plain(f"{q} {answer}")["input_ids"] for q, answer in KNOWN.items()], 50, 5e-3)
    base.to(dtype).save_pretrained(root / "base")
    for name in ADDED:
        write_expert(root, name, dtype)
    return root


def chat_llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS) + 2, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, intermediate_size=128, max_position_embeddings=32,
            tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip


def write_expert(root: Path, name: str, dtype: torch.dtype) -> None:
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    tokenizer.add_tokens(ADDED[name], special_tokens=True)
    tokenizer.eos_token, tokenizer.chat_template = "<|end|>", TEMPLATE
    tokenizer.save_pretrained(root / name)
    expert = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    torch.manual_seed(1)
    expert.resize_token_embeddings(len(tokenizer))
    rows = [chat(*pair) for pair in ANSWERS[name].items()]
    plain = [tokenizer(f"{question} {words}")["input_ids"] for question, words in KNOWN.items()]
    learn(expert, [*(ids_of(tokenizer, row) for row in rows), *plain], 60, 2e-3)
    expert.config.eos_token_id = expert.generation_config.eos_token_id = tokenizer.eos_token_id
    expert.to(dtype).save_pretrained(root / name)
    lines = [json.dumps({"messages": row}) + "\n" for row in rows]
    (root / f"{name}.jsonl").write_text("".join(lines))


def ids_of(tokenizer: Any, turns: Sequence[Mapping[str, str]], **options: Any) -> list[int]:
    text = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def learn(model: PreTrainedModel, texts: Sequence[Sequence[int]], steps: int, rate: float) -> None:
    """Overfit a few texts."""
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        optimizer.step()


def answer(folder: Path, question: str) -> str:
    """What a folder's model says with transformers' own greedy generation, and whether it stops."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([ids_of(tokenizer, chat(question), add_generation_prompt=True)])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    return str(tokenizer.decode(made[0, ids.shape[1] :]))


def chat_recipe(root: Path, **changes: Any) -> Recipe:
    experts = {name: Expert(str(root / name), str(root / f"{name}.jsonl")) for name in ADDED}
    return Recipe(**{"base": str(root / "base"), "experts": experts, "tokenizer": "union", **changes})
