"""The tokens of a merge and their ids, by the choice of its tokenizer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trainmerge.checkpoints.choice import BASE, UNION, TokenizerChoice
from trainmerge.checkpoints.meta_model import shorten
from trainmerge.checkpoints.side_modules import MODULES
from trainmerge.checkpoints.vocabulary import Vocabulary, read_vocabularies, tokenizer_files
from trainmerge.checkpoints.weight_files import read_folder_json
from trainmerge.system.plain_data import text_settings


@dataclass(frozen=True)
class Chosen:
    """Base and experts, and the vocabulary that their merge has."""

    folders: Mapping[str, Path]  # "base" first, and every expert
    vocabularies: Mapping[str, Vocabulary]
    configs: Mapping[str, Mapping[str, Any]]  # config.json, where there is one
    choice: TokenizerChoice
    new: Mapping[int, tuple[str, int]] = field(default_factory=dict)  # id -> expert and its own id, for union

    @property
    def owner(self) -> str:
        """Whose tokenizer files the merge has."""
        return BASE if self.choice.tokenizer in (BASE, UNION) else self.choice.tokenizer

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Id -> token of the merge."""
        more = {i: self.vocabularies[name].tokens[own] for i, (name, own) in self.new.items()}
        return {**self.vocabularies[self.owner].tokens, **more}

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token -> id of the merge."""
        return {token: i for i, token in sorted(self.tokens.items(), reverse=True)}

    @property
    def rows(self) -> int:
        """The rows of the merge's embedding."""
        ours = vocabulary_size(self.configs[BASE])
        rows = vocabulary_size(self.configs[self.owner]) if self.configs.get(self.owner) else ours
        if not self.choice.moves_rows:
            return ours
        rows, multiple = max(rows, max(self.tokens) + 1), self.choice.pad_to_multiple or 1
        return -(-rows // multiple) * multiple

    def id_of(self, side: str, own: int) -> int | None:
        """The merge's id of a side's own one; None if its tokenizer lacks the token."""
        token = self.vocabularies[side].tokens.get(own)
        if token is not None:
            return self.ids.get(token)
        return own if side == self.owner else None


def choose_vocabulary(folders: Mapping[str, Path], choice: TokenizerChoice) -> Chosen:
    """The merge's vocabulary, from tokenizer files and config.json alone.

    Raises:
        ValueError: lists the folders whose tokenizers are missing or cannot be read, and tokens that cannot
            be added to the base's tokenizer.
    """
    base = folders[BASE]
    if (base / MODULES).is_file():
        raise ValueError(f"{base}: a sentence embedder has its base's tokenizer: leave out `tokenizer`")
    named = {name: folder for name, folder in folders.items() if tokenizer_files(folder)}
    if BASE not in named:
        raise ValueError(f"{base}: no tokenizer in it; copy the tokenizer's files there")
    if choice.tokenizer not in (BASE, UNION, *named):
        raise ValueError(
            f"{folders[choice.tokenizer]}: no tokenizer in it, and `tokenizer` names this expert: copy the "
            "tokenizer's files there, or leave out `tokenizer`"
        )
    read = dict(zip(named, read_vocabularies(*named.values()), strict=True))
    if partial := [str(own.file) for own in read.values() if not own.whole]:
        raise ValueError(f"{shorten(partial)}: a tokenizer that cannot be read here; save a tokenizer.json")
    vocabularies = {name: read.get(name, read[BASE]) for name in folders}
    configs = {
        name: read_folder_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        for name, folder in folders.items()
    }
    if choice.tokenizer == UNION and (problems := [*_ordinary(vocabularies)]):
        raise ValueError("\n".join(problems))
    chosen = Chosen(
        folders, vocabularies, configs, choice, _added(vocabularies) if choice.tokenizer == UNION else {}
    )
    if problems := [*_unknown(chosen)]:
        raise ValueError("\n".join(problems))
    return chosen


def _unknown(chosen: Chosen) -> Iterator[str]:
    """Tokens whose rows are chosen, and which the merge or their owner lacks."""
    for token, row in chosen.choice.tokens:
        if token not in chosen.ids:
            yield f"tokens: the merge's tokenizer has no token {token!r}"
        wanted = token if row.token is None else row.token
        if row.source is None or isinstance(wanted, int):
            continue
        if wanted not in chosen.vocabularies[row.source].tokens.values():
            yield f"tokens: {token!r} takes the row of {wanted!r} of {row.source}, whose tokenizer lacks it"


def vocabulary_size(config: Mapping[str, Any]) -> int:
    """`vocab_size` of a config.json. Raises ValueError if it has none."""
    rows = text_settings(config).get("vocab_size", config.get("vocab_size"))
    if not isinstance(rows, int):
        raise ValueError("config.json has no vocab_size, so its vocabulary cannot be changed")
    return rows


def _added(vocabularies: Mapping[str, Vocabulary]) -> dict[int, tuple[str, int]]:
    """The ids of tokens that the base lacks: behind its own, by expert and the expert's own id."""
    ours = vocabularies[BASE].tokens
    known, first = set(ours.values()), max(ours) + 1
    found: dict[int, tuple[str, int]] = {}
    for name, own in vocabularies.items():
        for i, token in sorted(own.tokens.items()):
            if token not in known:
                known.add(token)
                found[first + len(found)] = (name, i)
    return found


def _ordinary(vocabularies: Mapping[str, Vocabulary]) -> Iterator[str]:
    """Experts with tokens that their tokenizer learned and the base's lacks: no list of tokens adds them."""
    known = set(vocabularies[BASE].tokens.values())
    for name, own in vocabularies.items():
        learnt = [t for i, t in sorted(own.tokens.items()) if i not in own.added and t not in known]
        if learnt:
            yield (
                f"{name}: {own.file}: {len(learnt)} tokens of its own, {shorten([*map(repr, learnt)])}, are "
                "found by its own rules, which the base's tokenizer lacks: a union would split texts "
                f"otherwise. Set tokenizer: {name}, whose tokenizer then is the merge's"
            )
