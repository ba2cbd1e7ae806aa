"""A recipe's files, checked and mapped."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from trainmerge.align import Align
from trainmerge.checkpoints import Checkpoint, Sources, Stamp, as_recorded, fingerprint, verify
from trainmerge.coefficients.layout import Layout
from trainmerge.system import distributed
from trainmerge.system.atomic import write_whole
from trainmerge.system.workspace import digest
from trainmerge.task_vectors.delta import TaskVectors

if TYPE_CHECKING:
    from trainmerge.checkpoints import OwnHead


@dataclass(frozen=True)
class Opened:
    """A recipe's files, checked and mapped."""

    base: Checkpoint
    task_vectors: TaskVectors  # before preprocessing
    layout: Layout
    folders: Mapping[str, Path]  # "base" and every expert
    ignore: Sequence[str]
    sources: Sources  # the places of the task vectors in files
    stamps: Mapping[str, Mapping[str, Stamp]]  # of the files, before they were read
    known_checksums: Mapping[str, Mapping[str, str]] | None = None
    align: Sequence[Align] = ()  # what lined the experts up with the base
    allow_pickle: bool = False  # whether `.bin` files are read

    @cached_property
    def checksums(self) -> dict[str, dict[str, str]]:
        """SHA-256 of every weight file of base and experts; reads each file once, unless already known."""
        if self.known_checksums is not None:
            return {name: dict(files) for name, files in self.known_checksums.items()}
        return {name: fingerprint(folder) for name, folder in self.folders.items()}

    @cached_property
    def own_heads(self) -> "dict[str, OwnHead]":
        """The heads of experts whose files have one that is not merged; imports transformers."""
        from trainmerge.checkpoints import find_own_heads  # imports transformers, which `reopen` avoids

        experts = {name: folder for name, folder in self.folders.items() if name in self.sources.experts}
        return find_own_heads(self.base, experts, self.sources, self.ignore, self.allow_pickle)

    @cached_property
    def own_statistics(self) -> list[dict[str, Tensor]]:
        """Each expert's statistics of batch norms, K, by the base's tensors, of those that any changed."""
        return self.sources.own_statistics(self.base)

    def verify(self, recorded: Mapping[str, Mapping[str, str]] | None = None) -> None:
        """Compute the checksums and raise ValueError for every NaN and infinity, in one reading.

        `recorded` are those of the run that is resumed; where they agree, they are used as they are.
        """
        found = verify(self.base, self.task_vectors, self.folders)
        vars(self)["checksums"] = as_recorded(found, recorded or {})  # sets the cached property

    def share_checksums(self) -> None:
        """Use process 0's checksums, so that only one process reads every file."""
        if distributed.world_size() > 1:
            first = self.checksums if distributed.rank() == 0 else {}
            vars(self)["checksums"] = distributed.broadcast(first)  # sets the cached property

    def save(self, path: Path) -> None:
        """Write the file that `Recipe.reopen` reads."""
        content: dict[str, object] = {"stamps": self.stamps, "sources": self.sources.to_json()}
        if self.base.origin is not None:
            content |= {"vocabulary": str(self.base.path), "rows": self.base.rows and str(self.base.rows)}
        write_whole(path, json.dumps(content))

    def identity(self) -> str:
        """One digest of base and experts, by their contents and order."""
        vocabulary = [] if self.base.origin is None else [self.base.path.name]
        lined_up = [repr(list(self.align))] if self.align else []
        own = ["own statistics"] if any(self.sources.statistics.values()) else []
        parts = [self.checksums, list(self.ignore), *vocabulary, *lined_up, *own]
        return digest(json.dumps(parts), length=64)
