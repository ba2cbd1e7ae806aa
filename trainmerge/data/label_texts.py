"""Label texts and the templates of their prompts, as lists or in JSON files."""

from pathlib import Path
from typing import Any

from trainmerge.system.json_file import parse_json, read_bytes


def read_labels(path: Path) -> list[str]:
    """A JSON list of label texts.

    Raises:
        ValueError: the file does not exist, or is not such a list.
    """
    return checked_labels(str(path), _read_list(path, "Write a JSON list of label texts."))


def checked_labels(where: str, labels: Any) -> list[str]:
    """The label texts, checked; raises ValueError, naming `where` they are from, if they are unusable."""
    if not isinstance(labels, list) or len(labels) < 2 or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{where}: needs a list of at least two label texts")
    if unusable := [label for label in labels if not label.strip() or labels.count(label) > 1]:
        raise ValueError(f"{where}: label texts must be distinct and not blank, not {sorted(set(unusable))}")
    return labels


def read_templates(path: Path) -> list[str]:
    """A JSON list of templates.

    Raises:
        ValueError: the file does not exist, or is not such a list.
    """
    return checked_templates(str(path), _read_list(path, 'Write a JSON list such as ["a photo of a {}."].'))


def checked_templates(where: str, templates: Any) -> list[str]:
    """The templates, checked; raises ValueError, naming `where` they are from, if they are unusable."""
    if not isinstance(templates, list) or not all(isinstance(text, str) for text in templates):
        raise ValueError(f"{where}: needs a list of texts with {{}} for the label")
    if unusable := [text for text in templates if text.count("{}") != 1]:
        raise ValueError(f"{where}: a template has {{}} once, where the label goes, not {unusable[0]!r}")
    return templates


def _read_list(path: Path, remedy: str) -> Any:
    try:
        return parse_json(read_bytes(path, remedy), path, remedy)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: the label texts cannot be read: no such file") from error
