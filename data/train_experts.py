"""Train one expert of MiniLM-L6 per task: all weights, or LoRA adapters.

Full experts go to <cache>/experts/full/<task>/, adapters to data/experts/<task>/. A finished
expert is skipped; a stopped run leaves none half done, so just run the same command again.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from atomic import complete_folder
from encoder import LOGIT_SCALE, MAX_TOKENS, accuracy, label_head, load_encoder, load_tokenizer
from sources import MINILM, FetchError, cache_dir, say, sha256
from tasks import GROUPS, TASKS, resolve_tasks
from texts import (
    base_model_dir,
    prepare_base_model,
    prepare_texts,
    read_json,
    read_jsonl,
    text_dir,
    write_json,
)
from training import FULL, LORA, Kind, LoraRecipe, Recipe, fit, prepare_full, prepare_lora

RECIPES: dict[Kind, Recipe] = {"full": FULL, "lora": LORA}
ADAPTERS = Path(__file__).parent / "experts"
BASE_NAME = "minilm-l6"
EXAMPLES = """examples:
  python data/train_experts.py --kind full --tasks suite    eight experts
  python data/train_experts.py --kind lora --tasks demo     five adapters
"""


def expert_dir(kind: Kind, task: str) -> Path:
    """Where the finished expert of a task is."""
    return ADAPTERS / task if kind == "lora" else cache_dir() / "experts" / "full" / task


def recipe_of(kind: Kind, task: str) -> dict:
    """Everything that decides the expert, as plain values; its hash marks a finished expert."""
    texts = text_dir(task)
    return {
        **dataclasses.asdict(RECIPES[kind]),
        "max_tokens": MAX_TOKENS,
        "logit_scale": LOGIT_SCALE,
        "base_sha256": MINILM.sha256,
        "train_sha256": sha256(texts / "train.jsonl"),
        "labels": read_json(texts / "labels.json"),
    }


def recipe_hash(recipe: dict) -> str:
    """Hexadecimal SHA-256 of a recipe."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def is_finished(folder: Path, recipe: dict) -> bool:
    """Whether the folder holds the expert of this very recipe."""
    marker = folder / "training.json"
    return marker.exists() and read_json(marker)["recipe_hash"] == recipe_hash(recipe)


def train_expert(kind: Kind, task: str) -> Path:
    """Train, save and score one expert, unless it is finished already."""
    prepare_texts(task)
    folder, recipe = expert_dir(kind, task), recipe_of(kind, task)
    if is_finished(folder, recipe):
        say(f"{task}: {kind} expert already in {folder}")
        return folder
    tokenizer, base = load_tokenizer(base_model_dir()), load_encoder(base_model_dir())
    train, test = (read_jsonl(text_dir(task) / f"{part}.jsonl") for part in ("train", "test"))
    head = label_head(base, tokenizer, recipe["labels"])
    zero_shot = accuracy(base, head, tokenizer, test)
    settings = RECIPES[kind]
    lora = isinstance(settings, LoraRecipe)
    model = prepare_lora(base, settings) if lora else prepare_full(base)
    with complete_folder(folder) as aside:
        start = time.perf_counter()
        fit(model, head, tokenizer, train, settings, f"{task} ({kind})")
        seconds = round(time.perf_counter() - start, 1)
        if lora:
            save_adapter(model, aside)
        else:
            save_full(model, tokenizer, aside)
        # Scored as read back from the files: what is saved is what was measured.
        expert = load_expert(kind, aside)
        record = {
            "task": task,
            "test_accuracy_zero_shot": zero_shot,
            "test_accuracy": accuracy(expert, head, tokenizer, test),
            "train_accuracy": accuracy(expert, head, tokenizer, train),
            "train_seconds": seconds,
            "num_train": len(train),
            "num_test": len(test),
            "recipe": recipe,
            "recipe_hash": recipe_hash(recipe),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        }
        write_json(aside / "training.json", record)
    say(f"{task}: test accuracy {zero_shot:.3f} -> {record['test_accuracy']:.3f}, {seconds} s")
    return folder


def load_expert(kind: Kind, folder: Path) -> nn.Module:
    """The expert in a folder, ready to be scored."""
    if kind == "full":
        return load_encoder(folder)
    return PeftModel.from_pretrained(load_encoder(base_model_dir()), folder)


def save_full(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the whole encoder and its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapter in float16, naming its base by name and not by a path."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card names the base's path
    weights = load_file(folder / "adapter_model.safetensors")
    half: dict[str, Tensor] = {name: weight.half() for name, weight in weights.items()}
    save_file(half, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = read_json(folder / "adapter_config.json")
    config["base_model_name_or_path"] = BASE_NAME
    # peft keeps the module names in a set, whose order differs from run to run.
    config["target_modules"] = sorted(config["target_modules"])
    write_json(folder / "adapter_config.json", config)


def write_checksums(folder: Path) -> None:
    """SHA256SUMS of all adapters' files, for `sha256sum -c`."""
    files = sorted(path for path in folder.glob("[!.]*/*") if path.is_file())
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the experts named on the command line."""
    parser = argparse.ArgumentParser(
        description="Train experts of MiniLM-L6; prepares texts and base model if need be.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join([*GROUPS, *TASKS])
    parser.add_argument("--kind", choices=list(RECIPES), required=True)
    parser.add_argument("--tasks", nargs="+", default=["demo"], metavar="TASK", help=known)
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default 2)")
    options = parser.parse_args(arguments)
    try:
        names = resolve_tasks(options.tasks)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(options.threads)
    try:
        prepare_base_model()
        for number, name in enumerate(names, start=1):
            say(f"[{number}/{len(names)}] {name}")
            train_expert(options.kind, name)
    except FetchError as error:
        sys.exit(f"error: {error}")
    if options.kind == "lora":
        write_checksums(ADAPTERS)


if __name__ == "__main__":
    main()
