"""Chunks of parameters as rows of a launch's table: their tensors, and what a kernel is compiled for.

Legend: `K` experts, `C` chunks of one parameter.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import triton.language as tl
from torch import Tensor

import trainmerge.kernels.eager as eager
from trainmerge.kernels.calls import Merge, Product
from trainmerge.kernels.quantised import Quantised
from trainmerge.kernels.terms import Difference, ExpertWeight, LowRank, Term, rows_of

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
FORMS = (ExpertWeight, Difference, Quantised, LowRank)  # the order of a segment's experts
Form = TypeVar("Form", ExpertWeight, Difference, Quantised, LowRank)


class Segment(NamedTuple):
    """A chunk's tensors in the order of the table: the merge or the gradient, models, other terms."""

    first: Tensor
    models: list[Tensor]  # the origin of the differences is the first
    taus: list[Tensor]
    codes: list[Quantised]
    lows: list[LowRank]
    weights: list[float]  # of models after the first, and of the other terms

    @property
    def tiled(self) -> bool:
        """Whether it needs the kernels of tiles."""
        return bool(self.codes or self.lows)

    @property
    def key(self) -> tuple[Any, ...]:
        """Key of segments that share a launch: numbers of tensors, dtypes, 16-byte alignment, divisors."""
        tensors = [self.first, *self.models, *self.taus]
        counts = len(self.models), len(self.taus), len(self.codes), len(self.lows)
        dtypes = *(tensor.dtype for tensor in tensors), *(low.up.dtype for low in self.lows[:1])
        aligned = _aligned([*tensors, *(code.codes for code in self.codes)])
        steps = (self.step, self.rank_step) if self.tiled else ()
        return *counts, *dtypes, *steps, aligned

    @property
    def width(self) -> int:
        """Weights of a row."""
        return self.first[0].numel() if len(self.first) else 0

    @property
    def step(self) -> int:
        """Known divisor of the width; with 16, the rows of every tensor begin at whole 16 bytes."""
        return 1 if self.width % 16 else 16

    @property
    def rank_step(self) -> int:
        """Known divisor of the ranks, so that the rows of 16-bit factors begin at whole 16 bytes."""
        whole = all(low.up.shape[1] % 8 == 0 for low in self.lows)
        return 8 if whole and _aligned([part for low in self.lows for part in low[:2]]) else 1

    def row(self) -> list[int]:
        """Addresses and sizes, as the kernels' docstrings say."""
        dense = [tensor.data_ptr() for tensor in (self.first, *self.models, *self.taus)]
        if not self.tiled:
            return [*dense, self.first.numel()]
        codes = [code[i].data_ptr() for i in (0, 1) for code in self.codes]
        factors = [low[i].data_ptr() for i in (0, 1) for low in self.lows]  # type: ignore[union-attr]
        strides = [int(len(code.scale) > 1) for code in self.codes]
        ranks = [low.up.shape[1] // self.rank_step for low in self.lows]
        return [*dense, *codes, *factors, len(self.first), self.width // self.step, *strides, *ranks]

    def constants(self) -> dict[str, Any]:
        """The constants that a launch's kernel is compiled for."""
        aligned = self.key[-1]
        found = {
            "MODELS": len(self.models) - 1,
            "TAUS": len(self.taus),
            "FIRST": DTYPES[self.first.dtype],
            "MODEL": DTYPES[self.models[0].dtype],
            "TAU": DTYPES[self.taus[0].dtype] if self.taus else tl.float32,
            "ALIGN": 16 if aligned else 1 if self.tiled else 2,
        }
        if self.tiled:
            factor = DTYPES[self.lows[0].up.dtype] if self.lows else tl.float32
            found |= {"CODES": len(self.codes), "LOWS": len(self.lows), "FACTOR": factor}
            found |= {"STEP": self.step, "RANK_STEP": self.rank_step}
        return found


def supported(first: Tensor, base: Tensor, terms: Sequence[Term]) -> bool:
    """Whether the kernels do these: contiguous, one device, narrow, one dtype per form, codes of a byte."""
    models = [base, *(term.weight for term in terms if isinstance(term, ExpertWeight))]
    taus = [term.tau for term in terms if isinstance(term, Difference)]
    factors = [part for low in _of(terms, LowRank) for part in (low.up, low.down)]
    codes = _of(terms, Quantised)
    return (
        first.dim() > 0
        and all(len({t.dtype for t in of_form}) <= 1 for of_form in (models, taus, factors))
        and all(tensor.dtype in DTYPES for tensor in [first, *models, *taus, *factors])
        and all(code.codes.dtype == torch.int8 and code.scale.dtype == torch.float32 for code in codes)
        and all(
            tensor.is_contiguous() and tensor.device == first.device
            for tensor in [first, *models, *taus, *factors, *(part for code in codes for part in code)]
        )
    )


def experts_in_order(terms: Sequence[Term]) -> list[int]:
    """Experts in the order of a segment's tensors."""
    return [k for form in FORMS for k, term in enumerate(terms) if isinstance(term, form)]


def segments_of(product: Product) -> Iterator[Segment]:
    """Each chunk's; `weights` are what the inner products are multiplied by."""
    grad, base, terms, chunks = product
    for rows in chunks_of(grad, chunks):
        own = [rows_of(term, rows) for term in terms]
        models = [base[rows], *(term.weight for term in _of(own, ExpertWeight))]
        taus, codes, lows = (
            [term.tau for term in _of(own, Difference)],
            _of(own, Quantised),
            _of(own, LowRank),
        )
        scales = [1.0] * (len(models) - 1 + len(taus) + len(codes)) + [low.scale for low in lows]
        yield Segment(grad[rows], models, taus, codes, lows, scales)


def merges_of(merge: Merge) -> Iterator[Segment]:
    """Each chunk's, as differences from its heaviest model: a one-hot merge is bitwise that expert."""
    out, base, terms, coefficients = merge
    table = coefficients.double().tolist()
    for chunk, rows in enumerate(chunks_of(out, coefficients.shape[1])):
        weights = [weight[chunk] for weight in table]
        own = [rows_of(term, rows) for term in terms]
        by_form = {
            form: [(weights[k], term) for k, term in enumerate(own) if isinstance(term, form)]
            for form in FORMS
        }
        models = [(weight, term.weight) for weight, term in by_form[ExpertWeight]]  # type: ignore[union-attr]
        models.insert(0, (1.0 - sum(weight for weight, _ in models), base[rows]))
        models.insert(0, models.pop(max(range(len(models)), key=lambda i: models[i][0])))
        scales = [weight for weight, _ in models[1:]]
        scales += [weight for form in (Difference, Quantised) for weight, _ in by_form[form]]
        scales += [weight * term.scale for weight, term in by_form[LowRank]]  # type: ignore[union-attr]
        taus, codes, lows = [t.tau for t in _of(own, Difference)], _of(own, Quantised), _of(own, LowRank)
        yield Segment(out[rows], [model for _, model in models], taus, codes, lows, scales)


def chunks_of(tensor: Tensor, chunks: int) -> list[slice]:
    """The rows of each chunk."""
    return [slice(*bounds) for bounds in pairwise(eager.chunk_bounds(len(tensor), chunks))]


def _of(terms: Sequence[Term], form: type[Form]) -> list[Form]:
    return [term for term in terms if isinstance(term, form)]


def _aligned(tensors: Sequence[Tensor]) -> bool:
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
