"""Recorded predictions are the experts' own, in the calibration set's order, recorded once."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import trainmerge as tm
from tests.fitting.test_fit import build, fit_world, learned
from tests.world import bert, nudge, recipe, write_world
from trainmerge.data.batch import Batch
from trainmerge.model.teachers import Record


def same(a: Record, b: Record) -> bool:
    return a.parts.keys() == b.parts.keys() and all(torch.equal(a.parts[n], b.parts[n]) for n in a.parts)


def test_predictions_are_each_experts_own_and_kept(tmp_path: Path) -> None:
    write_world(tmp_path)
    module, data = build(tmp_path, tmp_path / "run", objective=tm.Entropy(agreement=1.0))
    module.load(data)
    resident, recorded = module.resident, module.loaded.teachers
    resident.merged.materialise()
    before = [parameter.clone() for parameter in resident.merged.module.parameters()]
    for k, examples in enumerate(data.examples):
        inputs, mask = data.tokenize.encode(examples)
        batch = Batch(k, inputs, mask, torch.arange(len(examples)))
        with resident.merged.teacher(k), torch.no_grad():
            want = resident(batch).logits.log_softmax(-1)
        torch.testing.assert_close(recorded[k].parts["log_p"], want, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, resident.merged.module.parameters(), strict=True))
    (file,) = (tmp_path / "run" / "workspace").glob("teachers-*.safetensors")
    written = file.stat().st_mtime_ns
    again, data = build(tmp_path, tmp_path / "run", objective=tm.Entropy(agreement=1.0))
    again.load(data)
    assert file.stat().st_mtime_ns == written
    assert all(same(a, b) for a, b in zip(recorded, again.loaded.teachers, strict=True))


def test_a_guarded_fit_resumes_bit_for_bit_and_lowers_its_loss(tmp_path: Path) -> None:
    write_world(tmp_path)
    objective = tm.Entropy(agreement=5.0)
    fit_world(tmp_path, tmp_path / "whole", steps=9, objective=objective)
    for steps in (4, 9):
        fit_world(tmp_path, tmp_path / "parts", steps=steps, objective=objective)
    assert torch.equal(learned(tmp_path / "whole"), learned(tmp_path / "parts"))


def test_a_teacher_is_the_expert_itself_under_preprocessing_too(tmp_path: Path) -> None:
    write_world(tmp_path)
    objective = tm.Entropy(agreement=1.0)
    plain, data = build(tmp_path, tmp_path / "a", objective=objective)
    ties = recipe(tmp_path, preprocess=[tm.Ties()])
    trimmed, _ = build(tmp_path, tmp_path / "b", objective=objective, recipe=ties)
    plain.load(data)
    trimmed.load(data)
    assert all(same(a, b) for a, b in zip(plain.loaded.teachers, trimmed.loaded.teachers, strict=True))


def test_other_experts_are_recorded_anew(tmp_path: Path) -> None:
    write_world(tmp_path)
    for seed in (0, 1):
        if seed:
            other = bert()
            nudge(other, 77)
            other.save_pretrained(tmp_path / "experts" / "mood")
        module, data = build(tmp_path, tmp_path / "run", objective=tm.Entropy(agreement=1.0))
        module.load(data)
    first, second = (tmp_path / "run" / "workspace").glob("teachers-*.safetensors")
    for file in (first, second):
        tensors = load_file(file)
        save_file(tensors, file, {"starts": "[[0, 1"})
    with pytest.raises(
        ValueError, match=r"teachers-.*'starts' of its header: not valid JSON.* Remove .*teach"
    ):
        build(tmp_path, tmp_path / "run", objective=tm.Entropy(agreement=1.0))[0].load(data)
