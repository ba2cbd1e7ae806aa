"""A merge as it was published: the parts of an export's folder, or of its model card alone."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainmerge.checkpoints.whole import COEFFICIENTS, MANIFEST, RECIPE, check_whole
from trainmerge.coefficients.coefficients import Coefficients, load_coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.export.adapter_form import AdapterForm
from trainmerge.export.card_block import Block, read_block
from trainmerge.export.form import Form
from trainmerge.run.config import read_config
from trainmerge.run.recipe import Recipe
from trainmerge.system.json_file import read_bytes, read_json
from trainmerge.system.safetensors_file import sha256

AGAIN = "Export the run again."


@dataclass(frozen=True)
class Published:
    """A merge as it was published.

    Args:
        recipe: Base and experts by ids, or by the names of their folders, and the preprocessing.
        coefficients: All of them.
        files: Weight file -> SHA-256.
        sources: `base` and experts -> file -> SHA-256.
        card: The text of the model card.
        recipe_text: The recipe as it was written.
        run: The run's manifest, of an export's folder.
        task: The expert whose class and own head the checkpoint has; empty for the base's class.
        form: Its dtype and files.
        adapter: What its adapters keep; None for a checkpoint.
    """

    recipe: Recipe
    coefficients: Coefficients
    files: Mapping[str, str]
    sources: Mapping[str, Mapping[str, str]]
    card: str
    recipe_text: str
    run: Mapping[str, Any] | None = None
    task: str = ""
    form: Form = field(default_factory=Form)
    adapter: AdapterForm | None = None


def read_published(source: Path, place: Path) -> Published:
    """What an export's folder or a card says; files of a card are unpacked into `place`.

    Raises:
        FileNotFoundError: no such file, or the coefficients of a large merge are not beside its card.
        ValueError: neither a card of a merge nor an export, or damaged.
    """
    if not source.is_dir():
        card = read_bytes(source, "Name an export's folder or its README.md.").decode("utf-8", "replace")
        return _of_card(source, card, read_block(card, source), place)
    check_whole(source)
    manifest, file = read_json(source / MANIFEST, AGAIN), source / COEFFICIENTS
    listed_files, run = manifest.get("files"), manifest.get("run")
    if not isinstance(listed_files, dict) or not isinstance(manifest.get("bytes"), dict):
        raise ValueError(f"{source / MANIFEST}: no lists of files and bytes. {AGAIN}")
    if manifest.get("mixture"):
        raise ValueError(
            f"{source}: a mixture made of the experts, whose routers read calibration texts, which a card "
            "does not hold. Export it from its run folder"
        )
    if sha256(file) != listed_files.get(COEFFICIENTS):
        raise ValueError(f"{file}: not the coefficients that were exported. {AGAIN}")
    text = (source / RECIPE).read_text(encoding="utf-8")
    files = {name: str(listed_files.get(name)) for name in manifest["bytes"]}
    known = run.get("checksums", {}) if isinstance(run, dict) else {}
    card = (source / "README.md").read_text(encoding="utf-8")
    return Published(
        _recipe(source / RECIPE),
        load_coefficients(file),
        files,
        known,
        card,
        text,
        run,
        str(manifest.get("task", "")),
        Form.read(manifest.get("form"), source / MANIFEST),
        _adapter(manifest.get("adapter"), source / MANIFEST),
    )


def _of_card(source: Path, card: str, block: Block, place: Path) -> Published:
    """The parts of a card."""
    (place / RECIPE).write_text(block.recipe, encoding="utf-8")
    file = place / COEFFICIENTS if block.content is not None else source.parent / COEFFICIENTS
    if block.content is not None:
        file.write_bytes(block.content)
    elif not file.is_file():
        raise FileNotFoundError(
            f"{source}: its coefficients are too large for a card. Put the export's {COEFFICIENTS} (SHA-256 "
            f"{block.digest[:16]}...) next to it"
        )
    if hashlib.sha256(file.read_bytes()).hexdigest() != block.digest:
        raise ValueError(
            f"{source}: its coefficients have another SHA-256 than the card says: one is damaged"
        )
    coefficients = load_coefficients(file)
    return Published(
        _recipe(place / RECIPE),
        coefficients,
        block.files,
        block.sources,
        card,
        block.recipe,
        None,
        block.task,
        Form.read(block.form, source),
        _adapter(block.adapter, source),
    )


def _adapter(record: Any, where: Path) -> AdapterForm | None:
    return AdapterForm.read(record, where) if record else None


def _recipe(file: Path) -> Recipe:
    """The recipe without its grouping, which the coefficients' layout replaces; its classes are checked."""
    return replace(read_config(Recipe, "recipe", file), grouping=Grouping(), held_out={})
