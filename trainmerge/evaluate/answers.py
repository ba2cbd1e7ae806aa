"""What a test file says is right, by the kind of a task's outputs.

| kind | column | value |
|---|---|---|
| classes | `label` | the class: its number, or its name in the expert's config.json |
| labels | `labels` | a list of the labels that hold |
| tokens | `labels` | one label per word of the text, words as `text.split()`; -100 does not count |
| spans | `answers` | the right answers, a list of texts or SQuAD's `{"text": [...]}`; [] if there is none |
| values | `label` | a number, or a list of them |
"""

from collections.abc import Mapping, Sequence
from typing import Any

from trainmerge.data.batch import Kind
from trainmerge.data.examples import Example

COLUMN: Mapping[Kind, str] = {
    "classes": "label", "labels": "labels", "tokens": "labels", "spans": "answers", "values": "label",
}  # fmt: skip
UNCOUNTED = -100  # transformers' label of what does not count


def read_answers(
    file: str, kind: Kind, given: Sequence[Any], examples: Sequence[Example], names: Mapping[str, int]
) -> list[Any]:
    """The answers of a test file, as numbers where they are labels.

    Args:
        file: The file, for errors.
        kind: What the task's outputs are.
        given: The column of `COLUMN`.
        examples: The texts.
        names: The names of the labels -> their numbers.

    Raises:
        ValueError: an example's answer has another form, or a label with an unknown name.
    """
    found = []
    for i, (value, example) in enumerate(zip(given, examples, strict=True)):
        try:
            found.append(_answer(kind, value, example, names))
        except ValueError as error:
            raise ValueError(f"{file}: example {i}: {COLUMN[kind]} is {value!r}, {error}") from error
    return found


def _answer(kind: Kind, value: Any, example: Example, names: Mapping[str, int]) -> Any:
    if kind == "classes":
        return _number(value, names)
    if kind == "values":
        return _numbers(value)
    if kind == "spans":
        return _texts(value)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError("not a list")
    numbers = len(value) == len(names) and all(isinstance(one, float | bool) for one in value)
    if kind == "labels" and numbers and {*value} <= {0.0, 1.0}:  # one per label, as transformers trains with
        return [i for i, one in enumerate(value) if one]
    labels = [_number(one, names, kind == "tokens") for one in value]
    if kind == "tokens" and len(labels) != (words := len(example.text.split())):
        raise ValueError(f"{len(labels)} labels for {words} words: give each word of the text one label")
    return labels


def _number(value: Any, names: Mapping[str, int], uncounted: bool = False) -> int:
    if isinstance(value, str) and value in names:
        if names[value] >= len(names):
            raise ValueError(
                f"class {names[value]} by the expert's id2label, and its {len(names)} outputs are "
                f"0 to {len(names) - 1}: give the output's number, or number id2label without gaps"
            )
        return names[value]
    if isinstance(value, str) and value.isdigit() and value not in names:  # of a file whose columns are texts
        value = int(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and (value >= 0 or (uncounted and value == UNCOUNTED)):
        if names and value >= len(names):
            raise ValueError(f"but the task has {len(names)} classes, 0 to {len(names) - 1}")
        return int(value)
    known = f", nor one of its names {sorted(names)[:20]}" if names and isinstance(value, str) else ""
    raise ValueError(f"not a class number (0, 1, ...){known}")


def _numbers(value: Any) -> list[float]:
    values = value if isinstance(value, list) else [value]
    if not values or any(isinstance(v, bool) or not isinstance(v, int | float | str) for v in values):
        raise ValueError("not a number")
    try:
        return [float(v) for v in values]  # texts too: of a file whose columns are texts
    except ValueError:
        raise ValueError("not a number") from None


def _texts(value: Any) -> list[str]:
    texts = value.get("text") if isinstance(value, Mapping) else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("not a list of texts")
    return texts
