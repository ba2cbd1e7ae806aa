"""KL(expert || merge) against float64, whole and with the tail in one cell; its memory; its claims.

Legend: `R` rows, `V` vocabulary, `m` kept probabilities, `B` examples, `T` tokens.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from trainmerge.data.batch import Batch, Outputs, Predictions, Signals
from trainmerge.objectives import Entropy
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


@pytest.mark.parametrize("m", [3, V])
@pytest.mark.parametrize("chunk", [1, 2 * V, 1 << 22])
@pytest.mark.parametrize("rows", [[5, 2], [6], [0, 1, 3, 4, 6], []], ids=str)
def test_rows_that_are_not_chosen_have_no_gradient(
    rows: list[int], chunk: int, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    logits, log_p = logits_and_teacher()
    teacher = Predictions(log_p[: len(rows)]) if m == V else kept(log_p[: len(rows)], m)
    chosen, weights = torch.tensor(rows, dtype=torch.long), torch.rand(len(rows), dtype=torch.float64)
    loss = divergence(teacher, (1.0 * logits).view(1, R, V), chosen, 0.5)
    want = reference(teacher, logits[chosen], 0.5)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
    got, expected = (torch.autograd.grad((weights * loss).sum(), logits)[0] for loss in (loss, want))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    assert got[[i for i in range(R) if i not in rows]].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [3, V])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_narrow_logits_cost_one_rounding_of_the_gradient(
    dtype: torch.dtype, m: int, temperature: float
) -> None:
    logits, log_p = logits_and_teacher(dtype)
    teacher = Predictions(log_p.float()) if m == V else kept(log_p.float(), m)
    exact = logits.detach().double().requires_grad_()
    want = reference(wide(teacher), exact, temperature)
    loss = divergence(teacher, 1.0 * logits, temperature=temperature)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    (got,), (expected,) = (torch.autograd.grad(v.sum(), x) for v, x in ((loss, logits), (want, exact)))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def wide(teacher: Predictions) -> Predictions:
    """Its float32 numbers, as float64."""
    tail = None if teacher.tail is None else teacher.tail.double()
    return teacher._replace(log_p=teacher.log_p.double(), tail=tail)


EXTREMES = {
    "signs": (torch.tensor([1.0, -1.0]).repeat(V)[:V], torch.tensor([-1.0, 1.0]).repeat(V)[:V] * 1e4),
    "sure, undecided": (-1 + 2 * torch.eye(V)[0], torch.zeros(V) + torch.eye(V)[0]),
    "sure, sure of another": (-1 + 2 * torch.eye(V)[0], 1e4 * torch.eye(V)[V - 1]),
    "undecided, sure": (torch.ones(V), 1e4 * torch.eye(V)[2]),
    "sure of a rare one": (-1 + 2 * torch.eye(V)[V - 1], -0.1 * torch.arange(V)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [3, V])
@pytest.mark.parametrize("scale", [95.0, 1e4])
@pytest.mark.parametrize("case", list(EXTREMES))
def test_large_logits_are_exact_and_finite(case: str, scale: float, m: int, dtype: torch.dtype) -> None:
    student, expert = EXTREMES[case]
    logits = (scale * student).to(dtype)[None].requires_grad_()
    log_p = expert[None].log_softmax(-1)
    teacher = Predictions(log_p) if m == V else kept(log_p, m)
    loss = divergence(teacher, 1.0 * logits)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    p = wide(teacher).log_p.exp()
    log_q = logits.detach().double().log_softmax(-1)
    if m < V:  # s_v - q s_v / q_s outside, by hand
        assert teacher.tokens is not None
        assert teacher.tail is not None
        places = teacher.tokens.long()
        rest = log_q.scatter(-1, places, -torch.inf)
        inside = rest.log_softmax(-1).exp()
        want = rest.exp() - teacher.tail.double().exp()[:, None] * inside
        want = want.scatter(-1, places, log_q.gather(-1, places).exp() - p)
    else:
        want = log_q.exp() - p
    torch.testing.assert_close(gradient.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("m", [3, V])
def test_tokens_that_neither_can_say(m: int) -> None:
    """A masked vocabulary: -inf on both sides costs nothing and has no gradient."""
    for dead in ([4], list(range(3, V))):
        logits, log_p = logits_and_teacher(torch.float32)
        never = torch.zeros(V).index_fill(0, torch.tensor(dead), -torch.inf)
        log_p = (log_p.float() + never).log_softmax(-1)
        teacher = Predictions(log_p) if m == V else kept(log_p, m)
        loss = divergence(teacher, logits + never)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        assert not gradient[:, dead].any()
        live = [v for v in range(V) if v not in dead]
        if m == V:
            want = divergence(Predictions(log_p[:, live]), logits.detach()[:, live])
            torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_oneself_costs_nothing(dtype: torch.dtype, temperature: float) -> None:
    logits, _ = logits_and_teacher(dtype)
    own = (logits.detach().float() / temperature).log_softmax(-1)
    for teacher in (Predictions(own), kept(own, 3)):
        loss = divergence(teacher, 1.0 * logits, temperature=temperature)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-6)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


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


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_more_kept_is_never_less_divergence(temperature: float) -> None:
    torch.manual_seed(1)
    logits = 5 * torch.randn(200, V, dtype=torch.float64)
    log_p = (5 * torch.randn(200, V, dtype=torch.float64)).log_softmax(-1)
    losses = [divergence(kept(log_p, m), logits, temperature=temperature) for m in range(1, V)]
    losses.append(divergence(Predictions(log_p), logits, temperature=temperature))
    for less, more in pairwise(losses):
        assert bool((less <= more + 1e-12).all())
    assert bool((losses[0] >= 0).all())
    assert bool((losses[-1] > losses[0]).any())


def test_the_bound_on_the_gradients_error_is_reached() -> None:
    """The expert's tail on one token, the merge's on another: 2 q."""
    logits = torch.full((1, V), -60.0, dtype=torch.float64)
    logits[0, :2] = torch.tensor([3.0, 0.0])
    log_p = torch.full((1, V), -60.0, dtype=torch.float64)
    log_p[0, 0], log_p[0, 5] = 3.0, 0.0
    log_p = log_p.log_softmax(-1)
    leaf = logits.requires_grad_()
    teacher = kept(log_p, 1)
    assert teacher.tail is not None
    whole, part = (
        torch.autograd.grad(divergence(t, 1.0 * leaf).sum(), leaf)[0] for t in (Predictions(log_p), teacher)
    )
    torch.testing.assert_close((whole - part).abs().sum(-1), 2 * teacher.tail.exp())


@pytest.mark.parametrize("shape", [(R, V), (1, R, V)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_takes_the_place_of_the_logits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits, log_p = logits_and_teacher(dtype)
    mine = (1.0 * logits).view(shape)
    seen: list[int] = []
    mine.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    divergence(kept(log_p.float(), 4), mine).sum().backward()
    assert seen == [mine.data_ptr()]
    assert logits.grad is not None
    assert torch.equal(mine.detach().view(R, V), logits.grad)


# strided logits have no [rows, V] view: their gradient is written over a copy
@pytest.mark.parametrize("cut", [lambda x: x[:, :-1], lambda x: x.transpose(0, 1), lambda x: x[..., :5]])
def test_logits_in_pieces_have_the_same_gradient(cut: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    leaf = torch.randn(2, 4, V, dtype=torch.float64, requires_grad=True)
    rows, width = cut(leaf).shape[:2].numel(), cut(leaf).shape[-1]
    teacher = Predictions(torch.randn(rows, width, dtype=torch.float64).log_softmax(-1))
    got = divergence(teacher, cut(1.0 * leaf))
    want = reference(teacher, cut(leaf).reshape(rows, width), 1.0)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(loss.sum(), leaf)[0] for loss in (got, want)]
    torch.testing.assert_close(*gradients)


def test_who_needs_the_logits_afterwards_is_told() -> None:
    logits, log_p = logits_and_teacher()
    mine = 1.0 * logits
    squared = mine.square().sum()  # its backward pass reads `mine`, and runs after the divergence's
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squared + divergence(Predictions(log_p), mine).sum()).backward()


def test_a_second_divergence_of_the_same_logits_is_told() -> None:
    logits, log_p = logits_and_teacher()
    mine = 1.0 * logits
    first, second = (divergence(t, mine).sum() for t in (Predictions(log_p), kept(log_p, 3)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (first + second).backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [3, V])
@pytest.mark.parametrize(
    ("shape", "diversity"),
    [((3, V), 0.0), ((3, V), 0.4), ((3, 4, V), 0.0)],
    ids=["head", "diverse", "tokens"],
)
def test_with_entropy_the_gradient_is_autograds(
    shape: tuple[int, ...], diversity: float, m: int, dtype: torch.dtype
) -> None:
    """Entropy and divergence read the same logits; what one writes over, the other must not need."""
    torch.manual_seed(2)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    logits = (2 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    examples = mask.nonzero()[:, 0] if len(shape) == 3 else torch.arange(3)
    log_p = torch.randn(len(examples), V, dtype=torch.float64).log_softmax(-1)
    teacher = Predictions(log_p) if m == V else kept(log_p, m)
    weights = torch.tensor([0.2, 3.0, 1.0], dtype=torch.float64)

    rows = exact[mask] if len(shape) == 3 else exact
    log_q = rows.log_softmax(-1)
    losses = 0.7 * reference(teacher, rows, 1.0) - (log_q.exp() * log_q).sum(-1)
    marginal = log_q.exp().mean(0).log()
    losses = losses + diversity * (log_q.exp() * marginal).sum(-1)
    want = torch.stack([losses[examples == i].mean() for i in range(3)])

    batch = Batch(0, {}, mask, torch.arange(3), Signals(teacher))
    got = Entropy(diversity, agreement=0.7)(Outputs(1.0 * logits), batch)
    fine = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got.double(), want, **fine)
    (expected,) = torch.autograd.grad((weights * want).sum(), exact)
    (gradient,) = torch.autograd.grad((weights * got).sum(), logits)
    if dtype == torch.bfloat16:  # both gradients are rounded, and their sum
        fine = {"rtol": 2e-2, "atol": 1e-2}
    torch.testing.assert_close(gradient.double(), expected, **fine)
    if len(shape) == 3:
        assert not gradient[~mask].any()
