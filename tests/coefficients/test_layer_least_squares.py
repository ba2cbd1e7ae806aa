"""Coefficients by least squares on outputs: against the outputs themselves, in float64, and identities.

Legend: `K` experts, `m x n` a weight (outputs x inputs), `T` tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import trainmerge as tm
from tests.mixture_world import write_mixture
from tests.world import languages_recipe, recipe, write_languages, write_world
from trainmerge.coefficients.forecast import forecast
from trainmerge.coefficients.layer_systems import Moments, layer_system, layer_systems
from trainmerge.fitting.prepare import statistics_of
from trainmerge.model.expert_statistics import ExpertStatistics
from trainmerge.run.recipe_files import calibration_files
from trainmerge.task_vectors.delta import TaskVectors

K, M, N, T = 3, 6, 8, 20
EXPERTS = ("a", "b", "c")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Inputs:
    """Given layer inputs X_k [n, T] instead of a model's."""

    task_vectors: TaskVectors
    originals: TaskVectors
    inputs: Mapping[str, Sequence[Tensor]]
    weights: Sequence[float]

    def grams(self, expert: int, names: Sequence[str], _: Mapping[str, Tensor]) -> dict[str, Tensor]:
        moved = {name: self.inputs[name][expert] for name in names if name in self.inputs}
        return {name: x @ x.T / x.shape[1] for name, x in moved.items()}

    def in_order(self, names: Iterable[str]) -> list[str]:
        return list(names)


def vectors(taus: Mapping[str, Tensor]) -> TaskVectors:
    base = {name: torch.zeros_like(own[0]) for name, own in taus.items()}
    each = {e: {name: own[k] for name, own in taus.items()} for k, e in enumerate(EXPERTS)}
    return TaskVectors.from_state_dicts(base, each)


def solve(
    taus: Mapping[str, Tensor],
    inputs: Mapping[str, Sequence[Tensor]],
    weights: Sequence[float] = (1.0,) * K,
    grouping: tm.Grouping = tm.Grouping(),  # noqa: B008 - frozen
    own: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, tm.Layout]:
    changed = vectors(taus)
    layout = grouping.layout({name: delta.shape for name, delta in changed.deltas.items()})
    measure = Inputs(changed, vectors(own or taus), inputs, weights)
    return tm.LayerLeastSquares().measured(EXPERTS, layout, measure), layout


def reference(taus: Tensor, inputs: Sequence[Tensor], weights: Sequence[float], own: Tensor) -> Tensor:
    """The least squares over all tokens at once: rows are outputs of every token, columns are experts."""
    rows, told = [], []
    for k, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
        factor = (weight / x.shape[1]) ** 0.5
        rows.append(factor * (taus.double() @ x.double()).flatten(1).T)
        told.append(factor * (own[k].double() @ x.double()).flatten())
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(told)[:, None]).solution[:, 0]


WEIGHTS = (1.0, 2.0, 0.5)


def test_it_is_the_least_squares_over_the_outputs() -> None:
    taus, own = random(0, K, M, N), random(1, K, M, N)
    inputs = [random(k, N, T + 7 * k) for k in range(2, 2 + K)]
    got, _ = solve({"w": taus}, {"w": inputs}, WEIGHTS, own={"w": own})
    torch.testing.assert_close(
        got[:, 0].double(), reference(taus, inputs, WEIGHTS, own), rtol=1e-4, atol=1e-5
    )


def test_chunks_are_least_squares_over_their_rows() -> None:
    taus, inputs = random(0, K, M, N), [random(k, N, T) for k in range(K)]
    got, layout = solve({"w": taus}, {"w": inputs}, WEIGHTS, tm.Grouping("chunk", chunks=2))
    assert layout.labels == ("w[0]", "w[1]")
    for part, rows in enumerate((slice(0, 3), slice(3, 6))):
        want = reference(taus[:, rows], inputs, WEIGHTS, taus[:, rows])
        torch.testing.assert_close(got[:, part].double(), want, rtol=1e-4, atol=1e-5)


def test_one_coefficient_for_several_layers_counts_every_layer_alike() -> None:
    taus = {"layers.0.w": random(0, K, M, N), "layers.1.w": random(1, K, M, N)}
    inputs = {name: [random(10 * i + k, N, T) for k in range(K)] for i, name in enumerate(taus)}
    got, _ = solve(taus, inputs, grouping=tm.Grouping("task"))
    louder = {**taus, "layers.1.w": 100 * taus["layers.1.w"]}
    torch.testing.assert_close(solve(louder, inputs, grouping=tm.Grouping("task"))[0], got)


def test_identities() -> None:
    inputs = {"w": [random(k, N, T) for k in range(K)]}
    tau = random(9, M, N)
    equal, _ = solve({"w": tau.expand(K, M, N)}, inputs)
    torch.testing.assert_close(equal, torch.full((K, 1), 1 / K), rtol=1e-4, atol=1e-4)
    apart = torch.zeros(K, M, N)  # each task vector reads features of its own, and so do the inputs
    apart_inputs = []
    for k, columns in enumerate((slice(0, 3), slice(3, 6), slice(6, 8))):
        apart[k, :, columns] = random(k, M, N)[:, columns]
        x = torch.zeros(N, T)
        x[columns] = random(20 + k, N, T)[columns]
        apart_inputs.append(x)
    alone, _ = solve({"w": apart}, {"w": apart_inputs})
    torch.testing.assert_close(alone, torch.ones(K, 1), rtol=1e-4, atol=1e-4)
    twice = {"w": [torch.cat([x, x], dim=1) for x in inputs["w"]]}
    taus = {"w": random(3, K, M, N)}
    torch.testing.assert_close(solve(taus, twice)[0], solve(taus, inputs)[0], rtol=1e-4, atol=1e-5)


def test_the_residual_of_orthogonal_effects_on_equal_inputs_is_one_minus_one_over_k() -> None:
    moment = torch.eye(N)
    taus = torch.zeros(K, M, N)
    for k in range(K):
        taus[k, k] = 1.0  # outputs of their own, equal sizes
    system = layer_system(taus, taus, torch.zeros(M, N), [Moments(moment)] * K, (1.0,) * K)
    c = system.solve(1e-12)
    torch.testing.assert_close(c, torch.full((K,), 1 / K, dtype=torch.float64))
    assert system.residual(c) == pytest.approx(1 - 1 / K)
    same = taus[:1].expand(K, M, N)
    flat = layer_system(same, same, torch.zeros(M, N), [Moments(moment)] * K, (1.0,) * K)
    assert flat.residual(flat.solve(1e-9)) == pytest.approx(0, abs=1e-6)


def test_a_shifted_system_is_the_least_squares_to_the_experts_own_outputs() -> None:
    """Outputs of the experts on inputs y of their own; the merge reads x."""
    taus, own, base = random(0, K, M, N), random(1, K, M, N), random(2, M, N)
    x = [random(10 + k, N, T) for k in range(K)]
    y = [each + 0.1 * random(20 + k, N, T) for k, each in enumerate(x)]
    moments = [Moments(a @ a.T, (b - a) @ a.T, (b - a) @ (b - a).T) for a, b in zip(x, y, strict=True)]
    system = layer_system(taus, own, base, moments, WEIGHTS)
    rows, told = [], []
    for k, weight in enumerate(WEIGHTS):
        a, b = x[k].double(), y[k].double()
        rows.append(weight**0.5 * (taus.double() @ a).flatten(1).T)
        told.append(weight**0.5 * ((base + own[k]).double() @ b - base.double() @ a).flatten())
    whole, target = torch.cat(rows), torch.cat(told)
    best = torch.linalg.lstsq(whole, target[:, None]).solution[:, 0]
    found = system.solve(1e-12)
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5)
    left = float((whole @ best - target).square().sum() / target.square().sum())
    assert system.residual(found) == pytest.approx(left, rel=1e-4)
    assert system.total == pytest.approx(float(target.square().sum()), rel=1e-5)


def test_the_forecast_counts_layers_by_size() -> None:
    """Equal effects are merged without loss; orthogonal ones on equal inputs lose 1 - 1/K."""
    taus = torch.zeros(K, M, N)
    for k in range(K):
        taus[k, k] = 1.0
    alike = 3 * random(1, 1, M, N).expand(K, M, N)
    eye = [N**0.5 * torch.eye(N)] * K
    changed = vectors({"apart.weight": taus, "alike.weight": alike})
    layout = tm.Grouping().layout({name: delta.shape for name, delta in changed.deltas.items()})
    found = forecast(layout, Inputs(changed, changed, dict.fromkeys(changed.deltas, eye), (1.0,) * K), K)
    assert found.apart(["apart.weight"]) == pytest.approx(1 - 1 / K, abs=1e-5)
    assert found.apart(["alike.weight"]) == pytest.approx(0, abs=1e-5)
    large, small = (float(own.square().sum()) ** 0.5 for own in (alike, taus))
    assert found.sizes == pytest.approx({"alike.weight": large, "apart.weight": small}, rel=1e-5)
    whole = (1 - 1 / K) * small / (small + large)
    assert found.apart(layout.groups) == pytest.approx(whole, abs=1e-5)
    assert found.together(layout.groups) == pytest.approx(whole, abs=1e-5)  # 1 / K each is best for both
    with pytest.raises(ValueError, match="reach no linear layer"):
        forecast(layout, Inputs(changed, changed, {}, (1.0,) * K), K)


def test_norms_and_embeddings_take_their_blocks_mean() -> None:
    taus = {
        "embed.weight": random(4, K, 5, N), "layers.0.a.weight": random(0, K, M, N),
        "layers.0.b.weight": random(1, K, M, N), "layers.0.norm.weight": random(2, K, N),
        "layers.1.a.weight": random(3, K, M, N),
    }  # fmt: skip
    linear = [name for name in taus if ".a." in name or ".b." in name]
    inputs = {name: [random(10 * i + k, N, T) for k in range(K)] for i, name in enumerate(linear)}
    got, layout = solve(taus, inputs)
    at = {label: got[:, i] for i, label in enumerate(layout.labels)}
    first = (at["layers.0.a.weight"] + at["layers.0.b.weight"]) / 2
    torch.testing.assert_close(at["layers.0.norm.weight"], first)
    every = (2 * first + at["layers.1.a.weight"]) / 3
    torch.testing.assert_close(at["embed.weight"], every)


def fitted(merge: tm.Recipe, run: Path, sequential: bool = False) -> tm.MergeModule:
    start = tm.LayerLeastSquares(sequential=sequential)
    module = tm.MergeModule(merge, initial=start, workspace=str(run / "workspace"))
    data = tm.Calibration(calibration_files(merge), merge.base, max_length=16)
    trainer = tm.make_trainer(run, max_steps=0, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, run)
    return module


@pytest.mark.parametrize("sequential", [False, True])
def test_an_expert_alone_gets_one(tmp_path: Path, sequential: bool) -> None:
    write_languages(tmp_path)
    merge = languages_recipe(tmp_path)
    module = fitted(tm.Recipe(merge.base, {"a": merge.experts["a"]}), tmp_path / "run", sequential)
    torch.testing.assert_close(
        module.coefficients(), torch.ones_like(module.coefficients()), rtol=1e-4, atol=1e-4
    )


def test_a_fit_without_steps_measures_low_rank_and_full_experts(tmp_path: Path) -> None:
    write_world(tmp_path)
    values = fitted(recipe(tmp_path), tmp_path / "run").coefficients().detach()
    assert bool(values.isfinite().all())
    assert (tmp_path / "run" / "coefficients.safetensors").exists()


def measured(root: Path, exclude: Sequence[str] = ()) -> tuple[tm.MergeModule, ExpertStatistics]:
    """The world's merge solved in sequence, and what measured it."""
    write_world(root)
    merge = recipe(root, grouping=tm.Grouping("tensor", exclude=exclude))
    start = tm.LayerLeastSquares(sequential=True)
    module = tm.MergeModule(merge, initial=start, workspace=str(root / "work"))
    data = tm.Calibration(calibration_files(merge), merge.base, max_length=16)
    module.load(data)
    return module, statistics_of(module.inputs(data), module.resident)


def queries(module: tm.MergeModule) -> list[str]:
    """The weights of the last block whose inputs only earlier blocks decide."""
    names = [n for n in module.opened.layout.groups if "layer.1.attention.self" in n]
    return [name for name in names if name.endswith("weight")]


def test_a_merge_that_is_the_expert_has_its_inputs(tmp_path: Path) -> None:
    module, measure = measured(tmp_path)
    names, grams = queries(module), measure.grams(0, queries(module), {})
    found = measure.shifted(0, names, torch.eye(K)[0][:, None].expand_as(module.coefficients()))
    assert len(found) == 3
    for name, (inputs, shift, shifts) in found.items():
        size = float(grams[name].diagonal().sum())
        torch.testing.assert_close(inputs, grams[name], rtol=0, atol=1e-5 * size)
        assert max(float(own.abs().max()) for own in (shift, shifts)) <= 1e-5 * size


def test_blocks_in_sequence_read_the_model_merged_so_far(tmp_path: Path) -> None:
    module, measure = measured(tmp_path, exclude=["*embeddings.*"])  # which would take the mean of all blocks
    values, layout = module.coefficients().detach(), module.opened.layout
    moments = [measure.shifted(k, queries(module), values) for k in range(K)]
    for name in queries(module):
        own = [Moments(*of_expert[name]) for of_expert in moments]
        ((group, system),) = layer_systems(name, layout.groups[name], own, measure)
        torch.testing.assert_close(values[:, group].double(), system.solve(1e-6), rtol=1e-4, atol=1e-4)


def test_experts_in_one_tensor_are_named_with_their_share(tmp_path: Path) -> None:
    merge = languages_recipe(write_mixture(tmp_path, "Granite-MoE"))
    with pytest.warns(
        UserWarning, match=r"inputs of 4 linear layers .*experts.*mean of their blocks: [0-9.]+% of the task"
    ):
        values = fitted(merge, tmp_path / "run").coefficients()
    assert bool(values.isfinite().all())


def test_without_a_linear_layer_it_says_so() -> None:
    with pytest.raises(ValueError, match="reach no linear layer"):
        solve({"norm.weight": random(0, K, N)}, {})
