"""Checks of an adapter_config.json before peft sees it: what would run code, or a pattern without an end.

peft matches the patterns of a configuration against every module's name. Python's matcher takes exponential
time for a repetition within a repetition, and cannot be interrupted.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

PATTERNS = ("target_modules", "exclude_modules")  # a pattern, or a list of names
LISTED = ("layers_pattern", "modules_to_save")  # a pattern, or a list of them
KEYED = ("rank_pattern", "alpha_pattern")  # pattern -> number
IMPORTED = ("megatron_config", "megatron_core")  # peft imports the module that the latter names
MEGATRON = "megatron.core"  # peft's default
MOST = 5  # unlimited repetitions of one pattern: k of them take length^k steps


def check_adapter_config(file: Path, config: Mapping[str, Any]) -> None:
    """Check what peft would import, and that every pattern can be matched in bounded time.

    Raises:
        ValueError: a module to import, a pattern that is not a regular expression, or one that may take
            forever.
    """
    if config.get("megatron_config") or config.get("megatron_core", MEGATRON) not in (MEGATRON, None):
        raise ValueError(
            f"{file}: {' and '.join(IMPORTED)} make peft import a module, which may be anyone's: code named "
            "by a checkpoint is never run. Remove both keys"
        )
    for key in KEYED:
        given = {} if config.get(key) is None else config[key]
        if not isinstance(given, Mapping) or not all(_is_rank(value) for value in given.values()):
            raise ValueError(f"{file}: {key} must map patterns to numbers, not {given!r}. Save it again.")
    for key, pattern in _patterns(config):
        if problem := _problem(pattern):
            raise ValueError(
                f"{file}: {key} has the pattern {pattern!r}, which {problem}. Write module names"
            )


def _is_rank(value: Any) -> bool:
    """A finite number, or AdaLoRA's list of which ranks remain."""
    if isinstance(value, list):
        return all(isinstance(one, bool) for one in value)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in (*PATTERNS, *LISTED):
        given = config.get(key)
        listed = given if isinstance(given, list) and key in LISTED else [given]
        yield from ((key, pattern) for pattern in listed if isinstance(pattern, str))
    for key in KEYED:
        yield from ((key, str(pattern)) for pattern in config.get(key) or {})


def _problem(pattern: str) -> str | None:
    try:
        parsed = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression ({error})"
    try:
        repeats = _repeats(parsed)
    except RecursionError:
        return "is nested too deeply"
    return None if repeats <= MOST else "may take forever to match"


def _repeats(tree: Any) -> float:
    """Unlimited repetitions that one match may pass through; infinity for one within another."""
    total = 0.0
    for code, content in tree:
        if code is codes.BRANCH:
            total += max(_repeats(branch) for branch in content[1])
        elif code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            _, most, inner = content
            nested = _repeats(inner)
            if most is codes.MAXREPEAT or most > MOST:
                total += math.inf if nested or _branches(inner) else 1
            else:
                total += max(most, 1) * nested
        else:
            parts = content if isinstance(content, tuple | list) else [content]
            total += sum(_repeats(part) for part in parts if isinstance(part, parser.SubPattern))
    return total


def _branches(tree: Any) -> bool:
    """Whether it has alternatives, which a repetition may combine in exponentially many ways."""
    for code, content in tree:
        parts = content if isinstance(content, tuple | list) else [content]
        if code is codes.BRANCH or any(
            _branches(part) for part in parts if isinstance(part, parser.SubPattern)
        ):
            return True
    return False
