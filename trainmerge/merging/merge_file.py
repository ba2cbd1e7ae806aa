"""Merge models as a mergekit file describes, in one pass over mapped files."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from trainmerge.checkpoints import stamps
from trainmerge.checkpoints.chat_template import check_template, write_template
from trainmerge.checkpoints.whole import export_manifest
from trainmerge.export.export import check_target, write_checkpoint
from trainmerge.export.form import DtypeName
from trainmerge.merging.document import Document
from trainmerge.merging.document_card import explain_document
from trainmerge.merging.located import located, model_and_adapter
from trainmerge.merging.merge_pipeline import merge_pipeline, merges_pipelines
from trainmerge.merging.open_merge import open_merge, sides_of
from trainmerge.merging.read_document import read_document
from trainmerge.merging.vocabulary import foreign_tokenizer
from trainmerge.system.atomic import temporary_folder
from trainmerge.system.staging import staging
from trainmerge.system.workspace import digest

TOKENIZER: Sequence[str] = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "chat_template*", "*.tiktoken",
)  # fmt: skip


def merge_file(
    file: str | Path,
    out: str | Path,
    overwrite: bool = False,
    workers: int = 1,
    faithful: bool = False,
    dtype: DtypeName | None = None,
    shard_size: str | None = None,
) -> Path:
    """Merge models as a mergekit file describes; float32 sums, rounded once.

    Args:
        file: The YAML file.
        out: The folder to create. A folder with this very merge stays as it is.
        overwrite: Replace the folder if it exists.
        workers: Weight files to write in parallel; their number changes no byte.
        faithful: mergekit 0.1.5's numbers where it differs on purpose or by mistake; see the documentation.
        dtype: Counts before the file's `out_dtype` and `dtype`.
        shard_size: The most bytes per weight file, such as `5GB`.

    Raises:
        ValueError: everything that is wrong with the file, or every mismatch between its models.
    """
    return merge_document(read_document(Path(file)), out, overwrite, workers, faithful, dtype, shard_size)


def merge_document(
    document: Document,
    out: str | Path,
    overwrite: bool = False,
    workers: int = 1,
    faithful: bool = False,
    dtype: DtypeName | None = None,
    shard_size: str | None = None,
) -> Path:
    """`merge_file` for a document in memory."""
    target, local = Path(out), located(document)
    folders = _folders(local)
    if merges_pipelines(local):
        return merge_pipeline(document, local, target, overwrite, workers, faithful, dtype, shard_size)
    identity = digest(
        repr((document, faithful, dtype, shard_size, {f: stamps(Path(f)) for f in folders})), length=64
    )
    if _made(target) == identity:
        print(f"{target} is this merge already")
        return target
    check_target(target, [Path(folder) for folder in folders])
    if document.unused:
        print(f"no effect on a merge by {document.method}: {', '.join(document.unused)}", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = f"{target.name}.scratch"
    with staging(target, overwrite) as folder, temporary_folder(target.parent, scratch) as workspace:
        merge = open_merge(local, workspace, faithful, dtype, shard_size)
        if (text := document.tokenizer.template_text) is not None:
            check_template(merge.base.path, text)
        made = write_checkpoint(merge, folder, workers)
        _take_tokenizer(local, folder)
        record = {"identity": identity, "faithful": faithful}
        explain_document(document, local, folder, target.name, made, record)
    return target


def _folders(document: Document) -> list[str]:
    named = [*document.models, *filter(None, (document.base, document.tokenizer.source))]
    return sorted({part for name in named for part in model_and_adapter(name) if Path(part).is_dir()})


def _take_tokenizer(document: Document, folder: Path) -> None:
    """Write the tokenizer of a folder that is not merged, and a template that is none of a model's."""
    if (source := foreign_tokenizer(document.tokenizer, sides_of(document))) is not None:
        for pattern in TOKENIZER:
            for path in folder.glob(pattern):
                path.unlink()
            for path in source.glob(pattern):
                shutil.copyfile(path, folder / path.name)
    if (text := document.tokenizer.template_text) is not None:
        write_template(folder, text, {})


def _made(target: Path) -> str:
    """The identity of the merge in a folder; empty if it has none."""
    return str(export_manifest(target, "Merge again with --overwrite.").get("merge", ""))
