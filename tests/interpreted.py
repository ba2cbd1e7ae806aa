"""The Triton kernels in Triton's interpreter, against eager.

`TRITON_INTERPRET=1 python -m tests.interpreted`, a process of its own: Triton reads that variable when a
kernel is defined.
"""

from unittest.mock import patch

import torch
from torch import nn

from tests.bounds import assert_within
from tests.contracts import (
    assert_delta_contract,
    assert_inner_is_exact,
    assert_same_bits,
    inner_bound,
    merge,
    merge_bound,
)
from tests.gpu.contract import random_delta
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.kernels import (
    Difference,
    ExpertWeight,
    LowRank,
    Merge,
    Product,
    Quantised,
    Term,
    Untouched,
    calls,
    eager,
    run_merges,
    run_products,
    shareable,
    triton_kernels,
    using,
)
from trainmerge.kernels.triton_segments import supported
from trainmerge.model.merged_model import MergedModel
from trainmerge.model.residency import Residency
from trainmerge.task_vectors.delta import Delta, TaskVectors

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


def check_tiles() -> None:
    """Integers and factors beside dense terms: whole and partial tiles, widths and ranks of every divisor."""
    forms = [LowRank, ExpertWeight, Quantised, Untouched, Difference]
    for shape, rank, dtype in (
        ([40, 144], 8, torch.float32),
        ([37, 19], 21, torch.float32),
        ([5, 3, 2], 1, torch.float16),
    ):
        delta = random_delta(shape, forms, torch.empty(0, dtype=dtype), rank=rank)
        assert supported(delta.base, delta.base, delta.terms)
        assert_delta_contract(delta, 2, GENERATOR)
    for form in (LowRank, Quantised):
        one_scale = random_delta([20, 32], [form] * 2, torch.empty(0))
        if form is Quantised:
            terms = tuple(Quantised(term.codes, term.scale[:1]) for term in one_scale.terms)
            dense = [Difference(term.codes * term.scale) for term in terms]
            merged = merge(Delta(one_scale.base, terms), torch.ones(2, 1))
            with using("eager"):
                want = merge(Delta(one_scale.base, tuple(dense)), torch.ones(2, 1))
            assert_within(
                merged, want, 2 * merge_bound(Delta(one_scale.base, tuple(dense)), torch.ones(2, 1))
            )
        assert_delta_contract(one_scale, 3, GENERATOR)


def check_bfloat16() -> None:
    """Into float32 weights: the interpreter truncates to bfloat16, where a GPU rounds (the PTX says so)."""
    delta, coefficients = make([40, 60], torch.bfloat16), torch.randn(4, 2, generator=GENERATOR)
    merged = merge(delta, coefficients, torch.float32)
    with using("eager"):
        bound = 2 * merge_bound(delta, coefficients, torch.float32)
        assert_within(merged, merge(delta, coefficients, torch.float32), bound)
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
    merges = [Merge(o, d.base, d.terms, c) for o, d, c in zip(outs, deltas, coefficients, strict=True)]
    assert [shareable(merge, held=True) for merge in merges] == [1] * 4
    with patch.object(triton_kernels, "eager", None):  # nothing falls back to it
        run_merges(merges)
    for delta, (out, base, terms, c) in zip(deltas, merges, strict=True):
        want = torch.empty_like(out)
        eager.weighted_sum(want, base, terms, c)
        assert_within(out, want, 2 * merge_bound(delta, c))
    products = [Product(torch.randn(m.out.shape), m.base, m.terms, m.coefficients.shape[1]) for m in merges]
    assert [shareable(product, held=True) for product in products] == [p.grad.nbytes for p in products]
    with patch.object(triton_kernels, "eager", None):
        all_found = run_products(products)
    for delta, product, found in zip(deltas, products, all_found, strict=True):
        bound = 2 * inner_bound(delta, product.grad, product.chunks)
        assert_within(found, eager.inner_products(*product), bound)


def check_a_fit_launches_few(launched: list[int]) -> None:
    """A model's parameters share launches, in the merge and in the gradient, whether kept or not."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(9)])
    deltas = {name: make(list(p.shape), p.dtype, [ExpertWeight] * 2) for name, p in model.named_parameters()}
    vectors = TaskVectors(("a", "b"), deltas)
    coefficients = Coefficients(vectors.experts, Grouping("tensor").layout(vectors.shapes), 0.3)
    merged = MergedModel(model, vectors, coefficients)

    def gradient() -> torch.Tensor:
        merged.materialise()
        for _ in range(2):
            merged.module(torch.ones(3, 6)).square().sum().backward()
        return merged.gradient()

    with using("eager"):
        want = gradient()
    for merged.keep_gradients, segments in ((False, 36), (True, 18)):
        launched.clear()
        torch.testing.assert_close(gradient(), want, rtol=1e-4, atol=1e-5)
        assert launched == [18, segments], launched  # one launch a pass
    launched.clear()
    with patch.object(calls, "LAUNCH", 600):  # bytes: a weight's 6 x 6 x 4 of each of four, and its bias's
        merged.materialise()
    assert launched == [2] * 9, launched
    launched.clear()
    held = merged.with_task_vectors(vectors, {}, True, Residency(dict.fromkeys(deltas, "device")))
    with patch.object(calls, "LAUNCH", 600):
        held.materialise()
    assert launched == [18], launched  # what stays on the device does not fill the queue


def counted(*names: str) -> list[int]:
    """How many segments each later launch had."""
    launched: list[int] = []
    for name in names:
        launch = getattr(triton_kernels, name)
        setattr(triton_kernels, name, lambda s, run=launch: (launched.append(len(s)), run(s))[1])
    return launched


def main() -> None:
    """All of it; raises AssertionError."""
    launched = counted("_launch_merge", "_launch_inner")
    with using("triton"):
        check_contract()
        check_tiles()
        check_bfloat16()
        check_many_at_once()
        check_a_fit_launches_few(launched)
    print("interpreted as eager")


if __name__ == "__main__":
    main()
