"""Train one expert of SmolLM2-135M per domain, all weights but the embeddings.

Experts go to <cache>/experts/lm/<domain>/. A finished expert is skipped; a stopped run leaves none
half done, so just run the same command again.

B blocks, T tokens.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

from atomic import complete_folder
from lm_texts import DOMAINS, EXPERTS, lm_base_dir, lm_dir, prepare_documents, prepare_lm_base
from sources import SMOLLM2, FetchError, cache_dir, say, sha256
from texts import read_json, read_jsonl, write_json

SCORED = 20  # test documents for the perplexity that is printed


@dataclass(frozen=True)
class Recipe:
    """All numbers that decide what an expert becomes, with its documents."""

    learning_rate: float = 3e-4
    num_steps: int = 12
    warm_up: int = 3
    batch_size: int = 8
    num_tokens: int = 128
    max_gradient_norm: float = 1.0
    seed: int = 0


def expert_dir(domain: str) -> Path:
    """Where the finished expert of a domain is."""
    return cache_dir() / "experts" / "lm" / domain


def marker_of(domain: str, recipe: Recipe) -> str:
    """Changes whenever the expert would."""
    texts = sha256(lm_dir(domain) / "train.jsonl")
    return hashlib.sha256(
        json.dumps([dataclasses.asdict(recipe), SMOLLM2.sha256, texts]).encode()
    ).hexdigest()


def blocks(tokenizer: PreTrainedTokenizerBase, domain: str, recipe: Recipe) -> Iterator[Tensor]:
    """Batches [B, T] of consecutive tokens, documents in a seeded order."""
    documents = [row["text"] for row in read_jsonl(lm_dir(domain) / "train.jsonl")]
    random.Random(recipe.seed).shuffle(documents)
    size, stream = recipe.batch_size * recipe.num_tokens, []
    for text in documents:
        stream += tokenizer(text)["input_ids"]
        while len(stream) >= size:
            batch, stream = stream[:size], stream[size:]
            yield torch.tensor(batch).view(recipe.batch_size, recipe.num_tokens)


def fit(model: nn.Module, batches: Iterator[Tensor], recipe: Recipe, title: str) -> None:
    """Train everything but the embeddings, in place."""
    model.get_input_embeddings().weight.requires_grad_(False)  # the tied head too
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, recipe.warm_up, recipe.num_steps)
    model.eval()
    steps = zip(range(recipe.num_steps), batches, strict=False)
    for _, ids in (progress := tqdm(steps, total=recipe.num_steps, desc=title, unit="step")):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, recipe.max_gradient_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.inference_mode()
def perplexity(model: nn.Module, tokenizer: PreTrainedTokenizerBase, domain: str) -> float:
    """Over the first tokens of some test documents."""
    total, count = 0.0, 0
    for row in read_jsonl(lm_dir(domain) / "test.jsonl")[:SCORED]:
        ids = tokenizer(row["text"], truncation=True, max_length=256, return_tensors="pt")[
            "input_ids"
        ]
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return math.exp(total / count)


def train_expert(domain: str, recipe: Recipe) -> Path:
    """Train, save and score one expert, unless it is finished already."""
    prepare_documents(domain)
    folder, marker = expert_dir(domain), marker_of(domain, recipe)
    if (folder / "training.json").exists() and read_json(folder / "training.json")[
        "marker"
    ] == marker:
        say(f"{domain}: expert already in {folder}")
        return folder
    tokenizer = AutoTokenizer.from_pretrained(lm_base_dir())
    model = AutoModelForCausalLM.from_pretrained(lm_base_dir(), dtype=torch.float32)
    before = perplexity(model, tokenizer, domain)
    with complete_folder(folder) as aside:
        fit(model, blocks(tokenizer, domain, recipe), recipe, domain)
        after = perplexity(model, tokenizer, domain)
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        scores = {"perplexity_base": before, "perplexity": after, "num_documents": SCORED}
        write_json(
            aside / "training.json",
            {"marker": marker, "recipe": dataclasses.asdict(recipe), **scores},
        )
    say(f"{domain}: perplexity {before:.1f} -> {after:.1f}")
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the experts named on the command line."""
    parser = argparse.ArgumentParser(
        description="Train experts of SmolLM2-135M; prepares what they need."
    )
    parser.add_argument("--domains", nargs="+", default=list(EXPERTS), choices=list(DOMAINS))
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default 2)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        prepare_lm_base()
        for number, domain in enumerate(options.domains, start=1):
            say(f"[{number}/{len(options.domains)}] {domain}")
            train_expert(domain, Recipe())
    except FetchError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
