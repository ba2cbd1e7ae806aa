"""The fused passes: the same contract, one compilation for all shapes, eager where there is no compiler.

Legend: `K` experts, `C` chunks of one parameter.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.bounds import assert_within
from tests.contracts import assert_delta_contract, assert_same_bits, inner_bound, merge, merge_bound
from trainmerge.kernels import Difference, ExpertWeight, LowRank, Untouched, compiled, eager, using
from trainmerge.kernels.backend import backend_of, chosen
from trainmerge.task_vectors.delta import Delta
from trainmerge.task_vectors.quantise import Int8

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, inside the compiler
MIX = [ExpertWeight, Difference, Untouched, ExpertWeight]
SHAPES = [[700, 170], [100_000], [333, 3, 141], [16 * compiled.ROW]]  # with and without a rest of a row


@pytest.fixture(autouse=True)
def fused():
    with using("compiled"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contract_compiled_once_for_all_shapes(random_delta, generator, dtype):
    counters.clear()
    for shape in SHAPES:
        for chunks in (1, 2, 3):
            assert_delta_contract(random_delta(shape, MIX, dtype), chunks, generator)
    # The contract turns the experts' order around, which is the same kernel.
    assert counters["stats"]["unique_graphs"] <= 2  # the merge and the inner products
    assert "recompile_limit" not in str(counters["unimplemented"])
    sizes = {100_003, 120_001, 140_011}
    before = counters["stats"]["unique_graphs"]
    for size in sizes:
        assert_delta_contract(random_delta([size], MIX, dtype), 1, generator)
    assert counters["stats"]["unique_graphs"] == before


def test_dtypes_of_their_own(generator):
    """A float16 base and expert and a float32 difference, into float32; bfloat16 beside them is eager's."""
    shape = [300, 400]
    noise = torch.randn(3, *shape, generator=generator)
    coefficients = torch.rand(2, 2, generator=generator)
    grad = torch.randn(shape, generator=generator)
    for dtype in (torch.float16, torch.bfloat16):
        delta = Delta(noise[0].half(), (ExpertWeight(noise[1].to(dtype)), Difference(noise[2])))
        merged, inner = merge(delta, coefficients, torch.float32), delta.inner(grad, 2)
        with using("eager"):
            bound = 2 * merge_bound(delta, coefficients, torch.float32)
            assert_within(merged, merge(delta, coefficients, torch.float32), bound)
            assert_within(inner, delta.inner(grad, 2), 2 * inner_bound(delta, grad, 2))


def test_it_is_the_fused_loop_that_runs(random_delta, generator, monkeypatch):
    """Not eager in disguise: a large dense parameter never gets there, a low-rank or little one does."""
    calls = []
    for name in ("weighted_sum", "inner_products"):
        plain = getattr(eager, name)
        monkeypatch.setattr(eager, name, lambda *given, run=plain: (calls.append(1), run(*given))[1])
    coefficients = torch.rand(4, 1, generator=generator)

    def run(shape, forms):
        calls.clear()
        delta = random_delta(shape, forms)
        merge(delta, coefficients)
        delta.inner(torch.randn(shape, generator=generator), 1)
        return len(calls)

    assert run(SHAPES[-1], MIX) == 0
    assert run([20, 20], MIX) == 2
    assert run([400, 400], [*MIX[1:], LowRank]) == 2


def test_same_bits_in_every_run_and_with_any_threads(random_delta, generator):
    delta = random_delta([1000, 333], MIX)
    grad = torch.randn(delta.shape, generator=generator)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 1, 2):
            torch.set_num_threads(count)
            found.append(delta.inner(grad, 2))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


def test_without_a_compiler_eager_runs_after_one_warning(random_delta, generator, monkeypatch):
    from torch._inductor import config

    delta = random_delta([300, 300], [ExpertWeight] * 2)  # a K that is not compiled yet
    coefficients = torch.rand(2, 1, generator=generator)
    monkeypatch.setattr(compiled, "_failed", False)
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
        pytest.warns(UserWarning, match="eager kernels instead") as warned,
    ):
        merged, again = merge(delta, coefficients), merge(delta, coefficients)
    assert len(warned) == 1
    with using("eager"):
        assert_same_bits(merged, merge(delta, coefficients))
    assert_same_bits(again, merged)
    wide = random_delta([97, 3001], [ExpertWeight] * 2)  # of several blocks
    grad = torch.randn(97, 3001, generator=generator)
    for chunks in (1, 3):
        products = wide.inner(grad, chunks)
        with using("eager"):
            assert_same_bits(products, wide.inner(grad, chunks))


def test_terms_that_are_not_dense_are_triton_s_on_a_gpu(random_delta, monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    low = LowRank(torch.ones(4, 1), torch.ones(1, 4), 1.0)
    dense = random_delta([4, 4], [ExpertWeight]).terms
    codes = Int8()(dense[0], torch.zeros(4, 4))
    with using("auto"):
        assert [backend_of(gpu, terms) for terms in (dense, [*dense, low], [*codes])] == [
            "compiled", "triton", "triton",
        ]  # fmt: skip
        assert backend_of(cpu, [low]) == "eager"
        monkeypatch.setenv("TRAINMERGE_KERNELS", "eager")
        assert backend_of(gpu, [low]) == "eager"
        monkeypatch.setenv("TRAINMERGE_KERNELS", "compiled")
        assert backend_of(gpu, [low]) == "compiled"
    assert backend_of(cpu, [low]) == "compiled"  # which runs it eagerly


def test_choice(monkeypatch):
    assert chosen(torch.device("cpu")) == "compiled"  # as this file says
    with using("auto"):
        assert chosen(torch.device("cpu")) == "eager"
        assert chosen(torch.device("cuda")) == "compiled"
        monkeypatch.setenv("TRAINMERGE_KERNELS", "compiled")
        assert chosen(torch.device("cpu")) == "compiled"
        monkeypatch.setenv("TRAINMERGE_KERNELS", "fast")
        with pytest.raises(
            ValueError, match="TRAINMERGE_KERNELS must be one of auto, eager, compiled, triton"
        ):
            chosen(torch.device("cpu"))
    with pytest.raises(ValueError, match="not 'fast'"), using("fast"):
        pass
    assert chosen(torch.device("cpu")) == "compiled"


def test_one_long_row_has_the_same_sum_on_any_number_of_threads():
    rows = torch.randn(1, 3 << 14, generator=torch.Generator().manual_seed(0))
    before, sums = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums.append(compiled._row_sums(rows))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])
    assert float(sums[0]) == pytest.approx(float(rows.double().sum()), rel=1e-12)
