"""Both passes as hand-written Triton kernels: any number of parameters in one launch.

A table has each segment's addresses (a segment is a chunk of a parameter's rows), and each program processes
one block of one segment, so that hundreds of parameters, including small ones, take one launch. Loads are 16
bytes wide where addresses allow. A term without weight is not read. The inner products are summed in two
stages of a fixed order, without atomics: the same bits in every run.

Checked in Triton's interpreter against eager, and compiled for sm_80 and sm_90; not measured on a GPU yet.

Legend: `K` experts, `C` chunks of one parameter, `S` segments, `P` programs (blocks of segments).
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

import trainmerge.kernels.eager as eager
from trainmerge.kernels.calls import Merge, Product
from trainmerge.kernels.quantised import Quantised
from trainmerge.kernels.terms import Difference, ExpertWeight, LowRank, Term, rows_of
from trainmerge.kernels.triton_device import inner_kernel, merge_kernel, sum_kernel

MERGE_BLOCK, MERGE_WARPS = 1024, 4  # 8 elements per thread: 16 bytes of bfloat16, twice 16 of float32
INNER_BLOCK, INNER_WARPS = 2048, 8  # 8 elements per thread; 16 would spill registers at K = 8
SUM_BLOCK = 256
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Segment(NamedTuple):
    """A chunk's tensors in the order of the table: the merge or the gradient, models, taus."""

    first: Tensor
    models: list[Tensor]  # the origin of the differences is the first
    taus: list[Tensor]
    weights: list[float]  # of models after the first, and of taus

    @property
    def key(self) -> tuple[Any, ...]:
        """Key of segments that share a launch: numbers of tensors, dtypes, 16-byte alignment."""
        tensors = [self.first, *self.models, *self.taus]
        aligned = all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
        return len(self.models), len(self.taus), *(tensor.dtype for tensor in tensors), aligned


def run_merges(merges: Sequence[Merge]) -> None:
    """`eager.weighted_sum` of each call, in one launch per mix of dtypes."""
    groups: dict[tuple[Any, ...], list[Segment]] = {}
    for out, base, terms, coefficients in merges:
        if not is_dense(out, base, terms):
            eager.weighted_sum(out, base, terms, coefficients)
            continue
        weights = coefficients.double().tolist()
        for chunk, rows in enumerate(_chunks(out, coefficients.shape[1])):
            segment = _anchored(out, base, terms, [weight[chunk] for weight in weights], rows)
            groups.setdefault(segment.key, []).append(segment)
    for segments in groups.values():
        _launch_merge(segments)


def run_products(products: Sequence[Product]) -> list[Tensor]:
    """`eager.inner_products` of each call, in two launches per mix of dtypes."""
    ours = [is_dense(p.grad, p.base, p.terms) and p.grad.numel() > 0 for p in products]
    sizes = [len(p.terms) * p.chunks if own else 0 for p, own in zip(products, ours, strict=True)]
    sums = torch.zeros(sum(sizes), device=products[0].grad.device)  # all results, concatenated
    results = []
    groups: dict[tuple[Any, ...], list[tuple[Segment, list[int]]]] = {}
    for product, own, begin, size in zip(products, ours, _starts(sizes), sizes, strict=True):
        if not own:
            results.append(eager.inner_products(*product))
            continue
        results.append(sums[begin : begin + size].view(len(product.terms), product.chunks))
        experts = _dense_experts(product.terms)
        for chunk, segment in enumerate(_segments(product) if experts else []):
            places = [begin + k * product.chunks + chunk for k in experts]
            groups.setdefault(segment.key, []).append((segment, places))
    for members in groups.values():
        found = _launch_inner([segment for segment, _ in members])
        sums[torch.tensor([places for _, places in members], device=sums.device)] = found.T
    return results


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]


def _dense_experts(terms: Sequence[Term]) -> list[int]:
    """Experts in the order of a segment's tensors: models, then differences."""
    forms = (ExpertWeight, Difference)
    return [k for form in forms for k, term in enumerate(terms) if isinstance(term, form)]


def _segments(product: Product) -> Iterator[Segment]:
    grad, base, terms, chunks = product
    for rows in _chunks(grad, chunks):
        models = [term.weight[rows] for term in terms if isinstance(term, ExpertWeight)]
        taus = [term.tau[rows] for term in terms if isinstance(term, Difference)]
        yield Segment(grad[rows], [base[rows], *models], taus, [])


def is_dense(first: Tensor, base: Tensor, terms: Sequence[Term]) -> bool:
    """Whether the kernels support these: contiguous, one device, narrow, one dtype per form, not empty."""
    models = [base, *(term.weight for term in terms if isinstance(term, ExpertWeight))]
    taus = [term.tau for term in terms if isinstance(term, Difference)]
    return (
        first.dim() > 0
        and not any(isinstance(term, LowRank | Quantised) for term in terms)
        and len({tensor.dtype for tensor in models}) == 1
        and len({tensor.dtype for tensor in taus}) <= 1
        and all(
            tensor.is_contiguous() and tensor.dtype in DTYPES and tensor.device == first.device
            for tensor in [first, *models, *taus]
        )
    )


def _chunks(tensor: Tensor, chunks: int) -> list[slice]:
    return [slice(*bounds) for bounds in pairwise(eager.chunk_bounds(len(tensor), chunks))]


def _anchored(out: Tensor, base: Tensor, terms: Sequence[Term], weights: list[float], rows: slice) -> Segment:
    """One chunk's merge as differences from the heaviest model: a one-hot merge is bitwise that expert."""
    pairs = [(rows_of(term, rows), weight) for term, weight in zip(terms, weights, strict=True)]
    models = [(weight, term.weight) for term, weight in pairs if isinstance(term, ExpertWeight)]
    taus = [(weight, term.tau) for term, weight in pairs if isinstance(term, Difference)]
    models.insert(0, (1.0 - sum(weight for weight, _ in models), base[rows]))
    models.insert(0, models.pop(max(range(len(models)), key=lambda i: models[i][0])))
    scales = [weight for weight, _ in models[1:] + taus]
    return Segment(out[rows], [model for _, model in models], [tau for _, tau in taus], scales)


class Launch(NamedTuple):
    """The index tensors of a launch."""

    table: Tensor  # [S, 1 + models + taus] addresses
    sizes: Tensor  # [S] elements
    segments: Tensor  # [P] segment of each program
    blocks: Tensor  # [P] its block in the segment
    bounds: Tensor  # [S + 1] each segment's first program


def _plan(segments: Sequence[Segment], block: int) -> Launch:
    device = segments[0].first.device
    table = [[t.data_ptr() for t in (segment.first, *segment.models, *segment.taus)] for segment in segments]
    sizes = torch.tensor([segment.first.numel() for segment in segments])
    counts = (sizes + block - 1) // block
    owner = torch.repeat_interleave(torch.arange(len(segments)), counts)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    blocks = torch.arange(len(owner)) - bounds[owner]
    return Launch(*(t.to(device) for t in (torch.tensor(table), sizes, owner, blocks, bounds)))


def constants(one: Segment) -> dict[str, Any]:
    """The constants that a launch's kernel is compiled for."""
    aligned = one.key[-1]
    return {
        "MODELS": len(one.models) - 1,
        "TAUS": len(one.taus),
        "FIRST": DTYPES[one.first.dtype],
        "MODEL": DTYPES[one.models[0].dtype],
        "TAU": DTYPES[one.taus[0].dtype] if one.taus else tl.float32,
        "ALIGN": 16 if aligned else 2,
    }


def _launch_merge(segments: Sequence[Segment]) -> None:
    plan = _plan(segments, MERGE_BLOCK)
    if not len(plan.segments):
        return
    weights = torch.tensor([segment.weights for segment in segments], dtype=torch.float32).to(
        plan.table.device
    )
    merge_kernel[(len(plan.segments),)](
        *plan[:4], weights, **constants(segments[0]), BLOCK=MERGE_BLOCK, num_warps=MERGE_WARPS
    )


def _launch_inner(segments: Sequence[Segment]) -> Tensor:
    """-> [K, S] float32."""
    plan = _plan(segments, INNER_BLOCK)
    experts = len(segments[0].models) - 1 + len(segments[0].taus)
    partials = torch.empty(experts, len(plan.segments), dtype=torch.float32, device=plan.table.device)
    sums = torch.empty(experts, len(segments), dtype=torch.float32, device=plan.table.device)
    inner_kernel[(len(plan.segments),)](
        *plan[:4], partials, **constants(segments[0]), BLOCK=INNER_BLOCK, num_warps=INNER_WARPS
    )
    sum_kernel[(len(segments), experts)](partials, plan.bounds, sums, len(plan.segments), BLOCK=SUM_BLOCK)
    return sums
