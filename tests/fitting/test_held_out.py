"""What a merge recovers of its experts on held-out examples, and stopping by it.

Legend: `K` experts.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import trainmerge as tm
from tests.heads_world import write_heads
from tests.world import LABELS, recipe, write_world
from trainmerge.fitting.held_out import HeldOutJudge, mean_share
from trainmerge.run.folder import RunFolder
from trainmerge.run.recipe_files import calibration_files
from trainmerge.run.saved import unfinished

K = len(LABELS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    return root


def module_and_data(world: Path, run: Path, **settings: object) -> tuple[tm.MergeModule, tm.Calibration]:
    merge = recipe(world)
    module = tm.MergeModule(
        merge, workspace=str(run / "workspace"), **{"objective": tm.Alignment(), **settings}
    )
    files = calibration_files(merge)
    return module, tm.Calibration(files, merge.base, batch_size=4, max_length=16, held_out=0.25)


@pytest.fixture
def held_out(world: Path, tmp_path: Path) -> HeldOutJudge:
    module, data = module_and_data(world, tmp_path)
    module.load(data)
    return HeldOutJudge.of(module.inputs(data), module.resident, module.objective)


def test_a_judge_leaves_the_examples_that_it_is_given_as_they_were(world: Path, tmp_path: Path) -> None:
    module, data = module_and_data(world, tmp_path)
    module.load(data)
    part = data.learning_part(4)
    judge = HeldOutJudge.on(part, module.inputs(data), module.resident, module.objective)
    assert part.batch_size == 4 < judge.data.batch_size


def recovered(held_out: HeldOutJudge, values: Tensor) -> Tensor:
    held_out.resident.merged.coefficients.reset_(values)
    return held_out.recovered()


def test_the_base_recovers_nothing_and_each_expert_itself(held_out: HeldOutJudge) -> None:
    shape = held_out.resident.merged.coefficients.raw.shape
    torch.testing.assert_close(recovered(held_out, torch.zeros(shape)), torch.zeros(K, dtype=torch.float64))
    for k in range(K):
        one_hot = torch.zeros(shape)
        one_hot[k] = 1.0
        assert recovered(held_out, one_hot)[k] == pytest.approx(1.0, abs=1e-5)


def test_a_merge_that_is_not_finite_is_the_worst(held_out: HeldOutJudge) -> None:
    """NaN is neither more nor less than anything: a search could choose it, or lose the best beside it."""
    found = recovered(held_out, torch.full(held_out.resident.merged.coefficients.raw.shape, 1e38)).tolist()
    assert found == [-math.inf] * K
    assert mean_share(found, [1.0, *[0.0] * (K - 1)]) == -math.inf
    assert mean_share([0.5, *found[1:]], [1.0, *[0.0] * (K - 1)]) == 0.5


def test_it_is_the_mean_distance_over_the_held_out_examples(held_out: HeldOutJudge) -> None:
    """Example by example, from the experts' own logits in float64."""
    resident, data = held_out.resident, held_out.data
    values = torch.full(resident.merged.coefficients.raw.shape, 0.4)
    got = recovered(held_out, values)
    want = []
    for k, examples in enumerate(data.examples):
        batch = resident.batch(k, examples, data.tokenize)
        with torch.no_grad():
            merged = resident(batch).logits.double().log_softmax(-1)
            with resident.merged.teacher(k):
                expert = resident(batch).logits.double().log_softmax(-1)
            with resident.merged.uniform(torch.zeros(K), everywhere=True):
                base = resident(batch).logits.double().log_softmax(-1)
        apart = [(expert.exp() - other.exp()).abs().sum(-1).mean() / 2 for other in (merged, base)]
        want.append(1 - float(apart[0] / apart[1]))
    assert got.tolist() == pytest.approx(want, rel=1e-3, abs=1e-4)


def trainer(run: Path, steps: int, **settings: object) -> object:
    stop = tm.StopOnHeldOut(**{"every": 2, "patience": 2, **settings})
    return tm.make_trainer(
        run, max_steps=steps, accelerator="cpu", enable_progress_bar=False, callbacks=[stop]
    )


def learn(
    world: Path, run: Path, steps: int, lr: float = 0.05, **settings: object
) -> tuple[tm.MergeModule, object]:
    module, data = module_and_data(world, run, optimizer=lambda c: torch.optim.Adam(c, lr=lr))
    made = trainer(run, steps, **settings)
    tm.fit(module, data, made, run)
    return module, made


def callback(made: object) -> tm.StopOnHeldOut:
    return next(c for c in made.callbacks if isinstance(c, tm.StopOnHeldOut))


def test_the_run_has_the_best_steps_coefficients(world: Path, tmp_path: Path) -> None:
    module, made = learn(world, tmp_path / "run", steps=8, lr=3.0)  # far too fast: it only gets worse
    stop = callback(made)
    assert stop.best is not None
    step, values = stop.best
    means = {at: sum(shares) for at, shares in stop.recovered.items()}
    assert step == max(means, key=means.__getitem__)
    saved = tm.load_coefficients(tmp_path / "run" / "coefficients.safetensors")
    assert torch.equal(saved(), values)
    assert torch.equal(module.coefficients(), values)
    assert stop.stopped == made.global_step < 8
    assert unfinished(RunFolder(tmp_path / "run")) == ""


def test_a_resumed_run_keeps_the_same_step(world: Path, tmp_path: Path) -> None:
    whole, made = learn(world, tmp_path / "whole", steps=6)
    learn(world, tmp_path / "parts", steps=3)
    parts, resumed = learn(world, tmp_path / "parts", steps=6)
    assert callback(resumed).best[0] == callback(made).best[0]
    assert torch.equal(parts.coefficients(), whole.coefficients())
    again, ended = learn(world, tmp_path / "parts", steps=6)  # no step is left
    assert callback(ended).best[0] == callback(made).best[0]
    assert torch.equal(again.coefficients(), whole.coefficients())


def test_the_best_step_is_that_of_the_tasks_weights() -> None:
    """By equal weights step 2 would be the best."""
    stop = tm.StopOnHeldOut(every=1, patience=9)
    stop.weights = [9.0, 1.0]
    for step, shares in enumerate([[0.0, 0.0], [0.8, 0.1], [0.4, 0.6], [0.3, 0.5]]):
        stop.add(step, torch.tensor(shares), torch.full((2, 1), float(step)))
    assert stop.best is not None
    assert (stop.best[0], stop.waited) == (1, 2)


def test_patience_counts_measurements_without_a_rise() -> None:
    stop = tm.StopOnHeldOut(every=1, patience=2, least=0.01)
    for step, mean in enumerate((0.1, 0.3, 0.305, 0.309)):
        stop.add(step, torch.tensor([mean]), torch.tensor([[float(step)]]))
    assert stop.waited == 2
    assert stop.best is not None
    assert stop.best[0] == 3  # the best, though the rise was too small to wait for
    other = tm.StopOnHeldOut()
    other.load_state_dict(stop.state_dict())
    assert other.state_dict() == stop.state_dict()


def test_it_needs_held_out_examples(world: Path, tmp_path: Path) -> None:
    module, data = module_and_data(world, tmp_path / "run")
    none = tm.Calibration(data.files, data.tokenizer, max_length=16)
    with pytest.raises(ValueError, match=r"set data\.held_out"):
        tm.fit(module, none, trainer(tmp_path / "run", 2), tmp_path / "run")
    better, data = module_and_data(world, tmp_path / "two", keep_better=True)
    with pytest.raises(ValueError, match=r"leave out model\.keep_better"):
        tm.fit(better, data, trainer(tmp_path / "two", 2), tmp_path / "two")


def test_settings_are_checked() -> None:
    for wrong in ({"every": 0}, {"patience": 0}, {"least": -1.0}):
        with pytest.raises(ValueError, match="StopOnHeldOut"):
            tm.StopOnHeldOut(**wrong)


KINDS = {
    "classes": {"task": "ForSequenceClassification", "num_labels": 3},
    "labels": {
        "task": "ForSequenceClassification", "num_labels": 3, "problem_type": "multi_label_classification"
    },
    "tokens": {"task": "ForTokenClassification", "num_labels": 3},
    "values": {"task": "ForSequenceClassification", "num_labels": 1, "problem_type": "regression"},
}  # fmt: skip


def test_outputs_of_every_kind_are_judged(tmp_path: Path) -> None:
    """Of a regression, which has no probabilities, by the squared distance of its numbers."""
    merge, _ = write_heads(tmp_path, "Bert", KINDS, count=32)
    module = tm.MergeModule(merge, objective=tm.Alignment(), workspace=str(tmp_path / "workspace"))
    data = tm.Calibration(calibration_files(merge), merge.base, batch_size=4, max_length=16, held_out=0.25)
    module.load(data)
    judge = HeldOutJudge.of(module.inputs(data), module.resident, module.objective)
    shape = module.resident.merged.coefficients.raw.shape
    assert recovered(judge, torch.zeros(shape)).tolist() == pytest.approx([0.0] * len(KINDS), abs=1e-6)
    for k in range(len(KINDS)):
        alone = torch.zeros(shape)
        alone[k] = 1.0
        assert recovered(judge, alone)[k] == pytest.approx(1.0, abs=1e-4)
    assert recovered(judge, torch.full(shape, 0.3)).isfinite().all()
