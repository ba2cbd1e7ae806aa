"""Checks of all examples' tokens before a fit, which encode as few texts as they can."""

from collections.abc import Sequence

from trainmerge.data.examples import Example
from trainmerge.data.media import without_text
from trainmerge.data.tokenizer import Tokenizer

TOGETHER = 64  # examples that are tokenised at a time


def longest(tokenize: Tokenizer, examples: Sequence[Example], key: str = "input_ids") -> int:
    """Tokens of the longest text after truncation; of the longest target for the key `labels`."""
    texts = [e._replace(spans=None, image=None, audio=None) for e in examples]
    texts = [e for e in texts if (e.text or key == "labels")]
    found = 0
    for first in range(0, len(texts), TOGETHER):
        inputs = tokenize.encode(texts[first : first + TOGETHER]).inputs
        found = max(found, inputs[key].shape[1] if key in inputs else 0)
    return found


def check_lengths(
    tokenize: Tokenizer,
    examples: Sequence[Example],
    most: tuple[int | None, int | None],
    model: str,
    key: str,
) -> None:
    """Raise ValueError if a text or a target is longer than the model.

    Args:
        tokenize: The model's own.
        examples: Texts that are read only if the tokenizer may give more tokens than the model has positions.
        most: The model's positions for texts and for the decoder's targets.
        model: Its class, for the error.
        key: The setting that truncates.
    """
    for limit, column, what in zip(most, ("input_ids", "labels"), ("an example", "a target"), strict=True):
        if limit is None or tokenize.max_length <= limit:
            continue
        if (tokens := longest(tokenize, examples, column)) > limit:
            raise ValueError(
                f"{what} of {tokens} tokens is over the model's limit of {limit} positions ({model}): set "
                f"{key} to {limit} or less"
            )


def check_embedding_rows(tokenize: Tokenizer, examples: Sequence[Example], together: int = TOGETHER) -> None:
    """Raise ValueError if a text has a token that the model's embedding has no row for.

    Reads the texts only if the tokenizer has such tokens.
    """
    if without_text(examples) or not tokenize.lacks_rows:
        return
    for first in range(0, len(examples), together):
        tokenize.encode(examples[first : first + together])
