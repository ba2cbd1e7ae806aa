"""Attention whose weights changed while its function did not: a gauge shift, or protection against merging.

A head depends on W_Q^T W_K and W_O W_V only. W_Q -> A W_Q with W_K -> A^-T W_K leaves its function unchanged
and can change both factors arbitrarily; merged with other experts, such a model breaks (Model Unmerging,
arXiv 2509.01548). Fine-tuning changes product and factors to a similar degree. Fused query-key-value matrices
are not checked.

Legend: `H` heads, `d` their size, `D` hidden size.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trainmerge.checkpoints import Checkpoint
from trainmerge.inspection.findings import Finding
from trainmerge.system.text import listed
from trainmerge.task_vectors.delta import TaskVectors, dense_term
from trainmerge.task_vectors.parameter_names import block_of, kind_of

MOVED = 0.05  # relative change of the factors, below which nothing is reported
LOCKED = 0.2  # change of the product over that of the factors; fine-tuning has about 1


def attention_findings(base: Checkpoint, task_vectors: TaskVectors) -> Iterator[Finding]:
    """Experts whose attention weights changed while their products did not. Reads the attention weights."""
    heads, shared = _heads(base.config)
    pairs = list(_pairs(task_vectors))
    for k, expert in enumerate(task_vectors.experts):
        found = []
        for left, right, across in pairs:
            before = [_of(task_vectors, name, None) for name in (left, right)]
            after = [_of(task_vectors, name, k) for name in (left, right)]
            if across:  # W_O has the heads in its columns, so its transpose has them in its rows
                before[0], after[0] = before[0].T, after[0].T
            factors, product = changes(before[0], before[1], after[0], after[1], heads, shared)
            if factors > MOVED and product < LOCKED * factors:
                found.append(f"{block_of(left)} ({kind_of(left)} and {kind_of(right)})")
        if found:
            yield Finding(
                "warning",
                f"{expert}: the attention weights of {listed(found)} changed, but their products hardly did: "
                "a gauge shift, or protection against merging",
                "exclude these, or get the expert as it was trained",
            )


def changes(
    left: Tensor, right: Tensor, left_after: Tensor, right_after: Tensor, heads: int, shared: int
) -> tuple[float, float]:
    """Relative change of two factors [H d, D] and [H' d, D], and of their product per head.

    `heads` and `shared` are H and H'; H / H' heads of `left` share one of `right`. The D x D products are
    never formed: ||L^T R||^2 is <L L^T, R R^T>, of d x d matrices.
    """
    own, others = (
        [t.double().reshape(heads, -1, t.shape[-1]) for t in (left, left_after)],
        [
            t.double().reshape(shared, -1, t.shape[-1]).repeat_interleave(heads // shared, dim=0)
            for t in (right, right_after)
        ],
    )

    def inner(i: int, j: int) -> Tensor:
        return ((own[i] @ own[j].mT) * (others[i] @ others[j].mT)).sum()

    moved = (left_after - left).double().square().sum() + (right_after - right).double().square().sum()
    size = left.double().square().sum() + right.double().square().sum()
    difference = (inner(1, 1) + inner(0, 0) - 2 * inner(0, 1)).clamp(min=0)
    return float((moved / size).sqrt()), float((difference / inner(0, 0)).sqrt())


def _heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """Numbers of query and key heads; 1 where the configuration gives none."""
    own = config.get("text_config") or config
    heads = next(
        (own[key] for key in ("num_attention_heads", "n_head", "n_heads", "num_heads") if key in own), 1
    )
    shared = own.get("num_key_value_heads") or heads
    return int(heads), int(shared)


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


def _of(task_vectors: TaskVectors, name: str, expert: int | None) -> Tensor:
    """The base's weight, or the expert's own, float32."""
    delta = task_vectors.deltas[name]
    if expert is None:
        return delta.base.float()
    return delta.base.float() + dense_term(delta.terms[expert], delta.base).to(torch.float32)
