"""A codec for every parameter such that all of them fit into a number of bytes, and the error is small.

Every codec is tried on every parameter: its bytes, and its squared errors of the tasks, each divided by the
squared norm of the task's whole difference, so that tasks count alike. Of each parameter's offers the lower
convex hull is kept, and steps along the hulls are taken in the order of error saved per byte (Shoham and
Gersho, 1988). That is optimal for the sizes that it reaches, and within one step of it for others.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from trainmerge.kernels import LowRank as LowRankTerm
from trainmerge.kernels import Untouched
from trainmerge.packed.codec import Codec, EncodedParameter, errors
from trainmerge.packed.low_rank import LowRankCodec
from trainmerge.packed.parameter import Parameter


class Offer(NamedTuple):
    """What a codec makes of one parameter; without a codec, all tasks have the base's values."""

    codec: Codec | None
    nbytes: int
    error: float  # summed over the tasks


def offers(parameter: Parameter, codecs: Sequence[Codec], norms: Tensor) -> Iterator[Offer]:
    """Every codec's offer, after that of none.

    Args:
        parameter: The parameter.
        codecs: What may be chosen.
        norms: The squared norm of each task's whole difference, [K].
    """
    yield Offer(None, 4 * parameter.tasks, float((parameter.squares() / norms).sum()))
    for codec in codecs:
        made = _useful(parameter, codec)
        if made is not None:
            yield Offer(codec, made.nbytes, float((errors(parameter, made) / norms).sum()))


def _useful(parameter: Parameter, codec: Codec) -> EncodedParameter | None:
    """The parts; None of factors that are not smaller, or no better than those of half their rank."""
    if isinstance(codec, LowRankCodec) and codec.rank:
        shape = parameter.shape
        if len(parameter.whole.shape) < 2 or sum(shape) * codec.rank >= shape.numel():
            return None
        if codec.rank // 2 >= _rank(parameter):
            return None
    return codec.encode(parameter)


def _rank(parameter: Parameter) -> int:
    """The largest rank that a task's difference can have."""
    full = min(parameter.shape)
    terms = (term for term in parameter.whole.terms if not isinstance(term, Untouched))
    return max((len(t.down) if isinstance(t, LowRankTerm) else full for t in terms), default=0)


def hull(found: Sequence[Offer]) -> list[Offer]:
    """The offers on the lower convex hull of error over bytes, smallest first."""
    kept: list[Offer] = []
    for offer in sorted(found, key=lambda offer: (offer.nbytes, offer.error)):
        if kept and offer.error >= kept[-1].error:
            continue
        while len(kept) > 1 and _saved(kept[-2], kept[-1]) <= _saved(kept[-2], offer):
            kept.pop()
        kept.append(offer)
    return kept


def _saved(before: Offer, after: Offer) -> float:
    """Error saved per byte."""
    return (before.error - after.error) / max(1, after.nbytes - before.nbytes)


def choose_offers(found: Mapping[str, Sequence[Offer]], budget: int) -> dict[str, Offer]:
    """Parameter -> its offer.

    Raises:
        ValueError: nothing at all is larger than the budget.
    """
    hulls = {name: hull(own) for name, own in found.items()}
    chosen = {name: own[0] for name, own in hulls.items()}
    left = budget - sum(offer.nbytes for offer in chosen.values())
    if left < 0:
        raise ValueError(
            f"packed.budget: {budget} bytes beside the base are too few; scales and heads of their own alone "
            f"take {budget - left}"
        )
    steps = [
        (_saved(before, after), name, after, after.nbytes - before.nbytes)
        for name, own in hulls.items()
        for before, after in pairwise(own)
    ]
    full: set[str] = set()
    for _, name, after, size in sorted(steps, key=lambda step: -step[0]):
        if name in full or size > left:
            full.add(name)
            continue
        chosen[name] = after
        left -= size
    return chosen
