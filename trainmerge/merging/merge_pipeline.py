"""Write a merge of diffusers pipelines: a folder of diffusers, or one LoRA of several."""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from trainmerge.checkpoints.pipeline import is_pipeline
from trainmerge.checkpoints.whole import export_manifest
from trainmerge.export.card_metadata import hub_metadata, licence_words
from trainmerge.export.card_sources import Source, source_of
from trainmerge.export.explain import write_export_manifest
from trainmerge.export.export import check_target
from trainmerge.export.form import DtypeName, write_dtype
from trainmerge.export.public import public, public_name
from trainmerge.export.shards import write_shards
from trainmerge.export.side_files import copy_side_files
from trainmerge.merging.document import Document
from trainmerge.merging.document_card import CARD, mergekit_data
from trainmerge.merging.open_merge import reference_of
from trainmerge.merging.pipelines import PipelineMerge, open_pipelines
from trainmerge.system.disk_space import check_free_space
from trainmerge.system.staging import staging
from trainmerge.system.workspace import digest


def merges_pipelines(document: Document) -> bool:
    """Whether a document's reference is a folder of diffusers."""
    path = Path(reference_of(document))
    return path.is_dir() and is_pipeline(path)


def merge_pipeline(
    given: Document,
    local: Document,
    out: Path,
    overwrite: bool,
    workers: int,
    faithful: bool,
    dtype: DtypeName | None,
    shard_size: str | None,
) -> Path:
    """Merge pipelines as a document says; arguments as in `merge_document`, `local` with folders for ids.

    Raises:
        ValueError: as `open_pipelines`, or a setting that is only for transformers' folders.
    """
    paths = [Path(reference_of(local)), *map(Path, local.models)]
    identity = _identity(paths, (given, faithful, dtype, shard_size))
    if export_manifest(out, "Merge again with --overwrite.").get("merge") == identity:
        print(f"{out} is this merge already")
        return out
    check_target(out, [path for path in paths if path.is_dir()])
    if local.tokenizer.to_plain() or local.vocabulary != "same":
        raise ValueError(
            "tokenizer, vocabulary and chat_template are not for folders of diffusers: leave them out"
        )
    merge = open_pipelines(local, faithful, dtype, shard_size)
    if not merge.groups:
        raise ValueError(f"no expert of {merge.base.path} changed a weight: are they copies of the base?")
    with staging(out, overwrite) as folder:
        made = _write(merge, folder, workers)
        merge.base.check_unchanged()
        _explain(given, [*dict.fromkeys(paths)], folder, out.name)
        write_export_manifest(folder, made, None, {"merge": identity})
    return out


def _identity(paths: Sequence[Path], settings: object) -> str:
    """Changes with every setting and file of a merge."""
    files = {file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))}
    stats = {str(file): file.stat() for file in sorted(files) if file.is_file()}
    marks = {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
    return digest(repr((settings, marks)), length=64)


def _write(merge: PipelineMerge, folder: Path, workers: int) -> dict[str, str]:
    """Write weights and side files; returns file -> SHA-256 of the weights."""
    check_free_space(folder, sum(merge.form.size_of(info) for info in merge.base.tensors.values()))
    made = write_shards(merge, folder, merge.shards, workers)
    if not merge.base.single:
        copy_side_files(merge.base.path, folder)  # leaves out folders with weights
    for part in merge.base.components.values():
        place = folder / part.name
        copy_side_files(part.path, place)
        files = merge.files_of(part)
        if len(files) > 1:
            size = sum((place / file).stat().st_size for file in files)
            homes = {name: file for file, names in files.items() for name in names}
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(homes.items()))}
            (place / f"{part.stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))
        if merge.form.dtype and "_class_name" not in part.config:
            write_dtype(place / "config.json", merge.form.dtype)
    return made


def _explain(given: Document, paths: Sequence[Path], folder: Path, name: str) -> None:
    """Write the document and a model card."""
    text = yaml.safe_dump(public(mergekit_data(given)), sort_keys=False, width=110)
    (folder / CARD).write_text(text, encoding="utf-8")
    sources: list[Source] = [
        source_of(public_name(str(path)), str(path), path) for path in paths if path.is_dir()
    ]
    head = hub_metadata(public_name(name), sources, {}) | {"library_name": "diffusers"}
    models = [public_name(model) for model in given.merged]
    paragraphs = [
        f"A merge of {', '.join(models)} by {given.method}.", licence_words(sources), f"```yaml\n{text}```"
    ]  # fmt: skip
    (folder / "README.md").write_text(
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n# {public_name(name)}\n\n"
        + "\n\n".join(filter(None, paragraphs))
        + "\n",
        encoding="utf-8",
    )
