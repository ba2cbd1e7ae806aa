"""Checks of an adapter_config.json before peft sees it: what would run code, or a pattern without an end.

peft matches the patterns of a configuration against every module's name. Python's matcher cannot be
interrupted.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainmerge.checkpoints.pattern_time import pattern_problem

PATTERNS = ("target_modules", "exclude_modules")  # a pattern, or a list of names
LISTED = ("layers_pattern", "modules_to_save")  # a pattern, or a list of them
NUMBERS = ("r", "lora_alpha", "alpha")
KEYED = ("rank_pattern", "alpha_pattern")  # pattern -> number
IMPORTED = ("megatron_config", "megatron_core")  # peft imports the module that the latter names
MEGATRON = "megatron.core"  # peft's default


def check_adapter_config(file: Path, config: Mapping[str, Any]) -> None:
    """Check what peft would import, and that every pattern can be matched in bounded time.

    Raises:
        ValueError: a module to import, replicated layers, a rank or scale that is no number, a pattern that
            is not a regular expression, or one that may take forever.
    """
    if config.get("megatron_config") or config.get("megatron_core", MEGATRON) not in (MEGATRON, None):
        raise ValueError(
            f"{file}: {' and '.join(IMPORTED)} make peft import a module, which may be anyone's: code named "
            "by a checkpoint is never run. Remove both keys"
        )
    if config.get("layer_replication"):
        raise ValueError(
            f"{file}: layer_replication makes a deeper model out of the base's layers, which a merge with "
            "the base cannot hold. Merge it with peft into a model of its own, with a base of its depth"
        )
    for key in NUMBERS:
        if not _is_number(given := config.get(key, 1)):
            raise ValueError(f"{file}: {key} must be a number, not {given!r}. Save the adapter again.")
    for key in KEYED:
        given = {} if config.get(key) is None else config[key]
        if not isinstance(given, Mapping) or not all(_is_rank(value) for value in given.values()):
            raise ValueError(f"{file}: {key} must map patterns to numbers, not {given!r}. Save it again.")
    for key, pattern in _patterns(config):
        if problem := pattern_problem(pattern):
            raise ValueError(
                f"{file}: {key} has the pattern {pattern!r}, which {problem}. Write module names"
            )


def _is_rank(value: Any) -> bool:
    """A finite number, or AdaLoRA's list of which ranks remain."""
    if isinstance(value, list):
        return all(isinstance(one, bool) for one in value)
    return _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in (*PATTERNS, *LISTED):
        given = config.get(key)
        listed = given if isinstance(given, list) and key in LISTED else [given]
        yield from ((key, pattern) for pattern in listed if isinstance(pattern, str))
    for key in KEYED:
        yield from ((key, str(pattern)) for pattern in config.get(key) or {})
