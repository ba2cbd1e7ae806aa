"""The parser's errors in plain words: the key, its line in the file, the nearest known key."""

import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml

UNKNOWN = (r"Option '([^']+)' is not accepted", r"does not accept option '([^']+)'")
KINDS = {
    "int": "an integer", "float": "a number", "bool": "true or false", "str": "a text", "Sequence": "a list",
    "Mapping": "a mapping",
}  # fmt: skip
TRANSPARENT = ("init_args", "class_path", "dict_kwargs")  # levels of a file that an option's name may omit


def explain_mistake(
    message: str, known: Iterable[str], files: Sequence[Path] = (), options: Sequence[str] = ()
) -> str:
    r"""The error of a key or a value, with the file's line and the nearest known key; others unchanged.

    Args:
        message: The parser's message.
        known: The parser's keys, such as `trainer.max_steps`.
        files: The configuration files that were parsed.
        options: The keys that the command line gives; the files' lines are not named for these.

    >>> explain_mistake("Group 'trainer' does not accept option 'max_stepz'", ["trainer.max_steps", "run"])
    "no key 'trainer.max_stepz'; did you mean 'trainer.max_steps'?"
    >>> explain_mistake('Parser key "save_every": Expected a <class \'int\'>. Got value: two', [])
    "save_every must be an integer, not 'two'"
    >>> explain_mistake("-1 is not in bounds, numpy accepts from 0 to 4294967295", [])
    'seed_everything must be from 0 to 4294967295, not -1'
    """
    groups = re.findall(r"Parser key \"([^\"]+)\"", message) + re.findall(r"Group '([^']+)'", message)
    key = ".".join(groups)
    if seed := re.search(r"(\S+) is not in bounds, numpy accepts from (\d+) to (\d+)", message):
        return f"seed_everything must be from {seed[2]} to {seed[3]}, not {seed[1]}"
    if word := re.search(r"unrecognized arguments: (?:--)?([^=\s]+)", message):
        return _unknown(word[1].split("."), known)[1]
    for pattern in UNKNOWN:
        if option := re.search(pattern, message):
            path = [*key.split("."), *option[1].split(".")] if key else option[1].split(".")
            wrong, words = _unknown(path, [*known, *_parameters(message, key)])
            return _place(wrong, files, options) + words
    expected = re.findall(r"Expected a (.+?)\. Got value: (.*)", message, re.DOTALL)
    if len(expected) == 1 and key:
        kind, value = expected[0]
        if value.strip() == "None":
            return f"{key} is missing" + ": trainmerge fit CONFIG RUN" * (key == "run")
        return f"{_place(key.split('.'), files, options)}{key} must be {_kind(kind)}, not {value.strip()!r}"
    return message


def _unknown(path: list[str], known: Iterable[str]) -> tuple[list[str], str]:
    """The path up to its first part that no known key has, and words with the nearest known key."""
    keys = [key.split(".") for key in known]
    depth = next(
        (
            depth
            for depth in range(len(path))
            if not any(key[: depth + 1] == path[: depth + 1] for key in keys)
        ),
        len(path) - 1,
    )
    wrong, inside = path[: depth + 1], path[:depth]
    siblings = {key[depth] for key in keys if key[:depth] == inside and len(key) > depth}
    near = get_close_matches(path[depth], sorted(siblings), n=1)
    suggestion = f"; did you mean {'.'.join([*inside, *near])!r}?" if near else ""
    return wrong, f"no key {'.'.join(wrong)!r}{suggestion}"


def _parameters(message: str, key: str) -> list[str]:
    """The keys of the class that a message names, if it is loaded."""
    named = re.findall(r"class_path(?: |=)'([^']+)'", message)
    module, _, name = named[-1].rpartition(".") if named else ("", "", "")
    kind = getattr(sys.modules.get(module), name, None)
    if not inspect.isclass(kind):
        return []
    return [f"{key}.{parameter}" for parameter in inspect.signature(kind).parameters]


def _kind(text: str) -> str:
    """`<class 'int'>` is an integer, `typing.Literal['a', 'b']` one of a, b."""
    if plain := re.fullmatch(r"<class '(?:\w+\.)*(\w+)'>", text):
        return KINDS.get(plain[1], plain[1])
    choices = re.fullmatch(r"typing\.Literal\[(.+)\]", text)
    return f"one of {choices[1].replace(chr(39), '')}" if choices else text


def _place(path: Sequence[str], files: Sequence[Path], options: Sequence[str]) -> str:
    """`file.yaml:12: ` for the last file that has the key; empty if the command line has it, or no file."""
    key = ".".join(path)
    if any(f"{key}.".startswith(f"{option}.") for option in options):
        return ""
    for file in reversed(files):
        if (line := line_of(path, yaml.compose(file.read_text(encoding="utf-8")))) is not None:
            return f"{file}:{line}: "
    return ""


def line_of(path: Sequence[str], node: yaml.Node | None) -> int | None:
    """The line of a key in a YAML document, counted from 1; None without."""
    if not isinstance(node, yaml.MappingNode) or not path:
        return None
    for key, value in node.value:
        if key.value == path[0]:
            inner = line_of(path[1:], value)
            return key.start_mark.line + 1 if len(path) == 1 else inner
        if key.value in TRANSPARENT and (inner := line_of(path, value)) is not None:
            return inner
    return None
