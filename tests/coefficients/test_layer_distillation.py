"""Coefficients learned block by block: against the closed form of a linear block, and on real blocks.

Legend: `K` experts, `m x n` a weight (outputs x inputs), `T` tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import trainmerge as tm
from tests.world import languages_recipe, recipe, write_languages, write_world
from trainmerge.coefficients.layer_systems import Moments, layer_system
from trainmerge.fitting.prepare import statistics_of
from trainmerge.model.expert_statistics import ExpertStatistics
from trainmerge.run.recipe_files import calibration_files
from trainmerge.task_vectors.delta import TaskVectors

K, M, N, T = 3, 6, 8, 20
EXPERTS = ("a", "b", "c")
WEIGHTS = (1.0, 2.0, 0.5)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Linear:
    """Blocks of one linear layer: inputs x and the experts' outputs, [n, T] and [m, T] for each expert."""

    task_vectors: TaskVectors
    inputs: Mapping[str, Sequence[Tensor]]
    told: Mapping[str, Sequence[Tensor]]

    def in_order(self, names: Iterable[str]) -> list[str]:
        return list(names)

    def block(self, names: Sequence[str], _: Tensor) -> object:
        (name,) = names
        if name not in self.inputs:
            return None

        def error(weights: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
            leaf = weights[name].detach().clone().requires_grad_()
            with torch.enable_grad():
                terms = zip(WEIGHTS, self.inputs[name], self.told[name], strict=True)
                total = torch.stack([w / T * (leaf @ x - y).square().sum() for w, x, y in terms]).sum()
            return float(total.detach()), {name: torch.autograd.grad(total, leaf)[0]}

        return error


def vectors(taus: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> TaskVectors:
    each = {e: {name: base[name] + own[k] for name, own in taus.items()} for k, e in enumerate(EXPERTS)}
    return TaskVectors.from_state_dicts(base, each)


def test_a_linear_block_gets_the_closed_form() -> None:
    """That of layer least squares in sequence, whose inputs x and y differ."""
    names = ("layers.0.weight", "layers.1.weight")
    taus = {name: random(i, K, M, N) for i, name in enumerate(names)}
    base = {name: random(10 + i, M, N) for i, name in enumerate(names)}
    x = {name: [random(20 + 10 * i + k, N, T) for k in range(K)] for i, name in enumerate(names)}
    y = {name: [own + 0.3 * random(60 + k, N, T) for k, own in enumerate(x[name])] for name in names}
    told = {n: [(base[n] + taus[n][k]) @ y[n][k] for k in range(K)] for n in names}
    changed = vectors(taus, base)
    layout = tm.Grouping().layout({name: delta.shape for name, delta in changed.deltas.items()})
    found = tm.LayerDistillation(steps=200, tolerance=1e-12).measured(
        EXPERTS, layout, Linear(changed, x, told)
    )
    for name in names:
        pairs = zip(x[name], y[name], strict=True)
        moments = [Moments(a @ a.T / T, (b - a) @ a.T / T, (b - a) @ (b - a).T / T) for a, b in pairs]
        want = layer_system(taus[name], taus[name], base[name], moments, WEIGHTS).solve(1e-12)
        (group,) = layout.groups[name]
        torch.testing.assert_close(found[:, group], want.float(), rtol=1e-6, atol=1e-6)


def test_chunks_are_learned_apart_and_what_is_not_reached_stays() -> None:
    name = "layers.0.weight"
    taus = {name: random(0, K, M, N), "norm.weight": random(1, K, N)}
    base = {name: random(2, M, N), "norm.weight": random(3, N)}
    x = {name: [random(20 + k, N, T) for k in range(K)]}
    told = {name: [(base[name] + tau) @ own for tau, own in zip(taus[name], x[name], strict=True)]}
    changed = vectors(taus, base)
    shapes = {name: delta.shape for name, delta in changed.deltas.items()}
    layout = tm.Grouping("chunk", chunks=2).layout(shapes)
    method = tm.LayerDistillation(steps=200, start=0.25, tolerance=1e-12)
    found = method.measured(EXPERTS, layout, Linear(changed, x, told))
    eye = [Moments(own @ own.T / T) for own in x[name]]
    for group, rows in zip(layout.groups[name], (slice(0, 3), slice(3, 6)), strict=True):
        tau = taus[name][:, rows]
        want = layer_system(tau, tau, base[name][rows], eye, WEIGHTS).solve(1e-12)
        torch.testing.assert_close(found[:, group], want.float(), rtol=1e-6, atol=1e-6)
    for group in layout.groups["norm.weight"]:
        assert found[:, group].tolist() == [0.25] * K
    with pytest.raises(ValueError, match="reach no block"):
        method.measured(EXPERTS, layout, Linear(changed, {}, {}))
    with pytest.raises(ValueError, match="one coefficient per block"):
        method.measured(EXPERTS, tm.Grouping("task").layout(shapes), Linear(changed, x, told))


@pytest.fixture(scope="module", params=["bert", "llama"])
def learned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tm.MergeModule, ExpertStatistics]:
    """Learned on a tiny model of two blocks: full and low-rank experts, heads; or language models."""
    root: Path = tmp_path_factory.mktemp(request.param)
    if request.param == "bert":
        write_world(root)
        merge = recipe(root)
    else:
        merge = languages_recipe(write_languages(root))
    start = tm.LayerDistillation(steps=5)
    module = tm.MergeModule(merge, initial=start, workspace=str(root / "work"))
    data = tm.Calibration(calibration_files(merge), merge.base, max_length=16, max_examples=6)
    module.load(data)
    return module, statistics_of(module.inputs(data), module.resident)


def test_no_block_ends_above_its_start(learned: tuple[tm.MergeModule, ExpertStatistics]) -> None:
    """By the error of each block on the inputs that the blocks before it gave it."""
    module, measure = learned
    layout, deltas = module.opened.layout, module.resident.merged.task_vectors.deltas
    after = module.coefficients().detach()
    experts = len(after)
    assert bool(after.isfinite().all())
    for block in ("layer.0.", "layers.0.", "layer.1.", "layers.1."):
        names = [name for name in layout.groups if block in name]
        if not names:
            continue
        error = measure.block(names, after)  # of later blocks its inputs do not depend
        assert error is not None

        def at(values: Tensor, error=error, names=names) -> float:
            weights = {name: torch.empty_like(deltas[name].base) for name in names}
            for name, out in weights.items():
                deltas[name].merge(out, values[:, list(layout.groups[name])])
            return error(weights)[0]

        start = at(torch.full_like(after, 1 / experts))
        assert at(after) < start  # these experts are not merged best by their average


def test_an_experts_own_block_has_no_error(learned: tuple[tm.MergeModule, ExpertStatistics]) -> None:
    """The targets are the expert's outputs, and the inputs those of the model at these coefficients."""
    module, measure = learned
    layout, deltas = module.opened.layout, module.resident.merged.task_vectors.deltas
    names = [name for name in layout.groups if "layer.1." in name or "layers.1." in name]
    one_hot = torch.zeros_like(module.coefficients().detach())
    one_hot[0] = 1.0
    measure = ExpertStatistics(
        measure.resident,
        measure.examples,
        measure.tokenizer,
        measure.folder,
        weights=[1.0, *[0.0] * (len(one_hot) - 1)],
    )
    error = measure.block(names, one_hot)
    assert error is not None
    weights = {name: torch.empty_like(deltas[name].base) for name in names}
    base = error({name: deltas[name].base for name in names})[0]
    for name, out in weights.items():
        deltas[name].merge(out, one_hot[:, list(layout.groups[name])])
    assert error(weights)[0] <= 1e-9 * base
