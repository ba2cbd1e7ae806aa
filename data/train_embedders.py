"""Train three sentence embedders, each on another kind of pairs, and write pairs to try them on.

The base is MiniLM-L6 as a folder of sentence-transformers: mean over the tokens, a Dense layer that
begins as the identity, unit norm. An expert trains the encoder's layers and the Dense layer.
Everything goes to the cache; what is finished is skipped, so just run the same command again.

B texts, H hidden size.
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from atomic import complete_folder
from encoder import load_encoder, load_tokenizer, pool
from sources import FetchError, cache_dir, say
from texts import (
    base_model_dir,
    prepare_base_model,
    prepare_texts,
    read_json,
    read_jsonl,
    text_dir,
    write_json,
    write_jsonl,
)
from training import prepare_full

NUM_TEST_PAIRS = 400  # half of them related
NUM_CALIBRATION = 512
MODULES = {
    "": "Transformer",
    "1_Pooling": "Pooling",
    "2_Dense": "Dense",
    "3_Normalize": "Normalize",
}


@dataclass(frozen=True)
class Recipe:
    """All numbers that decide what an expert becomes, with its texts."""

    num_steps: int = 64
    batch_size: int = 32
    max_tokens: int = 40
    learning_rate: float = 1e-4
    temperature: float = 0.05
    warm_up: float = 0.1
    seed: int = 0


Grouped = list[
    tuple[str, int]
]  # texts, and the group that each belongs to: two of one group are related


def halves(rows: Sequence[dict]) -> Grouped:
    """Both halves of every text, which are related."""
    found = []
    for story, row in enumerate(rows):
        words = row["text"].split()
        middle = len(words) // 2
        found += [(" ".join(words[:middle]), story), (" ".join(words[middle:]), story)]
    return [(text, story) for text, story in found if text]


def classes(rows: Sequence[dict]) -> Grouped:
    """The texts, of which those of one class are related."""
    return [(row["text"], row.get("label", 0)) for row in rows]


KINDS: dict[str, tuple[str, Callable[[Sequence[dict]], Grouped]]] = {
    "halves": ("r8", halves),  # of one news story
    "topics": ("news20", classes),  # of one newsgroup
    "opinions": ("movie", classes),  # both praise, or both complaint
}


def base_dir() -> Path:
    """Where the base is."""
    return cache_dir() / "models" / "minilm-embedder"


def expert_dir(kind: str) -> Path:
    """Where the expert of a kind of pairs is."""
    return cache_dir() / "experts" / "embed" / kind


def write_embedder(encoder: nn.Module, dense: nn.Linear, folder: Path) -> None:
    """A folder as sentence-transformers writes it."""
    size = dense.in_features
    encoder.save_pretrained(folder)
    load_tokenizer(base_model_dir()).save_pretrained(folder)
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(MODULES.items())
    ]
    write_json(folder / "modules.json", entries)
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": 256, "do_lower_case": False}
    )
    for path in MODULES:
        (folder / path).mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": size, "pooling_mode_mean_tokens": True}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    settings = {
        "in_features": size,
        "out_features": dense.out_features,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    write_json(folder / "2_Dense" / "config.json", settings)
    state = {f"linear.{name}": p.detach().contiguous() for name, p in dense.named_parameters()}
    save_file(state, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})


def identity(size: int) -> nn.Linear:
    """A Dense layer that changes nothing yet."""
    dense = nn.Linear(size, size)
    nn.init.eye_(dense.weight)
    nn.init.zeros_(dense.bias)
    return dense


def write_pairs(kind: str) -> Path:
    """Calibration texts and test pairs of a kind, from texts that no expert was trained on."""
    folder = cache_dir() / "text" / f"embed-{kind}"
    if folder.exists():
        return folder
    task, group = KINDS[kind]
    prepare_texts(task)
    order = random.Random(0)
    texts = group(read_jsonl(text_dir(task) / "calibration.jsonl"))
    test = group(read_jsonl(text_dir(task) / "test.jsonl"))
    with complete_folder(folder) as aside:
        chosen = order.sample([text for text, _ in texts], NUM_CALIBRATION)
        write_jsonl(aside / "calibration.jsonl", ({"text": text} for text in chosen))
        write_jsonl(aside / "test.jsonl", test_pairs(test, order))
    return folder


def test_pairs(texts: Grouped, order: random.Random) -> list[dict]:
    """Pairs, every second one of related texts."""
    members: dict[int, list[str]] = {}
    for text, number in texts:
        members.setdefault(number, []).append(text)
    several = [number for number, own in members.items() if len(own) > 1]
    pairs = []
    for i in range(NUM_TEST_PAIRS):
        one, other = order.sample(several, 2) if i % 2 else 2 * [order.choice(several)]
        if one == other:
            first, second = order.sample(members[one], 2)
        else:
            first, second = order.choice(members[one]), order.choice(members[other])
        pairs.append({"text": first, "pair": second})
    return pairs


def contrast(rows: Tensor, groups: Tensor, temperature: float) -> Tensor:  # [B,H], [B] -> []
    """The supervised contrastive loss (Khosla et al., 2020): related texts against the rest."""
    itself = torch.eye(len(rows), dtype=torch.bool)
    log_p = (rows @ rows.T / temperature).masked_fill(itself, -torch.inf).log_softmax(-1)
    related = (groups[:, None] == groups[None]) & ~itself
    some = related.any(-1)
    sums = log_p.masked_fill(~related, 0.0).sum(-1)
    return -(sums[some] / related.sum(-1)[some]).mean()


def batches(texts: Grouped, recipe: Recipe, paired: bool) -> list[Grouped]:
    """As many batches as there are steps; `paired` texts stay side by side."""
    order = random.Random(recipe.seed)
    size = recipe.batch_size
    units = (
        [texts[i : i + 2] for i in range(0, len(texts) - 1, 2)] if paired else [[t] for t in texts]
    )
    found: list[Grouped] = []
    while len(found) < recipe.num_steps:
        mixed = [text for unit in order.sample(units, len(units)) for text in unit]
        found += [mixed[i : i + size] for i in range(0, len(mixed) - size + 1, size)]
    return found[: recipe.num_steps]


def train_expert(kind: str, recipe: Recipe) -> None:
    """Train and write one expert, unless it is finished already."""
    folder, task = expert_dir(kind), KINDS[kind][0]
    made = {**asdict(recipe), "kind": kind, "task": task}
    if (folder / "training.json").exists() and read_json(folder / "training.json") == made:
        say(f"{kind}: expert already in {folder}")
        return
    prepare_texts(task)
    texts = KINDS[kind][1](read_jsonl(text_dir(task) / "train.jsonl"))
    tokenizer, encoder = load_tokenizer(base_model_dir()), load_encoder(base_model_dir())
    dense = identity(encoder.config.hidden_size)
    model = prepare_full(encoder).eval()
    trained = [p for p in [*model.parameters(), *dense.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0)
    steps = batches(texts, recipe, paired=kind == "halves")
    schedule = get_linear_schedule_with_warmup(
        optimizer, round(recipe.warm_up * len(steps)), len(steps)
    )
    for number, batch in enumerate(steps, start=1):
        inputs = tokenizer(
            [text for text, _ in batch],
            truncation=True,
            max_length=recipe.max_tokens,
            padding=True,
            return_tensors="pt",
        )
        pooled = pool(model(**inputs).last_hidden_state, inputs["attention_mask"])
        rows = nn.functional.normalize(dense(pooled), dim=-1)
        loss = contrast(rows, torch.tensor([group for _, group in batch]), recipe.temperature)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if number % 16 == 0:
            say(f"{kind}: step {number} of {len(steps)}, loss {loss.item():.3f}")
    with complete_folder(folder) as aside:
        write_embedder(model, dense, aside)
        write_json(aside / "training.json", made)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the base, the pairs and the experts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default 2)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        prepare_base_model()
        if not base_dir().exists():
            with complete_folder(base_dir()) as aside:
                encoder = load_encoder(base_model_dir())
                write_embedder(encoder, identity(encoder.config.hidden_size), aside)
        for kind in KINDS:
            write_pairs(kind)
            train_expert(kind, Recipe())
    except FetchError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
