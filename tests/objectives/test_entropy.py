"""Entropy against torch.distributions, and diversity against the marginal's entropy.

Legend: `B` examples, `T` tokens, `V` classes or vocabulary.
"""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from tests.bounds import assert_within, log_softmax_bound
from tests.contracts import assert_objective_contract
from trainmerge.data.batch import Batch, Outputs, Predictions, Signals
from trainmerge.objectives import Entropy
from trainmerge.objectives.divergence import divergence
from trainmerge.objectives.entropy import entropy, marginal_cross_entropy

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def said(log_p):
    return Signals(Predictions(log_p))


def batch_of(mask):
    return Batch(0, {}, mask, torch.arange(len(mask)))


ONES = batch_of(torch.ones(6, 4, dtype=torch.bool))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("objective", "shape"),
    [
        (Entropy(), (3, 5)),
        (Entropy(), (3, 6, 11)),
        (Entropy(diversity=1.0), (3, 5)),
        (Entropy(diversity=0.3), (3, 5)),
    ],
    ids=repr,
)
def test_contract(objective, shape, dtype):
    assert_objective_contract(objective, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 30.0])
def test_classification_is_the_categorical_entropy(generator, dtype, scale):
    logits = (scale * torch.randn(6, 7, generator=generator)).to(dtype)
    loss = Entropy()(Outputs(logits), ONES)
    assert_within(loss, Categorical(logits=logits.double()).entropy(), log_softmax_bound(logits))
    assert loss.shape == (6,)


def test_language_model_is_the_mean_over_the_masked_positions(generator):
    logits = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]).bool()
    tokens = Categorical(logits=logits).entropy()
    want = torch.stack([row[keep].mean() for row, keep in zip(tokens, mask, strict=True)])
    torch.testing.assert_close(Entropy()(Outputs(logits), batch_of(mask)), want)


def test_an_example_without_tokens_costs_nothing(generator):
    logits = torch.randn(2, 3, 7, generator=generator).requires_grad_()
    mask = torch.tensor([[False] * 3, [True] * 3])
    loss = Entropy()(Outputs(logits), batch_of(mask))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss[0] == 0
    assert gradient[0].abs().sum() == 0
    assert gradient[1].abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropy_is_between_zero_and_log_v(generator, dtype):
    for scale in (0.0, 1.0, 50.0, 1e4):
        value = entropy((scale * torch.randn(200, 9, generator=generator)).to(dtype))
        assert (value >= 0).all()
        assert (value <= torch.tensor(9.0).log() * (1 + 1e-6)).all()
    torch.testing.assert_close(entropy(torch.zeros(4, 9, dtype=dtype)).float(), torch.full((4,), 9.0).log())
    certain = torch.tensor([[1e4, -1e4, -1e4], [-1e4, -1e4, 1e4]], dtype=dtype)
    assert entropy(certain).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_confident_logits_in_half_precision(dtype):
    """log(softmax + 1e-8) is NaN here in float16, value and gradient."""
    logits = torch.tensor([[0.0, 40.0, -40.0, 3.0]], dtype=dtype, requires_grad=True)
    value = entropy(logits)
    value.sum().backward()
    exact = logits.detach().double().requires_grad_()
    Categorical(logits=exact).entropy().sum().backward()
    torch.testing.assert_close(value.double(), Categorical(logits=exact).entropy(), rtol=1e-5, atol=1e-15)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-2, atol=1e-7)


def test_entropy_gradcheck(generator):
    logits = torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(entropy, logits)
    assert torch.autograd.gradcheck(marginal_cross_entropy, logits)


@pytest.mark.parametrize("diversity", [0.25, 1.0, 2.0])
def test_diversity_is_the_marginals_entropy(generator, diversity):
    """Mean loss = mean H(p_b) - diversity * H(mean p_b), and so is its gradient."""
    logits = (2 * torch.randn(6, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    loss = Entropy(diversity)(Outputs(logits), ONES)
    assert loss.shape == (6,)
    p = logits.softmax(-1)
    want = Categorical(probs=p).entropy().mean() - diversity * Categorical(probs=p.mean(0)).entropy()
    torch.testing.assert_close(loss.mean(), want)
    (gradient,) = torch.autograd.grad(loss.mean(), logits)
    (want_gradient,) = torch.autograd.grad(want, logits)
    torch.testing.assert_close(gradient, want_gradient)
    assert gradient.abs().max() > 1e-3


def test_diversity_one_is_minus_the_mutual_information():
    """Sure and different: -log V. All alike: 0, however sure."""
    sure = 100 * torch.eye(4)
    four = batch_of(torch.ones(4, 1, dtype=torch.bool))
    loss = Entropy(diversity=1.0)(Outputs(sure), four)
    torch.testing.assert_close(loss, torch.full((4,), -4.0).abs().log().neg())
    collapsed = Entropy(diversity=1.0)(Outputs(sure[:1].expand(4, 4)), four)
    torch.testing.assert_close(collapsed, torch.zeros(4))
    undecided = Entropy(diversity=1.0)(Outputs(torch.zeros(4, 4)), four)
    torch.testing.assert_close(undecided, torch.zeros(4), rtol=0, atol=1e-6)


def test_diversity_needs_a_classification_head():
    with pytest.raises(ValueError, match="needs a classification head"):
        Entropy(diversity=0.5)(Outputs(torch.zeros(6, 4, 3)), ONES)


def test_a_typo_is_a_type_error():
    with pytest.raises(TypeError, match="diversty"):
        Entropy(diversty=1.0)


def test_agreement_is_the_divergence_from_the_expert() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 5, dtype=torch.float64).log_softmax(-1)
    batch = Batch(0, {}, torch.ones(6, 4, dtype=torch.bool), torch.arange(6), said(teacher))
    got = Entropy(agreement=0.7)(Outputs(1.0 * logits), batch)
    merged, expert = Categorical(logits=logits), Categorical(logits=teacher)
    want = merged.entropy() + 0.7 * kl_divergence(expert, merged)
    torch.testing.assert_close(got, want)
    (from_got,) = torch.autograd.grad(got.sum(), logits)
    (from_want,) = torch.autograd.grad(want.sum(), logits)
    torch.testing.assert_close(from_got, from_want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agreement_with_oneself_costs_nothing(dtype: torch.dtype) -> None:
    logits = 30 * torch.randn(50, 4, dtype=dtype)
    loss = divergence(Predictions(logits.log_softmax(-1)), logits)
    torch.testing.assert_close(loss, torch.zeros_like(loss))
    other = Predictions(torch.randn(50, 4, dtype=dtype).log_softmax(-1))
    assert bool((divergence(other, logits) > 0).all())


def test_agreement_of_a_language_model_counts_what_the_mask_counts() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, True, False]])
    teacher = torch.randn(3, 7, dtype=torch.float64).log_softmax(-1)
    got = Entropy(agreement=2.0)(Outputs(1.0 * logits), Batch(0, {}, mask, torch.arange(2), said(teacher)))
    merged = Categorical(logits=logits[mask])
    rows = merged.entropy() + 2.0 * kl_divergence(Categorical(logits=teacher), merged)
    want = torch.stack([rows[:2].mean(), rows[2]])
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (got, want)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][~mask].any()


def test_a_guard_without_a_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="record the experts first"):
        Entropy(agreement=1.0)(Outputs(torch.randn(2, 3)), batch_of(torch.ones(2, 3, dtype=torch.bool)))
