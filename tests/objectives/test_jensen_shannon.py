"""The generalised Jensen-Shannon divergence against its formula in float64, its ends and its gradient.

Legend: `B` examples, `T` tokens, `V` vocabulary, `R` rows, `m` recorded classes.
"""

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

import trainmerge as tm
from trainmerge.data.batch import Asks, Batch, Outputs, Predictions, Signals
from trainmerge.objectives import between_predictions

B, T, V = 2, 4, 9
MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def world(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] of the merge, and the expert's log-probabilities [R, V] at the counted positions."""
    torch.manual_seed(0)
    logits = torch.randn(B, T, V, dtype=torch.float64)
    return logits, (logits[MASK] + scale * torch.randn(4, V, dtype=torch.float64)).log_softmax(-1)


def batch_of(told: Predictions) -> Batch:
    return Batch(0, {}, MASK, torch.arange(B), Signals(told))


def by_formula(beta: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Rows [R], by torch.distributions."""
    p, q = (Categorical(logits=log) for log in (log_p, log_q))
    if beta in (0.0, 1.0):
        return kl_divergence(q, p) if beta else kl_divergence(p, q)
    m = Categorical(probs=beta * p.probs + (1 - beta) * q.probs)
    return beta * kl_divergence(p, m) + (1 - beta) * kl_divergence(q, m)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_it_is_its_formula_in_value_and_gradient(beta: float, temperature: float) -> None:
    logits, log_p = world()
    leaf, other = (logits.clone().requires_grad_() for _ in range(2))
    objective = tm.JensenShannon(beta, temperature)
    assert objective.asks == Asks(temperature)
    got = objective(Outputs(leaf), batch_of(Predictions(log_p)))
    rows = by_formula(beta, log_p, (other[MASK] / temperature).log_softmax(-1))
    want = torch.stack([rows[:3].mean(), rows[3]])
    torch.testing.assert_close(got, want)
    got.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize("beta", BETAS)
def test_its_gradient_is_its_slope(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By finite differences; rows in several parts."""
    monkeypatch.setattr(between_predictions, "ELEMENTS", 2 * V)
    logits, log_p = world()
    loss = tm.JensenShannon(beta)
    batch = batch_of(Predictions(log_p))
    assert torch.autograd.gradcheck(lambda x: loss(Outputs(x), batch), logits.requires_grad_())


def test_small_and_large_shares_tend_to_the_ends() -> None:
    logits, log_p = world()
    batch = batch_of(Predictions(log_p))

    def of(beta: float) -> Tensor:
        return tm.JensenShannon(beta)(Outputs(logits), batch)

    torch.testing.assert_close(of(1e-6) / 1e-6, of(0.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(of(1 - 1e-6) / 1e-6, of(1.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("beta", BETAS)
def test_the_rest_is_one_cell(beta: float) -> None:
    """Recorded largest classes: the divergence of the distributions with the others merged."""
    logits, log_p = world()
    top, tokens = log_p.topk(3, dim=-1)
    tail = log_p.scatter(-1, tokens, -torch.inf).logsumexp(-1)
    got = tm.JensenShannon(beta)(Outputs(logits), batch_of(Predictions(top, tokens.int(), tail)))

    def merged(log: Tensor) -> Tensor:
        rest = 1 - log.exp().gather(-1, tokens).sum(-1, keepdim=True)
        return torch.cat([log.gather(-1, tokens), rest.log()], -1)

    rows = by_formula(beta, merged(log_p), merged(logits[MASK].log_softmax(-1)))
    torch.testing.assert_close(got, torch.stack([rows[:3].mean(), rows[3]]))
    assert (got <= tm.JensenShannon(beta)(Outputs(logits), batch_of(Predictions(log_p))) + 1e-12).all()


@pytest.mark.parametrize("beta", BETAS)
def test_an_expert_has_no_divergence_from_itself(beta: float) -> None:
    logits, log_p = world(scale=0.0)
    leaf = logits.clone().requires_grad_()
    loss = tm.JensenShannon(beta)(Outputs(leaf), batch_of(Predictions(log_p)))
    torch.testing.assert_close(loss, torch.zeros(B, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_impossible_classes_of_both_leave_it_finite() -> None:
    logits, log_p = world()
    leaf = logits.clone().requires_grad_()
    absent = torch.zeros(V, dtype=torch.bool)
    absent[2] = True
    told = log_p.masked_fill(absent, -torch.inf).log_softmax(-1)
    for beta in BETAS:
        loss = tm.JensenShannon(beta)(
            Outputs(leaf.masked_fill(absent, -torch.inf)), batch_of(Predictions(told))
        )
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
