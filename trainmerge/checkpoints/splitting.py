"""How a tokenizer splits texts: two of one vocabulary differ by merges, normalizer or pre-tokenizer.

A part is compared as `tokenizers` parses it, not as its JSON text: files of other versions lack keys that
have their default, and write a merge as "a b" or as ["a", "b"].
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from trainmerge.checkpoints.vocabulary import WHOLE, Vocabulary
from trainmerge.system.json_file import read_json

STEPS = ("normalizer", "pre_tokenizer")  # before the model, which splits words into tokens
APART = ("vocab", "merges", "type", "dropout")  # of the model: compared elsewhere, or off when a text is read
SAME_SPLIT = ("trim_offsets",)  # it moves the borders that are reported, not those of tokens


def differing_parts(ours: Vocabulary, theirs: Vocabulary) -> list[str]:
    """The parts of two tokenizers by which they may split a text differently; none if that is unknown.

    Compared are both `tokenizer.json`; if a side lacks it, the tokenizers that transformers builds. Models of
    other types (WordPiece and BPE) are not compared.

    Raises:
        ValueError: a damaged file.
    """
    one, other = _contents(ours, theirs)
    model, expert = one.get("model") or {}, other.get("model") or {}
    if not model or not expert or model.get("type", "") != expert.get("type", ""):
        return []
    found = [step for step in STEPS if _parsed(step, one.get(step)) != _parsed(step, other.get(step))]
    if _merges(model) != _merges(expert):
        found.append("model.merges")
    mine, own = _scores(model), _scores(expert)
    if any(mine[token] != own[token] for token in mine.keys() & own.keys()):
        found.append("model.vocab (scores)")
    return found + [f"model.{key}" for key in _settings(model, expert)]


def _contents(ours: Vocabulary, theirs: Vocabulary) -> tuple[dict[str, Any], dict[str, Any]]:
    files = [own.file for own in (ours, theirs)]
    if all(file.name == WHOLE for file in files):
        one, other = (read_json(file, "Download or save it again.") for file in files)
    else:
        one, other = (json.loads(own.backend.to_str()) if own.backend else {} for own in (ours, theirs))
    return one, other


def _parsed(step: str, content: Any) -> Any:
    """A step with the defaults of the installed `tokenizers`; as written, if that does not know it."""
    blank = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}}
    try:
        parsed = json.loads(Tokenizer.from_str(json.dumps({**blank, step: content})).to_str())[step]
    except Exception:  # of its own type: a step of a later version
        parsed = content
    return _flat(parsed)


def _flat(step: Any) -> Any:
    """A step without sequences of one or no step, and without what changes no token."""
    if not isinstance(step, Mapping):
        return step
    inner = next((step[key] for key in ("normalizers", "pretokenizers") if key in step), None)
    if not isinstance(inner, list):
        return {key: value for key, value in step.items() if key not in SAME_SPLIT}
    steps = [flat for one in inner if (flat := _flat(one)) is not None]
    return steps if len(steps) > 1 else next(iter(steps), None)


def _merges(model: Mapping[str, Any]) -> list[str]:
    """Pairs of tokens in order, as "a b"."""
    merges = model.get("merges") or []
    return [" ".join(map(str, pair)) if isinstance(pair, list) else str(pair) for pair in merges]


def _scores(model: Mapping[str, Any]) -> dict[str, Any]:
    """Token -> its log-probability in a Unigram model; empty for others."""
    vocabulary = model.get("vocab")
    return {str(token): score for token, score in vocabulary} if isinstance(vocabulary, list) else {}


def _settings(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The model's other settings that differ; one that a file lacks is off, or has a default of its own."""
    common = {key for key in ours.keys() & theirs.keys() if (ours[key] or None) != (theirs[key] or None)}
    alone = {key for key in ours.keys() ^ theirs.keys() if ours.get(key, theirs.get(key)) is True}
    return sorted((common | alone) - set(APART))
