"""What a tokenizer does by transformers' defaults, said where other programs have other defaults.

llama.cpp takes a tokenizer with sentencepiece's rules to begin texts with `bos_token`, and to put a
space after special tokens, unless tokenizer_config.json has `add_bos_token` and `add_prefix_space`.
transformers 5 takes an absent `add_bos_token` as false.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainmerge.checkpoints.chat_template import REMEDY, open_tokenizer, save
from trainmerge.checkpoints.vocabulary import SETTINGS, WHOLE
from trainmerge.system.json_file import read_json

PIECES, SPACE, WORD = ".model", "▁", "a"


def state_settings(folder: Path) -> None:
    """Add these keys to a folder's tokenizer_config.json where they are absent and false.

    Nothing is written if transformers would then read any of a few texts otherwise.
    """
    if not _has_pieces(folder) or not (folder / SETTINGS).is_file():
        return
    settings, tokenizer = read_json(folder / SETTINGS, REMEDY), open_tokenizer(folder)
    found = {key: False for key in _absent(tokenizer) if settings.get(key) is None}
    before = _readings(tokenizer)
    for key, value in found.items():
        save(folder / SETTINGS, {**settings, key: value})
        if _readings(open_tokenizer(folder)) == before:
            settings = {**settings, key: value}
        save(folder / SETTINGS, settings)


def _has_pieces(folder: Path) -> bool:
    """Whether a tokenizer has sentencepiece's rules: a model of pieces, or BPE with bytes as a fallback."""
    if any(path.suffix == PIECES for path in folder.iterdir()):
        return True
    model = read_json(folder / WHOLE, REMEDY).get("model") if (folder / WHOLE).is_file() else {}
    return isinstance(model, Mapping) and bool(model.get("byte_fallback"))


def _absent(tokenizer: Any) -> Iterator[str]:
    """The keys of what the tokenizer does not do."""
    bare = tokenizer(WORD, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None and tokenizer(WORD)["input_ids"] == bare:
        yield "add_bos_token"
    special = _special(tokenizer)
    tokens = [tokenizer.tokenize(WORD)[:1], *(tokenizer.tokenize(f"{s}{WORD}")[1:2] for s in special)]
    if len(tokens) > 1 and not any(token.startswith(SPACE) for each in tokens for token in each):
        yield "add_prefix_space"


def _special(tokenizer: Any) -> list[str]:
    return list(dict.fromkeys(map(str, tokenizer.all_special_tokens)))[:1]


def _readings(tokenizer: Any) -> list[Any]:
    """A few texts as the tokenizer reads them, and writes them again."""
    words = f"{WORD} {WORD}"
    texts = [words, f" {words}", *(f"{special}{words}{special} {words}" for special in _special(tokenizer))]
    read = [dict(tokenizer(text)) for text in texts]
    return [*read, dict(tokenizer(words, words)), *(tokenizer.decode(one["input_ids"]) for one in read)]
