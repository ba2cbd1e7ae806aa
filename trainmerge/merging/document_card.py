"""The files beside a document's merge: its YAML, a model card, and the manifest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trainmerge.checkpoints.weight_files import read_folder_json
from trainmerge.export.card_metadata import hub_metadata, licence_words
from trainmerge.export.card_sources import Source, source_of
from trainmerge.export.explain import write_export_manifest
from trainmerge.export.public import public, public_name
from trainmerge.merging.document import Document
from trainmerge.merging.located import model_and_adapter
from trainmerge.system.hub import is_hub_id

CARD = "mergekit_config.yml"


def explain_document(
    given: Document,
    local: Document,
    folder: Path,
    name: str,
    made: Mapping[str, str],
    merge: Mapping[str, Any],
) -> None:
    """Write the document, a model card, and the manifest, which is last.

    Args:
        given: The document, as it was written.
        local: The same with folders for ids.
        folder: Where to write.
        name: The merge's.
        made: File -> SHA-256 of the weights.
        merge: What the manifest says of the merge: its identity, and whether it is mergekit's numbers.
    """
    text = yaml.safe_dump(public(mergekit_data(given)), sort_keys=False, width=110)
    (folder / CARD).write_text(text, encoding="utf-8")
    sources = _sources(given, local)
    head = hub_metadata(public_name(name), sources, read_folder_json(folder / "config.json"))
    how = f"by {given.method}{' with the numbers of mergekit 0.1.5' if merge['faithful'] else ''}"
    how += ", with the rows of embeddings that all share" if given.vocabulary == "shared" else ""
    models = [public_name(part) for part in given.merged]
    paragraphs = [f"A merge of {', '.join(models)} {how}.", licence_words(sources), f"```yaml\n{text}```"]
    (folder / "README.md").write_text(
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n# {public_name(name)}\n\n"
        + "\n\n".join(filter(None, paragraphs))
        + "\n",
        encoding="utf-8",
    )
    write_export_manifest(folder, made, None, {"merge": merge["identity"]})


def _sources(given: Document, local: Document) -> list[Source]:
    """The base model, and then the others and their adapters, each once."""
    names, folders = (
        [part for name in (*filter(None, [own.base]), *own.models) for part in model_and_adapter(name)]
        for own in (given, local)
    )
    return [
        source_of(_shown(name), name, Path(folder))
        for name, folder in dict(zip(names, folders, strict=True)).items()
    ]


def _shown(name: str) -> str:
    """A model's name for strangers: its id, or the last part of its path."""
    return name if is_hub_id(name) else public_name(name)


def mergekit_data(document: Document) -> dict[str, Any]:
    """A document as the plain data of mergekit's YAML."""
    models = [{"model": n, **({"parameters": dict(p)} if p else {})} for n, p in document.models.items()]
    rest = {"base_model": document.base, "dtype": document.dtype, "out_dtype": document.out_dtype}
    return {
        "merge_method": document.method,
        "models": models,
        **({"parameters": dict(document.parameters)} if document.parameters else {}),
        **{key: value for key, value in rest.items() if value is not None},
        **document.tokenizer.to_plain(),
    }
