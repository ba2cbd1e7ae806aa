"""Attention whose weights changed while its function did not: a gauge shift, or protection against merging.

A head depends on W_Q^T W_K and W_O W_V only. W_Q -> A W_Q with W_K -> A^-T W_K leaves its function unchanged
and can change both factors arbitrarily; merged with other experts, such a model breaks (Model Unmerging,
arXiv 2509.01548). Fine-tuning changes product and factors to a similar degree. Fused query-key-value matrices
are not checked.

Legend: `H` heads, `d` their size, `D` hidden size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trainmerge.align import FAMILIES, changes, is_locked
from trainmerge.checkpoints import Checkpoint
from trainmerge.inspection.findings import Finding
from trainmerge.system.text import listed
from trainmerge.task_vectors.delta import TaskVectors, dense_term
from trainmerge.task_vectors.parameter_names import attention_heads, block_of, kind_of

UNLOCK = "recipe.align: [trainmerge.Gauge] undoes it"
EXCLUDE = "exclude these, or get the expert as it was trained"


class _Pair(NamedTuple):
    """Two factors of attention and their numbers of heads."""

    left: str
    right: str
    across: bool  # W_O has the heads in its columns, so its transpose has them in its rows
    heads: int
    shared: int

    def __str__(self) -> str:
        return f"{block_of(self.left)} ({kind_of(self.left)} and {kind_of(self.right)})"

    def fits(self, task_vectors: TaskVectors) -> bool:
        """Whether the rows of both are whole heads of one size."""
        left = task_vectors.deltas[self.left].shape[int(self.across)]
        right = task_vectors.deltas[self.right].shape[0]
        whole = self.heads % self.shared == left % self.heads == right % self.shared == 0
        return whole and left // self.heads == right // self.shared


def attention_findings(base: Checkpoint, task_vectors: TaskVectors) -> Iterator[Finding]:
    """Experts whose attention weights changed while their products did not. Reads the attention weights."""
    pairs = [_Pair(*pair, *attention_heads(base.config, pair[0])) for pair in _pairs(task_vectors)]
    if unknown := [str(pair) for pair in pairs if not pair.fits(task_vectors)]:
        yield Finding(
            "note",
            f"the attention of {listed(unknown)} was not checked: its shapes are not those of the numbers of "
            "heads in config.json",
        )
    for k, expert in enumerate(task_vectors.experts):
        moved = [str(p) for p in pairs if p.fits(task_vectors) and _only_factors(task_vectors, p, k)]
        if moved:
            yield Finding(
                "warning",
                f"{expert}: the attention weights of {listed(moved)} changed, but their products hardly did: "
                "a gauge shift, or protection against merging",
                f"{UNLOCK}; or exclude these" if base.config.get("model_type") in FAMILIES else EXCLUDE,
            )


def _only_factors(task_vectors: TaskVectors, pair: _Pair, expert: int) -> bool:
    """Whether an expert changed the factors, but hardly their product."""
    before = [weight_of(task_vectors, name, None) for name in (pair.left, pair.right)]
    after = [weight_of(task_vectors, name, expert) for name in (pair.left, pair.right)]
    if pair.across:
        before[0], after[0] = before[0].T, after[0].T
    factors, product = changes(before[0], before[1], after[0], after[1], pair.heads, pair.shared)
    return is_locked(factors, product)


def _pairs(task_vectors: TaskVectors) -> Iterator[tuple[str, str, bool]]:
    """Query and key, output and value, of every block that has one of each."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, delta in task_vectors.deltas.items():
        if len(delta.shape) == 2 and kind_of(name) in ("query", "key", "value", "attention out"):
            found.setdefault((_module(name), kind_of(name)), []).append(name)
    for left, right, across in (("query", "key", False), ("attention out", "value", True)):
        for (module, kind), names in found.items():
            others = found.get((module, right), [])
            if kind == left and len(names) == len(others) == 1:
                yield names[0], others[0], across


def _module(name: str) -> str:
    """The block, marked if it is cross-attention: a decoder's block has both kinds."""
    cross = any(part in name.lower() for part in ("cross", "encdec", "encoder_attn"))
    return f"{block_of(name)}{' cross' if cross else ''}"


def weight_of(task_vectors: TaskVectors, name: str, expert: int | None) -> Tensor:
    """The base's weight, or the expert's own, float32."""
    delta = task_vectors.deltas[name]
    if expert is None:
        return delta.base.float()
    return delta.base.float() + dense_term(delta.terms[expert], delta.base).to(torch.float32)
