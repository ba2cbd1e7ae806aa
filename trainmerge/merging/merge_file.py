"""Merge models as a mergekit file describes, in one pass over mapped files."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from trainmerge.checkpoints import Checkpoint, find_sources, open_checkpoint, stamps
from trainmerge.checkpoints.whole import MANIFEST
from trainmerge.export.export import check_target, write_checkpoint
from trainmerge.export.form import DtypeName, Form
from trainmerge.export.public import public, public_name
from trainmerge.export.shards import finite
from trainmerge.kernels import ExpertWeight, Untouched
from trainmerge.merging.document import Document, read_document
from trainmerge.merging.group import OWN, Alternatives, Group
from trainmerge.merging.values import places
from trainmerge.run.manifest import versions
from trainmerge.system.json_file import read_json
from trainmerge.system.safetensors_file import read_ahead
from trainmerge.system.staging import staging
from trainmerge.system.workspace import digest
from trainmerge.task_vectors.delta import Delta, TaskVectors

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
        made = write_checkpoint(merge, folder, workers)
        _take_tokenizer(document, folder)
        _explain(document, folder, target.name, made, identity, faithful)
    return target


@dataclass(frozen=True)
class DocumentMerge:
    """The tensors of a document's merge."""

    base: Checkpoint
    form: Form
    document: Document
    groups: Mapping[str, Group]
    faithful: bool

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor of the base's files after the merge, as consecutive pieces of rows [*S].

        Raises:
            ValueError: a merged number is not finite.
        """
        info = self.base.tensors[name]
        dtype = self.form.dtype_of(info)
        group = self.groups.get(self.base.tied.get(name, name))
        if group is None:
            yield finite(name, self.base.read(name).to(dtype), info.dtype)
            return
        rule = self.document.definition.rule(group, self.faithful)
        for piece in group.pieces():
            out = rule(piece).to(dtype)
            if not bool(torch.isfinite(out).all()):
                raise ValueError(f"{name}: the merged tensor is not finite; check the weights, or the models")
            yield out if info.shape else out.view(info.shape)

    def read_ahead_of(self, name: str) -> None:
        """Ask the kernel to read ahead the pages that `pieces` will need."""
        read_ahead(self.base.read(name))
        group = self.groups.get(self.base.tied.get(name, name))
        for term in group.delta.terms if group else ():
            if isinstance(term, ExpertWeight):
                read_ahead(term.weight)


def open_merge(
    document: Document, scratch: Path, faithful: bool, dtype: DtypeName | None, shard_size: str | None
) -> DocumentMerge:
    """Check all headers and map the files; no weight is read, except those of unusual adapters."""
    merged = document.merged
    reference = _reference(document)
    base = open_checkpoint(reference)
    others = [name for name in merged if not _same(name, reference)]
    sources = find_sources(
        base, {name: _expert_folder(name, reference) for name in others}, workspace=scratch
    )
    vectors = sources.open(base)
    order = tuple(others.index(name) if name in others else OWN for name in merged)
    located = places(list(sources.parameters))
    shared, each = _settings(document)
    groups = {
        name: Group(
            _delta(vectors, base, name, len(others)), order, tuple(merged), document.based, located[name],
            shared, each,
        )
        for name in sources.parameters
    }  # fmt: skip
    chosen = dtype or document.out_dtype or document.dtype or _promoted(base, vectors)
    return DocumentMerge(base, Form(chosen, shard_size), document, groups, faithful)  # type: ignore[arg-type]


def _settings(document: Document) -> tuple[dict[str, object], dict[str, tuple[object, ...]]]:
    """The settings of all models, and of each, with the values that count after them."""
    method, given = document.definition, document.parameters

    def values(key: str, default: object, *own: Mapping[str, Any]) -> Alternatives:
        found = [parameters[key] for parameters in (*own, given) if key in parameters]
        return Alternatives((*found, *([] if default is None else [default])))

    shared: dict[str, object] = {key: values(key, default) for key, default in method.shared.items()}
    each: dict[str, tuple[object, ...]] = {
        key: tuple(values(key, default, document.models.get(name, {})) for name in document.merged)
        for key, default in method.each.items()
    }
    return shared, each


def _delta(vectors: TaskVectors, base: Checkpoint, name: str, count: int) -> Delta:
    """A parameter's differences; one that no model changed has them too."""
    found = vectors.deltas.get(name)
    delta = found or Delta(base.read(name), tuple(Untouched() for _ in range(count)))
    return delta if delta.base.dim() else _as_vector(delta)


def _as_vector(delta: Delta) -> Delta:
    terms = tuple(
        ExpertWeight(term.weight.view(1)) if isinstance(term, ExpertWeight) else term for term in delta.terms
    )
    return Delta(delta.base.view(1), terms, delta.role)


def _promoted(base: Checkpoint, vectors: TaskVectors) -> str | None:
    """The dtype that holds all models' numbers; None if it is the base's."""
    own = {info.dtype for info in base.tensors.values() if info.dtype.is_floating_point}
    every = set(own)
    for delta in vectors.deltas.values():
        every |= {term.weight.dtype for term in delta.terms if isinstance(term, ExpertWeight)}
    if every == own:
        return None
    first, *rest = sorted(every, key=str)
    for dtype in rest:
        first = torch.promote_types(first, dtype)
    return str(first).removeprefix("torch.")


def _reference(document: Document) -> str:
    """The checkpoint whose names, configuration and files the result has: the base model, or the first."""
    return (document.base or document.merged[0]).partition("+")[0]


def _expert_folder(name: str, reference: str) -> str:
    """The folder of a model; that of its adapter, of a model `MODEL+ADAPTER` on the reference checkpoint."""
    model, plus, adapter = name.partition("+")
    if not plus or Path(name).is_dir():
        return name
    if not _same(model, reference):
        raise ValueError(
            f"{name}: an adapter of another model than {reference}; merge it into its model first"
        )
    return adapter


def _same(first: str, second: str) -> bool:
    return Path(first).resolve() == Path(second).resolve()


def _folders(document: Document) -> list[str]:
    named = [*document.models, *filter(None, (document.base, document.tokenizer))]
    parts = [part for name in named for part in ([name] if Path(name).is_dir() else name.split("+"))]
    return sorted({part for part in parts if Path(part).is_dir()})


def _take_tokenizer(document: Document, folder: Path) -> None:
    """Replace the reference's tokenizer by that of `tokenizer_source`."""
    if document.tokenizer is None or _same(document.tokenizer, _reference(document)):
        return
    source = Path(document.tokenizer)
    files = [path for pattern in TOKENIZER for path in source.glob(pattern) if path.is_file()]
    if not files:
        raise ValueError(f"tokenizer_source: {source} has no tokenizer files")
    for pattern in TOKENIZER:
        for path in folder.glob(pattern):
            path.unlink()
    for path in files:
        shutil.copyfile(path, folder / path.name)


def _made(target: Path) -> str:
    """The identity of the merge in a folder; empty if it has none."""
    file = target / MANIFEST
    content = read_json(file, "Merge again with --overwrite.") if file.is_file() else {}
    return str(content.get("merge", ""))


def _explain(
    document: Document, folder: Path, name: str, made: Mapping[str, str], identity: str, faithful: bool
) -> None:
    """Write the document, a model card, and the manifest, which is last."""
    text = yaml.safe_dump(public(to_mergekit(document)), sort_keys=False, width=110)
    (folder / CARD).write_text(text)
    models = [public_name(part) for part in document.merged]
    card = {"library_name": "transformers", "tags": ["merge", "trainmerge"]}
    how = f"by {document.method}{' with the numbers of mergekit 0.1.5' if faithful else ''}"
    (folder / "README.md").write_text(
        f"---\n{yaml.safe_dump(card, sort_keys=False)}---\n# {public_name(name)}\n\nA merge of "
        f"{', '.join(models)} {how}.\n\n```yaml\n{text}```\n"
    )
    manifest = {
        "versions": versions(),
        "merge": identity,
        "files": dict(sorted(made.items())),
        "bytes": {file: (folder / file).stat().st_size for file in sorted(made)},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))


def to_mergekit(document: Document) -> dict[str, Any]:
    """A document as the plain data of mergekit's YAML."""
    models = [{"model": n, **({"parameters": dict(p)} if p else {})} for n, p in document.models.items()]
    rest = {"base_model": document.base, "dtype": document.dtype, "out_dtype": document.out_dtype}
    rest["tokenizer_source"] = document.tokenizer
    return {
        "merge_method": document.method,
        "models": models,
        **({"parameters": dict(document.parameters)} if document.parameters else {}),
        **{key: value for key, value in rest.items() if value is not None},
    }
