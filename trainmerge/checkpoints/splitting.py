"""How a tokenizer splits texts: two of one vocabulary differ by model, merges, normalizer or pre-tokenizer.

A part is compared as `tokenizers` parses it, not as its JSON text: files of other versions lack keys that
have their default, and write a merge as "a b" or as ["a", "b"]. Post-processors are compared by the ids that
they add. The decoder, and whether an added token is special, change no id.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer

from trainmerge.checkpoints.vocabulary import WHOLE, Vocabulary
from trainmerge.system.json_file import read_json
from trainmerge.system.text import listed

STEPS = ("normalizer", "pre_tokenizer")  # before the model, which splits words into tokens
APART = ("vocab", "merges", "type", "dropout")  # of the model: compared elsewhere, or off when a text is read
FOUND = ("lstrip", "rstrip", "single_word", "normalized")  # how an added token is looked for
TEXT = 2**31 - 1  # an id that no token has
SAME_SPLIT = ("trim_offsets",)  # it moves the borders that are reported, not those of tokens


def differing_parts(ours: Vocabulary, theirs: Vocabulary) -> list[str]:
    """The parts of two tokenizers by which they may split a text differently; none if that is unknown.

    Compared are both `tokenizer.json`; if a side lacks it, the tokenizers that transformers builds. What is
    added around a text, and how added tokens are found in it, is compared in the latter if it built both:
    a tokenizer_config.json may change them.

    Raises:
        ValueError: a damaged file.
    """
    one, other = _contents(ours, theirs)
    model, expert = one.get("model") or {}, other.get("model") or {}
    if not model or not expert:
        return []
    found = [step for step in STEPS if _parsed(step, one.get(step)) != _parsed(step, other.get(step))]
    found += _model_parts(model, expert)
    built = ours.backend is not None and theirs.backend is not None
    around = [_around(own.backend if built else file) for own, file in ((ours, one), (theirs, other))]
    if around[0] != around[1]:
        found.append("post_processor")
    flags = [_flags(own.backend if built else file) for own, file in ((ours, one), (theirs, other))]
    words = [set(_words(own)) for own in (model, expert)]
    changed = [
        token
        for token in sorted(flags[0].keys() | flags[1].keys())
        if flags[0].get(token) != flags[1].get(token)
        and all(token in found or token in known for found, known in zip(flags, words, strict=True))
    ]
    return found + ([f"added_tokens ({listed([repr(token) for token in changed])})"] if changed else [])


def _model_parts(model: Mapping[str, Any], expert: Mapping[str, Any]) -> list[str]:
    """The parts by which two models differ; only their type, if that does: the others have no counterpart."""
    if _kind(model) != _kind(expert):
        return [f"model.type ({_kind(expert)}, the base's is {_kind(model)})"]
    found = []
    if _merges(model) != _merges(expert):
        found.append("model.merges")
    mine, own = _scores(model), _scores(expert)
    if any(mine[token] != own[token] for token in mine.keys() & own.keys()):
        found.append("model.vocab (scores)")
    return found + [f"model.{key}" for key in _settings(model, expert)]


def _kind(model: Mapping[str, Any]) -> str:
    """The model's type; files of early versions lack it, and `tokenizers` tells it by the keys."""
    if isinstance(model.get("vocab"), list):
        return str(model.get("type") or "Unigram")
    keys = {"merges": "BPE", "max_input_chars_per_word": "WordPiece"}
    return str(model.get("type") or next((keys[key] for key in keys if key in model), "WordLevel"))


def _around(tokenizer: Any) -> Any:
    """Ids and segments around one text, and around two. Given as a file's content, or built."""
    built = not isinstance(tokenizer, Mapping)
    content = _post_processor(tokenizer) if built else tokenizer.get("post_processor")
    blank = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"": TEXT}, "unk_token": ""}}
    try:
        alone = Tokenizer.from_str(json.dumps({**blank, "post_processor": content}))
        return [(code.ids, code.type_ids) for code in (alone.encode("text"), alone.encode("text", "pair"))]
    except Exception:  # of its own type: a step of a later version
        return content


def _post_processor(tokenizer: Any) -> Any:
    state = getattr(tokenizer.post_processor, "__getstate__", None)
    return json.loads(state()) if state and tokenizer.post_processor is not None else None


def _flags(tokenizer: Any) -> dict[str, tuple[bool, ...]]:
    """Added token -> how it is found in a text. Given as a file's content, or built."""
    if not isinstance(tokenizer, Mapping):
        added = tokenizer.get_added_tokens_decoder().values()
        return {str(one.content): tuple(bool(getattr(one, key)) for key in FOUND) for one in added}
    return {
        str(one["content"]): tuple(bool(one.get(key)) for key in FOUND)
        for one in tokenizer.get("added_tokens") or []
    }


def _words(model: Mapping[str, Any]) -> Iterable[str]:
    vocabulary = model.get("vocab") or {}
    return vocabulary if isinstance(vocabulary, Mapping) else (str(token) for token, _ in vocabulary)


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
