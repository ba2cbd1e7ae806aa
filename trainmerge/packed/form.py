"""How experts are packed: a codec, or a size for which codecs are chosen tensor by tensor."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from trainmerge.export.form import DtypeName
from trainmerge.packed.codec import Codec
from trainmerge.packed.low_rank import Dense, LowRankCodec
from trainmerge.packed.pca import Pca
from trainmerge.packed.ternary import Signs
from trainmerge.packed.unified import Emr, Mask, Shared
from trainmerge.system.memory import parse_size
from trainmerge.system.ranges import check_fields, check_option

NAMES = "mask, emr, lowrank, twin, ternary, pca"


@dataclass(frozen=True)
class PackedForm:
    """What a packed export keeps of each expert.

    Args:
        codec: `mask`, `emr`, `lowrank`, `twin`, `ternary` or `pca`; with a colon, its number too: the
            threshold of a mask, the rank, the shared part of Twin-Merging, the share of signs, the number of
            components.
        budget: A size: bytes with their unit (`20MB`), or a multiple of the base's size, the base included
            (`1.5`). Without a codec the best of all is chosen for every tensor; with one, it or less.
        dtype: The dtype of numbers in the file, bfloat16 by default; scales and coordinates are float32.
        router: Fit a classifier of texts to tasks by the base's hidden states of the calibration texts.
    """

    codec: str | None = None
    budget: str | None = None
    dtype: DtypeName | None = None
    router: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "packed")
        if self.codec is None and self.budget is None:
            raise ValueError(f"packed: name a codec ({NAMES}), or a budget such as 1.5 or 20MB")
        if self.codec is not None:
            self.chosen  # noqa: B018 - checks it
        if self.budget is not None:
            self.bytes(0)

    @property
    def numbers(self) -> torch.dtype:
        """The dtype of numbers in the file."""
        dtype: torch.dtype = getattr(torch, self.dtype or "bfloat16")
        return dtype

    @property
    def chosen(self) -> Codec:
        """The codec. Raises ValueError for another name, or a number that it does not take."""
        name, colon, text = (self.codec or "").partition(":")
        try:
            number = float(text) if colon else None
        except ValueError:
            raise ValueError(
                f"packed.codec: {text!r} in {self.codec!r} is no number, as in lowrank:16"
            ) from None
        return replace(_codec(name, number), dtype=self.numbers)

    def candidates(self, tasks: int) -> Sequence[Codec]:
        """The codecs that a budget chooses from, for every tensor."""
        ranks = [LowRankCodec(rank=1 << i) for i in range(9)]
        many = [Pca(components=p) for p in range(1, tasks)]
        found: dict[str, Sequence[Codec]] = {
            "": [Shared(), Signs(), Emr(), Mask(), *ranks, *many, Dense()],
            "lowrank": [*ranks, Dense()],
            "pca": [Shared(), *many, Dense()],
            "ternary": [Signs(), Dense()],
        }
        name = (self.codec or "").partition(":")[0]
        own = [self.chosen] if name else []
        return [replace(codec, dtype=self.numbers) for codec in (*own, *found.get(name, [Dense()]))]

    def bytes(self, base: int) -> int:
        """The budget in bytes beside a base of this many."""
        text = self.budget or ""
        try:
            times = float(text)
        except ValueError:
            return parse_size(text)
        check_option("packed.budget", times, float, "[1, inf)")
        return int((times - 1) * base)

    def to_json(self) -> dict[str, Any]:
        """The choices that are not the default."""
        return {key: value for key, value in asdict(self).items() if value not in (None, False)}


def _codec(name: str, number: float | None) -> Codec:
    match name:
        case "mask":
            return Mask() if number is None else Mask(threshold=number)
        case "emr" if number is None:
            return Emr()
        case "lowrank":
            return LowRankCodec(rank=_whole(number))
        case "twin":
            return LowRankCodec(shared=0.3 if number is None else number)
        case "ternary":
            return Signs(share=number)
        case "pca":
            return Pca() if number is None else Pca(components=_whole(number) or 1)
        case "emr":
            raise ValueError("packed.codec: emr takes no number")
    raise ValueError(f"packed.codec is {name!r}; it is one of {NAMES}")


def _whole(number: float | None) -> int | None:
    if number is not None and number != int(number):
        raise ValueError(f"packed.codec: {number:g} is no whole number")
    return None if number is None else int(number)
