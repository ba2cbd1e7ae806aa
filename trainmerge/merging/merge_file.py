"""Merge models as a mergekit file describes, in one pass over mapped files."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainmerge.checkpoints import stamps
from trainmerge.checkpoints.chat_template import check_template, write_template
from trainmerge.checkpoints.whole import export_manifest
from trainmerge.export.explain import write_export_manifest
from trainmerge.export.export import check_target, write_checkpoint
from trainmerge.export.form import DtypeName
from trainmerge.export.public import public, public_name
from trainmerge.merging.document import Document
from trainmerge.merging.open_merge import open_merge, sides_of
from trainmerge.merging.read_document import read_document
from trainmerge.merging.vocabulary import outside
from trainmerge.system.staging import staging
from trainmerge.system.workspace import digest

TOKENIZER: Sequence[str] = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "chat_template*", "*.tiktoken",
)  # fmt: skip
CARD = "mergekit_config.yml"


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
    target = Path(out)
    folders = _folders(document)
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
    with staging(target, overwrite) as folder, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        merge = open_merge(document, Path(scratch), faithful, dtype, shard_size)
        if (text := document.tokenizer.template_text) is not None:
            check_template(merge.base.path, text)
        made = write_checkpoint(merge, folder, workers)
        _take_tokenizer(document, folder)
        _explain(document, folder, target.name, made, identity, faithful)
    return target


def _folders(document: Document) -> list[str]:
    named = [*document.models, *filter(None, (document.base, document.tokenizer.source))]
    parts = [part for name in named for part in ([name] if Path(name).is_dir() else name.split("+"))]
    return sorted({part for part in parts if Path(part).is_dir()})


def _take_tokenizer(document: Document, folder: Path) -> None:
    """Write the tokenizer of a folder that is not merged, and a template that is none of a model's."""
    if (source := outside(document.tokenizer, sides_of(document))) is not None:
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


def _explain(
    document: Document, folder: Path, name: str, made: Mapping[str, str], identity: str, faithful: bool
) -> None:
    """Write the document, a model card, and the manifest, which is last."""
    text = yaml.safe_dump(public(to_mergekit(document)), sort_keys=False, width=110)
    (folder / CARD).write_text(text)
    models = [public_name(part) for part in document.merged]
    card = {"library_name": "transformers", "tags": ["merge", "trainmerge"]}
    how = f"by {document.method}{' with the numbers of mergekit 0.1.5' if faithful else ''}"
    how += ", with the rows of embeddings that all share" if document.vocabulary == "shared" else ""
    (folder / "README.md").write_text(
        f"---\n{yaml.safe_dump(card, sort_keys=False)}---\n# {public_name(name)}\n\nA merge of "
        f"{', '.join(models)} {how}.\n\n```yaml\n{text}```\n"
    )
    write_export_manifest(folder, made, None, {"merge": identity})


def to_mergekit(document: Document) -> dict[str, Any]:
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
