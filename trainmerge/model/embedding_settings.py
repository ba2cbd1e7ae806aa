"""Settings of sentence-transformers that change its results, and that are not followed here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainmerge.system.json_file import read_json

PROMPTS = "config_sentence_transformers.json"
REMEDY = "Download or save it again."


def prompts_of(base: Path) -> tuple[dict[str, Any], Any]:
    """The prompts by name, and the name of the default one or None."""
    known = read_json(base / PROMPTS, REMEDY) if (base / PROMPTS).is_file() else {}
    prompts = known.get("prompts")
    return prompts if isinstance(prompts, dict) else {}, known.get("default_prompt_name")


def unfollowed_settings(base: Path) -> Iterator[str]:
    """One sentence for a default prompt, and one for similarities that are no cosines."""
    prompts, default = prompts_of(base)
    if prompt := prompts.get(default):
        yield (
            f"{base / PROMPTS}: texts are embedded as the files have them, without the default prompt "
            f"({prompt!r}): begin each text with it if it is used"
        )
    known = read_json(base / PROMPTS, REMEDY) if (base / PROMPTS).is_file() else {}
    if (measure := known.get("similarity_fn_name") or "cosine") != "cosine":
        yield (
            f"{base / PROMPTS}: similarity_fn_name is {measure!r}, and similarities are cosines here: set "
            "it to cosine, or add a module Normalize, under which both are the same"
        )
