"""What an adapter of a merge keeps, and what became of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, Literal

from trainmerge.export.form import DtypeName
from trainmerge.system.ranges import check_fields
from trainmerge.system.text import listed
from trainmerge.task_vectors.factors import Budget

Rest = Literal["patch", "leave"]
KIND = "as"  # key of the record: `adapter` or `adapters`
LARGE = 0.05  # relative error from which the worst modules are named


@dataclass(frozen=True)
class AdapterForm:
    """How a change is written as a LoRA.

    Args:
        rank: The most singular values per module.
        energy: The share of each module's squared norm to keep, instead of a rank. With neither, all experts
            must be adapters, and their factors are kept as they are.
        rest: What becomes of changes that no LoRA holds: `patch` writes them to a file of differences,
            `leave` leaves them out; by default they are an error.
        embeddings: Factor dense changes of embeddings too; otherwise they are part of the rest. Those of
            LoRA experts are always factored.
        dtype: The factors' dtype, float32 by default.
        each: One adapter per expert, on the merged model, instead of one of the merge on the base.
    """

    rank: int | None = None
    energy: float | None = None
    rest: Rest | None = None
    embeddings: bool = False
    dtype: DtypeName | None = None
    each: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "adapter", rank="[1, inf)", energy="(0, 1]")
        self.budget  # noqa: B018 - checks that they agree

    @property
    def budget(self) -> Budget:
        """Rank or energy."""
        return Budget(self.rank, self.energy)

    def to_json(self) -> dict[str, Any]:
        """The kind, and the choices that are not the default; `read` reads them back."""
        kept = {key: value for key, value in asdict(self).items() if value not in (None, False)}
        return {KIND: "adapters" if kept.pop("each", False) else "adapter"} | kept

    @classmethod
    def read(cls, content: Any, where: Path) -> "AdapterForm":
        """Undo `to_json`.

        Raises:
            ValueError: another content.
        """
        try:
            kept = dict(content)
            each = {"adapter": False, "adapters": True}[kept.pop(KIND)]
            return cls(**kept, each=each)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{where}: its `adapter` is damaged ({error}). Export the run again.") from error


@dataclass(frozen=True)
class Written:
    """One module of an adapter: its rank, its error relative to the module's change, and how it was made."""

    rank: int
    error: float
    how: str


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter holds, and what it lacks.

    Args:
        modules: Module -> what was written.
        error: Relative error of the whole change, including what was left out.
        rest: Tensors that no LoRA holds.
        rest_share: Their share of the change's squared norm.
        patched: Whether they are in a file of differences.
        place: The folder in an export with one adapter per expert.
    """

    modules: Mapping[str, Written]
    error: float
    rest: Sequence[str] = ()
    rest_share: float = 0.0
    patched: bool = False
    place: str = field(default="")

    @property
    def rank(self) -> int:
        """The largest of all modules."""
        return max(one.rank for one in self.modules.values())

    @property
    def summary(self) -> str:
        """One line with rank, error and rest."""
        ranks = sorted({one.rank for one in self.modules.values()})
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        hows = ", ".join(dict.fromkeys(one.how for one in self.modules.values()))
        line = f"{len(self.modules)} modules of rank {span} ({hows}), relative error {self.error:.3g}"
        if self.rest:
            where = "in the patch" if self.patched else "left out"
            line += f"; {len(self.rest)} tensors, {self.rest_share:.2%} of the squared norm, are {where}"
        return line

    @property
    def worst(self) -> str:
        """The modules with the largest errors, where they are large; empty otherwise."""
        far = [name for name, one in self.modules.items() if one.error > LARGE]
        order = sorted(far, key=lambda name: -self.modules[name].error)
        return listed([f"{name} ({self.modules[name].error:.1%})" for name in order], 4)

    def to_json(self) -> dict[str, Any]:
        """The report for a manifest."""
        return {
            "modules": {name: asdict(one) for name, one in self.modules.items()},
            "error": self.error,
            "rest": list(self.rest),
            "rest_share": self.rest_share,
        }


def adapter_record(form: AdapterForm, reports: Sequence[AdapterReport]) -> dict[str, Any]:
    """What a manifest says of adapters: what they keep, and for each folder what it lacks."""
    return {"adapter": form.to_json(), "adapters": {one.place or ".": one.to_json() for one in reports}}


def relative_error(lost: float, square: float) -> float:
    """The norm of what is lost, relative to the whole's, from their squares; 0 of nothing."""
    return sqrt(lost / square) if square > 0 else 0.0
