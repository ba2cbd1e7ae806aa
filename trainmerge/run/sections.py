"""The shape of a configuration: its sections are mappings, and linked keys are not set twice.

Parsers drop a section that is no mapping, and replace a linked key, without a word: both would learn
something else than the file describes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from trainmerge.system.text import shortened

LONGEST = 100  # characters of a file's content in an error
SECTIONS = ("recipe", "model", "data", "trainer")
GROUPS = {"recipe": ["grouping"], "model": ["anchor"], "data": ["columns"]}  # mappings in a section
LINKED = {  # key -> the key that it is taken from
    "model.recipe": "recipe",
    "model.workspace": "run",
    "data.files": "recipe.experts.NAME.calibration",
    "data.test_files": "recipe.experts.NAME.test",
    "data.tokenizer": "recipe.base",
    "data.seed": "seed_everything",
}


def check_sections(content: Any) -> None:
    """Check a configuration's content.

    Raises:
        ValueError: it or a section is no mapping, or a linked key is given; lists all of them.
    """
    if not isinstance(content, Mapping):
        given = shortened(repr(content), LONGEST)
        raise ValueError(f"a configuration must be a mapping with a section `recipe`, not {given}")
    if problems := [*_problems(content)]:
        raise ValueError("; ".join(problems))


def _problems(content: Mapping[str, Any]) -> Iterator[str]:
    for section in SECTIONS:
        inside = content.get(section, {})
        if inside is None:
            yield f"{section} is empty: give it keys, or remove it"
        elif not isinstance(inside, Mapping):
            yield f"{section} must be a mapping of its keys, not {inside!r}"
        for name in GROUPS.get(section, ()) if isinstance(inside, Mapping) else ():
            group = inside.get(name)
            if group is not None and not isinstance(group, Mapping):
                yield f"{section}.{name} must be a mapping of its keys, not {group!r}"
    yield from _task_problems(content.get("recipe"))
    for key in content:
        yield from linked_problems(str(key))
        section = content[key]
        for inner in section if isinstance(section, Mapping) and key in SECTIONS else ():
            yield from linked_problems(f"{key}.{inner}")


def _task_problems(recipe: Any) -> Iterator[str]:
    """What is wrong with experts and further tasks: names, each with a mapping of its fields."""
    for key in ("experts", "held_out") if isinstance(recipe, Mapping) and "each" not in recipe else ():
        tasks = recipe.get(key)
        if isinstance(tasks, list):
            yield f"recipe.{key} must be a mapping of names, not a list (lists of names go with recipe.each)"
        for name, own in tasks.items() if isinstance(tasks, Mapping) else ():
            if not isinstance(own, Mapping):
                given = shortened(repr(own), LONGEST)
                yield f"recipe.{key}.{name} must be a mapping of its fields, not {given}"


def linked_problems(key: str) -> Iterator[str]:
    """What is wrong with giving a key, if it is linked to another."""
    for linked, source in LINKED.items():
        if key == linked or key.startswith(f"{linked}."):
            yield f"{key} is taken from {source}: remove it, and set {source}"
