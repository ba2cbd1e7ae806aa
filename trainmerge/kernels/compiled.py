"""Both passes as one fused loop each, compiled by inductor: C++ on a CPU, Triton on a GPU.

One kernel per K, forms and dtypes, for all shapes: a chunk of rows is a flat, contiguous run of elements.
Inductor caches compiled code on disk, in a folder per processor in `TORCHINDUCTOR_CACHE_DIR`, so
that the next process only loads it. Cases that a flat loop does not cover (low-rank and quantised terms,
float64, strides, small tensors, zero coefficients) run eagerly, and so does everything after a failed
compilation.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from types import FunctionType

import torch
from torch import Tensor

import trainmerge.kernels.eager as eager
from trainmerge.kernels.inductor_cache import use_own_cache
from trainmerge.kernels.quantised import Quantised
from trainmerge.kernels.terms import Difference, ExpertWeight, LowRank, Term, rows_of

SMALL = 1 << 15  # elements of a chunk below which the call costs more than the loop saves (measured: 40 us)
ROW = 2048  # products summed in float32, in registers, before float64
PIECE = 1 << 14  # row sums that one thread adds: torch splits a sum of 2^15 and more among threads
NARROW = (torch.float32, torch.bfloat16, torch.float16)

_failed = False  # compilation failed once; do not try again


def weighted_sum(out: Tensor, base: Tensor, terms: Sequence[Term], coefficients: Tensor) -> None:
    """`eager.weighted_sum`, fused."""
    if not _is_flat(out, base, terms, coefficients.shape[1]):
        return eager.weighted_sum(out, base, terms, coefficients)
    weights = coefficients.double().tolist()
    for chunk, rows in enumerate(_chunks(out, coefficients.shape[1])):
        parts = [rows_of(term, rows) for term in terms]
        if not _merge_chunk(out[rows], base[rows], parts, [weight[chunk] for weight in weights]):
            eager.weighted_sum(out[rows], base[rows], parts, coefficients[:, chunk : chunk + 1])
    return None


def inner_products(grad: Tensor, base: Tensor, terms: Sequence[Term], chunks: int) -> Tensor:
    """`eager.inner_products`, fused; bitwise independent of the number of threads."""
    if not _is_flat(grad, base, terms, chunks):
        return eager.inner_products(grad, base, terms, chunks)
    sums = [
        _chunk_products(grad[rows], base[rows], [rows_of(term, rows) for term in terms])
        for rows in _chunks(grad, chunks)
    ]
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


def _chunks(tensor: Tensor, chunks: int) -> Iterator[slice]:
    for first, last in pairwise(eager.chunk_bounds(len(tensor), chunks)):
        yield slice(first, last)


def _merge_chunk(out: Tensor, base: Tensor, terms: Sequence[Term], weights: Sequence[float]) -> bool:
    """One chunk's merge, as differences from the heaviest model; False if a fused loop cannot do it."""
    pairs = list(zip(terms, weights, strict=True))
    models = [(weight, term.weight) for term, weight in pairs if isinstance(term, ExpertWeight)]
    taus = [(weight, term.tau) for term, weight in pairs if isinstance(term, Difference)]
    if not all(weight for weight, _ in models + taus) or not models + taus:
        return False  # terms without weight must not be read
    models.insert(0, (1.0 - sum(weight for weight, _ in models), base))
    anchor = max(range(len(models)), key=lambda i: models[i][0])
    _, origin = models.pop(anchor)
    scales = torch.tensor([weight for weight, _ in models + taus], dtype=torch.float32, device=out.device)
    arguments = out, origin, [model for _, model in models], [tau for _, tau in taus]
    return _run(_merge, *arguments, scales) is not None


def _chunk_products(grad: Tensor, base: Tensor, terms: Sequence[Term]) -> Tensor:
    """<grad, tau_k> of one chunk, [K] in float64."""
    models = [term.weight for term in terms if isinstance(term, ExpertWeight)]
    taus = [term.tau for term in terms if isinstance(term, Difference)]
    whole = grad.numel() // ROW * ROW
    dense = _run(_products, grad, base, models, taus, whole=whole) if models or taus else None
    if dense is None:
        return eager.inner_products(grad, base, terms, 1)[:, 0].double()
    sums = dense.new_zeros(len(terms), dtype=torch.float64)
    places = [
        k for form in (ExpertWeight, Difference) for k, term in enumerate(terms) if isinstance(term, form)
    ]
    sums[places] = _row_sums(dense)
    if whole < grad.numel():  # the remaining elements, one per row
        rest = slice(whole, None)
        flat = [rows_of(_column(term), rest) for term in terms]
        sums += eager.inner_products(grad.view(-1)[rest], base.view(-1)[rest], flat, 1)[:, 0]
    return sums


def _row_sums(rows: Tensor) -> Tensor:
    """Float64 sums of [K, n] -> [K]; one long row in pieces, since torch would split it among threads."""
    if len(rows) > 1:
        return rows.sum(1, dtype=torch.float64)
    return torch.stack([piece.sum(1, dtype=torch.float64) for piece in torch.split(rows, PIECE, dim=1)]).sum(
        0
    )


def _column(term: Term) -> Term:
    """The same term with the elements flattened."""
    match term:
        case Difference(tau):
            return Difference(tau.view(-1))
        case ExpertWeight(weight):
            return ExpertWeight(weight.view(-1))
        case _:
            return term


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


def _run(
    function: Callable[..., Tensor], *arguments: Tensor | list[Tensor], whole: int | None = None
) -> Tensor | None:
    """The fused function of the first `whole` elements of each tensor; None after a failed compilation."""
    global _failed
    if _failed:
        return None
    vectors, scales = arguments[:4], arguments[4:]
    flat = [[_flat(t, whole) for t in v] if isinstance(v, list) else _flat(v, whole) for v in vectors]
    dtypes = [[t.dtype for t in v] if isinstance(v, list) else v.dtype for v in flat]
    try:
        result: Tensor = _fused(function, re.sub(r"\W+", "_", str(dtypes)))(*flat, *scales)
    except torch._dynamo.exc.TorchDynamoException as error:
        _failed = True
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"torch.compile failed ({reason}): merging with eager kernels instead", stacklevel=2)
        return None
    return result


def _flat(tensor: Tensor, size: int | None) -> Tensor:
    """The first `size` elements. `data`, because Dynamo specialises on the base shape of a view."""
    return tensor.view(-1)[:size].data


@cache
def _fused(function: Callable[..., Tensor], dtypes: str) -> Callable[..., Tensor]:
    """`function`, compiled at its first call, once per number of tensors and dtypes."""
    assert isinstance(function, FunctionType)
    use_own_cache()
    # Dynamo counts recompilations per code object; a shared one would soon exceed its limit.
    code = function.__code__.replace(co_name=f"{function.__name__}_{dtypes}")
    own = FunctionType(code, function.__globals__)
    return torch.compile(own, fullgraph=True, dynamic=True, options={"cpp.dynamic_threads": True})
