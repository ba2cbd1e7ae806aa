"""Which parameters share a coefficient: the user's grouping, and the resulting explicit map.

Legend: `K` experts, `G` coefficient groups, `C` chunks of one parameter.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from trainmerge.system.json_file import parse_json, read_json
from trainmerge.system.ranges import check_fields
from trainmerge.system.text import listed
from trainmerge.system.workspace import digest
from trainmerge.task_vectors.parameter_names import block_of, idle_patterns, matches

Granularity = Literal["task", "block", "tensor", "chunk"]
EXPERT = re.compile(r"(?<![^.])experts\.\d+\.")  # in the name of a tensor of one expert of a mixture


@dataclass(frozen=True)
class Grouping:
    """How parameters share coefficients, as chosen by the user.

    `task`: one coefficient per expert. `block`: one for each numbered block of the network (and one
    for each module outside them). `tensor`: one per parameter, which is what the papers call
    layer-wise. `chunk`: `chunks` contiguous blocks of rows per parameter, rows of its first dimension as it
    is stored: a Conv1D's are inputs, those of a stack are whole experts. `chunks` is one number for all; or
    numbers by fnmatch pattern, of which the last match applies (1 without a match); or a file of `trainmerge
    allocate`. A parameter with 0 chunks is merged at its starting coefficient, which is not learned.

    In mixtures of experts whose files have one matrix per expert (`...experts.3.up_proj.weight`), `tensor`
    and `chunk` give the matrices of one kind in a layer one coefficient together, since few tokens reach each
    of the experts; with `mixture: expert`, one each.

    `include` and `exclude` are fnmatch patterns over parameter names; parameters that are not included, or
    excluded, keep the base's value.
    """

    granularity: Granularity = "tensor"
    chunks: int | Mapping[str, int] | str = 1
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    mixture: Literal["kind", "expert"] = field(default="kind", metadata={"added": "0.2.0"})

    def __post_init__(self) -> None:
        check_fields(self, chunks="[1, inf)" if isinstance(self.chunks, int) else "[0, inf)")
        if self.chunks != 1 and self.granularity != "chunk":
            raise ValueError(f"chunks={self.chunks} needs granularity=chunk, not {self.granularity}")

    def layout(self, shapes: Mapping[str, torch.Size], unchanged: Iterable[str] = ()) -> "Layout":
        """Assign every parameter's chunks to groups, in the order of `shapes`.

        `unchanged` are parameters that no expert changes: they are not merged, but patterns may match them.

        Raises:
            ValueError: a pattern matches no parameter, or no parameter is left to merge.
        """
        excluded = {name: reason for name in shapes if (reason := self._reason(name))}
        self._check_patterns([*shapes, *unchanged])
        if len(excluded) == len(shapes):
            raise ValueError("no parameter is left to merge: include/exclude leave out all of them")
        counts = self._counts([*shapes, *unchanged])
        labels: dict[str, int] = {}
        groups = {
            name: tuple(
                labels.setdefault(label, len(labels)) for label in self._labels(name, shape, counts[name])
            )
            for name, shape in shapes.items()
            if name not in excluded
        }
        held = {group: None for name, chunks in groups.items() if not counts[name] for group in chunks}
        self._check_held(held, groups, counts)
        fixed = tuple(held)
        if len(fixed) == len(labels):
            raise ValueError("no coefficient is left to learn: every parameter has 0 chunks")
        return Layout(tuple(labels), groups, excluded, fixed)

    def _reason(self, name: str) -> str:
        if not matches(name, self.include):
            return "matches no include pattern"
        hit = matches(name, self.exclude)
        return f"excluded by {hit!r}" if hit else ""

    def _check_patterns(self, names: Sequence[str]) -> None:
        if idle := idle_patterns((*self.include, *self.exclude), names):
            raise ValueError(
                f"patterns that match no parameter: {idle}. "
                f"Parameter names look like {names[:3]}; `trainmerge inspect` lists them all."
            )

    def _check_held(
        self, held: Iterable[int], groups: Mapping[str, tuple[int, ...]], counts: Mapping[str, int]
    ) -> None:
        """Raise ValueError if a coefficient that is not learned belongs to learned parameters too."""
        still = {*held}
        for name, chunks in groups.items():
            if counts[name] and not still.isdisjoint(chunks):
                raise ValueError(
                    f"chunks: {name} has {counts[name]}, other experts of its layer 0, and they share a "
                    "coefficient: give all the same number, or set grouping.mixture to expert"
                )

    def _counts(self, names: Sequence[str]) -> dict[str, int]:
        """The number of chunks per parameter."""
        if isinstance(self.chunks, int):
            return dict.fromkeys(names, self.chunks)
        wanted = read_chunks(Path(self.chunks)) if isinstance(self.chunks, str) else self.chunks
        if idle := idle_patterns(wanted, names):
            raise ValueError(f"chunks: patterns that match no parameter: {listed(idle)}")
        if any(count < 0 for count in wanted.values()):
            raise ValueError("chunks: numbers must not be negative")
        counts = dict.fromkeys(names, 1)
        for pattern, count in wanted.items():
            counts |= {name: count for name in names if matches(name, [pattern])}
        return counts

    def _labels(self, name: str, shape: torch.Size, chunks: int) -> list[str]:
        match self.granularity:
            case "task":
                return ["all"]
            case "block":
                return [block_of(name)]
            case "tensor":
                return [self._shared(name)]
            case "chunk":
                rows = shape[0] if shape else 1
                return [f"{self._shared(name)}[{i}]" for i in range(max(1, min(chunks, rows)))]

    def _shared(self, name: str) -> str:
        """The name that all experts of a layer have in common, or the parameter's own.

        >>> Grouping()._shared("layers.0.mlp.experts.3.up_proj.weight")
        'layers.0.mlp.experts.*.up_proj.weight'
        """
        return name if self.mixture == "expert" else EXPERT.sub("experts.*.", name)


def read_chunks(path: Path) -> dict[str, int]:
    """Chunks per parameter, from a file of `trainmerge allocate`.

    Raises:
        ValueError: the file is not such a file.
    """
    try:
        chunks = read_json(path, "See `trainmerge allocate --help`.").get("chunks")
    except FileNotFoundError as error:
        raise ValueError(error) from error
    if not isinstance(chunks, dict) or any(type(count) is not int for count in chunks.values()):
        raise ValueError(f"{path}: not an allocation of chunks (see `trainmerge allocate --help`)")
    return chunks


@dataclass(frozen=True)
class Layout:
    """The explicit map from (parameter, chunk) to coefficient group, saved with the coefficients."""

    labels: tuple[str, ...]  # G names
    groups: Mapping[str, tuple[int, ...]]  # parameter -> the group of each of its C chunks
    excluded: Mapping[str, str] = field(default_factory=dict)  # parameter -> why it keeps the base's value
    fixed: tuple[int, ...] = ()  # groups that keep the coefficient they start with

    @property
    def learned(self) -> tuple[str, ...]:
        """The parameters with a coefficient that is not fixed."""
        fixed = {*self.fixed}
        return tuple(name for name, groups in self.groups.items() if not fixed.issuperset(groups))

    def to_json(self) -> str:
        """A text that `from_json` reads back."""
        return json.dumps(asdict(self))

    def identity(self) -> str:
        """A digest that another layout does not have."""
        return digest(self.to_json(), length=64)

    @staticmethod
    def from_json(text: str) -> "Layout":
        """Undo `to_json`.

        Raises:
            ValueError: another text.
        """
        data = parse_json(text, "layout", "")
        try:
            groups = {name: tuple(chunks) for name, chunks in data["groups"].items()}
            labels, excluded, fixed = tuple(data["labels"]), data["excluded"], tuple(data.get("fixed", ()))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"layout: {error!r}") from error
        numbers = [group for chunks in groups.values() for group in chunks] + [*fixed]
        texts = [*labels, *(excluded.values() if isinstance(excluded, dict) else [None])]
        if any(type(number) is not int for number in numbers) or any(not isinstance(t, str) for t in texts):
            raise ValueError("layout: labels are texts, and groups are numbers")
        return Layout(labels, groups, excluded, fixed)
