"""Importance against its formula; allocations that sum to their budget; chunks that keep what was learned."""

import json
from pathlib import Path

import pytest
import torch

import trainmerge as tm
from tests.fitting.test_fit import build, fit_world, learned
from tests.world import recipe, write_world
from trainmerge.coefficients.chunk_allocation import allocate_chunks, magnitude
from trainmerge.coefficients.initial import carried
from trainmerge.data.batch import Outputs
from trainmerge.fitting.allocate_chunks import allocate_run, energy
from trainmerge.fitting.calibration_loss import batches
from trainmerge.run.folder import RunFolder

SCORES = {"a": 0.5, "b": 0.3, "c": 0.15, "d": 0.05}
ROWS = dict.fromkeys(SCORES, 64)


def test_importance_is_the_formula(tmp_path: Path) -> None:
    opened = write_world(tmp_path).open(tmp_path / "workspace")
    torch.manual_seed(0)
    values = torch.randn(3, len(opened.layout.labels))
    got = magnitude(opened.task_vectors, tm.Coefficients(opened.task_vectors.experts, opened.layout, values))
    assert sum(got.values()) == pytest.approx(1)
    raw = {
        name: sum(
            abs(values[k, opened.layout.groups[name][0]].item())
            * tau.double().abs().mean().item()
            * tau.numel()
            for k, tau in enumerate(opened.task_vectors.deltas[name].dense())
        )
        for name in opened.layout.groups
    }
    for name, score in raw.items():
        assert got[name] == pytest.approx(score / sum(raw.values()), rel=1e-5)


def test_energy_is_the_squared_gradient_of_every_batch(tmp_path: Path) -> None:
    write_world(tmp_path)
    module, data = build(
        tmp_path, tmp_path / "run", objective=tm.Alignment(),
        recipe=recipe(tmp_path, grouping=tm.Grouping("chunk", 3, exclude=["pooler.*"])),
    )  # fmt: skip
    got = energy(module, data)
    resident, groups = module.resident, module.opened.layout.groups
    squares = torch.zeros(len(module.opened.layout.labels), dtype=torch.float64)
    for batch in batches(module.resident, data):
        said = module.loaded.teachers[batch.expert].of(batch.ids, resident.device)
        weights = tm.merged_weights(module.opened.task_vectors, module.coefficients)
        states = torch.func.functional_call(resident.merged.module, weights, (), dict(batch.inputs))
        logits = resident.classifiers[batch.expert](states.last_hidden_state, batch.mask)
        loss = module.objective(Outputs(logits), batch._replace(teacher=said)).mean()
        (gradient,) = torch.autograd.grad(loss, module.coefficients.raw)
        squares += gradient.double().square().sum(dim=0)
    want = {name: squares[list(own)].sum().item() for name, own in groups.items()}
    for name, value in want.items():
        assert got[name] == pytest.approx(value / sum(want.values()), rel=1e-3), name


@pytest.mark.parametrize("budget", [0.5, 1.0, 1.25, 3.0, 50.0])
@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0, 3.0])
def test_allocations_sum_to_the_budget(budget: float, kappa: float) -> None:
    chunks = allocate_chunks(SCORES, ROWS, budget, kappa)
    assert sum(chunks.values()) == round(budget * 4)
    assert all(0 <= count <= 64 for count in chunks.values())
    assert sorted(chunks.values(), reverse=True) == list(chunks.values())  # more important, not fewer


def test_kappa_0_is_uniform_and_large_ones_concentrate() -> None:
    assert allocate_chunks(SCORES, ROWS, 5, kappa=0) == dict.fromkeys(SCORES, 5)
    assert allocate_chunks(SCORES, ROWS, 5, kappa=20) == {"a": 20, "b": 0, "c": 0, "d": 0}


def test_no_more_chunks_than_rows() -> None:
    assert allocate_chunks(SCORES, {**ROWS, "a": 3}, 5, kappa=20) == {"a": 3, "b": 17, "c": 0, "d": 0}
    with pytest.raises(ValueError, match="more than the parameters' rows"):
        allocate_chunks(SCORES, dict.fromkeys(SCORES, 2), 5)


@pytest.mark.parametrize(("budget", "kappa"), [(0, 1), (-1, 1), (1, -1)])
def test_bad_budgets(budget: float, kappa: float) -> None:
    with pytest.raises(ValueError, match=r"(budget must be above 0|kappa must be 0 or more)"):
        allocate_chunks(SCORES, ROWS, budget, kappa)


def test_chunks_with_equal_values_are_the_unchunked_merge_bit_for_bit(tmp_path: Path) -> None:
    whole = write_world(tmp_path).open(tmp_path / "workspace")
    names = list(whole.layout.groups)
    wanted = {name: i % 5 for i, name in enumerate(names)}
    chunked = recipe(tmp_path, grouping=tm.Grouping("chunk", wanted)).open(tmp_path / "workspace")
    torch.manual_seed(0)
    plain = tm.Coefficients(whole.task_vectors.experts, whole.layout, torch.rand(3, len(names)))
    fine = tm.Coefficients(plain.experts, chunked.layout, carried(plain, chunked.layout))
    for name, delta in whole.task_vectors.deltas.items():
        outs = [torch.empty(delta.shape) for _ in range(2)]
        for out, c in zip(outs, (plain, fine), strict=True):
            delta.merge(out, c.of(name, c()))
        assert torch.equal(*outs), name


def test_stage_two_starts_from_stage_one_and_keeps_what_gets_no_chunk(tmp_path: Path) -> None:
    write_world(tmp_path)
    objective = tm.Alignment()
    used = recipe(tmp_path, grouping=tm.Grouping(exclude=["pooler.*"]))  # the heads do not read the pooler
    first = fit_world(tmp_path, tmp_path / "one", steps=5, objective=objective, recipe=used)
    opened = first.opened
    rows = {name: shape[0] for name, shape in opened.task_vectors.shapes.items()}
    importance = magnitude(opened.task_vectors, first.coefficients)
    chunks = allocate_chunks(importance, rows, budget=1.0, kappa=2.0)
    file = tmp_path / "chunks.json"
    file.write_text(json.dumps({"chunks": chunks}))
    options = {
        "recipe": recipe(tmp_path, grouping=tm.Grouping("chunk", str(file), exclude=["pooler.*"])),
        "initial": str(RunFolder(tmp_path / "one").coefficients),
        "objective": objective,
    }
    module, _ = build(tmp_path, tmp_path / "two", **options)
    assert module.start.shape == (3, sum(max(1, count) for count in chunks.values()))
    second = fit_world(tmp_path, tmp_path / "two", steps=5, **options)
    before, after = learned(tmp_path / "one"), learned(tmp_path / "two")
    for name, (group,) in opened.layout.groups.items():
        new = after[:, list(second.opened.layout.groups[name])]
        if chunks[name] == 0:
            assert torch.equal(new[:, 0], before[:, group]), name
        else:
            assert not torch.equal(new, before[:, [group]].expand_as(new)), name
    assert 0 in chunks.values()


def test_patterns_name_chunks(tmp_path: Path) -> None:
    opened = write_world(tmp_path).open(tmp_path / "workspace")
    shapes = opened.task_vectors.shapes
    layout = tm.Grouping("chunk", {"*": 1, "*.dense.weight": 4}).layout(shapes)
    assert {len(layout.groups[name]) for name in shapes if name.endswith(".dense.weight")} == {4}
    assert {len(layout.groups[name]) for name in shapes if not name.endswith(".dense.weight")} == {1}
    with pytest.raises(ValueError, match=r"match no parameter: nope"):
        tm.Grouping("chunk", {"nope*": 2}).layout(shapes)
    with pytest.raises(ValueError, match="no coefficient is left to learn"):
        tm.Grouping("chunk", {"*": 0}).layout(shapes)
    with pytest.raises(ValueError, match=r"absent\.json: no such file.*trainmerge allocate"):
        tm.Grouping("chunk", str(tmp_path / "absent.json")).layout(shapes)
    (tmp_path / "list.json").write_text("{}")
    with pytest.raises(ValueError, match="not an allocation of chunks"):
        tm.Grouping("chunk", str(tmp_path / "list.json")).layout(shapes)


def test_energy_uses_what_the_fit_recorded_of_the_experts(tmp_path: Path) -> None:
    """In the fit's own precision of weights: in another one the experts would say other things."""
    used = recipe(tmp_path, grouping=tm.Grouping(exclude=["pooler.*"]))
    write_world(tmp_path)
    fit_world(tmp_path, tmp_path / "run", 1, recipe=used, objective=tm.Alignment(), weights="bfloat16")
    allocate_run(tmp_path / "run", tmp_path / "made" / "chunks.json", budget=1.0, kappa=1.0, by="energy")
    assert len(list(RunFolder(tmp_path / "run").workspace.glob("teachers-*"))) == 1
