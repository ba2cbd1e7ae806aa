"""Checks of all examples' tokens before a fit, which encode as few texts as they can."""

from collections.abc import Sequence

from trainmerge.data.examples import Example
from trainmerge.data.media import without_text
from trainmerge.data.tokenizer import Tokenizer


def longest(tokenize: Tokenizer, examples: Sequence[Example], limit: int) -> int:
    """Tokens of the longest example after truncation; checks only examples that may exceed `limit`."""
    if tokenize.max_length <= limit:
        return 0
    long = [e for e in examples if len((e.text + (e.pair or "")).encode()) >= limit]
    given = (tokenize.encode([Example(e.text, pair=e.pair)]).inputs["input_ids"] for e in long)
    return max((tokens.shape[1] for tokens in given), default=0)


def check_embedding_rows(tokenize: Tokenizer, examples: Sequence[Example], together: int = 64) -> None:
    """Raise ValueError if a text has a token that the model's embedding has no row for.

    Reads the texts only if the tokenizer has such tokens.
    """
    if without_text(examples) or not tokenize.lacks_rows:
        return
    for first in range(0, len(examples), together):
        tokenize.encode(examples[first : first + together])
