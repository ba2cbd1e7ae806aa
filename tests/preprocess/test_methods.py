"""What is true of every preprocessor: one expert, none, their order, scale, dtype, zeros, tied weights.

Legend: `K` experts, `*S` parameter shape.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import trainmerge as tm
from tests.contracts import assert_same_bits, relative_error, tensors_of
from tests.methods import METHODS, PAIRS, applied, bases, count_for, random, run, vectors
from tests.world import languages_recipe, write_languages
from trainmerge.kernels import ExpertWeight
from trainmerge.preprocess import Informed, Piecewise, apply, doge
from trainmerge.task_vectors import pieces
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.pieces import in_pieces

RANDOM = {"dare", "della"}
OF_WEIGHTS = {"slerp", "karcher-weights"}
every = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the solver that takes 400: no property here depends on how many."""
    monkeypatch.setattr(doge, "PAPER_STEPS", 5)


def test_every_preprocessor_is_here_and_in_the_table_of_methods() -> None:
    classes = {getattr(tm, name) for name in tm.__all__}
    contracts = {tm.Preprocess, tm.Informed, tm.Piecewise}
    found = {c for c in classes if isinstance(c, type) and issubclass(c, tm.Preprocess)} - contracts
    found -= {tm.CalibratedRouters}  # has no result for other tensors: tests/evaluate/test_agreement.py
    assert {type(method) for method in METHODS.values()} == found
    table = (Path(__file__).parents[2] / "notebooks/docs/methods/index.md").read_text()
    assert [c.__name__ for c in found if f"| `{c.__name__}(" not in table] == []


@every
def test_shapes_order_repetition_and_inputs_left_alone(name: str) -> None:
    taus = random(count_for(name))
    given = vectors(taus)
    before = {n: [part.clone() for part in tensors_of(delta)] for n, delta in given.deltas.items()}
    got = applied(METHODS[name], given)
    assert list(got) == list(taus)
    assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in taus.items()}
    for parameter, again in applied(METHODS[name], given).items():
        assert_same_bits(got[parameter], again)
    for parameter, parts in before.items():
        for part, copy in zip(tensors_of(given.deltas[parameter]), parts, strict=True):
            assert_same_bits(part, copy)


def stored(taus: dict[str, Tensor], dtype: torch.dtype) -> tuple[TaskVectors, TaskVectors]:
    """Whole experts as a `dtype` checkpoint has them, and the same numbers as float64 differences."""
    base = {name: tensor.to(dtype) for name, tensor in bases(taus).items()}
    models = {name: (base[name].double() + 0.1 * tau).to(dtype) for name, tau in taus.items()}
    deltas = {n: Delta(base[n], tuple(ExpertWeight(weight) for weight in models[n])) for n in taus}
    wide = {n: tensor.double() for n, tensor in base.items()}
    exact = vectors({n: models[n].double() - wide[n] for n in taus}, wide)
    return TaskVectors(exact.experts, deltas), exact


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_weights_give_what_float64_gives(name: str, dtype: torch.dtype) -> None:
    narrow, exact = stored(random(count_for(name)), dtype)
    got, want = (applied(METHODS[name], given) for given in (narrow, exact))
    for parameter, result in got.items():
        assert result.dtype == torch.float32
        if want[parameter].any():
            assert relative_error(result, want[parameter]) < 2e-5
        else:
            assert not result.any()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if isinstance(method, Piecewise)])
def test_pieces_of_large_parameters_are_the_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taus = {**random(), "more": torch.randn(3, 7, 2, 3, dtype=torch.float64)}
    whole_results = run(METHODS[name], taus)
    monkeypatch.setattr(pieces, "PIECE", 16)
    parts = [piece for n, delta in vectors(taus).deltas.items() for piece in in_pieces(n, delta)]
    assert [piece for _, piece, _ in parts][:2] == ["layer.weight[0:2]", "layer.weight[2:4]"]
    assert max(part.shape.numel() for *_, part in parts) <= 16
    got = apply(vectors(taus), [METHODS[name]], tmp_path, "inputs")
    if name in RANDOM:  # whose dice know the piece
        whole = {n: t.sum(0) * 0 for n, t in taus.items()}
        assert {n: d.shape for n, d in got.deltas.items()} == {n: t.shape for n, t in whole.items()}
        ratios = {n: (delta.dense() / taus[n]).flatten() for n, delta in got.deltas.items()}
        low, high = (1.4, 3.4) if name == "della" else (2.0, 2.0)  # 1 / probability
        assert all(((ratio == 0) | ((ratio >= low) & (ratio <= high))).all() for ratio in ratios.values())
        return
    for parameter, result in run(METHODS[name], taus).items():
        assert torch.equal(got.deltas[parameter].dense(), whole_results[parameter])
        assert torch.equal(result, whole_results[parameter])


@every
def test_what_did_not_change_stays(name: str) -> None:
    count = count_for(name)
    nothing = run(METHODS[name], {n: torch.zeros_like(tau) for n, tau in random(count).items()})
    assert not any(t.any() for t in nothing.values())
    if name in OF_WEIGHTS:  # an average of weights: nothing of it is one expert's alone
        return
    taus = random(count)
    for tau in taus.values():
        tau[1] = 0
    assert not any(t[1].any() for t in run(METHODS[name], taus).values())


@every
def test_rows_and_columns_of_zeros(name: str) -> None:
    """In all experts, in one, and in the base, as of tokens that nobody trained."""
    taus = random(count_for(name))
    base = bases(taus)
    taus["layer.weight"][:, 2] = 0
    taus["layer.weight"][0, 4] = 0
    taus["layer.weight"][:, :, 3] = 0
    base["layer.weight"][2] = base["layer.weight"][:, 3] = 0
    got = applied(METHODS[name], vectors(taus, base))
    assert all(tau.isfinite().all() for tau in got.values())
    assert got["layer.weight"][:, 2].abs().max() < 1e-12
    if not isinstance(METHODS[name], tm.RegMean):  # which may answer by an input that nobody used
        assert got["layer.weight"][:, :, 3].abs().max() < 1e-12


ABSOLUTE = {"doge", "doge-adam", "doge-am", "ram+"}  # eta and epsilon are not of tau's size
NONLINEAR = {"fisher", "rcp", "trained-masks"}  # the networks' own gradients change


@pytest.mark.parametrize("name", sorted(METHODS.keys() - ABSOLUTE - NONLINEAR))
def test_scale(name: str) -> None:
    """Of base and experts, which some methods compare."""
    taus = random(count_for(name))
    base = bases(taus)
    got = applied(METHODS[name], vectors(taus, base))
    scaled = applied(
        METHODS[name],
        vectors({n: 4.0 * t for n, t in taus.items()}, {n: 4.0 * b for n, b in base.items()}),
    )
    for parameter in got:
        if name == "widen" and taus[parameter].dim() < 3:  # a softmax of |tau| itself, as published
            continue
        torch.testing.assert_close(scaled[parameter], 4.0 * got[parameter], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"opcm", "slerp", "slerp-task-vectors"}))
def test_the_order_of_experts_does_not_matter(name: str) -> None:
    """But for OPCM, which goes by it, and SLERP, whose t does. Names go along: some methods know them."""
    order = [1, 0] if name in PAIRS else [2, 0, 1]
    taus = random(len(order))
    got = run(METHODS[name], taus)
    given = vectors({n: t[order] for n, t in taus.items()}, experts="".join("abc"[k] for k in order))
    moved = applied(METHODS[name], given)
    for parameter in got:
        torch.testing.assert_close(moved[parameter], got[parameter][order], rtol=1e-6, atol=1e-7)


def test_slerp_from_the_other_end() -> None:
    taus = random(2)
    there, back = run(tm.Slerp(0.3), taus), run(tm.Slerp(0.7), {n: t.flip(0) for n, t in taus.items()})
    for parameter in there:
        torch.testing.assert_close(back[parameter], there[parameter].flip(0))


UNTRIMMED = {
    "aim": tm.Aim(1.0),
    "breadcrumbs": tm.Breadcrumbs(1.0, 0.0),
    "consensus": tm.Consensus(agree=0),
    "dare": tm.Dare(0.0),
    "della": tm.Della(1.0, 0.0),
    "knots": tm.Knots(tm.Ties(1.0)),
    "localize": tm.LocalizeAndStitch(1.0),
    "pico": tm.Pico(tm.Ties(1.0, merge="mean")),
    "ram+": tm.Ram(rescale=0.1),
    "sce": tm.Sce(),
    "svc": tm.Svc(scale=1.0),
    "ties": tm.Ties(1.0),
    "ties-mean": tm.Ties(1.0, merge="mean"),
    "ties-parameter": tm.Ties(1.0, scope="parameter"),
    "trim": tm.Trim(1.0),
    "tsv-energy": tm.Tsv(energy=1.0),
}
NOT_ITSELF = {"doge", "doge-adam", "doge-am", "iso-c", "iso-cts", "pcb", "trained-masks"}  # new; clipped; cut


@every
def test_one_expert_is_itself(name: str) -> None:
    taus = random(1)
    if name in PAIRS | {"model-stock"}:
        with pytest.raises(ValueError, match="two experts"):
            run(METHODS[name], taus)
        return
    got = run(UNTRIMMED.get(name, METHODS[name]), taus)
    for parameter, tau in taus.items():
        if name in NOT_ITSELF:
            assert got[parameter].isfinite().all()
        else:  # but for RegMean's ridge in directions that nobody reads
            size = 1.0 if name.startswith("regmean") else 0.0
            torch.testing.assert_close(got[parameter], tau, rtol=1e-7, atol=max(1e-9, 2e-5 * size))


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_languages(tmp_path_factory.mktemp("languages"))


@pytest.fixture(scope="module")
def tied(languages: Path) -> TaskVectors:
    """Of two experts whose output layer is their embedding, mapped from files."""
    return languages_recipe(languages).open(languages / "w").task_vectors


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if not isinstance(m, Informed)])
def test_tied_weights_come_once(name: str, tied: TaskVectors, tmp_path: Path) -> None:
    assert "model.embed_tokens.weight" in tied.deltas
    assert "lm_head.weight" not in tied.deltas
    mapped = apply(tied, [METHODS[name]], tmp_path, "inputs")
    assert list(mapped.deltas) == list(tied.deltas)
    for parameter, taus in METHODS[name](tied):
        assert torch.equal(mapped.deltas[parameter].dense(), taus)


def test_a_merge_of_tied_models_is_tied(languages: Path, tmp_path: Path) -> None:
    merge = languages_recipe(languages, preprocess=[tm.Tsv()])
    module = tm.MergeModule(merge, initial=1.0, workspace=str(tmp_path / "run" / "workspace"))
    trainer = tm.make_trainer(tmp_path / "run", max_steps=0, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, tm.Calibration({}, merge.base), trainer, tmp_path / "run")
    merged = AutoModelForCausalLM.from_pretrained(tm.export_run(tmp_path / "run", tmp_path / "merged"))
    name = "model.embed_tokens.weight"
    delta = merge.open(tmp_path / "w").task_vectors.deltas[name]
    want = delta.base + dict(tm.Tsv()(TaskVectors(("a", "b"), {name: delta})))[name].sum(0)
    torch.testing.assert_close(merged.model.embed_tokens.weight.detach(), want)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
