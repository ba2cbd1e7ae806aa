"""The merge and its gradient in plain torch, a cache-sized block of rows at a time.

Any device; the reference for other backends. Both passes read the base and every task vector once. Blocks
never cross a chunk, accumulate in float32 (float64 for float64 weights) and are rounded once.

Legend: `K` experts, `C` chunks of one parameter, `R` rows of a block, `W` elements of a row.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import ulp

import torch
from torch import Tensor

from trainmerge.kernels.quantised import Quantised, dequantise
from trainmerge.kernels.terms import Difference, ExpertWeight, LowRank, Term, Untouched

TOGETHER = 1 << 15  # elements of K small blocks (a bias's) up to which one call for all is faster than K
BLOCK_ELEMENTS = (
    1 << 17
)  # 512 KiB of float32: three of them fit a core's cache, and call overhead is negligible


def chunk_bounds(rows: int, chunks: int) -> list[int]:
    """Row indices at which the chunks begin and end; sizes differ by at most one row.

    >>> chunk_bounds(7, 3)
    [0, 3, 5, 7]
    """
    size, longer = divmod(rows, chunks)
    return [i * size + min(i, longer) for i in range(chunks + 1)]


def weighted_sum(out: Tensor, base: Tensor, terms: Sequence[Term], coefficients: Tensor) -> None:
    """Write `out` = base + sum_k coefficients[k, chunk] * tau_k. `out`, `base` [*S], coefficients [K, C].

    All-zero coefficients give the base, and a one-hot vector on `ExpertWeight` terms that expert, bit for
    bit (see `_averaged`).
    """
    weights = coefficients.double().tolist()
    dtype = accumulation_dtype(out.dtype)
    in_place = out.dtype == dtype and out.is_contiguous()
    if in_place and coefficients.shape[1] == 1 and (models := _small(out, base, terms)):
        _averaged(out, base, [(w[0], model) for w, model in zip(weights, models, strict=True)])
        return
    scratch = _scratch(out, dtype)
    for rows, chunk in _blocks(out, coefficients.shape[1]):
        target = _block(out, rows)
        buffer = scratch[: target.numel()].view(len(target), -1)
        total = _rows(out, rows) if in_place else torch.empty_like(buffer)
        row_weights = [weight[chunk] for weight in weights]
        experts = [
            (weight, _rows(term.weight, rows))
            for term, weight in zip(terms, row_weights, strict=True)
            if isinstance(term, ExpertWeight)
        ]
        _averaged(total, _rows(base, rows), experts, buffer)
        for term, weight in zip(terms, row_weights, strict=True):
            if weight == 0.0:
                continue  # not read: adding 0 * tau would turn -0 into 0 and infinity into NaN
            if isinstance(term, LowRank):
                up, down = _factors(term, rows, total)
                total.addmm_(up, down, alpha=weight * term.scale)
            elif isinstance(term, Difference):
                total.add_(_load(_rows(term.tau, rows), buffer), alpha=weight)
            elif isinstance(term, Quantised):
                total.add_(dequantise(term, rows, buffer), alpha=weight)
        if not in_place:
            target.copy_(total.view(target.shape))


def inner_products(grad: Tensor, base: Tensor, terms: Sequence[Term], chunks: int) -> Tensor:
    """<grad, tau_k> per chunk, all K in one read of `grad` [*S] -> [K, C], float32 (float64 for float64)."""
    dtype = accumulation_dtype(grad.dtype)
    if grad.dtype == dtype and chunks == 1 and (models := _small(grad, base, terms)):
        return _products_of_all(grad, base, models).add_(0.0)[:, None]  # as below: a sum that begins with 0
    scratch, base_scratch, grad_scratch = (_scratch(grad, dtype) for _ in range(3))
    products: list[Tensor] = []  # a scalar per block and expert, added up at the end: no synchronisation
    places: list[int] = []
    for rows, chunk in _blocks(grad, chunks):
        g = _rows(grad, rows)
        shape, size = g.shape, g.numel()
        g = _load(g, grad_scratch[:size].view(shape))
        b = _load(_rows(base, rows), base_scratch[:size].view(shape))
        buffer = scratch[:size].view(shape)
        if len(terms) * size <= TOGETHER and all(isinstance(term, ExpertWeight) for term in terms):
            experts = [_rows(term.weight, rows) for term in terms]  # type: ignore[union-attr]
            products += _products_of_all(g, b, experts).unbind()
            places += range(chunk, len(terms) * chunks, chunks)
            continue
        for k, term in enumerate(terms):
            if not isinstance(term, Untouched):
                products.append(_block_product(g, b, term, rows, buffer))
                places.append(k * chunks + chunk)
    sums = torch.zeros(len(terms) * chunks, dtype=torch.float64, device=grad.device)
    if products:
        sums.index_add_(0, torch.tensor(places, device=grad.device), torch.stack(products).double())
    return sums.view(len(terms), chunks).to(dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32 for everything narrower, float64 for float64 (gradient checks)."""
    return torch.promote_types(dtype, torch.float32)


def _small(own: Tensor, base: Tensor, terms: Sequence[Term]) -> list[Tensor]:
    """The models of a parameter whose passes take as long as their calls, if these can use it as it is."""
    models = [term.weight for term in terms if isinstance(term, ExpertWeight)]
    if len(models) < len(terms) or own.numel() > min(BLOCK_ELEMENTS, TOGETHER // max(1, len(terms))):
        return []
    like = own.dtype, own.device
    alike = all((part.dtype, part.device) == like and part.is_contiguous() for part in (own, base, *models))
    return models if alike else []


def _products_of_all(g: Tensor, b: Tensor, models: Sequence[Tensor]) -> Tensor:
    """<g, model - b> of each of K small models, [K]."""
    return torch.stack([*models]).to(b).sub_(b).view(len(models), b.numel()) @ g.flatten()


def _averaged(
    total: Tensor, base: Tensor, experts: Sequence[tuple[float, Tensor]], buffer: Tensor | None = None
) -> None:
    """Write base + sum over experts of weight * (expert - base) into `total`, one model folded in at a time.

    `buffer`, of the shape of all, is for models of another dtype or device.

    base + sum_k c_k (e_k - base) is an average of base and experts whose weights sum to one. Folding model i
    in, A <- A + w_i / (w_1 + ... + w_i) (m_i - A), keeps A an average of those before it and reads each model
    once. In order of weight, the heaviest first, no partial sum is below one once a negative weight comes, so
    that no error grows by more than that weight; and a weight of one is that model, bit for bit. (base +
    (e - base) is off by up to |base| / |e| ulp where an expert's value is much smaller than the base's.)
    """
    models = [(1.0 - sum(weight for weight, _ in experts), base), *experts]
    models = sorted((m for m in models if m[0] != 0.0), key=lambda model: -model[0])
    (summed, first), *others = models
    if not others:
        total.copy_(first)
        return
    average = _load(first, total)
    for weight, model in others:
        summed = summed + weight or ulp(0.0)  # zero if weights are beyond all rounding: then not finite
        own = model if buffer is None else _load(model, buffer)
        torch.lerp(average, own, weight / summed, out=total)
        average = total


def _block_product(g: Tensor, b: Tensor, term: Term, rows: slice, buffer: Tensor) -> Tensor:
    """<g, tau[rows]> of one expert: a scalar in the accumulation dtype."""
    match term:
        case LowRank():
            up, down = _factors(term, rows, g)
            return term.scale * torch.dot((up.T @ g).flatten(), down.flatten())
        case ExpertWeight():
            tau = torch.sub(_load(_rows(term.weight, rows), buffer), b, out=buffer)
        case Difference():
            tau = _load(_rows(term.tau, rows), buffer)
        case Quantised():
            tau = dequantise(term, rows, buffer)
    return torch.dot(g.flatten(), tau.flatten())


def _load(source: Tensor, buffer: Tensor) -> Tensor:
    """`source` in the buffer's dtype and on its device; `source` itself, unread, if it already is."""
    if source.dtype == buffer.dtype and source.device == buffer.device:
        return source
    return buffer.copy_(source)


def _factors(term: LowRank, rows: slice, like: Tensor) -> tuple[Tensor, Tensor]:
    return term.up[rows].to(like), term.down.to(like)


def _block(tensor: Tensor, rows: slice) -> Tensor:
    """A view of these rows of dimension 0; a scalar is one row."""
    return tensor[rows] if tensor.dim() else tensor[None]


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    """These rows of [*S] as [R, W]: a view, or a copy of these rows if the strides allow no view."""
    return _block(tensor, rows).flatten(1) if tensor.dim() > 1 else _block(tensor, rows)[:, None]


def _blocks(tensor: Tensor, chunks: int) -> Iterator[tuple[slice, int]]:
    """Row slices of about BLOCK_ELEMENTS, each inside one chunk, with that chunk's number."""
    step = max(1, BLOCK_ELEMENTS // max(1, tensor.shape[1:].numel()))
    bounds = chunk_bounds(tensor.shape[0] if tensor.dim() else 1, chunks)
    for chunk, (first, last) in enumerate(pairwise(bounds)):
        for row in range(first, last, step):
            yield slice(row, min(row + step, last)), chunk


def _scratch(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A buffer for one block of `tensor`."""
    size = min(tensor.numel(), max(BLOCK_ELEMENTS, tensor.shape[1:].numel()))
    return torch.empty(size, dtype=dtype, device=tensor.device)
