"""Task vectors of a byte or two bits: exact in what they say, and the export from the exact ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import trainmerge as tm
from tests.contracts import assert_delta_contract, assert_same_bits, true_tau
from tests.fitting.test_fit import fit_world, learned
from tests.world import write_world
from trainmerge.fitting.provenance import describe
from trainmerge.kernels import Difference, ExpertWeight, LowRank, Quantised, Untouched
from trainmerge.kernels.quantised import pack_codes, unpack_codes
from trainmerge.task_vectors.delta import Delta, TaskVectors, dense_term
from trainmerge.task_vectors.quantise import Quantise, quantised

METHODS = [tm.Int8(), tm.Ternary(0.3)]
IDS = ["int8", "ternary"]


def quantise_one(method: Quantise, tau: Tensor, base: Tensor) -> Quantised:
    pieces = list(method(Difference(tau), base))
    scale = torch.cat([piece.scale for piece in pieces])[: method.scales(len(base))]
    return Quantised(torch.cat([piece.codes for piece in pieces]), scale)


@pytest.mark.parametrize("width", [1, 3, 4, 5, 64])
def test_packing_is_lossless(width: int, generator: torch.Generator) -> None:
    signs = torch.randint(-1, 2, (7, width), generator=generator).to(torch.int8)
    packed = pack_codes(signs)
    assert packed.shape == (7, -(-width // 4))
    assert_equal(unpack_codes(packed, width), signs)


def assert_equal(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS, ids=IDS)
@pytest.mark.parametrize(("shape", "chunks"), [((9, 13), 1), ((12, 3, 2), 5), ((300, 1100), 2)])
def test_passes_equal_the_dense_reference(
    random_delta, method: Quantise, shape: tuple[int, ...], chunks: int, dtype: torch.dtype, generator
) -> None:
    exact = random_delta(shape, [Difference, ExpertWeight, Difference, LowRank, Untouched], dtype)
    terms = [quantise_one(method, dense_term(term, exact.base), exact.base) for term in exact.terms[:3]]
    delta = Delta(exact.base, (*terms, *exact.terms[3:]))
    assert_delta_contract(delta, chunks, generator)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_one_hot_is_base_plus_what_is_decoded(random_delta, method: Quantise) -> None:
    exact = random_delta((8, 16), [Difference, Difference])
    terms = [quantise_one(method, term.tau, exact.base) for term in exact.terms]
    merged = torch.empty(8, 16)
    Delta(exact.base, tuple(terms)).merge(merged, torch.eye(2)[:, 1:])
    assert_same_bits(merged, exact.base + dense_term(terms[1], exact.base))


def test_int8_is_within_half_a_step(random_delta) -> None:
    exact = random_delta((64, 200), [Difference])
    tau = exact.terms[0].tau
    tau[3] = 0
    term = quantise_one(tm.Int8(), tau, exact.base)
    error = (dense_term(term, exact.base) - tau).abs()
    largest = tau.abs().amax(dim=1, keepdim=True)  # 127 codes, each rounded a few times in float32
    assert (error <= largest / 254 + 4 * torch.finfo(torch.float32).eps * largest).all()
    assert not dense_term(term, exact.base)[3].any()
    assert term.codes.nbytes == tau.numel()


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_ternary_keeps_the_largest_at_their_mean(random_delta, density: float) -> None:
    exact = random_delta((64, 200), [Difference])
    tau = exact.terms[0].tau
    term = quantise_one(tm.Ternary(density), tau, exact.base)
    kept = int(density * tau.numel())
    largest = tau.abs().flatten().topk(kept)
    got = dense_term(term, exact.base).flatten()
    assert int((got != 0).sum()) == kept
    torch.testing.assert_close(
        got[largest.indices], largest.values.mean() * tau.flatten()[largest.indices].sign()
    )
    assert term.codes.nbytes == tau.numel() // 4


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_a_matrix_of_zeros_stays_one_and_nan_is_refused(method: Quantise) -> None:
    base = torch.ones(4, 6)
    assert not dense_term(quantise_one(method, torch.zeros(4, 6), base), base).any()
    with pytest.raises(ValueError, match="not finite"):
        quantise_one(method, torch.full((4, 6), torch.nan), base)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_only_dense_matrices_are_written(
    random_task_vectors, tiny_bert, method: Quantise, tmp_path: Path
) -> None:
    exact: TaskVectors = random_task_vectors(tiny_bert, [ExpertWeight, LowRank, Difference])
    got = quantised(exact, method, tmp_path, "inputs")
    for name, delta in got.deltas.items():
        matrix = delta.base.dim() > 1
        assert [isinstance(term, Quantised) for term in delta.terms] == [matrix, False, matrix], name
        if not matrix:
            assert delta.terms == exact.deltas[name].terms
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    quantised(exact, method, tmp_path, "inputs")
    assert file.stat().st_mtime_ns == written
    quantised(exact, method, tmp_path, "others")
    assert len(list(tmp_path.iterdir())) == 2


def test_rows_of_quantised_terms(random_delta) -> None:
    exact = random_delta((10, 7), [Difference])
    for method in METHODS:
        delta = Delta(exact.base, (quantise_one(method, exact.terms[0].tau, exact.base),))
        part = delta.rows(slice(2, 9))
        assert_same_bits(part.dense()[0], delta.dense()[0][2:9])
        torch.testing.assert_close(delta.dense()[0].double(), true_tau(delta.terms[0], delta.base))


def test_a_fit_learns_on_them_and_exports_the_exact_weights(tmp_path: Path) -> None:
    write_world(tmp_path)
    exact = fit_world(tmp_path, tmp_path / "exact", steps=3)
    small = fit_world(tmp_path, tmp_path / "small", steps=3, quantise=tm.Int8())
    terms = [t for d in small.resident.merged.task_vectors.deltas.values() for t in d.terms]
    assert any(isinstance(term, Quantised) for term in terms)
    assert not torch.equal(learned(tmp_path / "exact"), learned(tmp_path / "small"))
    torch.testing.assert_close(learned(tmp_path / "exact"), learned(tmp_path / "small"), atol=0.02, rtol=0)
    tm.export_run(tmp_path / "small", tmp_path / "merged")
    model = tm.Recipe(exact.recipe.base, exact.recipe.experts).open()
    values = small.coefficients()
    name = next(n for n in model.layout.groups if model.task_vectors.deltas[n].base.dim() > 1)
    want = torch.empty(model.task_vectors.deltas[name].shape)
    model.task_vectors.deltas[name].merge(want, small.coefficients.of(name, values))
    assert_same_bits(load_file(tmp_path / "merged" / "model.safetensors")[name], want)
    assert "quantise" in describe(small, tm.Calibration({}, small.recipe.base))
