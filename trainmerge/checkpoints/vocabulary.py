"""A folder's tokenizer as the map token id -> token, whatever the format of its files."""

import json
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from trainmerge.checkpoints.meta_model import quiet

WHOLE = "tokenizer.json"
ADDED, SETTINGS = "added_tokens.json", "tokenizer_config.json"
WORDS = ("vocab.json", "vocab.txt")
BINARY = (".model", ".spm", ".tiktoken")  # sentencepiece, or tiktoken's lines of base64
OTHERS = ("merges.txt", "special_tokens_map.json", "tekken.json")


@dataclass(frozen=True)
class Vocabulary:
    """Token id -> token, and which ids were added after the vocabulary was trained."""

    file: Path  # the main one of its files
    tokens: dict[int, str]
    added: frozenset[int]
    whole: bool  # False: the folder has added tokens only, or a format that cannot be read
    backend: Any = None  # the tokenizer of `tokenizers`, if transformers built it from these files


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that a tokenizer's ids may depend on; the main one first."""
    names = (WHOLE, *WORDS, *OTHERS, ADDED, SETTINGS)
    binary = sorted(path for path in folder.iterdir() if path.suffix in BINARY)
    named = [path for name in names if (path := folder / name).is_file()]
    ahead = [path for path in named if path.name in (WHOLE, *WORDS)]
    return [*ahead, *binary, *(path for path in named if path not in ahead)]


def same_files(one: Path, other: Path) -> bool:
    """Whether both folders have the same tokenizer files, byte by byte."""
    ours, theirs = tokenizer_files(one), tokenizer_files(other)
    return [path.name for path in ours] == [path.name for path in theirs] and all(
        a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes()
        for a, b in zip(ours, theirs, strict=True)
    )


def read_vocabularies(*folders: Path) -> list[Vocabulary]:
    """Every folder's vocabulary as transformers makes it; if it cannot build all of them, as in the files.

    Raises:
        ValueError: a damaged file.
    """
    built = [_built(folder) for folder in folders]
    return [
        own if own and all(built) else _from_files(folder) for own, folder in zip(built, folders, strict=True)
    ]


def _built(folder: Path) -> Vocabulary | None:
    """The vocabulary of transformers' tokenizer; None if it cannot be built. Runs no code of the folder."""
    stats = [path.stat() for path in tokenizer_files(folder)]
    return _built_once(folder, tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats))


@lru_cache(maxsize=2)  # the base, which every expert is compared with, and an expert
def _built_once(folder: Path, _: tuple[tuple[int, ...], ...]) -> Vocabulary | None:
    files = tokenizer_files(folder)
    if not is_vocabulary(files[0]):  # transformers would make one up
        return None
    try:
        tokenizer = build_tokenizer(folder)
        with quiet():
            tokens = {int(i): str(token) for token, i in tokenizer.get_vocab().items()}
            added = frozenset(tokenizer.added_tokens_decoder)
    except Exception:  # a foreign parser: the files are read instead, and say what is wrong with them
        return None
    return Vocabulary(files[0], tokens, added, True, getattr(tokenizer, "backend_tokenizer", None))


def build_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder: no code of the folder runs, and nothing is downloaded."""
    with quiet():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def is_vocabulary(file: Path) -> bool:
    """Whether a tokenizer's file has more than added tokens."""
    return file.name in (WHOLE, *WORDS, "tekken.json") or file.suffix in BINARY


def _from_files(folder: Path) -> Vocabulary:
    files = tokenizer_files(folder)
    tokens = _checked(_vocabulary, files[0])
    added = {i: token for file in files for i, token in _checked(_added, file).items()}
    return Vocabulary(files[0], tokens | added, frozenset(added), whole=bool(tokens))


def _checked(read: Callable[[Path], dict[int, str]], file: Path) -> dict[int, str]:
    try:
        return read(file)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: not a tokenizer ({error}); download or save it again") from error


def _vocabulary(file: Path) -> dict[int, str]:
    """Id -> token of one file, without added tokens."""
    if file.suffix in BINARY:
        return dict(enumerate(_pieces(file.read_bytes()))) or _ranks(file.read_bytes())
    if file.name == "vocab.txt":
        return dict(enumerate(file.read_text(encoding="utf-8").rstrip("\n").split("\n")))
    if file.name == "vocab.json":
        return {int(i): str(token) for token, i in _json(file).items()}
    if file.name != WHOLE:
        return {}
    vocabulary = _json(file)["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return {int(i): str(token) for token, i in vocabulary.items()}
    return {i: str(token) for i, (token, _) in enumerate(vocabulary)}  # Unigram: in order, with scores


def _added(file: Path) -> dict[int, str]:
    match file.name:
        case "tokenizer.json":
            return {int(one["id"]): str(one["content"]) for one in _json(file).get("added_tokens") or []}
        case "added_tokens.json":
            return {int(i): str(token) for token, i in _json(file).items()}
        case "tokenizer_config.json":
            given = _json(file).get("added_tokens_decoder") or {}
            return {int(i): str(one["content"]) for i, one in given.items()}
    return {}


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _ranks(data: bytes) -> dict[int, str]:
    """tiktoken: one line of base64 and rank per token."""
    pairs = (line.split() for line in data.splitlines() if line)
    return {int(rank): b64decode(token, validate=True).decode("latin-1") for token, rank in pairs}


def _pieces(data: bytes) -> list[str]:
    """A sentencepiece model's pieces in order (sentencepiece_model.proto: field 1 of field 1); or none."""
    try:
        return [
            next(text for inner, text in _fields(piece) if inner == 1).decode()
            for field, piece in _fields(data)
            if field == 1
        ]
    except (IndexError, ValueError, StopIteration):
        return []


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """A protocol buffer's fields: number and bytes; those of other types have none."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        size = {1: 8, 5: 4}.get(tag & 7, 0)  # 64 and 32 bits
        if tag & 7 == 0:
            _, at = _varint(data, at)
        elif tag & 7 == 2:
            size, at = _varint(data, at)
        elif not size:
            raise ValueError("not a protocol buffer")
        if at + size > len(data):
            raise ValueError("cut short")
        yield tag >> 3, data[at : at + size] if tag & 7 == 2 else b""
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
