"""Ids of tokens in config.json and generation_config.json, moved to the vocabulary of a merge."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from trainmerge.checkpoints.tokenizer_choice import Chosen
from trainmerge.system.plain_data import text_settings

EOS = "eos_token_id"
OF_IDS = re.compile(r"_token_(id|ids|index)$|^(begin_)?suppress_tokens$|^bad_words_ids$")
Move = Callable[[int], int | None]


def move_ids(content: Mapping[str, Any], move: Move) -> dict[str, Any]:
    """The same settings with every id of a token moved; ids that have no place become None, or are left out.

    >>> move_ids({"eos_token_id": [1, 2], "text_config": {"pad_token_id": 2}, "layers": 2}, {1: 5}.get)
    {'eos_token_id': [5], 'text_config': {'pad_token_id': None}, 'layers': 2}
    """
    return {
        key: move_ids(value, move)
        if isinstance(value, Mapping)
        else _moved(value, move)
        if OF_IDS.search(key)
        else value
        for key, value in content.items()
    }


def _moved(value: Any, move: Move) -> Any:
    if isinstance(value, list):
        inner = [_moved(item, move) for item in value]
        return [item for item in inner if item is not None]
    return move(value) if type(value) is int and value >= 0 else value


def ends(config: Mapping[str, Any], generation: Mapping[str, Any], token: int | None) -> list[int]:
    """A model's own ids that end an answer: of both files, and its tokenizer's. In order, each once."""
    given = [config.get(EOS), text_settings(config).get(EOS), generation.get(EOS), token]
    flat = (i for one in given for i in (one if isinstance(one, list) else [one]))
    return list(dict.fromkeys(i for i in flat if type(i) is int and i >= 0))


def with_ends(content: Mapping[str, Any], found: Iterable[int]) -> dict[str, Any]:
    """The settings with these ids as ends of an answer, wherever they name one; one is written alone.

    >>> with_ends({"text_config": {"eos_token_id": 1}}, [1, 2])
    {'text_config': {'eos_token_id': [1, 2]}, 'eos_token_id': [1, 2]}
    """
    ids = list(found)
    value: Any = ids[0] if len(ids) == 1 else ids
    if not ids:
        return dict(content)
    inner = {
        key: {**part, EOS: value}
        for key, part in content.items()
        if isinstance(part, Mapping) and EOS in part
    }
    return {**content, **inner, EOS: value}


def resized(config: Mapping[str, Any], chosen: Chosen) -> dict[str, Any]:
    """The base's config.json with the merge's number of rows, and ids of its tokens in the merge."""
    content = move_ids(config, lambda own: chosen.id_of("base", own))
    text = content.get("text_config")
    if isinstance(text, dict) and "vocab_size" in text:
        text["vocab_size"] = chosen.rows
    if "vocab_size" in content or text is None:
        content["vocab_size"] = chosen.rows
    return content
