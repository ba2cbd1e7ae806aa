"""Both passes as one fused loop each, compiled by inductor: C++ on a CPU, Triton on a GPU.

One kernel per K, forms and dtypes, for all shapes: a chunk of rows is a flat, contiguous run of elements.
Inductor caches compiled code on disk, in a folder per processor in `TORCHINDUCTOR_CACHE_DIR`, so
that the next process only loads it. Cases that a flat loop does not cover (low-rank and quantised terms,
float64, strides, small tensors, zero coefficients) run eagerly, and so does everything after a failed
compilation.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from types import FunctionType
from typing import NamedTuple

import torch
from torch import Tensor

import trainmerge.kernels.eager as eager
from trainmerge.kernels.inductor_cache import use_own_cache
from trainmerge.kernels.quantised import Quantised
from trainmerge.kernels.terms import Difference, ExpertWeight, LowRank, Term, Untouched

SMALL = 1 << 15  # elements of a chunk below which the call costs more than the loop saves (measured: 40 us)
ROW = 2048  # products summed in float32, in registers, before float64
PIECE = 1 << 14  # row sums that one thread adds: torch splits a sum of 2^15 and more among threads
NARROW = (torch.float32, torch.bfloat16, torch.float16)

_failed = False  # compilation failed once; do not try again


class _Flat(NamedTuple):
    """Contiguous runs of n elements: a parameter, or one chunk of its rows."""

    first: Tensor  # [n]: the merge, or the gradient
    base: Tensor  # [n]; of a merge, the model that the others differ from
    models: list[Tensor]  # of `ExpertWeight`
    taus: list[Tensor]  # of `Difference`
    order: list[int]  # the terms' places: models first, then taus

    @staticmethod
    def of(first: Tensor, base: Tensor, terms: Sequence[Term]) -> "_Flat":
        """The whole parameter."""
        models = {k: _flat(term.weight) for k, term in enumerate(terms) if isinstance(term, ExpertWeight)}
        taus = {k: _flat(term.tau) for k, term in enumerate(terms) if isinstance(term, Difference)}
        return _Flat(_flat(first), _flat(base), [*models.values()], [*taus.values()], [*models, *taus])

    def part(self, run: slice) -> "_Flat":
        """Some of the elements."""
        models, taus = ([_flat(tensor[run]) for tensor in own] for own in (self.models, self.taus))
        return _Flat(_flat(self.first[run]), _flat(self.base[run]), models, taus, self.order)

    def terms(self, experts: int) -> list[Term]:
        """The terms of all experts, for an eager kernel."""
        own: list[Term] = [*map(ExpertWeight, self.models), *map(Difference, self.taus)]
        placed = dict(zip(self.order, own, strict=True))
        return [placed.get(k, Untouched()) for k in range(experts)]


def weighted_sum(out: Tensor, base: Tensor, terms: Sequence[Term], coefficients: Tensor) -> None:
    """`eager.weighted_sum`, fused."""
    chunks = coefficients.shape[1]
    if not _is_flat(out, base, terms, chunks):
        return eager.weighted_sum(out, base, terms, coefficients)
    weights = coefficients.double().tolist()
    for chunk, own in enumerate(_chunks(out, base, terms, chunks)):
        if not _merge_chunk(own, [weights[k][chunk] for k in own.order]):
            eager.weighted_sum(own.first, own.base, own.terms(len(terms)), coefficients[:, chunk : chunk + 1])
    return None


def inner_products(grad: Tensor, base: Tensor, terms: Sequence[Term], chunks: int) -> Tensor:
    """`eager.inner_products`, fused; bitwise independent of the number of threads."""
    if not _is_flat(grad, base, terms, chunks):
        return eager.inner_products(grad, base, terms, chunks)
    sums: list[Tensor] = []
    for own in _chunks(grad, base, terms, chunks):
        if (found := _chunk_products(own, len(terms))) is None:
            return eager.inner_products(grad, base, terms, chunks)
        sums.append(found)
    return torch.stack(sums, dim=1).to(torch.float32)


def _is_flat(first: Tensor, base: Tensor, terms: Sequence[Term], chunks: int) -> bool:
    """All dense, contiguous, on one device, no wider than float32, large enough."""
    if any(isinstance(term, LowRank | Quantised) for term in terms):
        return False
    tensors = [first, base, *(part for term in terms for part in term if isinstance(part, Tensor))]
    if {torch.bfloat16, torch.float16} <= {tensor.dtype for tensor in tensors}:
        return False  # inductor does not compile a loop with both
    return first.numel() >= SMALL * chunks and all(
        tensor.is_contiguous() and tensor.dtype in NARROW and tensor.device == first.device
        for tensor in tensors
    )


def _chunks(first: Tensor, base: Tensor, terms: Sequence[Term], chunks: int) -> Iterator[_Flat]:
    whole = _Flat.of(first, base, terms)
    if chunks == 1:
        yield whole
        return
    width = first.numel() // len(first)
    for start, stop in pairwise(eager.chunk_bounds(len(first), chunks)):
        yield whole.part(slice(start * width, stop * width))


def _merge_chunk(own: _Flat, weights: Sequence[float]) -> bool:
    """One chunk's merge, as differences from the heaviest model; False if a fused loop cannot do it."""
    if not weights or not all(weights):
        return False  # terms without weight must not be read
    of_models = weights[: len(own.models)]
    models = [(1.0 - sum(of_models), own.base), *zip(of_models, own.models, strict=True)]
    _, origin = models.pop(max(range(len(models)), key=lambda i: models[i][0]))
    scales = [weight for weight, _ in models] + [*weights[len(of_models) :]]
    taken = own._replace(base=origin, models=[model for _, model in models])
    return _run(_merge, taken, torch.tensor(scales, dtype=torch.float32, device=origin.device)) is not None


def _chunk_products(own: _Flat, experts: int) -> Tensor | None:
    """<grad, tau_k> of one chunk, [K] in float64; None if a fused loop cannot do it."""
    size = own.first.numel()
    whole = size // ROW * ROW
    rows = _run(_products, own if whole == size else own.part(slice(whole))) if own.order else None
    if rows is None:
        return None
    sums = rows.new_zeros(experts, dtype=torch.float64)
    sums[own.order] = _row_sums(rows)
    if whole < size:  # the remaining elements, one per row
        rest = own.part(slice(whole, None))
        sums += eager.inner_products(rest.first, rest.base, rest.terms(experts), 1)[:, 0]
    return sums


def _row_sums(rows: Tensor) -> Tensor:
    """Float64 sums of [K, n] -> [K]; one long row in pieces, since torch would split it among threads."""
    if len(rows) > 1:
        return rows.sum(1, dtype=torch.float64)
    return torch.stack([piece.sum(1, dtype=torch.float64) for piece in torch.split(rows, PIECE, dim=1)]).sum(
        0
    )


def _merge(out: Tensor, origin: Tensor, models: list[Tensor], taus: list[Tensor], scales: Tensor) -> Tensor:
    """Out [n] = origin + sum scales (model - origin) + sum scales tau."""
    start = origin.float()
    total = start
    for i, model in enumerate(models):
        total = total + scales[i] * (model.float() - start)
    for i, tau in enumerate(taus, len(models)):
        total = total + scales[i] * tau.float()
    return out.copy_(total)


def _products(grad: Tensor, base: Tensor, models: list[Tensor], taus: list[Tensor]) -> Tensor:
    """<grad, model - base> and <grad, tau> of every ROW elements -> [K, n / ROW]; reads each once."""
    g, b = grad.view(-1, ROW).float(), base.view(-1, ROW).float()
    products = [(g * (model.view(-1, ROW).float() - b)).sum(1) for model in models]
    products += [(g * tau.view(-1, ROW).float()).sum(1) for tau in taus]
    return torch.stack(products)


def _run(function: Callable[..., Tensor], own: _Flat, *scales: Tensor) -> Tensor | None:
    """The fused function; None after a failed compilation."""
    global _failed
    if _failed:
        return None
    vectors = own.first, own.base, own.models, own.taus
    dtypes = tuple(tensor.dtype for tensor in (*vectors[:2], *own.models, *own.taus))
    try:
        result: Tensor = _fused(function, len(own.models), dtypes)(*vectors, *scales)
    except torch._dynamo.exc.TorchDynamoException as error:
        _failed = True
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"torch.compile failed ({reason}): merging with eager kernels instead", stacklevel=2)
        return None
    return result


def _flat(tensor: Tensor) -> Tensor:
    """Its elements. `data`, because Dynamo specialises on the base shape of a view."""
    return tensor.view(-1).data


@cache
def _fused(
    function: Callable[..., Tensor], models: int, dtypes: tuple[torch.dtype, ...]
) -> Callable[..., Tensor]:
    """`function`, compiled at its first call, once per number of tensors and dtypes."""
    assert isinstance(function, FunctionType)
    use_own_cache()
    # Dynamo counts recompilations per code object; a shared one would soon exceed its limit.
    kinds = "_".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    code = function.__code__.replace(co_name=f"{function.__name__}_{models}_{kinds}")
    own = FunctionType(code, function.__globals__)
    return torch.compile(own, fullgraph=True, dynamic=True, options={"cpp.dynamic_threads": True})
