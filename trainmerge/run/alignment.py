"""Experts lined up with their base before task vectors are taken: their weights, once, in the workspace."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainmerge.align import Align, Aligned, Pair, ResidualStream, align, anatomy, stream_map, touches_of
from trainmerge.checkpoints import Checkpoint, Sources, open_checkpoint, stamps
from trainmerge.checkpoints.sources import FullSource, OpenedFiles, Source, match_rows
from trainmerge.checkpoints.weight_files import ADAPTER
from trainmerge.data.generate import Generate
from trainmerge.system.disk_space import check_free_space
from trainmerge.system.safetensors_file import write_safetensors
from trainmerge.system.workspace import cached, digest, metadata_of

RECORD = "alignment"  # the key of the file's header


@dataclass(frozen=True)
class Aligner:
    """How experts are lined up with a base.

    Args:
        base: The base.
        methods: What is applied.
        ignore: Patterns of tensors that are not merged.
        allow_pickle: Whether `.bin` files are read.
        workspace: The folder of the aligned weights.
    """

    base: Checkpoint
    methods: Sequence[Align]
    ignore: Sequence[str]
    allow_pickle: bool
    workspace: Path | None

    def __call__(
        self,
        sources: Sources,
        folders: Mapping[str, Path],
        calibration: Mapping[str, str | Generate | None],
    ) -> Sources:
        """The sources with every full expert's tensors in line with the base; adapters are as they were.

        Prints a line per expert.

        Raises:
            ValueError: a family, a tensor or an expert's head for which no such change is known; every expert
                is an adapter; no workspace; or an aligned expert with other outputs.
        """
        full = [name for name in sources.experts if not (folders[name] / ADAPTER).is_file()]
        if not full:
            raise ValueError(
                "recipe.align: every expert is an adapter, which is an update of the base itself and is "
                "never aligned: leave align out"
            )
        if self.workspace is None:
            raise ValueError("recipe.align: set a workspace folder for the aligned experts")
        side = [name for name in self.base.side if any(isinstance(m, ResidualStream) for m in self.methods)]
        if side:
            raise ValueError(
                f"{self.base.path}: {side[0]}, of a module after the model, reads the residual stream: leave "
                "ResidualStream out of recipe.align"
            )
        experts = {**sources.experts}
        for name in full:
            own = {key: place for key, place in experts[name].items() if key not in self.base.side}
            pair = self._pair(own)
            made = self._file(name, folders[name], own)
            file = cached(made, partial(self._make, name, folders[name], pair, own, calibration.get(name)))
            print(f"{name}: {alignment_sentence(metadata_of(file, RECORD))}", flush=True)
            places: dict[str, Source] = {key: FullSource(str(made), key) for key in file.tensors}
            experts[name] = {**experts[name], **places}
        return replace(sources, experts=experts)

    def _pair(self, places: Mapping[str, Source]) -> Pair:
        files = OpenedFiles()

        def read(name: str) -> Tensor:
            place = places[name]
            assert isinstance(place, FullSource)  # not an adapter
            return match_rows(files.read(place.file, place.tensor), self.base.read(name))

        return Pair(anatomy(self.base.config, list(places)), self.base.read, read)

    def _file(self, name: str, folder: Path, places: Mapping[str, Source]) -> Path:
        """The file of an aligned expert, by all that it depends on."""
        assert self.workspace is not None
        content = [repr(self.methods), str(self.base.path), stamps(self.base.origin or self.base.path)]
        content += [name, stamps(folder), {key: repr(place) for key, place in places.items()}]
        return self.workspace / f"aligned-{digest(json.dumps(content), length=24)}.safetensors"

    def _make(
        self,
        name: str,
        folder: Path,
        pair: Pair,
        places: Mapping[str, Source],
        calibration: str | Generate | None,
        path: Path,
    ) -> None:
        try:
            found = align(pair, self.methods)
            record = {**found._asdict(), "checked": "", "change": 0.0}
            record.pop("pair")
            if not found.is_identity:
                self._check_leftover(folder, found, places)
                from trainmerge.run.same_function import same_function  # needs transformers

                checked = same_function(self.base, found.pair, self.ignore, calibration)
                if not checked.change <= checked.limit:
                    raise ValueError(
                        f"its outputs on {checked.inputs} change by {checked.change:.1e} when it is aligned, "
                        f"more than {checked.limit:g}: this model has a part that recipe.align does not "
                        "know; leave align out"
                    )
                record |= {"checked": checked.inputs, "change": checked.change}
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        _write(path, found.pair, {RECORD: json.dumps(record)})

    def _check_leftover(self, folder: Path, found: Aligned, places: Mapping[str, Source]) -> None:
        """Raise ValueError if a tensor of the expert that is not merged reads a stream in another order."""
        if stream_map(found.pair) is None:
            return
        own = open_checkpoint(folder, self.allow_pickle)
        touches, _ = touches_of(found.pair.anatomy.family, own.tensors)
        used = {place.tensor for place in places.values() if isinstance(place, FullSource)}
        for name, info in own.tensors.items():
            if name in used or name in own.tied or not info.dtype.is_floating_point:
                continue
            if touches.get(name, True):  # it reads the stream, or is not known
                raise ValueError(
                    f"its {name} is not merged and reads the residual stream, whose units move: leave "
                    "ResidualStream out of recipe.align"
                )


def _write(path: Path, pair: Pair, metadata: Mapping[str, str]) -> None:
    """Write the tensors that changed, one at a time; under a matrix in float32, rounded at the export."""
    specs = {}
    for name in pair.changed:
        tensor, touches = pair.expert(name), pair.anatomy.touches[name]
        gauged = any(t.space in pair.maps and pair.maps[t.space].matrices is not None for t in touches)
        dtype = torch.promote_types(tensor.dtype, torch.float32) if gauged else tensor.dtype
        specs[name] = (dtype, tensor.shape)
    check_free_space(path.parent, sum(shape.numel() * dtype.itemsize for dtype, shape in specs.values()))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, (dtype, _) in specs.items():
            yield name, pair.aligned(name).to(dtype)

    write_safetensors(path, specs, tensors(), metadata)


def alignment_sentence(record: Mapping[str, Any]) -> str:
    """What was done to an expert, by its file's record."""
    if not record["moved"] and not record["gauges"]:
        return "in line with the base already: nothing was moved"
    done = [f"{count} {kind} moved" for kind, count in record["moved"].items()]
    done += [f"{record['gauges']} pairs of factors unlocked"] if record["gauges"] else []
    return (
        f"{', '.join(done)}; its distance from the base is {record['after']:.4g}, it was "
        f"{record['before']:.4g}; its outputs on {record['checked']} change by {record['change']:.1e}"
    )
