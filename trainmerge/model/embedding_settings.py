"""Settings of sentence-transformers that change its results, and that are not followed here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainmerge.system.json_file import read_json

PROMPTS = "config_sentence_transformers.json"
REMEDY = "Download or save it again."


def prompts_of(base: Path) -> dict[str, Any]:
    """The prompts by name."""
    prompts = _settings(base).get("prompts")
    return prompts if isinstance(prompts, dict) else {}


def unfollowed_settings(base: Path) -> Iterator[str]:
    """One sentence for a default prompt, and one for similarities that are no cosines."""
    known = _settings(base)
    default: Any = known.get("default_prompt_name")
    if prompt := prompts_of(base).get(default):
        yield (
            f"{base / PROMPTS}: texts are embedded as the files have them, without the default prompt "
            f"({prompt!r}): begin each text with it if it is used"
        )
    if (measure := known.get("similarity_fn_name") or "cosine") != "cosine":
        yield (
            f"{base / PROMPTS}: similarity_fn_name is {measure!r}, and similarities are cosines here: set "
            "it to cosine, or add a module Normalize, under which both are the same"
        )


def _settings(base: Path) -> dict[str, Any]:
    return read_json(base / PROMPTS, REMEDY) if (base / PROMPTS).is_file() else {}
