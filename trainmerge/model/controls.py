"""Controls of a merge: what it would be with random task vectors, or with its coefficients given to others.

Legend: `K` experts, `G` coefficient groups, `*S` parameter shape, `r` rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from trainmerge.kernels import Difference, LowRank, Term, Untouched
from trainmerge.model.merged_model import MergedModel
from trainmerge.task_vectors.delta import Delta, dense_term
from trainmerge.task_vectors.draws import seeded


def random_term(term: Term, base: Tensor, generator: torch.Generator) -> Term:
    """A Gaussian difference with the term's norm, and its rank if it is low-rank; no change stays none."""
    if isinstance(term, Untouched):
        return term
    if isinstance(term, LowRank):
        up, down = (torch.randn(part.shape, generator=generator) for part in (term.up, term.down))
        return LowRank(up, down, _norm(term.up, term.down) * abs(term.scale) / _norm(up, down))
    tau = dense_term(term, base)
    noise = torch.randn(base.shape, generator=generator)
    return Difference(noise * (tau.double().norm() / noise.double().norm()).to(noise.dtype))


def _norm(up: Tensor, down: Tensor) -> float:
    """|up @ down| by r x r products."""
    wide_up, wide_down = up.double(), down.double()
    return float(((wide_up.mT @ wide_up) * (wide_down @ wide_down.mT)).sum().clamp_min(0).sqrt())


@contextmanager
def random_vectors(merged: MergedModel, seed: int) -> Iterator[None]:
    """In this context every task vector of the merge is random, at its own coefficients.

    The draws depend on seed, expert and parameter only. One parameter is in memory at a time.
    """
    experts = merged.task_vectors.experts

    def drawn(name: str, delta: Delta) -> Delta:
        pairs = zip(delta.terms, experts, strict=True)
        terms = (random_term(term, delta.base, seeded(seed, expert, name)) for term, expert in pairs)
        return replace(delta, terms=tuple(terms))

    with _written(merged, drawn, merged.coefficients().detach().cpu()):
        yield


@contextmanager
def shuffled(merged: MergedModel) -> Iterator[None]:
    """In this context every expert has the coefficients of the next one."""
    values = merged.coefficients().detach().cpu()
    with _written(merged, lambda _, delta: delta, values.roll(-1, dims=0)):
        yield


@contextmanager
def _written(merged: MergedModel, change: Callable[[str, Delta], Delta], values: Tensor) -> Iterator[None]:
    """In this context the module has these task vectors at the coefficients [K, G]."""
    try:
        with torch.no_grad():
            for name in merged.coefficients.layout.groups:
                out = merged.placed.written(name)
                made = torch.empty_like(out, device="cpu")
                delta = change(name, merged.task_vectors.deltas[name])
                delta.merge(made, merged.coefficients.of(name, values))
                out.copy_(made)
        yield
    finally:
        merged.materialise()
