"""A merge as the tensors of a checkpoint, in pieces, one shard at a time.

Reads, arithmetic and writes overlap: the kernel reads ahead the next tensor's pages, one thread merges, and
    another hashes and writes finished pieces. Memory is a few pieces of rows, independent of the model's
    size.

Legend: `K` experts, `C` chunks of one parameter, `*S` shape of a parameter or of some of its rows.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from trainmerge.checkpoints import Checkpoint
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.export.form import Form
from trainmerge.export.tensors import Tensors, name_in_file, side_files
from trainmerge.kernels import Difference, LowRank
from trainmerge.preprocess import Rule
from trainmerge.system.background import ahead
from trainmerge.system.safetensors_file import TensorInfo, read_ahead, write_safetensors
from trainmerge.system.safetensors_format import file_order
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.pieces import in_pieces, merge_rows

READY = 8  # pieces queued for writing
# Entries of a piece without a rule: fewer calls, and malloc still reuses its pages.
PIECE = 1 << 19


@dataclass(frozen=True)
class CheckpointMerge:
    """Base, task vectors and coefficients: computes each tensor of the merged checkpoint on request."""

    base: Checkpoint
    task_vectors: TaskVectors
    coefficients: Coefficients
    rule: Rule | None = None  # the last preprocessor's, applied inside the pass
    form: Form = field(default_factory=Form)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)  # batch norms' statistics, if not the base's

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The headers of the merged checkpoint's tensors, merged ones of modules after the model too."""
        after = {name: self.base.info(name) for names in self.after.values() for name in names}
        return self.form.headers({**self.base.tensors, **after})

    @cached_property
    def shards(self) -> Mapping[str, tuple[str, ...]]:
        """File name -> its tensors."""
        return self.form.shards(self.base)

    @cached_property
    def after(self) -> Mapping[str, tuple[str, ...]]:
        """Path -> tensors, of modules after the model with a merged tensor."""
        return side_files(self.base, self.merged)

    def in_file(self, name: str) -> str:
        """A tensor's name in its file: without its folder, if it is of a module after the model."""
        return name_in_file(self.base, name)

    def merged(self, name: str) -> bool:
        """Whether a tensor of the base's files is merged; others are bitwise the base's, or `buffers`."""
        return self.base.tied.get(name, name) in self.coefficients.layout.groups

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor of the base's files after the merge, as consecutive pieces of rows [*S] in `form`'s dtype.

        Raises:
            ValueError: a merged number is not finite.
        """
        info = self.base.info(name)
        dtype = self.form.dtype_of(info)
        if not self.merged(name):
            yield finite(name, self.buffers.get(name, self.base.read(name)).to(dtype), info.dtype)
            return
        parameter = self.base.tied.get(name, name)
        coefficients = self.coefficients.of(parameter, self.coefficients().detach())
        for part, delta in self._deltas(parameter):
            out = torch.empty_like(delta.base, dtype=dtype)
            merge_rows(out, delta, part.start or 0, coefficients, self.task_vectors.deltas[parameter].shape)
            if not bool(torch.isfinite(torch.stack(torch.aminmax(out))).all()):
                raise ValueError(
                    f"{name}: the merged tensor is not finite; check its coefficients with `trainmerge "
                    "inspect`"
                )
            yield out

    def _deltas(self, parameter: str) -> Iterator[tuple[slice, Delta]]:
        """Pieces of a parameter with the differences that are merged."""
        delta = self.task_vectors.deltas[parameter]
        if self.rule is not None:
            for part, piece, some in in_pieces(parameter, delta):
                yield part, Delta(some.base, tuple(Difference(tau) for tau in self.rule(piece, some)))
        elif any(isinstance(term, LowRank) for term in delta.terms):
            yield slice(None), delta  # other block sizes round a product of factors differently
        else:
            yield from ((part, some) for part, _, some in in_pieces(parameter, delta, PIECE))

    def read_ahead_of(self, name: str) -> None:
        """Ask the kernel to read ahead the pages that `pieces` will need."""
        read_ahead(self.base.read(name))
        if self.merged(name):
            for term in self.task_vectors.deltas[self.base.tied.get(name, name)].terms:
                for tensor in term:
                    if isinstance(tensor, Tensor):
                        read_ahead(tensor)


def finite(name: str, converted: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor that was not merged, converted from `dtype`.

    Raises:
        ValueError: a number that the new dtype cannot hold.
    """
    if converted.dtype != dtype and not bool(torch.isfinite(converted).all()):
        raise ValueError(
            f"{name}: it is not finite in {str(converted.dtype).removeprefix('torch.')}; export another dtype"
        )
    return converted


def write_shard(merge: Tensors, names: Iterable[str], path: Path) -> str:
    """Write these tensors of a merge as one safetensors file; returns its SHA-256, computed while writing.

    The bytes depend on the arguments only, so any process may write any shard at any time.
    """
    inside, headers = {merge.in_file(name): name for name in names}, merge.tensors
    infos = {key: headers[name] for key, name in inside.items()}
    specs = {key: (info.dtype, tuple(info.shape)) for key, info in infos.items()}
    hasher = hashlib.sha256()
    path.parent.mkdir(exist_ok=True, parents=True)
    ordered = {key: inside[key] for key in file_order(specs)}
    with closing(ahead(_in_order(merge, ordered), READY)) as tensors:  # its thread ends here
        write_safetensors(path, specs, tensors, {"format": "pt"}, hasher)
    return hasher.hexdigest()


@torch.no_grad()
def _in_order(merge: Tensors, names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The pieces of these tensors, name in the file -> name, under their names in the file."""
    for (key, name), after in zip(names.items(), [*list(names.values())[1:], None], strict=True):
        if after is not None:
            merge.read_ahead_of(after)
        for piece in merge.pieces(name):
            yield key, piece


def write_shards(merge: Tensors, folder: Path, files: Iterable[str], workers: int = 1) -> dict[str, str]:
    """Write these weight files of a merge into a folder, `workers` in parallel: name -> SHA-256."""
    names, shards = list(files), {**merge.shards, **merge.after}
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    try:
        with ThreadPoolExecutor(workers) as pool:
            made = pool.map(lambda file: write_shard(merge, shards[file], folder / file), names)
            return dict(zip(names, made, strict=True))
    finally:
        torch.set_num_threads(threads)
