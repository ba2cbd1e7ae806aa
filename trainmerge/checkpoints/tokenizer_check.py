"""Whether an expert's tokenizer has the same token ids as the base's, and splits texts in the same way."""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from trainmerge.checkpoints.splitting import differing_parts
from trainmerge.checkpoints.vocabulary import (
    Vocabulary,
    is_vocabulary,
    read_vocabularies,
    same_files,
    tokenizer_files,
)
from trainmerge.system.text import listed

UNUSED = re.compile(r"unused|reserved|control_\d", re.IGNORECASE)  # rows that a vocabulary leaves for others
USED = "the base's tokenizer is used and exported"


def tokenizer_mismatches(base: Path, expert: Path, rows: int | None = None) -> list[str]:
    """One line if an ordinary token of the base has an id that means another token to the expert.

    Warns, with id and tokens, if only added tokens differ, or if one side lacks a token of the other; and
    with the parts' names, if equal tokens are found in another way. Folders without tokenizer files are not
    compared.

    Args:
        base: The base's folder.
        expert: The expert's.
        rows: With a shared vocabulary, the rows of the base's embedding: the expert's later tokens are not
            merged, and tokens that it lacks have the base's embeddings.

    Raises:
        ValueError: a damaged file.
    """
    if not tokenizer_files(base) or not tokenizer_files(expert) or same_files(base, expert):
        return []
    ours, theirs = read_vocabularies(base, expert)
    if not _comparable(ours, theirs):
        warnings.warn(
            f"{theirs.file}: its tokens cannot be compared with the base's, {ours.file}: transformers cannot "
            "build both tokenizers here (sentencepiece or mistral-common may be missing); save both as "
            "tokenizer.json",
            stacklevel=2,
        )
        return []
    different = [i for i in ours.tokens.keys() & theirs.tokens.keys() if ours.tokens[i] != theirs.tokens[i]]
    ordinary = [i for i in different if i not in ours.added and not UNUSED.search(ours.tokens[i])]
    if ordinary:
        first = min(ordinary)
        return [
            f"{theirs.file}: token {first} is {theirs.tokens[first]!r}, the base's is {ours.tokens[first]!r} "
            f"({len(different)} differ): its embeddings belong to other tokens than the base's. Use experts "
            "with the base's tokenizer; if this file is not the one of the expert's training, replace it"
        ]
    _warn_of_added(ours, theirs, different, rows)
    _warn_of_splitting(ours, theirs)
    return []


def same_ids(one: Path, other: Path) -> bool:
    """Whether two folders' tokenizers give every token the same id."""
    ours, theirs = read_vocabularies(one, other)
    return ours.tokens == theirs.tokens


def warn_of_lost_tokens(merge: Path, expert: Path) -> None:
    """Warn of an expert's tokens that the merge's tokenizer lacks, and of texts that it may split otherwise.

    `merge` is the folder of a chosen tokenizer, whose rows are matched by token.
    """
    if not tokenizer_files(expert):
        return
    ours, theirs = read_vocabularies(merge, expert)
    known = {*ours.tokens.values()}
    if lost := [i for i, token in theirs.tokens.items() if token not in known and not UNUSED.search(token)]:
        warnings.warn(
            f"{theirs.file}: the merge's tokenizer lacks {_named(theirs, lost)}: their rows are left out. "
            "Set tokenizer: union to keep them",
            stacklevel=3,
        )
    if parts := differing_parts(ours, theirs):
        warnings.warn(
            f"{theirs.file}: {', '.join(parts)} differs from that of the merge's tokenizer, so it may split "
            "a text into other tokens: the expert was trained on its own splits",
            stacklevel=3,
        )


def _comparable(ours: Vocabulary, theirs: Vocabulary) -> bool:
    """Whether both were read; of two formats, most ids must agree: some tokenizers shift a file's ids."""
    if any(is_vocabulary(own.file) and not own.whole for own in (ours, theirs)):
        return False
    common = ours.tokens.keys() & theirs.tokens.keys()
    same = sum(ours.tokens[i] == theirs.tokens[i] for i in common)
    return ours.file.name == theirs.file.name or 2 * same >= len(common)


def _warn_of_added(ours: Vocabulary, theirs: Vocabulary, different: list[int], rows: int | None) -> None:
    if different:
        pairs = [f"{i} is {theirs.tokens[i]!r}, the base's {ours.tokens[i]!r}" for i in sorted(different)]
        warnings.warn(
            f"{theirs.file}: added token {listed(pairs)}; {USED}. tokenizer: union matches rows by token",
            stacklevel=3,
        )
    more = [i for i in theirs.tokens.keys() - ours.tokens.keys() if rows is None or i < rows]
    if more:
        warnings.warn(
            f"{theirs.file}: the base's tokenizer lacks {_named(theirs, more)}, and {USED}: it splits them "
            "into others. If the experts need them, set tokenizer: union",
            stacklevel=3,
        )
    fewer = ours.tokens.keys() - theirs.tokens.keys()
    if fewer and theirs.whole and rows is None:
        warnings.warn(
            f"{theirs.file}: it lacks {_named(ours, fewer)} of the base's tokenizer: the expert was trained "
            f"without them; {USED}",
            stacklevel=3,
        )


def _warn_of_splitting(ours: Vocabulary, theirs: Vocabulary) -> None:
    if parts := differing_parts(ours, theirs):
        warnings.warn(
            f"{theirs.file}: {', '.join(parts)} differs from that of {ours.file}, so it may split a text "
            f"into other tokens: the expert was trained on its own splits; {USED}. Use experts with the "
            "base's tokenizer; if this file is not the one of the expert's training, replace it",
            stacklevel=3,
        )


def _named(vocabulary: Vocabulary, ids: Iterable[int]) -> str:
    """`token 35 '<|im_start|>'`, the first few."""
    return listed([f"token {i} {vocabulary.tokens[i]!r}" for i in sorted(ids)])
