"""What an export tells strangers: no path, user, command line or secret of the machine that made it.

A folder is named by its last part, or by its hub id if it lies in a hub cache. Relative paths without `..`
stay, because they name a place in the user's project.
"""

import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

SECRET_KEY = re.compile(
    r"(^|_)(token|secret|password|passwd|credentials?|auth|(api|access|private|secret|signing|ssh|wandb)_?key)$",
    re.I,
)
SECRETS = re.compile(
    r"\b(?:hf_\w{6,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|AKIA\w{12,})"
    r"|(?<=://)[^\s/@]+:[^\s/@]+@"
    r"|(?i:(?<=bearer ))(?=\S*\d)[\w.~+/-]{8,}"
    r"|(?i:(?<=token=)|(?<=password=)|(?<=secret=)|(?<=key=))[^\s&'\",)\]]+"
)
REMOVED = "(removed)"
PART = r"[^\s'\"`,;:()\[\]{}<>|/\\]"  # a letter of a path's part within a longer text
INNER = re.compile(rf"(?<![\w/.:~\\-])(?:file://|~|[A-Za-z]:)?[/\\](?:{PART}+[/\\])+{PART}*")
TRAINER = {"logger", "plugins", "profiler", "default_root_dir"}  # of this machine, or with addresses and keys
FIT = ("seed_everything", "recipe", "model", "data", "trainer", "save_every")


def public_name(path: str) -> str:
    """The name of a file or folder: its hub id, or its last part, on one line.

    >>> public_name("/home/me/hub/models--org--name/snapshots/0a1b"), public_name("/home/me/base/")
    ('org/name', 'base')
    """
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..", "~")]
    cached = [part for part in parts if part.startswith("models--")]
    name = cached[-1].removeprefix("models--").replace("--", "/") if cached else (parts or ["folder"])[-1]
    return one_line(name)


def one_line(text: str) -> str:
    """The text with everything that does not print, newlines above all, as a space."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def is_local(text: str) -> bool:
    """Whether a text is a path that leads out of the user's project: absolute, of a home, or with `..`."""
    if "\n" in text or len(text) > 4096:
        return False
    path = PureWindowsPath(text.removeprefix("file://"))
    return len(path.parts) > 1 and bool(path.root or path.drive or text.startswith("~") or ".." in path.parts)


def public(data: Any) -> Any:
    """Plain data for strangers: local paths by their names, without secrets."""
    return _public(data, sorted(set(_local(data)) - set(_own()), key=len, reverse=True))


def public_manifest(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's manifest without its command lines and folder."""
    run = {key: value for key, value in run.items() if key != "resumed"}
    started = {
        key: value for key, value in run.get("started", {}).items() if key not in ("command", "folder")
    }
    return dict(public({**run, "started": started}))


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A fit's configuration without loggers, other people's callbacks, and the places of this machine."""
    kept = {key: config[key] for key in FIT if key in config}
    trainer = kept.get("trainer")
    if isinstance(trainer, Mapping):
        kept["trainer"] = {key: value for key, value in trainer.items() if key not in TRAINER}
        callbacks = trainer.get("callbacks")
        own = [one for one in callbacks if _is_own(one)] if isinstance(callbacks, list) else []
        kept["trainer"] |= {"callbacks": own} if callbacks else {}
    if isinstance(kept.get("model"), Mapping):
        kept["model"] = {key: value for key, value in kept["model"].items() if key != "workspace"}
    return dict(public(kept))


def _is_own(callback: Any) -> bool:
    return isinstance(callback, Mapping) and str(callback.get("class_path")).startswith("trainmerge.")


def _own() -> list[str]:
    places = {place for place in (str(Path.home()), str(Path.cwd())) if len(place) > 1}
    return sorted(places, key=len, reverse=True)


def _local(data: Any) -> list[str]:
    """All local paths in plain data."""
    if isinstance(data, str):
        return [data] if is_local(data) else []
    items = data.values() if isinstance(data, Mapping) else data if isinstance(data, list | tuple) else ()
    return [path for item in items for path in _local(item)]


def _public(data: Any, local: list[str]) -> Any:
    if isinstance(data, str):
        return _text(data, local)
    if isinstance(data, Mapping):
        return {
            key: REMOVED if SECRET_KEY.search(str(key)) and _is_secret(value) else _public(value, local)
            for key, value in data.items()
        }
    if isinstance(data, list | tuple):
        return [_public(item, local) for item in data]
    return data


def _is_secret(value: Any) -> bool:
    return isinstance(value, str) and len(value) >= 8


def _text(text: str, local: list[str]) -> str:
    if is_local(text):
        return SECRETS.sub(REMOVED, _name(text))
    for path in local:
        text = text.replace(path, public_name(path))
    for place in _own():
        inside = rf"(?:file://|(?<![\w.~/-])){re.escape(place)}(?![\w.-])(?:[/\\]{PART}+)*[/\\]?"
        text = re.sub(inside, lambda found: _name(found[0]), text)
    text = INNER.sub(lambda found: public_name(found[0]) if is_local(found[0]) else found[0], text)
    return SECRETS.sub(REMOVED, text)


def _name(path: str) -> str:
    """A path's public name; the home's is no name of its user."""
    home = path.removeprefix("file://").rstrip("/\\") == str(Path.home())
    return "~" if home else public_name(path)
