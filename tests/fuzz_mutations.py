"""Mutations of valid files: of their bytes, and of the values within JSON."""

import json
import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

TOKENS = b'{}[]",:0123456789e-.\\u\x00\xff\n\r\t ' + "\u00e9\u2028".encode()
FRAGMENTS = (
    b"null", b"NaN", b"-Infinity", b"1e999", b"1" * 5000, b"[" * 300, b"[" * 100000, b'{"a":' * 5000,
    b"\xef\xbb\xbf", b"\xff\xfe", b"&a [*a]", b"!!python/object/apply:os.system ['true']", b"<<: 1", b"---\n",
    b"2020-99-99", b"? [1]", b"%YAML 9", b'"\\ud800"', b"'", b"\x80\x04", b"0x", b"1:99", b"!!set", b"true",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 1.5, -2.5, 1e308, float("inf"), float("nan"), 2**31, 2**63, 2**64, 10**30,
    "", " ", "x", "\x00", "\ud800", "../../x", "/etc/passwd", "a/b", "(", "(.*.*)*", "F32", "os.system",
    "a" * 3000, [], {}, [[]], [1], [None], {"a": 1}, {"class_path": "os.system"}, [[[[[]]]]],
    {"class_path": "trainmerge.Ties", "init_args": 5},
)  # fmt: skip


def mutate(data: bytes, dice: random.Random, whole: bool = True) -> bytes:
    """One to eight random changes; `whole`: JSON, whose values are changed in half of the cases."""
    if whole and dice.random() < 0.5:
        return _changed_values(data, dice)
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 4, 8))):
        _change_bytes(changed, dice)
    return bytes(changed)


def _change_bytes(data: bytearray, dice: random.Random) -> None:
    place, kind = dice.randrange(len(data) + 1), dice.randrange(8)
    if kind == 0 and place < len(data):
        data[place] = dice.randrange(256)
    elif kind == 1 and place < len(data):
        data[place] ^= 1 << dice.randrange(8)
    elif kind == 2:
        del data[place : place + dice.randrange(1, 12)]
    elif kind == 3:
        data[place:place] = bytes(dice.choices(TOKENS, k=dice.randrange(1, 5)))
    elif kind == 4:
        del data[place:]
    elif kind == 5:
        data[place:place] = data[dice.randrange(len(data) + 1) :][: dice.randrange(64)]
    elif kind == 6:
        data[place:place] = dice.choice(FRAGMENTS)
    else:
        data[place : place + 4] = dice.choice(FRAGMENTS)


def _changed_values(data: bytes, dice: random.Random) -> bytes:
    """The JSON with some values, keys or items replaced, removed or repeated."""
    value = {"": json.loads(data)}
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        parent, key = dice.choice([*places(value)])
        kind = dice.randrange(5)
        if kind == 0 and isinstance(parent, dict) and key:
            parent[dice.choice(("", "x", "../x", "\ud800", "a" * 2000, "__metadata__"))] = parent.pop(key)
        elif kind == 1 and key != "":
            del parent[key]
        elif kind == 2 and isinstance(parent, list):
            parent.append(deepcopy(parent[key]))
        else:
            parent[key] = deepcopy(dice.choice(ODD))
    return json.dumps(value.get("")).encode("utf-8", "surrogatepass")


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with each of its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from places(item)
