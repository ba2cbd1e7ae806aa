"""Losses of outputs that are not one row per text or token: float64 references, and autograd's gradients.

Legend: `B` examples, `T` tokens, `V` labels or numbers.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

import trainmerge as tm
from trainmerge.data.batch import Batch, Kind, Outputs, Predictions, Signals

LENGTHS = torch.tensor([6, 3, 5])
MASK = torch.arange(6) < LENGTHS[:, None]


def batch_of(log_p: Tensor | None = None, values: Tensor | None = None) -> Batch:
    told = None if log_p is None else Predictions(log_p.float())
    return Batch(0, {"attention_mask": MASK.long()}, MASK, torch.arange(3), Signals(told, {}, values))


def spans(values: Tensor) -> Tensor:
    """Begin and end [B, 2, T], padding lowest, as a model's forward gives them."""
    return values.masked_fill(~MASK[:, None], torch.finfo(values.dtype).min)


def recorded(kind: Kind, expert: Tensor, temperature: float = 1.0) -> Tensor:
    """Rows as they are recorded: of spans as wide as the longest text of all, which is 8 here."""
    log_p = (expert.double() / temperature).log_softmax(-1).flatten(0, 1)
    return torch.nn.functional.pad(log_p, (0, 2), value=-torch.inf) if kind == "spans" else log_p


def reference(kind: Kind, expert: Tensor, merge: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(expert || merge) per example by torch.distributions, in float64."""
    expert, merge = expert.double() / temperature, merge.double() / temperature
    if kind == "labels":
        pair = (Bernoulli(logits=own[..., 0] - own[..., 1]) for own in (expert, merge))
        return kl_divergence(*pair).sum(-1)
    each = []
    for b, length in enumerate(LENGTHS):
        pair = (Categorical(logits=own[b, :, :length]) for own in (expert, merge))
        each.append(kl_divergence(*pair).mean())
    return torch.stack(each)


def logits_of(kind: Kind, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if kind == "spans":
        both = torch.randn(2, 3, 2, 6, generator=generator)
        return spans(both[0]), spans(both[1])
    both = torch.randn(2, 3, 4, generator=generator)
    return tuple(torch.stack([own, torch.zeros_like(own)], -1) for own in both)  # type: ignore[return-value]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["spans", "labels"])
def test_alignment_is_the_divergence(kind: Kind, temperature: float, generator: torch.Generator) -> None:
    expert, merge = logits_of(kind, generator)
    batch = batch_of(recorded(kind, expert, temperature))
    loss = tm.Alignment(logits=1.5, temperature=temperature)(Outputs(merge.clone(), {}, kind), batch)
    want = 1.5 * temperature**2 * reference(kind, expert, merge, temperature)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    same = tm.Alignment(temperature=temperature)(Outputs(expert.clone(), {}, kind), batch)
    assert same.abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["spans", "labels"])
def test_gradients_are_autograds(kind: Kind, generator: torch.Generator) -> None:
    expert, merge = logits_of(kind, generator)
    batch = batch_of(recorded(kind, expert))
    leaf, other = merge.clone().requires_grad_(), merge.clone().double().requires_grad_()
    loss = tm.Entropy(agreement=2.0)(Outputs(leaf * 1.0, {}, kind), batch)
    (got,) = torch.autograd.grad(loss.sum(), [leaf])
    log_q = other.log_softmax(-1)
    rows = -(log_q.exp() * log_q).sum(-1)
    entropy = rows.sum(-1) if kind == "labels" else rows.mean(-1)
    (want,) = torch.autograd.grad((entropy + 2 * reference(kind, expert, other)).sum(), [other])
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    if kind == "spans":
        assert got.masked_select(~MASK[:, None].expand_as(got)).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["spans", "labels"])
def test_the_contract(kind: Kind, dtype: torch.dtype, generator: torch.Generator) -> None:
    """A wide loss per example, in any order of the examples, finite at any logits and below padding."""
    expert, merge = logits_of(kind, generator)
    batch, order = batch_of(recorded(kind, expert)), torch.arange(3).flip(0)
    rows = recorded(kind, expert[order]).float()
    mask, signals = MASK[order], Signals(Predictions(rows))
    flipped = Batch(0, {"attention_mask": mask.long()}, mask, order, signals)
    for objective in (tm.Alignment(), tm.Entropy(agreement=2.0)):
        logits = spans(merge.to(dtype)) if kind == "spans" else merge.to(dtype)
        loss = objective(Outputs(logits.clone(), {}, kind), batch)
        assert loss.shape == (3,)
        assert loss.dtype == torch.float32
        other = objective(Outputs(logits[order].clone(), {}, kind), flipped)
        torch.testing.assert_close(other, loss[order])
        for scale in (1e4, -1e4):
            leaf = (scale * merge.sign()).to(dtype)
            leaf = (spans(leaf) if kind == "spans" else leaf).requires_grad_()
            loss = objective(Outputs(leaf * 1.0, {}, kind), batch)
            (gradient,) = torch.autograd.grad(loss.sum(), [leaf])
            assert loss.isfinite().all()
            assert gradient.isfinite().all()


def test_a_regression_is_its_squared_distance(generator: torch.Generator) -> None:
    merge, expert = torch.randn(2, 3, 2, generator=generator)
    leaf = merge.clone().requires_grad_()
    loss = tm.Alignment(logits=0.5, temperature=3.0)(Outputs(leaf, {}, "values"), batch_of(values=expert))
    want = 0.5 * (merge - expert).double().square().sum(-1)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad(loss.sum(), [leaf])
    torch.testing.assert_close(slope, merge - expert)
    with pytest.raises(ValueError, match="no entropy: use Alignment"):
        tm.Entropy()(Outputs(merge, {}, "values"), batch_of())
    with pytest.raises(ValueError, match="no recorded expert values"):
        tm.Alignment()(Outputs(merge, {}, "values"), batch_of())


def test_the_entropy_of_an_answer_ignores_padding() -> None:
    flat = spans(torch.zeros(3, 2, 6))
    loss = tm.Entropy()(Outputs(flat, {}, "spans"), batch_of())
    torch.testing.assert_close(loss, torch.tensor([math.log(n) for n in LENGTHS.tolist()]))
    half = tm.Entropy()(Outputs(flat.half().clamp_min(torch.finfo(torch.half).min), {}, "spans"), batch_of())
    torch.testing.assert_close(half, loss, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["spans", "labels", "values"])
def test_diversity_is_of_classes(kind: Kind, generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="diversity needs a classification head"):
        tm.Entropy(diversity=1.0)(Outputs(torch.randn(3, 2, 6, generator=generator), {}, kind), batch_of())
