"""Sizes of a merge's tensors in bytes, from headers and a meta model; no weight is read."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from trainmerge.task_vectors.prefetch import largest_block


@dataclass(frozen=True)
class Sizes:
    """Sizes of a merge's tensors, in bytes unless marked as a count."""

    parameters: int  # weights of the model: a count
    experts: int  # a count
    coefficients: int  # a count
    weights: int  # the resident model, buffers included
    gradient: int  # the largest learned weight's gradient; fixed ones have none
    gradients: int  # of all learned weights
    block: int  # the largest block of the network, which a sharded model gathers at a time
    vectors: int  # base and task vectors of the merged parameters, which a merge reads
    learned: int  # of the learned ones, which the coefficients' gradient reads
    ahead: int  # of `vectors`, the largest of one block, which is sent ahead of its use
    files: int  # all mapped files: base, experts, recorded expert outputs
    beforehand: int = 0  # needed by loading, or by recording an expert, in addition to the model
    read: Mapping[str, int] = field(default_factory=dict)  # `vectors` of each merged parameter
    read_twice: frozenset[str] = frozenset()  # the learned ones of them


def sizes_of(
    meta_model: nn.Module,
    stored: Mapping[str, int],
    read: Mapping[str, int],
    learned: Collection[str],
    experts: int,
    coefficients: int,
    files: int,
    beforehand: int = 0,
) -> Sizes:
    """`stored` are the bytes of every parameter, `read` the bytes that a pass reads of each merged one.

    `learned` are the merged ones whose coefficients are learned.
    """
    return Sizes(
        parameters=sum(p.numel() for p in meta_model.parameters()),
        experts=experts,
        coefficients=coefficients,
        weights=sum(stored.values()) + sum(buffer.nbytes for buffer in meta_model.buffers()),
        gradient=max((stored[name] for name in learned), default=0),
        gradients=sum(stored[name] for name in learned),
        block=largest_block(stored),
        vectors=sum(read.values()),
        learned=sum(read[name] for name in learned),
        ahead=largest_block(read),
        files=files,
        beforehand=beforehand,
        read=read,
        read_twice=frozenset(learned),
    )
