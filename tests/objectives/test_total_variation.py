"""Total variation against its definition: the largest difference of two probabilities of one event.

Legend: `B` examples, `T` tokens, `V` vocabulary, `R` rows.
"""

from itertools import chain, combinations

import torch
from torch import Tensor

import trainmerge as tm
from trainmerge.data.batch import Asks, Batch, Outputs, Predictions, Signals

B, T, V = 2, 4, 6
MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])
EVENTS = [*chain.from_iterable(combinations(range(V), n) for n in range(V + 1))]


def world(scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] of the merge, and the expert's log-probabilities [R, V] at the counted positions."""
    torch.manual_seed(0)
    logits = torch.randn(B, T, V, dtype=torch.float64)
    return logits, (logits[MASK] + scale * torch.randn(4, V, dtype=torch.float64)).log_softmax(-1)


def loss(logits: Tensor, told: Predictions) -> Tensor:
    batch = Batch(0, {}, MASK, torch.arange(B), Signals(told))
    return tm.TotalVariation()(Outputs(logits), batch)


def test_it_is_the_largest_difference_over_all_events() -> None:
    logits, log_p = world()
    p, q = log_p.exp(), logits[MASK].softmax(-1)
    events = torch.stack([(p - q)[:, [*event]].sum(-1) for event in EVENTS])  # [2^V, R]
    rows = events.max(dim=0).values
    torch.testing.assert_close(loss(logits, Predictions(log_p)), torch.stack([rows[:3].mean(), rows[3]]))
    assert tm.TotalVariation().asks == Asks(1.0)


def test_its_gradient_is_its_slope() -> None:
    logits, log_p = world()
    assert torch.autograd.gradcheck(lambda x: loss(x, Predictions(log_p)), logits.requires_grad_())


def test_an_expert_has_none_to_itself_and_nothing_has_more_than_1() -> None:
    logits, log_p = world(scale=0.0)
    torch.testing.assert_close(loss(logits, Predictions(log_p)), torch.zeros(B, dtype=torch.float64))
    sure = 100 * torch.nn.functional.one_hot(log_p.argmin(-1), V).double()  # of what is least probable
    wrong = torch.zeros_like(logits).masked_scatter(MASK[..., None], sure)
    assert (loss(wrong, Predictions(log_p)) <= 1).all()
    assert (loss(wrong, Predictions(log_p)) > 0.9).all()


def test_the_rest_is_one_cell_and_bounds_it_from_below() -> None:
    logits, log_p = world()
    top, tokens = log_p.topk(3, dim=-1)
    tail = log_p.scatter(-1, tokens, -torch.inf).logsumexp(-1)
    got = loss(logits, Predictions(top, tokens.int(), tail))
    q = logits[MASK].softmax(-1)
    rest = (tail.exp() - (1 - q.gather(-1, tokens).sum(-1))).abs()
    rows = ((top.exp() - q.gather(-1, tokens)).abs().sum(-1) + rest) / 2
    torch.testing.assert_close(got, torch.stack([rows[:3].mean(), rows[3]]))
    assert (got <= loss(logits, Predictions(log_p)) + 1e-12).all()


def test_classes_that_both_exclude_leave_it_finite() -> None:
    logits, log_p = world()
    absent = torch.zeros(V, dtype=torch.bool)
    absent[2] = True
    told = log_p.masked_fill(absent, -torch.inf).log_softmax(-1)
    leaf = logits.requires_grad_()
    found = loss(leaf.masked_fill(absent, -torch.inf), Predictions(told))
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    assert found.isfinite().all()
    assert gradient.isfinite().all()
