"""Both passes against a dense float64 reference.

Legend: `K` experts, `C` chunks of one parameter, `*S` parameter shape.
"""

import pytest
import torch

from tests.bounds import assert_within
from tests.contracts import (
    assert_delta_contract,
    assert_inner_is_exact,
    assert_merge_is_exact,
    assert_same_bits,
    inner_bound,
    merge,
    merge_bound,
    true_merge,
)
from trainmerge.kernels import (
    Difference,
    ExpertWeight,
    LowRank,
    Untouched,
    accumulation_dtype,
    chunk_bounds,
    eager,
    inner_products,
    weighted_sum,
)
from trainmerge.task_vectors.delta import Delta

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [[], [1], [7], [5, 3], [64, 33], [130, 2000], [6, 4, 5], [1, 9]]
MIXES = {
    "differences": [Difference] * 3,
    "experts": [ExpertWeight] * 3,
    "low-rank": [LowRank] * 3,
    "untouched": [Untouched] * 2,
    "mixed": [Difference, ExpertWeight, LowRank, Untouched, ExpertWeight, LowRank],
    "one": [ExpertWeight],
}


def some_chunks(shape):
    rows = shape[0] if shape else 1
    if rows > 100:
        return [3, rows]
    return sorted({1, min(2, rows), min(3, rows), max(1, rows - 1), rows})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_contract(random_delta, generator, mix, shape, dtype):
    delta = random_delta(shape, MIXES[mix], dtype)
    for chunks in some_chunks(shape):
        assert_delta_contract(delta, chunks, generator)


@pytest.mark.parametrize("block", [1, 7, 40, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_block_size(random_delta, generator, monkeypatch, dtype, block):
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", block)
    for shape in ([], [7], [23, 10], [6, 4, 5]):
        delta = random_delta(shape, MIXES["mixed"], dtype)
        for chunks in some_chunks(shape):
            assert_delta_contract(delta, chunks, generator)


def test_block_boundaries_do_not_move_the_merge(random_delta, generator, monkeypatch):
    """Elementwise terms give the same bits however the rows are cut."""
    delta = random_delta([50, 12], [Difference, ExpertWeight, ExpertWeight], torch.bfloat16)
    coefficients = torch.rand(3, 4, generator=generator)
    whole = merge(delta, coefficients)
    for block in (1, 12, 60, 100):
        monkeypatch.setattr(eager, "BLOCK_ELEMENTS", block)
        assert_same_bits(merge(delta, coefficients), whole)


def test_a_tensor_larger_than_a_block(random_delta, generator):
    delta = random_delta([600, 1001], MIXES["mixed"])
    assert delta.base.numel() > 2 * eager.BLOCK_ELEMENTS
    assert_delta_contract(delta, 1, generator)
    assert_delta_contract(delta, 7, generator)


def test_a_row_longer_than_a_block(random_delta, generator, monkeypatch):
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", 16)
    assert_delta_contract(random_delta([3, 50], MIXES["mixed"]), 2, generator)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_chunks_are_the_whole(random_delta, generator, mix, dtype):
    delta = random_delta([65, 33], MIXES[mix], dtype)
    whole = torch.randn(len(delta.terms), 1, generator=generator)
    grad = torch.randn(65, 33, generator=generator).to(dtype)
    for chunks in (2, 5, 64, 65):
        merged = merge(delta, whole.expand(-1, chunks))
        if not any(isinstance(term, LowRank) for term in delta.terms):
            assert_same_bits(merged, merge(delta, whole))
        assert_within(merged, merge(delta, whole), 2 * merge_bound(delta, whole))
        parts, bound = delta.inner(grad, chunks), inner_bound(delta, grad, 1)
        assert_within(parts.double().sum(1, keepdim=True), delta.inner(grad, 1), 2 * bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linear_in_the_coefficients(random_delta, generator, dtype):
    delta = random_delta([40, 9], MIXES["mixed"], dtype)
    a, b = torch.randn(2, 6, 3, generator=generator, dtype=dtype)
    base = delta.base
    both = merge(delta, 2 * a - 3 * b)
    apart = base + 2 * (merge(delta, a) - base) - 3 * (merge(delta, b) - base)
    bounds = [merge_bound(delta, c) for c in (2 * a - 3 * b, a, b)]
    outside = 8 * torch.finfo(dtype).eps * (both.abs() + apart.abs() + base.abs())  # of `apart` itself
    assert_within(both, apart, bounds[0] + 2 * bounds[1] + 3 * bounds[2] + outside)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [[7], [64, 33], [6, 4, 5]], ids=str)
def test_low_rank_is_its_dense(random_delta, generator, shape, dtype):
    low_rank = random_delta(shape, [LowRank, LowRank], dtype)
    dense = Delta(low_rank.base, tuple(Difference(tau) for tau in low_rank.dense()))
    coefficients = torch.randn(2, 3, generator=generator)
    grad = torch.randn(shape, generator=generator).to(dtype)
    working = accumulation_dtype(dtype)
    assert_within(
        merge(low_rank, coefficients, working),
        merge(dense, coefficients, working),
        2 * merge_bound(low_rank, coefficients, working),
    )
    assert_within(low_rank.inner(grad, 3), dense.inner(grad, 3), 2 * inner_bound(low_rank, grad, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_hot_keeps_an_expert_that_is_much_smaller_than_the_base(generator, dtype):
    """base + (expert - base) loses most of its bits here; the pass must not."""
    base = 1000 * torch.randn(31, 5, generator=generator).to(dtype)
    small = [(1e-3 * torch.randn(31, 5, generator=generator)).to(dtype) for _ in range(2)]
    naive = base.float() + (small[1].float() - base.float())
    assert dtype == torch.float64 or (naive.to(dtype) != small[1]).float().mean() > 0.4
    delta = Delta(
        base, (ExpertWeight(small[0]), ExpertWeight(small[1]), LowRank(base[:, :2], base[:2], 1e-4))
    )
    for chunks in (1, 4):
        for k in (0, 1):
            one_hot = torch.eye(3)[:, k : k + 1].expand(3, chunks)
            assert_same_bits(merge(delta, one_hot), small[k])
    assert_merge_is_exact(delta, torch.tensor([[0.2], [0.7], [0.5]]))


def test_one_hot_in_one_chunk_only(random_delta):
    delta = random_delta([10, 4], [ExpertWeight, ExpertWeight], torch.bfloat16)
    merged = merge(delta, torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    assert_same_bits(merged[:4], delta.terms[0].weight[:4])
    assert_same_bits(merged[4:7], delta.base[4:7])
    assert_same_bits(merged[7:], delta.terms[1].weight[7:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_coefficient_reads_nothing(dtype):
    """The base's -0 stays, and an expert that overflowed does no harm where it has no weight."""
    base = torch.tensor([[-0.0, 1.0], [2.0, -0.0]], dtype=dtype)
    bad = torch.full_like(base, float("inf"))
    delta = Delta(base, (Difference(bad), ExpertWeight(bad), LowRank(bad, bad, 1.0), Difference(base)))
    assert_same_bits(merge(delta, torch.zeros(4, 1)), base)
    torch.testing.assert_close(merge(delta, torch.tensor([[0.0], [0.0], [0.0], [1.0]])), 2 * base)


def test_one_rounding(random_delta, generator):
    """Eight experts summed in bfloat16 would be off by several units in the last place."""
    delta = random_delta([40, 40], [Difference] * 8, torch.bfloat16, size=1.0)
    coefficients = torch.rand(8, 1, generator=generator)
    want = true_merge(delta, coefficients).to(torch.bfloat16)
    assert (merge(delta, coefficients) == want).float().mean() > 0.999
    naive = delta.base.clone()
    for term, c in zip(delta.terms, coefficients, strict=True):
        naive += c.bfloat16() * term.tau
    assert (naive == want).float().mean() < 0.9


@pytest.mark.parametrize(
    ("out_dtype", "base_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
)
def test_weights_in_another_dtype_than_the_files(random_delta, generator, out_dtype, base_dtype):
    delta = random_delta([20, 6], MIXES["mixed"], base_dtype)
    coefficients = torch.randn(6, 2, generator=generator)
    want = true_merge(delta, coefficients)
    assert_within(merge(delta, coefficients, out_dtype), want, merge_bound(delta, coefficients, out_dtype))
    assert_same_bits(merge(delta, torch.zeros(6, 2), out_dtype), delta.base.to(out_dtype))
    grad = torch.randn(20, 6, generator=generator).to(out_dtype)
    assert_inner_is_exact(delta, grad, 2)


def test_terms_in_another_dtype_than_the_base(generator):
    """A full expert in bfloat16, an adapter in float16 and a float32 difference on a float16 base."""
    noise = torch.randn(5, 12, 7, generator=generator)
    terms = (
        ExpertWeight(noise[0].bfloat16()),
        Difference(noise[1]),
        LowRank(noise[2][:, :2].half(), noise[3][:2].half(), 0.5),
    )
    delta = Delta(noise[4].half(), terms)
    assert_delta_contract_without_one_hot(delta, generator)
    one_hot = torch.tensor([[1.0], [0.0], [0.0]])
    assert_same_bits(merge(delta, one_hot, torch.float32), terms[0].weight.float())


def assert_delta_contract_without_one_hot(delta, generator):
    coefficients = torch.randn(len(delta.terms), 3, generator=generator)
    assert_merge_is_exact(delta, coefficients)
    assert_inner_is_exact(delta, torch.randn(delta.shape, generator=generator), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_any_strides(random_delta, generator, dtype):
    for shape in ([8, 6], [4, 6, 5], [2, 3, 4, 5]):
        delta = random_delta(shape, MIXES["mixed"], dtype)
        plain = torch.randn(shape, generator=generator).to(dtype)
        transposed = plain.transpose(0, -1).contiguous().transpose(0, -1)
        broadcast = torch.randn(shape[-1], generator=generator).to(dtype).expand(shape)
        assert not transposed.is_contiguous()
        for grad in (transposed, broadcast):
            assert_inner_is_exact(delta, grad, 2)
        assert_within(delta.inner(transposed, 2), delta.inner(plain, 2), 2 * inner_bound(delta, plain, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_any_strides(random_delta, generator, dtype):
    """A channels-last convolution, and experts that are transposed views."""
    delta = random_delta([6, 3, 4, 4], MIXES["mixed"], dtype)
    coefficients = torch.randn(6, 3, generator=generator)
    want = merge(delta, coefficients)
    out = torch.full_like(delta.base, float("nan")).to(memory_format=torch.channels_last)
    weighted_sum(out, delta.base, delta.terms, coefficients)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(out, want)
    difference, expert = delta.terms[0].tau, delta.terms[1].weight
    strided = Delta(
        delta.base.to(memory_format=torch.channels_last),
        (
            Difference(difference.transpose(0, 3).contiguous().transpose(0, 3)),
            ExpertWeight(expert.to(memory_format=torch.channels_last)),
            *delta.terms[2:],
        ),
    )
    assert_same_bits(merge(strided, coefficients), want)
    grad = torch.randn(delta.shape, generator=generator).to(dtype)
    assert_within(strided.inner(grad, 3), delta.inner(grad, 3), 2 * inner_bound(delta, grad, 3))


def test_small_inner_products_in_float16_do_not_vanish():
    """Their terms are below float16's smallest number; the sum must not be taken there."""
    grad = torch.full([64, 64], 1e-4, dtype=torch.float16)
    delta = Delta(torch.zeros_like(grad), (Difference(torch.full_like(grad, 1e-4)),))
    assert (grad * delta.terms[0].tau).sum() == 0
    assert_inner_is_exact(delta, grad, 1)


def test_many_blocks_of_one_sign_sum_exactly(monkeypatch):
    """Blocks meet in float64: float32 would stop counting at 2^24."""
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", 1)
    grad = torch.ones(1000, 1)
    grad[0] = 2.0**25
    delta = Delta(torch.zeros(1000, 1), (Difference(torch.ones(1000, 1)),))
    assert delta.inner(grad, 1).item() == torch.tensor(2.0**25 + 999).float().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_parameters_have_the_bits_of_blocks(random_delta, generator, monkeypatch, shape, dtype):
    delta = random_delta(shape, MIXES["experts"], dtype)
    coefficients = torch.randn(3, 1, generator=generator)
    grad = torch.randn(shape, generator=generator).to(dtype)
    found = []
    for small in (eager._small, lambda *_: []):
        monkeypatch.setattr(eager, "_small", small)
        out = torch.empty_like(delta.base)
        eager.weighted_sum(out, delta.base, delta.terms, coefficients)
        found.append((out, eager.inner_products(grad, delta.base, delta.terms, 1)))
    for ours, theirs in zip(*found, strict=True):
        assert_same_bits(ours, theirs)


def test_empty_parameters():
    empty = torch.empty(0, 3)
    weighted_sum(empty, empty, [Difference(empty), Untouched()], torch.ones(2, 1))
    assert_same_bits(inner_products(empty, empty, [Difference(empty)], 1), torch.zeros(1, 1))


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 1000])
def test_chunks_are_even_and_none_is_empty(rows):
    for chunks in {1, min(2, rows), min(3, rows), min(300, rows), rows}:
        sizes = torch.tensor(chunk_bounds(rows, chunks)).diff()
        assert len(sizes) == chunks
        assert sizes.sum() == rows
        assert sizes.min() >= 1
        assert sizes.max() - sizes.min() <= 1
