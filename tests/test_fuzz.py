"""Some mutated files at every door; `make fuzz` tries 100,000 of each."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz import FINE, attempt
from tests.fuzz_doors import Door, doors
from tests.fuzz_mutations import places
from trainmerge.system.text import words_of

FAST, SLOW = 100, 15  # inputs per door
NAMES = (
    "config.json", "adapter_config.json", "safetensors", "index.json", "pickle", "state dict",
    "tokenizer.json", "tokenizer_config.json", "recipe.yaml", "recipe.yaml, values", "manifest.json",
    "coefficients.safetensors", "coefficients' header", "snapshot", "chunks.json", "metrics.jsonl",
    "texts.jsonl", "texts.csv", "texts.parquet", "texts.txt", "saved, state.json", "saved, dataset_info.json",
    "saved, data-00000-of-00001.arrow", "labels.json", "labelled texts",
    "modules.json", "pooling", "queries",
    "card", "card's metadata", "export's manifest", "a.png", "a.jpg", "a.wav",
)  # fmt: skip


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Door]:
    return doors(tmp_path_factory.mktemp("doors"))


@pytest.mark.parametrize("name", NAMES)
def test_mutated_files_end_in_an_error_of_ours(name: str, every: dict[str, Door], tmp_path: Path) -> None:
    door = every[name]
    door.read()  # the file as it was
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(SLOW if door.slow else FAST):
            ended, data = attempt(door, seed)
            (tmp_path / "input").write_bytes(data)
            assert ended in FINE, f"seed {seed}: {ended}"


def test_every_door_is_tried(every: dict[str, Door]) -> None:
    assert every.keys() == set(NAMES)


LONG = "a" * 100_000


@pytest.mark.parametrize("name", ["adapter_config.json", "modules.json", "export's manifest", "index.json"])
def test_names_too_long_for_any_file_end_in_a_short_error(name: str, every: dict[str, Door]) -> None:
    door, words = every[name], []
    for value in renamed(json.loads(door.valid)):
        door.file.write_text(json.dumps(value))
        try:
            door.read()
        except (ValueError, FileNotFoundError) as error:
            words.append(words_of(error))
        finally:
            door.file.write_bytes(door.valid)
    assert words
    assert max(map(len, words)) < 6000


def renamed(value: Any) -> Iterator[Any]:
    """The JSON with one key or one text at a time replaced by a very long one."""
    for parent, key in places(value):
        if isinstance(parent, dict):
            kept = dict(parent)
            parent[LONG] = parent.pop(key)
            yield value
            parent.clear()
            parent.update(kept)
        if isinstance(was := parent[key], str):
            parent[key] = LONG
            yield value
            parent[key] = was
