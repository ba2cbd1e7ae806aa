"""Scores of sentence embedders: against the expert's similarities, people's, and retrieval."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef
from torchmetrics.functional.retrieval import retrieval_normalized_dcg

import trainmerge as tm
from tests.embedders import dense, embed, write_embedders
from tests.world import WORDS, bert, nudge
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.pairs import Similar, read_similar
from trainmerge.evaluate.similarity import ndcg
from trainmerge.run.scores import SIMILARITY
from trainmerge.system.correlation import rank_terms


@pytest.mark.parametrize("ties", [False, True])
def test_the_terms_are_spearmans_correlation(ties: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 40, dtype=torch.float64, generator=generator)
    other = one + 0.5 * other
    if ties:
        one, other = (one * 2).round(), other.round()
    want = spearman_corrcoef(one, other).item()
    assert rank_terms(one, other).mean().item() == pytest.approx(want, abs=1e-6)
    assert rank_terms(one, torch.ones(40)).mean() == 0


def test_ndcg_is_torchmetrics() -> None:
    rows = torch.nn.functional.normalize(
        torch.randn(3 + 30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    pairs = torch.tensor([[0, 3], [1, 10], [1, 11], *([2, d] for d in range(4, 17))])
    similar = Similar([""] * 33, pairs, None, torch.arange(3, 33))
    relevant = torch.zeros(3, 30)
    relevant[pairs[:, 0], pairs[:, 1] - 3] = 1
    got = ndcg(rows, similar)
    for q in range(3):
        want = retrieval_normalized_dcg(rows[q] @ rows[3:].T, relevant[q].long(), top_k=10)
        assert got[q].item() == pytest.approx(want.item(), abs=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, and its export in `merged`."""
    root = tmp_path_factory.mktemp("embedders")
    recipe = write_embedders(root)
    module = tm.MergeModule(
        recipe, tm.Similarity(), initial=0.3, workspace=str(root / "workspace"),
        optimizer=lambda c: torch.optim.Adam(c, lr=0.05),
    )  # fmt: skip
    data = tm.Calibration({n: str(root / f"{n}.jsonl") for n in "ab"}, recipe.base, batch_size=4)
    trainer = tm.make_trainer(root / "run", max_steps=3, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, root / "run")
    tm.export_run(root / "run", root / "merged")
    return root


def embeddings(root: Path, seed: int, texts: list[str]) -> Tensor:
    model = bert().eval()
    if seed:
        nudge(model, seed)
    inputs = Tokenizer(str(root / "base"), 16)(texts)
    with torch.no_grad():
        return embed(model, dense(seed), inputs)


def cosines(root: Path, seed: int, name: str) -> Tensor:
    rows = [json.loads(line) for line in (root / f"{name}-test.jsonl").read_text().splitlines()]
    one, other = (embeddings(root, seed, [row[column] for row in rows]) for column in ("text", "pair"))
    return (one * other).sum(-1)


def test_without_labels_the_experts_similarities_are_the_measure(run: Path) -> None:
    found = tm.evaluate_run(run / "run", grid=(0.5,))
    assert found.metric is SIMILARITY
    assert list(found.rows) == ["base", "average", "task arithmetic 0.5", "learned", "expert"]
    for k, name in enumerate("ab"):
        want = spearman_corrcoef(cosines(run, 0, name), cosines(run, k + 1, name)).item()
        assert found.scores["base"][name] == pytest.approx(want, abs=1e-6)
        assert found.scores["expert"][name] == pytest.approx(1.0, abs=1e-12)
        assert list(found.rows["base"][name].measures) == ["expert_spearman"]
    share = (found.means()["learned"] - found.means()["base"]) / (1 - found.means()["base"])
    assert found.normalised()["learned"] == pytest.approx(share)
    alone = tm.evaluate_checkpoint(run / "merged", tm.evaluate.recipe_of(run / "run"))
    (scores,) = alone.scores.values()
    assert scores == pytest.approx(found.scores["learned"], abs=1e-6)
    compared = tm.evaluate.compare([run / "run", run / "merged"])
    assert next(iter(compared.evaluation.scores.values())) == pytest.approx(scores, abs=1e-6)


def recipe(root: Path, files: dict[str, Path], **settings: object) -> tm.Recipe:
    experts = {n: tm.Expert(str(root / n), str(root / f"{n}.jsonl"), str(file)) for n, file in files.items()}
    return tm.Recipe(str(root / "base"), experts, **settings)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_with_scores_the_correlation_is_with_them(run: Path, tmp_path: Path) -> None:
    pairs = [json.loads(line) for line in (run / "a-test.jsonl").read_text().splitlines()]
    labels = [3.0, 1, 4, 1, 5, 0.5]
    files = {
        n: write(tmp_path / f"{n}.jsonl", [row | {"score": s} for row, s in zip(pairs, labels, strict=True)])
        for n in "ab"
    }
    found = tm.evaluate_checkpoint(run / "base", recipe(run, files))
    (scores,) = found.scores.values()
    want = spearman_corrcoef(cosines(run, 0, "a"), torch.tensor(labels)).item()
    assert scores["a"] == pytest.approx(want, abs=1e-6)


def test_with_relevant_documents_it_is_ndcg(run: Path, tmp_path: Path) -> None:
    queries = WORDS[:4]
    rows = [{"text": q, "relevant": [f"{q} {WORDS[i + 5]}"], "documents": [f"{WORDS[-1 - i]} cat dog"]}
            for i, q in enumerate(queries)]  # fmt: skip
    file = write(tmp_path / "a.jsonl", rows)
    found = tm.evaluate_checkpoint(run / "base", recipe(run, {"a": file}))
    ((row, measured),) = [(row, scores["a"]) for row, scores in found.rows.items()]
    documents = [text for r in rows for text in (*r["relevant"], *r["documents"])]
    similar = embeddings(run, 0, queries) @ embeddings(run, 0, documents).T
    relevant = torch.zeros(4, 8)
    relevant[torch.arange(4), 2 * torch.arange(4)] = 1
    each = [retrieval_normalized_dcg(similar[q], relevant[q].long(), top_k=10).item() for q in range(4)]
    assert measured.measures == {"ndcg_at_10": pytest.approx(sum(each) / 4, abs=1e-6)}
    assert measured.outcomes.shape == (4, 2)
    assert row.endswith("base")


def test_texts_without_pairs_are_compared_with_each_other(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(66)])
    similar = read_similar(str(file), "text", 66)
    assert len(similar.pairs) == 64 * 63 // 2 + 1
    assert similar.pairs[-1].tolist() == [64, 65]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a", "score": 1.0}], "add the column pair"),
        ([{"text": "a"}], "one text has no similarity to another"),
        ([{"text": "a", "pair": " "}], "example 0 has ' ' for 'pair', which is not a text"),
        ([{"text": "a", "pair": "b", "score": 1.0}] * 2, "all scores are 1.0"),
        ([{"text": "a", "pair": "b", "score": "x"}], "example 0 has the score 'x', not a number"),
        ([{"text": "a", "relevant": []}, {"text": "b", "relevant": ["c"]}], "example 0 has no document"),
        ([{"text": "a", "relevant": "b"}], "which is not a list of texts"),
    ],
)
def test_files_that_say_nothing_are_refused(tmp_path: Path, rows: list[dict], words: str) -> None:
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=rf"a\.jsonl.*{words}"):
        read_similar(str(file), "text", len(rows))


def test_tasks_of_two_measures_and_held_out_ones_without_labels_are_refused(
    run: Path, tmp_path: Path
) -> None:
    plain = run / "a-test.jsonl"
    queries = write(tmp_path / "q.jsonl", [{"text": "cat", "relevant": ["cat dog"]}])
    with pytest.raises(ValueError, match="the tasks have different measures"):
        tm.evaluate_checkpoint(run / "base", recipe(run, {"a": plain, "b": queries}))
    held_out = {"other": tm.HeldOut(str(plain))}
    with pytest.raises(ValueError, match=r"recipe\.held_out: \['other'\] have no expert"):
        tm.evaluate_checkpoint(run / "base", recipe(run, {"a": plain}, held_out=held_out))
