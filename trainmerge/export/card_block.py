"""The part of a model card that `trainmerge rebuild` reads: checksums, and coefficients if they are few.

The recipe is in the card too, for people. Both are fenced blocks.
"""

import base64
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainmerge.checkpoints.whole import COEFFICIENTS
from trainmerge.export.markdown import code_block
from trainmerge.system.json_file import parse_json
from trainmerge.system.safetensors_file import sha256

LARGEST = 256 * 1024  # bytes of a coefficients file that the card holds
WIDTH = 100  # characters of a line of base64
FORM = 1
NOTHING: Mapping[str, str] = {}
FENCE = re.compile(r"^(`{3,})(\w+)\n(.*?)^\1[ \t]*$", re.DOTALL | re.MULTILINE)
REMEDY = "Take the card as it was exported."


@dataclass(frozen=True)
class Block:
    """What a rebuild compares with, and the coefficients.

    Args:
        files: Weight file -> SHA-256.
        sources: `base` and experts -> file -> SHA-256.
        digest: The SHA-256 of the coefficients' file.
        content: Its bytes; None if it is too large for a card.
        task: The expert whose class and own head the checkpoint has; empty for the base's class.
        form: Its dtype and division into files, where they are not the base's.
        recipe: The recipe as YAML text; of a card that was read.
        adapter: What the adapters keep, of an export as such.
    """

    files: Mapping[str, str]
    sources: Mapping[str, Mapping[str, str]]
    digest: str
    content: bytes | None = None
    task: str = ""
    form: Mapping[str, str] = field(default_factory=dict)
    recipe: str = field(default="", compare=False)
    adapter: Mapping[str, Any] = field(default_factory=dict)


def make_block(
    files: Mapping[str, str],
    sources: Mapping[str, Mapping[str, str]],
    coefficients: Path,
    task: str = "",
    form: Mapping[str, str] = NOTHING,
) -> Block:
    """The block of an export whose coefficients are in a file."""
    small = coefficients.stat().st_size <= LARGEST
    content = coefficients.read_bytes() if small else None
    return Block(files, sources, sha256(coefficients), content, task, form)


def block_text(block: Block) -> str:
    """Markdown: a collapsed block with one fenced JSON object."""
    content: dict[str, Any] = {
        "trainmerge_rebuild": FORM,
        "files": dict(block.files),
        "sources": {name: dict(files) for name, files in block.sources.items()},
        "coefficients": {"file": COEFFICIENTS, "sha256": block.digest},
    }
    if block.task:
        content["task"] = block.task
    if block.form:
        content["form"] = dict(block.form)
    if block.adapter:
        content["adapter"] = dict(block.adapter)
    if block.content is not None:
        content["coefficients"]["base64"] = textwrap.wrap(base64.b64encode(block.content).decode(), WIDTH)
    text = code_block(json.dumps(content, indent=1) + "\n", "json")
    where = (
        "and the coefficients" if block.content is not None else f"; the coefficients are in {COEFFICIENTS}"
    )
    return (
        f"<details><summary>For <code>trainmerge rebuild</code>: SHA-256 of all weight files {where}"
        f"</summary>\n\n{text}\n\n</details>"
    )


def read_block(card: str, where: Path) -> Block:
    """Undo `block_text`, and find the recipe in the card.

    Raises:
        ValueError: the card lacks one of them, or is damaged.
    """
    recipe = next((text for kind, text in _fences(card) if kind == "yaml" and text.startswith("recipe:")), "")
    found = [text for kind, text in _fences(card) if kind == "json" and '"trainmerge_rebuild"' in text]
    if not recipe or not found:
        lacks = "the recipe" if not recipe else "the block with the checksums"
        raise ValueError(
            f"{where}: no card of a merge that can be rebuilt: it lacks {lacks}. Cards have both since "
            "version 0.2.0: export the run again"
        )
    content = parse_json(found[0], where, REMEDY)
    try:
        if content["trainmerge_rebuild"] != FORM:
            raise ValueError(
                f"its form is {content['trainmerge_rebuild']!r}: a later version of trainmerge made it"
            )
        own = content["coefficients"]
        lines = own.get("base64")
        raw = None if lines is None else base64.b64decode("".join(lines), validate=True)
        sources = {str(name): _texts(files) for name, files in content["sources"].items()}
        task, form = str(content.get("task", "")), _texts(content.get("form", {}))
        files, adapter = _texts(content["files"]), dict(content.get("adapter", {}))
        return Block(files, sources, str(own["sha256"]), raw, task, form, recipe, adapter)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{where}: its block for `trainmerge rebuild` is damaged ({error}). {REMEDY}"
        ) from error


def _fences(card: str) -> Iterator[tuple[str, str]]:
    """Language and content of every fenced block."""
    yield from ((found[2], found[3]) for found in FENCE.finditer(card))


def _texts(data: Any) -> dict[str, str]:
    if not all(isinstance(value, str) for value in data.values()):
        raise ValueError("a checksum is no text")
    return dict(data)
