"""A method names what it leaves out, with its share of the task vectors; nothing is averaged in silence."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import trainmerge as tm
from tests.methods import SoftmaxLayer, applied, matrices, random, vectors
from tests.preprocess.test_informed import informed, measure
from tests.world import WORDS, languages_recipe, nudge, write_languages, write_tokenizer
from trainmerge.inspection.weights import preprocess_findings
from trainmerge.preprocess import apply
from trainmerge.preprocess.left_out import left_out, left_out_sentence
from trainmerge.task_vectors.delta import TaskVectors
from trainmerge.task_vectors.geometry import measure_geometry


def kinds() -> TaskVectors:
    taus = {
        "embed": torch.ones(2, 10, 4),
        "w": torch.ones(2, 4, 4),
        "norm": torch.ones(2, 4),
        "conv": torch.ones(2, 3, 4, 2, 2),
    }
    given = vectors(taus, {n: torch.zeros(t.shape[1:]) for n, t in taus.items()})
    embed = replace(given.deltas["embed"], role="embedding")
    return TaskVectors(given.experts, {**given.deltas, "embed": embed})


def test_kinds_and_shares() -> None:
    given = kinds()
    assert left_out(tm.Tsv(), given) == {"norms and biases": ["norm"], "convolutions": ["conv"]}
    assert left_out(tm.Opcm(), given).keys() == {"embeddings", "norms and biases", "convolutions"}
    assert left_out(tm.Doge(exclude=["w"]), given)["matrices"] == ["w"]
    assert left_out(tm.Ties(), given) == {}
    squares = {n: float(d.dense().square().sum()) for n, d in given.deltas.items()}  # 80, 32, 8, 96
    words = left_out_sentence(tm.Doge(), given, squares)
    assert "1 convolutions (conv; 44.4% of the task vectors' squared norm)" in words
    assert words.endswith("are left at the base's value")


def test_convolutions_are_a_warning_and_biases_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match=r"Wudi: .*convolutions \(conv; 44.4% of .* are divided by K"):
        apply(kinds(), [tm.Wudi()], tmp_path, "a")
    given = kinds()
    apply(TaskVectors(given.experts, {n: given.deltas[n] for n in ("w", "norm")}), [tm.Wudi()], tmp_path, "b")
    assert capsys.readouterr().err == (
        "Wudi: 1 norms and biases (norm; 20% of the task vectors' squared norm) are divided by K\n"
    )
    apply(given, [tm.Ties()], tmp_path, "c")
    assert capsys.readouterr().err == ""


def test_inspect_names_it(tmp_path: Path) -> None:
    recipe = languages_recipe(write_languages(tmp_path), preprocess=[tm.Opcm()])
    opened = recipe.open()
    (found,) = preprocess_findings(recipe, opened, measure_geometry(opened.task_vectors))
    (unread,) = preprocess_findings(recipe, opened, None)
    assert re.match(r"Opcm: 1 embeddings \(model.embed_tokens.weight; [0-9.]+% of", found.what)
    assert "squared norm" not in unread.what


def test_regmean_says_which_layers_it_cannot_measure() -> None:
    given = vectors({**random(), "experts": torch.stack([torch.stack(matrices(k, k + 3)) for k in range(3)])})
    given = TaskVectors(
        given.experts,
        {
            n: replace(d, role="linear" if "w" in n or n == "experts" else "vector")
            for n, d in given.deltas.items()
        },
    )
    with pytest.warns(UserWarning, match=r"2 linear layers .* \(wide.weight, experts\).*squared norm"):
        got = applied(tm.RegMean(), given)
    assert torch.equal(got["experts"], given.deltas["experts"].dense() / 3)
    with pytest.warns(UserWarning, match="inputs of 2 linear layers"):
        dict(tm.RegMean(sequential=True).informed(given, SoftmaxLayer(given)))


def test_regmean_on_gpt2_is_least_squares(tmp_path: Path) -> None:
    """Its layers are Conv1D: x W with W inputs x outputs, so W = (sum G)^-1 sum G W_k."""
    root = write_languages(tmp_path)
    config = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS) + 2, **config, **tokens))
    for seed, name in enumerate(("base", "a", "b")):
        nudge(model, seed)
        model.save_pretrained(root / name)
    write_tokenizer(root / "base")
    made, given = measure(languages_recipe(root), tmp_path)
    result = informed(tm.RegMean(), made, given)
    name = "transformer.h.0.attn.c_attn.weight"
    grams = [made.grams(k, [name], {})[name].double() for k in range(2)]
    assert grams[0].shape == (16, 16)
    grams = [0.9 * gram + 0.1 * gram.diag().diag() for gram in grams]
    taus = given.deltas[name].dense().double()
    want = torch.linalg.solve(sum(grams), sum(g @ t for g, t in zip(grams, taus, strict=True)))
    assert (result[name].double().sum(0) - want).norm() < 1e-3 * want.norm()
    for single in informed(tm.RegMean(sequential=True), made, given).values():
        assert single.isfinite().all()


@pytest.mark.parametrize("method", [tm.Dare(), tm.Ties(), tm.Pcb(), tm.Breadcrumbs(), tm.Opcm(), tm.Doge()])
def test_parameters_without_dimensions(method: tm.Preprocess, tmp_path: Path) -> None:
    """CLIP's logit_scale is one; DARE's estimate of large differences reads it too."""
    given = vectors({"logit_scale": torch.tensor([1e-3, 2e-3]), "w": 1e-3 * torch.stack(matrices(0, 1))})
    made = apply(given, [method], tmp_path, "a")
    assert made.deltas["logit_scale"].dense().shape == (2,)


def test_fisher_names_parameters_without_a_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    applied(tm.Fisher(), vectors(random()))  # whose network reads one layer only
    words = capsys.readouterr().err
    assert re.match(
        r"Fisher: no prediction depends on 3 parameters \(wide.weight, norm.weight, scale; ", words
    )
    assert words.endswith("% of the task vectors' squared norm): they are averaged\n")
