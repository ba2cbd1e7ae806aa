"""Properties that every kernel, constraint and objective has; a plug-in's own test file calls one line.

Legend: `K` experts, `G` coefficient groups, `C` chunks of one parameter, `*S` parameter shape, `B` examples,
`T` tokens, `V` classes or vocabulary.
"""

import torch
from torch import Tensor

from tests.bounds import assert_within, sum_bound
from trainmerge.coefficients.constraints import Constraint
from trainmerge.data.batch import Batch, Outputs, Signals
from trainmerge.kernels import (
    Difference,
    ExpertWeight,
    LowRank,
    Quantised,
    Term,
    Untouched,
    accumulation_dtype,
)
from trainmerge.kernels.quantised import unpack_codes
from trainmerge.objectives import Objective
from trainmerge.task_vectors.delta import Delta

BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Equal in every bit: -0 is not 0, and a NaN is itself."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    integer = BITS[got.element_size()]
    assert torch.equal(got.contiguous().view(integer), want.contiguous().view(integer))


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, in float64."""
    return float((got.double() - want.double()).norm() / want.double().norm())


# --- merging ---------------------------------------------------------------------------------------


def true_tau(term: Term, base: Tensor) -> Tensor:
    """One expert's difference [*S] by its definition, in float64."""
    match term:
        case Difference(tau):
            return tau.double()
        case ExpertWeight(weight):
            return weight.double() - base.double()
        case LowRank(up, down, scale):
            return (scale * (up.double() @ down.double())).reshape(base.shape)
        case Quantised(codes, scale):
            whole = codes if codes.dtype == torch.int8 else unpack_codes(codes, base[0].numel())
            return (scale.double()[:, None] * whole.double()).view(base.shape)
        case Untouched():
            return torch.zeros_like(base, dtype=torch.float64)


def magnitude(term: Term, base: Tensor) -> Tensor:
    """The size of the numbers that make up tau [*S]: what its rounding errors are proportional to."""
    if isinstance(term, LowRank):
        return true_tau(LowRank(term.up.abs(), term.down.abs(), abs(term.scale)), base)
    return true_tau(term, base).abs()


def rows_of_chunks(shape: torch.Size, chunks: int) -> list[Tensor]:
    """The row numbers of every chunk."""
    return list(torch.arange(shape[0] if shape else 1).tensor_split(chunks))


def per_row(coefficients: Tensor, shape: torch.Size) -> Tensor:
    """Coefficients [K, C] -> [K, rows, 1, ...], which multiplies [K, *S] ([K] for a scalar parameter)."""
    chunks = rows_of_chunks(shape, coefficients.shape[1])
    wide = torch.cat(
        [c[:, None].expand(-1, len(rows)) for c, rows in zip(coefficients.T, chunks, strict=True)], 1
    )
    return wide.view(len(coefficients), *([-1] if shape else []), *[1] * (len(shape) - 1))


def true_merge(delta: Delta, coefficients: Tensor) -> Tensor:
    """base + sum_k c_k tau_k, dense and in float64."""
    taus = torch.stack([true_tau(term, delta.base) for term in delta.terms])
    return delta.base.double() + (per_row(coefficients.double().to(taus.device), delta.shape) * taus).sum(0)


def true_inner(grad: Tensor, delta: Delta, chunks: int, tau=true_tau) -> Tensor:
    """<grad, tau_k> per chunk, [K, C], dense and in float64."""
    products = torch.stack([grad.double() * tau(term, delta.base) for term in delta.terms])
    products = products.reshape(len(delta.terms), delta.shape[0] if delta.shape else 1, -1)
    return torch.stack([products[:, rows].sum((1, 2)) for rows in rows_of_chunks(delta.shape, chunks)], 1)


def merge(delta: Delta, coefficients: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`Delta.merge` into a new tensor that holds rubbish before."""
    out = torch.full_like(delta.base, float("nan"), dtype=dtype)
    delta.merge(out, coefficients)
    return out


def assert_merge_is_exact(delta: Delta, coefficients: Tensor) -> None:
    """Delta.merge is the float64 merge, rounded once into the weights' dtype."""
    assert_within(
        merge(delta, coefficients), true_merge(delta, coefficients), merge_bound(delta, coefficients)
    )


def merge_bound(delta: Delta, coefficients: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Error [*S] of a merge in the accumulation dtype, and of its one rounding into `dtype`.

    A model that is folded in is rounded three times (its difference, its product, the average). An error
    grows later by no more than the largest weight; the base's weight is 1 - sum c.
    """
    dtype = dtype or delta.base.dtype
    weights = coefficients.abs().double().to(delta.base.device)
    weights = torch.cat([1 + weights.sum(0, keepdim=True), weights])
    sizes = torch.stack([delta.base.double().abs(), *(magnitude(term, delta.base) for term in delta.terms)])
    size = (per_row(weights, delta.shape) * sizes).sum(0) * (1 + weights[1:].max())
    ranks = sum(term.up.shape[1] for term in delta.terms if isinstance(term, LowRank))
    working = sum_bound(size, 3 * len(sizes) + ranks, accumulation_dtype(dtype))
    if dtype == accumulation_dtype(dtype):
        return working
    rounding = 0.5 * torch.finfo(dtype).eps * (true_merge(delta, coefficients).abs() + working)
    return working + rounding + torch.finfo(dtype).smallest_normal


def assert_inner_is_exact(delta: Delta, grad: Tensor, chunks: int) -> None:
    """Delta.inner is the float64 inner product, up to the rounding of a float32 (or float64) sum."""
    got = delta.inner(grad, chunks)
    assert got.dtype == accumulation_dtype(grad.dtype)
    assert got.shape == (len(delta.terms), chunks)
    assert_within(got, true_inner(grad, delta, chunks), inner_bound(delta, grad, chunks))


def inner_bound(delta: Delta, grad: Tensor, chunks: int) -> Tensor:
    """Error [K, C] of <grad, tau_k> per chunk: a sum of a chunk's elements and a low-rank term's ranks."""
    size = true_inner(grad.abs(), delta, chunks, tau=magnitude)
    rows = -(-(delta.shape[0] if delta.shape else 1) // chunks)
    ranks = max(term.up.shape[1] if isinstance(term, LowRank) else 0 for term in delta.terms)
    terms = rows * delta.shape[1:].numel() + ranks
    return sum_bound(size, terms, accumulation_dtype(grad.dtype))


def assert_delta_contract(delta: Delta, chunks: int, generator: torch.Generator) -> None:
    """What every mix of terms promises, at one number of chunks."""
    experts = len(delta.terms)
    before = [part.clone() for part in tensors_of(delta)]
    coefficients = torch.randn(experts, chunks, generator=generator)
    grad = torch.randn(delta.shape, generator=generator).to(delta.base)
    grad_before = grad.clone()

    assert_merge_is_exact(delta, coefficients)
    assert_inner_is_exact(delta, grad, chunks)
    assert_same_bits(merge(delta, torch.zeros(experts, chunks)), delta.base)
    for k, term in enumerate(delta.terms):
        one_hot = torch.eye(experts)[:, k : k + 1].expand(experts, chunks)
        if isinstance(term, ExpertWeight):
            assert_same_bits(merge(delta, one_hot), term.weight)
        elif isinstance(term, Untouched):
            assert_same_bits(merge(delta, one_hot), delta.base)
    assert_expert_order_is_irrelevant(delta, coefficients, grad)

    for part, copy in zip(tensors_of(delta), before, strict=True):
        assert_same_bits(part, copy)
    assert_same_bits(grad, grad_before)


def assert_expert_order_is_irrelevant(delta: Delta, coefficients: Tensor, grad: Tensor) -> None:
    """Reversed experts: the same merge and the same gradient rows, up to rounding.

    Not bit for bit: small blocks of all experts are one matrix-vector product, in which a library for linear
    algebra may sum a row in another order at another place.
    """
    flipped = Delta(delta.base, delta.terms[::-1])
    assert_merge_is_exact(flipped, coefficients.flip(0))
    assert_inner_is_exact(flipped, grad, coefficients.shape[1])


def tensors_of(delta: Delta) -> list[Tensor]:
    """Every tensor that a delta holds."""
    return [delta.base, *(part for term in delta.terms for part in term if isinstance(part, Tensor))]


# --- constraints -----------------------------------------------------------------------------------


def assert_constraint_contract(constraint: Constraint, inside: Tensor, raw: Tensor) -> None:
    """`inside` [K, G] are coefficients of the set; `raw` [K, G] is anywhere."""
    kept = raw.clone()
    start = constraint.start(inside)
    torch.testing.assert_close(constraint.values(start), inside)
    torch.testing.assert_close(constraint.project(start), start)  # what is in the set stays
    projected = constraint.project(raw)
    assert projected.dtype == raw.dtype
    assert projected.shape == raw.shape
    torch.testing.assert_close(constraint.project(projected), projected)
    assert (slope_of(constraint, raw) > 0).all()  # nothing is dead, inside or outside
    values = constraint.values(projected)
    sizes = (
        1 + projected.abs() + values.abs() / slope_of(constraint, projected)
    )  # where flat, inverting amplifies
    there = 8 * torch.finfo(raw.dtype).eps * sizes.double()
    assert_within(constraint.start(values), projected, there)  # it is in the set
    assert_same_bits(raw, kept)


def slope_of(constraint: Constraint, raw: Tensor) -> Tensor:
    """d (sum of values) / d raw, [K, G]."""
    leaf = raw.clone().requires_grad_()
    return torch.autograd.grad(constraint.values(leaf).sum(), leaf)[0]


# --- objectives ------------------------------------------------------------------------------------


def assert_objective_contract(objective: Objective, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """What a loss promises on logits of `shape`, [B, V] or [B, T, V]."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(shape[0], shape[1] if len(shape) == 3 else 4, dtype=torch.bool)
    mask[0, 1:], mask[1, :2] = False, False  # padded on the right, and on the left
    batch = Batch(0, {}, mask, torch.arange(len(mask)))
    logits = (2 * torch.randn(shape, generator=generator)).to(dtype)
    loss, gradient = loss_and_gradient(objective, logits, batch)
    assert loss.shape == shape[:1]
    assert loss.dtype == accumulation_dtype(dtype)
    assert gradient.abs().sum() > 0

    order = torch.arange(shape[0]).flip(0)
    flipped, _ = loss_and_gradient(objective, logits[order], batch._replace(mask=mask[order]))
    torch.testing.assert_close(flipped, loss[order])
    if len(shape) == 3:
        assert_padding_is_ignored(objective, logits, batch)
    for scale in (1e4, -1e4):
        for extreme in (scale * logits.sign(), torch.full_like(logits, scale), scale * one_hot_like(logits)):
            loss, gradient = loss_and_gradient(objective, extreme.to(dtype), batch)
            assert loss.isfinite().all()
            assert gradient.isfinite().all()


def assert_padding_is_ignored(objective: Objective, logits: Tensor, batch: Batch) -> None:
    """Other logits where the mask is off change neither loss nor gradient."""
    loss, gradient = loss_and_gradient(objective, logits, batch)
    other = torch.where(batch.mask[..., None], logits, 7 * logits.flip(-1) - 3)
    other_loss, other_gradient = loss_and_gradient(objective, other, batch)
    assert_same_bits(other_loss, loss)
    assert_same_bits(other_gradient[batch.mask], gradient[batch.mask])
    assert gradient[~batch.mask].abs().sum() == 0
    assert other_gradient[~batch.mask].abs().sum() == 0


def loss_and_gradient(objective: Objective, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss per example, and the gradient of its mean in the logits."""
    leaf = logits.clone().requires_grad_()
    loss = objective(Outputs(leaf), batch)
    (gradient,) = torch.autograd.grad(loss.mean(), leaf)
    return loss.detach(), gradient


def one_hot_like(logits: Tensor) -> Tensor:
    """One in the first class, zero elsewhere."""
    hot = torch.zeros_like(logits)
    hot[..., 0] = 1
    return hot


def assert_embedding_contract(objective: Objective, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """What a loss promises on sentence embeddings of `shape`, [B, E]."""
    generator = torch.Generator().manual_seed(0)
    expert = torch.randn(shape, generator=generator)
    merged = torch.randn(shape, generator=generator).to(dtype)
    loss, gradient = embedding_loss(objective, merged, expert)
    assert loss.shape == shape[:1]
    assert loss.dtype == accumulation_dtype(dtype)
    assert gradient.abs().sum() > 0

    order = torch.arange(len(merged)).flip(0)
    flipped, _ = embedding_loss(objective, merged[order], expert[order])
    torch.testing.assert_close(flipped, loss[order])
    own, _ = embedding_loss(objective, merged, merged.float())
    assert own.abs().max() < 1e-10  # an expert's own
    for extreme in (1e4 * merged.sign(), 1e-4 * merged, torch.ones_like(merged)):
        loss, gradient = embedding_loss(objective, extreme.to(dtype), expert)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


def embedding_loss(objective: Objective, merged: Tensor, expert: Tensor) -> tuple[Tensor, Tensor]:
    """Loss per example, and the gradient of its mean in the merge's embeddings."""
    leaf = merged.clone().requires_grad_()
    mask = torch.ones(len(merged), 1, dtype=torch.bool)
    batch = Batch(0, {}, mask, torch.arange(len(merged)), Signals(embedding=expert))
    loss = objective(Outputs(merged.new_empty(0), embedding=leaf), batch)
    (gradient,) = torch.autograd.grad(loss.mean(), leaf)
    return loss.detach(), gradient
