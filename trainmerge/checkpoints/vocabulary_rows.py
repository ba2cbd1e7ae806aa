"""Base and experts on one vocabulary: their embeddings and heads with the rows of the merge's tokens.

Everything downstream sees the base with these rows and experts that fit it. The rows are written to the
workspace once, a block at a time, and mapped.

Legend: `R` rows of the merge's vocabulary, `*S` the shape of one row.
"""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from trainmerge.checkpoints.choice import BASE
from trainmerge.checkpoints.chosen_base import with_rows
from trainmerge.checkpoints.meta_model import architecture_of, quiet, shorten
from trainmerge.checkpoints.parameters import Parameters
from trainmerge.checkpoints.reader import Checkpoint
from trainmerge.checkpoints.sources import FullSource, LowRankSource, OpenedFiles, Source, Sources
from trainmerge.checkpoints.token_rows import GivenRow, Matched, Read, keys_of, rows_in
from trainmerge.checkpoints.tokenizer_choice import Chosen
from trainmerge.checkpoints.vocabulary import tokenizer_files
from trainmerge.system.disk_space import check_free_space
from trainmerge.system.safetensors_file import write_safetensors
from trainmerge.system.workspace import cached, digest

PROBE = 64  # rows more, to see which tensors have one per token


def on_one_vocabulary(
    frame: Parameters, sources: Sources, chosen: Chosen, folder: Path, workspace: Path
) -> tuple[Checkpoint, Sources]:
    """The base, and the places of the task vectors, on the merge's vocabulary.

    Args:
        frame: The base's parameters.
        sources: The places of the experts' tensors, with all their rows.
        chosen: The merge's vocabulary.
        folder: The merge's tokenizer and configuration.
        workspace: The folder for the rows.

    Raises:
        ValueError: an expert with other rows than the base and without a tokenizer; a model with tensors per
            token that are not matrices of rows.
    """
    if not chosen.choice.moves_rows:
        return with_rows(frame.checkpoint, folder, None), sources
    names = _per_token(frame)
    matched = {name: _matched(frame, sources, chosen, name) for name in names}
    identity = _made_from(frame, sources, folder, names)
    moved = {name: own for name, own in matched.items() if own.moves(BASE)}
    path = workspace / f"rows-{digest(identity + BASE)}.safetensors"
    rows = cached(path, lambda path: _write(path, BASE, moved)) if moved else None
    experts = {}
    for expert, places in sources.experts.items():
        changed = {
            n: own
            for n, own in matched.items()
            if n in sources.parameters and (n in moved or own.moves(expert))
        }
        kept = {name: place for name, place in places.items() if name not in changed}
        file = workspace / f"rows-{digest(identity + expert)}.safetensors"
        if changed:
            made = cached(file, lambda path, e=expert, c=changed: _write(path, e, _differing(e, c)))  # type: ignore[misc]
            kept |= {name: FullSource(str(file), name) for name in made.tensors}
        experts[expert] = kept
    base = with_rows(replace(frame.checkpoint, known_ties=sources.tied), folder, rows)
    return base, replace(sources, experts=experts)


def _per_token(frame: Parameters) -> list[str]:
    """The base's tensors with a row per token, tied ones too: those that grow with `vocab_size`.

    Raises:
        ValueError: such a tensor that is a buffer or has another form; or further vocabularies.
    """
    config = deepcopy(frame.meta_model.config)
    text, path = config.get_text_config(), frame.checkpoint.path
    more = [key for key in text.to_dict() if key.startswith("vocab_size_")]
    if more:
        raise ValueError(
            f"{path}: its rows of {shorten(more)} cannot be matched by token: leave out `tokenizer`"
        )
    text.vocab_size += PROBE
    if config is not text and getattr(config, "vocab_size", None) is not None:
        config.vocab_size = text.vocab_size
    with quiet(), torch.device("meta"):
        larger = architecture_of(config)(config)
    before, after = _shapes(frame.meta_model), _shapes(larger)
    grown = {name for name, shape in before.items() if after[name] != shape}
    buffers = {name for name, _ in frame.meta_model.named_buffers()} & grown
    odd = [n for n in grown if before[n][1:] != after[n][1:] or after[n][0] != before[n][0] + PROBE]
    if wrong := sorted({*buffers, *odd}):
        raise ValueError(f"{path}: {shorten(wrong)} cannot be matched by token: leave out `tokenizer`")
    return [name for name, parameter in frame.names.items() if parameter in grown]


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tuple(tensor.shape) for name, tensor in named}


def _matched(frame: Parameters, sources: Sources, chosen: Chosen, name: str) -> Matched:
    """One tensor's rows in base and experts; tied tensors have one set of sources."""
    own, files = frame.checkpoint.read(name), OpenedFiles()
    place = sources.tied.get(name, name)
    reads: dict[str, Read] = {BASE: lambda rows: own[rows]}
    counts, dtypes = {BASE: len(own)}, {BASE: own.dtype}
    for expert, places in sources.experts.items():
        reads[expert], counts[expert], dtype = _rows_of(places.get(place), own, files)
        dtypes[expert] = torch.promote_types(dtype, own.dtype)
    for expert, count in counts.items():
        if count != len(own) and not tokenizer_files(chosen.folders[expert]):
            raise ValueError(
                f"{chosen.folders[expert]}: {count} rows of {name}, where the base has {len(own)}, and no "
                "tokenizer that names their tokens: copy the tokenizer's files there"
            )
    wanted = keys_of(chosen.tokens, chosen.rows)
    rows = {
        side: rows_in(wanted, keys_of(chosen.vocabularies[side].tokens, count))
        for side, count in counts.items()
    }
    given = _given(chosen, name, counts)
    return Matched(reads, rows, (chosen.rows, *own.shape[1:]), dtypes, given, chosen.choice.equal)


def _given(chosen: Chosen, name: str, counts: Mapping[str, int]) -> dict[int, GivenRow]:
    """The rows of the choice's tokens in one tensor."""
    found = {}
    for token, row in chosen.choice.tokens:
        own = 0
        if row.source is not None:
            keys = keys_of(chosen.vocabularies[row.source].tokens, counts[row.source])
            own = row.token if isinstance(row.token, int) else keys.get(row.token or token, -1)
            if not 0 <= own < counts[row.source]:
                raise ValueError(
                    f"{chosen.folders[row.source]}: {name} has {counts[row.source]} rows, and none for the "
                    f"row of the token {token!r}"
                )
        found[chosen.ids[token]] = GivenRow(row.source, own, row.force)
    return found


def _rows_of(source: Source | None, base: Tensor, files: OpenedFiles) -> tuple[Read, int, torch.dtype]:
    """An expert's rows: how to read them, how many there are, and their dtype."""
    match source:
        case None:
            return (lambda rows: base[rows]), len(base), base.dtype
        case FullSource(file, tensor):
            weight = files.read(file, tensor)
            return (lambda rows: weight[rows]), len(weight), weight.dtype
        case LowRankSource(file, up_name, down_name, transposed, scale):
            up, down = files.read(file, up_name), files.read(file, down_name)
            left, right = (up.T, down.T) if transposed else (up, down)

            if len(left) != len(base):
                raise ValueError(
                    f"{file}: {up_name} is a low-rank update of {len(left)} rows, the base has {len(base)}: "
                    "merge the adapter into its model with peft, and name the result as the expert"
                )

            def read(rows: Tensor) -> Tensor:
                return base[rows].double() + scale * left[rows].double() @ right.double()

            return read, len(base), torch.float32


def _differing(expert: str, matched: Mapping[str, Matched]) -> dict[str, Matched]:
    return {name: own for name, own in matched.items() if own.differs(expert)}


def _write(path: Path, side: str, matched: Mapping[str, Matched]) -> None:
    specs = {name: (own.dtypes[side], own.shape) for name, own in matched.items()}
    check_free_space(path.parent, sum(torch.Size(s).numel() * dtype.itemsize for dtype, s in specs.values()))
    write_safetensors(
        path, specs, ((name, piece) for name, own in matched.items() for piece in own.pieces(side))
    )


def _made_from(frame: Parameters, sources: Sources, folder: Path, names: Sequence[str]) -> str:
    """What the rows depend on: the merge's vocabulary, and the files that have rows, by size and time."""
    used = [places.get(sources.tied.get(name, name)) for places in sources.experts.values() for name in names]
    files = {*map(str, frame.checkpoint.files), *(place.file for place in used if place is not None)}
    stats = {file: Path(file).stat() for file in sorted(files)}
    times = [(str(Path(f).resolve()), stat.st_size, stat.st_mtime_ns) for f, stat in stats.items()]
    return json.dumps([folder.name, times, [repr(place) for place in used], [*names]])
