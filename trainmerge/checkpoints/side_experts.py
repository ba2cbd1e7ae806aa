"""The weights of modules after the model: each expert's against the base's, from headers and digests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainmerge.checkpoints.reader import Checkpoint
from trainmerge.checkpoints.side_modules import digest_of, side_folder, side_weights, warn_of_side_modules
from trainmerge.checkpoints.sources import FullSource, Source
from trainmerge.task_vectors.parameter_names import matches
from trainmerge.task_vectors.roles import Role


@dataclass(frozen=True)
class SidePlan:
    """One expert's weights after the model that differ from the base's, and why others do not fit."""

    sources: Mapping[str, Source] = field(default_factory=dict)  # the base's name -> the expert's tensor
    problems: Sequence[str] = ()


def plan_side(base: Checkpoint, path: Path, ignore: Sequence[str], allow_pickle: bool) -> SidePlan:
    """Match an expert's modules with the base's, one by one in order; folders may have other names.

    Modules whose files are equal have no sources. Warns of what differs and is not merged.
    """
    ours, theirs = dict(base.side), side_weights(path, allow_pickle)
    places = list(dict.fromkeys(side_folder(name) for name in ours))
    own = list(dict.fromkeys(side_folder(name) for name in theirs))
    if len(places) != len(own):
        warn_of_side_modules(base.path, path, set())
        return SidePlan()
    sources: dict[str, Source] = {}
    problems, seen = [], {Path(place) for place in (*places, *own)}
    renamed = dict(zip(places, own, strict=True))
    for name, tensor in ours.items():
        other = f"{renamed[side_folder(name)]}.{tensor.name}"
        if matches(name, ignore):
            continue
        if other not in theirs:
            problems.append(f"{path} lacks {other}, which the base has; exclude it with ignore=['{name}']")
        elif theirs[other].info.shape != tensor.info.shape:
            shapes = tuple(theirs[other].info.shape), tuple(tensor.info.shape)
            problems.append(
                f"{path}: {other} is {shapes[0]}, the base's {name} is {shapes[1]}; exclude it with "
                f"ignore=['{name}']"
            )
        elif digest_of(theirs[other].info.file) != digest_of(tensor.info.file):
            sources[name] = FullSource(str(theirs[other].info.file), theirs[other].name)
    back = {renamed[place]: place for place in places}
    extra = [n for n, t in theirs.items() if f"{back[side_folder(n)]}.{t.name}" not in ours]
    problems += [f"{path} has {name}, which the base lacks; save it without" for name in extra]
    warn_of_side_modules(base.path, path, seen)
    return SidePlan(sources, problems)


def side_roles(base: Checkpoint) -> dict[str, Role]:
    """The roles of the base's weights after the model."""
    return {name: "linear" if len(tensor.info.shape) == 2 else "vector" for name, tensor in base.side.items()}
