"""KL(expert || merge) against float64, whole and with the tail in one cell; its memory; its claims.

Legend: `R` rows, `V` vocabulary, `m` kept probabilities.
"""

import pytest
import torch
from torch import Tensor

from trainmerge.batch import Predictions
from trainmerge.objectives import divergence as module
from trainmerge.objectives.divergence import divergence

R, V = 7, 11


def logits_and_teacher(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = (4 * torch.randn(R, V, dtype=torch.float64)).to(dtype).requires_grad_()
    return logits, (4 * torch.randn(R, V, dtype=torch.float64)).log_softmax(-1)


def kept(log_p: Tensor, m: int) -> Predictions:
    top, tokens = log_p.topk(m, dim=-1)
    tail = log_p.scatter(-1, tokens, -torch.inf).logsumexp(-1)
    return Predictions(top, tokens.int(), tail)


def reference(teacher: Predictions, logits: Tensor, temperature: float) -> Tensor:
    """With plain autograd: the tail of both is one class."""
    log_q = (logits / temperature).log_softmax(-1)
    if teacher.tokens is None:
        return (teacher.log_p.exp() * (teacher.log_p - log_q)).sum(-1)
    places = teacher.tokens.long()
    rest = log_q.exp().scatter(-1, places, 0.0).sum(-1).log()
    top = (teacher.log_p.exp() * (teacher.log_p - log_q.gather(-1, places))).sum(-1)
    return top + teacher.tail.exp() * (teacher.tail - rest)


@pytest.mark.parametrize("m", [1, 4, V])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("chunk", [1, 3 * V, 1 << 22])
def test_value_and_gradient(m: int, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    logits, log_p = logits_and_teacher()
    teacher = Predictions(log_p) if m == V else kept(log_p, m)
    weights = torch.rand(R, dtype=torch.float64)
    want = reference(teacher, logits, temperature)
    got = divergence(teacher, 1.0 * logits, temperature=temperature)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad((weights * loss).sum(), logits)[0] for loss in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_rows_that_are_not_chosen_have_no_gradient() -> None:
    logits, log_p = logits_and_teacher()
    rows = torch.tensor([5, 2])
    loss = divergence(Predictions(log_p[:2]), (1.0 * logits).view(1, R, V), rows)
    want = reference(Predictions(log_p[:2]), logits[rows], 1.0)
    torch.testing.assert_close(loss, want)
    got, expected = (torch.autograd.grad(value.sum(), logits)[0] for value in (loss, want))
    torch.testing.assert_close(got, expected)
    assert got[[0, 1, 3, 4, 6]].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [3, V])
def test_large_logits_stay_finite(dtype: torch.dtype, m: int) -> None:
    signs = torch.tensor([1.0, -1.0]).repeat(R, V)[:, :V]
    logits = (1e4 * signs).to(dtype).requires_grad_()
    log_p = (-1e4 * signs).log_softmax(-1)
    loss = divergence(Predictions(log_p) if m == V else kept(log_p, m), 1.0 * logits)
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isfinite().all()
    assert gradient.any()


def test_oneself_costs_nothing() -> None:
    logits, _ = logits_and_teacher(torch.float32)
    for teacher in (Predictions(logits.detach().log_softmax(-1)), kept(logits.detach().log_softmax(-1), 3)):
        loss = divergence(teacher, 1.0 * logits)
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-5)


@pytest.mark.parametrize("m", [1, 3, 8])
def test_what_the_tail_can_cost(m: int) -> None:
    """One cell for the tail never raises the divergence, and moves its gradient by 2 q at most."""
    logits, log_p = logits_and_teacher()
    teacher = kept(log_p, m)
    losses = [divergence(t, 1.0 * logits) for t in (Predictions(log_p), teacher)]
    assert bool((losses[1] <= losses[0] + 1e-12).all())
    whole, part = (torch.autograd.grad(loss.sum(), logits)[0] for loss in losses)
    error = (whole - part).abs().sum(-1)
    assert bool((error <= 2 * teacher.tail.exp() + 1e-12).all())
    assert error.max() > 1e-6  # the bound is about something


def test_the_gradient_takes_the_place_of_the_logits() -> None:
    logits, log_p = logits_and_teacher()
    mine = 1.0 * logits
    seen: list[int] = []
    mine.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    divergence(Predictions(log_p), mine).sum().backward()
    assert seen == [mine.data_ptr()]


def test_who_needs_the_logits_afterwards_is_told() -> None:
    logits, log_p = logits_and_teacher()
    mine = 1.0 * logits
    squared = mine.square().sum()  # its backward pass reads `mine`, and runs after the divergence's
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squared + divergence(Predictions(log_p), mine).sum()).backward()
