"""The Triton kernels in Triton's interpreter, against eager.

`TRITON_INTERPRET=1 python -m tests.interpreted`, a process of its own: Triton reads that variable when a
kernel is defined.
"""

import torch

from tests.contracts import assert_delta_contract, assert_inner_is_exact, assert_same_bits, merge
from trainmerge.kernels import (
    Difference,
    ExpertWeight,
    LowRank,
    Term,
    Untouched,
    eager,
    triton_kernels,
    using,
)
from trainmerge.task_vectors import Delta

MIX = [ExpertWeight, Difference, Untouched, ExpertWeight]
GENERATOR = torch.Generator().manual_seed(0)


def make(shape: list[int], dtype: torch.dtype, forms: list[type] = MIX) -> Delta:
    """A random parameter; see `MIX` for the forms of its terms."""
    base = torch.randn(shape, generator=GENERATOR).to(dtype)

    def term(form: type) -> Term:
        near = 1e-2 * torch.randn(shape, generator=GENERATOR)
        if form is ExpertWeight:
            return ExpertWeight((base + near).to(dtype))
        return Difference(near.to(dtype)) if form is Difference else Untouched()

    return Delta(base, tuple(term(form) for form in forms))


def check_contract() -> None:
    """Aligned and unaligned chunks, whole and partial blocks, float32 and float16."""
    for shape, chunks, dtype in (
        ([33, 31], 3, torch.float32),
        ([7], 1, torch.float32),
        ([40, 31], 3, torch.float16),
    ):
        assert_delta_contract(make(shape, dtype), chunks, GENERATOR)


def check_bfloat16() -> None:
    """Into float32 weights: the interpreter truncates to bfloat16, where a GPU rounds (the PTX says so)."""
    delta, coefficients = make([40, 60], torch.bfloat16), torch.randn(4, 2, generator=GENERATOR)
    merged = merge(delta, coefficients, torch.float32)
    with using("eager"):
        torch.testing.assert_close(merged, merge(delta, coefficients, torch.float32))
    assert_inner_is_exact(delta, torch.randn(delta.shape, generator=GENERATOR).bfloat16(), 2)
    assert_same_bits(merge(delta, torch.eye(4)[:, 3:]), delta.terms[3].weight)


def check_many_at_once() -> None:
    """Parameters of several shapes, dtypes and forms, a low-rank one among them."""
    forms = (MIX, MIX, [ExpertWeight] * 4)
    deltas = [
        make(shape, torch.float32, form) for shape, form in zip(([50, 30], [9], [20, 8]), forms, strict=True)
    ]
    low = torch.randn(8, 2, generator=GENERATOR), torch.randn(2, 5, generator=GENERATOR)
    deltas.append(Delta(torch.zeros(8, 5), (LowRank(*low, 0.5), *[Untouched()] * 3)))
    coefficients = [torch.randn(4, chunks, generator=GENERATOR) for chunks in (3, 1, 1, 2)]
    outs = [torch.empty(delta.shape) for delta in deltas]
    given = [(o, d.base, d.terms, c) for o, d, c in zip(outs, deltas, coefficients, strict=True)]
    triton_kernels.weighted_sums(given)
    for out, base, terms, c in given:
        want = torch.empty_like(out)
        eager.weighted_sum(want, base, terms, c)
        torch.testing.assert_close(out, want)


def main() -> None:
    """All of it; raises AssertionError."""
    with using("triton"):
        check_contract()
        check_bfloat16()
        check_many_at_once()
    print("interpreted as eager")


if __name__ == "__main__":
    main()
