"""A checkpoint's config.json as transformers' object, which runs none of the checkpoint's code.

Transformers downloads and runs a kernel where the configuration names one as its attention (`org/name`, and
`flash_attention_2` without flash-attn). Only torch's own implementations are accepted.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from trainmerge.system.json_file import read_json
from trainmerge.system.links import check_link
from trainmerge.system.text import reason

CHOICES = (
    "attn_implementation",
    "experts_implementation",
)  # also with underscores before and `_internal` after
OWN = {"eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm", None}  # in torch and transformers
DEPTH = re.compile(r"(layers?|depths?)$")
DEEPEST = 2_000  # layers: building more would take minutes


def read_model_config(path: Path) -> PreTrainedConfig:
    """The configuration of a checkpoint folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: damaged, rejected by transformers, or one that names a kernel from outside.
    """
    file = path / "config.json"
    check_link(path, file)
    content = read_json(file, "Download or save it again.")
    if many := [(key, value) for key, value in content.items() if DEPTH.search(key) and _over(value)]:
        raise ValueError(
            f"{file}: {many[0][0]} is {many[0][1]!r}, more than any model has. Download it again."
        )
    for key, value in _implementations(content):
        raise ValueError(
            f"{file}: {key} is {value!r}, which would run a kernel from outside torch, possibly a downloaded "
            f"one. Remove {key} from the file: then torch's own is used, with the same results up to rounding"
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many types, for a file that is a stranger's
        raise cannot_build(path, error) from error
    return config


def _over(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return any(isinstance(number, int | float) and number > DEEPEST for number in numbers)


def cannot_build(path: Path, error: Exception) -> ValueError:
    """The error for a configuration that transformers rejects."""
    return ValueError(
        f"{path / 'config.json'}: transformers {transformers.__version__} cannot build this model: "
        f"{reason(error)}. Code from checkpoints is never run."
    )


def _implementations(content: Any) -> Iterator[tuple[str, Any]]:
    """Keys at any depth that choose an implementation, with values that are not torch's own."""
    if isinstance(content, list):
        for item in content:
            yield from _implementations(item)
    if not isinstance(content, Mapping):
        return
    for key, value in content.items():
        chosen = str(key).strip("_").removesuffix("_internal") in CHOICES
        for given in value.values() if isinstance(value, Mapping) else [value]:
            if chosen and not (isinstance(given, str | None) and given in OWN):
                yield str(key), given
        if not chosen:
            yield from _implementations(value)
