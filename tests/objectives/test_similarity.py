"""Similarity against its formula in float64, and the gradient of coefficients against autograd's.

Legend: `B` examples, `T` tokens, `E` width of an embedding.
"""

import json
import multiprocessing
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import trainmerge as tm
from tests.contracts import assert_embedding_contract
from tests.embedders import KINDS, dense, embed, write_embedders, write_modules
from tests.objectives.similarity_rows import MASK, B, E, batch_of, outputs, process, rows
from tests.world import bert, nudge
from trainmerge.data.batch import Asks, Batch
from trainmerge.fitting.preflight import check_tasks
from trainmerge.run.recipe_files import calibration_files


def relative_by_definition(merged: Tensor, expert: Tensor) -> Tensor:
    """The variance of the differences of all pairs, in that of the expert's cosines, []."""
    pairs = ~torch.eye(len(merged), dtype=torch.bool)
    cosines = [torch.cosine_similarity(rows[:, None], rows[None], dim=-1)[pairs] for rows in (merged, expert)]
    return (cosines[0] - cosines[1]).var(correction=0) / cosines[1].var(correction=0)


def test_relative_to_level_and_spread_it_is_a_share_of_variance_with_its_gradient() -> None:
    merged, expert = rows(0).requires_grad_(), rows(1)
    got = tm.Similarity(relative=True)(outputs(merged), batch_of(expert)).mean()
    want = relative_by_definition(merged, expert)
    torch.testing.assert_close(got, want)
    slopes = [torch.autograd.grad(loss, merged)[0] for loss in (got, want)]
    torch.testing.assert_close(*slopes)


def by_definition(merged: Tensor, expert: Tensor, weight: float) -> Tensor:
    """The loss per example, pair by pair."""
    losses = []
    for b in range(len(merged)):
        apart = [
            (
                torch.cosine_similarity(merged[b], merged[o], 0)
                - torch.cosine_similarity(expert[b], expert[o], 0)
            )
            ** 2
            for o in range(len(merged))
            if o != b
        ]
        turned = merged[b] / merged[b].norm() - expert[b] / expert[b].norm()
        losses.append(torch.stack(apart).mean() + weight * turned.square().sum())
    return torch.stack(losses)


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_it_is_its_formula_with_its_gradient(weight: float) -> None:
    merged, expert = rows(0).requires_grad_(), rows(1)
    got = tm.Similarity(weight)(outputs(merged), batch_of(expert))
    want = by_definition(merged, expert, weight)
    torch.testing.assert_close(got, want)
    slopes = [torch.autograd.grad(loss.mean(), merged)[0] for loss in (got, want)]
    torch.testing.assert_close(*slopes)


def test_an_experts_own_embeddings_cost_nothing_also_when_turned_or_stretched() -> None:
    expert = rows(1)
    turn, _ = torch.linalg.qr(rows(2, E))
    lengths = torch.arange(1.0, B + 1, dtype=torch.float64)[:, None]
    loss = tm.Similarity()(outputs(lengths * expert @ turn), batch_of(expert))
    torch.testing.assert_close(loss, torch.zeros(B, dtype=torch.float64), atol=1e-28, rtol=0)
    assert tm.Similarity(1.0)(outputs(expert @ turn), batch_of(expert)).min() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_contract(dtype: torch.dtype) -> None:
    assert_embedding_contract(tm.Similarity(0.5), (B, E), dtype)
    assert_embedding_contract(tm.Similarity(relative=True), (B, E), dtype)


def test_one_example_has_no_pair() -> None:
    merged = rows(0, 1).requires_grad_()
    loss = tm.Similarity()(outputs(merged), batch_of(rows(1, 1)))
    assert loss.tolist() == [0.0]
    assert torch.autograd.grad(loss.sum(), merged)[0].eq(0).all()


def test_it_asks_for_embeddings_and_needs_no_output_layer() -> None:
    objective = tm.Similarity(pooling="mean")
    assert objective.asks == Asks(embedding="mean")
    assert "embedding='mean'" in objective.asks.identity()
    assert objective.couples
    assert not objective.needs_logits
    with pytest.raises(ValueError, match="must be 0 or more"):
        tm.Similarity(-1.0)
    with pytest.raises(ValueError, match="record the experts first"):
        objective(outputs(rows(0)), Batch(0, {}, MASK, torch.arange(B)))


@pytest.mark.parametrize("relative", [False, True])
def test_several_processes_have_the_loss_and_gradient_of_one(tmp_path: Path, relative: bool) -> None:
    sizes = (4, 1, 0)
    merged = rows(0).requires_grad_()
    want = tm.Similarity(0.3, relative)(outputs(merged), batch_of(rows(1))).mean()
    (slope,) = torch.autograd.grad(want, merged)
    context = multiprocessing.get_context("spawn")
    running = [
        context.Process(target=process, args=(rank, sizes, str(tmp_path), relative))
        for rank in range(len(sizes))
    ]
    for one in running:
        one.start()
    for one in running:
        one.join()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(sizes))]
    torch.testing.assert_close(torch.stack([loss for loss, _ in found]).sum(), want.detach())
    torch.testing.assert_close(torch.cat([part for _, part in found]), slope)


def build(root: Path, objective: tm.Objective, recipe: tm.Recipe, **settings: object) -> tuple:
    module = tm.MergeModule(recipe, objective, workspace=str(root / "workspace"), **settings)
    return module, tm.Calibration(calibration_files(recipe), recipe.base, batch_size=4, max_length=16)


def test_the_gradient_of_coefficients_is_autograds_dense_layer_included(tmp_path: Path) -> None:
    recipe = write_embedders(tmp_path)
    module, data = build(tmp_path, tm.Similarity(0.5), recipe, initial=0.4)
    module.load(data)
    merged = module.resident.merged
    merged.module.double()
    merged.materialise()
    batch = module.resident.batch(0, data.examples[0][:4], data.tokenize)
    module.loss(batch).backward()
    got = merged.gradient()

    experts = [bert().double().eval() for _ in range(2)]
    for k, expert in enumerate(experts):
        nudge(expert, k + 1)
    base = bert().double().eval()
    layers = [{n: t.double() for n, t in dense(k).items()} for k in range(3)]
    opened = module.opened
    coefficients = module.coefficients().detach().double().requires_grad_()

    def weight(name: str, own: Tensor, others: list[Tensor]) -> Tensor:
        (group,) = opened.layout.groups[name]
        return own + sum(coefficients[k, group] * (other - own) for k, other in enumerate(others))

    weights = {n: weight(n, p.detach(), [dict(e.named_parameters())[n].detach() for e in experts])
               for n, p in base.named_parameters()}  # fmt: skip
    layer = {n: weight(f"2_Dense.{n}", layers[0][n], [layers[1][n], layers[2][n]]) for n in layers[0]}

    class Swapped:
        def __call__(self, **inputs: Tensor):
            return torch.func.functional_call(base, weights, (), inputs)

    rows_merged = embed(Swapped(), layer, batch.inputs)
    with torch.no_grad():
        rows_expert = embed(experts[0], layers[1], batch.inputs)
    (want,) = torch.autograd.grad(by_definition(rows_merged, rows_expert, 0.5).mean(), coefficients)
    recorded = module.loaded.teachers[0].of(batch.ids, torch.device("cpu")).embedding
    torch.testing.assert_close(recorded.double(), rows_expert, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-7)
    assert want[:, opened.layout.groups["2_Dense.linear.weight"][0]].abs().min() > 0


def test_a_fit_brings_the_merge_to_the_experts_and_is_exported_whole(tmp_path: Path) -> None:
    recipe = write_embedders(tmp_path)
    module, data = build(
        tmp_path, tm.Similarity(), recipe, keep_better=True,
        optimizer=lambda c: torch.optim.Adam(c, lr=0.05),
    )  # fmt: skip
    trainer = tm.make_trainer(tmp_path / "run", max_steps=6, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, tmp_path / "run")
    losses = json.loads((tmp_path / "run/calibration_loss.json").read_text())
    assert losses["end"] < 0.9 * losses["start"]
    tm.export_run(tmp_path / "run", tmp_path / "merged")
    assert tm.verify_export(tmp_path / "run", tmp_path / "merged") > 2
    assert not torch.equal(load_file(tmp_path / "merged/2_Dense/model.safetensors")["linear.weight"],
                           dense(0)["linear.weight"])  # fmt: skip


def test_a_batch_is_not_split_and_a_plan_needs_no_weights(tmp_path: Path) -> None:
    module, data = build(tmp_path, tm.Similarity(relative=True), write_embedders(tmp_path))
    assert tm.plan_fit(module, data).total > 0


@pytest.mark.parametrize("objective", [tm.Similarity(pooling="mean"), tm.Alignment(0.0, hidden=1.0)])
def test_a_base_without_modules_and_without_an_output_layer_is_aligned(
    tmp_path: Path, objective: tm.Objective
) -> None:
    recipe = write_embedders(tmp_path)
    for name in ("base", "a", "b"):
        (tmp_path / name / "modules.json").unlink()
    module, data = build(tmp_path, objective, recipe, optimizer=lambda c: torch.optim.Adam(c, lr=0.05))
    check_tasks(module, data)
    trainer = tm.make_trainer(tmp_path / "run", max_steps=4, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, tmp_path / "run")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4


def test_it_is_refused_where_nothing_says_how_to_embed(tmp_path: Path) -> None:
    recipe = write_embedders(tmp_path)
    with pytest.raises(ValueError, match=r"modules\.json says how it embeds, so leave out pooling='mean'"):
        check_tasks(*build(tmp_path, tm.Similarity(pooling="mean"), recipe))
    write_modules(
        tmp_path / "b", ("Transformer", "Pooling", "Dense", "Normalize"), {"pooling_mode_cls_token": True}
    )
    with pytest.raises(ValueError, match=r"b: .*embeds in another way than the base"):
        check_tasks(*build(tmp_path, tm.Similarity(), recipe))
    (tmp_path / "base/modules.json").unlink()
    with (
        pytest.warns(UserWarning, match="2_Dense"),
        pytest.raises(ValueError, match="set pooling to one of mean"),
    ):
        check_tasks(*build(tmp_path, tm.Similarity(), recipe))


def test_settings_of_the_folder_that_a_fit_does_not_follow_are_named(tmp_path: Path) -> None:
    recipe = write_embedders(tmp_path, [kind for kind in KINDS if kind != "Dense"])
    base = tmp_path / "base"
    (base / "sentence_bert_config.json").write_text('{"max_seq_length": 8, "do_lower_case": true}')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, data = build(tmp_path, tm.Similarity(), recipe)
    with pytest.warns(UserWarning, match=r"texts have 8 tokens at most, data\.max_length is 16"):
        check_tasks(module, data)  # both "A" and "a" are unknown tokens: nothing depends on case
    (base / "config_sentence_transformers.json").write_text('{"prompts": {"query": "q: "}}')
    for name in ("base", "a", "b"):
        write_modules(tmp_path / name, ("Transformer", "Pooling", "Normalize"), {"include_prompt": False})
    with (
        pytest.warns(UserWarning, match="at most"),
        pytest.raises(ValueError, match="its pooling leaves out prompts"),
    ):
        check_tasks(module, data)
    (base / "config_sentence_transformers.json").unlink()
    one = tm.Calibration(calibration_files(recipe), recipe.base, batch_size=1, max_length=8)
    with pytest.raises(ValueError, match=r"data\.batch_size is 1"):
        check_tasks(module, one)
