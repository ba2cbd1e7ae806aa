"""KL(expert || merge) per row, without a second copy of the logits.

Full distributions, or an expert's `m` largest probabilities and one cell for the rest. Merging the rest into
one cell never increases the divergence, and changes its gradient by at most 2 q in the 1-norm, where q is the
expert's mass outside the `m`: s_v - p_v becomes s_v - q s_v / q_s there, and both p / q and s / q_s sum to
one.

Legend: `R` rows, `V` classes or vocabulary, `m` recorded ones.
"""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from trainmerge.data.batch import Predictions

CHUNK_ELEMENTS = 1 << 18  # logits at a time: 1 MiB in float32 fits a core's cache, a third faster
LAUNCHED = 64  # times as many where each call is a kernel launch


def divergence(
    teacher: Predictions, logits: Tensor, rows: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || softmax(logits / temperature)) of these rows of `logits` [..., V] -> [R].

    `rows` are positions in the flattened leading dimensions; None is all of them. Computed in float32 or
    wider, some rows at a time. The backward pass overwrites `logits` with the gradient; autograd raises if
    their values are needed elsewhere.
    """
    flat = logits.flatten(0, -2)
    chosen = torch.arange(len(flat), device=flat.device) if rows is None else rows
    return _Divergence.apply(  # type: ignore[no-any-return,no-untyped-call]
        logits, chosen, teacher.log_p, teacher.tokens, teacher.tail, temperature
    )


class _Divergence(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        logits: Tensor,
        rows: Tensor,
        log_p: Tensor,
        tokens: Tensor | None,
        tail: Tensor | None,
        temperature: float,
    ) -> Tensor:
        ctx.save_for_backward(logits, rows, log_p, tokens, tail)
        ctx.temperature = temperature
        flat = logits.flatten(0, -2)
        losses = [
            _losses(_log_softmax(flat[rows[part]], temperature), _part(log_p, tokens, tail, part))
            for part in _parts(len(rows), logits)
        ]
        return torch.cat(losses) if losses else logits.new_zeros(0, dtype=_wide(logits))

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, rows, log_p, tokens, tail = ctx.saved_tensors
        # Same memory and version counter: a later use of the values raises. Strided tensors are copied.
        own = logits.detach().contiguous()
        flat = own.view(-1, own.shape[-1])
        kept = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        kept[rows] = True
        for part in _parts(len(rows), logits):
            here = rows[part]
            log_q = _log_softmax(flat[here], ctx.temperature)
            slope = _slopes(log_q, _part(log_p, tokens, tail, part))
            slope.mul_((gradients[0][part] / ctx.temperature)[:, None])
            flat[here] = slope.to(flat.dtype)
        flat[~kept] = 0
        return own, None, None, None, None, None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits.to(_wide(logits)) / temperature).log_softmax(dim=-1)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _losses(log_q: Tensor, teacher: Predictions) -> Tensor:
    """KL of every row. `log_q` [R, V] is overwritten."""
    if teacher.tokens is None:
        return _cells(teacher.log_p, log_q).sum(dim=-1)
    assert teacher.tail is not None
    places = teacher.tokens.long()
    top = _cells(teacher.log_p, log_q.gather(-1, places)).sum(dim=-1)
    rest = log_q.scatter_(-1, places, -torch.inf).logsumexp(dim=-1)
    return top + _cells(teacher.tail, rest)


def _cells(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), 0 where p is 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0)


def _slopes(log_q: Tensor, teacher: Predictions) -> Tensor:
    """d KL / d (logits / temperature), [R, V]; `log_q` is overwritten."""
    if teacher.tokens is None:
        return log_q.exp_().sub_(teacher.log_p.exp())
    assert teacher.tail is not None
    places = teacher.tokens.long()
    top = log_q.gather(-1, places).exp_().sub_(teacher.log_p.exp())
    largest = log_q.scatter_(-1, places, -torch.inf).amax(dim=-1, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, 0.0)
    # s_v / q_s (q_s - q): no factor exceeds 1, where s_v and q_s may underflow and q / q_s overflow
    inside = log_q.sub_(largest).exp_()
    total = inside.sum(dim=-1, keepdim=True)
    mass = largest.exp() * total - teacher.tail.exp()[:, None]
    slope = inside.mul_(mass / total.clamp_min(torch.finfo(total.dtype).tiny))
    return slope.scatter_(-1, places, top)


def _part(log_p: Tensor, tokens: Tensor | None, tail: Tensor | None, part: slice) -> Predictions:
    return Predictions(
        log_p[part], None if tokens is None else tokens[part], None if tail is None else tail[part]
    )


def _parts(rows: int, logits: Tensor) -> list[slice]:
    elements = CHUNK_ELEMENTS * (1 if logits.device.type == "cpu" else LAUNCHED)
    size = max(1, elements // logits.shape[-1])
    return [slice(first, first + size) for first in range(0, rows, size)]
