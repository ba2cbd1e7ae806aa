"""Examples of calibration and test files."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainmerge.data.columns import Columns
from trainmerge.data.media_values import Media, content_digest, picture_value, sound_value
from trainmerge.data.text_files import load_examples
from trainmerge.system.text import shortened

ASSISTANT = "assistant"  # the role of the turns that enter the loss
REWRITTEN = (
    "the chat template writes a turn of the assistant in another way once later turns follow (it leaves out "
    "earlier reasoning, say), so the chat up to that turn is no prefix of the whole: its tokens cannot be "
    "located. Mark them in the template with {% generation %}, or give texts with a column of spans "
    "(data.columns.text and data.columns.spans)"
)


class Example(NamedTuple):
    """One unlabeled example. `spans` are the characters of `text` that enter the loss; None is all.

    With `tokens`, which a model wrote, they are places of tokens instead, and the first token is in none.

    A picture or a sound alone has the text "".
    """

    text: str
    spans: tuple[tuple[int, int], ...] | None = None
    target: str | None = None  # the decoder's text of a sequence-to-sequence model
    image: str | bytes | None = None  # path of the picture, or its file's content
    templated: bool = False  # `text` already has its special tokens
    audio: Media | None = None  # path of the sound, its file's content, or its samples
    pair: str | None = None  # the second text of a pair
    tokens: tuple[int, ...] | None = None  # those of `text`


Render = Callable[[Sequence[Mapping[str, str]]], Example]  # a chat -> its text and spans


def read_examples(
    path: str, columns: Columns, render: Render, count: int | None = None, *, located: bool = True
) -> list[Example]:
    """The first `count` examples of a file; `located`: whether the assistant's tokens of chats are needed.

    Warns of the assistant's turns that cannot be located: they do not enter the loss.

    Raises:
        ValueError: as `load_examples`; a row with a value of the wrong type; or a chat without any turn of
            the assistant that can be located.
    """
    data = load_examples(path, columns.names(), media=columns.media)
    rows = data.select(range(min(count or len(data), len(data))))
    examples = [
        _example(row, columns, render, Path(path), f"{path}: example {i}", located)
        for i, row in enumerate(rows)
    ]
    if columns.messages and located and not (columns.spans or columns.image):
        _warn_of_dropped(path, [row[columns.messages] for row in rows], examples)
    return examples


def _warn_of_dropped(path: str, chats: Sequence[Sequence[Any]], examples: Sequence[Example]) -> None:
    turns = [_assistant_turns(chat) for chat in chats]
    short = [max(0, n - len(example.spans or ())) for n, example in zip(turns, examples, strict=True)]
    if any(short):
        first = next(i for i, number in enumerate(short) if number)
        warnings.warn(
            f"{path}: {sum(short)} of {sum(turns)} turns of the assistant do not enter the loss, the first "
            f"in example {first}: {REWRITTEN}",
            stacklevel=3,
        )


def _assistant_turns(chat: Sequence[Any]) -> int:
    return sum(message["role"] == ASSISTANT for message in chat)


def _example(
    row: Mapping[str, Any], columns: Columns, render: Render, path: Path, where: str, located: bool
) -> Example:
    if columns.messages:
        _check_chat(row[columns.messages], columns.messages, where)
        try:
            example = render(row[columns.messages])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where} has no chat in {columns.messages!r}: {error}") from error
        if not located:
            example = example._replace(spans=None)
        elif not (example.spans or columns.spans or columns.image):
            if _assistant_turns(row[columns.messages]):
                raise ValueError(f"{where}: {REWRITTEN}")
            raise ValueError(
                f"{where} has no chat in {columns.messages!r}: it has no turn with the role {ASSISTANT!r}"
            )
    else:
        example = Example(_text(row, columns.text, where) if columns.text else "")
    if columns.image and columns.spans:
        raise ValueError(
            "columns.spans with columns.image: with pictures, all positions enter the loss; leave out spans"
        )
    if columns.spans:
        example = example._replace(spans=_spans(row, columns.spans, len(example.text), where))
    if columns.pair:
        example = example._replace(pair=_text(row, columns.pair, where))
    if columns.target:
        example = example._replace(target=_text(row, columns.target, where))
    if columns.image:
        image = picture_value(row[columns.image], path.parent, where)
        example = example._replace(image=image, spans=None)
    if columns.audio:
        example = example._replace(audio=sound_value(row[columns.audio], path.parent, where))
    return example


def _check_chat(chat: Any, column: str, where: str) -> None:
    turns = chat if isinstance(chat, list) else [None]
    if not all(isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in turns):
        raise ValueError(
            f"{where} has {shortened(repr(chat), 100)} for {column!r}: a chat is a list of turns, "
            '{"role": ..., "content": ...}'
        )


def contents(example: Example) -> list[Any]:
    """The example as JSON data, with picture and sound identified by content."""
    own = [*example._replace(image=None)[:5], content_digest(example.image)]
    own += [content_digest(example.audio)] if example.audio else []
    own += [] if example.pair is None else [example.pair]
    return own if example.tokens is None else [*own, list(example.tokens)]


def subject(example: Example) -> str:
    """What two files must not share: the text, both of a pair, or the content of a picture or sound alone."""
    if example.pair is not None:
        return json.dumps([example.text, example.pair])
    return example.text or content_digest(example.image or example.audio) or ""


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"{where} has {row[column]!r} for {column!r}, which is not a text")
    return str(row[column])


def _spans(row: Mapping[str, Any], column: str, length: int, where: str) -> tuple[tuple[int, int], ...]:
    given = row[column]
    try:
        spans = tuple((int(begin), int(end)) for begin, end in given)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where} has {shortened(repr(given), 100)} for {column!r} (data.columns.spans): "
            "spans are lists of [begin, end)"
        ) from error
    if not spans or any(not 0 <= begin < end <= length for begin, end in spans):
        raise ValueError(f"{where}: spans {given!r} are not within its {length} characters")
    return spans


def warn_of_overlap(name: str, calibration: Sequence[str], test: Sequence[str]) -> None:
    """Warn when test examples are among the calibration examples: scores on them would be transductive."""
    shared = len(set(calibration) & set(test))
    if shared:
        warnings.warn(
            f"{name}: {shared} of {len(set(test))} test examples are also calibration examples; scores on "
            "them are too high. Use a separate split.",
            stacklevel=2,
        )


def examples_identity(identities: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """A text that identifies calibration examples and how they are read."""
    return json.dumps([identities, settings], sort_keys=True)
