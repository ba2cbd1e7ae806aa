"""Whether an expert's tokenizer has the same token ids as the base's."""

import json
import warnings
from pathlib import Path

FILE = "tokenizer.json"


def tokenizer_mismatches(base: Path, expert: Path) -> list[str]:
    """One line if ordinary tokens have different ids; a warning if only added tokens have.

    Folders without a `tokenizer.json` are not checked.
    """
    files = base / FILE, expert / FILE
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return []
    (ours, our_added), (theirs, their_added) = (_tokens(file) for file in files)
    different = [i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i]]
    if different:
        first = min(different)
        return [
            f"{files[1]}: token {first} is {theirs[first]!r}, the base's is {ours[first]!r} "
            f"({len(different)} differ): its embeddings belong to other tokens than the base's. Use experts "
            "with the base's tokenizer; if this file is not the one of the expert's training, replace it"
        ]
    added = [i for i in our_added.keys() & their_added.keys() if our_added[i] != their_added[i]]
    if added:
        first = min(added)
        warnings.warn(
            f"{files[1]}: added token {first} is {their_added[first]!r}, the base's is "
            f"{our_added[first]!r}; the base's tokenizer is used and exported",
            stacklevel=2,
        )
    return []


def _tokens(file: Path) -> tuple[dict[int, str], dict[int, str]]:
    """Id -> token: the model's own, and the added ones.

    Raises:
        ValueError: the file is not a tokenizer.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        pairs = (
            ((i, token) for token, i in vocabulary.items())
            if isinstance(vocabulary, dict)
            else ((i, token) for i, (token, _) in enumerate(vocabulary))  # Unigram: in order, with scores
        )
        added = {int(entry["id"]): str(entry["content"]) for entry in content.get("added_tokens") or []}
        return {i: token for i, token in pairs if i not in added}, added
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a tokenizer ({error}); download or save it again") from error
