"""A base with the tokenizer and configuration of its merge, and embeddings with the rows of its tokens."""

from dataclasses import replace
from pathlib import Path

from trainmerge.checkpoints.reader import Checkpoint
from trainmerge.checkpoints.weight_files import read_folder_json
from trainmerge.system.safetensors_file import MappedFile


def with_rows(base: Checkpoint, folder: Path, rows: MappedFile | None) -> Checkpoint:
    """A checkpoint with the configuration and tokenizer of `folder`, and the tensors of `rows`."""
    read = dict(base.sources) if rows is None else {**base.sources, rows.path: rows}
    tensors = dict(base.tensors) if rows is None else {**base.tensors, **rows.tensors}
    config = read_folder_json(folder / "config.json")
    origin = base.origin or base.path
    return replace(
        base,
        path=folder,
        config=config,
        tensors=tensors,
        sources=read,
        origin=origin,
        rows=rows.path if rows else None,
    )
