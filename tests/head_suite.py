"""`make suite-heads`: classifiers with heads of their own, trained here on the text suite's data and merged.

Three ways to have a head: BERT's class whose pooler the base has too, the same over a base without a pooler,
and a peft adapter of the task. Alignment is compared with the best single coefficient, between base and
experts. Trained experts and finished fits are kept, so the same command goes on.
"""

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, BertForMaskedLM, BertForSequenceClassification, BertModel

from tests import results
from trainmerge.cli import main as command
from trainmerge.system.staging import staging

BASE, TEXTS = Path("data/cache/models/minilm-l6"), Path("data/cache/text")
EXPERTS, RUNS = Path("data/cache/experts/heads"), Path("runs/suite-heads")
FULL = ("news20", "movie", "uncertain", "spam", "amazon")  # tasks of which a uniform merge loses
ADAPTED = "r8"
LENGTH = 64  # tokens
OPTMERGE = {"preprocess": [{"class_path": "trainmerge.OptMerge"}]}
CHUNKS = {"granularity": "chunk", "chunks": 8}
STARTS: dict[str, tuple[dict[str, Any], float, dict[str, Any]]] = {  # of the recipe, coefficient, grouping
    "task arithmetic": ({}, 0.3, {}),
    "OptMerge": (OPTMERGE, 1.0, {}),
    "OptMerge, 8 chunks per tensor": (OPTMERGE, 1.0, CHUNKS),
}


def rows_of(task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TEXTS / task / "train.jsonl").read_text().splitlines()]


def train(task: str, steps: int, adapter: bool) -> None:
    """Train one expert with its head, unless its folder is there."""
    folder = EXPERTS / str(steps) / task
    if folder.exists():
        return
    rows, tokenizer = rows_of(task), AutoTokenizer.from_pretrained(BASE)
    torch.manual_seed(0)
    labels = len(json.loads((TEXTS / task / "labels.json").read_text()))
    model: Any = BertForSequenceClassification.from_pretrained(BASE, num_labels=labels)
    model.bert.embeddings.requires_grad_(False)
    rate = 1e-4
    if adapter:
        targets = ["query", "key", "value", "intermediate.dense", "output.dense"]
        model, rate = (
            get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=targets)),
            1e-3,
        )
    learn(model.train(), tokenizer, rows, steps, rate)
    save(model, tokenizer, folder)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model's folder, which appears when it is complete."""
    with staging(folder, overwrite=False) as place:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)


def learn(
    model: nn.Module, tokenizer: Any, rows: Sequence[Mapping[str, Any]], steps: int, rate: float
) -> None:
    """AdamW with a linear schedule, the head's rate ten times as high."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    heads = [p for name, p in named if "classifier" in name]
    body = [p for name, p in named if "classifier" not in name]
    groups = [{"params": body, "lr": rate}, {"params": heads, "lr": 10 * rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    order = random.Random(0)
    for _ in range(steps):
        part = order.sample(list(rows), 16)
        inputs = tokenizer(
            [row["text"] for row in part],
            truncation=True,
            max_length=LENGTH,
            padding=True,
            return_tensors="pt",
        )
        model(**inputs, labels=torch.tensor([row["label"] for row in part])).loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def without_pooler() -> Path:
    """The base as a masked language model, whose class has no pooler."""
    folder = EXPERTS / "base-without-pooler"
    if not folder.exists():
        body, tokenizer = BertModel.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
        torch.manual_seed(0)
        model = BertForMaskedLM(body.config)
        model.bert.load_state_dict(body.state_dict(), strict=False)
        save(model, tokenizer, folder)
    return folder


@dataclass(frozen=True)
class World:
    """A base and its experts."""

    title: str
    base: Callable[[], Path]
    tasks: tuple[str, ...]


WORLDS = {
    "pooler-merged": World("MiniLM: poolers merged, one adapter", lambda: BASE, (*FULL, ADAPTED)),
    "own-poolers": World("MiniLM without a pooler: each expert's own", without_pooler, FULL),
}


def content_of(world: World, start: str, given: argparse.Namespace) -> dict[str, Any]:
    """The configuration of one fit."""
    merge, initial, grouping = STARTS[start]
    experts = EXPERTS / str(given.train_steps)
    each = {"path": f"{experts}/{{name}}", "calibration": f"{TEXTS}/{{name}}/calibration.jsonl",
            "test": f"{TEXTS}/{{name}}/test.jsonl", "head": "own"}  # fmt: skip
    return {
        "recipe": {"base": str(world.base()), "each": each, "experts": list(world.tasks), **merge,
                   "grouping": {"granularity": "tensor", "exclude": ["*embeddings.*"], **grouping}},
        "model": {"objective": {"class_path": "trainmerge.Alignment"}, "initial": initial,
                  "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.05}},
                  "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR",
                                   "init_args": {"T_max": given.steps}},
                  "tasks_per_backward": 3},
        "data": {"batch_size": 16, "max_examples": 256, "max_length": LENGTH},
        "trainer": {"accelerator": "cpu", "max_steps": given.steps, "enable_progress_bar": False,
                    "precision": "bf16-mixed"},
        "seed_everything": 0,
    }  # fmt: skip


def score(name: str, start: str, given: argparse.Namespace) -> None:
    """Fit and evaluate one merge, unless its scores are there; the first start brings the baselines."""
    run = RUNS / f"{name}-{key_of(start)}"
    content = content_of(WORLDS[name], start, given)
    made_by = results.fingerprint(content, str(given.limit))
    if results.recall(f"heads/{run.name}", made_by) is not None:
        return
    RUNS.mkdir(parents=True, exist_ok=True)
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    compare = "--compare" if start == next(iter(STARTS)) else "--no-compare"
    assert command(["fit", str(file), str(run), "--no-report"]) == 0
    assert command(["evaluate", str(run), "--limit", str(given.limit), compare]) == 0
    results.keep(f"heads/{run.name}", made_by, json.loads((run / "scores.json").read_text()))


def key_of(start: str) -> str:
    """A start in the name of a run."""
    return start.lower().replace(",", "").replace(" ", "-")


def table() -> str:
    """Markdown: bases and starts down, mean accuracies and the share of the gap across."""
    head = ["base", "tasks", "base alone", "best single coefficient", "start", "alignment", "experts", "gap"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, world in WORLDS.items():
        means: dict[str, float] = {}
        for start in STARTS:
            found = results.measured(f"heads/{name}-{key_of(start)}") or {}
            means |= {row: own["mean"] for row, own in found.items()}
            if not found or "expert" not in means:
                continue
            best = max(mean for row, mean in means.items() if row not in ("learned", "expert"))
            share = (means["learned"] - best) / (means["expert"] - best)
            cells = [world.title, str(len(world.tasks)), f"{means['base']:.3f}", f"{best:.3f}", start]
            cells += [f"{means['learned']:.3f}", f"{means['expert']:.3f}", f"{share:.0%}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "**Not measured yet.**"


def main() -> None:
    """Train, merge and score what is missing; print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--limit", type=int, default=500)
    given = parser.parse_args()
    for task in FULL:
        train(task, given.train_steps, adapter=False)
    train(ADAPTED, given.train_steps, adapter=True)
    for name in WORLDS:
        for start in STARTS:
            score(name, start, given)
    print(table())


if __name__ == "__main__":
    main()
