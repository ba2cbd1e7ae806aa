"""Every method on tensors against its formula in float64, as written here, and its identities."""

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from trainmerge.kernels import ExpertWeight
from trainmerge.merging.group import OWN, Alternatives, Group
from trainmerge.merging.methods import METHODS
from trainmerge.merging.values import Place
from trainmerge.task_vectors.delta import Delta

SHAPE = (20, 50)
W = (0.2, 0.5, 0.6)


def models(
    count: int = 3, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """A base, and experts near it."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator, dtype=dtype)
    return [base, *(base + 0.3 * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count))]


def merge(method: str, base: Tensor, others: list[Tensor], faithful: bool = False, **given: object) -> Tensor:
    """One parameter merged; without base models, `base` is not merged."""
    own = METHODS[method]
    order = (OWN, 0) if own.with_base else tuple(range(len(others)))
    names = tuple(f"m{k}" for k in range(len(order)))
    based = (own.base == "required" and not own.with_base) or bool(given.pop("based", False))
    each = {key: given.pop(key, [default] * len(names)) for key, default in own.each.items()}
    shared = {key: given.pop(key, default) for key, default in own.shared.items()}
    assert not given
    delta = Delta(base, tuple(ExpertWeight(other) for other in others))
    group = Group(
        delta, order, names, based, Place("p", 0.0),
        {key: Alternatives((value,)) for key, value in shared.items()},
        {key: tuple(Alternatives((value,)) for value in values) for key, values in each.items()},
    )  # fmt: skip
    rule = own.rule(group, faithful)
    return torch.cat([rule(piece) for piece in group.pieces()])


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def on_circle(first: Tensor, second: Tensor, t: float) -> Tensor:
    angle = torch.acos((first * second).sum() / (first.norm() * second.norm()))
    return (torch.sin((1 - t) * angle) * first + torch.sin(t * angle) * second) / torch.sin(angle)


def trimmed(tau: Tensor, density: float, top: float = 0.0) -> Tensor:
    order = tau.abs().flatten().argsort(descending=True)
    first, count = int(top * tau.numel() + 1e-6), int(density * tau.numel() + 1e-6)
    mask = torch.zeros(tau.numel(), dtype=tau.dtype)
    mask[order[first : first + count]] = 1
    return tau * mask.view_as(tau)


def elect(taus: list[Tensor], weights: tuple[float, ...], normalize: bool) -> Tensor:
    votes = torch.stack([w * tau for w, tau in zip(weights, taus, strict=True)])
    agree = votes.sign() == votes.sum(0).sign()
    total = (votes * agree).sum(0)
    divisor = (torch.tensor(weights, dtype=total.dtype)[:, None, None] * agree).sum(0)
    return total / torch.where(divisor == 0, 1.0, divisor) if normalize else total


def test_linear_and_task_arithmetic() -> None:
    base, *others = models()
    total = sum(w * x for w, x in zip(W, others, strict=True))
    close(merge("linear", base, others, weight=W), total / sum(W))
    close(merge("linear", base, others, weight=W, normalize=False), total)
    taus = sum(w * (x - base) for w, x in zip(W, others, strict=True))
    close(merge("task_arithmetic", base, others, weight=W, **{"lambda": 0.5}), base + 0.5 * taus)
    close(merge("task_arithmetic", base, others, weight=W, normalize=True), base + taus / sum(W))


def test_slerp_and_nuslerp() -> None:
    base, first, second = models(2)
    close(merge("slerp", base, [first], t=0.3), on_circle(base, first, 0.3))
    close(merge("nuslerp", base, [first, second], weight=(0.2, 0.6)), on_circle(first, second, 0.75))
    of_taus = base + on_circle(first - base, second - base, 0.75)
    close(merge("nuslerp", base, [first, second], weight=(0.2, 0.6), based=True), of_taus)
    rows = torch.stack([on_circle(a, b, 0.75) for a, b in zip(first, second, strict=True)])
    close(merge("nuslerp", base, [first, second], weight=(0.2, 0.6), nuslerp_flatten=False), rows)
    columns = torch.stack([on_circle(a, b, 0.75) for a, b in zip(first.T, second.T, strict=True)]).T
    got = merge(
        "nuslerp", base, [first, second], weight=(0.2, 0.6), nuslerp_flatten=False, nuslerp_row_wise=True
    )
    close(got, columns)
    near = first + 1e-3 * second
    close(merge("slerp", first, [near], t=0.3), 0.7 * first + 0.3 * near)  # above a cosine of 0.9995
    close(merge("nuslerp", base, [first, -2 * first], weight=(0.7, 0.3)), 0.7 * first - 0.6 * first)


def test_multislerp_steps_in_the_tangent_plane_of_the_mean() -> None:
    base, *others = models()
    shares = torch.tensor(W, dtype=torch.float64) / sum(W)
    units = [x / x.norm() for x in others]
    mean = sum(w * u for w, u in zip(shares, units, strict=True))
    mean = mean / mean.norm()
    tangent = sum(w * (u - (u * mean).sum() * mean) for w, u in zip(shares, units, strict=True))
    length = tangent.norm()
    point = torch.cos(length) * mean + torch.sin(length) * tangent / length
    size = sum(w * x.norm() for w, x in zip(shares, others, strict=True))
    torch.testing.assert_close(
        merge("multislerp", base, others, weight=W), point * size, rtol=1e-8, atol=1e-9
    )


def test_karcher_mean_is_where_the_logarithms_cancel() -> None:
    base, *others = models()
    units = [x / x.norm() for x in others]
    got = merge("karcher", base, others, max_iter=50, tol=1e-12)
    close(got.norm(), sum(x.norm() for x in others) / 3)
    mean = got / got.norm()
    logs = []
    for unit in units:
        cosine = (unit * mean).sum()
        logs.append(torch.acos(cosine) * (unit - cosine * mean) / torch.sin(torch.acos(cosine)))
    assert float(sum(logs).norm()) < 1e-7 * float(logs[0].norm())
    close(merge("karcher", base, others[:1]), others[0])
    close(merge("karcher", base, [others[0], 0 * others[0]]), 0.5 * others[0])  # a zero has no direction


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_and_breadcrumbs(normalize: bool) -> None:
    base, *others = models()
    taus = [x - base for x in others]
    kept = [trimmed(tau, 0.29) for tau in taus]
    got = merge("ties", base, others, weight=W, density=[0.29] * 3, normalize=normalize)
    close(got, base + elect(kept, W, normalize))
    kept = [trimmed(tau, 0.5, 0.1) for tau in taus]
    got = merge(
        "breadcrumbs_ties", base, others, weight=W, density=[0.5] * 3, gamma=[0.1] * 3, normalize=normalize
    )
    close(got, base + elect(kept, W, normalize))
    got = merge("breadcrumbs", base, others, weight=W, density=[0.5] * 3, gamma=[0.1] * 3)
    close(got, base + sum(w * tau for w, tau in zip(W, kept, strict=True)))
    kept = [trimmed(tau, 0.95, 0.05) for tau in taus]  # density counts before gamma
    got = merge("breadcrumbs", base, others, weight=W, density=[0.95] * 3, gamma=[0.1] * 3)
    close(got, base + sum(w * tau for w, tau in zip(W, kept, strict=True)))


def test_opposed_votes_follow_the_majority_and_mergekit_takes_plus() -> None:
    base = torch.zeros(5)
    first, second = torch.tensor([[1.0, -1, -2, -3, -4], [-1.0, 1, -2, -3, -4]])
    settings = {"weight": (1.0, 1.0), "density": [1.0, 1.0]}
    assert merge("ties", base, [first, second], **settings).tolist() == [-1, -1, -2, -3, -4]
    assert merge("ties", base, [first, second], True, **settings).tolist() == [1, 1, -2, -3, -4]


def test_ties_with_equal_weights_is_the_preprocessors() -> None:
    from tests.preprocess.test_ties import run
    from trainmerge.preprocess import Ties

    base, *others = models(dtype=torch.float32)
    taus = torch.stack([x - base for x in others])
    (ours,) = run(Ties(0.2, "parameter", "mean"), taus)
    got = merge("ties", torch.zeros_like(base), list(taus), weight=(1.0,) * 3, density=[0.2] * 3)
    torch.testing.assert_close(got, ours.sum(0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_random_choices_are_unbiased_and_mergekits_keep_the_norm(method: str) -> None:
    base, expert = models(1, (300, 400))
    tau = expert - base
    settings = {"weight": (1.0,), "density": [0.5]}
    kept = merge(method, base, [expert], **settings) - base
    share = float((kept.abs() > 1e-12).double().mean())
    assert abs(share - 0.5) < 5 * (0.25 / tau.numel()) ** 0.5
    factor = torch.where(kept.abs() > 1e-12, kept / tau, 0.0)
    if method == "dare_linear":
        close(factor[factor > 0], torch.full_like(factor[factor > 0], 2.0))
    else:  # 1 / probability, which grows with the rank in the row
        rank = tau.abs().argsort(1).argsort(1).double()
        close(factor[factor > 0], (1 / (0.35 + rank * 0.3 / 399))[factor > 0])
    error = float((kept - tau).sum() / tau.square().sum().sqrt())
    assert abs(error) < 5 * 2**0.5  # its standard deviation is at most sqrt((1 - p) / p) of tau's norm
    same = merge(method, base, [expert], True, **settings) - base
    close(same.abs().sum(), tau.abs().sum())
    assert torch.equal(same.abs() > 1e-12, kept.abs() > 1e-12)
    unscaled = merge(method, base, [expert], rescale=False, **settings) - base
    close(unscaled, torch.where(unscaled.abs() > 1e-12, tau, 0.0))
    close(merge(method, base, [expert], weight=(1.0,), density=[1.0]), expert)


def test_sce() -> None:
    base, *others = models()
    taus = torch.stack([x - base for x in others])
    kept = taus * (trimmed(taus.var(0, correction=0), 0.5) != 0)
    weights = kept.square().mean((1, 2))
    weights = (weights / weights.sum())[:, None, None]
    agree = kept.sign() == kept.sum(0).sign()
    divisor = (weights * agree).sum(0)
    want = base + (kept * weights * agree).sum(0) / torch.where(divisor == 0, 1.0, divisor)
    close(merge("sce", base, others, select_topk=0.5), want)


def test_model_stock_shrinks_by_the_mean_cosine_and_never_extrapolates() -> None:
    base, *others = models()
    taus = [x - base for x in others]
    pairs = [float((a * b).sum() / (a.norm() * b.norm())) for a, b in combinations(taus, 2)]
    cosine = max(sum(pairs) / 3, 0.0)
    close(merge("model_stock", base, others), base + cosine / (1 + 2 * cosine) * sum(taus))
    opposed = [base + taus[0], base - taus[0] + 0.01 * taus[1]]
    close(merge("model_stock", base, opposed), base)
    assert float((merge("model_stock", base, opposed, True) - base).norm()) > 1e-3
    rows = torch.stack([
        merge("model_stock", base[i], [x[i] for x in others]) for i in range(len(base))
    ])  # fmt: skip
    close(merge("model_stock", base, others, filter_wise=True), rows)


def test_nearswap_and_ram() -> None:
    base, expert = models(1)
    share = (0.1 / (expert - base).abs()).clamp(0, 1)
    close(merge("nearswap", base, [expert], t=0.1), share * expert + (1 - share) * base)
    taus = torch.tensor([
        [1.0, 2, 0, 0, 5, 6e-6, 1.2e-5, -3], [10, 0, 30, 0, -5, 0, 0, -6], [100, 0, 0, 0, 0, 0, 0, -9],
    ], dtype=torch.float64)  # fmt: skip
    zero = torch.zeros(8, dtype=torch.float64)
    close(merge("ram", zero, [*taus]), torch.tensor([37, 2, 30, 0, 0, 0, 1.2e-5, -6], dtype=torch.float64))
    got = merge("ramplus_tl", zero, [*taus], r=1.0, alpha=100.0)  # 3 shared over 2 unique, 3 over 1
    close(got, torch.tensor([37, 5, 120, 0, 0, 0, 3e-5, -6], dtype=torch.float64))


def test_arcee_fusion_takes_outstanding_entries() -> None:
    base, expert = models(1)
    log_p, log_q = expert.log_softmax(-1), base.log_softmax(-1)
    importance = (expert - base).abs() * (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)
    ranked = importance.flatten().sort().values
    low, middle, high = (float(ranked[int(share * (len(ranked) - 1))]) for share in (0.25, 0.5, 0.75))
    want = torch.where(importance > middle + 1.5 * (high - low), expert, base)
    close(merge("arcee_fusion", base, [expert]), want)


IDENTITIES: list[tuple[str, dict[str, object]]] = [
    ("linear", {"weight": (0.3,)}),
    ("multislerp", {"weight": (0.3,)}),
    ("karcher", {}),
    ("task_arithmetic", {"weight": (1.0,)}),
    ("ties", {"weight": (0.3,)}),
    ("sce", {}),
    ("ram", {}),
    ("nearswap", {"t": 1e9}),
    ("slerp", {"t": 1.0}),
]


@pytest.mark.parametrize(("method", "settings"), IDENTITIES, ids=[name for name, _ in IDENTITIES])
@pytest.mark.parametrize("shape", [(30, 7), (11,), (1,)])
def test_one_expert_is_the_merge(method: str, settings: dict[str, object], shape: tuple[int, ...]) -> None:
    base, expert = models(1, shape)
    close(merge(method, base, [expert], **dict(settings)), expert)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_equal_models_stay_as_they_are_and_pieces_do_not_matter(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainmerge.task_vectors import pieces

    own = METHODS[method]
    count = 1 if own.with_base or own.most == 1 else own.most or 3
    base, *others = models(count, (64, 33))
    settings: dict[str, Callable[[], object] | object] = {"t": 0.3} if "t" in own.shared else {}
    if "weight" in own.each:
        settings["weight"] = W[:count]
    equal = merge(method, base, [base] * count, **dict(settings))
    close(equal, base)
    whole = merge(method, base, others, **dict(settings))
    monkeypatch.setattr(pieces, "PIECE", 100)
    close(merge(method, base, others, **dict(settings)), whole)
