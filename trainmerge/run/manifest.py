"""A run's manifest: everything that the run depends on, and a comparison of two of them, key by key."""

import json
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trainmerge.run.config import public_paths
from trainmerge.system.atomic import write_whole
from trainmerge.system.hub import parse_id
from trainmerge.system.json_file import read_json
from trainmerge.system.workspace import digest

PACKAGES = ("trainmerge", "torch", "pytorch-lightning", "transformers", "peft", "datasets", "safetensors")
KINDS = {list: "list", dict: "mapping", int: "number", str: "text"}
NEEDED = {"experts": list, "checksums": dict, "recipe": dict, "calibration": dict, "data": dict}
LOST = "Restore it from a copy, or fit again in another folder."
LONGEST = 200  # characters of a value in a message
ABSENT = object()


def read_manifest(path: Path, also: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The manifest: everything the run depends on. `also`: further keys that it must have, with their types.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged, or not a manifest of a run.
    """
    made = read_json(path, LOST)
    needed = {**NEEDED, **also}
    if absent := [key for key in needed if key not in made]:
        raise ValueError(f"{path}: not a manifest of a run: it lacks {', '.join(absent)}. {LOST}")
    for key, kind in NEEDED.items():
        if not isinstance(made[key], kind):
            raise ValueError(
                f"{path}: {key} is {_short(made[key])}, not a {'list' if kind is list else 'mapping'}. {LOST}"
            )
    return made


def write_manifest(path: Path, content: Mapping[str, Any]) -> None:
    """Write it so that at any moment it is the old or the new one."""
    write_whole(path, json.dumps(content, indent=2))


def versions() -> dict[str, str]:
    """Python's and the packages' versions."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def new_manifest(path: Path, description: Mapping[str, Any], hub: Mapping[str, Any]) -> None:
    """Write a new run's manifest: description, `hub` as in `hub_origins`, versions, command."""
    origins = {"hub": hub} if hub else {}
    write_manifest(path, {**description, **origins, "versions": versions(), "started": command_line()})


def command_line() -> dict[str, Any]:
    """The command of this process, its folder and its number of threads."""
    return {
        "command": shlex.join(sys.argv),
        "folder": str(Path.cwd()),
        "threads": torch.get_num_threads(),  # of each process: sums depend on them
    }


def note_command(path: Path) -> None:
    """Record the command that resumes a run as `resumed`, unless it is its last one already."""
    manifest, resumed = read_manifest(path), command_line()
    last = manifest.get("resumed", manifest.get("started", {}))
    if any(last.get(key) != resumed[key] for key in ("command", "folder")):
        write_manifest(path, {**manifest, "resumed": resumed})


def differences(made: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """One line for each key of `now`, nested ones too, whose value differs in `made`; empty without any.

    A class's public path and its path in older files count as equal, and so do two revisions of an id of the
    hub: the checksums of the weights decide.
    """
    before, plain = _comparable(made), _comparable(json.loads(json.dumps(now)))
    pairs = ((key, before.get(key, ABSENT), value) for key, value in plain.items())
    return "\n".join(line for key, old, new in pairs if old != new for line in _lines(key, old, new))


def description_digest(description: str) -> str:
    """A digest of a run's description, as JSON; equal for descriptions that `differences` calls equal."""
    return digest(json.dumps(_comparable(json.loads(description)), sort_keys=True))


def _comparable(description: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = public_paths(_without_revisions(description))
    return found


def _without_revisions(data: Mapping[str, Any]) -> dict[str, Any]:
    """A description or configuration with the ids of its models and its tokenizer without `@revision`."""

    def plain(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(name, item) for name, item in value.items()}
        found = parse_id(value) if key in ("base", "path", "tokenizer") and isinstance(value, str) else None
        return value.removesuffix(f"@{found.revision}") if found and found.revision else value

    sections = {key: plain(key, data[key]) for key in ("recipe", "data") if key in data}
    return {**data, **sections}


def _lines(key: str, old: Any, new: Any) -> Iterator[str]:
    """The differing keys inside a value; a value that is several lines of text is compared by line."""
    if isinstance(old, str) and isinstance(new, str) and "\n" in old + new:
        old, new = _by_line(old), _by_line(new)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            if (then := old.get(name, ABSENT)) != (here := new.get(name, ABSENT)):
                yield from _lines(f"{key}.{name}", then, here)
    else:
        yield f"  {key}: {_short(old)} then, {_short(new)} now"


def _by_line(text: str) -> dict[str, str]:
    """`name: value` of each line, as an optimizer prints itself."""
    parts = (line.strip().partition(": ") for line in text.splitlines())
    return {name: value for name, _, value in parts if name}


def _short(value: Any) -> str:
    text = "absent" if value is ABSENT else json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
